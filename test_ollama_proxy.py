"""Tests for ollama_proxy: the file itself, then its sections in their order, over real sockets from Wires on.

Streaming is proved with an Event: the upstream sends a part, then waits until the client has it. WAIT is only the
limit of a stuck test; no passing test uses any of it.
"""

import ast
import contextlib
import doctest
import email.message
import email.utils
import gzip
import hmac
import http.client
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time

import pytest

import ollama_proxy as proxy

HERE = pathlib.Path(proxy.__file__).resolve().parent
SOURCE = (HERE / "ollama_proxy.py").read_text()
README = (HERE / "README.md").read_text()
WAIT = 10
CHAT = b'{"model": "m:1", "messages": [{"role": "user", "content": "a secret prompt"}]}'


# ---- The file itself --------------------------------------------------------


def sections():
    """{title: [top-level nodes]} in file order."""
    titles = {number: match[1] for number, line in enumerate(SOURCE.splitlines(), 1)
              for match in [re.match(r"# ---- (.+?) -+$", line)] if match}
    found = {title: [] for title in titles.values()}
    for node in ast.parse(SOURCE).body:
        above = [title for line, title in titles.items() if line < node.lineno]
        if above:
            found[above[-1]].append(node)
    return found


def defined(node):
    if isinstance(node, ast.Assign):
        return [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return [node.name] if hasattr(node, "name") else []


def test_the_examples_in_docstrings_are_true():
    assert doctest.testmod(proxy).failed == 0


def test_the_contents_list_names_the_sections_in_their_order():
    listed = re.findall(r"^    ([A-Z][A-Za-z ]*?)  +\S", proxy.__doc__.split("Contents", 1)[1], re.M)
    assert listed == list(sections())


def test_section_lines_are_79_wide():
    assert {len(line) for line in SOURCE.splitlines() if line.startswith("# ---- ")} == {79}


def test_sections_use_only_what_stands_above_them():
    order = list(sections())
    home = {name: title for title, nodes in sections().items() for node in nodes for name in defined(node)}
    wrong = [f"{title} uses {leaf.id}" for title, nodes in sections().items() for node in nodes
             if not isinstance(node, ast.If)
             for leaf in ast.walk(node) if isinstance(leaf, ast.Name) and isinstance(leaf.ctx, ast.Load)
             and order.index(home.get(leaf.id, title)) > order.index(title)]
    assert wrong == []


def test_no_function_is_longer_than_40_lines():
    def length(node):
        doc = node.body[0] if ast.get_docstring(node) else None
        return node.end_lineno - node.lineno + 1 - (doc.end_lineno - doc.lineno + 1 if doc else 0)
    assert [node.name for node in ast.walk(ast.parse(SOURCE))
            if isinstance(node, ast.FunctionDef) and length(node) > 40] == []


def test_only_the_standard_library_is_imported():
    names = {alias.name for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.ImportFrom)}
    code = "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
    code += "\n".join(f"import {name}" for name in names)
    subprocess.run([sys.executable, "-S", "-I", "-c", code], check=True)


def test_the_file_is_executable_and_runs_with_uv_and_pipx():
    assert os.access(HERE / "ollama_proxy.py", os.X_OK)
    assert SOURCE.startswith("#!/usr/bin/env python3\n# /// script\n# requires-python = \">=3.8\"\n# dependencies = []\n# ///\n")


def test_importing_it_does_nothing():
    code = "import threading, ollama_proxy; assert threading.active_count() == 1; print('quiet')"
    done = subprocess.run([sys.executable, "-c", code], cwd=str(HERE), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (done.stdout, done.stderr) == (b"quiet\n", b"")


def test_the_readme_lists_every_setting():
    rows = re.findall(r"^\| `([A-Z_<>]+)` \| (.*?) \| (.*?) \| (.*?) \|$", README, re.M)
    assert rows == [(s.name, ", ".join(f"`{a}`" for a in s.aliases), f"`{s.default}`" if s.default else "", s.help)
                    for s in proxy.SETTINGS]


def test_every_variable_that_the_readme_speaks_of_exists():
    known = {name for s in proxy.SETTINGS for name in (s.name,) + s.aliases}
    spoken = set(re.findall(r"\b(PROXY_[A-Z_]+)\b", README)) - {"PROXY_KEY_", "PROXY_AUTH_TOKEN_FILE"}
    assert {name for name in spoken if not name.startswith("PROXY_KEY_")} <= known


# ---- Settings ---------------------------------------------------------------


def load(**environ):
    return proxy.Settings.load({"PROXY_ENV_FILE": os.devnull, "OLLAMA_API_KEY": "k", **environ})[0]


def complaints(**environ):
    with pytest.raises(proxy.SettingsError) as caught:
        load(**environ)
    return str(caught.value)


def test_every_bad_value_is_named_at_once_with_what_was_expected():
    words = complaints(PROXY_PORT="http", PROXY_DRAIN="soon", PROXY_UPSTREAMS="x=ftp://h", PROXY_PUBLIC_MODELS="maybe",
                       PROXY_MAX_BODY="-1", PROXY_TRUSTED="10.0.0.0/99", PROXY_ORIGINS="app", PROXY_LOG_FORMAT="xml")
    assert [line.split("=")[0] for line in words.splitlines()] == [
        "PROXY_PORT", "PROXY_UPSTREAMS", "PROXY_ORIGINS", "PROXY_MAX_BODY", "PROXY_PUBLIC_MODELS", "PROXY_TRUSTED",
        "PROXY_LOG_FORMAT", "PROXY_DRAIN"]
    assert all("expected" in line for line in words.splitlines())


@pytest.mark.parametrize("url", ["https://u:p@h", "https://h?x=1", "http://ollama.com.", "http://www.ollama.com", "https://h#f", "http://ollama.com", "https://h:0",
                                 "https://h:99999", "https://", "h:8000", "https://h:", "https://h x", "a b=http://h"])
def test_an_upstream_url_has_no_secrets_and_no_surprises(url):
    assert "PROXY_UPSTREAMS" in complaints(PROXY_UPSTREAMS=url)


def test_no_part_of_a_refused_url_that_may_be_secret_is_printed():
    assert "hush" not in complaints(PROXY_UPSTREAMS="https://h?key=hush") + complaints(PROXY_UPSTREAMS="https://me:hush@h")


@pytest.mark.parametrize("url, shown", [
    ("http://127.0.0.1:8000/v1/", "127.0.0.1=http://127.0.0.1:8000"), ("x=https://h/api", "x=https://h"),
    ("x=https://h/mount/v1", "x=https://h/mount"), ("http://[::1]:80", "1=http://[::1]"),
    ("cloud=https://ollama.com", "cloud=https://ollama.com")])
def test_an_upstream_url_may_end_in_api_or_v1(url, shown):
    address, = load(PROXY_UPSTREAMS=url).upstreams
    assert f"{address.name}={address}" == shown


@pytest.mark.parametrize("name", ["OLLAMA_API_KEY", "PROXY_AUTH_TOKEN"])
@pytest.mark.parametrize("value", ["sk-se\ncret", "sk-se cret", "sk-sécret", "sk-se\x00cret"])
def test_a_secret_that_no_header_can_carry_is_refused_and_not_printed(name, value):
    words = complaints(**{name: value})
    assert name in words and "cret" not in words


def test_a_secret_is_stripped_of_white_space():
    assert load(OLLAMA_API_KEY=" sk-1\n").api_key == "sk-1"


@pytest.mark.parametrize("environ", [
    {"OLLAMA_CLOUD_API_KEY": "sk-1"},
    {"OLLAMA_ORIGIN": "https://ollama.goldfish.io", "AIG_AUTH_TOKEN": "0123abcd"},
    {"OLLAMA_API_KEY": "sk-1", "PROXY_AUTH_TOKEN": "ein_geheimes_passwort_fuer_lokal"}])
def test_the_env_files_of_the_older_projects_start_it_unchanged(environ, tmp_path):
    (tmp_path / "env").write_text("".join(f"{name}={value}\n" for name, value in environ.items()))
    settings, warnings = proxy.Settings.load({"PROXY_ENV_FILE": str(tmp_path / "env")})
    assert warnings == []
    assert settings.api_key == ("" if "OLLAMA_ORIGIN" in environ else "sk-1")
    assert bool(settings.auth_token) == any("AUTH" in name for name in environ)
    assert settings.upstreams[0].name == ("origin" if "OLLAMA_ORIGIN" in environ else "cloud")


def test_the_environment_wins_over_the_env_file_and_an_empty_value_is_none(tmp_path):
    (tmp_path / "env").write_text('export PROXY_PORT=1\nPROXY_DRAIN="2" # seconds\nPROXY_PREFIX=\'/x\'\n')
    settings = load(PROXY_ENV_FILE=str(tmp_path / "env"), PROXY_PORT="5", PROXY_DRAIN="")
    assert (settings.port, settings.drain, settings.prefix) == (5, 2, "/x")


@pytest.mark.parametrize("value, words", [("ann:", "a name has no token"), ("ann:x,bob:x", "two names have the same token"), (",", "expected token"),
                                          ("a b:x", "expected token")])
def test_a_list_of_tokens_with_a_fault_is_refused(value, words):
    assert words in complaints(PROXY_AUTH_TOKEN=value)


def test_a_bad_line_of_the_env_file_is_named_by_number_only(tmp_path):
    (tmp_path / "env").write_text("A=1\nsk-secret\n")
    assert complaints(PROXY_ENV_FILE=str(tmp_path / "env")).endswith("line 2: expected KEY=VALUE")


def test_secrets_come_from_files_and_from_systemds_credentials(tmp_path):
    (tmp_path / "key").write_text("sk-file\n")
    (tmp_path / "PROXY_AUTH_TOKEN").write_text("ann:t1,\n bob:t2\n")
    settings = load(OLLAMA_API_KEY="", OLLAMA_API_KEY_FILE=str(tmp_path / "key"), CREDENTIALS_DIRECTORY=str(tmp_path))
    assert settings.api_key == "sk-file"
    assert settings.auth_token == (("ann", b"t1"), ("bob", b"t2"))


def test_a_secret_file_that_cannot_be_read_is_named():
    assert "OLLAMA_API_KEY_FILE: cannot read /no/such" in complaints(OLLAMA_API_KEY="", OLLAMA_API_KEY_FILE="/no/such")


def test_a_key_goes_to_its_own_upstream_only():
    settings = load(PROXY_UPSTREAMS="gpu-1=http://10.0.0.1:8000", PROXY_KEY_GPU_1="sk-gpu")
    assert settings.key(settings.upstreams[0]) == "sk-gpu"
    settings = load(PROXY_UPSTREAMS="gpu=http://10.0.0.1:8000")
    assert settings.key(settings.upstreams[0]) == ""


def test_without_a_key_for_ollama_com_the_message_says_where_keys_come_from_and_what_runs_without():
    words = complaints(OLLAMA_API_KEY="")
    assert "https://ollama.com/settings/keys" in words and "demo" in words


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_listening_beyond_loopback_without_a_token_is_refused(host):
    assert "PROXY_AUTH_TOKEN" in complaints(PROXY_HOST=host)
    assert load(PROXY_HOST=host, PROXY_AUTH_TOKEN="off").auth_token == "off"


def test_an_unknown_variable_is_a_warning_that_names_the_nearest():
    _, warnings = proxy.Settings.load({"OLLAMA_API_KEY": "k", "PROXY_PROT": "1", "PROXY_ENV_FILE": os.devnull})
    assert warnings == ["PROXY_PROT is not a setting; the nearest is PROXY_PORT"]


def test_a_setting_that_nothing_obeys_is_a_warning():
    environ = {"PROXY_ENV_FILE": os.devnull, "PROXY_UPSTREAMS": "x=http://h", "PROXY_PORT_FILE": "x", "OLLAMA_API_KEY": "k"}
    port, key = proxy.Settings.load(environ)[1]
    assert "PROXY_PORT_FILE is not a setting" in port and "OLLAMA_API_KEY is of no use" in key


def test_a_key_for_cloud_by_name_serves_the_default_upstream():
    settings = proxy.Settings.load({"PROXY_ENV_FILE": os.devnull, "PROXY_KEY_CLOUD": "k2"})[0]
    assert settings.key(settings.upstreams[0]) == "k2"


def test_what_does_not_go_together_is_named_with_all_other_bad_values_but_not_for_their_sake():
    text = complaints(PROXY_HOST="0.0.0.0", PROXY_PORT="x")
    assert "PROXY_PORT='x'" in text and "PROXY_AUTH_TOKEN is not set" in text
    assert "is not set" not in complaints(PROXY_HOST="0.0.0.0", PROXY_AUTH_TOKEN="a b")


@pytest.mark.parametrize("name, value, words", [
    ("PROXY_HOST", "127.0.0.1:80", "the port is PROXY_PORT"), ("PROXY_HOST", "300.1.1.1", "expected an address"),
    ("PROXY_ORIGINS", "https://a.example/x", "no paths"), ("PROXY_ORIGINS", ",", "expected origins"),
    ("PROXY_LOG", "/nowhere/log", "folder does not exist"), ("PROXY_PREFIX", "/t", "mean something here"),
    ("PROXY_PREFIX", "/-/x", "mean something here"), ("PROXY_PREFIX", "/a/../b", "expected a path"),
    ("OLLAMA_ORIGIN", "http://127.0.0.1:11434", "is this proxy"), ("OLLAMA_ORIGIN", "http://localhost:11434", "is this proxy")])
def test_a_value_that_cannot_work_is_refused_and_the_words_say_why(name, value, words):
    assert words in complaints(**{name: value})


@pytest.mark.parametrize("value", ["http:/proxy", "https://proxy:3128", "http://proxy:port", "/", "socks5h://proxy"])
def test_an_https_proxy_that_is_none_is_refused_at_the_start_if_it_is_needed(value, monkeypatch):
    for name in "NO_PROXY", "no_proxy":
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", value)
    assert "HTTPS_PROXY is not the URL of an HTTP proxy" in complaints()
    assert load(PROXY_UPSTREAMS="https://localhost:1") and load(PROXY_UPSTREAMS="http://gpu")
    monkeypatch.setenv("no_proxy", "ollama.com")
    assert load()


@pytest.mark.parametrize("value", ["proxy:3128", "HTTP://u:p@ss@proxy:3128/x", "http://[::1]:3128", ""])
def test_an_https_proxy_may_be_spelt_in_many_ways(value, monkeypatch):
    monkeypatch.setenv("https_proxy", value)
    assert load()


def test_a_slash_behind_an_origin_is_forgiven_and_null_is_one():
    assert load(PROXY_ORIGINS="https://a.example/, null, https://*.b.example, file://").origins == (
        "https://a.example", "null", "https://*.b.example", "file://")


def test_an_empty_value_with_a_comment_is_empty_and_an_open_quote_is_a_bad_line():
    assert proxy.parse_env('A= # one\nB="two\nC=three # 3\nD="= # 4"') == ({"A": "", "C": "three", "D": "= # 4"}, [2])


def test_lines_of_the_env_file_that_are_other_programs_matter_are_let_be():
    lines = 'A=#fff\nB="say \\"hi\\""\nC="x"y\nD="a"#c'
    assert proxy.parse_env(lines) == ({"A": "#fff", "B": '"say \\"hi\\""', "C": '"x"y', "D": '"a"#c'}, [])


def test_the_file_of_a_bad_secret_is_named(tmp_path):
    (tmp_path / "tokens").write_text("ann:one\nbob:two")
    assert complaints(PROXY_AUTH_TOKEN_FILE=str(tmp_path / "tokens")).startswith("PROXY_AUTH_TOKEN_FILE: ")


def test_a_key_that_would_travel_in_clear_to_a_public_host_is_warned_about():
    environ = {"PROXY_KEY_X": "k", "PROXY_ENV_FILE": os.devnull}
    warned = {url: bool(proxy.Settings.load({**environ, "PROXY_UPSTREAMS": "x=" + url})[1]) for url in
              ("http://8.8.8.8", "http://gpu.example.com", "https://8.8.8.8", "http://10.0.0.1", "http://gpu", "http://[::1]")}
    assert [url for url, shown in warned.items() if shown] == ["http://8.8.8.8", "http://gpu.example.com"]


def test_quotes_that_docker_leaves_around_a_value_are_no_part_of_it():
    assert load(PROXY_ALIASES='"a=b; c=d"', PROXY_HOST="'::1'").aliases == {"a": "b", "c": "d"}


@pytest.mark.parametrize("name, value, words", [
    ("PROXY_UPSTREAMS", "a=http://h, a=http://i", "two upstreams are called a"), ("PROXY_UPSTREAMS", "a-1=http://h, a_1=http://i", "share PROXY_KEY_A_1"),
    ("PROXY_UPSTREAMS", "http://h:1, http://h:2", "write name=url"), ("PROXY_UPSTREAMS", "a=http://h|http://h", "no copy twice"), ("PROXY_UPSTREAMS", ",", "expected name=url"),
    ("PROXY_UPSTREAMS", "a=http://h; b=http://i", "name=url, name=url"), ("PROXY_ALIASES", "a=b, c=d", "stands a ;"), ("PROXY_FALLBACKS", "a -> b, c -> d", "stands a ;"),
    ("PROXY_FALLBACKS", "a => b", "no model's name"),
    ("PROXY_UPSTREAMS", "=http://h", "letters, digits"), ("PROXY_UPSTREAMS", "a=http://h|", "with URLs such as"), ("PROXY_UPSTREAMS", "a=http://h|b=http://i", "http:// or https://"),
    ("PROXY_ALIASES", "a=b; b=c", "b is an alias itself"), ("PROXY_ALIASES", "a=a:latest", "alias itself"), ("PROXY_ALIASES", "a=b; a:latest=c", "each alias once"),
    ("PROXY_ALIASES", "a", "expected alias=model"), ("PROXY_ALIASES", "=a", "expected alias=model"), ("PROXY_ALIASES", "*=a", "expected alias=model"),
    ("PROXY_ALIASES", "a=b:cloud:local", "not both"), ("PROXY_FALLBACKS", "a", "expected model -> model"), ("PROXY_FALLBACKS", "a -> ", "expected model -> model"),
    ("PROXY_FALLBACKS", "a -> b -> *", "expected model -> model"), ("PROXY_FALLBACKS", "a -> b; a:latest -> c", "one chain a model"),
    ("PROXY_FALLBACKS", "a -> b -> b:latest", "has one model twice"), ("PROXY_FALLBACKS", "a -> b:cloud:local", "not both"), ("PROXY_SLOTS", "cloud=0", "the number from 1"),
    ("PROXY_SLOTS", "cloud=1, cloud=2", "each upstream once"), ("PROXY_SLOTS", "cloud", "expected name=number"), ("PROXY_SLOTS", "gpu=1", "no upstream is called gpu; there is cloud"),
    ("PROXY_MANAGE", "perhaps", "expected on or off"), ("PROXY_QUEUE_TIMEOUT", "0", "seconds, more than 0")])
def test_what_cannot_be_meant_of_many_upstreams_is_refused_and_the_words_say_why(name, value, words):
    text = complaints(**{name: value})
    assert name in text and words in text


def test_a_chain_has_no_model_twice_nor_a_model_two_chains_after_aliases_are_resolved():
    assert "the chain of b has one model twice" in complaints(PROXY_ALIASES="a=b", PROXY_FALLBACKS="a -> c -> b")
    assert "two chains are for one model" in complaints(PROXY_ALIASES="a=b", PROXY_FALLBACKS="a -> c; b -> d")


def test_chains_and_aliases_are_read_in_any_spelling():
    settings = load(PROXY_ALIASES="x = m:latest ;y=n\nz=o", PROXY_FALLBACKS="x->b→ c > d;* -> y")
    assert settings.aliases == {"x": "m:latest", "y": "n", "z": "o"}
    assert [settings.chain(settings.meant(name)) for name in ("x", "m", "other")] == [["m:latest", "b", "c", "d"], ["m", "b", "c", "d"], ["other", "n"]]


# ---- Heads and paths --------------------------------------------------------


@pytest.mark.parametrize("asked, sent", [
    ("/api/chat", "/api/chat"), ("/v1/models/a%2Fb?x=%20", "/v1/models/a%2Fb?x=%20"), ("/generate", "/api/generate"),
    ("/chat", "/api/chat"), ("/tags", "/api/tags"), ("/show", "/api/show"), ("/version", "/api/version"),
    ("/chat/completions", "/v1/chat/completions"), ("/completions", "/v1/completions"), ("/models", "/v1/models"),
    ("/models/gpt-oss:120b", "/v1/models/gpt-oss:120b"), ("/responses", "/v1/responses"),
    ("/messages?beta=true", "/v1/messages?beta=true"), ("/api/api/x", "/api/x"), ("/v1/v1/x", "/v1/x"),
    ("/api/v1/x", "/v1/x"), ("/v1/api/x", "/api/x"), ("//api/x", "/api/x"), ("/v1//models", "/v1/models"),
    ("/v1/models/", "/v1/models"), ("/tokenize", "/tokenize"), ("/rerank?q=//", "/rerank?q=//"), ("/apis", "/apis"),
    ("/mount/api/tags", "/api/tags"), ("/mount/t/tok/api/tags", "/api/tags"), ("/t/tok/mount/api/tags", "/api/tags"),
    ("/mount", "/"), ("/mounted", "/mounted"), ("http://evil.example/api/tags", "/api/tags"), ("http://evil", "/"),
    ("/blobs/sha256:ab", "/api/blobs/sha256:ab"), ("/api/x?u=../..", "/api/x?u=../.."), ("/api/x..y", "/api/x..y")])
def test_paths_are_repaired_as_the_design_says(asked, sent):
    target = proxy.parse_target(asked, "/mount")
    assert target.path + target.query == sent


@pytest.mark.parametrize("asked", ["/api/../x", "/api/%2e%2e/x", "/api/.%2E", "/api/..%2fx", "/api/..;a/x", "/..", "/api/./x",
                                   "/api/%2e%2e%5cx", "/api\\..\\x", "/t/x/../y"])
def test_dot_segments_are_refused_however_they_are_spelt(asked):
    with pytest.raises(proxy.Refused):
        proxy.parse_target(asked)


@pytest.mark.parametrize("asked", ["@evil/", ":9999/", ".evil.com/", "api/tags", "evil:443"])
def test_a_target_that_is_no_path_is_refused(asked):
    with pytest.raises(proxy.Malformed):
        proxy.parse_target(asked)


@pytest.mark.parametrize("path", ["/t/s3cret/t/s3cret/api/tags", "/t//s3cret/api/tags", "/T/s3cret/api/tags", "/%74/s3cret/api/tags", "/v1/t/s3cret/models",
                                  "/mount/t/s3cret/api/tags", "/t/t/s3cret/api/tags", "/t/s3cret/s3cret/api/tags", "/t/s3cret/t/s3cret/t/s3cret/api/tags"])
def test_a_token_is_neither_logged_nor_sent_up_wherever_it_stands_in_the_path(serve, upstream, path):
    server = serve(PROXY_AUTH_TOKEN="s3cret")
    server.get("GET", path, Authorization="Bearer s3cret")
    server.lines()
    assert "s3cret" not in server.log_path.read_text() and all("s3cret" not in call.path for call in upstream.calls)


def test_a_token_in_the_path_is_masked_and_decoded():
    target = proxy.parse_target("/t/s%2Dcret/api/tags")
    assert (target.token, target.shown) == (b"s-cret", "/t/***/api/tags")


BAD_HEADS = [
    b"GET / HTTP/1.1\r\nHost: a\r\nX : 1\r\n", b"GET / HTTP/1.1\r\nHost: a\r\n: 1\r\n", b"GET / HTTP/1.1\r\nHost: a\r\n b\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nX: a\nb\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nX: \x00\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nX\r\n", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n", b"GET / HTTP/1.1\r\nHost: a, b\r\n", b"GET / HTTP/1.1\r\nHost: u@h\r\n", b"GET /\r\n",
    b"GET  / HTTP/1.1\r\nHost: a\r\n", b"GET / HTTP/1.1 \r\nHost: a\r\n", b"GET / http/1.1\r\nHost: a\r\n", b"G(T / HTTP/1.1\r\nHost: a\r\n",
    b"GET /a b HTTP/1.1\r\nHost: a\r\n", b"GET /\x85 HTTP/1.1\x85\r\nHost: a\r\n", b"GET / HTTP/1.10\r\nHost: a\r\n",
    b"GET / HTTP/2.0\r\nHost: a\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer a\r\nAuthorization: Bearer b\r\n"]
BAD_FRAMING = [
    b"Content-Length: +5", b"Content-Length: -5", b"Content-Length: 5 5", b"Content-Length: 0_5", b"Content-Length: 0x5",
    b"Content-Length: 5, 5", b"Content-Length:", b"Content-Length: 5\r\nContent-Length: 6", "Content-Length: ٥".encode(),
    b"Content-Length: 5\r\nTransfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: xchunked",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", b"Transfer-Encoding: chunked, identity", b"Transfer-Encoding:\x0bchunked",
    b"Content-Length: 9999999999999999999"]


@pytest.mark.parametrize("head", BAD_HEADS)
def test_a_malformed_request_head_is_refused(head):
    with pytest.raises(proxy.Malformed):
        proxy.parse_request(head)


@pytest.mark.parametrize("line", BAD_FRAMING)
@pytest.mark.parametrize("start, parse", [(b"POST / HTTP/1.1\r\nHost: a\r\n", proxy.parse_request), (b"HTTP/1.1 200 OK\r\n", proxy.parse_answer)])
def test_unclear_framing_is_refused_on_both_sides(start, parse, line):
    with pytest.raises(proxy.Malformed):
        parse(start + line + b"\r\n").size


def test_a_head_of_very_many_lines_is_a_431():
    with pytest.raises(proxy.Malformed) as caught:
        proxy.parse_request(b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a: b\r\n" * 200)
    assert caught.value.status == 431


def test_a_head_that_drips_costs_no_more_for_what_has_come_before():
    near, far = socket.socketpair()
    with near, far:
        wire = proxy.Wire(near, None)
        wire.ahead = b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 10_000
        began = time.process_time()
        assert not any(wire.take_head() for _ in range(1000))
        assert time.process_time() - began < 0.2


def test_equal_content_lengths_and_odd_case_are_understood():
    head = proxy.parse_request(b"POST / HTTP/1.1\r\nhOsT: a\r\ncontent-LENGTH: 5\r\nContent-Length: 5\r\n")
    assert (head.size, head.get("host")) == (5, "a")


@pytest.mark.parametrize("head", [b"HTTP/1.1 OK\r\n", b"HTTP/2 200 OK\r\n", b"HTTP/1.1 99 x\r\n", b"ICY 200 OK\r\n", b"HTTP/1.1 200 OK\r\nA\r\n"])
def test_a_malformed_answer_head_is_refused(head):
    with pytest.raises(proxy.Malformed):
        proxy.parse_answer(head)


@pytest.mark.parametrize("path, body", [
    ("/api/chat", {"error": "words"}), ("/tokenize", {"error": "words"}),
    ("/v1/models", {"error": {"message": "words", "type": "authentication_error", "param": None, "code": None}}),
    ("/v1/messages", {"type": "error", "error": {"type": "authentication_error", "message": "words"}, "request_id": "r"})])
def test_errors_speak_the_dialect_of_the_path(path, body):
    assert json.loads(proxy.error_body(path, 401, "words", "r")) == body


# ---- Bodies -----------------------------------------------------------------

CHUNKS = b"5\r\nhello\r\n1;ext=\"a\"\r\n!\r\n2\r\n\r\n\r\n0\r\nTrailer: x\r\n\r\nnext"


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_a_chunked_body_does_not_depend_on_how_it_arrives(step):
    decoder, payload, at = proxy.Decoder(proxy.CHUNKED), b"", 0
    while not decoder.done:
        payload += decoder.feed(CHUNKS[at:at + step])
        at += step
    assert payload == b"hello!\r\n"
    assert decoder.rest + CHUNKS[at:] == b"next"


@pytest.mark.parametrize("filler", [b"x", b"\r\n", b"\r\n0\r\n\r\n", b"a\r\n1\r\nb"])
@pytest.mark.parametrize("alike", [1, 100, 1000])
def test_many_chunks_at_once_are_the_same_as_one_by_one(filler, alike):
    pieces = [filler * (n // alike % 150) + b"%04d" % n for n in range(1000)]
    wire = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\nrest"
    decoder, follower, payload, sizes, again = proxy.Decoder(proxy.CHUNKED), proxy.Decoder(proxy.CHUNKED), b"", 0, b""
    for at in range(0, len(wire), 20000):
        payload += decoder.feed(wire[at:at + 20000])
        size, before = follower.follow(wire[at:at + 20000])
        sizes, again = sizes + size, again + before
    assert (payload, decoder.done, decoder.rest) == (b"".join(pieces), True, b"rest")
    assert (sizes, again + b"\r\nrest", follower.rest) == (len(payload), wire, b"rest")


@pytest.mark.parametrize("wire", [b"0x5\r\nhello\r\n", b"+5\r\nhello\r\n", b"-5\r\n", b" 5\r\n", b"5 \r\nhello\r\n", b"0_5\r\nhello\r\n", b"\r\n",
                                  b"5\r\nhelloX\r\n0\r\n\r\n", b"5\r\nhelloXX", b"5\nhello\n0\n\n", b"5\r\nhello\n0\r\n\r\n", b"f" * 16 + b"\r\n", b"5;\x00\r\n",
                                  b"0\r\nbad trailer\r\n\r\n", b"0\r\n" + b"a: b\r\n" * 2000, b"5" + b";" * 5000, b"z"])
def test_a_bad_chunk_is_refused_however_it_arrives(wire):
    for step in 1, 3, len(wire):
        decoder = proxy.Decoder(proxy.CHUNKED)
        with pytest.raises(proxy.Malformed):
            for at in range(0, len(wire), step):
                decoder.feed(wire[at:at + step])
        follower = proxy.Decoder(proxy.CHUNKED)
        follower.follow(b"5\r\nhello\r\n")
        with pytest.raises(proxy.Malformed):
            for at in range(0, len(wire), step):
                follower.follow(wire[at:at + step])
                if follower.error:
                    raise follower.error


@pytest.mark.parametrize("extension", [b";.*", b";(", b";a*", b";x=[", b""])
def test_no_chunk_extension_hides_the_end_of_a_body(extension):
    wire = b"1%b\r\nx\r\n" % extension * 4 + b"0%b\r\n\r\nHTTP/1.1 200 OK\r\n" % extension
    decoder, follower = proxy.Decoder(proxy.CHUNKED), proxy.Decoder(proxy.CHUNKED)
    assert (decoder.feed(wire), decoder.rest) == (b"xxxx", b"HTTP/1.1 200 OK\r\n")
    assert follower.follow(wire)[0] == 4 and follower.rest == decoder.rest


def test_chunks_cost_as_much_as_they_are_long_whatever_they_hold():
    def cost(count):
        decoder, wire = proxy.Decoder(proxy.CHUNKED), b"2\r\n\r\n\r\n" * count
        began = time.process_time()
        assert decoder.feed(wire) == b"\r\n" * count
        return time.process_time() - began
    assert cost(40000) < 40 * cost(4000) + 0.2  # a cost that grows with the square is a hundred times as high


@pytest.mark.parametrize("body, model", [
    (b'{"model": "a:1"}', "a:1"), (b' {"x": {"model": "b"}, "model" : "a"}', "a"), (b'{"model": "a", "model": "b"}', "b"),
    (b'{"model": "\\u00e9"}', "\u00e9"), (b'{"mod\\u0065l": "a"}', "a"), (b'{"model": 5}', None), (b'{"model": {"model": "x"}}', None),
    (b'{"model": ["x"], "a": "model"}', None), (b'{"a": "\\"model\\": \\"x\\"", "model": "y"}', "y"), (b"[" * 100000, None), (b"", None),
    (b'["model", "x"]', None), (b'{"model": "a"', "a"), (b"not json", None), (b'{"a": "unterminated \\"', None), (b"\xff\xfe{", None),
    (b'{"model": "a", "messages": [{"model": "b"}]}', "a")])
def test_the_model_is_the_last_one_that_the_body_itself_names(body, model):
    named = proxy.named_model(body)
    assert (named and named.model) == model


def test_a_huge_body_is_looked_through_in_little_time_and_memory():
    body = b'{"messages": [{"content": "' + b"\\n" * 4_000_000 + b'"}], "model": "m"}'
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    assert proxy.named_model(body).model == "m"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000 and time.process_time() - began < 2
    assert proxy.named_model(b'{"model": 1, "x": [' + b"{}," * 4_000_000 + b'{}], "model": "m", "y": []}') is None


@pytest.mark.parametrize("tail, counts", [
    (b'{"done":true,"context":[1,2],"prompt_eval_count":26,"eval_count":298}\n', (26, 298)),
    (b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}}\n\ndata: [DONE]\n\n', (3, 4)),
    (b'data: {"type":"message_delta","usage":{"input_tokens": 5,"output_tokens": 6}}\n\nevent: message_stop\n', (5, 6)),
    (b'data: {"type":"response.completed","response":{"usage":{"input_tokens":7,"output_tokens":8}}}\n\n', (7, 8)),
    (b'"usage":{"prompt_tokens":8,"total_tokens":8}}', (8, None)), (b'{"response":"\\"eval_count\\":5"}', (None, None)), (b"", (None, None))])
def test_token_counts_are_read_off_the_end_of_every_dialect(tail, counts):
    assert proxy.token_counts(tail) == counts


def test_a_number_that_may_have_been_cut_is_no_count():
    assert proxy.token_counts(b'{"prompt_eval_count":26,"eval_count":29') == (26, None)


def test_blanks_in_the_tail_of_an_answer_hold_nobody_up():
    began = time.process_time()
    for middle in b" ", b"\n", b"data: [DONE] ", b'"eval_count" ', b"\r\nffff":
        tail = b'{"error' + middle * (1600 // len(middle)) + b'"}'
        proxy.ends_in_error(tail), proxy.token_counts(tail), proxy.LAST_EVENT.search(tail), proxy.Exchange.FRAMING.sub(b"", tail)
    assert time.process_time() - began < 1.5


def test_only_the_last_line_or_event_of_a_stream_makes_it_an_error():
    for end in b'{"error":"x"}\n', b'data: {"error":{}}\n\n', b'event: error\ndata: {}\n\n', b'data: {"error":1}\n\ndata: [DONE]\n\n':
        assert proxy.ends_in_error(end)
        assert not proxy.ends_in_error(end + b'data: {}\n\n' if b"data" in end else end + b'{"done":true}\n')


# ---- Callers ----------------------------------------------------------------


@pytest.mark.parametrize("line", ["Authorization: Bearer tok", "authorization: bearer   tok", "Authorization: tok", "X-Api-Key: tok",
                                  "api-key: tok", "cf-aig-authorization: Bearer tok", "Authorization: Basic YW55OnRvaw=="])
def test_a_credential_may_come_in_any_of_these_headers(line):
    head = proxy.parse_request(f"GET / HTTP/1.0\r\n{line}\r\n".encode())
    assert proxy.caller_name((("ann", b"tok"),), proxy.credentials(head, None)) == "ann"


@pytest.mark.parametrize("line", ["Authorization: Bearer", "Authorization: Bearer tok2", "Authorization: Basic !", "Authorization: Basic \xe9", "X-Api-Key: \xe9",
                                  "Authorization: Bearer t\xf6k", "Cookie: tok"])
def test_anything_else_is_nobody(line):
    head = proxy.parse_request(f"GET / HTTP/1.0\r\n{line}\r\n".encode("latin-1"))
    assert proxy.caller_name((("ann", b"tok"),), proxy.credentials(head, None)) is None


def test_every_token_is_compared_in_constant_time_as_bytes_whichever_is_right(monkeypatch):
    compared, digest = [], hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or digest(a, b))
    tokens = ("ann", b"one"), ("bob", b"two")
    assert proxy.caller_name(tokens, [b"one", b"x"]) == "ann"
    assert compared == [(b"one", b"one"), (b"two", b"one"), (b"one", b"x"), (b"two", b"x")]


def test_forwarded_addresses_are_believed_from_trusted_balancers_only():
    trusted = proxy.networks("10.0.0.0/8, ::1")
    assert proxy.client_address("10.0.0.1", "1.2.3.4", trusted) == "1.2.3.4"
    assert proxy.client_address("8.8.8.8", "1.2.3.4", trusted) == "8.8.8.8"
    assert proxy.client_address("10.0.0.1", "", trusted) == "10.0.0.1"
    assert proxy.client_address("10.0.0.1", "1.2.3.4, x'; drop", trusted) == "10.0.0.1"


# ---- Scaffolding for real sockets -------------------------------------------


def until(condition):
    """Wait for something that another thread or process is about to do."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "it never came to pass"
        threading.Event().wait(0.005)


def read_message(sock):
    """One HTTP message off a socket: (head, body), as they came; the body without its framing."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(65536)
        if not piece:
            raise EOFError(data)
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"(?im)^content-length: *(\d+)", head)
    if re.search(rb"(?im)^transfer-encoding: *chunked", head):
        decoder = proxy.Decoder(proxy.CHUNKED)
        payload = decoder.feed(body)
        while not decoder.done:
            payload += decoder.feed(sock.recv(65536) or b"\x00")
        return head, payload
    while length and len(body) < int(length[1]):
        piece = sock.recv(65536)
        if not piece:
            raise EOFError(body)
        body += piece
    return head, body


class Call:
    """One request as the scripted upstream saw it."""

    def __init__(self, sock, head):
        self.sock, self.head, self.body = sock, head, b""
        self.line, *lines = head.decode("latin-1").split("\r\n")
        self.method, self.path, _ = self.line.split(" ")
        self.fields = [tuple(line.split(": ", 1)) for line in lines]

    def all(self, name):
        return [value for key, value in self.fields if key.lower() == name]

    def send(self, data):
        self.sock.sendall(data)

    def chunk(self, data):
        self.send(b"%x\r\n%b\r\n" % (len(data), data))

    def was_left(self):
        """Wait until the proxy closes the connection."""
        self.sock.settimeout(WAIT)
        try:
            while self.sock.recv(65536):
                pass
        except ConnectionError:
            pass
        return True


OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"


class Script:
    """An upstream on a real socket that plays `play(call)` for each request, and remembers what it saw."""

    def __init__(self, context=None):
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self.listener.getsockname()[1]
        self.context, self.calls, self.connections, self.play = context, [], 0, lambda call: call.send(OK)
        self.reads_bodies, self.go_on, self.left = True, threading.Event(), threading.Event()
        self.sockets = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            self.sockets.append(sock)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock):
        with contextlib.suppress(OSError, EOFError, AssertionError, proxy.Malformed), sock:
            if self.context:
                sock = self.context.wrap_socket(sock, server_side=True)
            while True:
                if self.reads_bodies:
                    head, body = read_message(sock)
                else:
                    head, body = b"", b""
                    while not head.endswith(b"\r\n\r\n"):
                        piece = sock.recv(1)
                        if not piece:
                            return
                        head += piece
                    head = head[:-4]
                call = Call(sock, head)
                call.body = body
                self.calls.append(call)
                if self.play(call) == "close":
                    return

    def wait_left(self, call):
        """A script's last act: note that the proxy has closed the connection."""
        if call.was_left():
            self.left.set()

    def close(self):
        self.go_on.set()
        self.listener.close()
        for sock in self.sockets:
            sock.close()


@pytest.fixture
def upstream():
    script = Script()
    yield script
    script.close()


class Running:
    """A proxy in this process, with its log."""

    def __init__(self, path, upstream, **environ):
        self.log_path = path
        settings = load(PROXY_LOG=str(path), **{"PROXY_PORT": "0", "PROXY_UPSTREAMS": f"cloud=http://127.0.0.1:{upstream.port}",
                                                              "OLLAMA_API_KEY": "sk-upstream-key", "PROXY_MANAGE": "on", **environ})
        self.log = proxy.Log(settings.log, settings.log_format)
        self.server = proxy.Server(settings, self.log)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.sockets = []

    @property
    def upstream(self):
        return self.server.catalogue.upstreams[0]

    def connect(self):
        sock = socket.create_connection(self.server.server_address[:2], WAIT)
        self.sockets.append(sock)
        return sock

    def ask(self, method, path, body=None, version="1.1", sock=None, **headers):
        """Send a request on a connection (a new one unless given), and return it."""
        sock = sock or self.connect()
        lines = {"Host": "localhost", **{name.replace("_", "-"): value for name, value in headers.items()}}
        if body is not None and "Transfer-Encoding" not in lines:
            lines.setdefault("Content-Length", str(len(body)))
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        sock.sendall(f"{method} {path} HTTP/{version}\r\n{head}\r\n".encode("latin-1") + (body or b""))
        return sock

    def get(self, *args, **kwargs):
        """Ask, and return (status, headers, body)."""
        return self.read(self.ask(*args, **kwargs))

    @staticmethod
    def read(sock):
        head, body = read_message(sock)
        line, *lines = head.decode("latin-1").split("\r\n")
        headers = email.message.Message()
        for text in lines:
            name, _, value = text.partition(": ")
            headers[name] = value
        return int(line.split(" ")[1]), headers, body

    def lines(self, count=1, **wanted):
        """The log's lines of requests, when there are so many."""
        def found():
            text = self.log_path.read_text() if self.log_path.exists() else ""
            entries = [json.loads(line) for line in text.splitlines()]
            return [e for e in entries if "outcome" in e and all(e[k] == v for k, v in wanted.items())]
        until(lambda: len(found()) >= count)
        return found()

    def close(self):
        for sock in self.sockets:
            sock.close()
        if self.thread.is_alive():
            self.server.drain(0)


@pytest.fixture
def serve(upstream, tmp_path):
    running = []

    def serve(**environ):
        running.append(Running(tmp_path / f"log{len(running)}", environ.pop("upstream", upstream), **environ))
        return running[-1]

    yield serve
    for one in running:
        one.close()


@pytest.fixture
def server(serve):
    return serve()


# ---- Records ----------------------------------------------------------------


def test_the_log_line_has_the_designs_keys_in_order(server, upstream):
    upstream.play = lambda call: call.send(b'HTTP/1.1 200 OK\r\nContent-Length: 38\r\n\r\n{"prompt_eval_count":1,"eval_count":2}')
    server.get("POST", "/t/tok/api/chat?secret=1", CHAT, X_Request_Id="abc-1")
    line, = server.lines()
    assert list(line) == ("time id caller client method path model upstream status first_byte_ms total_ms bytes_in bytes_out "
                          "tokens_in tokens_out outcome model_sent attempts queue_ms note").split()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    fixed = {k: v for k, v in line.items() if not k.endswith("_ms") and k != "time"}
    assert line["queue_ms"] is None
    assert fixed == {"id": "abc-1", "caller": None, "client": "127.0.0.1", "method": "POST", "path": "/t/***/api/chat", "model": "m:1",
                     "upstream": "cloud", "status": 200, "bytes_in": len(CHAT), "bytes_out": 38, "tokens_in": 1, "tokens_out": 2,
                     "outcome": "ok", "model_sent": "m:1", "note": None,
                     "attempts": [{"upstream": "cloud", "model": "m:1", "status": 200, "outcome": "ok"}]}
    assert 0 < line["first_byte_ms"] <= line["total_ms"]


def test_no_prompt_answer_token_or_key_is_logged(serve, upstream):
    server = serve(PROXY_AUTH_TOKEN="ann:client-token")
    upstream.play = lambda call: call.send(b"HTTP/1.1 401 No\r\nContent-Length: 13\r\n\r\nsecret answer")
    server.get("POST", "/t/client-token/api/chat?q=hidden", CHAT)
    server.get("POST", "/api/chat", CHAT, Authorization="Bearer wrong-token")
    server.lines(2)
    text = server.log_path.read_text()
    assert not any(word in text for word in ("secret", "client-token", "wrong-token", "sk-upstream-key", "hidden"))
    assert '"caller": "ann"' in text


def test_control_characters_cannot_forge_a_line(server):
    server.get("POST", "/api/chat", b'{"model": "a\\n{\\"outcome\\": \\"ok\\"}\\u001b[2J\\u2028"}')
    line, = server.lines()
    assert line["model"] == 'a\n{"outcome": "ok"}\x1b[2J\u2028'
    text = proxy.text_line(line.keys(), line.values())
    assert "\n" not in text and "\x1b" not in text and "\u2028" not in text


@pytest.mark.parametrize("step", [1, 7, 40, 1000])
def test_tokens_are_counted_however_the_end_of_a_stream_is_cut(server, upstream, step):
    end = b'{"done":true,"prompt_eval_count":26,"eval_count":298}\n'

    def play(call):
        call.send(STREAM)
        for at in range(0, len(end), step):
            call.chunk(end[at:at + step])
        call.send(b"0\r\n\r\n")
    upstream.play = play
    assert server.get("POST", "/api/chat", CHAT)[2] == end
    line, = server.lines()
    assert (line["tokens_in"], line["tokens_out"], line["bytes_out"]) == (26, 298, len(end))


def test_the_own_pages_are_not_logged_as_requests(server):
    for path in "/", "/-/health", "/healthz", "/-/ready":
        server.get("GET", path)
    server.get("GET", "/api/tags")
    assert [line["path"] for line in server.lines()] == ["/api/tags"]


def test_a_broken_log_pipe_stops_no_request(upstream, tmp_path):
    reader, writer = os.pipe()
    with running_process(upstream, stderr=writer) as (process, ask):
        os.close(writer)
        os.close(reader)
        assert [ask("GET", "/api/tags").status for _ in range(5)] == [200] * 5
        process.terminate()
        assert process.wait(WAIT) == 0


def test_a_log_pipe_that_nobody_reads_stops_no_request(upstream, tmp_path):
    reader, writer = os.pipe()
    with running_process(upstream, stderr=writer) as (process, ask):
        path = "/api/" + "x" * 6000
        assert {ask("GET", path).status for _ in range(40)} == {200}  # the pipe holds 64 KiB
        process.terminate()
        assert process.wait(WAIT) == 0
    os.close(writer)
    os.close(reader)


def test_lines_that_were_lost_are_counted_in_the_log(tmp_path):
    class Stuck:
        def write(self, data):
            stuck.set()
            go_on.wait(WAIT)
            got.append(data)
            return len(data)
    stuck, go_on, got, log = threading.Event(), threading.Event(), [], proxy.Log(str(tmp_path / "log"), "json")
    log.LIMIT, log._stream = 5, Stuck()
    log.event("info", "test", "the writer is stuck with this one")
    assert stuck.wait(WAIT)
    for _ in range(9):
        log.event("info", "test", "one of nine")
    go_on.set()
    until(lambda: b"4 lines were lost" in b"".join(got))


def test_lines_that_could_not_be_written_are_counted_however_often_that_fails(tmp_path):
    class Full:
        def write(self, data):
            tries.append(data)
            if len(tries) < 4:
                raise OSError("no space")
            return len(data)
    tries, log = [], proxy.Log(str(tmp_path / "log"), "json")
    log._stream = Full()
    for count in 1, 2, 3, 4:
        log.event("info", "test", "one line")
        until(lambda: len(tries) == count)
    assert b"3 lines were lost" in tries[-1]


def test_a_log_that_is_a_pipe_without_a_reader_is_an_error_and_no_wait(tmp_path):
    os.mkfifo(str(tmp_path / "pipe"))
    done = run(OLLAMA_API_KEY="k", PROXY_PORT="0", PROXY_LOG=str(tmp_path / "pipe"))
    assert done.returncode == 2 and "PROXY_LOG" in done.stderr


def test_only_inference_calls_have_token_counts_and_only_of_numbers_that_are_whole(server, upstream):
    body = b'{"prompt_eval_count": 1, "eval_count": 999}'
    upstream.play = lambda call: call.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    server.get("GET", "/api/usage")
    server.get("POST", "/api/chat", CHAT)
    assert [line["tokens_out"] for line in server.lines(2)] == [None, 999]


@pytest.mark.parametrize("pad", [1, 480])
def test_a_client_that_hangs_up_at_done_has_its_whole_answer(server, upstream, pad):
    def play(call):
        call.send(STREAM)
        call.chunk(b'data: {"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\n:' + b" " * pad)
        for piece in b"e\r\n", b"data: [DONE]\n\n", b"\r\n":
            call.send(piece)
        upstream.wait_left(call)
    upstream.play = play
    sock = server.ask("POST", "/v1/chat/completions", CHAT)
    data = b""
    while b"[DONE]\n\n\r\n" not in data:
        data += sock.recv(65536)
    sock.close()
    assert upstream.left.wait(WAIT)
    line, = server.lines()
    assert (line["outcome"], line["tokens_out"]) == ("ok", 2)


def test_the_bodies_of_the_proxys_own_errors_are_counted(server):
    body = server.get("GET", "/../x")[2]
    assert server.lines()[0]["bytes_out"] == len(body)


def test_what_was_logged_is_written_before_the_end(tmp_path):
    for n in range(50):
        log = proxy.Log(str(tmp_path / f"log{n}"))
        log.GATHER = 0
        log.event("info", "test", "the last words")
        log.close(WAIT)
        assert "the last words" in (tmp_path / f"log{n}").read_text()


def test_a_bug_after_the_head_cuts_the_connection_and_says_no_more(server, upstream, monkeypatch):
    def begin(self, *arguments):
        begun(self, *arguments)
        raise ValueError("a bug")
    begun = proxy.Exchange.begin
    monkeypatch.setattr(proxy.Exchange, "begin", begin)
    upstream.play = lambda call: (call.send(STREAM), upstream.go_on.wait(WAIT))
    assert drain(server.ask("GET", "/api/tags")).count(b"HTTP/1.1") < 2
    upstream.go_on.set()


@pytest.mark.parametrize("tail, outcome", [(b'{"done":true}\n', "ok"), (b'{"error":"out of memory"}\n', "error"),
                                           (b'data: {"error": {"message": "x"}}\n\n', "error"), (b"event: error\ndata: {}\n\n", "error"),
                                           (b'{"message":{"content":"{\\"error\\":1}"},"done":true}\n', "ok")])
def test_an_error_at_the_end_of_a_stream_is_an_error_in_the_log(server, upstream, tail, outcome):
    def play(call):
        call.send(STREAM)
        call.chunk(b'{"done":false}\n')
        call.chunk(tail)
        call.send(b"0\r\n\r\n")
    upstream.play = play
    assert server.get("POST", "/api/chat", CHAT)[2].endswith(tail)
    assert server.lines()[0]["outcome"] == outcome


# ---- Wires ------------------------------------------------------------------


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    if not shutil.which("openssl"):
        pytest.fail("the tests need the openssl command (Debian: apt-get install openssl)")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
                    "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(folder / "key.pem"),
                    "-out", str(folder / "cert.pem")], check=True, stderr=subprocess.DEVNULL)
    return folder


@pytest.fixture
def tls_upstream(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(certificate / "cert.pem"), str(certificate / "key.pem"))
    script = Script(context)
    yield script
    script.close()


@pytest.fixture
def trusting(certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
    proxy.tls_context.cache_clear()
    yield
    proxy.tls_context.cache_clear()


def test_tls_is_verified_against_ssl_cert_file_and_one_handshake_serves_many(serve, tls_upstream, trusting):
    server = serve(PROXY_UPSTREAMS=f"cloud=https://localhost:{tls_upstream.port}")
    assert [server.get("GET", "/api/tags")[0] for _ in range(3)] == [200] * 3
    assert tls_upstream.connections == 1


def test_what_tls_says_to_itself_costs_no_kept_connection(serve, tls_upstream, trusting):
    server = serve(upstream=tls_upstream, PROXY_UPSTREAMS=f"cloud=https://localhost:{tls_upstream.port}")
    assert server.get("GET", "/-/ready")[0] == 200  # a connection without a request: TLS 1.3 sends its tickets now
    pool = server.upstream.pool
    until(lambda: len(pool._wires) == 1 and pool._wires[0].sock.session and pool._wires[0].sock.session.has_ticket)
    assert server.get("GET", "/api/tags")[0] == 200 and tls_upstream.connections == 1


def test_a_certificate_that_nobody_vouches_for_is_a_502_that_says_so(serve, tls_upstream):
    proxy.tls_context.cache_clear()
    server = serve(PROXY_UPSTREAMS=f"cloud=https://localhost:{tls_upstream.port}")
    status, _, body = server.get("GET", "/api/tags")
    assert status == 502 and b"certificate is not trusted" in body and b"SSL_CERT_FILE" in body
    assert server.lines()[0]["outcome"] == "unreachable"


def test_a_stream_over_tls_comes_piece_by_piece(serve, tls_upstream, trusting):
    streams_piece_by_piece(serve(PROXY_UPSTREAMS=f"cloud=https://localhost:{tls_upstream.port}"), tls_upstream)


def test_a_large_piece_over_tls_comes_whole_although_no_more_follows(serve, tls_upstream, trusting):
    def play(call):
        call.send(STREAM)
        call.chunk(b"small")
        tls_upstream.go_on.wait(WAIT)
        tls_upstream.go_on.clear()
        call.chunk(b"large" * 3000)  # one TLS record
        tls_upstream.go_on.wait(WAIT)
        call.send(b"0\r\n\r\n")
    tls_upstream.play = play
    sock = serve(PROXY_UPSTREAMS=f"cloud=https://localhost:{tls_upstream.port}").ask("POST", "/api/chat", CHAT)
    for piece in b"small\r\n", b"large\r\n":
        data = b""
        while not data.endswith(piece):
            data += sock.recv(65536)
        tls_upstream.go_on.set()
    assert sock.recv(100) == b"0\r\n\r\n"


def test_a_tls_answer_without_length_or_goodbye_is_a_cut(serve, tls_upstream, trusting):
    def play(call):
        call.send(b"HTTP/1.1 200 OK\r\n\r\nhalf")
        socket.socket.shutdown(call.sock, socket.SHUT_RDWR)
        return "close"
    tls_upstream.play = play
    data = drain(serve(PROXY_UPSTREAMS=f"cloud=https://localhost:{tls_upstream.port}").ask("GET", "/x"))
    assert b"half" in data and not data.endswith(b"0\r\n\r\n")


def test_an_https_proxy_is_used_for_remote_https_upstreams_with_its_password(serve, tls_upstream, trusting, monkeypatch):
    seen = []

    def tunnel():
        sock, _ = listener.accept()
        seen.append(read_message(sock)[0])
        sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        with socket.create_connection(("127.0.0.1", tls_upstream.port)) as far:
            threading.Thread(target=pump, args=(far, sock), daemon=True).start()
            pump(sock, far)

    def pump(source, sink):
        with contextlib.suppress(OSError):
            while True:
                data = source.recv(65536)
                if not data:
                    return
                sink.sendall(data)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=tunnel, daemon=True).start()
        monkeypatch.setenv("https_proxy", "http://me:pass@127.0.0.1:%d" % listener.getsockname()[1])
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.setattr(proxy, "is_loopback", lambda host: host in ("127.0.0.1",))
        server = serve(PROXY_UPSTREAMS=f"cloud=https://localhost:{tls_upstream.port}", PROXY_AUTH_TOKEN="off")
        assert server.get("GET", "/api/tags")[0] == 200
    assert seen[0].startswith(b"CONNECT localhost:%d HTTP/1.1\r\n" % tls_upstream.port)
    assert b"Proxy-Authorization: Basic bWU6cGFzcw==" in seen[0] and b"sk-upstream-key" not in seen[0]


def test_loopback_and_plain_http_upstreams_never_go_through_a_proxy(serve, upstream, monkeypatch):
    for name in "http_proxy", "https_proxy", "all_proxy":
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert serve().get("GET", "/api/tags")[0] == 200


def test_a_loopback_https_upstream_never_goes_through_a_proxy(serve, tls_upstream, trusting, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert serve(PROXY_UPSTREAMS=f"cloud=https://localhost:{tls_upstream.port}").get("GET", "/api/tags")[0] == 200


# ---- Upstreams --------------------------------------------------------------


class Drained(bytes):
    """What a socket gave until its end; `reset` says whether that was an RST."""


def drain(sock):
    """Everything until the end of the connection."""
    data, reset = b"", False
    while True:
        try:
            piece = sock.recv(65536)
        except ConnectionResetError:
            piece, reset = b"", True
        if not piece:
            drained = Drained(data)
            drained.reset = reset
            return drained
        data += piece


def test_connections_are_kept_and_used_again(server, upstream):
    for _ in range(5):
        server.get("POST", "/api/chat", CHAT)
    assert (len(upstream.calls), upstream.connections) == (5, 1)


def test_the_key_goes_up_and_no_credential_cookie_or_origin_of_the_client(server, upstream):
    server.get("GET", "/api/tags", Authorization="Bearer mine", X_Api_Key="mine", Api_Key="mine", Cookie="mine",
               Cf_Aig_Authorization="Bearer mine", X_Goog_Api_Key="mine", Proxy_Authorization="mine", Origin="http://localhost:1",
               Referer="http://localhost:1/mine")
    call, = upstream.calls
    assert call.all("authorization") == ["Bearer sk-upstream-key"]
    assert call.all("host") == [f"127.0.0.1:{upstream.port}"]
    assert b"mine" not in call.head and b"localhost:1" not in call.head


def test_hop_by_hop_headers_and_those_that_connection_names_stop_here(server, upstream):
    upstream.play = lambda call: call.send(b"HTTP/1.1 200 OK\r\nConnection: x-b, Authorization\r\nKeep-Alive: 5\r\nX-B: 1\r\nX-C: 1\r\n"
                                           b"Content-Length: 0\r\n\r\n")
    status, headers, _ = server.get("GET", "/api/tags", Connection="x-a, authorization, x-request-id, host", X_A="1", TE="trailers",
                                    Upgrade="h2c", Keep_Alive="1", X_D="1")
    call, = upstream.calls
    assert not [name for name, _ in call.fields if name.lower() in ("connection", "x-a", "te", "upgrade", "keep-alive")]
    assert call.all("authorization") == ["Bearer sk-upstream-key"] and call.all("host") and call.all("x-request-id") and call.all("x-d")
    assert (headers["X-B"], headers["X-C"], headers["Keep-Alive"]) == (None, "1", None)


def test_repeated_headers_survive_both_ways(server, upstream):
    upstream.play = lambda call: call.send(b"HTTP/1.1 200 OK\r\nLink: a\r\nLink: b\r\nContent-Length: 0\r\n\r\n")
    sock = server.connect()
    sock.sendall(b"GET /api/tags HTTP/1.1\r\nHost: localhost\r\nAccept: a\r\nAccept: b\r\n\r\n")
    assert server.read(sock)[1].get_all("Link") == ["a", "b"]
    assert upstream.calls[0].all("accept") == ["a", "b"]


def test_other_headers_path_and_query_go_up_as_they_came(server, upstream):
    sent = {"User-Agent": "x/1", "anthropic-version": "2023-06-01", "Traceparent": "00-1", "X-Odd": "a  b", "Content-Type": "text/plain"}
    server.get("POST", "/v1/audio/transcriptions?a=%20&b=/../", b"x", **sent)
    call, = upstream.calls
    assert call.path == "/v1/audio/transcriptions?a=%20&b=/../"
    assert {name: value for name, value in call.fields if name in sent} == sent


@pytest.mark.parametrize("path, encodings", [("/api/chat", ["identity"]), ("/v1/messages", ["identity"]), ("/api/show", ["gzip, br"])])
def test_only_inference_calls_ask_for_no_compression(server, upstream, path, encodings):
    server.get("POST", path, CHAT, Accept_Encoding="gzip, br")
    assert upstream.calls[0].all("accept-encoding") == encodings


def test_an_answer_that_comes_compressed_passes_untouched(server, upstream):
    data = gzip.compress(b'{"eval_count":3}')
    data += b'"eval_count":3'  # what an encoding hides may look like anything
    upstream.play = lambda call: call.send(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
    _, headers, body = server.get("POST", "/api/chat", CHAT)
    assert (headers["Content-Encoding"], body, server.lines()[0]["tokens_out"]) == ("gzip", data, None)


@pytest.mark.parametrize("trusted, forwarded", [("", ("127.0.0.1", "http", "localhost")), ("127.0.0.1", ("6.6.6.6, 127.0.0.1", "https", "pub"))])
def test_forwarded_headers_are_set_and_believed_from_trusted_peers_only(serve, upstream, trusted, forwarded):
    server = serve(PROXY_TRUSTED=trusted, PROXY_AUTH_TOKEN="off")
    server.get("GET", "/api/tags", X_Forwarded_For="6.6.6.6", X_Forwarded_Proto="https", X_Forwarded_Host="pub", Forwarded="for=6.6.6.6",
               X_Real_Ip="6.6.6.6")
    call, = upstream.calls
    assert tuple(call.all(f"x-forwarded-{name}")[0] for name in ("for", "proto", "host")) == forwarded
    assert not call.all("forwarded") and not call.all("x-real-ip")
    assert server.lines()[0]["client"] == ("6.6.6.6" if trusted else "127.0.0.1")


@pytest.mark.parametrize("scheme_body", ["known", "chunked"])
@pytest.mark.parametrize("method, path", [("POST", "/api/chat"), ("POST", "/api/blobs/sha256:1"), ("DELETE", "/api/delete"), ("PUT", "/x")])
def test_bodies_go_up_whole_whatever_their_framing_method_or_type(server, upstream, method, path, scheme_body):
    data = b"\x28\xb5\x2f\xfd" + bytes(range(256)) * 500
    if scheme_body == "known":
        server.get(method, path, data, Content_Encoding="zstd")
    else:
        wire = b"".join(b"%x\r\n%b\r\n" % (len(data[at:at + 5000]), data[at:at + 5000]) for at in range(0, len(data), 5000)) + b"0\r\n\r\n"
        server.get(method, path, wire, Transfer_Encoding="chunked", Content_Encoding="zstd")
    call, = upstream.calls
    assert (call.body, call.all("content-encoding")) == (data, ["zstd"])
    assert server.lines()[0]["bytes_in"] == len(data)


def test_100_is_said_only_when_the_body_is_wanted(serve, upstream):
    server = serve(PROXY_AUTH_TOKEN="tok", PROXY_MAX_BODY="1K")
    for path, token, length, said in [("/api/chat", "tok", 9, b"HTTP/1.1 100 "), ("/api/blobs/x", "tok", 9999, b"HTTP/1.1 100 "),
                                      ("/api/chat", "no", 9, b"HTTP/1.1 401 "), ("/api/chat", "tok", 9999, b"HTTP/1.1 413 ")]:
        sock = server.ask("POST", path, Content_Length=str(length), Expect="100-continue", Authorization=f"Bearer {token}")
        assert sock.recv(65536).startswith(said)
        if said == b"HTTP/1.1 100 ":
            sock.sendall(b"x" * length)
            assert server.read(sock)[0] == 200


def test_a_long_body_is_looked_through_while_others_are_served(server, upstream, monkeypatch):
    looked, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(proxy, "named_model", lambda *_: (looked.set(), go_on.wait(WAIT), proxy.Named("long", 0, 0))[-1])
    sock = server.ask("POST", "/api/chat", b"[" * 1_000_000)
    assert looked.wait(WAIT)
    assert server.get("GET", "/api/tags")[0] == 200
    go_on.set()
    assert server.read(sock)[0] == 200 and server.lines(model="long")


def test_a_thread_that_outlasts_its_time_wakes_nobody_else(server):
    carrier, late, in_time, ended, results = server.server.carrier, threading.Event(), threading.Event(), threading.Event(), []

    def steps():
        with pytest.raises(TimeoutError):
            yield from proxy.aside(carrier, False, time.monotonic(), lambda: (late.wait(WAIT), ended.set()))
        late.set()
        results.append((yield from proxy.aside(carrier, False, None, lambda: in_time.wait(WAIT) and "right")))
    carrier.call(carrier.start, steps())
    assert ended.wait(WAIT)
    until(lambda: not carrier._inbox)
    carrier.perform(int)
    in_time.set()
    until(lambda: results == ["right"])


@pytest.mark.parametrize("size", [9, 40, 1000])
@pytest.mark.parametrize("path", ["/api/blobs/x", "/api/chat"])
def test_an_interim_answer_does_not_end_an_upload_be_it_in_two_pieces(server, upstream, path, size):
    upstream.reads_bodies = False
    asked, body, interim = threading.Event(), [], b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"

    def play(call):
        call.send(interim[:size])
        asked.set()
        while sum(map(len, body)) < 4_000_000:
            body.append(call.sock.recv(1 << 20))
        call.send(interim[size:])
        while sum(map(len, body)) < 8_000_000:
            body.append(call.sock.recv(1 << 20))
        call.send(OK)
    upstream.play = play
    sock = server.ask("POST", path, b"x" * 1000, Content_Length="8000000")
    if path == "/api/blobs/x":
        assert asked.wait(WAIT)
    sock.sendall(b"x" * 7_999_000)
    assert server.read(sock)[0] == 200


def test_a_connection_with_half_a_body_on_it_is_not_used_again(server, upstream):
    upstream.reads_bodies = False
    upstream.play = lambda call: call.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
    assert server.get("POST", "/api/chat", b"x" * 20_000_000)[0] == 413
    upstream.play = lambda call: call.send(OK)
    assert server.get("GET", "/api/tags")[0] == 200 and upstream.connections == 2


def test_who_asks_for_the_version_without_a_token_sends_no_more_than_a_little(serve, upstream):
    server = serve(PROXY_AUTH_TOKEN="tok")
    sock = server.ask("GET", "/api/version", b"", Transfer_Encoding="chunked")
    threading.Thread(target=send_quietly, args=(sock, b"10000\r\n%b\r\n" % (b"x" * 65536) * 20), daemon=True).start()
    assert drain(sock).startswith(b"HTTP/1.1 413") and upstream.calls == []
    assert server.get("GET", "/api/version", b"1\r\nx\r\n0\r\n\r\n", Transfer_Encoding="chunked")[0] == 200
    assert upstream.calls[0].body == b"x"


def test_an_empty_line_after_a_request_is_no_request(serve):
    server = serve(PROXY_CLIENT_TIMEOUT="0.1")
    sock = server.ask("GET", "/")
    sock.sendall(b"\r\n")
    assert server.read(sock)[0] == 200
    assert sock.recv(1) == b""  # let go for being idle, not told that it was slow


def test_a_long_body_that_was_refused_is_not_looked_through(serve):
    server = serve(PROXY_AUTH_TOKEN="t")
    for count, kept in (10, None), (2000, "close"):
        sock = server.connect()
        sock.sendall(b"POST /api/chat HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * count + b"0\r\n\r\n")
        status, headers, _ = server.read(sock)
        assert (status, headers["Connection"]) == (401, kept)


def test_any_other_expectation_is_417(server):
    assert server.get("POST", "/api/chat", CHAT, Expect="200-ok")[0] == 417


def test_a_bare_embeddings_path_is_openais_if_the_body_has_input(server, upstream):
    server.get("POST", "/embeddings", b'{"model": "m", "input": "x"}')
    server.get("POST", "/embeddings", b'{"model": "m", "prompt": "input"}')
    assert [call.path for call in upstream.calls] == ["/v1/embeddings", "/api/embeddings"]


def test_a_base_with_a_mount_keeps_it(serve, upstream):
    serve(PROXY_UPSTREAMS=f"x=http://127.0.0.1:{upstream.port}/mount/v1").get("GET", "/v1/models?x=1")
    assert upstream.calls[0].path == "/mount/v1/models?x=1"


def test_nagle_is_off_and_keepalive_on_both_sides(server, upstream):
    sock = server.get("GET", "/api/tags") and server.connect()
    until(lambda: len(server.server.clients) == 2)
    for wire in [*server.server.clients, *server.upstream.pool._wires]:
        assert wire.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) and wire.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    sock.close()


def test_a_kept_connection_that_nobody_uses_is_closed(server, upstream, monkeypatch):
    server.get("GET", "/api/tags")
    pool = server.upstream.pool
    until(lambda: pool._wires)
    pool._wires[0].used -= pool.IDLE
    until(lambda: upstream.sockets[0].fileno() < 0)


def test_the_next_address_of_a_host_is_tried(serve, upstream, monkeypatch):
    real = socket.getaddrinfo

    def lookup(host, port, *args, **kwargs):
        with socket.create_server(("127.0.0.1", 0)) as unused:
            dead = unused.getsockname()[1]
        return real("127.0.0.1", dead, *args, **kwargs) + real("127.0.0.1", port, *args, **kwargs)
    monkeypatch.setattr(proxy.socket, "getaddrinfo", lookup)
    assert serve(PROXY_UPSTREAMS=f"cloud=http://localhost:{upstream.port}").get("GET", "/api/tags")[0] == 200


def test_a_look_that_its_asker_gave_up_says_nothing_of_the_upstream(serve, upstream, monkeypatch):
    looks, found, real = [], threading.Event(), socket.getaddrinfo
    monkeypatch.setattr(proxy.socket, "getaddrinfo", lambda host, *args, **kwargs: real("127.0.0.1", *args, **kwargs)
                        if host != "slow.example" or looks.append(host) or found.wait(WAIT) else [])
    server = serve(PROXY_UPSTREAMS=f"cloud=http://slow.example:{upstream.port}")
    for _ in range(3):
        sock = server.ask("GET", "/-/ready")
        until(lambda: any(isinstance(held, proxy.Task) and held.client for held in [*server.server.carrier.waiting]))
        leave(sock, True)
        until(lambda: not server.server.clients)
    found.set()
    assert server.get("GET", "/-/ready")[0] == 200 and looks == ["slow.example"]


def test_a_stop_in_the_middle_of_a_look_is_no_bug(serve, upstream, monkeypatch):
    looking, found, real = threading.Event(), threading.Event(), socket.getaddrinfo
    monkeypatch.setattr(proxy.socket, "getaddrinfo", lambda host, *args, **kwargs: real("127.0.0.1", *args, **kwargs)
                        if host != "slow.example" or looking.set() or found.wait(WAIT) else [])
    server = serve(PROXY_UPSTREAMS=f"cloud=http://slow.example:{upstream.port}")
    sock = server.ask("GET", "/-/ready")
    assert looking.wait(WAIT)
    server.server.drain(0)
    found.set()
    assert drain(sock).startswith(b"HTTP/1.1 503")
    server.log.close()
    assert "bug" not in server.log_path.read_text()


def test_a_host_name_that_is_looked_up_for_ever_neither_outlasts_the_limit_nor_the_client(serve, upstream, monkeypatch):
    found, real = threading.Event(), socket.getaddrinfo
    monkeypatch.setattr(proxy.socket, "getaddrinfo", lambda host, *args, **kwargs: real(host, *args, **kwargs)
                        if host != "slow.example" else found.wait(WAIT) and [])
    server = serve(PROXY_UPSTREAMS="cloud=http://slow.example", PROXY_CONNECT_TIMEOUT="0.2")
    assert server.get("GET", "/api/tags")[0] == 502
    patient = serve(PROXY_UPSTREAMS="cloud=http://slow.example")
    sock = patient.ask("POST", "/api/chat", CHAT)
    until(lambda: patient.server.clients)
    leave(sock, True)
    assert patient.lines()[0]["outcome"] == "client_left"
    found.set()


@pytest.mark.parametrize("host", ["a..b", "x" * 64 + ".example"])
def test_a_host_name_that_is_none_is_a_502(serve, upstream, host):
    status, _, body = serve(PROXY_UPSTREAMS=f"cloud=http://{host}").get("GET", "/api/tags")
    assert status == 502 and b"cannot be reached" in body


def test_a_stale_kept_connection_is_replaced(server, upstream):
    upstream.play = lambda call: (call.send(OK), "close")[1]
    for _ in range(3):
        assert server.get("POST", "/api/chat", CHAT)[0] == 200
        until(lambda: all(sock.fileno() < 0 for sock in upstream.sockets))
    assert upstream.connections == 3


@pytest.mark.parametrize("method, path, status, calls", [("GET", "/api/tags", 200, 3), ("POST", "/api/chat", 502, 2), ("DELETE", "/api/delete", 502, 2)])
def test_what_may_have_been_executed_is_not_sent_again(server, upstream, method, path, status, calls):
    def play(call):
        if len(upstream.calls) == 2:  # on the kept connection: taken, and no word about it
            return "close"
        call.send(OK)
    upstream.play = play
    server.get("GET", "/api/tags")
    assert server.get(method, path, CHAT if method == "POST" else None)[0] == status
    assert len(upstream.calls) == calls


def test_an_upstream_that_cannot_be_reached_is_a_502_in_the_dialect_of_the_path(serve, upstream):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    server = serve(PROXY_UPSTREAMS=f"gpu=http://127.0.0.1:{port}")
    status, headers, body = server.get("POST", "/v1/messages", CHAT, Origin="http://localhost")
    assert status == 502 and json.loads(body)["error"]["type"] == "api_error"
    assert "upstream gpu cannot be reached: Connection refused" in json.loads(body)["error"]["message"]
    assert headers["Access-Control-Allow-Origin"] == "http://localhost"
    assert server.lines()[0]["outcome"] == "unreachable"


def test_an_upstream_that_is_silent_too_long_is_a_504(serve, upstream):
    upstream.play = upstream.wait_left
    server = serve(PROXY_READ_TIMEOUT="0.2")
    status, _, body = server.get("POST", "/api/chat", CHAT)
    assert status == 504 and b"PROXY_READ_TIMEOUT" in body
    assert server.lines()[0]["outcome"] == "timeout" and upstream.left.wait(WAIT)


def test_an_upstream_that_falls_silent_in_its_answer_is_cut(serve, upstream):
    def play(call):
        call.send(STREAM)
        call.chunk(b"half")
        upstream.wait_left(call)
    upstream.play = play
    server = serve(PROXY_READ_TIMEOUT="0.3")
    assert not drain(server.ask("POST", "/api/chat", CHAT)).endswith(b"0\r\n\r\n")
    assert server.lines()[0]["outcome"] == "timeout"


@pytest.mark.parametrize("head", [
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nA: b\rSet-Cookie: c\r\n\r\n", b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n", b"HTTP/1.1 200 OK\nA: b\n\n", b"garbage\r\n\r\n",
    b"HTTP/1.1 101 Up\r\n\r\n", b"HTTP/1.1 200 OK\r\nA: b", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nA: " + b"b" * 70000 + b"\r\n\r\n", b"HTTP/1.1 200 OK\r\nA: \x00\r\n\r\n", b""])
def test_an_answer_with_a_malformed_or_contradictory_head_is_a_502(server, upstream, head):
    upstream.play = lambda call: (call.send(head), "close")[1]
    status, _, body = server.get("POST", "/api/chat", CHAT)
    assert status == 502 and "error" in json.loads(body)
    assert server.lines()[0]["outcome"] == "upstream_lost"


def test_a_garbled_answer_on_a_kept_connection_is_not_asked_for_again(server, upstream):
    upstream.play = lambda call: call.send(OK if len(upstream.calls) < 2 else b"HTTP/1.1 101 Up\r\n\r\n")
    assert [server.get("GET", "/api/tags")[0] for _ in range(2)] == [200, 502] and len(upstream.calls) == 2


def test_1xx_answers_are_skipped(server, upstream):
    upstream.play = lambda call: call.send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nLink: x\r\n\r\n" + OK)
    assert server.get("POST", "/api/chat", CHAT)[::2] == (200, b"{}")


def test_redirects_are_passed_on_and_not_followed(server, upstream):
    location = f"http://127.0.0.1:{upstream.port}/elsewhere"
    upstream.play = lambda call: call.send(f"HTTP/1.1 307 Moved\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode())
    status, headers, _ = server.get("POST", "/api/chat", CHAT)
    assert (status, headers["Location"], len(upstream.calls)) == (307, location, 1)


def test_the_key_does_not_come_down_even_if_the_upstream_says_it(server, upstream):
    body = b'{"error": "bad key sk-upstream-key"}'

    def play(call):
        call.send(b"HTTP/1.1 401 No sk-upstream-key\r\nLocation: /?key=sk-upstream-key\r\nX-Echo: Bearer sk-upstream-key\r\nContent-Length: %d\r\n\r\n" % len(body))
        call.send(body[:30])
        assert upstream.go_on.wait(WAIT)
        call.send(body[30:])
    upstream.play = play
    sock = server.ask("POST", "/api/chat", CHAT)
    got = sock.recv(65536)
    upstream.go_on.set()
    while not got.endswith(b"}"):
        got += sock.recv(65536)
    assert b"sk-upstream-key" not in got and got.endswith(b"*\"}")


def test_what_an_upstream_says_to_browsers_of_itself_stops_here(server, upstream):
    upstream.play = lambda call: call.send(b"HTTP/1.1 200 OK\r\nSet-Cookie: a=b\r\nAlt-Svc: h3\r\nStrict-Transport-Security: x\r\nVia: 1.1 g\r\n"
                                           b"Access-Control-Allow-Origin: https://x\r\nDate: d\r\nServer: s\r\nContent-Length: 0\r\n\r\n")
    _, headers, _ = server.get("GET", "/api/tags")
    assert not set(map(str.lower, headers)) & {"set-cookie", "alt-svc", "strict-transport-security", "access-control-allow-origin"}
    assert (headers.get_all("Via"), headers.get_all("Date"), headers.get_all("Server")) == (["1.1 g"], ["d"], ["s"])
    assert (headers["X-Proxy-Upstream"], headers["X-Accel-Buffering"]) == ("cloud", "no") and headers["X-Request-Id"]


def test_the_upstreams_errors_pass_unchanged(server, upstream):
    upstream.play = lambda call: call.send(b"HTTP/1.1 429 Slow Down\r\nRetry-After: 7\r\nContent-Type: text/plain\r\nContent-Length: 4\r\n\r\nslow")
    status, headers, body = server.get("POST", "/v1/chat/completions", CHAT)
    assert (status, headers["Retry-After"], headers["Content-Type"], body) == (429, "7", "text/plain", b"slow")
    assert server.lines()[0]["outcome"] == "error"


def test_an_answer_that_comes_before_the_body_is_whole_is_given_and_the_connection_closes(server, upstream):
    upstream.reads_bodies = False
    upstream.play = lambda call: (call.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig"), upstream.go_on.wait(WAIT))[0]
    for body in b"some", b"x" * 50_000_000:  # the client waits; the client sends, and the upstream does not read
        sock = server.ask("POST", "/api/blobs/x", Content_Length="100000000")
        threading.Thread(target=send_quietly, args=(sock, body), daemon=True).start()
        assert drain(sock).endswith(b"big")


def send_quietly(sock, data):
    with contextlib.suppress(OSError):
        sock.sendall(data)


# ---- Carrier ----------------------------------------------------------------


def streams_piece_by_piece(server, upstream):
    def play(call):
        call.send(STREAM)
        for piece in b"one\n", b"two\n", b"three\n":
            call.chunk(piece)
            assert upstream.go_on.wait(WAIT)
            upstream.go_on.clear()
        call.send(b"0\r\n\r\n")
    upstream.play = play
    sock, got = server.ask("POST", "/api/chat", CHAT), b""
    for piece in b"one\n", b"two\n", b"three\n":
        while not got.endswith(piece + b"\r\n"):
            got += sock.recv(65536)
        upstream.go_on.set()
    while not got.endswith(b"0\r\n\r\n"):
        got += sock.recv(65536)
    return sock


def test_a_stream_comes_piece_by_piece(server, upstream):
    sock = streams_piece_by_piece(server, upstream)
    upstream.play = lambda call: call.send(OK)
    assert server.get("GET", "/api/tags", sock=sock)[0] == 200


def test_the_head_of_an_answer_does_not_wait_for_its_body(server, upstream):
    upstream.play = lambda call: (call.send(STREAM), upstream.go_on.wait(WAIT), call.send(b"0\r\n\r\n"))[0]
    sock = server.ask("POST", "/api/chat", CHAT)
    assert sock.recv(65536).endswith(b"\r\n\r\n")
    upstream.go_on.set()
    assert sock.recv(65536) == b"0\r\n\r\n"


def test_an_answers_head_with_bare_line_feeds_is_a_502_at_once(server, upstream):
    upstream.play = lambda call: (call.send(b"HTTP/1.1 200 OK\nContent-Length: 2\n\nhi"), upstream.go_on.wait(WAIT))
    assert server.get("GET", "/api/tags")[0] == 502 and not upstream.go_on.is_set()


def test_a_garbled_answer_is_cut_at_once_and_what_came_before_arrives(server, upstream):
    upstream.play = lambda call: (call.send(STREAM + b"4\r\nhalf\r\nXX\r\n"), upstream.go_on.wait(WAIT))
    data = drain(server.ask("POST", "/api/chat", CHAT))
    assert not upstream.go_on.is_set() and data.endswith(b"half")
    assert server.lines()[0]["outcome"] == "upstream_lost"


@pytest.mark.parametrize("version, answer, ends, reset", [
    ("1.1", STREAM + b"4\r\nhalf\r\n", b"half\r\n", False), ("1.1", STREAM + b"9\r\nhalf", b"half", False),
    ("1.1", STREAM + b"4\r\nhalf\r\nXX\r\n", b"half", False), ("1.1", STREAM + b"4\r\nhalf\r\n0", b"half\r\n", False),
    ("1.1", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", b"half", False), ("1.0", STREAM + b"4\r\nhalf\r\n", b"half", True)])
def test_an_upstreams_death_in_its_answer_is_a_cut(server, upstream, version, answer, ends, reset):
    upstream.play = lambda call: (call.send(answer), upstream.go_on.wait(WAIT), "close")[-1]
    sock = server.ask("POST", "/api/chat", CHAT, version=version)
    got = b""
    while b"half" not in got:
        got += sock.recv(65536)
    upstream.go_on.set()
    rest = drain(sock)
    assert (got + rest).endswith(ends) and not (got + rest).endswith(b"0\r\n\r\n")
    assert rest.reset == reset
    assert server.lines()[0]["outcome"] == "upstream_lost"


def test_a_large_chunk_behind_a_foul_one_is_not_taken_for_good(server):
    decoder = proxy.Decoder(proxy.CHUNKED)
    decoder.feed(b"5\r\nhel")
    with pytest.raises(proxy.Malformed):
        decoder.feed(b"lo" + b"x" * 10 + b"\r\n5\r\nhello" * 600 + b"\r\n0\r\n\r\n")


def test_a_cut_reaches_the_client_after_every_byte_that_came_before_it(server, upstream):
    data = os.urandom(3_000_000)

    def play(call):
        call.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n" + data)
        return "close"
    upstream.play = play
    sock = server.ask("GET", "/x")
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while len(got) < len(data):
            piece = sock.recv(65536)
            if not piece:
                break
            got += piece
    assert len(got) > len(data)


@pytest.mark.parametrize("answer, method, status, body", [
    (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "HEAD", 200, b""), (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "HEAD", 200, b""),
    (b"HTTP/1.1 204 None\r\n\r\n", "GET", 204, b""), (b"HTTP/1.1 304 Same\r\nContent-Length: 5\r\n\r\n", "GET", 304, b""),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "GET", 200, b""), (OK, "GET", 200, b"{}"), (STREAM + b"2\r\n{}\r\n0\r\nT: 1\r\n\r\n", "GET", 200, b"{}")])
def test_the_next_request_finds_the_connection_in_order(server, upstream, answer, method, status, body):
    upstream.play = lambda call: call.send(answer)
    sock = server.connect()
    for _ in range(3):
        server.ask(method, "/api/tags", sock=sock)
        if method == "HEAD" or status == 304:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += sock.recv(1)
            assert head.startswith(b"HTTP/1.1 %d " % status) and (b"Content-Length: 5" in head) == (b": 5" in answer)
        else:
            assert server.read(sock)[::2] == (status, body)
    assert upstream.connections == 1


def test_bytes_behind_an_answer_poison_no_connection(server, upstream):
    upstream.play = lambda call: call.send(OK + b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison")
    assert [server.get("GET", "/api/tags")[2] for _ in range(3)] == [b"{}"] * 3
    assert upstream.connections == 3


def test_an_http_1_0_client_gets_no_chunks_and_a_close(server, upstream):
    upstream.play = lambda call: call.send(STREAM + b"5\r\nhello\r\n0\r\n\r\n")
    data = drain(server.ask("GET", "/api/tags", version="1.0"))
    assert data.endswith(b"\r\n\r\nhello") and b"chunked" not in data and not data.reset


def test_an_http_1_0_client_may_keep_its_connection(server):
    sock = server.connect()
    for _ in range(2):
        status, headers, body = server.get("GET", "/api/tags", version="1.0", sock=sock, Connection="keep-alive")
        assert (status, headers["Connection"], body) == (200, "keep-alive", b"{}")


def test_an_http_1_0_upstream_is_understood(server, upstream):
    upstream.play = lambda call: (call.send(b"HTTP/1.0 200 OK\r\n\r\nhello"), "close")[1]
    sock = server.ask("GET", "/api/tags")
    assert server.read(sock)[2] == b"hello"


def test_a_client_that_stays_after_its_last_answer_is_let_go(server):
    sock = server.ask("GET", "/", Connection="close")
    assert server.read(sock)[0] == 200
    until(lambda: not server.server.clients)


def test_not_more_than_so_many_are_heard_out_after_their_last_answer(server, monkeypatch):
    monkeypatch.setattr(proxy.Client, "LINGER", 60)
    monkeypatch.setattr(proxy.Client, "LINGERERS", 2)
    for _ in range(5):
        assert server.read(server.ask("GET", "/", Connection="close"))[0] == 200
    until(lambda: len(server.server.clients) == 2)


def test_thousands_of_pipelined_requests_are_answered(server):
    sock = server.connect()
    sock.sendall(b"GET /-/health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2000)
    data = b""
    while data.count(b'{"status": "ok"}') < 2000:
        data += sock.recv(65536)


def test_no_more_is_read_ahead_of_a_client_that_pipelines_than_fits(server):
    sock = server.connect()
    sock.setblocking(False)
    requests, answers, piece, aheads = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 10_000, 0, b"", [0]
    while answers < 10_000:
        with contextlib.suppress(BlockingIOError):
            requests = requests[sock.send(requests):] if requests else b""
        with contextlib.suppress(BlockingIOError):
            piece = piece[-7:] + sock.recv(65536)  # a mark may be cut in two
            answers += piece.count(b"HTTP/1.1")
        aheads += [len(client.ahead) for client in [*server.server.clients]]
    assert 0 < max(aheads) <= 2 * proxy.PIECE


def test_pipelined_requests_are_answered_in_order(server, upstream):
    def play(call):
        call.send(STREAM)
        call.chunk(call.path.encode())
        call.send(b"0\r\n\r\n")
    upstream.play = play
    sock = server.connect()
    one = b"GET /x%d HTTP/1.1\r\nHost: localhost\r\n\r\n"
    sock.sendall(b"".join(one % n for n in range(5)))
    data = b""
    while data.count(b"0\r\n\r\n") < 5:
        data += sock.recv(65536)
    assert re.findall(rb"/x\d", data) == [b"/x%d" % n for n in range(5)]


def test_a_slow_reader_holds_a_bounded_piece_and_slows_nobody(server, upstream):
    sent = []

    def play(call):
        if call.path != "/big":
            return call.send(OK)
        call.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
        call.sock.settimeout(0.5)
        with contextlib.suppress(socket.timeout, OSError):
            while True:
                sent.append(call.sock.send(b"x" * 65536))
        upstream.go_on.set()
        return "close"
    upstream.play = play
    sock = server.connect()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    server.ask("GET", "/big", sock=sock)
    assert upstream.go_on.wait(WAIT) and sum(sent) < 30_000_000
    assert server.get("GET", "/api/tags")[0] == 200
    held, = [held for held in server.server.carrier.waiting if isinstance(held, proxy.Exchange)]
    assert 0 < len(held.out) <= 2 * proxy.PIECE


def test_a_client_that_takes_nothing_is_let_go(serve, upstream):
    def play(call):
        call.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
        with contextlib.suppress(OSError):
            while True:
                call.send(b"x" * 65536)
        upstream.left.set()
    upstream.play = play
    server = serve(PROXY_CLIENT_TIMEOUT="0.1")
    server.ask("GET", "/big")
    assert upstream.left.wait(WAIT)
    assert server.lines()[0]["outcome"] == "client_left"


# Cancellation, in every phase: the client goes, and the upstream's connection is closed within a second.


def leave(sock, abruptly):
    if abruptly:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.fixture(params=["with a FIN", "with an RST"])
def abruptly(request):
    return request.param == "with an RST"


def leaves(server, upstream, sock, abruptly):
    began = time.monotonic()
    leave(sock, abruptly)
    assert upstream.left.wait(WAIT) and time.monotonic() - began < 1
    line, = server.lines()
    assert line["outcome"] == "client_left"
    return line


@pytest.mark.parametrize("body", [CHAT, CHAT[:-1] + b', "stream": false}'])
def test_a_client_that_leaves_before_the_answer_is_noticed(server, upstream, abruptly, body):
    upstream.play = upstream.wait_left
    sock = server.ask("POST", "/api/chat", body)
    until(lambda: upstream.calls)
    assert leaves(server, upstream, sock, abruptly)["status"] is None


def half_an_answer(server, upstream):
    """A client that has got half of an answer; the rest does not come."""
    def play(call):
        call.send(STREAM)
        call.chunk(b"half")
        upstream.wait_left(call)
    upstream.play = play
    sock = server.ask("POST", "/api/chat", CHAT)
    while b"half" not in sock.recv(65536):
        pass
    return sock


def test_a_client_that_leaves_in_mid_answer_is_noticed(server, upstream, abruptly):
    sock = half_an_answer(server, upstream)
    assert leaves(server, upstream, sock, abruptly)["status"] == 200


def test_a_client_that_leaves_while_it_blocks_its_answer_is_noticed(server, upstream, abruptly):
    def play(call):
        call.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
        with contextlib.suppress(OSError):
            while True:
                call.send(b"x" * 65536)
        upstream.left.set()
    upstream.play = play
    sock = server.ask("GET", "/big")
    until(lambda: any(isinstance(held, proxy.Exchange) and held.out for held in [*server.server.carrier.waiting]))
    leaves(server, upstream, sock, abruptly)


def test_a_client_that_leaves_within_its_body_is_noticed(server, upstream, abruptly):
    upstream.reads_bodies = False
    upstream.play = upstream.wait_left
    sock = server.ask("POST", "/api/blobs/x", b"some", Content_Length="1000")
    until(lambda: upstream.calls)
    leaves(server, upstream, sock, abruptly)


def test_a_client_that_leaves_while_the_upstream_does_not_take_its_body_is_noticed(server, upstream, abruptly):
    gone = threading.Event()

    def play(call):
        assert gone.wait(WAIT)
        upstream.wait_left(call)
    upstream.reads_bodies, upstream.play = False, play
    sock = server.ask("POST", "/api/blobs/x", Content_Length="100000000")
    sock.settimeout(0.3)
    with contextlib.suppress(socket.timeout, OSError):
        while True:
            sock.send(b"x" * 65536)
    threading.Timer(0.1, gone.set).start()
    leaves(server, upstream, sock, abruptly)


def test_a_client_that_leaves_while_it_pipelines_is_noticed(server, upstream):
    upstream.play = upstream.wait_left
    sock = server.ask("POST", "/api/chat", CHAT)
    sock.sendall(b"GET /next HTTP/1.1\r\nHost: localhost\r\n\r\n")
    until(lambda: upstream.calls)
    leaves(server, upstream, sock, False)


def test_a_client_that_leaves_behind_requests_that_nobody_has_read_is_noticed(server, upstream, abruptly):
    sock = half_an_answer(server, upstream)
    sock.sendall(b"GET /next HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3000)
    leaves(server, upstream, sock, abruptly)


def test_a_client_that_leaves_during_the_handshake_is_noticed(serve, upstream, abruptly):
    silent = socket.create_server(("127.0.0.1", 0))
    with silent:
        server = serve(PROXY_UPSTREAMS=f"cloud=https://127.0.0.1:{silent.getsockname()[1]}")
        sock = server.ask("POST", "/api/chat", CHAT)
        far, _ = silent.accept()
        assert far.recv(5)  # the ClientHello: it shakes hands, and nobody answers
        threading.Thread(target=lambda: (Call.was_left(argparse_free(far)), upstream.left.set()), daemon=True).start()
        leaves(server, upstream, sock, abruptly)


def argparse_free(sock):
    """A Call without a request, for its was_left()."""
    call = Call.__new__(Call)
    call.sock = sock
    return call


def test_a_client_that_leaves_while_the_upstream_does_not_accept_is_noticed(serve, upstream, abruptly):
    full = socket.socket()
    full.bind(("127.0.0.1", 0))
    full.listen(0)
    fillers = [socket.socket() for _ in range(4)]
    for filler in fillers:
        filler.setblocking(False)
        filler.connect_ex(full.getsockname())
    server = serve(PROXY_UPSTREAMS=f"cloud=http://127.0.0.1:{full.getsockname()[1]}")
    sock = server.ask("POST", "/api/chat", CHAT)
    until(lambda: any(isinstance(held, proxy.Task) for held in [*server.server.carrier.waiting]))
    began = time.monotonic()
    leave(sock, abruptly)
    assert server.lines()[0]["outcome"] == "client_left" and time.monotonic() - began < 1
    for one in [full, *fillers]:
        one.close()


def test_connecting_too_long_is_a_502_that_names_the_limit(serve, upstream):
    silent = socket.create_server(("127.0.0.1", 0))
    with silent:
        server = serve(PROXY_UPSTREAMS=f"cloud=https://127.0.0.1:{silent.getsockname()[1]}", PROXY_CONNECT_TIMEOUT="0.2")
        status, _, body = server.get("POST", "/api/chat", CHAT)
    assert status == 502 and b"no connection within 0.2 seconds" in body


# ---- Catalogue --------------------------------------------------------------


class Lister(Script):
    """An upstream with models. Its lists wait for `lists_go`, and are not among its calls, which `answer(call)` answers."""

    def __init__(self, *models, native=True):
        super().__init__()
        self.models, self.native, self.listed = list(models), native, []
        self.answer, self.lists_go = lambda call: call.send(OK), threading.Event()
        self.lists_go.set()
        self.play = self._play

    def _play(self, call):
        key = {"/api/tags": "models", "/v1/models": "data"}.get(call.path)
        if call.method not in ("GET", "HEAD") or not key:
            return self.answer(call)
        self.calls.remove(call)
        self.listed.append(call.path)
        self.lists_go.wait(WAIT)
        if key == "models" and not self.native:
            return call.send(b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}")
        entries = [self.entry(name) if key == "models" else {"id": name, "object": "model", "owned_by": "me", "n": 1} for name in self.models]
        call.send(answer(200, json.dumps({"object": "list", key: entries}).encode()))

    @staticmethod
    def entry(name):
        return {"name": name, "model": name, "size": 12345678901234567890, "details": {"family": "f", "parameter_size": "7B"}, "x": [1.0, None]}

    def asked(self):
        """The models that it was asked for."""
        return [json.loads(call.body)["model"] for call in self.calls]


def answer(status, body=b"{}", *lines):
    head = "".join(f"{line}\r\n" for line in (f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", "Content-Type: application/json", *lines))
    return head.encode() + b"\r\n" + body


def says(status, body=b"{}", *lines):
    return lambda call: call.send(answer(status, body, *lines))


def chat(model, **more):
    return json.dumps({"model": model, "messages": [], **more}).encode()


def place(script):
    return "|".join(map(place, script)) if isinstance(script, list) else f"http://127.0.0.1:{getattr(script, 'port', script)}"


@pytest.fixture
def gateway(serve):
    """Start a gateway: gateway({name: Lister, or its copies, or a port}, NAME=value)."""
    scripts = []

    def start(upstreams, wait=True, **environ):
        for script in upstreams.values():
            scripts.extend(script if isinstance(script, list) else [script])
        server = serve(PROXY_UPSTREAMS=", ".join(f"{name}={place(script)}" for name, script in upstreams.items()), **environ)
        until(lambda: server.server.catalogue.is_alone or not wait or not any(
            one._looks or one.looked_at < 0 for one in server.server.catalogue.upstreams))
        return server

    yield start
    for script in scripts:
        if isinstance(script, Script):
            script.lists_go.set()
            script.close()


@pytest.fixture
def dead():
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


def kill(script):
    """Have nobody listen any more: a thread that accepts holds its socket open until it gets one more client."""
    script.close()
    until(lambda: refuses(script.port))


def names(server, path="/api/tags", **headers):
    key, name = ("models", "name") if path.startswith("/api/") else ("data", "id")
    return [entry[name] for entry in json.loads(server.get("GET", path, **headers)[2])[key]]


def test_the_list_is_the_union_with_the_clouds_models_under_their_cloud_names_and_every_field_kept(gateway):
    local, cloud = Lister("a:1", "both:1", "gpt-oss:120b-cloud"), Lister("both:1", "glm-4.6", "gpt-oss:120b", "kimi:latest")
    server = gateway({"local": local, "cloud": cloud}, PROXY_ALIASES="code=glm-4.6:cloud; fast=a:1; lost=nowhere:1")
    wanted = ["a:1", "both:1", "gpt-oss:120b-cloud", "both:1-cloud", "glm-4.6:cloud", "kimi:cloud", "code", "fast"]
    assert names(server) == names(server, "/v1/models") == wanted
    entries = json.loads(server.get("GET", "/api/tags")[2])["models"]
    assert entries == [Lister.entry(name) for name in wanted]
    line = server.lines(3)[-1]
    assert (line["status"], line["outcome"], line["upstream"], line["attempts"]) == (200, "ok", None, [])


def test_what_only_openai_upstreams_have_is_not_in_ollamas_list_nor_asked_for_there(gateway):
    vllm, local = Lister("q-vllm", native=False), Lister("a:1")
    server = gateway({"vllm": vllm, "local": local})
    assert (names(server), names(server, "/v1/models")) == (["a:1"], ["q-vllm", "a:1"])
    assert server.get("POST", "/v1/chat/completions", chat("q-vllm:latest"))[1]["X-Proxy-Upstream"] == "vllm"
    assert server.get("POST", "/api/chat", chat("q-vllm"))[1]["X-Proxy-Upstream"] == "local"
    assert (vllm.asked(), local.asked()) == (["q-vllm"], ["q-vllm"])


@pytest.mark.parametrize("asked, found", [
    ("a:1", "a:1"), ("a%3A1", "a:1"), ("org%2Fb", "org/b"), ("org/b", "org/b"), ("c", "c:latest"), ("c:latest", "c:latest"), ("a:1:local", "a:1"),
    ("gpt-oss:120b-cloud", "gpt-oss:120b-cloud"), ("gpt-oss:120b", "gpt-oss:120b-cloud"), ("mine", "mine"), ("none", None), ("a:1-cloud", None)])
def test_one_model_of_the_list_may_be_asked_for_by_any_of_its_names(gateway, asked, found):
    server = gateway({"local": Lister("a:1", "org/b", "c:latest"), "cloud": Lister("gpt-oss:120b")}, PROXY_ALIASES="mine=gpt-oss:120b-cloud")
    status, _, body = server.get("GET", "/v1/models/" + asked)
    assert (status, json.loads(body).get("id")) == ((200, found) if found else (404, None))
    assert found or json.loads(body)["error"]["type"] == "not_found_error"


def test_a_slow_upstream_does_not_hold_up_the_list_and_its_last_known_models_stay_in_it(gateway):
    slow, quick = Lister("slow:1"), Lister("quick:1")
    server = gateway({"slow": slow, "quick": quick})
    assert names(server) == ["slow:1", "quick:1"]
    slow.lists_go.clear()
    slow.models, quick.models = ["new:1"], ["newer:1"]
    assert names(server) == ["slow:1", "newer:1"]  # while the slow one has still not answered
    slow.lists_go.set()
    until(lambda: "new:1" in server.upstream.models)
    assert names(server) == ["new:1", "newer:1"]


def test_a_wait_ends_when_it_is_due_and_not_at_the_next_tick(gateway):
    slow, quick = Lister("slow:1"), Lister("quick:1")
    server = gateway({"slow": slow, "quick": quick})
    slow.lists_go.clear()
    took = []
    for _ in range(3):
        began = time.monotonic()
        assert names(server) == ["slow:1", "quick:1"]
        took.append(time.monotonic() - began)
    assert 0.3 <= min(took) < 0.4


def test_the_models_of_a_dead_upstream_stay_in_the_list_for_ten_minutes(gateway):
    dying, other = Lister("dying:1"), Lister("other:1")
    server = gateway({"dying": dying, "other": other})
    assert names(server) == ["dying:1", "other:1"]
    kill(dying)
    assert names(server) == names(server) == ["dying:1", "other:1"]
    when, *rest = server.upstream.lists["/api/tags"]
    server.upstream.lists["/api/tags"] = (when - 601, *rest)
    assert names(server) == ["other:1"]


def test_a_body_goes_whole_to_whoever_is_asked_for_the_version_after_the_first(gateway):
    first, second = Lister("a"), Lister("b")
    first.answer, second.answer = says(404), says(200, b'{"version": "2.0.0"}')
    server = gateway({"first": first, "second": second})
    body = b"x" * 3000
    assert server.get("GET", "/api/version", body)[2] == b'{"version": "2.0.0"}'
    assert (first.calls[0].body, second.calls[0].body) == (body, body)


def test_where_only_openai_upstreams_are_the_version_is_the_proxys_own_and_ollamas_lists_are_a_404(gateway):
    server = gateway({"one": Lister("a", native=False), "two": Lister("b", native=False)})
    assert json.loads(server.get("GET", "/api/version")[2]) == {"version": proxy.OWN_VERSION}
    for method, path, body in ("GET", "/api/tags", None), ("POST", "/api/chat", chat("a")):
        status, _, said = server.get(method, path, body)
        assert status == 404 and b"below /v1" in said


def test_a_new_model_is_found_though_other_lists_are_asked_all_the_time(gateway):
    first, second = Lister("a:1"), Lister("b:1")
    server = gateway({"first": first, "second": second})
    second.models.append("new:1")
    for one in server.server.catalogue.upstreams:
        one.looked_at -= 11
    for path in "/v1/models", "/api/ps":
        server.get("GET", path)
    assert server.get("POST", "/api/chat", chat("new:1"))[1]["X-Proxy-Upstream"] == "second"


def test_one_bad_answer_to_a_list_is_no_verdict_for_ever(gateway):
    local, other = Lister("a:1", native=False), Lister("b:1")
    server = gateway({"local": local, "other": other})
    assert server.get("POST", "/api/chat", chat("a:1"))[1]["X-Proxy-Upstream"] == "other"
    local.native = True
    for one in server.server.catalogue.upstreams:
        one.looked_at -= 11
    assert server.get("POST", "/api/chat", chat("a:1"))[1]["X-Proxy-Upstream"] == "local"


def test_an_upstream_that_rests_is_not_asked_for_a_list(gateway):
    first, second = Lister("a:1"), Lister("b:1")
    server = gateway({"first": first, "second": second})
    server.upstream._note(False, "down", 9)
    listed = len(first.listed)
    assert names(server) == ["a:1", "b:1"]
    assert len(first.listed) == listed


def test_the_aliases_of_a_single_upstream_are_judged_by_the_list_that_they_are_added_to(serve):
    script = Lister("a:1")
    server = serve(PROXY_UPSTREAMS=f"local={place(script)}", PROXY_ALIASES="code=b:1")
    assert names(server) == ["a:1"]
    script.models.append("b:1")
    assert names(server, "/v1/models") == ["a:1", "b:1", "code"]
    assert json.loads(server.get("GET", "/v1/models/code")[2])["id"] == "code"
    script.close()


@pytest.mark.parametrize("asked", ["c%C3%B3digo", "c\u00c3\u00b3digo"])
def test_one_model_may_be_asked_for_in_raw_or_escaped_utf_8(gateway, asked):
    server = gateway({"a": Lister("código"), "b": Lister("x")})
    assert json.loads(server.get("GET", "/v1/models/" + asked)[2])["id"] == "código"


@pytest.mark.parametrize("depth", [300, 900, 985, 2000])
def test_a_list_that_is_nested_too_deeply_harms_nobody(gateway, depth):
    odd, good = Lister(), Lister("good:1")
    odd.play = says(200, b'{"models": [{"name": "deep:1", "x": ' + b"[" * depth + b"]" * depth + b"}]}")
    status, _, body = gateway({"odd": odd, "good": good}).get("GET", "/api/tags")
    assert status == 200 and json.loads(body)["models"][-1]["name"] == "good:1"


def test_a_copy_is_asked_for_what_the_first_one_fails_though_nobody_lists_it(gateway):
    copies = [Lister("a:1"), Lister("a:1")]
    server = gateway({"local": copies, "other": Lister("b:1")})
    kill(copies[0])
    server.upstream.pool.prune(0)
    for path, body in ("/api/chat", chat("new:1")), ("/api/chat", b"{}"):
        server.upstream._note(True)
        assert server.get("POST", path, body)[1]["X-Proxy-Attempts"] == "2"


def test_a_body_behind_blanks_and_a_type_in_capitals_are_understood(gateway):
    server = gateway({"a": Lister("a:1"), "b": Lister("b:1")})
    assert server.get("POST", "/v1/rerank", b" " * 99 + chat("b:1"), Content_Type="Application/JSON")[1]["X-Proxy-Upstream"] == "b"


def test_an_upstream_that_gives_no_list_delays_no_request_for_good_and_is_not_asked_all_the_time(gateway):
    good, silent, broken = Lister("a:1"), Lister(), Lister()
    silent.lists_go.clear()
    broken.play = says(500)
    server = gateway({"good": good, "silent": silent, "broken": broken}, wait=False)
    until(lambda: server.upstream.models and broken.calls)
    server.get("POST", "/api/chat", chat("a:1"))
    for one, age in zip(server.server.catalogue.upstreams[1:], (11, 0.4)):
        one.looked_at -= age
    began, asked = time.monotonic(), len(broken.calls)
    for _ in range(10):
        server.get("POST", "/api/chat", chat("a:1"))
    assert time.monotonic() - began < 1 and len(broken.calls) == asked


def test_running_models_that_all_upstreams_are_slow_to_tell_are_waited_for_each_time(gateway, monkeypatch):
    monkeypatch.setattr(proxy.Catalogue, "PATIENCE", 0.01)
    scripts = [Lister("a:1"), Lister("b:1")]
    for script in scripts:
        script.answer = lambda call: scripts[0].go_on.wait(WAIT) and call.send(answer(200, b'{"models": [{"name": "a:1"}]}'))
    server = gateway(dict(zip("ab", scripts)))
    for _ in range(2):
        sock = server.ask("GET", "/api/ps")
        until(lambda: len(server.upstream._looks.get("/api/ps", ())) == 2)
        scripts[0].go_on.set()
        assert server.read(sock)[0] == 200
        scripts[0].go_on.clear()


def test_who_has_become_an_ollama_is_one_for_lists_too(gateway):
    local, vllm = Lister("a:1", native=False), Lister("q", native=False)
    server = gateway({"local": local, "vllm": vllm})
    local.native = True
    for one in server.server.catalogue.upstreams:
        one.looked_at -= 6
    server.get("GET", "/v1/models")
    until(lambda: server.upstream.is_ollama)
    assert names(server) == ["a:1"]


def test_an_ollama_without_models_says_null(gateway):
    empty = Lister()
    empty.play = lambda call: call.send(answer(200, b'{"models": [], "object": "list", "data": null}'))
    assert names(gateway({"empty": empty, "other": Lister("b:1")}), "/v1/models") == ["b:1"]


def test_a_list_without_a_length_is_read_to_its_end_though_half_a_record_of_tls_comes_first(server):
    class Wire:
        ahead, looks = b"", [None, True, None, True, False]

        def look(self):
            came = self.looks.pop(0)
            self.ahead += b"half" if came else b""
            return came

        def close(self):
            pass

    reading = server.upstream._whole(proxy.Answer(None, proxy.Decoder(proxy.UNTIL_CLOSE), Wire(), None))
    with pytest.raises(StopIteration) as read:
        while True:
            next(reading)
    assert read.value.value == b"halfhalf"


def test_an_empty_list_is_a_list_and_nobodys_trouble(gateway, dead):
    server = gateway({"dead": dead, "local": Lister()})
    for path in "/api/tags", "/v1/models":
        assert names(server, path) == []
    server.server.catalogue.upstreams[1].lists.clear()
    assert json.loads(server.get("GET", "/api/ps")[2]).get("models", []) == []


def test_without_any_list_the_answer_is_a_502(gateway, dead):
    status, _, body = gateway({"a": dead, "b": dead}).get("GET", "/v1/models")
    assert status == 502 and "no upstream has given this list" in json.loads(body)["error"]["message"]


def test_a_list_waits_for_the_first_that_answers_if_nothing_is_known_yet(gateway, monkeypatch):
    monkeypatch.setattr(proxy.Catalogue, "PATIENCE", 0.05)
    one, other = Lister("one:1"), Lister("other:1")
    one.lists_go.clear()
    other.lists_go.clear()
    server = gateway({"one": one, "other": other}, wait=False)
    sock = server.ask("GET", "/api/tags")
    until(lambda: len(server.upstream._looks.get("/api/tags", ())) == 3)  # it has begun to wait for longer
    one.lists_go.set()
    assert [entry["name"] for entry in json.loads(server.read(sock)[2])["models"]] == ["one:1"]


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"models": {}}', b'{"models": [1, {}, {"name": 3}, {"model": "x"}, {"name": " "}]}',
                                  b'{"models": [{"name": "x", "size": 1e400}]}', b'{"models": [{"name": "x", "size": NaN}]}', b"[" * 100_000, b""])
def test_a_list_that_is_none_harms_nobody(gateway, body):
    odd, good = Lister(), Lister("good:1")
    odd.play = says(200, body)
    server = gateway({"odd": odd, "good": good})
    assert names(server) == ["good:1"]
    assert server.get("POST", "/api/chat", chat("good:1"))[1]["X-Proxy-Upstream"] == "good"


def test_a_single_upstreams_list_passes_untouched_and_with_aliases_only_they_are_added(serve):
    alone = Lister("gpt-oss:120b")
    raw = json.dumps({"models": [Lister.entry("gpt-oss:120b")], "more": 1.50}, indent=3).encode()
    alone.play = lambda call: call.send(answer(200, raw))
    place = f"cloud=http://127.0.0.1:{alone.port}"
    assert serve(PROXY_UPSTREAMS=place).get("GET", "/api/tags")[2] == raw
    listed = json.loads(serve(PROXY_UPSTREAMS=place, PROXY_ALIASES="mine=gpt-oss:120b-cloud").get("GET", "/api/tags")[2])
    assert listed == {"models": [Lister.entry("gpt-oss:120b"), Lister.entry("mine")], "more": 1.5}
    alone.close()


def test_a_single_upstreams_refusal_to_list_passes_too(serve, upstream):
    upstream.play = says(401, b'{"error": "unauthorized"}')
    status, headers, body = serve(PROXY_ALIASES="a=b").get("GET", "/api/tags")
    assert (status, headers["X-Proxy-Upstream"], body) == (401, "cloud", b'{"error": "unauthorized"}')


@pytest.mark.parametrize("asked, sent", [("gpt-oss:120b-cloud", "gpt-oss:120b"), ("gpt-oss:120b", "gpt-oss:120b"), ("glm-4.6:CLOUD", "glm-4.6"),
                                         ("mine", "glm-4.6"), ("mine:latest", "glm-4.6"), ("my-cloud", "my-cloud"), ("a/b:c-cloud", "a/b:c")])
def test_a_single_cloud_is_asked_by_its_own_names_without_ever_being_asked_for_a_list(serve, upstream, asked, sent):
    server = serve(PROXY_ALIASES="mine=glm-4.6:cloud")
    _, headers, _ = server.get("POST", "/api/chat", chat(asked))
    if asked[:4] != "mine":
        server.get("GET", f"/v1/models/{asked}")
    assert json.loads(upstream.calls[0].body)["model"] == headers["X-Proxy-Model"] == sent
    assert [call.path for call in upstream.calls[1:]] in ([], [f"/v1/models/{asked if asked == sent else sent.replace(':', '%3A')}"])
    line = server.lines()[0]
    assert (line["model"], line["model_sent"]) == (asked, sent)


def test_a_model_that_says_twice_where_it_is_is_a_400_and_one_that_is_to_stay_local_never_goes_to_the_cloud(serve, upstream):
    server = serve()
    for model, status in ("a:cloud:local", 400), ("a:1-cloud:cloud", 400), ("a:local", 404):
        assert server.get("POST", "/api/chat", chat(model))[0] == status
    assert upstream.calls == []


def test_a_model_goes_to_who_lists_it_in_order_of_preference(gateway):
    first, second, cloud = Lister("a:1", "both:1"), Lister("both:1", "b", "glm"), Lister("glm", "only", "both:1")
    server = gateway({"first": first, "second": second, "cloud": cloud})
    for model, upstream, sent in [
            ("both:1", "first", None), ("a:1", "first", None), ("b:latest", "second", None), ("glm", "second", None), ("only", "cloud", None),
            ("glm:cloud", "cloud", "glm"), ("only:Cloud", "cloud", "only"), ("both:1-cloud", "cloud", "both:1"), ("both:1:local", "first", "both:1"),
            ("unheard", "first", None), ("unheard:1-cloud", "cloud", "unheard:1"), ("unheard:local", "first", "unheard")]:
        _, headers, _ = server.get("POST", "/api/chat", chat(model))
        assert (headers["X-Proxy-Upstream"], headers["X-Proxy-Model"], headers["X-Proxy-Attempts"]) == (upstream, sent or model, "1")
        script = {"first": first, "second": second, "cloud": cloud}[upstream]
        assert json.loads(script.calls[-1].body)["model"] == (sent or model)


def test_a_bare_name_that_ones_own_server_lists_never_goes_to_the_cloud(gateway):
    local, cloud = Lister("m:1"), Lister("m:1")
    local.answer = says(503)
    status, headers, _ = gateway({"cloud": cloud, "local": local}).get("POST", "/api/chat", chat("m:1"))
    assert (status, headers["X-Proxy-Attempts"], cloud.calls) == (503, "1", [])


def test_preference_goes_before_being_less_busy(gateway):
    first, second = Lister("m:1"), Lister("m:1")
    first.answer = lambda call: first.go_on.wait(WAIT) and call.send(OK)
    server = gateway({"first": first, "second": second})
    socks = [server.ask("POST", "/api/chat", chat("m:1")) for _ in range(2)]
    until(lambda: len(first.calls) == 2)
    first.go_on.set()
    assert [server.read(sock)[1]["X-Proxy-Upstream"] for sock in socks] == ["first", "first"] and not second.calls


@pytest.mark.parametrize("method, path, body", [("POST", "/api/show", {"name": "b:1"}), ("POST", "/api/show", {"model": "b:1", "name": "a:1"}), ("POST", "/api/show", {"model": "", "name": "b:1"}),
                                                ("POST", "/api/embed", {"model": "b:1"}), ("POST", "/v1/embeddings", {"model": "b:1"}),
                                                ("POST", "/v1/rerank", {"model": "b:1"}), ("POST", "/tokenize", {"model": "b:1"})])
def test_whatever_names_a_model_goes_where_that_is(gateway, method, path, body):
    b = Lister("b:1")
    b.answer = says(200, b"{}", "X-Proxy-Model: forged", "X-Proxy-Attempts: 9")
    server = gateway({"a": Lister("a:1"), "b": b})
    assert server.get(method, path, json.dumps(body).encode(), Content_Type="application/json")[1]["X-Proxy-Upstream"] == "b"
    assert server.lines()[0]["model"] == "b:1"
    _, headers, _ = server.get(method, path, json.dumps(body).encode(), Content_Type="application/json")
    assert (headers.get_all("X-Proxy-Model"), headers.get_all("X-Proxy-Attempts")) == (["b:1"], ["1"])


def test_a_key_that_is_refused_is_logged_though_another_upstream_helps_out(gateway):
    first, second = Lister("m:1"), Lister("m:1")
    first.answer = says(401)
    server = gateway({"first": first, "second": second}, PROXY_KEY_FIRST="wrong")
    assert server.get("POST", "/api/chat", chat("m:1"))[0] == 200
    until(lambda: "upstream first answers 401: it refuses the key, PROXY_KEY_FIRST" in server.log_path.read_text())


def test_every_upstream_gets_its_own_key_and_no_other(gateway, dead):
    one, two, spare = Lister("m:1"), Lister("m:1"), Lister("m:1")
    one.answer = two.answer = says(401)
    server = gateway({"one": one, "two": two, "cloud": spare}, PROXY_KEY_ONE="key-one", PROXY_KEY_TWO="key-two", OLLAMA_API_KEY="key-cloud",
                     PROXY_FALLBACKS="m:1 -> m:1-cloud")
    assert server.get("POST", "/api/chat", chat("m:1"), Authorization="Bearer mine")[1]["X-Proxy-Attempts"] == "3"
    for script, key in (one, "key-one"), (two, "key-two"), (spare, "key-cloud"):
        assert [call.all("authorization") for call in script.calls] == [["Bearer " + key]]


def test_one_server_under_two_names_with_two_keys_is_two_upstreams(gateway):
    script = Lister("m:1")
    script.answer = lambda call: call.send(answer(401 if call.all("authorization") == ["Bearer spent"] else 200))
    server = gateway({"team": script, "spare": script}, PROXY_KEY_TEAM="spent", PROXY_KEY_SPARE="good")
    status, headers, _ = server.get("POST", "/api/chat", chat("m:1"))
    assert (status, headers["X-Proxy-Upstream"], headers["X-Proxy-Attempts"]) == (200, "spare", "2")


def test_bases_with_a_path_are_joined(serve, upstream):
    upstream.play = lambda call: call.send(answer(200, b'{"models": [{"name": "m:1"}]}'))
    server = serve(PROXY_UPSTREAMS=f"a={place(upstream)}/v1, b={place(upstream)}/mount/api/")
    assert names(server) == ["m:1"]
    server.get("POST", "/v1/chat/completions", chat("m:1"))
    upstream.play = lambda call: call.send(answer(404 if call.path[:5] == "/api/" else 200))
    server.get("POST", "/api/chat", chat("m:1"))
    assert {call.path for call in upstream.calls} == {"/api/tags", "/mount/api/tags", "/v1/chat/completions", "/api/chat", "/mount/api/chat"}


def test_the_less_busy_copy_is_asked_first(gateway):
    copies = [Lister("m:1"), Lister("m:1")]
    for copy in copies:
        copy.answer = lambda call: copies[0].go_on.wait(WAIT) and call.send(OK)
    server = gateway({"local": copies})
    socks = [server.ask("POST", "/api/chat", chat("m:1"))]
    until(lambda: copies[0].calls)
    socks.append(server.ask("POST", "/api/chat", chat("m:1")))
    until(lambda: copies[1].calls)
    copies[0].go_on.set()
    assert [server.read(sock)[1]["X-Proxy-Upstream"] for sock in socks] == ["local", "local"]


@pytest.mark.parametrize("body", [b"not json", b"[]", b"{}", b'{"model": 3}', b'{"model": null}', b'{"model": ""}', b"[" * 200_000, b'{"a":' * 200_000,
                                  b'{"model": "' + b"x" * 100_000 + b'"}', b""])
def test_a_body_without_a_model_goes_to_the_first_upstream_as_it_came(gateway, body):
    first, second = Lister("a:1"), Lister("b:1")
    first.answer = says(400, b'{"error": "yours"}')
    server = gateway({"first": first, "second": second}, PROXY_FALLBACKS="* -> b:1")
    status, headers, said = server.get("POST", "/api/chat", body)
    assert (status, said, headers["X-Proxy-Model"], first.calls[0].body, second.calls) == (400, b'{"error": "yours"}', None, body, [])


def test_a_compressed_body_goes_to_the_first_upstream_and_the_log_says_so(gateway):
    first, second = Lister("a:1"), Lister("b:1")
    server = gateway({"first": first, "second": second})
    body = gzip.compress(chat("b:1"))
    assert server.get("POST", "/v1/responses", body, Content_Encoding="gzip")[1]["X-Proxy-Upstream"] == "first"
    assert first.calls[0].body == body and "compressed" in server.lines()[0]["note"]


def test_running_models_are_the_union_of_those_who_can_tell_and_the_version_is_the_firsts_that_has_one(gateway):
    local, other, vllm = Lister("a:1"), Lister("b:1"), Lister("q", native=False)
    local.answer = lambda call: call.send(answer(200, b'{"models": [{"name": "a:1"}]}') if call.path == "/api/ps" else answer(404))
    other.answer = says(200, b'{"models": [{"name": "b:1"}], "version": "9.9.9"}')
    vllm.answer = says(404)
    server = gateway({"vllm": vllm, "local": local, "other": other})
    assert names(server, "/api/ps") == ["a:1", "b:1"]
    assert (json.loads(server.get("GET", "/api/version")[2])["version"], vllm.calls) == ("9.9.9", [])
    kill(other)
    assert names(server, "/api/ps") == ["a:1"]
    assert json.loads(server.get("GET", "/api/version")[2]) == {"version": proxy.OWN_VERSION}


def random_json(random, depth=0):
    kind = random.randrange(7 if depth < 4 else 4)
    if kind == 0:
        return random.choice(["true", "null", "-1.0", "1e5", "12345678901234567890", '""', "1.50"])
    if kind < 4:
        return json.dumps("".join(random.choice('a"\\{}[]:,é\U0001f600\n model') for _ in range(random.randrange(9))), ensure_ascii=random.random() < .5)
    blank = random.choice(["", " ", "\n\t"])
    inner = [random_json(random, depth + 1) for _ in range(random.randrange(4))]
    if kind == 4:
        return "[" + f"{blank},".join(inner) + blank + "]"
    return "{" + ",".join(f"{blank}{json.dumps(random.choice(['model', 'name', 'x', 'é']))}{blank}:{value}" for value in inner) + "}"


def test_in_a_rewritten_body_only_the_bytes_of_the_last_top_level_model_change():
    from random import Random
    random, changed = Random(4), 0
    for _ in range(1500):
        pairs = [(random.choice(['"x"', '"\\u006dodel2"', '"name"', '"model"']), random_json(random)) for _ in range(random.randrange(6))]
        pairs.insert(random.randrange(len(pairs) + 1), (random.choice(['"model"', '"mod\\u0065l"', ' "model" ']), json.dumps(random.choice(["a:1", "é\"", "m"]))))
        pieces = [f"{key}: {value}" for key, value in pairs]
        body = ("{" + ", ".join(pieces) + "}").encode()
        last = max(at for at, (key, _) in enumerate(pairs) if json.loads(key) == "model")
        named = proxy.named_model(body)
        if not isinstance(json.loads(pairs[last][1]), str) or not json.loads(pairs[last][1]):
            assert named is None
            continue
        wanted = [piece if at != last else f'{pairs[last][0]}: "n\\u00e9w"' for at, piece in enumerate(pieces)]
        assert named.model == json.loads(body)["model"] and proxy.with_model(body, named, "néw") == ("{" + ", ".join(wanted) + "}").encode()
        changed += 1
    assert changed > 500


def test_the_way_to_one_of_a_thousand_models_on_five_upstreams_is_found_in_no_time(gateway):
    scripts = {f"u{number}": Lister(*(f"m{number}-{one}:1" for one in range(200))) for number in range(5)}
    server = gateway(scripts)
    catalogue, began = server.server.catalogue, time.process_time()
    for one in range(200):
        attempt, = catalogue.attempts(f"m4-{one}:1", "/api/chat", True)
    assert attempt == (catalogue.upstreams[4], "m4-199:1") and (time.process_time() - began) / 200 < 0.0002


@pytest.mark.parametrize("body, model", [
    (b'{"a": "\\\\", "model": "x"}', "x"), (b'{"a": "b\\"model\": \"x\"}', None), (b'{"model": "a", "x": {"model": "b"}}', "a"), (b'{"x": {"model": "b"}}', None),
    (b'{"model": "a", "model": "b", "stream": true, "o": {"include_usage": true}, "n": -1.5e3 }\n', "b"), (b'[{"model": "b"}]', None), (b'[1, {"model": "b"}', None), (b'{"options": {"model": "b"}' + b" " * 100 + b"}", None),
    (b'{"x": "a\\", \\"model\\": \\"b\\"}"}', None), (b'{"model": "a", "mod\\u0065l": "b"}', "b"), (b'{"model": "a", "x": "}", "model": ""}', None)])
def test_a_model_at_the_end_of_a_body_is_no_other_than_the_one_that_a_parser_finds(body, model):
    named = proxy.named_model(body)
    assert (named and named.model) == model


def test_a_prompt_of_ten_megabytes_is_looked_at_and_copied_in_little_time():
    body = b'{"messages": [{"role": "user", "content": "' + b"a \\n\\\"quoted\\\" " * 700_000 + b'"}], "model": "m:1-cloud"}'
    began = time.process_time()
    proxy.with_model(body, proxy.named_model(body), "m:1")
    assert time.process_time() - began < 0.1  # README: 15 ms


# ---- Fallbacks --------------------------------------------------------------


SEED = ("qwen2.5-coder:7b -> qwen-coder-vllm -> qwen3-coder:480b-cloud; llama3.1:latest → qwen-coder-vllm > deepseek-v3.1:671b-cloud; "
        "* -> gpt-oss:120b-cloud")


@pytest.fixture
def seed(gateway):
    """The gateway of the seed, and its three upstreams."""
    scripts = {"local": Lister("qwen2.5-coder:7b", "llama3.1:latest", "plain:1"), "vllm": Lister("qwen-coder-vllm", native=False),
               "cloud": Lister("qwen3-coder:480b", "deepseek-v3.1:671b", "gpt-oss:120b", "glm-4.6")}
    return (gateway(scripts, PROXY_FALLBACKS=SEED, PROXY_ALIASES="code=qwen2.5-coder:7b"), *scripts.values())


def test_the_chain_of_three_is_tried_in_order_and_the_answer_the_log_and_the_headers_say_what_happened(seed):
    server, local, vllm, cloud = seed
    local.answer, vllm.answer = says(500), says(503)
    status, headers, _ = server.get("POST", "/v1/chat/completions", chat("code"), Origin="http://localhost")
    assert [status, *(headers[f"X-Proxy-{name}"] for name in ("Upstream", "Model", "Attempts"))] == [200, "cloud", "qwen3-coder:480b", "3"]
    assert "X-Proxy-Model, X-Proxy-Attempts" in headers["Access-Control-Expose-Headers"]
    assert (local.asked(), vllm.asked(), cloud.asked()) == (["qwen2.5-coder:7b"], ["qwen-coder-vllm"], ["qwen3-coder:480b"])
    line, = server.lines()
    assert (line["model"], line["model_sent"], line["upstream"], line["outcome"]) == ("code", "qwen3-coder:480b", "cloud", "ok")
    assert line["attempts"] == [{"upstream": "local", "model": "qwen2.5-coder:7b", "status": 500, "outcome": "error"},
                                {"upstream": "vllm", "model": "qwen-coder-vllm", "status": 503, "outcome": "error"},
                                {"upstream": "cloud", "model": "qwen3-coder:480b", "status": 200, "outcome": "ok"}]


def test_a_chain_member_that_nobody_has_for_the_path_is_skipped(seed):
    server, local, vllm, cloud = seed
    local.answer = says(503)
    _, headers, _ = server.get("POST", "/api/chat", chat("llama3.1"))
    assert (headers["X-Proxy-Model"], headers["X-Proxy-Attempts"], vllm.calls) == ("deepseek-v3.1:671b", "2", [])


@pytest.mark.parametrize("model, attempts", [("plain:1", "2"), ("unheard:1", "2"), ("glm-4.6:cloud", "2")])
def test_the_star_is_the_chain_of_models_that_have_none(seed, model, attempts):
    server, *scripts = seed
    for script in scripts:
        script.answer = lambda call: call.send(answer(200 if b"gpt-oss" in call.body else 404))
    status, headers, _ = server.get("POST", "/api/chat", chat(model))
    assert (status, headers["X-Proxy-Model"], headers["X-Proxy-Attempts"]) == (200, "gpt-oss:120b", attempts)


def test_show_is_of_the_model_itself_and_of_no_other(seed):
    server, local, _, cloud = seed
    local.answer = says(404)
    assert (server.get("POST", "/api/show", b'{"model": "plain:1"}')[0], cloud.calls) == (404, [])


@pytest.mark.parametrize("status", sorted(proxy.TRY_NEXT))
def test_the_next_is_asked_when_one_answers(gateway, status):
    first, second = Lister("m:1"), Lister("m:1")
    first.answer = says(status)
    status, headers, _ = gateway({"first": first, "second": second}).get("POST", "/api/chat", chat("m:1"))
    assert (status, headers["X-Proxy-Upstream"], headers["X-Proxy-Attempts"], len(first.calls)) == (200, "second", "2", 1)


def test_a_model_that_is_to_stay_local_is_not_helped_out_by_the_cloud(seed):
    server, local, _, cloud = seed
    local.answer = says(404)
    for model in "plain:1:local", "nosuch:local", "gpt-oss:120b:local":
        assert server.get("POST", "/api/chat", chat(model))[0] == 404
    assert cloud.calls == []


def test_a_terminal_is_told_whom_a_request_went_to(gateway):
    first, second = Lister("m:1"), Lister("n:1")
    first.answer = says(404)
    server = gateway({"first": first, "second": second}, PROXY_LOG_FORMAT="text", PROXY_FALLBACKS="m:1 -> n:1")
    server.get("POST", "/api/chat", chat("m:1"))
    until(lambda: "/api/chat m:1 -> second n:1 (2 attempts) 200 ok" in server.log_path.read_text())
    server.get("POST", "/api/chat", gzip.compress(b"x"), Content_Encoding="gzip")
    until(lambda: "the body is compressed" in server.log_path.read_text())


def test_the_table_of_statuses_is_the_issues():
    assert proxy.TRY_NEXT == {401, 402, 403, 404, 429, 500, 502, 503, 504, 529}


@pytest.mark.parametrize("status", [200, 204, 302, 400, 405, 408, 409, 413, 415, 422, 501])
def test_any_other_status_is_the_clients_own_and_ends_it(gateway, status):
    first, second = Lister("m:1"), Lister("m:1")
    first.answer = lambda call: call.send(answer(status, b"" if status == 204 else b"{}"))
    got, headers, _ = gateway({"first": first, "second": second}).get("POST", "/api/chat", chat("m:1"))
    assert (got, headers["X-Proxy-Attempts"], second.calls) == (status, "1", [])


@pytest.mark.parametrize("phase", ["refused", "cut", "reset", "half a head", "garbage", "silent"])
def test_the_next_is_asked_when_one_breaks_before_its_head(gateway, dead, phase):
    first, second = Lister("m:1"), Lister("m:1")
    first.answer = {"cut": lambda call: "close", "half a head": lambda call: call.send(b"HTTP/1.1 200 OK\r\nX") or "close",
                    "reset": lambda call: call.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)) or "close",
                    "garbage": lambda call: call.send(b"SSH-2.0-x\r\n\r\n") or "close", "silent": lambda call: call.was_left() and "close"}.get(phase)
    server = gateway({"first": first, "second": second}, PROXY_READ_TIMEOUT="0.2")
    if phase == "refused":
        kill(first)
        server.upstream.pool.prune(0)
    status, headers, _ = server.get("POST", "/api/chat", chat("m:1"))
    assert (status, headers["X-Proxy-Upstream"], headers["X-Proxy-Attempts"]) == (200, "second", "2")
    outcome = {"refused": "unreachable", "silent": "timeout"}.get(phase, "upstream_lost")
    assert server.lines()[0]["attempts"][0] == {"upstream": "first", "model": "m:1", "status": None, "outcome": outcome}


def test_after_the_first_byte_no_other_is_asked(gateway):
    first, second = Lister("m:1"), Lister("m:1")
    first.answer = lambda call: call.send(STREAM) or call.chunk(b"half") or "close"
    server = gateway({"first": first, "second": second})
    with pytest.raises(Exception):
        server.get("POST", "/api/chat", chat("m:1"))
    assert (server.lines()[0]["outcome"], second.calls) == ("upstream_lost", [])


def test_if_all_fail_the_client_gets_the_last_answer_that_one_gave(gateway):
    first, second, third = Lister("m:1"), Lister("m:1"), Lister("m:1")
    first.answer, second.answer = says(404), says(429, b'{"error": "too many"}', "X-Mine: 1")
    third.answer = lambda call: "close"
    server = gateway({"first": first, "second": second, "third": third})
    status, headers, body = server.get("POST", "/api/chat", chat("m:1"))
    assert (status, headers["X-Mine"], body) == (429, "1", b'{"error": "too many"}')
    assert (headers["X-Proxy-Upstream"], headers["X-Proxy-Attempts"], server.lines()[0]["upstream"]) == ("second", "3", "second")


@pytest.mark.parametrize("silent, status, outcome", [(False, 502, "upstream_lost"), (True, 504, "timeout")])
def test_if_none_gave_an_answer_it_is_the_proxys_own(gateway, dead, silent, status, outcome):
    first = Lister("m:1")
    first.answer = lambda call: call.was_left() and "close" if silent else "close"
    server = gateway({"dead": dead, "first": first}, PROXY_READ_TIMEOUT="0.2")
    got, headers, body = server.get("POST", "/v1/messages", chat("m:1"))
    assert (got, headers["X-Proxy-Attempts"], json.loads(body)["type"], server.lines()[0]["outcome"]) == (status, "1", "error", outcome)


def test_a_stream_of_the_second_attempt_comes_piece_by_piece_and_leaving_ends_it(gateway):
    first, second = Lister("m:1"), Lister("m:1")
    first.answer = says(503)
    second.answer = lambda call: call.send(STREAM) or call.chunk(b"one") or second.wait_left(call)
    server = gateway({"first": first, "second": second})
    sock = server.ask("POST", "/api/chat", chat("m:1"))
    while b"one" not in sock.recv(65536):
        pass
    sock.close()
    assert second.left.wait(WAIT)


def test_a_kept_connection_outlives_an_answer_that_is_passed_over(gateway):
    scripts = [Lister("m:1") for _ in range(3)]
    for script in scripts[:2]:
        script.answer = says(503)
    server = gateway(dict(zip("abc", scripts)))
    for _ in range(3):
        assert server.get("POST", "/api/chat", chat("m:1"))[0] == 200
    assert [(len(script.calls), script.connections) for script in scripts] == [(3, 1)] * 3


def test_an_attempt_is_made_once_though_two_names_of_a_chain_mean_it(serve, upstream):
    upstream.play = says(503)
    assert serve(PROXY_FALLBACKS="m -> m:cloud -> n").get("POST", "/api/chat", chat("m"))[1]["X-Proxy-Attempts"] == "2"


def test_who_has_just_proved_dead_is_not_asked_for_the_next_name_of_the_chain(gateway):
    first, second = Lister("m:1", "n:1"), Lister("z:1")
    server = gateway({"first": first, "second": second}, PROXY_FALLBACKS="m:1 -> n:1 -> z:1")
    kill(first)
    server.upstream.pool.prune(0)
    _, headers, _ = server.get("POST", "/api/chat", chat("m:1"))
    assert (headers["X-Proxy-Model"], headers["X-Proxy-Attempts"]) == ("z:1", "2")


@pytest.mark.parametrize("model, shown", [("é", "%C3%A9"), ("a\r\nX-Evil: 1", "a%0D%0AX-Evil:%201"), ("\ud800x", "%3Fx"), ("a" * 999, "a" * 200)])
def test_a_models_name_cannot_harm_a_header(serve, upstream, model, shown):
    _, headers, _ = serve().get("POST", "/api/chat", chat(model))
    assert (headers["X-Proxy-Model"], headers["X-Evil"]) == (shown, None)


# ---- Health -----------------------------------------------------------------


def test_who_cannot_be_connected_to_is_skipped_at_once_for_a_while_that_doubles(gateway):
    first, second = Lister("m:1"), Lister("m:1")
    server = gateway({"first": first, "second": second})
    kill(first)
    server.upstream.pool.prune(0)
    attempts = [server.get("POST", "/api/chat", chat("m:1"))[1]["X-Proxy-Attempts"] for _ in range(3)]
    assert attempts == ["2", "1", "1"]
    rests = []
    for failures in range(10):
        now = time.monotonic()
        server.upstream._note(False, "", failures)
        rests.append(round(server.upstream._rests[None] - now))
    assert rests == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    server.upstream._note(True)
    assert not server.upstream.rests()


def test_after_its_rest_one_request_tries_it_while_others_go_elsewhere(gateway, monkeypatch):
    first, second = Lister("m:1"), Lister("m:1")
    server = gateway({"first": first, "second": second})
    tried, go_on = threading.Event(), threading.Event()
    server.upstream._note(False, "down", 5)
    server.upstream._rests[None] = 0.0  # it is over
    server.upstream.pool.prune(0)
    connect = proxy.connect

    def slow(carrier, candidate, deadline):
        if candidate[4][1] == first.port:
            tried.set()
            yield from proxy.aside(carrier, False, None, go_on.wait, WAIT)
        return (yield from connect(carrier, candidate, deadline))
    monkeypatch.setattr(proxy, "connect", slow)
    sock = server.ask("POST", "/api/chat", chat("m:1"))
    assert tried.wait(WAIT)
    assert server.get("POST", "/api/chat", chat("m:1"))[1]["X-Proxy-Upstream"] == "second"
    go_on.set()
    assert server.read(sock)[1]["X-Proxy-Upstream"] == "first"
    assert server.get("POST", "/api/chat", chat("m:1"))[1]["X-Proxy-Upstream"] == "first"


def test_who_leaves_while_it_tries_one_that_rested_does_not_keep_others_from_trying(gateway, monkeypatch):
    first, second = Lister("m:1"), Lister("m:1")
    server = gateway({"first": first, "second": second})
    server.upstream._note(False, "down", 5)
    server.upstream._rests[None] = 0.0  # it is over
    server.upstream.pool.prune(0)
    tried, connect = threading.Event(), proxy.connect

    def stuck(carrier, candidate, deadline):
        tried.set()
        yield (deadline,)
    monkeypatch.setattr(proxy, "connect", stuck)
    sock = server.ask("POST", "/api/chat", chat("m:1"))
    assert tried.wait(WAIT)
    sock.close()
    server.lines(outcome="client_left")
    monkeypatch.setattr(proxy, "connect", connect)
    assert server.get("POST", "/api/chat", chat("m:1"))[1]["X-Proxy-Upstream"] == "first"


@pytest.mark.parametrize("after", ["3600", email.utils.formatdate(time.time() + 3600, usegmt=True)])
def test_a_429_with_retry_after_rests_for_that_model_only(gateway, after):
    first, second = Lister("m:1", "n:1"), Lister("m:1", "n:1")
    first.answer = lambda call: call.send(answer(429, b"{}", f"Retry-After: {after}") if b"m:1" in call.body else OK)
    server = gateway({"first": first, "second": second})
    got = [server.get("POST", "/api/chat", chat(model))[1]["X-Proxy-Attempts"] for model in ("m:1", "m:1", "n:1")]
    assert (got, first.asked()) == (["2", "1", "1"], ["m:1", "n:1"])


def test_no_retry_after_rests_for_more_than_a_week_and_latest_rests_with_its_model(gateway):
    first, second = Lister("m"), Lister("m")
    first.answer = says(429, b"{}", "Retry-After: Wed, 21 Oct 9998 07:28:00 GMT")
    server = gateway({"first": first, "second": second})
    assert [server.get("POST", "/api/chat", chat(model))[1]["X-Proxy-Attempts"] for model in ("m", "m:latest")] == ["2", "1"]
    assert server.upstream._rests["m"] < time.monotonic() + 605_000


def test_a_429_for_no_model_rests_nobody_and_what_429s_leave_behind_is_bounded(gateway):
    first, second = Lister("m:1"), Lister("m:1")
    first.answer = says(429, b"{}", "Retry-After: 3600")
    server = gateway({"first": first, "second": second})
    assert server.get("POST", "/api/web_search", b"{}")[0] == 429
    assert server.get("POST", "/api/chat", chat("m:1"))[1]["X-Proxy-Attempts"] == "2"
    for number in range(1100):
        server.upstream.heed(f"n{number}", "3600")
    assert len(server.upstream._rests) <= 1000 and len(server.log._complained) < 5


@pytest.mark.parametrize("after", ["Oct\x0b Wed, , 07.28", "soon", "-1", "", "9" * 400, "Wed, 21 Oct 2015 07:28:00 GMT", "Fri, 99 Foo 0000", "٣"])
def test_a_retry_after_that_makes_no_sense_is_none(gateway, after):
    first, second = Lister("m:1"), Lister("m:1")
    first.answer = says(429, b"{}", f"Retry-After: {after}")
    server = gateway({"first": first, "second": second})
    assert [server.get("POST", "/api/chat", chat("m:1"))[1]["X-Proxy-Attempts"] for _ in range(2)] == ["2", "2"]


def test_with_everything_resting_the_best_is_tried_all_the_same(gateway):
    first, second = Lister("m:1"), Lister("m:1")
    server = gateway({"first": first, "second": second})
    for one in server.server.catalogue.upstreams:
        one._note(False, "down", 9)
        one.pool.prune(0)
    assert server.get("POST", "/api/chat", chat("m:1"))[1]["X-Proxy-Upstream"] == "first"


def test_ready_is_who_can_reach_any_upstream(gateway, dead):
    assert gateway({"dead": dead, "good": Lister("m:1")}).get("GET", "/-/ready")[0] == 200
    assert gateway({"dead": dead, "too": dead}).get("GET", "/-/ready")[0] == 503


# ---- Slots ------------------------------------------------------------------


class Held(Lister):
    """An upstream that answers each call when it is told to, with `finish()`."""

    def __init__(self, *models, **more):
        super().__init__(*models, **more)
        self.turns, self.most, self.inside = threading.Semaphore(0), 0, 0
        self.lock = threading.Lock()
        self.answer = self._hold

    def _hold(self, call):
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        self.turns.acquire(timeout=WAIT)
        with self.lock:
            self.inside -= 1
        call.send(OK)

    def finish(self):
        self.turns.release()


def queued(server, count):
    until(lambda: sum(len(turns) for turns in server.upstream.desk._queue.values()) == count)


def test_no_more_are_in_flight_than_there_are_slots_and_lists_take_none(gateway):
    held = Held("m:1")
    server = gateway({"local": held, "other": Lister("n:1")}, PROXY_SLOTS="local=2")
    socks = [server.ask("POST", "/api/chat", chat("m:1")) for _ in range(6)]
    queued(server, 4)
    assert names(server) == ["m:1", "n:1"]
    answers, held.answer = held.answer, lambda call: call.send(OK)
    assert [server.get("POST", path, chat("m:1"))[0] for path in ("/api/show", "/api/me")] == [200, 200]
    held.answer = answers
    for _ in range(6):
        held.finish()
    assert [server.read(sock)[0] for sock in socks] == [200] * 6 and held.most == 2
    assert sum(line["queue_ms"] is not None for line in server.lines(6, path="/api/chat")) == 4
    assert server.upstream.busy == 0


def test_callers_have_their_turn_one_after_the_other_and_each_ones_requests_in_order(gateway):
    held = Held("m:1")
    server = gateway({"local": held, "other": Lister()}, PROXY_SLOTS="local=1", PROXY_AUTH_TOKEN="ann:a, bob:b, cid:c")
    order = ["a0", "a1", "a2", "a3", "b1", "b2", "c1"]
    socks = []
    for number, who in enumerate(order):
        socks.append(server.ask("POST", "/api/chat", chat("m:1", who=who), Authorization=f"Bearer {who[0]}"))
        until(lambda: held.calls) if not number else queued(server, number)
    for number in range(len(order)):
        until(lambda: len(held.calls) == number + 1)
        held.finish()
    assert [server.read(sock)[0] for sock in socks] == [200] * 7
    assert [json.loads(call.body)["who"] for call in held.calls] == ["a0", "a1", "b1", "c1", "a2", "b2", "a3"]


def test_who_leaves_the_queue_leaves_it_at_once_and_no_slot_is_lost(gateway):
    held = Held("m:1")
    server = gateway({"local": held, "other": Lister()}, PROXY_SLOTS="local=1")
    socks = [server.ask("POST", "/api/chat", chat("m:1", n=n)) for n in range(1)]
    until(lambda: held.calls)
    socks += [server.ask("POST", "/api/chat", chat("m:1", n=n)) for n in (1, 2)]
    queued(server, 2)
    socks[1].close()
    queued(server, 1)
    assert server.lines(outcome="client_left")[0]["queue_ms"] > 0
    for _ in range(2):
        held.finish()
    assert [server.read(sock)[0] for sock in (socks[0], socks[2])] == [200, 200]
    until(lambda: server.upstream.busy == 0)


@pytest.mark.parametrize("path, key", [("/api/chat", "error"), ("/v1/chat/completions", "message"), ("/v1/messages", "type")])
def test_too_long_in_the_queue_is_a_503_with_a_retry_after_in_the_dialect_of_the_path(gateway, path, key):
    held = Held("m:1")
    server = gateway({"local": held, "other": Lister()}, PROXY_SLOTS="local=1", PROXY_QUEUE_TIMEOUT="0.1")
    first = server.ask("POST", path, chat("m:1"))
    until(lambda: held.calls)
    status, headers, body = server.get("POST", path, chat("m:1"))
    error = json.loads(body)
    assert (status, key in error or key in error["error"]) == (503, True) and int(headers["Retry-After"]) >= 1 and b"PROXY_SLOTS" in body
    line = server.lines(status=503)[0]
    assert (line["outcome"], line["attempts"]) == ("refused", []) and line["queue_ms"] >= 100
    held.finish()
    assert server.read(first)[0] == 200


def test_the_time_for_which_nobody_waited_says_nothing_about_how_long_one_will(gateway):
    class Carrier:
        current = proxy.Task(None, None)

    desk = proxy.Desk(Carrier())
    desk.limit, desk._typical, desk._left_at = 1, 1.0, time.monotonic() - 3600
    next(desk.wait("ann", [type("Copy", (), {"busy": 1})], 0))
    assert desk.wait_expected(1, 99) < 10


def test_the_retry_after_is_no_less_than_the_time_for_which_no_slot_became_free():
    desk = proxy.Desk(None)
    desk.limit, desk._typical, desk._left_at = 1, 1.0, time.monotonic() - 120
    assert desk.wait_expected(1, 99) >= 120


def test_the_retry_after_grows_with_the_queue_and_with_how_long_slots_are_held(gateway):
    desk = proxy.Desk(None)
    desk.limit, desk._typical, desk._queue = 2, 30.0, {"a": [1, 2], "b": [3]}
    assert desk.wait_expected(1, 99) == 60 and desk.wait_expected(2, 99) == 30 and proxy.Desk(None).wait_expected(1, 99) == 99


@pytest.mark.parametrize("end", ["end", "cut", "cancel", "refusal", "silence"])
def test_a_slot_is_free_again_however_an_answer_ends(gateway, end):
    script = Lister("m:1")
    script.answer = {
        "end": lambda call: call.send(OK), "cut": lambda call: call.send(STREAM) or call.chunk(b"x") or "close",
        "cancel": lambda call: call.send(STREAM) or call.chunk(b"x") or script.wait_left(call), "refusal": says(400),
        "silence": lambda call: call.was_left() and "close"}[end]
    server = gateway({"local": script, "other": Lister()}, PROXY_SLOTS="local=1", PROXY_READ_TIMEOUT="0.2" if end == "silence" else "9")
    for _ in range(3):
        sock = server.ask("POST", "/api/chat", chat("m:1"))
        sock.recv(65536)
        if end == "cancel":
            sock.close()
            assert script.left.wait(WAIT)
        until(lambda: server.upstream.busy == 0)
    assert len(script.calls) == 3


def test_a_slot_is_free_once_the_answer_has_come_though_the_client_does_not_take_it(gateway):
    script = Lister("m:1")
    script.answer = says(200, b"x" * 8_000_000)
    server = gateway({"local": script, "other": Lister()}, PROXY_SLOTS="local=1")
    sock = server.ask("POST", "/api/chat", chat("m:1"))
    until(lambda: script.calls)
    assert server.read(sock)[0] == 200
    until(lambda: server.upstream.busy == 0)


def test_a_bug_while_an_answer_is_carried_costs_no_slot(gateway, monkeypatch):
    script = Lister("m:1")
    script.answer = lambda call: call.send(STREAM) or call.chunk(b"one") or script.go_on.wait(WAIT) and call.chunk(b"two")
    server = gateway({"local": script, "other": Lister()}, PROXY_SLOTS="local=1")
    sock = server.ask("POST", "/api/chat", chat("m:1"))
    while b"one" not in sock.recv(65536):
        pass
    monkeypatch.setattr(proxy.Exchange, "_take", lambda exchange, data: {}["bug"])
    script.go_on.set()
    until(lambda: server.upstream.busy == 0)
    until(lambda: "the carrier dropped a connection" in server.log_path.read_text())


def test_a_full_upstream_is_passed_over_if_a_later_one_has_a_slot_and_else_the_first_is_waited_for(gateway):
    first, second = Held("m:1"), Held("m:1")
    server = gateway({"first": first, "second": second}, PROXY_SLOTS="first=1, second=1")
    socks = [server.ask("POST", "/api/chat", chat("m:1"))]
    until(lambda: first.calls)
    socks.append(server.ask("POST", "/api/chat", chat("m:1")))
    until(lambda: second.calls)
    socks.append(server.ask("POST", "/api/chat", chat("m:1")))
    queued(server, 1)
    second.finish()
    assert server.read(socks[1])[1]["X-Proxy-Upstream"] == "second"
    first.finish()
    first.finish()
    assert [server.read(socks[at])[1]["X-Proxy-Upstream"] for at in (0, 2)] == ["first", "first"]


def test_each_copy_has_its_slots_and_who_waits_gets_whichever_is_free_first(gateway):
    copies = [Held("m:1"), Held("m:1")]
    server = gateway({"local": copies}, PROXY_SLOTS="local=1")
    socks = [server.ask("POST", "/api/chat", chat("m:1")) for _ in range(3)]
    queued(server, 1)
    copies[1].finish()
    until(lambda: len(copies[1].calls) == 2)
    for copy in copies:
        copy.finish()
    assert [server.read(sock)[0] for sock in socks] == [200] * 3


def test_who_waits_gets_no_copy_that_does_not_have_its_model(gateway):
    copies = [Held("m:1"), Held("m:1", "n:1")]
    server = gateway({"local": copies}, PROXY_SLOTS="local=1")
    socks = [server.ask("POST", "/api/chat", chat("m:1"))]
    until(lambda: copies[0].calls)
    socks.append(server.ask("POST", "/api/chat", chat("m:1")))
    until(lambda: copies[1].calls)
    socks.append(server.ask("POST", "/api/chat", chat("n:1")))
    queued(server, 1)
    copies[0].finish()
    assert server.read(socks[0])[0] == 200
    queued(server, 1)
    copies[1].finish()
    copies[1].finish()
    assert [server.read(sock)[0] for sock in socks[1:]] == [200, 200] and copies[1].asked() == ["m:1", "n:1"]


def test_a_slot_that_comes_as_its_client_leaves_is_given_back():
    class Carrier:
        current = proxy.Task(None, None)

        def soon(self, act, ticket):
            pass

    desk, copy = proxy.Desk(Carrier()), type("Copy", (), {"busy": 1})
    desk.limit, wait = 1, desk.wait("ann", [copy], 0)
    next(wait)
    desk.leave(copy, 0)
    assert copy.busy == 1
    with pytest.raises(proxy.ClientLeft):
        wait.throw(proxy.ClientLeft("gone"))
    assert copy.busy == 0 and not desk._queue


def test_a_list_that_comes_too_late_wakes_nobody_who_has_gone_on_to_wait_for_something_else(gateway):
    held, slow = Held("m:1"), Lister("slow:1")
    server = gateway({"local": held, "slow": slow}, PROXY_SLOTS="local=1")
    first = server.ask("POST", "/api/chat", chat("m:1"))
    until(lambda: held.calls)
    slow.lists_go.clear()
    for one in server.server.catalogue.upstreams:
        one.looked_at -= 11
    second = server.ask("POST", "/api/chat", chat("m:1"))
    queued(server, 1)
    slow.lists_go.set()
    until(lambda: not server.server.catalogue.upstreams[1]._looks)
    queued(server, 1)
    for sock in first, second:
        held.finish()
        assert server.read(sock)[0] == 200


def test_when_the_queue_is_too_long_an_answer_that_was_given_before_counts(gateway):
    first, second = Lister("m:1"), Held("m:1")
    server = gateway({"first": first, "second": second}, PROXY_SLOTS="second=1", PROXY_QUEUE_TIMEOUT="0.1")
    first.answer = says(429)
    blocker = server.ask("POST", "/api/chat", chat("m:1"))
    until(lambda: second.calls)
    assert server.get("POST", "/api/chat", chat("m:1"))[0] == 429
    second.finish()
    assert server.read(blocker)[0] == 200


def test_a_reload_keeps_who_is_in_flight_and_who_waits_and_obeys_the_new_number(gateway):
    held = Held("m:1")
    settings = dict(PROXY_SLOTS="local=1")
    server = gateway({"local": held, "other": Lister()}, **settings)
    socks = [server.ask("POST", "/api/chat", chat("m:1")) for _ in range(3)]
    queued(server, 2)
    environ = {"PROXY_ENV_FILE": os.devnull, "PROXY_UPSTREAMS": f"local={place(held)}, other=http://127.0.0.1:9", "PROXY_SLOTS": "local=2",
               "PROXY_PORT": str(server.server.server_address[1]), "PROXY_LOG": str(server.log_path)}
    server.server.reload(environ)
    until(lambda: len(held.calls) == 2)
    for _ in range(3):
        held.finish()
    assert [server.read(sock)[0] for sock in socks] == [200] * 3 and held.most == 2
    until(lambda: server.upstream.busy == 0)


def test_who_waits_for_an_upstream_that_a_reload_replaces_goes_on_when_slots_are_taken_away(gateway):
    held = Held("m:1")
    server = gateway({"local": held, "other": Lister()}, PROXY_SLOTS="local=1")
    socks = [server.ask("POST", "/api/chat", chat("m:1")) for _ in range(2)]
    queued(server, 1)
    server.server.reload({"PROXY_ENV_FILE": os.devnull, "PROXY_UPSTREAMS": f"local={place(held)}, other=http://127.0.0.1:9", "PROXY_KEY_LOCAL": "new",
                          "PROXY_PORT": str(server.server.server_address[1]), "PROXY_LOG": str(server.log_path)})
    until(lambda: len(held.calls) == 2)
    for sock in socks:
        held.finish()
    assert [server.read(sock)[0] for sock in socks] == [200, 200]


# ---- Management -------------------------------------------------------------


@pytest.mark.parametrize("path", ["/api/pull", "/api/push", "/api/create", "/api/copy", "/api/delete", "/api/blobs/sha256:1", "/api/signout", "/api/user/keys/x",
                                  "/api/usage?range=24h", "/api/balance", "/pull", "/api/%70ull", "//api//pull/", "/v1/api/pull", "/API/Pull", "/api/pull;x",
                                  "/api\\pull", "/api;x/pull", "/api%2Fpull", "/x/api/pull", "/api/%2570ull", "/api/pull%20", "/api/pull%00"])
def test_management_is_refused_however_it_is_spelt_unless_it_is_on(serve, upstream, path):
    status, _, body = serve(PROXY_MANAGE="off").get("POST", path, b'{"model": "m"}')
    assert (status, b"PROXY_MANAGE" in body, upstream.calls) == (403, True, [])


def test_with_several_upstreams_the_first_ollama_of_ones_own_is_managed(gateway):
    cloud, vllm, local = Lister("a"), Lister("q", native=False), Lister("b:1")
    server = gateway({"cloud": cloud, "vllm": vllm, "local": local}, PROXY_ALIASES="mine=new:1")
    for method, path, body in [("POST", "/api/pull", b'{"name": "mine"}'), ("DELETE", "/api/delete", b'{"model": "a"}'), ("POST", "/api/blobs/x", b"blob"),
                               ("GET", "/api/usage", None)]:
        assert server.get(method, path, body)[1]["X-Proxy-Upstream"] == "local"
    assert [call.body for call in local.calls] == [b'{"name": "new:1"}', b'{"model": "a"}', b"blob", b""]
    server = gateway({"vllm": vllm, "cloud": cloud})
    assert server.get("POST", "/api/pull", b'{"name": "x:1-cloud"}')[1]["X-Proxy-Upstream"] == "cloud"
    assert cloud.calls[-1].body == b'{"name": "x:1"}'


def test_what_nobody_can_manage_is_a_404(serve, upstream):
    assert (serve().get("POST", "/api/pull", b'{"model": "x:local"}')[0], upstream.calls) == (404, [])


def test_who_one_is_may_be_asked_without_management(serve, upstream):
    assert serve(PROXY_MANAGE="off").get("POST", "/api/me", b"")[0] == 200


# ---- Handler ----------------------------------------------------------------


@pytest.mark.parametrize("head", BAD_HEADS)
def test_a_malformed_request_is_answered_and_the_connection_closed(server, upstream, head):
    sock = server.connect()
    sock.sendall(head + b"\r\nGET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n")
    data = drain(sock)
    assert re.match(rb"HTTP/1.1 (400|505) ", data) and data.count(b"HTTP/1.1 ") == 1 and b"Connection: close" in data
    assert upstream.calls == []


@pytest.mark.parametrize("target", ["*", "http:///api/tags", "http://?/x", "http://localhost:1@evil.example/api/tags"])
def test_a_target_without_a_clear_host_and_path_is_a_400(server, upstream, target):
    assert server.get("GET", target)[0] == 400 and upstream.calls == []


@pytest.mark.parametrize("target", ["/-", "/-/", "//-/", "/-/x"])
def test_an_own_page_that_is_none_is_a_404_and_never_asked_for_upstream(server, upstream, target):
    assert server.get("GET", target)[0] == 404 and upstream.calls == []


def test_a_page_that_is_visited_from_another_site_can_only_get(server):
    visit = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}
    assert [server.get(method, "/api/chat", b"", **visit)[0] for method in ("GET", "POST")] == [200, 403]


@pytest.mark.parametrize("line", BAD_FRAMING)
def test_a_request_of_unclear_length_is_answered_and_the_connection_closed(server, upstream, line):
    sock = server.connect()
    sock.sendall(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\n" + line + b"\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n")
    data = drain(sock)
    assert re.match(rb"HTTP/1.1 (400|501) ", data) and data.count(b"HTTP/1.1 ") == 1
    assert upstream.calls == []


@pytest.mark.parametrize("path", ["/api/chat", "/api/blobs/x"])
@pytest.mark.parametrize("chunks", [b"0x5\r\nhello\r\n", b"5\r\nhelloX\r\n", b"5\nhello\r\n", b"-1\r\n"])
def test_bad_chunks_are_a_400_and_never_a_request(server, upstream, path, chunks):
    sock = server.ask("POST", path, Transfer_Encoding="chunked")
    sock.sendall(chunks + b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n")
    data = drain(sock)
    assert data.startswith(b"HTTP/1.1 400 ") and data.count(b"HTTP/1.1 ") == 1
    assert [call.path for call in upstream.calls if "smuggled" in call.path] == []


@pytest.mark.parametrize("method, path, headers, status", [
    ("POST", "/api/chat", {}, 401), ("POST", "/-/nothing", {}, 404), ("OPTIONS", "/api/chat", {}, 204), ("POST", "/-/health", {}, 405),
    ("CONNECT", "evil:443", {}, 405), ("TRACE", "/", {}, 405)])
def test_a_body_that_nobody_read_never_becomes_a_request(serve, upstream, method, path, headers, status):
    server = serve(PROXY_AUTH_TOKEN="tok")
    smuggled = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer tok\r\n\r\n"
    for more in 0, 5:
        sock = server.ask(method, path, smuggled, Content_Length=str(len(smuggled) + more), **headers)
        assert server.read(sock)[0] == status
        sock.sendall(b"x" * more)
    assert upstream.calls == []


@pytest.mark.parametrize("method, target", [("CONNECT", "localhost:1"), ("TRACE", "/api/tags")])
def test_after_a_method_that_is_not_for_a_proxy_the_connection_ends(server, upstream, method, target):
    sock = server.ask(method, target, b"")
    server.ask("GET", "/api/smuggled", sock=sock)
    assert drain(sock).count(b"HTTP/1.1 ") == 1 and not upstream.calls


def test_an_error_can_be_read_although_the_client_is_still_sending(serve):
    server = serve(PROXY_AUTH_TOKEN="tok")
    sock = server.ask("POST", "/api/chat", Content_Length="3000000")
    with contextlib.suppress(OSError):
        sock.sendall(b"x" * 3_000_000)
    assert server.read(sock)[0] == 401
    sock = server.ask("POST", "/api/chat", Content_Length="3000000")
    sock.sendall(b"x" * 100_000)
    assert server.read(sock)[0] == 401 and not drain(sock).reset


def test_a_head_that_ends_in_its_middle_is_dropped(server, upstream):
    sock = server.connect()
    sock.sendall(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Len")
    sock.shutdown(socket.SHUT_WR)
    assert drain(sock) == b"" and upstream.calls == []


def test_a_head_beyond_64_kib_is_a_431(server):
    sock = server.connect()
    sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 66000)
    assert drain(sock).startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_held_body_beyond_the_limit_is_a_413_and_a_blob_is_not(serve, chunked):
    server = serve(PROXY_MAX_BODY="1K")
    framing = {"Transfer_Encoding": "chunked"} if chunked else {}
    body = b"7d0\r\n" + b"x" * 2000 + b"\r\n0\r\n\r\n" if chunked else b"x" * 2000
    status, _, answer = server.get("POST", "/v1/chat/completions", body, **framing)
    assert status == 413 and "PROXY_MAX_BODY" in json.loads(answer)["error"]["message"]
    assert server.get("POST", "/api/blobs/x", body, **framing)[0] == 200


def test_a_head_that_drips_is_a_408_however_slowly_it_drips(serve):
    server = serve(PROXY_CLIENT_TIMEOUT="0.4")
    sock, stop = server.connect(), threading.Event()
    sock.sendall(b"GET /")

    def drip():
        while not stop.wait(0.05):
            with contextlib.suppress(OSError):
                sock.send(b"x")
    threading.Thread(target=drip, daemon=True).start()
    began = time.monotonic()
    head, _ = read_message(sock)
    stop.set()
    assert head.startswith(b"HTTP/1.1 408 ") and time.monotonic() - began < 3


@pytest.mark.parametrize("path", ["/api/chat", "/api/blobs/x"])
def test_a_body_that_drips_is_a_408_however_slowly_it_drips(serve, path):
    server = serve(PROXY_CLIENT_TIMEOUT="0.4")
    sock, stop = server.ask("POST", path, Content_Length="100000"), threading.Event()

    def drip():
        while not stop.wait(0.05):
            with contextlib.suppress(OSError):
                sock.send(b"x")
    threading.Thread(target=drip, daemon=True).start()
    head, _ = read_message(sock)
    stop.set()
    assert head.startswith(b"HTTP/1.1 408 ")
    assert server.lines()[0]["outcome"] == "refused"


def test_the_time_for_a_head_begins_with_the_connection(serve):
    began, sock = time.monotonic(), serve(PROXY_CLIENT_TIMEOUT="2").connect()
    threading.Event().wait(1.6)
    sock.sendall(b"GET")
    assert drain(sock).startswith(b"HTTP/1.1 408") and time.monotonic() - began < 3.2


def test_the_time_that_a_kept_connection_was_idle_is_not_taken_off_the_time_for_a_head(server):
    sock = server.ask("GET", "/api/tags")
    server.read(sock)
    until(lambda: all(client.is_kept for client in server.server.clients))

    def begin_at_the_last_moment():
        client, = server.server.clients
        client.deadline = time.monotonic()
        sock.sendall(b"GET /api/tags HTTP/1.1\r\n")
    server.server.carrier.perform(begin_at_the_last_moment)
    threading.Event().wait(0.6)  # two looks at the deadlines
    sock.sendall(b"Host: localhost\r\n\r\n")
    assert server.read(sock)[0] == 200


def test_idle_clients_are_closed_kept_ones_later(serve):
    server = serve(PROXY_CLIENT_TIMEOUT="0.2")
    fresh, kept = server.connect(), server.connect()
    server.get("GET", "/", sock=kept)
    began = time.monotonic()
    assert drain(fresh) == b""
    between = time.monotonic() - began
    assert drain(kept) == b"" and between < 0.6 < 0.8 <= time.monotonic() - began < 5


def test_the_token_is_asked_for_in_the_dialect_of_the_path(serve, upstream):
    server = serve(PROXY_AUTH_TOKEN="ann:tok")
    for headers in {}, {"Authorization": "Bearer wrong"}:
        status, answer, body = server.get("POST", "/v1/messages", CHAT, **headers)
        assert (status, answer["WWW-Authenticate"]) == (401, "Bearer")
        assert json.loads(body)["error"]["type"] == "authentication_error"
    for headers in {"X_Api_Key": "tok"}, {"Authorization": "tok", "Api_Key": "placeholder"}:
        assert server.get("POST", "/v1/messages", CHAT, **headers)[0] == 200
    assert server.get("POST", "/t/tok/v1/messages", CHAT, Authorization="Bearer ollama")[0] == 200
    assert [line["caller"] for line in server.lines(5)] == [None, None, "ann", "ann", "ann"]


@pytest.mark.parametrize("public, statuses", [("off", [401, 401, 401]), ("on", [200, 200, 200])])
def test_model_lists_may_be_public(serve, public, statuses):
    server = serve(PROXY_AUTH_TOKEN="tok", PROXY_PUBLIC_MODELS=public)
    asked = [("GET", "/api/tags"), ("GET", "/models"), ("POST", "/api/show")]
    assert [server.get(method, path, b"{}" if method == "POST" else None, Authorization="Bearer ")[0] for method, path in asked] == statuses
    assert server.get("POST", "/api/chat", CHAT)[0] == server.get("DELETE", "/api/tags")[0] == 401


def test_the_root_and_the_version_are_open_to_all(serve, upstream):
    server = serve(PROXY_AUTH_TOKEN="tok", PROXY_PREFIX="/api/ollama-proxy")
    upstream.play = lambda call: call.send(b'HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{"version": "0.40.1"}'[:-1])
    for path in "/", "/api/ollama-proxy", "/api/ollama-proxy/":
        assert server.get("GET", path)[::2] == (200, b"Ollama is running")
    assert server.get("GET", "/api/version")[0] == 200


@pytest.mark.parametrize("play", [lambda call: call.send(b"HTTP/1.1 404 No\r\nContent-Length: 2\r\n\r\nno"), lambda call: "close"])
def test_a_version_is_said_where_the_upstream_has_none(server, upstream, play):
    upstream.play = play
    status, _, body = server.get("GET", "//api/version")
    assert status == 200 and re.fullmatch(r"0\.\d+\.\d+", json.loads(body)["version"])


@pytest.mark.parametrize("host, status", [("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:1", 200), ("evil.example", 403), ("10.0.0.1", 403)])
def test_without_a_token_only_loopback_hosts_are_served(server, host, status):
    assert server.get("GET", "/api/tags", Host=host)[0] == status


@pytest.mark.parametrize("origin, status", [("http://localhost:3000", 200), ("app://x", 200), ("vscode-webview://x", 200), ("https://evil.example", 403),
                                            ("null", 403), ("http://localhost.evil.example", 403), ("https://good.example", 200)])
def test_without_a_token_only_loopback_app_and_listed_origins_are_served(serve, upstream, origin, status):
    server = serve(PROXY_ORIGINS="https://*.example.org, https://good.example")
    got, headers, _ = server.get("POST", "/api/chat", CHAT, Origin=origin)
    assert got == status and len(upstream.calls) == (status == 200)
    assert (headers["Access-Control-Allow-Origin"], "Origin" in headers["Vary"]) == (origin if status == 200 else None, True)


def test_without_a_token_what_was_forwarded_for_another_machine_is_refused(server):
    assert server.get("GET", "/api/tags", X_Forwarded_For="127.0.0.1")[0] == 200
    assert server.get("GET", "/api/tags", X_Forwarded_For="203.0.113.5, 127.0.0.1")[0] == 403
    sock = server.connect()
    sock.sendall(b"GET /api/tags HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-For: 203.0.113.5\r\nX-Forwarded-For: 127.0.0.1\r\n\r\n")
    assert server.read(sock)[0] == 403


def test_a_proxy_that_is_its_own_upstream_says_so(serve, upstream):
    server = serve()
    server.server.carrier.perform(server.server.adopt, load(PROXY_UPSTREAMS=f"cloud=http://127.0.0.1:{server.server.server_address[1]}"))
    status, _, body = server.get("POST", "/api/chat", CHAT)
    assert status == 508 and b"PROXY_UPSTREAMS" in body and len(server.lines(2)) == 2


def test_an_upstream_that_refuses_the_key_is_a_warning(server, upstream):
    upstream.play = lambda call: call.send(b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n")
    assert server.get("POST", "/api/chat", CHAT)[0] == 401
    server.lines()
    assert "upstream cloud answers 401: it refuses the key" in server.log_path.read_text()


def test_without_a_token_neither_an_absolute_target_nor_a_second_origin_gets_by(server, upstream):
    assert server.get("GET", "http://evil.example/api/tags")[0] == 403
    sock = server.connect()
    sock.sendall(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nOrigin: https://evil.example\r\nOrigin: http://localhost\r\n\r\n")
    assert server.read(sock)[0] == 400 and upstream.calls == []


def test_without_a_token_other_sites_pages_may_not_even_get(server):
    assert server.get("GET", "/api/tags", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors")[0] == 403


def test_with_tokens_every_origin_may_ask_and_errors_can_be_read(serve):
    server = serve(PROXY_AUTH_TOKEN="tok")
    for headers, status in ({}, 401), ({"Authorization": "Bearer tok"}, 200):
        got, answer, _ = server.get("GET", "/api/tags", Host="public.example", Origin="https://any.example", **headers)
        assert (got, answer.get_all("Access-Control-Allow-Origin")) == (status, ["*"])
        assert "Access-Control-Allow-Credentials" not in answer


def test_a_preflight_is_answered_here_without_a_token(serve, upstream):
    server = serve(PROXY_AUTH_TOKEN="tok")
    status, headers, _ = server.get("OPTIONS", "/v1/chat/completions", Origin="https://any.example", Access_Control_Request_Method="POST",
                                    Access_Control_Request_Headers="authorization,x-stainless-os", Access_Control_Request_Private_Network="true")
    assert status == 204 and upstream.calls == []
    assert (headers["Access-Control-Allow-Headers"], headers["Access-Control-Allow-Origin"]) == ("authorization,x-stainless-os", "*")
    assert headers["Access-Control-Allow-Methods"] == "POST" and headers["Access-Control-Allow-Private-Network"] == "true"
    assert int(headers["Access-Control-Max-Age"]) > 0 and headers["Content-Length"] is None
    assert server.get("OPTIONS", "*")[0] == 204


def test_every_answer_has_the_clients_request_id_if_it_is_sane(server, upstream):
    assert server.get("GET", "/api/tags", X_Request_Id="a.b-1")[1]["X-Request-Id"] == "a.b-1"
    assert upstream.calls[0].all("x-request-id") == ["a.b-1"]
    for path in "/", "/api/tags", "/-/x", "bad":
        assert re.fullmatch("[0-9a-f]{16}", server.get("GET", path, X_Request_Id="a b")[1]["X-Request-Id"])


def test_ready_knows_whether_the_upstream_can_be_reached_without_asking_it_anything(serve, upstream):
    server = serve()
    assert [server.get("GET", path)[0] for path in ("/-/ready", "/readyz", "/-/health", "/healthz")] == [200] * 4
    until(lambda: upstream.connections)
    assert upstream.calls == [] and upstream.connections == 1
    upstream.listener.shutdown(socket.SHUT_RDWR)
    for sock in upstream.sockets:
        sock.shutdown(socket.SHUT_RDWR)
    assert server.get("GET", "/-/ready")[0] == 200  # a look holds for a while
    server.upstream.seen_at -= server.upstream.FRESH
    assert server.get("GET", "/-/ready")[0] == 503
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    lonely = serve(PROXY_UPSTREAMS=f"cloud=http://127.0.0.1:{port}")
    assert [lonely.get("GET", path)[0] for path in ("/-/ready", "/readyz", "/-/health")] == [503, 503, 200]


# ---- Server -----------------------------------------------------------------


def test_one_client_too_many_gets_a_clean_503(serve):
    server = serve(PROXY_MAX_CONNECTIONS="2")
    kept = [server.connect() for _ in range(2)]
    assert [server.get("GET", "/", sock=sock)[0] for sock in kept] == [200, 200]
    for _ in range(3):
        status, headers, body = server.get("GET", "/api/tags")
        assert (status, headers["Retry-After"], headers["Connection"]) == (503, "1", "close") and "error" in json.loads(body)
    kept.pop().close()
    until(lambda: server.get("GET", "/")[0] == 200)


@pytest.mark.parametrize("count", [500, pytest.param(20000, id="soak")])
def test_nothing_leaks_after_hundreds_of_aborted_requests(server, upstream, count):
    def play(call):
        call.send(STREAM)
        call.chunk(b"half")
        call.was_left()
    upstream.play = play
    threads = len(os.listdir("/proc/self/task"))
    for n in range(count):
        sock = server.ask("POST", "/api/chat", CHAT if n % 2 else CHAT[:20], Content_Length=str(len(CHAT)))
        leave(sock, n % 3 == 0)
    until(lambda: not server.server.clients)
    until(lambda: len(os.listdir("/proc/self/task")) <= threads + 5)
    carrier = server.server.carrier
    until(lambda: not carrier.waiting and len(carrier.wires) == 2 + len(server.upstream.pool._wires))


@pytest.mark.parametrize("size", [300_000_000, pytest.param(2_000_000_000, id="soak")])
def test_a_large_upload_takes_no_memory(upstream, size):
    upstream.reads_bodies = False

    def play(call):
        left = size
        while left:
            left -= len(call.sock.recv(min(left, 1 << 20)))
        call.send(OK)
    upstream.play = play
    with running_process(upstream, PROXY_MANAGE="on") as (process, ask):
        def peak():
            return int(re.search(r"VmHWM:\s+(\d+)", open(f"/proc/{process.pid}/status").read())[1])
        ask("GET", "/")
        before = peak()
        sock = socket.create_connection(("127.0.0.1", process.port), WAIT)
        sock.sendall(b"POST /api/blobs/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % size)
        piece = bytes(1 << 20)
        for at in range(0, size, len(piece)):
            sock.sendall(piece[:size - at])
        assert read_message(sock)[0].startswith(b"HTTP/1.1 200")
        assert peak() - before < 10_000
        sock.close()


def test_out_of_descriptors_it_pauses_instead_of_spinning(upstream):
    with running_process(upstream, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))) as (process, ask):
        def cpu():
            return sum(map(int, open(f"/proc/{process.pid}/stat").read().rsplit(") ", 1)[1].split()[11:13]))
        crowd = [socket.create_connection(("127.0.0.1", process.port)) for _ in range(60)]
        before = cpu()
        threading.Event().wait(0.5)
        assert cpu() - before < 25  # hundredths of a second
        for sock in crowd:
            sock.close()
        until(lambda: ask("GET", "/api/tags").status == 200)


def test_the_limit_of_descriptors_is_raised_for_every_client_and_its_upstream(upstream):
    def few():
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with running_process(upstream, preexec_fn=few, PROXY_MAX_CONNECTIONS="100") as (process, ask):
        assert ask("GET", "/api/tags").status == 200
        assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE)[0] == 520


@contextlib.contextmanager
def running_process(upstream, stderr=subprocess.DEVNULL, preexec_fn=None, cwd=None, port="0", arguments=(), before="", **environ):
    """Yield (process, ask) of a proxy that serves; `process.port` is its port."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    base = {"PATH": os.environ["PATH"], "OLLAMA_API_KEY": "sk-upstream-key", "PROXY_PORT": str(port), "PYTHONDONTWRITEBYTECODE": "1"}
    if upstream:
        base["PROXY_UPSTREAMS"] = f"cloud=http://127.0.0.1:{upstream.port}"
    path = str(HERE / "ollama_proxy.py")
    program = ["-c", f"{before}; import runpy, sys; sys.argv = ['x']; runpy.run_path({path!r}, run_name='__main__')"] if before else [path]
    process = subprocess.Popen([sys.executable, *program, *arguments], env={**base, **environ}, stderr=stderr,
                               stdout=subprocess.DEVNULL, preexec_fn=preexec_fn, cwd=cwd or "/")
    process.port = port

    def ask(method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT)
        connection.request(method, path, body, headers)
        return connection.getresponse()

    def serves():
        assert process.poll() is None, "it ended at once"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True
    try:
        until(serves)
        yield process, ask
    finally:
        process.kill()
        process.wait()


def held_stream(upstream, ask):
    """A stream in progress: (response, its first piece read)."""
    def play(call):
        call.send(STREAM)
        call.chunk(b"first\n")
        if upstream.go_on.wait(WAIT):
            with contextlib.suppress(OSError):
                call.chunk(b"last\n")
                call.send(b"0\r\n\r\n")
    upstream.play = play
    response = ask("POST", "/api/chat", CHAT)
    assert response.readline() == b"first\n"
    return response


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_listening_lets_streams_end_and_exits_0(upstream, number):
    with running_process(upstream) as (process, ask):
        response = held_stream(upstream, ask)
        idle = socket.create_connection(("127.0.0.1", process.port))
        process.send_signal(number)
        assert idle.recv(1) == b""  # who waits for nothing is let go
        until(lambda: refuses(process.port))
        assert process.poll() is None
        upstream.go_on.set()
        assert response.read() == b"last\n"
        assert process.wait(WAIT) == 0


def test_it_works_where_there_is_neither_epoll_nor_pollrdhup(upstream):
    with running_process(upstream, before="import select; del select.epoll, select.POLLRDHUP") as (process, ask):
        response = held_stream(upstream, ask)
        upstream.go_on.set()
        assert response.read() == b"last\n"
        upstream.play = upstream.wait_left
        sock = socket.create_connection(("127.0.0.1", process.port))
        sock.sendall(b"GET /api/tags HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(lambda: len(upstream.calls) == 2)
        sock.close()
        assert upstream.left.wait(WAIT)


def refuses(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return False
    return True


def test_what_a_client_has_said_before_the_stop_is_answered(server, upstream):
    upstream.play = lambda call: call.send(STREAM) or call.chunk(b"half") or upstream.go_on.wait(WAIT) and call.chunk(b"rest") or call.send(b"0\r\n\r\n")
    sock = server.ask("POST", "/api/chat", CHAT)
    until(lambda: upstream.calls)
    server.ask("GET", "/-/health", sock=sock)
    stop = threading.Thread(target=server.server.drain, args=(WAIT,))
    stop.start()
    until(lambda: server.server.draining)
    upstream.go_on.set()
    data = drain(sock)
    assert b"half" in data and b"rest" in data and b'{"status": "ok"}' in data
    stop.join()


def test_what_has_come_but_was_not_read_at_the_stop_is_answered(server, monkeypatch):
    monkeypatch.setattr(proxy.Carrier, "AT_ONCE", 1)
    socks = [server.connect() for _ in range(20)]
    for sock in socks:
        assert server.get("GET", "/-/health", sock=sock)[0] == 200
    stopped, go_on = threading.Event(), threading.Event()
    server.server.carrier.call(lambda: (stopped.set(), go_on.wait(WAIT)))
    assert stopped.wait(WAIT)
    for sock in socks:
        server.ask("GET", "/-/health", sock=sock)
    server.server.carrier.call(server.server._close_door)
    go_on.set()
    assert [server.read(sock)[0] for sock in socks] == [200] * 20


def test_after_the_drain_what_is_left_is_cut_visibly_and_logged(upstream, tmp_path):
    with running_process(upstream, PROXY_DRAIN="0.2", PROXY_LOG=str(tmp_path / "log")) as (process, ask):
        response = held_stream(upstream, ask)
        process.send_signal(signal.SIGTERM)
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            response.read()
        assert process.wait(WAIT) == 0
    assert '"outcome": "stopped"' in (tmp_path / "log").read_text()


def test_who_knocked_before_the_stop_is_let_in(server, upstream):
    gate, closed, carrier = threading.Event(), threading.Event(), server.server.carrier
    carrier.call(lambda: closed.set() or gate.wait(WAIT))
    assert closed.wait(WAIT)  # nobody accepts now
    socks = [server.ask("GET", "/api/tags") for _ in range(2 * proxy.Server.AT_ONCE + 1)]
    threading.Thread(target=server.server.drain, args=(WAIT,), daemon=True).start()
    until(lambda: carrier._inbox)
    gate.set()
    for sock in socks:
        status, headers, _ = server.read(sock)
    assert (status, headers["Connection"]) == (200, "close") and refuses(server.server.server_address[1])


def test_a_flood_of_new_clients_does_not_put_off_the_stop(server, monkeypatch):
    monkeypatch.setattr(server.server, "_knock", lambda: True)
    stopping = threading.Thread(target=server.server.drain, args=(0,), daemon=True)
    stopping.start()
    stopping.join(WAIT)
    assert not stopping.is_alive()


def test_a_dead_carrier_ends_the_process(tmp_path, monkeypatch):
    class Broken:
        log = proxy.Log(str(tmp_path / "log"))

        def serve_forever(self):
            raise KeyError("a bug")
    ends = []
    monkeypatch.setattr(proxy.os, "_exit", ends.append)
    proxy.carry(Broken())
    assert ends == [1] and "the carrier has died: KeyError" in (tmp_path / "log").read_text()


def test_a_reload_closes_the_kept_connections_to_the_old_upstream(server, upstream):
    server.get("GET", "/api/tags")
    until(lambda: server.upstream.pool._wires)
    server.server.reload({"PROXY_UPSTREAMS": f"other=http://127.0.0.1:{upstream.port}", "PROXY_ENV_FILE": os.devnull,
                          "PROXY_LOG": str(server.log_path)})
    until(lambda: upstream.sockets[0].fileno() < 0)
    assert server.get("GET", "/api/tags")[1]["X-Proxy-Upstream"] == "other"


def test_a_reload_that_changes_nothing_keeps_the_connections(server, upstream):
    server.get("GET", "/api/tags")
    server.server.reload({"PROXY_UPSTREAMS": f"cloud=http://127.0.0.1:{upstream.port}", "PROXY_ENV_FILE": os.devnull,
                          "OLLAMA_API_KEY": "sk-upstream-key", "PROXY_LOG": str(server.log_path)})
    server.get("GET", "/api/tags")
    assert upstream.connections == 1


def test_a_reload_opens_no_door_that_a_start_would_not(serve):
    server = serve(PROXY_HOST="0.0.0.0", PROXY_AUTH_TOKEN="tok")
    server.server.reload({"PROXY_HOST": "127.0.0.1", "OLLAMA_API_KEY": "k", "PROXY_ENV_FILE": os.devnull, "PROXY_LOG": str(server.log_path)})
    until(lambda: "the old settings stay: PROXY_HOST=0.0.0.0 lets other machines in" in server.log_path.read_text())
    assert server.get("POST", "/api/chat", CHAT)[0] == 401


def test_a_reload_raises_the_limit_of_descriptors_too(server, upstream):
    settings, (soft, hard) = load(PROXY_MAX_CONNECTIONS="4000"), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 100, hard))
    try:
        server.server.carrier.perform(server.server.adopt, settings)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 8000
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_bug_in_what_hears_a_kept_connection_is_logged_once(server, upstream, monkeypatch):
    assert server.get("GET", "/api/tags")[0] == 200
    until(lambda: server.upstream.pool._wires)
    monkeypatch.setattr(proxy.Wire, "look", lambda wire: {}["bug"])
    upstream.sockets[0].sendall(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
    until(lambda: "KeyError" in server.log_path.read_text())
    threading.Event().wait(0.2)
    assert server.log_path.read_text().count("KeyError") == 1


def test_a_reload_of_nonsense_changes_nothing(server):
    server.server.reload({"PROXY_UPSTREAMS": "x=http://h", "PROXY_LOG": "a\0b", "PROXY_ENV_FILE": os.devnull})
    assert server.get("GET", "/api/tags")[0] == 200


def test_a_kept_connection_is_all_that_ready_looks_for_and_grows_no_younger_by_it(server, upstream):
    server.get("GET", "/api/tags")
    until(lambda: server.upstream.pool._wires)
    used, server.upstream.seen_at = server.upstream.pool._wires[0].used, float("-inf")
    assert server.get("GET", "/-/ready")[0] == 200 and upstream.connections == 1
    assert server.upstream.pool._wires[0].used == used


def test_ready_is_503_where_there_are_no_threads_to_look_a_host_up(serve, upstream, monkeypatch):
    def refuse(*args):
        raise RuntimeError("can't start new thread")
    server = serve(PROXY_UPSTREAMS=f"cloud=http://slow.example:{upstream.port}")
    monkeypatch.setattr(proxy._thread, "start_new_thread", refuse)
    assert server.get("GET", "/-/ready")[0] == 503 and server.get("GET", "/api/version")[0] == 200
    server.lines()
    assert "bug" not in server.log_path.read_text() and "no more threads" in server.log_path.read_text()


def test_ready_is_503_while_draining(server):
    server.server.draining = True
    status, _, body = server.get("GET", "/-/ready")
    assert (status, json.loads(body)) == (503, {"status": "draining"})


def test_a_request_without_an_answer_gets_a_503_at_the_end_of_the_drain(upstream):
    upstream.play = upstream.wait_left
    with running_process(upstream, PROXY_DRAIN="0.2") as (process, ask):
        sock = socket.create_connection(("127.0.0.1", process.port), WAIT)
        sock.sendall(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(CHAT) + CHAT)
        until(lambda: upstream.calls)
        process.send_signal(signal.SIGTERM)
        assert read_message(sock)[0].startswith(b"HTTP/1.1 503 ")
        assert process.wait(WAIT) == 0


def test_a_second_signal_ends_at_once(upstream):
    with running_process(upstream) as (process, ask):
        held_stream(upstream, ask)
        process.send_signal(signal.SIGINT)
        until(lambda: refuses(process.port))
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT) == 130


def test_sighup_reads_the_settings_again_without_dropping_a_stream(upstream, tmp_path):
    (tmp_path / ".env").write_text("PROXY_AUTH_TOKEN=old\n")
    log = tmp_path / "log"
    with running_process(upstream, cwd=str(tmp_path), PROXY_LOG=str(log)) as (process, ask):
        response = held_stream(upstream, lambda *a: ask(*a, Authorization="Bearer old"))
        (tmp_path / ".env").write_text("PROXY_AUTH_TOKEN=new\n")
        process.send_signal(signal.SIGHUP)
        until(lambda: ask("GET", "/-/x", Authorization="Bearer new") and "read again" in log.read_text())
        assert [ask("GET", "/api/x", Authorization=f"Bearer {token}").status for token in ("old",)] == [401]
        (tmp_path / ".env").write_text("PROXY_AUTH_TOKEN=new er\n")
        log.rename(tmp_path / "log.1")
        process.send_signal(signal.SIGHUP)
        until(lambda: "the old settings stay" in (tmp_path / "log.1").read_text())
        upstream.go_on.set()
        assert response.read() == b"last\n"
        (tmp_path / ".env").write_text("PROXY_AUTH_TOKEN=newer\n")
        process.send_signal(signal.SIGHUP)
        until(log.exists)
        upstream.play = lambda call: call.send(OK)
        until(lambda: ask("GET", "/api/x", Authorization="Bearer newer").status == 200)


def test_it_works_as_process_1_of_a_container(upstream):
    unshare = shutil.which("unshare")
    if not unshare or subprocess.run([unshare, "--pid", "--fork", "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no rights to make a PID namespace here")
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    environ = {"PATH": os.environ["PATH"], "PROXY_UPSTREAMS": f"x=http://127.0.0.1:{upstream.port}", "PROXY_PORT": str(port)}
    process = subprocess.Popen([unshare, "--pid", "--fork", sys.executable, str(HERE / "ollama_proxy.py")], env=environ, cwd="/",
                               stderr=subprocess.DEVNULL)
    until(lambda: not refuses(port))
    child = int(open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()[0])
    os.kill(child, signal.SIGTERM)
    assert process.wait(WAIT) == 0


# ---- Command line -----------------------------------------------------------


def run(*arguments, cwd="/", **environ):
    return subprocess.run([sys.executable, str(HERE / "ollama_proxy.py"), *arguments], env={"PATH": os.environ["PATH"], **environ}, cwd=cwd,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=WAIT, universal_newlines=True)


def test_help_lists_every_setting_and_needs_none():
    done = run("--help")
    assert done.returncode == 0 and all(s.name in done.stdout and s.help.replace("`", "") in done.stdout for s in proxy.SETTINGS)


def test_the_version_is_printed():
    assert run("--version").stdout == f"ollama_proxy {proxy.__version__}\n"


def test_bad_settings_end_it_with_status_2_a_line_each_and_no_traceback():
    done = run(OLLAMA_API_KEY="sk-se cret", PROXY_PORT="x")
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert [line.split(": ")[1].split("=")[0] for line in lines] == ["OLLAMA_API_KEY", "PROXY_PORT"] and "cret" not in done.stderr


def test_no_key_ends_it_with_status_2():
    done = run()
    assert done.returncode == 2 and "settings/keys" in done.stderr and len(done.stderr.splitlines()) == 1


def test_an_unknown_command_ends_it_with_status_2():
    assert run("srve").returncode == 2


def test_a_port_that_is_taken_ends_it_with_status_1_and_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run(OLLAMA_API_KEY="k", PROXY_PORT=str(taken.getsockname()[1]))
    assert done.returncode == 1 and "PROXY_PORT" in done.stderr and len(done.stderr.splitlines()) == 1


def test_check_masks_secrets_and_says_what_the_upstream_answers(upstream):
    environ = {"PROXY_UPSTREAMS": f"cloud=http://127.0.0.1:{upstream.port}", "OLLAMA_API_KEY": "sk-good", "PROXY_AUTH_TOKEN": "ann:tok-en"}
    done = run("check", **environ)
    assert done.returncode == 0 and "key accepted" in done.stdout and " ms" in done.stdout
    assert "sk-good" not in done.stdout and "tok-en" not in done.stdout
    assert "does not list its models" in done.stdout
    for path, words in ("/api/tags", "lists 1 models, in Ollama's API\n"), ("/v1/models", "in OpenAI's API only: it takes no part below /api"):
        upstream.play = lambda call: call.send(answer(200, b'{"models": [{"name": "a"}], "data": [{"id": "a"}]}') if call.path == path else answer(404))
        assert words in run("check", **environ).stdout
    upstream.play = lambda call: call.send(b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n")
    done = run("check", **environ)
    assert done.returncode == 1 and "the key is refused (401): set OLLAMA_API_KEY" in done.stdout


def test_check_knows_of_names_that_no_upstream_lists():
    script = Lister("a:1")
    done = run("check", PROXY_UPSTREAMS=f"local={place(script)}", PROXY_ALIASES="x=nosuch:1; y=a:1", PROXY_FALLBACKS="a:1 -> typo; * -> x")
    script.close()
    assert [line for line in done.stdout.splitlines() if "warning" in line] == [
        f"warning: no upstream lists {name}, which PROXY_ALIASES or PROXY_FALLBACKS names" for name in ("nosuch:1", "typo")]


def test_check_ends_with_1_when_the_upstream_cannot_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    done = run("check", PROXY_UPSTREAMS=f"http://127.0.0.1:{port}")
    assert done.returncode == 1 and "cannot be reached: Connection refused" in done.stdout


def test_demo_streams_an_answer_and_its_curl_lines_work():
    process = subprocess.Popen([sys.executable, "-u", str(HERE / "ollama_proxy.py"), "demo"], env={"PATH": os.environ["PATH"]}, cwd="/",
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, universal_newlines=True)
    try:
        text, lines = "", []
        while len(lines) < 4:
            text += process.stdout.readline()
            lines = re.findall(r"^  (curl .*)$", text, re.M)
        assert "Every word comes the moment it is said." in text
        for line in lines[:2] + lines[3:]:
            done = subprocess.run(line, shell=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=WAIT)
            assert done.returncode == 0 and len(done.stdout.splitlines()) > 3
        port = int(re.search(r":(\d+)", text)[1])
        for path, body in [("/v1/messages", {"messages": [{"role": "user", "content": "hi there"}]}), ("/api/show", {"model": "echo"}),
                           ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi there"}]}]})]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT)
            connection.request("POST", path, json.dumps(body))
            answer = connection.getresponse().read()
            assert b"hi there" in answer or path == "/api/show"
        for path in "/api/tags", "/v1/models", "/api/version":
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT)
            connection.request("GET", path)
            assert connection.getresponse().status == 200
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT)
        connection.request("GET", "/v1/models")
        assert [one["id"] for one in json.load(connection.getresponse())["data"]][-3:] == ["glm-4.6:cloud", "code", "chat"]
        assert b"X-Proxy-Upstream: vllm" in done.stdout and b"X-Proxy-Attempts: 2" in done.stdout
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT) == 0
        process.stdout.close()
