#!/usr/bin/env python3
# /// script
# requires-python = ">=3.8"
# dependencies = []
# ///
"""One key, every client, every byte at once: a streaming proxy for Ollama, in one file.

Tools that know "an Ollama at this URL" or "an OpenAI base URL" ask the proxy; it adds the
key for https://ollama.com (or for your own server), keeps it to itself, and relays what
comes, the moment it comes. Only the standard library is needed, Python 3.8 or later:

    OLLAMA_API_KEY=... python3 ollama_proxy.py        python3 ollama_proxy.py --help

The life of a request:

    client -> Handler.answer                the one place where an exception meets a client
               who asks      Callers        token, Host and Origin            401 403
               what for      Target         path repaired, dialect            400 404
               whom to ask   Catalogue      attempts: upstream, model         404 503
               ask           Upstream       urllib opener over kept wires     502 504
               carry         Exchange       bytes out as they come in
               account       Record         one line in the log
           <- the answer, byte for byte, or an error in the dialect of the path

One thread, the carrier, does all of this for all clients; what would hold it up (looking
up a name, looking through a long body, writing the log) has a thread of its own.

Contents, in reading order; a section uses only the sections above it:

    Errors            what can go wrong, and the status each one becomes
    Settings          every variable: name, default, help, parser - declared once
    Heads and paths   pure: from the client's request line and headers to the upstream's
    Bodies            pure: where a body ends, and the model it names
    Callers           tokens, origins, hosts: who may ask
    Models            cloud names, and lists of models
    Records           what one request cost, and the log
    Wires             sockets: reading ahead, waiting, dialling
    Upstreams         pool, slots, urllib handler, health
    Carrier           the one thread: tasks, clients, and answers on their way
    Catalogue         merged model lists, and the attempts that a model name makes
    Handler           one request, from its first line to its last byte
    Server            the ThreadingHTTPServer: limits, drain, reload
    Command line      serve, demo, check
"""

from __future__ import annotations

import _thread
import base64
import errno
import gc
import hmac
import ipaddress
import json
import math
import os
import queue
import random
import re
import resource
import select
import selectors
import signal
import socket
import ssl
import struct
import sys
import threading
import time
import urllib.request
from collections import deque, namedtuple
from contextlib import contextmanager, suppress
from email.utils import formatdate, parsedate_to_datetime
from functools import lru_cache, partial, reduce
from http.client import responses as REASONS
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from operator import attrgetter
from socketserver import TCPServer
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit

__version__ = "1.0.0"

# ---- Errors -----------------------------------------------------------------
#
# A Failure ends one request. Its class says whose doing it was: the status that
# the client gets, if it can still be told, and the outcome that the log gets.


class SettingsError(ValueError):
    """The settings do not make a proxy; str() names every problem on a line, and no secret."""


class Failure(Exception):
    """One request ends here, with a status and headers for the client and words for people."""
    status, outcome = 500, "error"

    def __init__(self, words, status=None, headers=()):
        super().__init__(words)
        self.status = status or self.status
        self.headers = list(headers)


class Refused(Failure):
    """The proxy says no: the request, its sender, or a limit."""
    status, outcome = 400, "refused"


class Malformed(Refused):
    """These bytes are not HTTP as RFC 9110 and 9112 define it, so nobody can say where they end."""


class Unreachable(Failure):
    """No connection to the upstream could be made."""
    status, outcome = 502, "unreachable"


class Silent(Failure):
    """The upstream was silent for longer than PROXY_READ_TIMEOUT."""
    status, outcome = 504, "timeout"


class UpstreamLost(Failure):
    """The upstream cut, reset or garbled its answer."""
    status, outcome = 502, "upstream_lost"


class Stopped(Failure):
    """The proxy was told to stop, and the drain is over."""
    status, outcome = 503, "stopped"


class ClientLeft(Failure):
    """The client went first; there is nobody to tell."""
    outcome = "client_left"


def printable(text, limit=200):
    """Make text that came from outside fit for one line of a log or a terminal."""
    return "".join(c if c.isprintable() else "\\x%02x" % ord(c) for c in str(text)[:limit])


# ---- Settings ---------------------------------------------------------------
#
# Parsers take text and raise ValueError in words for people; a secret's parser
# never quotes its text. (No dataclasses: importing them takes long.)

remembered = lru_cache(maxsize=64)  # what was made of a text: clients and upstreams say the same again and again
OFF = "off"
TOKEN_TEXT = re.compile(r"[\x21-\x7e]+")
NAME_TEXT = re.compile(r"[A-Za-z0-9._-]+")
HOST_TEXT = re.compile(r"[A-Za-z0-9._-]+|\[?[0-9A-Fa-f:.]+\]?")
ENV_LINE = re.compile(r"""(?:export\s+)?([A-Za-z_]\w*)\s*=\s*(?:"([^"]*)"|'([^']*)'|(.*?))(?:\s+#.*)?""")
HTTP_PROXY = re.compile(r"(?i)((http://)?([^/\s]*@)?([^/\s@:]+|\[[^/\s@]+\])(:[0-9]{1,5})?(/.*)?)?")
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parser(pattern, expected, convert=str, low=None, high=None):
    """Make a parser of text that matches a pattern and, converted, lies within bounds."""
    def parse(text):
        value = convert(text) if re.fullmatch(pattern, text) else None
        if value is None or low is not None and value < low or high is not None and value > high:
            raise ValueError(f"expected {expected}")
        return value
    return parse


seconds = parser(r"[0-9]{1,6}(\.[0-9]{1,6})?", "seconds, more than 0 and less than a million", float, 0.001)
seconds_or_zero = parser(r"[0-9]{1,6}(\.[0-9]{1,6})?", "seconds, less than a million, or 0", float)
switch = parser(r"(?i)on|true|yes|1|off|false|no|0", "on or off",
                lambda text: text.lower() in ("on", "true", "yes", "1"))
mount_path = parser(r"(/(?!\.\.?(/|$))[\x21-\x22\x24-\x2e\x30-\x3e\x40-\x7e]+)*/*",
                    "a path such as /api/ollama-proxy", lambda text: text.rstrip("/"))
prefix = parser(r"(?!/+[t-](/|$)).*", "a path that does not start with /t or /-, which mean something here", mount_path)
size = parser(r"(?i)[1-9][0-9]{0,11} ?[KMG]?(i?B)?", "a size such as 500K, 64M or 1G",
              lambda text: int(re.match("[0-9]+", text)[0]) * UNITS[re.sub("[^KMG]", "", text.upper())])


def words_of(text, separator=r"[,\s]+"):
    return tuple(filter(None, map(str.strip, re.split(separator, text))))


def networks(text):
    """Parse addresses and networks to ip_network objects."""
    try:
        return tuple(ipaddress.ip_network(word, strict=False) for word in words_of(text))
    except ValueError:
        raise ValueError("expected addresses or networks such as 10.0.0.0/8, ::1") from None


def origins(text):
    """Parse origins, whose hosts may hold `*`; a slash behind them is forgiven."""
    words = tuple(re.sub("(?<=[^/])/$", "", word) for word in words_of(text))
    if not words or not all(re.fullmatch(r"\*|null|[^/]+://[^/]*", word) for word in words):
        raise ValueError("expected origins such as https://app.example, https://*.example, null, or *; no paths")
    return words


def listen_host(text):
    """Parse a name or an address to listen on; what looks like an address must be one."""
    host = re.sub(r"^\[(.*)\]$", r"\1", text)
    if not HOST_TEXT.fullmatch(host) or re.fullmatch(r"[0-9.]+|.*:.*", host) and not ip_of(host):
        raise ValueError("expected an address such as 127.0.0.1, 0.0.0.0 or ::1; the port is PROXY_PORT")
    return host


def log_path(text):
    """Accept a path in a folder that exists."""
    if not os.path.isdir(os.path.dirname(os.path.abspath(text))):
        raise ValueError("its folder does not exist")
    return text


def secret(text):
    """Strip white space around a key; refuse what cannot stand in a header."""
    if TOKEN_TEXT.fullmatch(text.strip()):
        return text.strip()
    raise ValueError("it holds white space, control or non-ASCII characters, which no header can carry")


def tokens(text):
    """Parse `token` or `name:token, name:token` to ((name, token), ...); `off` stays what it is.

    >>> tokens("alice:s3cret, t0ken")
    (('alice', b's3cret'), ('default', b't0ken'))
    """
    if text.strip().lower() == OFF:
        return OFF
    pairs = []
    for word in words_of(text, ","):
        name, colon, token = word.partition(":")
        name, token = (name.strip(), token) if colon else ("default", word)
        if not NAME_TEXT.fullmatch(name):
            raise ValueError("expected token, or name:token, name:token, with names of letters, digits and . _ -")
        if not token:
            raise ValueError("a name has no token behind its colon")
        pairs.append((name, secret(token).encode()))
    if len({token for _, token in pairs}) < max(1, len(pairs)):
        raise ValueError("two names have the same token" if pairs else "expected token, or name:token, name:token")
    return tuple(pairs)


def ip_of(host):
    """The IP address that a text is, or None."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def is_loopback(host):
    """Whether a host name or address can only mean this machine.

    >>> [is_loopback(host) for host in ("localhost", "127.8.9.1", "::1", "0.0.0.0", "gpu")]
    [True, True, True, False, False]
    """
    name = host.lower().rstrip(".")
    return ip.is_loopback if (ip := ip_of(host)) else name == "localhost" or name.endswith(".localhost")


def is_private(host):
    """Whether a host lies on a network of one's own, as far as its name tells."""
    own = (".local", ".localhost", ".internal", ".lan", ".home.arpa")
    return ip.is_private if (ip := ip_of(host)) else "." not in host or host.lower().endswith(own)


class Address(namedtuple("Address", "name scheme host port mount")):
    """Where an upstream is: what the settings say and no request can change. `mount` stands before /api and /v1."""

    __slots__ = ()

    @classmethod
    def parse(cls, text, name=""):
        """Read `name=url` or a bare URL, which is named by its host.

        >>> Address.parse("vllm=http://gpu:8000/v1")
        Address(name='vllm', scheme='http', host='gpu', port=8000, mount='')
        """
        if not name and re.match(r"[^/=:]*=", text):
            name, _, text = text.partition("=")
            name = name.strip() or "="  # which is no name
        text = text.strip()
        if not TOKEN_TEXT.fullmatch(text):
            raise ValueError("expected name=url, name=url, with URLs such as http://127.0.0.1:11434")
        url = urlsplit(text)
        if "@" in url.netloc or "?" in text or "#" in text:
            raise ValueError("a URL here has no user, password, query or fragment; a key has a variable of its own")
        if url.scheme not in ("http", "https") or not HOST_TEXT.fullmatch(url.hostname or ""):
            raise ValueError("expected a URL that starts with http:// or https:// and names a host; "
                             "several are name=url, name=url")
        try:
            port = url.port if url.port is not None else (443 if url.scheme == "https" else 80)
        except ValueError:
            port = 0
        if not port or url.netloc.endswith(":"):
            raise ValueError("the URL's port is not one")
        if url.scheme == "http" and re.fullmatch(r"(.*\.)?ollama\.com\.?", url.hostname):
            raise ValueError("http://ollama.com would carry the key in clear; write https://ollama.com")
        name = name or url.hostname.replace(":", "-").strip("-")
        if not NAME_TEXT.fullmatch(name):
            raise ValueError("an upstream's name has letters, digits and . _ - only")
        mount = mount_path(re.sub(r"/+(?:api|v1)/*$", "", url.path))
        return cls(name, url.scheme, url.hostname, port, mount)

    @property
    def netloc(self):
        """The host as a Host header says it, with its port unless that is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.scheme == "https" else 80) else f"{host}:{self.port}"

    @property
    def is_ollama_com(self):
        return self.host.rstrip(".") == "ollama.com"

    @property
    def is_cloud(self):
        return self.name == "cloud" or self.is_ollama_com

    @property
    def needs_proxy(self):
        """Whether HTTPS_PROXY is for it: a key in clear over an HTTP_PROXY is never sent."""
        return self.scheme == "https" and not is_loopback(self.host) and not urllib.request.proxy_bypass(self.host)

    @property
    def key_name(self):
        return "PROXY_KEY_" + re.sub(r"[^A-Z0-9]", "_", self.name.upper())

    def __str__(self):
        return f"{self.scheme}://{self.netloc}{self.mount}"


def upstreams(text):
    """Parse `name=url, name=url|url` to (Address, ...); the copies of one upstream have its name.

    >>> [f"{a.name} {a}" for a in upstreams("gpu=http://a:1|http://b:1, https://c")]
    ['gpu http://a:1', 'gpu http://b:1', 'c https://c']
    """
    found = []
    for word in words_of(text, ","):
        first, *copies = word.split("|")
        address = Address.parse(first)
        if any(address.key_name == other.key_name for other in found):
            raise ValueError(f"two upstreams are called {address.name}, or share {address.key_name}: write name=url, "
                             "with names that differ in letters or digits; copies of one are name=url|url")
        found += [address, *(Address.parse(copy, address.name) for copy in copies)]
    if not found or len(set(found)) < len(found):
        raise ValueError("expected name=url, name=url, and no copy twice")
    return tuple(found)


def model_key(name):
    """What the names of one model have in common: `name` and `name:latest` are the same."""
    name = name.strip()
    return name[:-7] if name[-7:].lower() == ":latest" else name


SOURCE = re.compile(r"(.+?)(?::(cloud|local)|(:[^:/]*)-cloud)", re.I | re.S)


@remembered
def split_source(name):
    """Split a model's name into (its name without where it is, "cloud", "local" or ""); raises Refused.

    By the rule of Ollama's parseSourceSuffix: `:cloud`, or `-cloud` behind a tag, means Ollama Cloud.

    >>> [split_source(name) for name in ("gpt-oss:120b-cloud", "glm-4.6:Cloud", "x:local", "my-cloud", "h:1/x-cloud")]
    [('gpt-oss:120b', 'cloud'), ('glm-4.6', 'cloud'), ('x', 'local'), ('my-cloud', ''), ('h:1/x-cloud', '')]
    """
    match = SOURCE.fullmatch(name.strip())
    if not match:
        return name, ""
    bare = match[1] + (match[3] or "")
    if SOURCE.fullmatch(bare):
        raise Refused(f"the model {printable(name)} says twice where it is: use either :local or :cloud, not both")
    return bare, (match[2] or "cloud").lower()


def model(text):
    """Accept the name of a model."""
    if re.search(r"[\s,=]", text):
        raise ValueError(f"{text!r} is no model's name: between chains, or aliases, stands a ;")
    try:
        split_source(text)
    except Refused as error:
        raise ValueError(str(error)) from None
    return text


def aliases(text):
    """Parse `alias=model; alias=model` to {alias: model}.

    >>> aliases("code = qwen3-coder:480b-cloud; chat=gpt-oss:120b-cloud")
    {'code': 'qwen3-coder:480b-cloud', 'chat': 'gpt-oss:120b-cloud'}
    """
    pairs = [tuple(map(str.strip, word.partition("=")[::2])) for word in words_of(text, "[;\n]")]
    found = {model_key(model(alias)): model(name) for alias, name in pairs}
    if len(found) < len(pairs) or "*" in found or not all(map(all, pairs)):
        raise ValueError("expected alias=model; alias=model, each alias once")
    for name in found.values():
        if model_key(name) in found:
            raise ValueError(f"{name} is an alias itself: name the model that it stands for")
    return found


def fallbacks(text):
    """Parse `model -> model -> model; * -> model` to {model: (model, ...)}.

    >>> fallbacks("a:latest -> b > c; * \u2192 z")
    {'a': ('b', 'c'), '*': ('z',)}
    """
    chains = [tuple(map(str.strip, re.split("->|>|\u2192", chain))) for chain in words_of(text, "[;\n]")]
    found = {model_key(model(first)): tuple(map(model, rest)) for first, *rest in chains}
    if len(found) < len(chains) or not all(rest and "*" not in rest for rest in found.values()) or not all(
            map(all, chains)):
        raise ValueError("expected model -> model -> model; * -> model, one chain a model")
    return found


def slots(text):
    """Parse `name=number, name=number` to {name: number}."""
    pairs = [re.fullmatch(r"([A-Za-z0-9._-]+)\s*=\s*([1-9][0-9]{0,5})", word) for word in words_of(text, ",")]
    found = {pair[1]: int(pair[2]) for pair in pairs if pair}
    if len(found) < len(pairs):
        raise ValueError("expected name=number, name=number, each upstream once, the number from 1 to 999999")
    return found


Setting = namedtuple("Setting", "field name default parse help aliases secret", defaults=((), False))

SETTINGS = (
    Setting("api_key", "OLLAMA_API_KEY", "", secret, "key of the upstream called `cloud`, and of any on the host "
            "ollama.com", ("OLLAMA_CLOUD_API_KEY",), True),
    Setting("auth_token", "PROXY_AUTH_TOKEN", "", tokens, "what clients must present: `token`, or `name:token, "
            "name:token`; `off` opens the proxy to whoever reaches it", ("AUTH_TOKEN", "AIG_AUTH_TOKEN"), True),
    Setting("host", "PROXY_HOST", "127.0.0.1", listen_host, "where to listen"),
    Setting("port", "PROXY_PORT", "11434", parser(r"[0-9]{1,5}", "a port from 0 to 65535", int, 0, 65535),
            "port to listen on; 0 picks a free one", ("PORT",)),
    Setting("upstreams", "PROXY_UPSTREAMS", "cloud=https://ollama.com", upstreams, "whom to ask, in order of "
            "preference: `name=url, name=url`; copies of one are `name=url|url`, and a bare URL is named by its host",
            ("OLLAMA_CLOUD_BASE_URL", "OLLAMA_ORIGIN")),
    Setting("keys", "PROXY_KEY_<NAME>", "", secret, "bearer key of the upstream called name", (), True),
    Setting("prefix", "PROXY_PREFIX", "", prefix, "mount path to strip, e.g. `/api/ollama-proxy`"),
    Setting("origins", "PROXY_ORIGINS", "", origins, "browser origins allowed beside loopback and app ones, `*` for "
            "all; unset, with tokens: all", ("OLLAMA_ORIGINS",)),
    Setting("aliases", "PROXY_ALIASES", "", aliases, "names of one's own for models: "
            "`code=qwen3-coder:480b-cloud; chat=gpt-oss:120b-cloud`"),
    Setting("fallbacks", "PROXY_FALLBACKS", "", fallbacks, "what to try when a model cannot be had: `a -> b -> c; "
            "d -> e`; `* -> z` is for models without a chain of their own"),
    Setting("slots", "PROXY_SLOTS", "", slots, "requests in flight per upstream, or copy of one: `cloud=3, local=4`; "
            "the rest go on to a fallback, or queue"),
    Setting("queue_timeout", "PROXY_QUEUE_TIMEOUT", "120", seconds, "seconds a request may wait for a slot"),
    Setting("manage", "PROXY_MANAGE", OFF, switch, "`on` lets clients pull, push, create, copy, delete and upload "
            "models, and use the owner's account"),
    Setting("client_timeout", "PROXY_CLIENT_TIMEOUT", "15", seconds, "seconds a client has for the head of its "
            "request, or for 4 KiB more of its body; an idle kept connection, and a client that takes nothing of its "
            "answer, have four times as long"),
    Setting("connect_timeout", "PROXY_CONNECT_TIMEOUT", "10", seconds, "seconds to connect and shake hands"),
    Setting("read_timeout", "PROXY_READ_TIMEOUT", "900", seconds_or_zero, "seconds an upstream may be silent; 0 is for "
            "ever"),
    Setting("max_connections", "PROXY_MAX_CONNECTIONS", "1024",
            parser(r"[0-9]{1,6}", "a whole number from 1 to 999999", int, 1),
            "clients at once; one more gets 503 and `Retry-After`"),
    Setting("max_body", "PROXY_MAX_BODY", "64M", size, "largest body held in memory to read its model name; "
            "larger 413; others, such as blobs, stream, unlimited"),
    Setting("public_models", "PROXY_PUBLIC_MODELS", OFF, switch, "`on` answers model lists (`/api/tags`, `/v1/models`, "
            "`/api/show`) without a token, for clients that look before they log in"),
    Setting("trusted", "PROXY_TRUSTED", "", networks, "addresses or networks (`10.0.0.0/8, ::1`) of load balancers "
            "whose `X-Forwarded-For` is believed"),
    Setting("log", "PROXY_LOG", "", log_path, "file to log to; unset is stderr"),
    Setting("log_format", "PROXY_LOG_FORMAT", "auto", parser("(?i)auto|text|json", "auto, text or json", str.lower),
            "`text` (a terminal's default) or `json` (everything else's)"),
    Setting("drain", "PROXY_DRAIN", "30", seconds_or_zero, "seconds that streams may run on after SIGTERM"),
    Setting("env_file", "PROXY_ENV_FILE", ".env", str, "file of `KEY=VALUE` lines, read where the environment is "
            "silent"),
)


class Settings:
    """What an operator can set, an attribute each; read once, then passed around, never global, never changed.

    `given` is the text of those that were set, by name. Times are seconds, sizes bytes.
    """

    def __init__(self):
        for setting in SETTINGS:
            setattr(self, setting.field, setting.parse(setting.default) if setting.default else "")
        self.aliases, self.fallbacks, self.chains, self.slots, self.keys, self.given = {}, {}, {}, {}, {}, {}

    @classmethod
    def load(cls, environ):
        """Read the environment, the .env file and credential files; name every bad value at once.

        Returns (settings, warnings). Raises SettingsError.
        """
        sources, settings = Sources(environ), cls()
        for setting in SETTINGS:
            sources.give(settings, vars(settings), setting.field, setting, setting.name, *setting.aliases)
        for name, key_name in {address.name: address.key_name for address in settings.upstreams}.items():
            sources.give(settings, settings.keys, name, SETTINGS[0], key_name)
        settings.chains = {model_key(settings.meant(first)): [*map(settings.meant, rest)]
                           for first, rest in settings.fallbacks.items()}
        settings.judge(sources.problems)
        return settings, [*sources.strangers(settings), *settings.doubts()]

    def key(self, address):
        """The bearer key for an upstream, or an empty value."""
        return self.keys.get(address.name) or (self.api_key if address.is_cloud else "")

    def meant(self, name):
        """The model that a name stands for, which is most often itself."""
        return self.aliases.get(model_key(name), name) if self.aliases else name

    def chain(self, name):
        """What to try for a model, in order: itself, and then its fallbacks."""
        return [name, *self.chains.get(model_key(name), self.chains.get("*", ()))]

    def judge(self, problems=()):
        """Raise SettingsError if there are problems, or values that are each fine, but not together."""
        said = " ".join(problem.partition(":")[0] for problem in problems)
        problems = [*problems, *(words for causes, words in self._contradictions() if not re.search(causes, said))]
        if problems:
            raise SettingsError("\n".join(problems))

    def _contradictions(self):
        """Yield (pattern of the settings that a bad value of which may be the cause, words)."""
        if any(address.is_ollama_com and not self.key(address) for address in self.upstreams):
            yield r"KEY|UPSTREAMS|_URL|OLLAMA_ORIGIN\b", (
                "OLLAMA_API_KEY is not set: make a key at https://ollama.com/settings/keys and set it, or name another "
                "server in PROXY_UPSTREAMS; `ollama_proxy.py demo` runs without a key")
        proxy = urllib.request.getproxies_environment().get("https", "")
        if not HTTP_PROXY.fullmatch(proxy) and any(address.needs_proxy for address in self.upstreams):
            yield "HTTPS_PROXY", "HTTPS_PROXY is not the URL of an HTTP proxy, such as http://proxy.example:3128"
        for address in self.upstreams:
            here = address.host == self.host or is_loopback(address.host) and (
                address.host == "localhost" and is_loopback(self.host) or self.host in ("0.0.0.0", "::"))
            if here and address.port == self.port:
                yield "PORT|HOST", f"the upstream {address.name} ({address}) is this proxy: set another PROXY_PORT"
        for first, rest in self.chains.items():
            if len({first, *map(model_key, rest)}) <= len(rest):
                yield "FALLBACKS|ALIASES", f"PROXY_FALLBACKS: the chain of {first} has one model twice"
        if len(self.chains) < len(self.fallbacks):
            yield "FALLBACKS|ALIASES", "PROXY_FALLBACKS: two chains are for one model, once by its alias"
        for name in sorted(self.slots.keys() - {address.name for address in self.upstreams}):
            yield "SLOTS|UPSTREAMS|_URL|OLLAMA_ORIGIN", (
                f"PROXY_SLOTS: no upstream is called {name}; there is "
                + ", ".join(dict.fromkeys(address.name for address in self.upstreams)))
        if not self.auth_token and not is_loopback(self.host):
            yield "AUTH_TOKEN", (
                f"PROXY_HOST={self.host} lets other machines in, and PROXY_AUTH_TOKEN is not set: set it to a token "
                "that clients must present, or to off if whoever reaches the proxy may spend the key")

    def doubts(self):
        """Yield warnings about values that are obeyed all the same."""
        for address in self.upstreams:
            if self.key(address) and address.scheme == "http" and not is_private(address.host):
                yield f"the key of {address.name} travels in clear to {address}: use https"
        if self.api_key and not any(address.is_cloud for address in self.upstreams):
            yield "OLLAMA_API_KEY is of no use: no upstream is called cloud or on ollama.com; see PROXY_KEY_<NAME>"

    @property
    def purpose(self):
        """Who may ask, and who is asked, in words."""
        audience = ("whoever reaches it" if self.auth_token == OFF else "whoever has a token" if self.auth_token else
                    "this machine only, without a token")
        return f"for {audience}, and asks " + ", ".join(f"{address.name} ({address})" for address in self.upstreams)

    def shown(self):
        """Yield (name, text) of every setting, with secrets masked."""
        names = {setting.name: setting for setting in SETTINGS}
        for name in [*names, *(name for name in self.given if name not in names)]:
            hidden = (name not in names or names[name].secret) and self.given.get(name, OFF).lower() != OFF
            yield name, "***" if hidden else self.given.get(name) or names[name].default


class Sources:
    """Where settings come from, in order: the environment, the .env file, systemd's credentials."""

    def __init__(self, environ):
        self.problems = []
        self.maps = [environ]
        named = environ.get("PROXY_ENV_FILE", "").strip()
        if named or os.path.exists(".env"):
            values, bad = parse_env(self._read(named or ".env", "PROXY_ENV_FILE"))
            self.problems += [f"{named or '.env'}, line {number}: expected KEY=VALUE" for number in bad]
            if "PROXY_ENV_FILE" in values:
                self.problems.append(f"{named or '.env'}: PROXY_ENV_FILE counts in the environment only")
            self.maps.append(values)
        self.credentials = environ.get("CREDENTIALS_DIRECTORY", "")

    def find(self, names, secret):
        """Return (name, text) of the first name that has a value; an empty one is none."""
        for source in self.maps:
            for name in names:
                if source.get(name, "").strip():  # Docker's --env-file leaves quotes around a value
                    return name, re.sub(r"""^(["'])(.*)\1$""", r"\2", source[name].strip())
                if secret and source.get(name + "_FILE", "").strip():
                    return name + "_FILE", self._read(source[name + "_FILE"].strip(), name + "_FILE")
        for name in names if secret and self.credentials else ():
            path = os.path.join(self.credentials, name)
            if os.path.exists(path):
                return f"credential {name}", self._read(path, f"credential {name}")
        return names[0], ""

    def give(self, settings, values, key, setting, *names):
        """Put the value that one of the names has among the values, or its error among the problems."""
        name, text = self.find(names, setting.secret)
        if text:
            settings.given[names[0]] = text
            called = {"OLLAMA_CLOUD_BASE_URL": "cloud", "OLLAMA_ORIGIN": "origin"}.get(name)
            try:
                values[key] = (Address.parse(text, called),) if called else setting.parse(text)
            except ValueError as error:
                shown = "" if setting.secret or re.search("[@?]", text) else f"={text[:80]!r}"
                self.problems.append(f"{name}{shown}: {error}")

    def strangers(self, settings):
        """Return warnings about PROXY_ variables that nothing here reads."""
        known = {name for setting in SETTINGS for name in (setting.name,) + setting.aliases}
        secrets = {name for setting in SETTINGS if setting.secret for name in (setting.name,) + setting.aliases}
        secrets |= {address.key_name for address in settings.upstreams}
        known |= secrets | {name + "_FILE" for name in secrets}
        found = []
        for name in sorted({name for source in self.maps for name in source if name.startswith("PROXY_")} - known):
            from difflib import get_close_matches  # rarely needed, and slow to load

            found.append(f"{name} is of no use: no upstream has that name" if name.startswith("PROXY_KEY_") else
                         f"{name} is not a setting; the nearest is {get_close_matches(name, known, 1, 0)[0]}")
        return found

    def _read(self, path, name):
        try:
            with open(path, encoding="utf-8-sig") as file:
                text = file.read().strip()
        except (OSError, ValueError) as error:
            self.problems.append(f"{name}: cannot read {path}: {getattr(error, 'strerror', 'it is not UTF-8')}")
            return ""
        if not text and name != "PROXY_ENV_FILE":
            self.problems.append(f"{name}: {path} is empty")
        return text


def parse_env(text):
    """Parse the lines of a .env file to ({name: value}, [numbers of bad lines]); nothing is interpolated.

    >>> parse_env('export A=1 # one\\nB="two # 2"\\n\\n# C=3\\nD')
    ({'A': '1', 'B': 'two # 2'}, [5])
    """
    values, bad = {}, []
    for number, line in enumerate(text.splitlines(), 1):
        line = re.sub(r"^([^=\"']*)=\s+#.*", r"\1=", line.strip())
        match = ENV_LINE.fullmatch(line)
        if match and not re.match(r"""(["'])((?!\1).)*$""", match[4] or ""):  # a quote that is never closed
            values[match[1]] = match[2] or match[3] or match[4] or ""
        elif line and line[0] != "#":
            bad.append(number)
    return values, bad


# ---- Heads and paths --------------------------------------------------------
#
# Everything here is pure. http.server and http.client accept heads that smuggle
# requests; what this section cannot parse exactly is never passed on.

HEAD_LIMIT, LINES_LIMIT = 64 * 1024, 200
TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
REQUEST_LINE = re.compile(rf"({TOKEN}) ([\x21-\x7e\x80-\xff]+) HTTP/([0-9])\.([0-9])")
STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-9][0-9]{2})(?: ([^\x00\r\n]*))?")
FIELD_LINE = re.compile(rf"({TOKEN}):[ \t]*([^\x00\r\n]*)".encode())
HOST_FIELD = re.compile(r"[A-Za-z0-9._~!$&'()*+;=%:\[\]-]*")
LENGTH = re.compile(r"[0-9]{1,18}", re.ASCII)
CRLF = b"\r\n"

CHUNKED, UNTIL_CLOSE = -1, -2  # sizes of a body that does not say how long it is


class Head:
    """A message's head: its start line, and its fields as they came, in order and with repeats.

    `fields` are (lower-case name, value, line); `version` is HTTP/1.x's x; `size` is the length that the head
    declares for the body, CHUNKED, or None; `keeps`, whether the sender will use the connection again. Of a request
    `method` and `target` are set, of an answer `status` and `reason`.
    """

    __slots__ = ("method", "target", "version", "status", "reason", "fields", "size", "keeps", "_last")

    def __init__(self, lines, version=1):
        if len(lines) > LINES_LIMIT:
            raise Malformed(f"there are more than {LINES_LIMIT} header lines", 431)
        self.version = version
        self.fields = [field_of(line) for line in lines]
        self._last = {name: value for name, value, _ in self.fields}
        self.size = self._size()
        words = self.tokens("connection")
        self.keeps = "close" not in words if version else "keep-alive" in words

    def all(self, name):
        """The values of a header, by its lower-case name."""
        return [value for known, value, _ in self.fields if known == name] if name in self._last else ()

    def joined(self, name):
        """The values of a header that is a list, over all of its lines."""
        return ", ".join(self.all(name))

    def get(self, name, default=""):
        """The value of a header that is there once, by its lower-case name."""
        return self._last.get(name, default)

    def tokens(self, name):
        """The lower-case words of a header that is a list, over all of its lines."""
        return frozenset(map(str.strip, self.joined(name).lower().split(","))) if name in self._last else frozenset()

    def _size(self):
        """See RFC 9112, section 6."""
        lengths, codings = self.all("content-length"), self.all("transfer-encoding")
        if codings:
            if lengths or not self.version:
                raise Malformed("Transfer-Encoding with Content-Length, or in HTTP/1.0: the end is unclear")
            if len(codings) > 1 or codings[0].lower() != "chunked":
                raise Malformed("the only Transfer-Encoding understood here is one chunked", 501)
            return CHUNKED
        if not lengths:
            return None
        if not LENGTH.fullmatch(lengths[0]) or len(set(lengths)) > 1:
            raise Malformed("Content-Length is not one decimal number")
        return int(lengths[0])


def field_of(line):
    """Parse a header line to (lower-case name, value, line to send on).

    >>> field_of(b"X-A:  1 ")
    ('x-a', '1', 'X-A: 1\\r\\n')
    """
    match = FIELD_LINE.fullmatch(line)
    if not match:
        raise Malformed("a header line is malformed: a bad name, a folded line, a bare CR or LF, or a NUL")
    name, value = match[1].decode(), match[2].decode("latin-1").rstrip(" \t")
    return name.lower(), value, f"{name}: {value}\r\n"


@remembered
def parse_request(block):
    """Parse a request's head, its lines with their CRLFs and without the empty one.

    >>> head = parse_request(b"GET /api/tags HTTP/1.1\\r\\nHost: x\\r\\n")
    >>> head.method, head.target, head.version, head.get("host")
    ('GET', '/api/tags', 1, 'x')
    """
    if block[:2] == b"\r\n":  # RFC 9112, section 2.2: one empty line before it is forgiven
        block = block[2:]
    line, *lines = block[:-2].split(b"\r\n")
    match = REQUEST_LINE.fullmatch(line.decode("latin-1"))
    if not match:
        raise Malformed("the request line is not METHOD /path HTTP/1.1")
    method, target, major, minor = match.groups()
    if major != "1":
        raise Malformed("the versions of HTTP spoken here are 1.0 and 1.1", 505)
    head = Head(lines, min(int(minor), 1))
    head.method, head.target = method, target
    hosts = head.all("host")
    if len(hosts) > 1 or head.version and not hosts or not HOST_FIELD.fullmatch(head.get("host")):
        raise Malformed("a request has one Host header, and in it one host")
    if len(head.all("authorization")) > 1 or len(head.all("origin")) > 1:
        raise Malformed("two Authorization or Origin headers: which one counts is unclear")
    return head


@remembered
def parse_answer(block):
    """Parse an answer's head; raises Malformed.

    >>> head = parse_answer(b"HTTP/1.1 200 OK\\r\\nX: 1\\r\\n")
    >>> head.status, head.reason, head.version
    (200, 'OK', 1)
    """
    line, *lines = block[:-2].split(b"\r\n")
    match = STATUS_LINE.fullmatch(line.decode("latin-1"))
    if not match:
        raise Malformed("the status line is not HTTP/1.1 200 OK")
    head = Head(lines, int(match[1]))
    head.status, head.reason = int(match[2]), match[3] or ""
    return head


def answer_size(head, method):
    """How long the body of an answer is: a number, CHUNKED or UNTIL_CLOSE (RFC 9112, section 6.3)."""
    if method == "HEAD" or head.status in (204, 304):
        return 0
    return UNTIL_CLOSE if head.size is None else head.size


# RFC 9110, section 7.6.1: these speak of one connection and go no further.
HOP_BY_HOP = frozenset("connection keep-alive proxy-authenticate proxy-authentication-info proxy-authorization "
                       "proxy-connection te trailer transfer-encoding upgrade http2-settings".split())
# A client's secrets, what a browser says of its page (Ollama answers foreign origins with 403), and what is set anew.
NOT_SENT_UP = HOP_BY_HOP | frozenset(
    "authorization x-api-key api-key x-goog-api-key cf-aig-authorization cookie cookie2 origin referer host "
    "content-length expect forwarded x-real-ip x-forwarded-for x-forwarded-proto x-forwarded-host "
    "x-request-id".split())
# What an upstream says to browsers about its own host, and what is set anew.
NOT_SENT_DOWN = HOP_BY_HOP | frozenset(
    "content-length set-cookie set-cookie2 alt-svc strict-transport-security x-request-id x-proxy-upstream "
    "x-proxy-model x-proxy-attempts x-accel-buffering".split())


@remembered
def fields_up(head, identity):
    """The lines of a request's end-to-end headers; with `identity`, an answer without compression is asked for."""
    barred = NOT_SENT_UP | head.tokens("connection") | ({"accept-encoding"} if identity else set())
    lines = [line for name, _, line in head.fields if name not in barred]
    return "".join(lines) + ("Accept-Encoding: identity\r\n" if identity else "")


@remembered
def fields_down(head, key):
    """The lines of an answer's headers that are the client's business, without the key should an upstream echo it."""
    barred = NOT_SENT_DOWN | head.tokens("connection")
    return "".join([line.replace(key, "***") if key else line for name, _, line in head.fields
                    if name not in barred and not name.startswith("access-control-")])


NATIVE = frozenset("generate chat tags show ps pull push create copy delete embed version me blobs "
                   "web_search web_fetch".split())
OPENAI = frozenset("completions models responses messages".split())
INFERENCE = frozenset("/api/generate /api/chat /api/embed /api/embeddings /embeddings /v1/chat/completions "
                      "/v1/completions /v1/responses /v1/embeddings /v1/messages".split())
NAMING = frozenset(["/api/show", "/api/pull", "/api/push", "/api/delete"])  # their bodies say model, or else name
MANAGEMENT = re.compile(r"/api/+(?:pull|push|create|copy|delete|blobs|signout|user/+keys|usage|balance)(?![^/])")
LISTS = frozenset(["GET /api/tags", "HEAD /api/tags", "GET /v1/models", "HEAD /v1/models", "POST /api/show"])
OWN_ALIASES = {"/healthz": "/-/health", "/readyz": "/-/ready", "/metrics": "/-/metrics"}
AUTHORITY = re.compile(r"https?://[^/?#@]+(?=[/?#]|\Z)", re.I)
LAST_PREFIX = re.compile(r"(?:/+(?:api|v1)(?=/|$))*/+(api|v1)(?:/+|$)")
TOKEN_SEGMENT = re.compile(r"(?:/(?:t|%74)(?=/))+/+([^/]+)", re.I)
DOT_SEGMENT = re.compile(r"(?:^|/)\.\.?(?:;[^/]*)?(?:/|$)")


class Target(namedtuple("Target", "path query token shown is_own manages")):
    """What a request asks for, once its path is repaired.

    `path` as it goes upstream, but for the upstream's mount; `query` with its question mark; `token` of
    /t/TOKEN/... as bytes, or None; `shown`, the path as the client said it, fit for a log; whether it `is_own`, a page
    of the proxy, or `manages` models or the owner's account.
    """

    __slots__ = ()


@remembered
def parse_target(target, prefix=""):
    """Repair what clients make of a base URL; percent-escapes and the query stay as they came.

    >>> [parse_target(t).path for t in ("/chat", "/v1/v1/models", "//api/tags", "/chat/completions", "/rerank")]
    ['/api/chat', '/v1/models', '/api/tags', '/v1/chat/completions', '/rerank']
    >>> parse_target("/t/s3cret/api/chat?x=%2F")
    Target(path='/api/chat', query='?x=%2F', token=b's3cret', shown='/t/***/api/chat', is_own=False, manages=False)
    """
    whole = target
    if AUTHORITY.match(target):  # absolute-form: whatever host it names, it came to us
        target = AUTHORITY.sub("", target, count=1)
        target = target if target[:1] == "/" else "/" + target
    if target[:1] != "/":
        raise Malformed(f"the request's target must be a path, not {whole[:80]!r}")
    path, mark, query = target.partition("?")
    path, token, shown = strip_mounts(path, prefix)
    path = repair(path)
    spelt = unquote(path, "latin-1").replace("\\", "/")
    if DOT_SEGMENT.search(spelt):
        raise Refused("a path here has no . or .. segments")
    return Target(path, mark + query, token, shown, path in ("/", "/-") or path.startswith("/-/"),
                  bool(MANAGEMENT.search(re.sub(r";[^/]*|[\0- ]", "", unquote(spelt).lower()))))


def decoded(path):
    """A part of a path as people read it: percent-escapes and raw bytes are UTF-8."""
    return unquote_to_bytes(path.encode("latin-1")).decode("utf-8", "replace")


def strip_mounts(path, prefix):
    """Take PROXY_PREFIX and /t/TOKEN, in either order, off a path: (path, token or None, path fit for a log)."""
    token, shown = None, path[:500]
    for match in TOKEN_SEGMENT.finditer(shown):
        shown = shown.replace("/" + match[1], "/***")
    for _ in range(2):  # a base URL may have been set twice
        if prefix and (path + "/").startswith(prefix + "/"):
            path = path[len(prefix):] or "/"
        match = re.match(r"/+t/+([^/]+)", path)
        if match:
            token = token or unquote_to_bytes(match[1].encode("latin-1"))
            path = path[match.end():] or "/"
    return path, token, shown


def repair(path):
    """Put a path under /api or /v1 where it belongs there; of several such prefixes the last wins."""
    match = LAST_PREFIX.match(path)
    if match:
        rest = path[match.end():].rstrip("/")
        return f"/{match[1]}/{rest}" if rest else f"/{match[1]}"
    bare = path.strip("/")
    if bare in ("", "-", "embeddings") or bare.startswith("-/"):
        return "/" + bare
    first = bare.partition("/")[0]
    if bare == "chat/completions" or first in OPENAI:
        return "/v1/" + bare
    if bare in NATIVE or first == "blobs":
        return "/api/" + bare
    return OWN_ALIASES.get("/" + bare, path)


ANTHROPIC_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
                   404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
                   503: "overloaded_error", 504: "timeout_error"}
OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}


def error_body(path, status, words, request_id):
    """Say an error of the proxy's own in the dialect of the (repaired) path.

    >>> error_body("/api/chat", 502, "gone", "r1")
    b'{"error": "gone"}'
    """
    if (path + "/").startswith("/v1/messages/"):
        kind = ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
        error = {"type": "error", "error": {"type": kind, "message": words}, "request_id": request_id}
    elif (path + "/").startswith("/v1/"):
        kind = OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
        error = {"error": {"message": words, "type": kind, "param": None, "code": None}}
    else:
        error = {"error": words}
    return json.dumps(error).encode()


def head_bytes(first_line, lines):
    return f"{first_line}{lines}\r\n".encode("latin-1")


# ---- Bodies -----------------------------------------------------------------
#
# Where a body ends, whatever pieces it comes in, and the little that is read of
# one: the model that a request names, the tokens that an answer counts.

CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;[\t\x20-\x7e\x80-\xff]{0,4000})?")
CHUNK_LINE_LIMIT, TRAILER_LIMIT = 4096, 8192
KNOWN_LINES = {}  # size lines of chunks below 4 KiB, in the usual spelling and between two CRLFs -> size


@lru_cache(maxsize=64)
def chunks_like(line, size):
    """A pattern of any number of chunks with this size line."""
    return re.compile(b"(?:%b.{%d})*" % (line, size), re.S)


class Decoder:
    """Follows one body through whatever pieces it comes in.

    `size` is its length, CHUNKED or UNTIL_CLOSE. When `done`, `rest` is what came behind it.
    """

    __slots__ = ("size", "done", "rest", "error", "_left", "_line", "_width", "_trailer")

    def __init__(self, size):
        self.size, self.done, self.rest, self.error = size, size == 0, b"", None
        self._left = size if size > 0 else 0  # of the body, or of the chunk that is being read
        self._line = CRLF  # an unfinished size line: the CRLF that ends a chunk is read as part of the next line
        self._width, self._trailer = 6, False  # of the last size line, both of its CRLFs included

    def feed(self, data):
        """Return the payload among these bytes; raises Malformed."""
        if self.size == CHUNKED:
            pieces = []
            self.follow(data, pieces.append)
            if self.error:
                raise self.error
            return b"".join(pieces)
        if self.size == UNTIL_CLOSE:
            return data
        payload = data[:self._left]
        self._left -= len(payload)
        if not self._left:
            self.done, self.rest = True, data[len(payload):]
        return payload

    def follow(self, data, take=None):
        """Follow chunks without decoding them; `take` is called with each piece of payload.

        Returns (how much payload these bytes hold, the bytes to pass on). A size line is held back until it is whole,
        while the CRLF before it is passed on: `_line` keeps both. Trailers stop here. What is malformed is not passed
        on, and stands in `error`; only a malformed trailer is raised.
        """
        at, before, line = self._left, 0, b""
        if self._trailer:
            self._end(self._line + data)
            return 0, b""
        if not at:
            came, data = data, self._line + data
            size = KNOWN_LINES.get(data[:self._width])
            if size and len(data) == self._width + size + 2 and data[-2:] == CRLF and self._line == CRLF and not take:
                return size, came  # nearly always: what has come is one whole chunk
            before = 2 if self._line[:2] == CRLF else 0  # of an unfinished size line, the CRLF has gone already
        elif take:
            take(data[:at])
        whole = min(at, len(data))
        while at <= len(data):
            last, line = line, data[at:at + self._width]
            size = KNOWN_LINES.get(line)
            if not size:  # a line of another width, a new one, the last one, or none yet
                try:
                    line, size = self._next_line(data, at)
                except Malformed as error:
                    line, self.error = b"", error
                if not size:
                    return whole, data[before:at + len(line)]
            elif line == last and not take:  # a model's chunks are often as long as each other
                end = chunks_like(line, size).match(data, at).end()
                whole += (end - at) // (len(line) + size) * size
                at, line = end, b""
                continue
            at += len(line)
            if take and at < len(data):
                take(data[at:at + size])
            whole += min(size, len(data) - at)
            at += size
        self._left = at - len(data)
        return whole, data[before:]

    def _next_line(self, data, at):
        """Read a size line: (what of it can be passed on, the size); the size is 0 where the body ends, or data."""
        end = data.find(CRLF, at + 2)
        if end < 0 or not data.startswith(CRLF, at):
            self._keep_line(data[at:])
            return CRLF if data.startswith(CRLF, at) else b"", 0
        match = CHUNK_LINE.fullmatch(data, at + 2, end)
        if not match:
            raise Malformed("a chunk's size line is malformed")
        line, size = data[at:end + 2], int(match[1], 16)
        self._width = len(line)
        if not size:
            self._trailer, self._left = True, 0
            self._end(data[end:])
        elif size < 4096 and line == b"\r\n%x\r\n" % size:
            KNOWN_LINES[line] = size
        return line, size

    def _keep_line(self, line):
        """Remember the part of a size line that has come, unless it cannot become one any more."""
        bad_start = line[:2] != CRLF[:len(line)] or line[2:3].strip(b"0123456789abcdefABCDEF")
        if bad_start or b"\n" in line[2:] or len(line) > CHUNK_LINE_LIMIT:
            raise Malformed("a chunk is not followed by a size line")
        self._left, self._line = 0, line

    def _end(self, data):
        """Read trailers, which are dropped, up to the empty line. `data` starts with the last size line's CRLF."""
        end = data.find(b"\r\n\r\n")
        if end > TRAILER_LIMIT or end < 0 and len(data) > TRAILER_LIMIT:
            raise Malformed("the trailers are too long")
        self._line = data
        if end >= 0:
            if end:
                Head(data[2:end].split(CRLF))
            self.done, self.rest = True, data[end + 4:]


def as_chunk(payload):
    return b"%x\r\n%b\r\n" % (len(payload), payload)


STRUCTURE = re.compile(rb'["{}\[\]]')
# Bounded, since the matcher takes memory for each repetition, and holds up all threads while it runs.
STRING_PART = re.compile(rb'[^"\\]{0,100000}(?:\\.[^"\\]{0,1000}){0,500}', re.S)
MODEL_FIRST = re.compile(rb'\s*\{\s*"model"\s*:\s*"([ !#-\[\]-~]{0,500})"')
ESCAPED_MODEL = re.compile(rb"\\u006[45c-fC-F]")  # a letter of the key, as nobody but an attacker writes it
BLANK_END = re.compile(rb"[ \t\r\n]*\Z")
COLON = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*")
NAME_LIMIT = 2000  # bytes of a model's name; a longer one is none
PATIENCE = 500_000  # brackets and strings that are looked at: more, and no name is found


def members(body, keys, at=0):
    """Return {key: (begin, end)} of those of a JSON object's own members; of what is no string it is (0, 0).

    Reads no further than it must: no number, no nesting limit, no copy of a long prompt. What is not JSON
    has no members. `at` is where to begin, if not at its start: at one of its own keys.

    >>> members(b'{"model": "a", "messages": [{"model": "b"}], "n": 1}', ("model", "messages"))
    {'model': (10, 13), 'messages': (0, 0)}
    """
    found, depth, key = {}, 1 if at else 0, None
    if not re.match(rb"[ \t\r\n]*\{", body):
        return {}
    for _ in range(PATIENCE):
        token = STRUCTURE.search(body, at)
        if not token:
            return {}
        begin, at, mark = token.start(), token.end(), token.group()
        if mark == b'"':
            at = string_end(body, at)
            if not at:
                return {}
            colon = COLON.match(body, at) if depth == 1 else None
            if colon:
                key, at = json_string(body[begin:at]) if at - begin < NAME_LIMIT else None, colon.end()
                if key in keys:
                    found[key] = 0, 0
            elif depth == 1 and key in keys:
                found[key], key = (begin, at), None
        elif mark in b"{[":
            depth, key = depth + 1, None
        else:
            depth -= 1
            if depth == 0:
                return found if BLANK_END.match(body, at) else {}
    return {}


def string_end(body, at):
    """The index behind the JSON string whose content begins at `at`, None if it does not end."""
    end = body.find(b'"', at)
    if end > 0 and body[end - 1] != ord("\\"):  # in a prompt without quotes, this takes a tenth of the time
        return end + 1
    while True:
        end = STRING_PART.match(body, at).end()
        if body[end:end + 1] == b'"':
            return end + 1
        if end == at:
            return None
        at = end


Named = namedtuple("Named", "model begin end")  # the name in a body's JSON, and where it stands there, with its quotes


def named_model(body, keys=("model",)):
    """The model that a request's JSON names, as a Named; None if it names none. An older API says `name`, too.

    >>> named_model(b'{"name": "a:1"}', ("model", "name"))
    Named(model='a:1', begin=9, end=14)
    """
    is_escaped = b"\\u006" in body and bool(ESCAPED_MODEL.search(body))
    match = MODEL_FIRST.match(body)
    if match and match[1] and not is_escaped and body.find(b'"model"', match.end()) < 0:  # nearly always
        return Named(match[1].decode(), match.start(1) - 1, match.end(1) + 1)
    at = body.rfind(b'"model"')  # which is no part of a string, unless a backslash stands before it
    is_plain = body.find(b'"model"') == at > 0 and body[at - 1:at] != b"\\" and not is_escaped
    found = members(body, keys, at if is_plain and len(keys) == 1 else 0)
    for begin, end in (found.get(key, (0, 0)) for key in keys):
        name = json_string(body[begin:end]) if end - begin < NAME_LIMIT else None
        if name:
            return Named(name, begin, end)
    return None


def with_model(body, named, model):
    """The body with another model named in it: no other byte changes, and it is copied but once.

    >>> with_model(b'{"n": 1.0, "model":"a"}', Named("a", 19, 22), "b")
    b'{"n": 1.0, "model":"b"}'
    """
    view = memoryview(body)
    return b"".join((view[:named.begin], json.dumps(model).encode(), view[named.end:]))


def json_string(raw):
    """Decode a raw JSON string; None if it is none."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, str) else None


COUNTS = re.compile(rb'"(?:(prompt_eval_count|prompt_tokens|input_tokens)|'
                    rb'(eval_count|completion_tokens|output_tokens))"'
                    rb"\s*:\s*([0-9]{1,12})(?=\s*[,}])")  # what follows tells that the number was not cut
SSE_ERROR = re.compile(rb'^(?:data: ?\{"error":|event: ?(?:error|response\.failed)\b)', re.M)
LAST_EVENT = re.compile(rb'data: ?(?:\[DONE\]|\{ ?"type": ?"message_stop" ?\})\Z')


def ends_in_error(tail):
    """Whether a stream's last line or event is an error, as Ollama and OpenAI write it."""
    if b"error" not in tail and b"failed" not in tail:
        return False
    tail = tail.rstrip()
    event = (tail[:-12].rstrip() if tail.endswith(b"data: [DONE]") else tail).rpartition(b"\n\n")[2]
    return bool(SSE_ERROR.search(event)) or event.rpartition(b"\n")[2].startswith(b'{"error":')


def token_counts(tail):
    """Find (tokens in, tokens out) in the last bytes of an answer of any dialect, None where it does not say.

    The last mention wins. A key within a JSON string is none, for its quotes are escaped there.

    >>> token_counts(b'..."done":true,"prompt_eval_count":26,"eval_count":298}')
    (26, 298)
    """
    counts = [None, None]
    if b"_count" not in tail and b"_tokens" not in tail:
        return None, None
    for inward, _, number in COUNTS.findall(tail):
        counts[0 if inward else 1] = int(number)
    return tuple(counts)


# ---- Callers ----------------------------------------------------------------

APP_ORIGINS = re.compile(r"https?://(localhost|[a-z0-9-]+\.localhost|127\.\d+\.\d+\.\d+|0\.0\.0\.0|\[::1\])(:\d+)?"
                         r"|(app|file|tauri|vscode-webview|vscode-file)://.*", re.I)


def credentials(head, path_token):
    """Collect what a client presents, as bytes: five headers, or /t/TOKEN in the path.

    >>> credentials(parse_request(b"GET / HTTP/1.0\\r\\nAuthorization: bearer  x\\r\\nx-api-key: y\\r\\n"), None)
    [b'x', b'y']
    """
    found = [] if path_token is None else [path_token]
    for name in ("authorization", "x-api-key", "api-key", "cf-aig-authorization"):
        for value in head.all(name):
            scheme, _, rest = value.partition(" ")
            if scheme.lower() == "basic":
                found.append(basic_password(rest.strip()))
            else:
                found.append((rest.strip() if scheme.lower() == "bearer" else value).encode("latin-1"))
    return [credential for credential in found if credential]


def basic_password(text):
    """The password of a Basic credential, as bytes; b"" if it is none."""
    try:
        return base64.b64decode(text, validate=True).partition(b":")[2]
    except ValueError:
        return b""


def caller_name(tokens, presented):
    """The name whose token is among the presented credentials, or None; takes as long whichever it is."""
    name = None
    for credential in presented:
        for candidate, token in tokens:
            if hmac.compare_digest(token, credential):
                name = candidate
    return name


EXPOSED = ("Access-Control-Expose-Headers: X-Request-Id, X-Proxy-Upstream, X-Proxy-Model, X-Proxy-Attempts, "
           "Retry-After\r\n")


class Doorman:
    """Who may ask, by token, Host and Origin; made of the settings alone."""

    def __init__(self, settings):
        self.is_open = settings.auth_token == OFF  # whoever reaches the proxy may ask
        self.tokens = () if self.is_open else settings.auth_token
        self.any_origin = "*" in settings.origins or bool(self.tokens and not settings.origins)
        self.cors_unseen = "Access-Control-Allow-Origin: *\r\n" if self.any_origin else ""
        self.origins = tuple(re.compile(re.escape(word).replace(r"\*", "[^/]*"), re.I) for word in settings.origins)
        for judge in "check_place", "admit", "cors":  # the same head is judged the same way each time
            setattr(self, judge, remembered(getattr(self, judge)))

    def allows_origin(self, origin):
        return (self.any_origin or bool(APP_ORIGINS.fullmatch(origin))
                or any(pattern.fullmatch(origin) for pattern in self.origins))

    def check_place(self, head):
        """Refuse a web page that must not ask, and DNS rebinding, by which one gets here under a name of its own."""
        origin = head.get("origin")
        if origin and not self.allows_origin(origin):
            raise Refused(f"the origin {origin[:200]} may not ask here: list it in PROXY_ORIGINS", 403)
        if self.tokens:
            return
        host = (AUTHORITY.match(head.target) or [head.get("host")])[0].rpartition("/")[2][:260]
        name = host[1:].partition("]")[0] if host[:1] == "[" else host.partition(":")[0]
        if not self.is_open and host and not is_loopback(name):
            raise Refused(f"without a token only localhost is served, not the host {host}: set PROXY_AUTH_TOKEN "
                          "(off opens the proxy to whoever reaches it)", 403)
        chain = head.joined("x-forwarded-for")
        if not self.is_open and not all(is_loopback(word.strip()) for word in chain.split(",") if word.strip()):
            raise Refused("without a token only this machine is served, and this request was forwarded for another: "
                          "set PROXY_AUTH_TOKEN", 403)
        visits = head.get("sec-fetch-mode") == "navigate" and head.method in ("GET", "HEAD")
        if not origin and head.get("sec-fetch-site") == "cross-site" and not visits:
            raise Refused("without a token other sites' pages may not ask here", 403)

    def admit(self, head, target):
        """Return the caller's name, None where no token is needed; raises Refused with 401."""
        if not self.tokens:
            return None
        presented = credentials(head, target.token)
        name = caller_name(self.tokens, presented)
        if name is None:
            words = ("this token is not one of PROXY_AUTH_TOKEN" if presented else
                     "a token is needed: send it as Authorization: Bearer TOKEN, or in the path, /t/TOKEN/...")
            raise Refused(words, 401, [("WWW-Authenticate", "Bearer")])
        if caller_name(self.tokens, unquote_to_bytes(target.path.encode("latin-1")).split(b"/")[:50]):
            raise Refused("a token in the path stands at its start, or behind PROXY_PREFIX, and there once")
        return name

    def cors(self, head):
        """The header lines by which a browser lets its page read the answer."""
        origin = head.get("origin")
        if not origin or not self.allows_origin(origin):
            return "" if self.any_origin else "Vary: Origin\r\n"
        lines = self.cors_unseen or f"Access-Control-Allow-Origin: {origin}\r\nVary: Origin\r\n"
        return lines + EXPOSED


def preflight(head):
    """The header lines that answer a browser's question whether it may send a request."""
    asked = head.get("access-control-request-headers")
    method = head.get("access-control-request-method")
    lines = (f"Access-Control-Allow-Methods: {method or 'GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS'}\r\n"
             "Access-Control-Max-Age: 7200\r\n")
    if asked:
        lines += f"Access-Control-Allow-Headers: {asked}\r\n"
    if head.get("access-control-request-private-network") == "true":
        lines += "Access-Control-Allow-Private-Network: true\r\n"
    return lines


def client_address(peer, forwarded, trusted):
    """The client's address: the last in X-Forwarded-For that no trusted load balancer wrote of itself.

    >>> client_address("10.0.0.1", "6.6.6.6, 1.2.3.4, 10.0.0.2", networks("10.0.0.0/8"))
    '1.2.3.4'
    """
    for word in reversed(forwarded.split(",")):
        if not is_trusted(peer, trusted) or not ip_of(word.strip()):  # who wrote that is as far as we can see
            return peer
        peer = str(ip_of(word.strip()))
    return peer


def is_trusted(address, trusted):
    return bool(trusted) and any(ipaddress.ip_address(address) in network for network in trusted)


# ---- Models -----------------------------------------------------------------
#
# What models are called elsewhere, and the lists of them.


def cloud_name(name):
    """What a model of the cloud is called where there are others.

    >>> cloud_name("gpt-oss:120b"), cloud_name("glm-4.6:latest"), cloud_name("a:cloud")
    ('gpt-oss:120b-cloud', 'glm-4.6:cloud', 'a:cloud')
    """
    name = model_key(name)
    return name if SOURCE.fullmatch(name) else name + ("-cloud" if ":" in name.rpartition("/")[2] else ":cloud")


@remembered
def in_a_header(name):
    """A model's name as a header can carry it: percent-encoded where it is not ASCII, and not without end."""
    return re.sub(r"[^\x21-\x7e]", lambda match: quote(match[0], "", errors="replace"), name[:200])


# Why another upstream is asked when one has answered with such a status; any other is the client's own affair.
TRY_NEXT = frozenset((401, 402, 403,  # it refuses us: the key, the plan
                      404,  # it does not know the model
                      429, 503, 529,  # it is out of quota, or of room
                      500, 502, 504))  # it is broken, or what stands behind it
OPENAI_LIST = "/v1/models"
NAME_KEYS = {"/api/tags": ("models", "name", "model"), "/api/ps": ("models", "name", "model"),
             OPENAI_LIST: ("data", "id")}  # of each list: where its entries are, and where in an entry its names


def entries_of(path, document):
    """The [(name, entry)] of a list of models; None if this is no such list."""
    where, *names = NAME_KEYS[path]
    entries = document.get(where, False) if isinstance(document, dict) else False
    entries = [] if entries is None else entries  # as an Ollama without models says it
    if not isinstance(entries, list):
        return None
    named = [(entry.get(names[0]), entry) for entry in entries if isinstance(entry, dict)]
    return [(name, entry) for name, entry in named if isinstance(name, str) and name.strip()]


def model_asked_for(path):
    """The NAME of /v1/models/NAME; None if it is another path.

    >>> model_asked_for("/v1/models/org%2Fb:1"), model_asked_for("/v1/models")
    ('org/b:1', None)
    """
    return decoded(path[len(OPENAI_LIST) + 1:]) if path.startswith(OPENAI_LIST + "/") else None


def renamed(path, entry, name):
    """A list's entry under another name, with every other field as it was."""
    return {**entry, **{key: name for key in NAME_KEYS[path][1:] if key in entry}}


# ---- Records ----------------------------------------------------------------


class Record:
    """What one request cost; its public attributes are the keys of its log line, in order."""

    KEYS = tuple("time id caller client method path model upstream status first_byte_ms total_ms bytes_in bytes_out "
                 "tokens_in tokens_out outcome model_sent attempts queue_ms note".split())
    VALUES = attrgetter(*KEYS)
    __slots__ = KEYS + ("started",)

    def __init__(self, client):
        self.started = time.monotonic()
        self.time = time.time()
        self.client = client
        self.id = "%016x" % random.getrandbits(64)
        self.caller = self.method = self.path = self.model = self.upstream = self.status = None
        self.first_byte_ms = self.total_ms = self.tokens_in = self.tokens_out = self.outcome = None
        self.model_sent = self.queue_ms = self.note = None
        self.bytes_in, self.bytes_out, self.attempts = 0, 0, []

    def attempted(self, upstream, model, status, outcome):
        """Note that an upstream has been asked, and what came of it."""
        self.attempts.append({"upstream": upstream, "model": model, "status": status, "outcome": outcome})
        self.upstream, self.model_sent = upstream, model

    def answered(self, status):
        """Note the first byte that goes to the client."""
        self.status = status
        self.first_byte_ms = self._elapsed_ms()

    def ended(self, outcome):
        """Note the last byte, or what came instead."""
        self.outcome, self.total_ms = outcome, self._elapsed_ms()
        return self

    def _elapsed_ms(self):
        return round((time.monotonic() - self.started) * 1000, 3)


def timestamp(seconds):
    """RFC 3339, UTC, milliseconds.

    >>> timestamp(0.0625)
    '1970-01-01T00:00:00.062Z'
    """
    return "%s.%03dZ" % (to_the_second(int(seconds)), seconds % 1 * 1000)


@remembered
def to_the_second(seconds):
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


to_json = json.JSONEncoder(check_circular=False).encode


def json_line(keys, values):
    """One line for a machine."""
    return to_json(dict(zip(keys, values)))


def text_line(keys, values):
    """One line for a person at a terminal."""
    entry = dict(zip(keys, values))
    clock = entry["time"][11:19]
    if "event" in entry:
        return f"{clock} {entry['level']} {entry['event']}: {printable(entry['words'], 2000)}"
    waited = "" if entry["first_byte_ms"] is None else f" first byte {entry['first_byte_ms'] / 1000:.2f} s,"
    counts = ("" if entry["tokens_out"] is None and entry["tokens_in"] is None else
              f", tokens {entry['tokens_in']} in, {entry['tokens_out']} out")
    tried = len(entry["attempts"])
    words = [clock, entry["method"], entry["path"], entry["model"], entry["upstream"] and f"-> {entry['upstream']}",
             entry["model_sent"] if entry["model_sent"] != entry["model"] else None,
             f"({tried} attempts)" if tried > 1 else None, entry["status"] or "---", entry["outcome"], entry["caller"],
             entry["client"]]
    line = " ".join(printable(word) for word in words if word is not None)
    queued = "" if entry["queue_ms"] is None else f" queued {entry['queue_ms'] / 1000:.2f} s,"
    note = f"; {entry['note']}" if entry["note"] else ""
    return f"{line}{queued}{waited} all {entry['total_ms'] / 1000:.2f} s, {entry['bytes_out']} bytes{counts}{note}"


class Log:
    """Writes lines from a thread of its own, so that a stuck pipe or disk stops no request.

    Not more than LIMIT lines wait; the number of those that were lost is logged when lines flow again.
    """

    LIMIT = 10_000
    GATHER = 0.02  # seconds that lines wait for company: one write for many

    def __init__(self, path="", form="auto"):
        self._lines, self._lost, self._complained = queue.SimpleQueue(), 0, {}
        self.reopen(path, form)
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def request(self, record):
        """Log a request that has ended."""
        record.time = timestamp(record.time)
        self._put(self._line(Record.KEYS, Record.VALUES(record)) + "\n")

    def event(self, level, event, words):
        """Log anything else: level is info, warning or error, event a word or two to search for."""
        self._put(self._event(level, event, words))

    def complain(self, event, words):
        """Log what may happen very often, each event once a minute."""
        if time.monotonic() - self._complained.get(event, float("-inf")) > 60:
            self._complained[event] = time.monotonic()
            self.event("warning", event.partition(" ")[0], words)

    def reopen(self, path, form):
        """Follow a log file that was moved away; raises OSError, and then goes on as before."""
        if path:
            # A pipe that nobody reads is an error; to wait for its reader would hold up the start.
            stream = open(path, "ab", 0, opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK, 0o666))
        else:
            try:  # not sys.stderr, whose buffer and lock would hold up the exit if nobody reads
                stream = open(2, "wb", buffering=0, closefd=False)
            except OSError:  # it was closed before the start
                stream = open(os.devnull, "wb", buffering=0)
        is_text = form == "text" or form == "auto" and stream.isatty()
        self._stream, self._line = stream, text_line if is_text else json_line

    def close(self, patience=1.0):
        """Wait until what was logged is written, but not for ever."""
        written = threading.Event()
        self._lines.put(written)
        written.wait(patience)

    def _event(self, level, event, words):
        return self._line(("time", "level", "event", "words"), (timestamp(time.time()), level, event, words)) + "\n"

    def _put(self, line):
        if self._lines.qsize() < self.LIMIT:
            self._lines.put(line)
        else:
            self._lost += 1

    def _run(self):
        while True:
            taken = [self._lines.get()]
            time.sleep(self.GATHER)
            while len(taken) < 1000 and not self._lines.empty():
                taken.append(self._lines.get())
            lines = [line for line in taken if type(line) is str]
            lost, self._lost = self._lost, 0
            if lost:
                lines.append(self._event("warning", "log", f"{lost} lines were lost: the log could not be written"))
            try:
                self._write("".join(lines).encode("utf-8", "backslashreplace"))
            except (OSError, ValueError):  # a broken pipe, a full disk: later lines may fare better
                self._lost += lost + len(lines) - bool(lost)
            for written in taken:
                if type(written) is not str:
                    written.set()

    def _write(self, data):
        while data:
            written = self._stream.write(data)
            if written is None:  # somebody else made it non-blocking, and it is full
                time.sleep(self.GATHER)
            data = data[written or 0:]


# ---- Wires ------------------------------------------------------------------
#
# A wire is a connection to a client or to an upstream, the same on both sides: a
# non-blocking socket, and the bytes that were read from it ahead of their use.
# What must wait is a generator here: it yields (deadline, wire, events, ...), and
# the carrier resumes it with the wire that is ready. A deadline is in monotonic
# seconds, None is never; when it passes, a TimeoutError comes out of the yield.

PIECE = 64 * 1024
SAID, WRITE, LEFT = (select.EPOLLIN, select.EPOLLOUT, select.EPOLLRDHUP) if hasattr(select, "epoll") else (
    selectors.EVENT_READ, selectors.EVENT_WRITE, 0)  # only Linux tells a farewell apart from data
READ = SAID | LEFT
FOR_EVER = float("inf")
INTERIM = re.compile(rb"(?:HTTP/1\.1 1(?!01)[0-9][0-9](?: [^\r\n]*)?\r\n(?:[^\r\n]+\r\n)*\r\n)+")
NOT_YET = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Wire:
    """One connection. `ahead` is what has been read from it and not been used; `act` is called when it is ready."""

    __slots__ = ("sock", "ahead", "used", "act", "carrier", "_fd", "_events")

    def __init__(self, sock, carrier):
        self.sock, self.carrier, self.ahead, self.used = sock, carrier, b"", 0.0
        self.act, self._fd, self._events = None, sock.fileno(), 0
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # lest NAT routers forget a silent stream
            for name, value in ("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 6):
                if hasattr(socket, name):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def watch(self, events, act=None):
        """Have `act(wire, events)` called when the wire is ready to READ, WRITE or either; 0 is neither."""
        self.act = act
        if events == self._events:
            return
        poll = self.carrier.poll
        if not self._events:
            poll.register(self._fd, events)
            self.carrier.wires[self._fd] = self
        elif events:
            poll.modify(self._fd, events)
        else:
            poll.unregister(self._fd)
            del self.carrier.wires[self._fd]
        self._events = events

    def receive(self):
        """Return what has come, b"" at the end of it, None if nothing has; raises OSError."""
        buffer = self.carrier.buffer  # recv() would cut each small piece from a large one, and spoil the heap
        try:
            return buffer[:self.sock.recv_into(buffer)].tobytes()
        except NOT_YET:
            return None

    def send(self, data):
        """Send what the socket takes now, and return how much that was; raises OSError."""
        try:
            return self.sock.send(data)
        except NOT_YET:
            return 0

    def look(self):
        """Read what has come into `ahead`: True if anything has, None if nothing, False if the other side has left."""
        try:
            data = self.receive()
        except OSError:
            return False
        self.ahead += data or b""
        return None if data is None else data != b""

    def has_left(self, events):
        """Whether the other side has left, now that these events came; if it has only said more, that can wait."""
        try:
            if events & ~(SAID | WRITE) or not LEFT and not socket.socket.recv(self.sock, 1, socket.MSG_PEEK):
                return True
        except OSError:
            return True
        self.watch(self._events & ~SAID, self.act)
        return False

    def take_head(self):
        """Cut a message's head off `ahead` and return its lines; None while it is not whole; raises Malformed."""
        data = self.ahead
        end = data.find(b"\r\n\r\n")
        if end > HEAD_LIMIT or end < 0 and len(data) > HEAD_LIMIT:
            raise Malformed("the headers are longer than 64 KiB", 431)
        if end < 0:
            first = data.find(b"\n")  # only this one and the newest are looked at here, the parser looks at all
            if first >= 0 and data[first - 1:first] != b"\r" or data[-1:] == b"\n" and data[-2:] != CRLF:
                raise Malformed("a line ends in LF without CR")
            return None
        self.ahead = data[end + 4:]
        return data[:end + 2]

    def close(self, abruptly=False):
        """Close; abruptly, the other side learns that the end is no end (RST instead of FIN)."""
        self.watch(0)
        try:
            if abruptly:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            return
        finally:
            self.sock.close()


def next_head(wire, deadline):
    """Wait for the next head on a wire, and return its lines; raises EOFError, OSError, Malformed, TimeoutError."""
    while True:
        block = wire.take_head() if wire.ahead else None
        if block is not None:
            return block
        yield deadline, wire, READ
        data = wire.receive()
        if data == b"":
            raise EOFError("the connection was closed")
        wire.ahead += data or b""


def has_answered(wire):
    """Read what an upstream says in the middle of a request; whether that is an answer, or the end. 1xx are dropped."""
    came = wire.look()
    if not came:
        return came is False
    interim = INTERIM.match(wire.ahead)
    rest = wire.ahead = wire.ahead[interim.end():] if interim else wire.ahead
    may_become_one = rest[:10] == b"HTTP/1.1 1"[:len(rest)] and b"\r\n\r\n" not in rest and len(rest) <= HEAD_LIMIT
    return not may_become_one


def aside(carrier, quick, deadline, work, *arguments):
    """Do work in a thread while the task waits, or at once if it is `quick`; return what it returns."""
    if quick:
        return work(*arguments)
    task, ticket, outcome = carrier.current, carrier.current.ticket, []

    def think():
        try:
            outcome.extend((work(*arguments), None))
        except Exception as error:
            outcome.extend((None, error))
        carrier.call(task.wake, ticket)

    try:
        _thread.start_new_thread(think, ())
    except RuntimeError:
        raise Refused("the system gives the proxy no more threads", 503) from None
    yield (deadline,)
    result, error = outcome
    if error:
        raise error
    return result


def dial(carrier, address, proxy, deadline):
    """Connect to an upstream, by way of an HTTP proxy (host, port, Proxy-Authorization) if there is one.

    Returns a Wire. Raises OSError, EOFError, TimeoutError, Malformed.
    """
    host, port = proxy[:2] if proxy else (address.host, address.port)
    # For a name the network may be asked, which cannot be timed.
    candidates = yield from aside(carrier, ip_of(host), deadline,
                                  socket.getaddrinfo, host, port, 0, socket.SOCK_STREAM)
    for number, candidate in enumerate(candidates):
        now = time.monotonic()
        share = now + (deadline - now) / (len(candidates) - number)  # a dead address leaves time for the next
        try:
            wire = yield from connect(carrier, candidate, share)
            break
        except OSError:
            if candidate is candidates[-1]:
                raise
    with closed_on_error(wire):
        if proxy:
            yield from open_tunnel(wire, address, proxy[2], deadline)
        if address.scheme == "https":
            yield from shake_hands(wire, address.host, deadline)
        return wire


@contextmanager
def closed_on_error(wire):
    """Close a wire should what is done with it fail."""
    try:
        yield
    except BaseException:
        wire.close()
        raise


def connect(carrier, candidate, deadline):
    """Connect a new wire to one of getaddrinfo's results."""
    family, kind, protocol, _, address = candidate
    wire = Wire(socket.socket(family, kind, protocol), carrier)
    with closed_on_error(wire):
        code = wire.sock.connect_ex(address)
        if code in (errno.EINPROGRESS, errno.EWOULDBLOCK):
            yield deadline, wire, WRITE
            code = wire.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        return wire


def open_tunnel(wire, address, authorization, deadline):
    """Have an HTTP proxy connect this wire to the upstream (RFC 9110, section 9.3.6)."""
    authority = f"{f'[{address.host}]' if ':' in address.host else address.host}:{address.port}"
    lines = f"Host: {authority}\r\n" + (f"Proxy-Authorization: {authorization}\r\n" if authorization else "")
    data = head_bytes(f"CONNECT {authority} HTTP/1.1\r\n", lines)
    while data:
        data = data[wire.send(data):]
        if data:
            yield deadline, wire, WRITE
    head = parse_answer((yield from next_head(wire, deadline)))
    if head.status != 200 or wire.ahead:
        raise ConnectionError(f"the proxy of HTTPS_PROXY answered {head.status} {printable(head.reason)}")


def shake_hands(wire, host, deadline):
    """Speak TLS on a connected wire."""
    context = yield from aside(wire.carrier, tls_context.cache_info().currsize, deadline, tls_context)
    wire.watch(0)  # wrap_socket() takes the descriptor, and closes it if it fails
    wire.sock = context.wrap_socket(wire.sock, server_hostname=host, do_handshake_on_connect=False,
                                    suppress_ragged_eofs=False)
    while True:
        try:
            return wire.sock.do_handshake()
        except ssl.SSLWantReadError:
            yield deadline, wire, READ
        except ssl.SSLWantWriteError:
            yield deadline, wire, WRITE


CA_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")


@lru_cache(maxsize=1)
def tls_context():
    """Verify against the system's store (SSL_CERT_FILE is obeyed); where Python finds none, try the usual files."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0x80)  # an end without a goodbye may be a cut
    paths = ssl.get_default_verify_paths()
    if not paths.cafile and not paths.capath and not context.cert_store_stats()["x509_ca"]:
        for bundle in filter(os.path.exists, CA_BUNDLES):
            context.load_verify_locations(bundle)
            break
    return context


# ---- Upstreams --------------------------------------------------------------
#
# urllib as it was meant to be extended: an OpenerDirector without handlers for
# redirects, errors, cookies or passwords - a status is an answer, and no answer
# sends the key elsewhere. Only ProxyHandler stands before our own, for HTTPS_PROXY.

SAFE = ("GET", "HEAD", "OPTIONS")  # methods that may be executed twice
LONG = 16 * 1024  # bytes of a body from which on a thread of its own looks through it
LIST_LIMIT = 4 << 20  # bytes that a list of models may have
LIST_LINES = f"Accept: application/json\r\nAccept-Encoding: identity\r\nUser-Agent: ollama_proxy/{__version__}\r\n"


def finite(text):
    """Parse a number that other parsers can read, too."""
    if math.isfinite(float(text)):
        return float(text)
    raise ValueError(f"{text} is no number in JSON")


# A list of models as its JSON says it: the document, its [(name, entry)], and {model_key(name): name}.
Listing = namedtuple("Listing", "document entries names")


def parse_list(path, body):
    """Read a list of models to a Listing; None if it is none."""
    try:
        document = json.loads(body, parse_float=finite, parse_constant=finite)
        json.dumps(reduce(lambda inner, _: [inner], range(100), document))  # what is nested too deeply would fail later
    except (ValueError, RecursionError):
        return None
    entries = entries_of(path, document)
    return None if entries is None else Listing(document, entries, {model_key(name): name for name, _ in entries})


def seconds_until(retry_after):
    """The seconds that a Retry-After says, as a number or a date, but no more than a week; 0 if it says none.

    >>> seconds_until("120"), seconds_until("Wed, 21 Oct 2015 07:28:00 GMT"), seconds_until("soon")
    (120, 0, 0)
    """
    if re.fullmatch("[0-9]{1,9}", retry_after, re.A):
        return min(int(retry_after), 604_800)
    try:
        return min(max(0, parsedate_to_datetime(retry_after).timestamp() - time.time()), 604_800)
    except (ValueError, TypeError, LookupError, OverflowError):
        return 0


class Upload:
    """The body of a client's request, read as it is wanted."""

    DRIP = 4096  # bytes that must come within PROXY_CLIENT_TIMEOUT, or the body's end
    SKIP = 8192  # bytes that are looked through to keep the connection of who was refused

    def __init__(self, client, size, expects, patience):
        self.decoder, self.received = Decoder(size or 0), 0
        self._client, self._expects = client, expects
        self._patience, self._left, self._fresh = patience, patience, 0

    def more(self, upstream=None):
        """Wait for more of the body and return its payload; b"" when it is whole, None when `upstream` speaks first.

        Raises Refused (408), Malformed, ClientLeft.
        """
        while not self.decoder.done:
            data, self._client.ahead = self._client.ahead, b""
            if not data and (yield from self._wait(upstream)):
                return None
            payload = self.decoder.feed(data or self._receive())
            self.received += len(payload)
            if self.decoder.done:
                self._client.ahead = self.decoder.rest
            if payload:
                return payload
        return b""

    def whole(self, limit):
        """Return the body as bytes; raises Refused (413) beyond the limit."""
        pieces = []
        while self.decoder.size <= limit >= self.received:
            piece = yield from self.more()
            if not piece:
                return b"".join(pieces)
            pieces.append(piece)
        raise Refused(f"the body is larger than {limit} bytes (PROXY_MAX_BODY; less without a token)", 413)

    def skip(self):
        """Forget what of the body has come already; whether that was all of it."""
        if not self.decoder.done:
            if len(self._client.ahead) > self.SKIP:
                return False
            try:
                self.decoder.feed(self._client.ahead)
            except Malformed:
                return False
            self._client.ahead = self.decoder.rest
        return self.decoder.done

    def _wait(self, upstream):
        """Wait for the client, and for the upstream if there is one yet; whether that has spoken."""
        if self._expects:
            self._expects = False
            try:
                self._client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            except OSError as error:
                raise ClientLeft("the client left before its body") from error
        began = time.monotonic()
        watched = (self._client, READ) + ((upstream, READ) if upstream else ())
        try:
            ready = yield (began + self._left, *watched)
            while ready is upstream and not has_answered(upstream):
                ready = yield (began + self._left, *watched)
        except TimeoutError:
            raise Refused("the body of the request came too slowly", 408) from None
        self._left -= time.monotonic() - began
        return ready is upstream

    def _receive(self):
        try:
            data = self._client.receive()
        except OSError as error:
            raise ClientLeft("the client was cut off") from error
        if data == b"":
            raise ClientLeft("the client left within its body")
        self._fresh += len(data or b"")
        if self._fresh >= self.DRIP:
            self._left, self._fresh = self._patience, 0
        return data or b""


class Ask(urllib.request.Request):
    """urllib's Request, and what our own handler sends: urllib reads `host` and `type`, and the rest is ours.

    `selector` is the target; `head` all bytes of the head; then comes `body`, bytes in memory, or `upload`.
    `sent` and `heard` say whether anything has gone up, or come down.
    """

    head, body, upload, sent, heard = b"", b"", None, False, False
    patience = 0  # seconds for which the upstream may be silent; 0 is for ever

    def deadline(self):
        return time.monotonic() + self.patience if self.patience else None


class Answer(namedtuple("Answer", "head decoder wire pool")):
    """An upstream's answer, its body still to come on the wire, which goes back to a pool if it can be used again."""

    __slots__ = ()

    def release(self):
        """Give the wire back to its pool if the answer is over, as that of an error mostly is; else close it."""
        wire, decoder = self.wire, self.decoder
        if not decoder.done:
            data, wire.ahead = wire.ahead, b""
            with suppress(Malformed):
                decoder.feed(data)
        if self.pool and decoder.done and not decoder.rest and not wire.ahead:
            self.pool.put(wire)
        else:
            wire.close()


class Pool:
    """Kept wires to one upstream, the last used first."""

    IDLE = 60.0  # seconds; longer, and a router on the way may have forgotten the connection

    def __init__(self):
        self._wires, self._closed = deque(), False

    def take(self):
        """A wire that is still open and silent, or None."""
        while self._wires:
            wire = self._wires.pop()
            if wire.look() is None:
                return wire
            wire.close()
        return None

    def has_one(self):
        """Whether there is such a wire; it grows no younger by that."""
        wire = self.take()
        if wire:
            self._wires.append(wire)
        return bool(wire)

    def put(self, wire):
        wire.used = time.monotonic()
        wire.watch(READ, self._hear)
        self._wires.append(wire)
        if self._closed:
            self.prune(0)

    def _hear(self, wire, _):
        """Let go of a wire that has closed, or says what nobody asked for, unless that is but TLS's housekeeping."""
        if wire.look() is not None:
            self._wires.remove(wire)
            wire.close()

    def prune(self, idle=IDLE):
        """Close the wires that nobody has used for so many seconds."""
        while self._wires and time.monotonic() - self._wires[0].used >= idle:
            self._wires.popleft().close()

    def close(self):
        self._closed = True
        self.prune(0)


class Desk:
    """The slots of an upstream, of which each copy has `limit`, and who waits for one.

    Callers have their turn one after the other, and each one's requests in the order in which they came.
    """

    def __init__(self, carrier):
        self.limit, self._carrier = FOR_EVER, carrier
        self._queue, self._typical = {}, None  # turns by caller; the seconds for which a slot is held
        self._left_at = time.monotonic()  # when one became free last

    def wait(self, caller, copies, deadline):
        """Wait until one of these copies has a slot, take it, and return the copy; raises TimeoutError."""
        turn = [self._carrier.current, copies, None]
        self._left_at = self._left_at if self._queue else time.monotonic()  # the time before counts for nobody
        self._queue.setdefault(caller, []).append(turn)
        try:
            yield (deadline,)
        except BaseException as error:
            if not turn[2]:
                self._forget(caller, turn)
                raise
            if not isinstance(error, TimeoutError):  # else it came at the last moment
                self.leave(turn[2], time.monotonic())
                raise
        return turn[2]

    def leave(self, copy, began):
        """Give back a slot that was taken at that time."""
        copy.busy -= 1
        if self.limit == FOR_EVER:
            return
        self._left_at = time.monotonic()
        held = self._left_at - began
        self._typical = held if self._typical is None else self._typical + (held - self._typical) / 8
        self.admit(copy)

    def admit(self, copy):
        """Give the free slots of a copy to those who wait for it."""
        while copy.busy < self.limit:
            turns = ((caller, turn) for caller, turns in self._queue.items() for turn in turns if copy in turn[1])
            caller, turn = next(turns, (None, None))
            if not turn:
                return
            self._forget(caller, turn)
            if caller in self._queue:
                self._queue[caller] = self._queue.pop(caller)  # to the end
            copy.busy, turn[2] = copy.busy + 1, copy
            self._carrier.soon(turn[0].wake, turn[0].ticket)

    def _forget(self, caller, turn):
        self._queue[caller].remove(turn)
        if not self._queue[caller]:
            del self._queue[caller]

    def wait_expected(self, copies, otherwise):
        """The seconds after which one of so many copies may have a slot, going by how long slots were held before."""
        if self._typical is None:
            return otherwise
        expected = self._typical * (1 + sum(map(len, self._queue.values()))) / (self.limit * copies)
        return max(expected, time.monotonic() - self._left_at)


class Upstream(urllib.request.BaseHandler):
    """A server to ask: urllib's handler for it, its kept wires, its health, and the models that it lists."""

    FRESH = 10.0  # seconds that what is known of it holds
    RESTS = 1.0, 60.0  # seconds for which it is not asked after it could not be connected to: at first, and at most

    def __init__(self, address, settings, carrier, desk=None):
        self.address, self.key, self.name = address, settings.key(address), address.name
        self.key_name = "OLLAMA_API_KEY" if address.is_cloud and address.name not in settings.keys else address.key_name
        self.mask = self.key if len(self.key) >= 12 else ""  # a placeholder is no secret, but may be any word
        self.pool, self.desk, self.busy = Pool(), desk, 0
        self.is_ollama = self.models = None  # whether it has /api; {model_key(name): name}; not known yet
        self.lists = {}  # by path: (when it came, its Listing)
        self.seen_at, self.reachable, self.looked_at = float("-inf"), None, float("-inf")
        self._looks, self.trouble = {}, ""  # by path, whom to tell when it is there; why the last look was in vain
        self._failures, self._rests = 0, {}  # in a row; until when it is not asked: at all (None), or for a model
        self._carrier = carrier
        self._template = vars(Ask(f"{address.scheme}://{address.netloc}/"))
        self._own_lines = f"Host: {address.netloc}\r\n" + (f"Authorization: Bearer {self.key}\r\n" if self.key else "")
        self._opener = urllib.request.OpenerDirector()
        proxy = urllib.request.getproxies_environment().get("https")
        if proxy and address.needs_proxy:
            self._opener.add_handler(urllib.request.ProxyHandler({"https": proxy}))
        self._opener.add_handler(self)

    def obey(self, settings, rank):
        """Go by these settings from now on; `rank` says how many others are preferred."""
        self.rank = rank
        self._connect_timeout, self._read_timeout = settings.connect_timeout, settings.read_timeout

    def ask(self, method, path, lines, body=b"", upload=None, patience=None):
        """Send a request, header `lines` given, and return its Answer; raises a Failure.

        `patience` is the seconds for which it may be silent, if not PROXY_READ_TIMEOUT.
        """
        ask = self._new_ask()
        ask.method, ask.body, ask.upload, ask.patience = method, body, upload, patience or self._read_timeout
        ask.selector = self.address.mount + path
        ask.head = head_bytes(f"{method} {ask.selector} HTTP/1.1\r\n{self._own_lines}", lines)
        return (yield from self._opener.open(ask))

    def _new_ask(self):
        ask = Ask.__new__(Ask)  # a Request parses its URL, and this one is always the same
        vars(ask).update(self._template)
        return ask

    def http_open(self, ask):
        """Called by urllib: send a request over a kept wire, else a new one.

        A kept wire that proves stale is replaced, and the request sent again, when not a byte of an answer has
        come and nothing can have been executed twice.
        """
        if not ask.head:  # is_reachable() wants no more than a wire
            return (yield from self._dial(ask))
        while True:
            wire = self.pool.take()
            kept = wire is not None
            if not kept:
                wire = yield from self._dial(ask)
            try:
                return (yield from self._exchange(wire, ask))
            except UpstreamLost:
                heard = ask.heard or wire.ahead
                wire.close()
                if not kept or heard or ask.upload or ask.sent and ask.method not in SAFE:
                    raise
            except BaseException:
                wire.close()
                raise

    https_open = http_open

    def has(self, model):
        """The name by which to ask it for a model that it lists; None if it does not list it."""
        name = self.models.get(model_key(model)) if self.models else None
        return model if name and self.is_ollama else name

    def rests(self, model=None):
        """Whether it had better not be asked now, be it for this model only."""
        return bool(self._rests) and time.monotonic() < max(
            self._rests.get(None, 0.0), self._rests.get(model_key(model or ""), 0.0))

    def heed(self, model, retry_after):
        """Let it rest for a model after a 429, as long as it said."""
        patience, now, key = seconds_until(retry_after), time.monotonic(), model_key(model)
        if len(self._rests) >= 1000:
            self._rests = {key: until for key, until in self._rests.items() if until > now}
        if patience and (key in self._rests or len(self._rests) < 1000):  # clients may think of many names
            self._rests[key] = now + patience
            self._carrier.log.complain(f"rest {self.name}", f"upstream {self.name} has no more of {printable(model)}, "
                                       f"nor perhaps of others, for {patience:.0f} seconds")

    def look(self, path, seen):
        """Have it asked for a list, or with "" only reached, unless it is already; `seen` is called after that."""
        if path not in self._looks:
            self.looked_at = time.monotonic() if path == "/api/tags" else self.looked_at
            self._looks[path] = []
            self._carrier.soon(self._carrier.start, self._look(path))
        self._looks[path].append(seen)

    @property
    def is_asked(self):
        """Whether it is being asked for the list by which the way to a model is found."""
        return "/api/tags" in self._looks

    def _look(self, path):
        try:
            yield from (self.fetch(path) if path else self.reach())
            self.trouble = ""
        except Failure as failure:
            self.trouble = str(failure)
            if not isinstance(failure, (Unreachable, Stopped)):  # else it is noted already, or of no interest any more
                self._carrier.log.complain(f"list {self.name}", self.trouble)
        finally:
            for seen in self._looks.pop(path):
                seen()

    def reach(self):
        """Have a wire to it; raises Unreachable."""
        if not self.pool.has_one():
            self.pool.put((yield from self._opener.open(self._new_ask())))
        self._note(True)

    def fetch(self, path):
        """Ask for a list of models and keep it; raises a Failure. Who has no /api/tags lists them under /v1/models."""
        answer = yield from self.ask("GET", path, LIST_LINES, patience=self._connect_timeout)
        status, body = answer.head.status, (yield from self._whole(answer))
        listing = None
        if status == 200:
            listing = yield from aside(self._carrier, len(body) < LONG, None, parse_list, path, body)
        if not listing and path == "/api/tags" and status in (200, 404, 405, 501):
            self.is_ollama = False
            return (yield from self.fetch(OPENAI_LIST))
        if not listing and status != 404:
            raise UpstreamLost(f"upstream {self.name} does not list its models: GET {path} gives {status}")
        listing = listing or Listing({}, [], {})
        self.lists[path] = time.monotonic(), listing
        if path == "/api/tags":
            self.is_ollama = True
        if path == ("/api/tags" if self.is_ollama else OPENAI_LIST):
            self.models = listing.names

    def _whole(self, answer):
        """Read an answer's body; raises a Failure."""
        wire, decoder, pieces, size = answer.wire, answer.decoder, [], 0
        deadline = time.monotonic() + self._connect_timeout
        try:
            with closed_on_error(wire):
                while not decoder.done:
                    if not wire.ahead:
                        yield deadline, wire, READ
                        came = wire.look()
                        if came is None:  # half a record of TLS
                            continue
                        if not came and decoder.size != UNTIL_CLOSE:
                            raise EOFError
                    data, wire.ahead = wire.ahead, b""
                    pieces.append(decoder.feed(data))
                    size += len(data)
                    if size > LIST_LIMIT or not data and decoder.size == UNTIL_CLOSE:
                        break
        except (EOFError, Malformed, TimeoutError):
            raise UpstreamLost(f"upstream {self.name} broke off within its list of models") from None
        answer.release()
        return b"".join(pieces)

    def _note(self, reachable, words="", before=0):
        """Note whether a connection could be made; `before` is how many could not, one after the other."""
        if reachable != self.reachable and (self.reachable is not None or not reachable):
            self._carrier.log.event("info" if reachable else "warning", "upstream",
                                    f"upstream {self.name} is reachable again ({self.address})" if reachable
                                    else f"{words} ({self.address})")
        self.seen_at, self.reachable = time.monotonic(), reachable
        if reachable:
            self._failures = 0
            self._rests.pop(None, None)
        else:
            self._failures = max(self._failures, min(before, 20) + 1)
            first, most = self.RESTS
            self._rests[None] = time.monotonic() + min(most, first * 2 ** (self._failures - 1))

    def _dial(self, ask):
        proxy, before, until = None, self._failures, time.monotonic() + self._connect_timeout
        if before:  # whoever comes meanwhile is not to wait for this, too
            self._rests[None] = until
        try:
            if ask.host != self.address.netloc:  # ProxyHandler has put its own there
                place = urlsplit("//" + ask.host)
                proxy = place.hostname, place.port or 80, ask.get_header("Proxy-authorization")
            wire = yield from dial(self._carrier, self.address, proxy, time.monotonic() + self._connect_timeout)
        except TimeoutError as error:
            words = str(error) if error.errno else f"no connection within {self._connect_timeout:g} seconds"
        except ssl.SSLCertVerificationError as error:
            store = os.environ.get("SSL_CERT_FILE")
            advice = "does not exist" if store and not os.path.exists(store) else "can name more authorities"
            words = f"its certificate is not trusted ({error.verify_message}); SSL_CERT_FILE {advice}"
        except ssl.SSLError as error:
            words = f"TLS failed ({error.reason or error}); does it speak https?"
        except (ClientLeft, Stopped):
            if self._rests.get(None) == until:
                del self._rests[None]
            raise
        except (OSError, EOFError, ValueError, Refused) as error:  # a ValueError is of a host name
            words = getattr(error, "strerror", None) or str(error)
        else:
            self._note(True)
            return wire
        way = f" by way of HTTPS_PROXY, {ask.host}" if proxy else ""
        words = f"upstream {self.name} cannot be reached{way}: {words}"
        self._note(False, words, before)
        raise Unreachable(words)

    def _exchange(self, wire, ask):
        """Send and hear the head of the answer, however early it comes; raises a Failure."""
        try:
            whole = yield from self._push(wire, ask.head + ask.body if len(ask.body) < PIECE else ask.head, ask)
            if whole and len(ask.body) >= PIECE:
                whole = yield from self._push(wire, ask.body, ask)
            if whole and ask.upload:
                whole = yield from self._push_upload(wire, ask)
            answer = yield from self._hear(wire, ask)
            return answer if whole else answer._replace(pool=None)  # else the next request would become its body
        except (OSError, EOFError) as error:
            if isinstance(error, TimeoutError) and not error.errno:  # the system's own have a number
                setting = " (PROXY_READ_TIMEOUT)" if ask.patience == self._read_timeout else ""
                raise Silent(f"upstream {self.name} was silent for {ask.patience:g} seconds{setting}") from None
            words = getattr(error, "strerror", None) or str(error)
            raise UpstreamLost(f"upstream {self.name} broke off before its answer: {words}") from error

    def _push(self, wire, data, ask):
        """Send one piece; False when the upstream answers, or hangs up, instead of taking it."""
        data = memoryview(data)
        while True:
            try:
                sent = wire.send(data)
            except OSError:
                if ask.sent:  # it may have said why
                    return False
                raise
            ask.sent, data = ask.sent or sent > 0, data[sent:]
            if not data:
                return True
            yield ask.deadline(), wire, READ | WRITE
            if has_answered(wire):
                return False

    def _push_upload(self, wire, ask):
        """Send the client's body as it comes; False when the upstream answers, or hangs up, before it is whole."""
        chunked = ask.upload.decoder.size == CHUNKED
        while not ask.upload.decoder.done:
            payload = yield from ask.upload.more(wire)
            if payload is None:
                return False
            if payload and not (yield from self._push(wire, as_chunk(payload) if chunked else payload, ask)):
                return False
        return not chunked or (yield from self._push(wire, b"0\r\n\r\n", ask))

    def _hear(self, wire, ask):
        status = 100
        while status < 200:  # 1xx are for us alone
            try:
                block = yield from next_head(wire, ask.deadline())
                ask.heard = True
                head = parse_answer(block)
                size, status = answer_size(head, ask.method), head.status
            except Malformed as error:
                raise UpstreamLost(f"upstream {self.name} gave an answer that is not HTTP: {error}") from None
            if status == 101:
                raise UpstreamLost(f"upstream {self.name} switched to a protocol that nobody asked for")
        return Answer(head, Decoder(size), wire, self.pool if head.keeps and size != UNTIL_CLOSE else None)


# ---- Carrier ----------------------------------------------------------------
#
# One thread does all that waits. A Task decides: what to ask, and what to answer.
# From the moment the head of an answer is known, an Exchange carries it. Between
# two requests a Client waits by itself. All three have a deadline, and expire()
# and stop() for when it has passed, or the proxy ends.


class Poll(selectors.DefaultSelector):
    """Looks like select.epoll where there is none. Where there is, it is used itself: it does with half the work."""

    def poll(self, timeout, limit):
        return [(key.fd, events) for key, events in self.select(timeout)]


class Task:
    """One line of work: a generator that yields what it waits for (see Wires). Without work, it is over.

    While it waits for something else, it watches its client: when that leaves, ClientLeft comes out of the yield.
    `ticket` is the number of the present wait: who wakes it late has an old one, and wakes nobody.
    """

    __slots__ = ("client", "deadline", "ticket", "_carrier", "_steps", "_wires")

    def __init__(self, carrier, steps, client=None):
        self.client, self.deadline, self.ticket = client, FOR_EVER, 0
        self._carrier, self._steps, self._wires = carrier, steps, ()

    def step(self, go, value=None):
        """Let the generator go on to its next wait; `go` is its send or throw."""
        self._carrier.current = self
        self.ticket += 1
        try:
            deadline, *wait = go(value)
        except StopIteration:
            return self._end()
        except BaseException:
            self._end()
            raise
        self.deadline = FOR_EVER if deadline is None else deadline
        self._carrier.due = min(self._carrier.due, self.deadline)
        wires, events = wait[::2], wait[1::2]
        if self._wires:
            self._let_go(wires)
        self._wires = wires
        for wire, event in zip(wires, events):
            wire.watch(event, self._ready)
        if self.client and self.client not in wires:
            self.client.watch(READ, self._hear_client)
        self._carrier.waiting.add(self)

    def wake(self, ticket):
        """Go on after a wait without wires, if it is still the one with this ticket."""
        if ticket == self.ticket:
            self.step(self._steps.send)

    def leave(self):
        self.step(self._steps.throw, ClientLeft("the client left"))

    def expire(self):
        self.step(self._steps.throw, TimeoutError())

    def stop(self):
        self.step(self._steps.throw, Stopped("the proxy is being stopped"))

    def _ready(self, wire, _):
        self.step(self._steps.send, wire)

    def _hear_client(self, client, events):
        if client.has_left(events):
            self.leave()

    def _let_go(self, wires=()):
        for wire in self._wires:
            # The client is watched further, and what is not this task's any more has been handed on.
            if wire is not self.client and wire not in wires and getattr(wire.act, "__self__", None) is self:
                wire.watch(0)

    def _end(self):
        self.ticket += 1
        self._let_go()
        self._carrier.waiting.discard(self)


class Carrier:
    """The thread, what it watches, and what other threads want of it."""

    TICK = 0.25  # seconds at most between looks at the deadlines
    AT_ONCE = 256  # events that are taken in hand before more are asked for

    def __init__(self, log):
        self.log, self.current = log, None
        self.poll, self.wires = getattr(select, "epoll", Poll)(), {}  # by file descriptor
        self.buffer = memoryview(bytearray(PIECE))
        self.now = self.due = time.monotonic()  # when deadlines are looked at next
        self._inbox, self._closed = deque(), False
        self.waiting = set()  # tasks, exchanges, clients: whatever has a deadline
        self.keep_house = lambda: None  # what else is to be done at each look
        ring, bell = socket.socketpair()
        self._ring, self._bell = Wire(ring, self), Wire(bell, self)
        self._bell.watch(READ, lambda bell, _: bell.receive())

    def start(self, steps, client=None):
        """Do what a generator says, until it ends."""
        self._guard(Task(self, steps, client).step, steps.send)

    def soon(self, act, *arguments):
        """Do something when what is going on now is over."""
        self._inbox.append((act, arguments))

    def call(self, act, *arguments):
        """Have the carrier's thread do something; any thread may call this."""
        self.soon(act, *arguments)
        with suppress(OSError):  # after its end, nobody listens
            self._ring.send(b"!")

    def perform(self, act, *arguments):
        """Have the carrier's thread do something, and wait until it is done, or the carrier closed."""
        done = threading.Event()
        self.call(act, *arguments)
        self.call(done.set)
        while not self._closed and not done.wait(0.1):
            pass

    def stop(self):
        """Cut what is left."""
        for thing in [*self.waiting]:
            self._guard(thing.stop)

    def close(self):
        self._closed = True

    def run(self):
        """Carry, until close()."""
        poll, wires, inbox = self.poll.poll, self.wires, self._inbox
        while not self._closed:
            ready = poll(0 if inbox else max(0, self.due - self.now), self.AT_ONCE)
            self.now = now = time.monotonic()
            for wire, events in [(wires[fd], events) for fd, events in ready]:
                act = wire.act
                try:
                    if act:  # else it was closed earlier in this round
                        act(wire, events)
                except Exception as bug:
                    wire.watch(0)
                    self._drop(act, bug)
            for act, arguments in [inbox.popleft() for _ in range(len(inbox))] if inbox else ():
                self._guard(act, *arguments)
            if now >= self.due:
                self._look()
        for wire in [*wires.values()]:
            wire.close()
        self.poll.close()

    def _look(self):
        """See whose time is up."""
        self.due = self.now + self.TICK
        self._guard(self.keep_house)
        for thing in [*self.waiting]:
            if self.now >= thing.deadline:
                self._guard(thing.expire)
            else:
                self.due = min(self.due, thing.deadline)

    def _guard(self, act, *arguments):
        try:
            act(*arguments)
        except Exception as bug:
            self._drop(act, bug)

    def _drop(self, act, bug):
        """Go on after a bug, without the connections that it struck."""
        self.log.event("error", "bug", f"the carrier dropped a connection: {describe(bug)}")
        thing = getattr(act, "__self__", None)
        for wire in (thing, getattr(thing, "client", None), getattr(thing, "wire", None)):
            if isinstance(wire, Wire):
                self.waiting.discard(thing)
                wire.close(abruptly=True)
        leave = getattr(thing, "_leave", None)
        if leave:
            leave()


def describe(bug):
    """Say where an exception that nobody expected came from, in one line."""
    step = bug.__traceback__
    while step.tb_next:
        step = step.tb_next
    return f"{type(bug).__name__}: {bug} (line {step.tb_lineno}, {step.tb_frame.f_code.co_name})"


class Client(Wire):
    """A client's wire, and what it does between two requests: wait, or go."""

    LINGER, LINGERERS = 1.0, 256  # seconds, and clients, that are heard out after a last answer, or before the end

    __slots__ = ("address", "deadline", "is_kept", "_server")

    def __init__(self, sock, address, server):
        super().__init__(sock, server.carrier)
        self.address, self.deadline, self.is_kept, self._server = address, FOR_EVER, False, server

    @property
    def is_idle(self):
        return self.ahead in (b"", b"\r", CRLF)  # RFC 9112, section 2.2: an empty line means nothing

    def listen(self, patience):
        """Wait for a request, for so many seconds, and then have it answered."""
        self.deadline = time.monotonic() + patience
        self.carrier.waiting.add(self)
        self.watch(READ, self.hear)

    def hear(self, *_):
        """It says something, or leaves."""
        if self.act != self.hear:
            return  # it was closed meanwhile
        if self.is_idle and self.look() is False:
            self.close()
        elif not self.is_idle:
            self.carrier.waiting.discard(self)
            if self.is_kept:  # the time that it was idle for is not the time for its head
                self.deadline = FOR_EVER
            self.carrier.start(self._server.RequestHandlerClass(self, self.address, self._server).answer(), self)

    def park(self, patience):
        """Wait for its next request, unless that is there already, or the proxy is about to stop."""
        self.is_kept = True
        if self._server.draining and self.is_idle and not self.look():
            return self.close()
        self.listen(patience)
        if not self.is_idle:
            self.carrier.soon(self.hear)

    def linger(self):
        """Close, but so that it can still read the last answer although it sends (RFC 9112, section 9.6)."""
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            return self.close()
        if len(self._server.lingering) >= self.LINGERERS:
            return self.close()
        self._server.lingering.add(self)
        self.carrier.start(self._hear_out(time.monotonic() + self.LINGER), self)

    def _hear_out(self, deadline):
        with suppress(TimeoutError, Stopped):
            while self.look() is not False:
                self.ahead = b""
                yield deadline, self, READ
        self.close()

    def close(self, abruptly=False):
        self.carrier.waiting.discard(self)
        self._server.lingering.discard(self)
        self._server.clients.discard(self)
        super().close(abruptly)

    expire = stop = close


class Mask:
    """Stars out the key where an upstream's error says it, be it in two pieces."""

    def __init__(self, key):
        self._key, self._part = key, b""

    def hide(self, data, last):
        data = (self._part + data).replace(self._key, b"*" * len(self._key))
        held = 0 if last else next(n for n in range(len(self._key) - 1, -1, -1) if data.endswith(self._key[:n]))
        self._part = data[len(data) - held:]
        return data[:len(data) - held]


class Exchange:
    """One answer on its way to a client: out of the upstream's framing, into the client's.

    `out` is what the client has not taken yet; while there is any, nothing more is read. `outcome` is set once the
    body has ended, one way or the other. An answer of the proxy's own has no upstream: it is all `out`.
    """

    TAIL, SHORT = 2048, 1024  # bytes kept of each of the last two pieces, to find token counts; short ones join
    FRAMING = re.compile(rb"\r\n[0-9A-Fa-f]+\r\n")

    __slots__ = ("client", "wire", "record", "out", "bytes_out", "chunked", "keep", "outcome", "deadline", "_answer",
                 "_decoder", "_leave", "_blocked", "_tail", "_before", "_silence", "_stall", "_mask", "_passes_chunks",
                 "_counts", "_carrier")

    def __init__(self, client, settings, keep, record=None):
        self.client, self.keep = client, keep  # whether the client's wire goes on after a whole answer
        self.record = record  # of an answer that is logged when it has ended
        self.wire = self.outcome = self._answer = self._decoder = self._mask = None
        self.out, self.bytes_out, self.chunked, self._blocked = b"", 0, False, None
        self.deadline, self._carrier = FOR_EVER, client.carrier
        self._silence, self._stall = settings.read_timeout or FOR_EVER, 4 * settings.client_timeout

    def reply(self, data):
        """Send an answer of the proxy's own."""
        self.out, self.outcome = data, "ok"
        self._flush()

    def begin(self, head, answer, mask, chunked, counts, leave):
        """Send the client the head of an upstream's answer, and its body as it comes; it may say token counts.

        `mask` is what an error must not say; `leave` is called when the upstream has done its part.
        """
        self.out, self._answer, self.chunked = head, answer, chunked
        self.wire, self._decoder, self._leave = answer.wire, answer.decoder, leave
        self._tail = self._before = b""
        self._counts = counts and answer.head.status < 400 and not answer.head.get("content-encoding")
        if mask and answer.head.status >= 300:
            self._mask = Mask(mask.encode())
        self._passes_chunks = chunked and self._decoder.size == CHUNKED and not self._mask
        data, self.wire.ahead = self.wire.ahead, b""
        if self._decoder.done:
            self._decoder.rest = data
            self._end()
        elif data:
            self._take(data)
        self._flush()

    def _from_upstream(self, wire, _):
        try:
            data = wire.receive()
        except OSError:  # a reset; or TLS without a goodbye, which may be a cut
            self.outcome = UpstreamLost.outcome
            return self._flush()
        if data is not None:
            self._take(data)
            self._flush()

    def _take(self, data):
        """Take bytes from the upstream; b"" is its end."""
        decoder = self._decoder
        try:
            if self._passes_chunks:
                size, out = decoder.follow(data)
            else:
                out = decoder.feed(data)
                if self._mask:
                    out = self._mask.hide(out, last=decoder.done or not data)
                size = len(out)
        except Malformed:
            self.outcome = UpstreamLost.outcome
            return
        if decoder.error:
            self.outcome = UpstreamLost.outcome
        self.bytes_out += size
        if len(self._tail) < self.SHORT:
            self._tail += out[-self.TAIL:]
        else:
            self._before, self._tail = self._tail, out[-self.TAIL:]
        if self.chunked and not self._passes_chunks:
            out = as_chunk(out) if out else b""
        self.out = self.out + out if self.out else out
        if decoder.done or not data:
            self._end()

    def _end(self):
        if not self._decoder.done and self._decoder.size != UNTIL_CLOSE:
            self.outcome = UpstreamLost.outcome
            return
        if self.chunked:
            self.out += CRLF if self._passes_chunks else b"0\r\n\r\n"
        self.outcome = "ok"

    def _flush(self):
        """Send what the client takes, and then listen to whichever side is to move."""
        out = self.out
        try:
            sent = self.client.sock.send(out) if out else 0
        except NOT_YET:
            sent = 0
        except OSError:
            return self.leave()
        blocked = sent < len(out)
        self.out = out[sent:] if blocked else b""
        if self.outcome:
            if not blocked:
                return self._finish(self.outcome)
            self._release()
        self.deadline = self._carrier.now + (self._stall if blocked else self._silence)
        if blocked != self._blocked:
            self._listen(blocked)

    def _listen(self, blocked):
        self._blocked = blocked
        self._carrier.waiting.add(self)
        self.client.watch(READ | WRITE if blocked else READ, self._from_client)
        if self.wire:
            self.wire.watch(0 if blocked else READ, self._from_upstream)

    def _from_client(self, client, events):
        if events & ~WRITE and client.has_left(events):
            self.leave()
        elif events & WRITE:
            self._flush()

    def leave(self):
        self.keep = False
        # OpenAI's SDKs hang up at [DONE], and do not wait for the chunks' end.
        said_all = self.record and not self.out and LAST_EVENT.search((self._before + self._tail).rstrip())
        self._finish("ok" if said_all else ClientLeft.outcome)

    def expire(self):
        self._finish(ClientLeft.outcome if self.out else Silent.outcome)

    def stop(self):
        self._finish(Stopped.outcome)

    def _release(self):
        """Have done with the upstream."""
        if self.wire:
            self.wire = None
            self._answer.release()
            if self._leave:
                leave, self._leave = self._leave, None
                leave()

    def _finish(self, outcome):
        """Account for the exchange, and let the client go on, or go."""
        client = self.client
        self._carrier.waiting.discard(self)
        self._release()
        if self.record:
            self.record.ended(outcome)
            self._account()
        if self.out or outcome != "ok":  # a plain close would end some bodies as if they were whole
            client.close(abruptly=bool(self.record) and not self.chunked and self._decoder.size < 0)
        elif self.keep:
            client.park(self._stall)
        else:
            client.linger()

    def _account(self):
        record, tail = self.record, self._before + self._tail
        tail = self.FRAMING.sub(b"", tail) if self._passes_chunks else tail
        if record.outcome == "ok" and (record.status >= 400 or ends_in_error(tail)):
            record.outcome = "error"
        if self._counts:
            record.tokens_in, record.tokens_out = token_counts(tail)
        record.bytes_out = self.bytes_out
        self._carrier.log.request(record)


# ---- Catalogue --------------------------------------------------------------
#
# All upstreams under one list of models, and whom to ask for one of them.


Attempt = namedtuple("Attempt", "upstream model")  # whom to ask, and for what; no model is None


class Catalogue:
    """The upstreams, in order of preference, and what they list."""

    PATIENCE = 0.3  # seconds that a list may delay those who want to know
    KEPT = 600.0  # seconds that a list is shown although its upstream gives no newer one

    def __init__(self, settings, carrier, old=()):
        self.settings, self._carrier, self.upstreams = settings, carrier, []
        desks = {upstream.name: upstream.desk for upstream in old}
        known = {(upstream.address, upstream.key): upstream for upstream in old}
        names = [address.name for address in settings.upstreams]
        for address in settings.upstreams:
            desk = desks.setdefault(address.name, Desk(carrier))
            upstream = known.pop((address, settings.key(address)), None) or Upstream(address, settings, carrier, desk)
            upstream.obey(settings, names.index(address.name))
            self.upstreams.append(upstream)
            desk.limit = settings.slots.get(address.name, FOR_EVER)
            desk.admit(upstream)
        for upstream in known.values():
            upstream.pool.close()
            upstream.desk.admit(upstream)
        self.is_alone = len(self.upstreams) == 1
        if self.is_alone:
            self.attempts = remembered(self.attempts)  # which then depend on no list
        else:
            carrier.soon(self._ask, "/api/tags", self.upstreams)

    # What there is:

    def look(self, path, upstreams, patience, enough=lambda: False):
        """Have upstreams asked for a list, and wait for so many seconds until all have answered, or it is enough."""
        task, left, deadline = self._carrier.current, {*upstreams}, time.monotonic() + patience

        def seen(upstream):
            if upstream in left:  # else nobody waits for it any more
                left.remove(upstream)
                self._carrier.soon(task.wake, task.ticket)

        self._ask(path, upstreams, seen)
        try:
            with suppress(TimeoutError):
                while left and not enough():
                    yield (deadline,)
        finally:
            left.clear()

    @staticmethod
    def _ask(path, upstreams, seen=lambda upstream: None):
        for upstream in upstreams:
            upstream.look(path, partial(seen, upstream))

    def is_reachable(self):
        """Whether a connection to any was made, or found open, in the last seconds, or can be now; asks nothing."""
        def is_known():
            return any(upstream.reachable for upstream in self.upstreams if upstream.seen_at > oldest)

        oldest = time.monotonic() - Upstream.FRESH
        stale = [upstream for upstream in self.upstreams if upstream.seen_at <= oldest]
        if stale and not is_known():
            yield from self.look("", stale, self.settings.connect_timeout, is_known)
        return is_known()

    def refresh(self):
        """See to it that what is known is new enough to find the way by."""
        now = time.monotonic()
        ages = {upstream: now - upstream.looked_at for upstream in self.upstreams if not upstream.rests()}
        late = [upstream for upstream, age in ages.items() if (  # who is asked already may not answer at all
            age < self.PATIENCE and upstream.models is None if upstream.is_asked else age > upstream.FRESH)]
        self._ask("/api/tags", [upstream for upstream, age in ages.items() if age > upstream.FRESH / 2])
        if late:
            yield from self.look("/api/tags", late, self.PATIENCE)

    def union(self, path):
        """Return ({model_key(name): entry}, the list as JSON) over all upstreams and aliases; None if none is known."""
        def is_known():
            return any(path in upstream.lists and upstream.lists[path][0] > oldest for upstream in self.upstreams)

        began = time.monotonic()
        oldest = began if path == "/api/ps" else began - self.KEPT
        self._ask("/api/tags", [upstream for upstream in self.upstreams if upstream.is_ollama is False and not (
            upstream.rests() or began - upstream.looked_at < upstream.FRESH / 2)])  # it may have become one
        able = self.able(path)
        asked = [upstream for upstream in able if not upstream.rests()] or able
        yield from self.look(path, asked, self.PATIENCE)
        if not is_known():  # else who is late does not matter
            yield from self.look(path, asked, self.settings.connect_timeout, is_known)
        lists = [(upstream, upstream.lists[path][1]) for upstream in self.upstreams
                 if path in upstream.lists and upstream.lists[path][0] > oldest]
        if not lists:
            return None
        count = sum(len(listing.entries) for _, listing in lists)
        return (yield from aside(self._carrier, count < 100, None, self._merge, path, lists))

    def _merge(self, path, lists):
        """Merge [(upstream, Listing)]. May run in a thread of its own."""
        found, entries = {}, {}
        for upstream, listing in lists:
            for name, entry in listing.entries:
                entries[upstream, model_key(name)] = entry
                if upstream.address.is_cloud and not self.is_alone:
                    name = cloud_name(name)
                    entry = renamed(path, entry, name)
                found.setdefault(model_key(name), entry)
        for alias, name in self.settings.aliases.items():
            entry = next(filter(None, (entries.get((upstream, model_key(model)))
                                       for upstream, model in self._able(name, path))), None)
            if entry:
                found[alias] = renamed(path, entry, alias)
        document = next((listing.document for _, listing in lists if listing.document), {})
        return found, json.dumps({**document, NAME_KEYS[path][0]: [*found.values()]}).encode()

    # Whom to ask:

    def attempts(self, name, path, chained=False):
        """The attempts to make for a model, one after the other, each once; raises Refused."""
        meant, found = self.settings.meant(name), []
        for number, one in enumerate(self.settings.chain(meant) if chained else [meant]):
            found += self._able(one, path) if self.is_alone else (
                self.candidates(one, path) or self._guess(one, path, unless_known=number > 0))
        if split_source(meant)[1] == "local":  # which goes for its chain, too
            found = [attempt for attempt in found if not attempt.upstream.address.is_cloud]
        if not found:
            raise Refused(f"no upstream here can have the model {printable(name)}", 404)
        return [*dict.fromkeys(found)]

    def unnamed(self, path, again):
        """The attempts for no model: at the first upstream, and at its copies if the body can be sent `again`."""
        able = self._able(None, path)
        return [attempt for attempt in able if attempt.upstream.name == able[0].upstream.name] if again else able[:1]

    def manager(self, name, path):
        """The attempt at who is managed: the first Ollama of one's own, else the cloud; raises Refused."""
        able = self._able(self.settings.meant(name) if name else None, path)
        if not able:
            raise Refused(f"no upstream here can have the model {printable(name)}", 404)
        return [min(able, key=lambda attempt: attempt.upstream.address.is_cloud)]

    def candidates(self, name, path):
        """The attempts at upstreams that list a model. A bare name goes to the cloud if nobody else has it."""
        found = [Attempt(upstream, upstream.has(model)) for upstream, model in self._able(name, path)]
        found = [attempt for attempt in found if attempt.model]
        own = [attempt for attempt in found if not attempt.upstream.address.is_cloud]
        return found if split_source(name)[1] else own or found

    def _guess(self, name, path, unless_known=False):
        """The attempt at the first that could have a model which nobody lists, e.g. as it was pulled a second ago."""
        is_cloud = split_source(name)[1] == "cloud"
        able = sorted(self._able(name, path), key=lambda attempt: is_cloud and not attempt.upstream.address.is_cloud)
        able = [attempt for attempt in able if is_cloud or not unless_known or attempt.upstream.models is None]
        return [attempt for attempt in able if attempt.upstream.name == able[0].upstream.name]  # with its copies

    def _able(self, name, path):
        """The attempts at all upstreams that could have a model, under the name that it has there; None is no model."""
        bare, source = split_source(name) if name else (None, "")
        return [Attempt(upstream, bare if upstream.address.is_cloud or source == "local" else name)
                for upstream in self.able(path) if source != "local" or not upstream.address.is_cloud]

    def able(self, path):
        """The upstreams that have such a path, in order of preference; of copies the less busy ones first."""
        if self.is_alone:
            return self.upstreams
        able = [upstream for upstream in self.upstreams
                if upstream.is_ollama is not False or not path.startswith("/api/")]
        if not able:
            raise Refused("no upstream here speaks Ollama's own API, but OpenAI's: ask below /v1", 404)
        return sorted(able, key=lambda upstream: (upstream.rank, upstream.busy))


# ---- Handler ----------------------------------------------------------------

OWN_VERSION = "0.33.0"  # of the Ollama API; what an upstream without /api/version is said to have
JSON_TYPE, TE_CHUNKED = "Content-Type: application/json\r\n", "Transfer-Encoding: chunked\r\n"
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


@remembered
def given_id(head):
    """The request's id, if its sender gave it a sane one."""
    return head.get("x-request-id") if REQUEST_ID.fullmatch(head.get("x-request-id")) else None


@remembered
def check_request(head, own_name):
    """Refuse what no proxy should do for anybody."""
    if head.method in ("CONNECT", "TRACE"):
        raise Refused(f"{head.method} is not for this proxy", 405, [("Allow", "GET, HEAD, POST, PUT, DELETE")])
    if own_name in head.joined("via"):
        raise Refused("this request has come from this proxy itself: PROXY_UPSTREAMS names it as its upstream", 508)
    if head.get("expect").lower() not in ("", "100-continue"):
        raise Refused("the only expectation met here is 100-continue", 417)


@remembered
def sender_lines(head, address, trusts, via):
    """The header lines that say whom a request comes from: this address, which if one `trusts` it speaks for others."""
    chain = head.all("x-forwarded-for") if trusts else ()
    host = trusts and head.get("x-forwarded-host") or head.get("host")
    return (f"Via: 1.1 {via}\r\nX-Forwarded-For: {', '.join((*chain, address))}\r\n"
            f"X-Forwarded-Proto: {trusts and head.get('x-forwarded-proto') or 'http'}\r\n"
            + (f"X-Forwarded-Host: {host}\r\n" if host else ""))


class Handler:
    """What is done for one request, until an exchange takes over: made when a client speaks, done by a task."""

    STRANGERS_BODY = 64 * 1024  # bytes that go up for a client without a token
    OWN_PAGES = {"/": (200, b"Ollama is running", "Content-Type: text/plain; charset=utf-8\r\n"),
                 "/-/health": (200, b'{"status": "ok"}', JSON_TYPE), "/-/ready": None}

    def __init__(self, client, address, server):
        self.client, self.server, self.record = client, server, Record(address)
        # What this request goes by from its start to its end, whatever is read again meanwhile.
        self.settings, self.doorman, self.catalogue = server.settings, server.doorman, server.catalogue
        self.head, self.target, self.upload, self.cors = None, None, None, self.doorman.cors_unseen
        self.is_stranger = False  # who is served without a token although there are tokens
        self.path, self.infers = "", False  # what is asked of the upstream, and whether it is to infer
        self.body = self.named = None  # its body, if that was held, and the model that it names, a Named
        self.failure = None  # of the last upstream that gave no answer

    def answer(self):
        """Answer one request. The one place where an exception meets the client."""
        try:
            yield from self.read_head()
            page = yield from self.own_page()
            if not page and self.head.method in SAFE:
                page = yield from self.list_page()
            if page:
                self.reply(*page)
            elif self.path == "/api/version":
                yield from self.give_version()
            else:
                yield from self.relay()
        except Failure as failure:
            self.refuse(failure)
        except Exception as bug:
            self.server.log.event("error", "bug", describe(bug))
            if self.record.status is not None:  # something has gone out already
                self.server.log.request(self.record.ended("error"))
                return self.client.close(abruptly=True)
            self.refuse(Failure("the proxy has a bug; its log says where"))

    # What the request is:

    def read_head(self):
        """Read the head and decide who asks for what; raises a Failure."""
        settings, client, record = self.settings, self.client, self.record
        try:
            block = yield from next_head(client, min(time.monotonic() + settings.client_timeout, client.deadline))
        except TimeoutError:
            raise Refused("the head of the request took too long", 408) from None
        except (OSError, EOFError) as error:
            raise ClientLeft("the client left before its request was whole") from error
        head = self.head = parse_request(block)
        record.method = head.method[:40]
        record.id = given_id(head) or record.id
        self.cors = self.doorman.cors(head)
        check_request(head, self.server.name)  # before there is an upload: such a connection is not kept
        self.upload = Upload(client, head.size, bool(head.version and head.get("expect")), settings.client_timeout)
        target = "/" if (head.method, head.target) == ("OPTIONS", "*") else head.target
        self.target = parse_target(target, settings.prefix)
        self.path, record.path = self.target.path, self.target.shown
        self.infers = head.method == "POST" and self.path in INFERENCE
        if settings.trusted:
            record.client = client_address(client.address, head.joined("x-forwarded-for"), settings.trusted)

    def own_page(self):
        """Let the doorman look; return (status, body, header lines) of an own page, else None."""
        head, target = self.head, self.target
        self.doorman.check_place(head)
        if head.method == "OPTIONS":
            return 204, b"", preflight(head)
        reads = head.method in ("GET", "HEAD")
        if target.is_own:
            if target.path not in self.OWN_PAGES:
                raise Refused(f"there is no page {printable(target.shown)} here", 404)
            if not reads:
                raise Refused("this page is only to be read", 405, [("Allow", "GET, HEAD")])
            return self.OWN_PAGES[target.path] or (yield from self.page_ready())
        is_open = target.path == "/api/version" and reads or (
            self.settings.public_models and f"{head.method} {target.path}" in LISTS)
        try:
            self.record.caller = self.doorman.admit(head, target)
        except Refused:
            if not is_open:
                raise
            self.is_stranger = True
        if target.manages and not self.settings.manage:
            raise Refused("models and the owner's account are not managed through this proxy; PROXY_MANAGE=on lets "
                          "clients", 403)
        return None

    def page_ready(self):
        reachable = not self.server.draining and (yield from self.catalogue.is_reachable())
        status = "ok" if reachable else "draining" if self.server.draining else "no upstream can be reached"
        return 200 if reachable else 503, json.dumps({"status": status}).encode(), JSON_TYPE

    def list_page(self):
        """Return (status, body, header lines, outcome) of a list over all upstreams, None if one alone can tell."""
        path, aliases, alone = self.path, self.settings.aliases, self.catalogue.is_alone
        name = model_asked_for(path)
        path = path if name is None else OPENAI_LIST
        if path not in NAME_KEYS:
            return None
        if alone and (model_key(name) not in aliases if name else not aliases or path == "/api/ps"):
            return None
        found, body = (yield from self.catalogue.union(path)) or (None, None)
        if found is None and not alone:
            raise Unreachable("; ".join(["no upstream has given this list in the last ten minutes", *dict.fromkeys(
                upstream.trouble for upstream in self.catalogue.upstreams if upstream.trouble)]))
        if found is not None and name is not None:
            bare, source = split_source(name)
            keys = [model_key(bare)] if source == "local" else [model_key(name), cloud_name(bare)]
            entry = next((found[key] for key in keys if key in found), None)
            if not entry:
                raise Refused(f"no upstream here lists the model {printable(name)}", 404)
            body = json.dumps(entry).encode()
        return None if found is None else (200, body, JSON_TYPE, "ok")

    # What goes up:

    def hold_body(self):
        """Read the body if it may name a model, and look for the name."""
        head, settings, carrier = self.head, self.settings, self.server.carrier
        if not (self.infers or self.is_stranger or self.names_a_model()):
            return
        body = self.body = yield from self.upload.whole(self.STRANGERS_BODY if self.is_stranger else settings.max_body)
        if head.get("content-encoding").lower() not in ("", "identity"):
            self.record.note = "the body is compressed, and the model that it names unknown"
            return
        keys, quick = ("model", "name") if self.path in NAMING else ("model",), len(body) < LONG
        self.named = named_model(body, keys) if quick else (
            yield from aside(carrier, False, None, named_model, body, keys))
        if self.named:
            self.record.model = self.named.model[:200]
        if self.path == "/embeddings":
            is_openai = "input" in (yield from aside(carrier, quick, None, members, body, ("input",)))
            self.path = "/v1/embeddings" if is_openai else "/api/embeddings"

    def names_a_model(self):
        """Whether the body of what is no inference call is held all the same: for a name, or to be sent again."""
        head, path = self.head, self.path
        if path == "/api/version" or path in NAMING and head.method in ("POST", "DELETE"):
            return True
        is_json = head.method == "POST" and not self.target.manages and "json" in head.get("content-type").lower()
        return is_json and bool(self.settings.aliases or not self.catalogue.is_alone)

    def relay(self):
        """Ask whoever can answer, one after the other, and send an answer on its way to the client."""
        yield from self.hold_body()
        if not self.catalogue.is_alone:
            yield from self.catalogue.refresh()
        attempts, last = self.attempts(), None
        awake = [attempt for attempt in attempts if not attempt.upstream.rests(attempt.model)]
        left = awake or [*attempts]
        try:
            while left:
                attempt, leave = self.slot(left) or (yield from self.queue(left, bool(last)))
                if not attempt:
                    break
                left.remove(attempt)
                answer = yield from self.ask(attempt, leave)
                if answer and answer.head.status not in TRY_NEXT:
                    return self.give(answer, attempt, leave)
                if answer and last:
                    last[0].release()
                last = (answer, attempt) if answer else last
                if awake:
                    left = [attempt for attempt in left if not attempt.upstream.rests(attempt.model)]
            if not last:
                raise self.failure
            given, last = last, None
            self.give(*given)
        finally:
            if last:
                last[0].release()

    def attempts(self):
        """Whom to ask for what, the best first; raises Refused."""
        catalogue, path, name = self.catalogue, self.path, self.named and self.named.model
        if self.target.manages:
            return catalogue.manager(name, path)
        asked = model_asked_for(path)
        if asked is None and name:
            return catalogue.attempts(name, path, path not in NAMING)
        if asked is None:
            return catalogue.unnamed(path, self.body is not None)
        upstream, model = catalogue.attempts(asked, path)[0]
        self.path = path if model == asked else f"{OPENAI_LIST}/{quote(model)}"
        return [Attempt(upstream, None)]

    def slot(self, left):
        """Take a slot for the first attempt that needs not wait for one; return (attempt, how to leave), or None."""
        if self.head.method != "POST" or self.target.manages or self.path in ("/api/show", "/api/me"):
            return left[0], lambda: None
        for attempt in left:
            if attempt.upstream.busy < attempt.upstream.desk.limit:
                attempt.upstream.busy += 1
                return attempt, partial(attempt.upstream.desk.leave, attempt.upstream, time.monotonic())
        return None

    def queue(self, left, has_answer):
        """Wait for a slot for the first attempt, at whichever copy; return (attempt, how to leave), or raise Refused.

        If an answer is at hand that was to be bettered, no slot is (None, None).
        """
        (first, model), patience, began = left[0], self.settings.queue_timeout, time.monotonic()
        copies = [other.upstream for other in left if other.upstream.desk is first.desk and other.model == model]
        try:
            copy = yield from first.desk.wait(self.record.caller or self.record.client, copies, began + patience)
        except TimeoutError:
            if has_answer:
                return None, None
            wait = min(max(1, round(first.desk.wait_expected(len(copies), patience))), 3600)
            raise Refused(f"all slots of upstream {first.name} (PROXY_SLOTS) were taken for {patience:g} seconds "
                          "(PROXY_QUEUE_TIMEOUT)", 503, [("Retry-After", str(wait))]) from None
        finally:
            now = time.monotonic()
            self.record.queue_ms = round((self.record.queue_ms or 0) + (now - began) * 1000, 3)
        return Attempt(copy, model), partial(first.desk.leave, copy, now)

    def ask(self, attempt, leave=lambda: None, patience=None):
        """Ask one upstream, under the name that it has for the model; return its Answer, or None: see `failure`.

        Unless its answer is the client's, `leave` is called.
        """
        head, upload, body, named, (upstream, model) = self.head, self.upload, self.body, self.named, attempt
        if named and model not in (None, named.model):
            body = with_model(body, named, model)
        size = head.size if body is None or head.size is None and not self.infers else len(body)
        try:
            answer = yield from upstream.ask(head.method, self.path + self.target.query, self.lines_up(size),
                                             body or b"", None if upload.decoder.done else upload, patience)
        except BaseException as failure:
            leave()
            if isinstance(failure, Failure):
                self.record.attempted(upstream.name, model, None, failure.outcome)
            if not isinstance(failure, (Unreachable, UpstreamLost, Silent)):
                raise
            self.failure = failure
            return None
        status = answer.head.status
        self.record.attempted(upstream.name, model, status, "ok" if status < 400 else "error")
        if status in TRY_NEXT:
            leave()
            if status == 401:
                self.server.log.complain(f"key {upstream.name}", f"upstream {upstream.name} answers 401: it "
                                         f"{'refuses the' if upstream.key else 'wants a'} key, {upstream.key_name}")
            if status == 429 and model:
                upstream.heed(model, answer.head.get("retry-after"))
        return answer

    def lines_up(self, size):
        """The header lines of the request, but for the upstream's own Host and key; `size` is that of its body."""
        head, address = self.head, self.client.address
        length = "" if size is None else TE_CHUNKED if size == CHUNKED else f"Content-Length: {size}\r\n"
        return (fields_up(head, self.infers) + length + f"X-Request-Id: {self.record.id}\r\n"
                + sender_lines(head, address, is_trusted(address, self.settings.trusted), self.server.name))

    # What comes down:

    def give(self, answer, attempt, leave=None):
        """Send the answer's head and what of its body is there; the rest is the exchange's, and then `leave()` due."""
        head, record, upstream, size = answer.head, self.record, attempt.upstream, answer.decoder.size
        chunked = size < 0 and self.head.version == 1
        keep = self.keeps() and (chunked or size >= 0)
        framing, reason = "", head.reason
        if chunked:
            framing = TE_CHUNKED
        elif size >= 0 and head.get("content-length") and head.status != 204:
            framing = f"Content-Length: {head.get('content-length')}\r\n"
        record.answered(head.status)
        record.bytes_in = self.upload.received
        if upstream.mask and upstream.mask in reason:
            reason = ""
        data = head_bytes(f"HTTP/1.1 {head.status} {reason}\r\n", fields_down(head, upstream.mask) + framing
                          + self.closing_lines(keep) + f"X-Proxy-Upstream: {upstream.name}\r\n"
                          + (f"X-Proxy-Model: {in_a_header(attempt.model)}\r\n" if attempt.model else "")
                          + f"X-Proxy-Attempts: {len(record.attempts)}\r\nX-Accel-Buffering: no\r\n")
        record.upstream, record.model_sent = upstream.name, attempt.model
        exchange = Exchange(self.client, self.settings, keep, record)
        exchange.begin(data, answer, upstream.mask, chunked, self.infers, leave)

    def give_version(self):
        """Relay the version of the first upstream that has one; where none has, say one that clients accept."""
        yield from self.hold_body()
        catalogue = self.catalogue
        for upstream in sorted(catalogue.upstreams, key=lambda upstream: upstream.models is None):
            if not catalogue.is_alone and (upstream.rests() or upstream.is_ollama is False):
                continue
            patience = None if catalogue.is_alone else 3 * catalogue.PATIENCE
            answer = yield from self.ask(Attempt(upstream, None), patience=patience)
            if answer and answer.head.status == 200:
                return self.give(answer, Attempt(upstream, None))
            if answer:
                answer.release()
        self.record.upstream = None
        self.reply(200, json.dumps({"version": OWN_VERSION}).encode(), JSON_TYPE, "ok")

    def keeps(self):
        return self.head.keeps and self.upload.decoder.done and not self.server.draining

    def closing_lines(self, keep):
        """The lines that every answer has."""
        connection = "" if keep and self.head.version else f"Connection: {'keep-alive' if keep else 'close'}\r\n"
        return f"X-Request-Id: {self.record.id}\r\n{self.cors}{connection}"

    def reply(self, status, body, lines, outcome=None):
        """Send an answer of the proxy's own; with an outcome, it has a line in the log."""
        keep = bool(self.upload and self.upload.skip()) and self.keeps()
        lines += f"Date: {formatdate(usegmt=True)}\r\nCache-Control: no-store\r\n{self.closing_lines(keep)}"
        if status != 204:
            lines += f"Content-Length: {len(body)}\r\n"
        if self.head and self.head.method == "HEAD":
            body = b""
        if outcome:
            self.record.answered(status)
            self.record.bytes_out = len(body)
            self.server.log.request(self.record.ended(outcome))
        data = head_bytes(f"HTTP/1.1 {status} {REASONS.get(status, '')}\r\n", lines) + body
        Exchange(self.client, self.settings, keep).reply(data)

    def refuse(self, failure):
        """End the request with an error in the dialect of its path; own pages have no line in the log."""
        record, path = self.record, self.target.path if self.target else ""
        record.bytes_in = self.upload.received if self.upload else 0
        if isinstance(failure, ClientLeft) or isinstance(failure, Stopped) and not self.head:  # there is nobody to tell
            if self.head and not (self.target and self.target.is_own):
                self.server.log.request(record.ended(failure.outcome))
            return self.client.close()
        lines = JSON_TYPE + "".join(f"{name}: {value}\r\n" for name, value in failure.headers)
        lines += f"X-Proxy-Attempts: {len(record.attempts)}\r\n" if record.attempts else ""
        self.reply(failure.status, error_body(path, failure.status, str(failure), record.id), lines,
                   None if self.target and self.target.is_own else failure.outcome)


# ---- Server -----------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Listens, has requests answered, and knows who is there.

    A request is a task of the carrier's, not a thread: those would hand the interpreter's lock over at every system
    call, which costs several times what the call and the decision do.
    """

    request_queue_size = 1024
    allow_reuse_port = False
    AT_ONCE = 64  # clients that are let in before others have their turn

    def __init__(self, settings, log):
        self.log, self.carrier, self.catalogue = log, Carrier(log), None
        self.draining, self.clients, self.lingering = False, set(), set()
        self.name = "ollama_proxy-" + os.urandom(4).hex()  # by which it knows its own requests
        if ":" in settings.host:
            self.address_family = socket.AF_INET6
        super().__init__((settings.host, settings.port), Handler)
        self._door = Wire(self.socket, self.carrier)
        self.adopt(settings)

    @property
    def url(self):
        host, port = self.server_address[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def server_bind(self):
        TCPServer.server_bind(self)  # HTTPServer's asks DNS for this host's name, which can take long

    def adopt(self, settings):
        """Obey settings from the next request on."""
        self.settings, self.doorman = settings, Doorman(settings)
        self.catalogue = Catalogue(settings, self.carrier, self.catalogue.upstreams if self.catalogue else ())
        if not raise_file_limit(settings.max_connections):
            self.log.complain("limit", f"too few descriptors for {settings.max_connections} clients, and for "
                              "upstreams (PROXY_MAX_CONNECTIONS): raise the hard limit, LimitNOFILE in a systemd unit")

    # The carrier's thread:

    def serve_forever(self, poll_interval=None):
        """Be the carrier's thread until shutdown(); `poll_interval` is for the base class's callers."""
        self.keep_house()
        self.carrier.keep_house = self.keep_house
        self.carrier.run()

    def keep_house(self):
        """What is due now and then."""
        for upstream in self.catalogue.upstreams:
            upstream.pool.prune()
        if not self.draining:
            self._door.watch(READ, self._knock)

    def _knock(self, *_):
        """Let in some of those who wait; whether more may be waiting."""
        for _ in range(self.AT_ONCE):
            try:
                self.process_request(*self.get_request())
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):  # keep_house() tries again
                    self.log.complain("limit", f"no descriptors for clients are left ({error.strerror}): raise "
                                      "LimitNOFILE")
                    self._door.watch(0)
                    return False
        return True  # an error of another kind is of a client who has left already

    def process_request(self, request, client_address):
        """Let a new client in, or say that there are too many."""
        address = client_address[0].partition("%")[0]
        client = Client(request, address[7:] if address.startswith("::ffff:") else address, self)  # IPv4 on either
        if len(self.clients) < self.settings.max_connections:
            self.clients.add(client)
            client.listen(client.LINGER if self.draining else self.settings.client_timeout)
            return client.hear()
        self.log.complain("limit", f"over {self.settings.max_connections} clients (PROXY_MAX_CONNECTIONS): some "
                          "get 503")
        body = error_body("", 503, "too many clients are connected to the proxy", None)
        client.send(head_bytes("HTTP/1.1 503 Service Unavailable\r\n", (
            f"{self.doorman.cors_unseen}{JSON_TYPE}Retry-After: 1\r\nConnection: close\r\n"
            f"X-Request-Id: {Record(address).id}\r\nContent-Length: {len(body)}\r\n")) + body)
        client.linger()

    # The main thread:

    def reload(self, environ):
        """Read the settings again; bad ones change nothing."""
        try:
            settings, warnings = Settings.load(environ)
            if (settings.host, settings.port) != (self.settings.host, self.settings.port):
                warnings.append("PROXY_HOST and PROXY_PORT change with a restart only")
                settings.host, settings.port = self.settings.host, self.settings.port
                settings.judge()  # what may be said on the new host need not do on the old one
            self.log.reopen(settings.log, settings.log_format)
        except (ValueError, OSError) as error:
            words = f"PROXY_LOG: {error}" if isinstance(error, OSError) else str(error)
            for line in words.splitlines():
                self.log.event("error", "reload", f"the old settings stay: {line}")
            return
        self.carrier.perform(self.adopt, settings)
        for words in warnings:
            self.log.event("warning", "settings", words)
        self.log.event("info", "reload", f"the settings have been read again; it is {settings.purpose}")

    def drain(self, seconds):
        """Let in those who have knocked, and no more; let requests end for so long, then cut what is left."""
        for patience, then in (seconds, self._close_door), (1, self.carrier.stop):  # a second for the last words
            self.carrier.perform(then)
            deadline = time.monotonic() + patience
            while self.clients and time.monotonic() < deadline:
                time.sleep(0.02)
        self.shutdown()

    def _close_door(self):
        self.draining = True
        for client in [*self.clients]:
            client.hear()  # what it has said already is answered
            if client.act == client.hear and client.is_idle:
                client.close()
        for _ in range(self.request_queue_size // self.AT_ONCE + 1):
            if not self._knock():  # a plain close would reset those who still wait
                break
        self._door.close()

    def shutdown(self):
        """End serve_forever()."""
        self.carrier.perform(self.carrier.close)


def raise_file_limit(clients):
    """Have descriptors for every client and its upstream; whether the system's hard limit allows for so many."""
    (soft, hard), wanted = resource.getrlimit(resource.RLIMIT_NOFILE), 2 * clients + Client.LINGERERS + 64
    try:
        if 0 <= soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard < 0 else min(wanted, hard), hard))
    except (OSError, ValueError):  # a system with another limit yet
        return False
    return not 0 <= hard < wanted


# ---- Command line -----------------------------------------------------------


class Echo(BaseHTTPRequestHandler):
    """An upstream of the demo: models that say the prompt back, word by word, in three dialects.

    Its server has `models`, their names, and `is_ollama`, whether it speaks Ollama's own API, too.
    """

    disable_nagle_algorithm = True

    def log_message(self, *args):
        """The proxy in front keeps the log."""

    def do_GET(self):
        details = {"format": "", "family": "echo", "parameter_size": "0B", "quantization_level": ""}
        listed = [{"name": name, "model": name, "modified_at": "2026-01-01T00:00:00Z", "size": 0, "digest": name,
                   "details": details} for name in self.server.models]
        pages = {"/v1/models": {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "demo"}
                                                           for name in self.server.models]}}
        if self.server.is_ollama:
            pages.update({"/api/tags": {"models": listed}, "/api/ps": {"models": []},
                          "/api/version": {"version": OWN_VERSION},
                          "/api/show": {"details": details, "model_info": {}, "capabilities": ["completion"]}})
        page = pages.get(self.path, {"error": "there is no such page"})
        self.send(200 if self.path in pages else 404, [json.dumps(page)])

    do_HEAD = do_GET

    def do_POST(self):
        try:
            asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
            said = asked["messages"][-1]["content"] if "messages" in asked else asked.get("prompt", "")
            said = said if isinstance(said, str) else " ".join(part.get("text", "") for part in said)
        except (ValueError, AttributeError, LookupError, TypeError):
            return self.send(400, ['{"error": "expected a JSON object with a prompt or messages"}'])
        dialect = {"/api/chat": self.native, "/api/generate": self.native, "/v1/chat/completions": self.openai,
                   "/v1/messages": self.anthropic}.get(self.path)
        if not dialect or dialect == self.native and not self.server.is_ollama:
            return self.do_GET()
        self.model = {"model": asked.get("model", self.server.models[0])}
        if model_key(str(self.model["model"])) not in map(model_key, self.server.models):
            return self.send(404, [json.dumps({"error": f"model {self.model['model']!r} not found"})])
        whole, events = dialect(said, re.findall(r"\S*\s*", said)[:-1])
        if asked.get("stream", dialect == self.native):
            self.send(200, events, "application/x-ndjson" if dialect == self.native else "text/event-stream", 0.05)
        else:
            self.send(200, [json.dumps(whole)])

    def native(self, said, words):
        def piece(text, **more):
            chat = {"message": {"role": "assistant", "content": text}}
            said = chat if self.path == "/api/chat" else {"response": text}
            return {**self.model, "created_at": timestamp(time.time()), **said, **more}

        last = {"done": True, "done_reason": "stop", "prompt_eval_count": len(words), "eval_count": len(words)}
        events = [piece(word, done=False) for word in words] + [piece("", **last)]
        return piece(said, **last), [json.dumps(event) + "\n" for event in events]

    def openai(self, said, words):
        def piece(kind, usage=None, **choice):
            return {"id": "chatcmpl-demo", "object": kind, "created": int(time.time()), **self.model, "usage": usage,
                    "choices": [{"index": 0, "finish_reason": None, **choice}]}

        usage = {"prompt_tokens": len(words), "completion_tokens": len(words), "total_tokens": 2 * len(words)}
        events = [piece("chat.completion.chunk", delta={"role": "assistant", "content": word}) for word in words]
        events.append(piece("chat.completion.chunk", usage, delta={}, finish_reason="stop"))
        whole = piece("chat.completion", usage, message={"role": "assistant", "content": said}, finish_reason="stop")
        return whole, [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"]

    def anthropic(self, said, words):
        usage = {"input_tokens": len(words), "output_tokens": len(words)}
        whole = {"id": "msg_demo", "type": "message", "role": "assistant", **self.model, "stop_reason": "end_turn",
                 "stop_sequence": None, "usage": usage, "content": [{"type": "text", "text": said}]}
        events = [{"type": "message_start", "message": {**whole, "content": [], "stop_reason": None}},
                  {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}]
        events += [{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}}
                   for word in words]
        events += [{"type": "content_block_stop", "index": 0},
                   {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage},
                   {"type": "message_stop"}]
        return whole, [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events]

    def send(self, status, pieces, kind="application/json", pause=0.0):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        for piece in pieces if self.command != "HEAD" else ():
            self.wfile.write(piece.encode())
            time.sleep(pause)


def start(settings):
    """Listen, and serve in a thread of its own; returns the Server, or exits when log or port cannot be had."""
    try:
        log = Log(settings.log, settings.log_format)
    except (OSError, ValueError) as error:
        sys.exit(fail(f"PROXY_LOG={settings.log!r}: {getattr(error, 'strerror', error)}", 2))
    gc.freeze()  # what is loaded stays: the collector need not go through it again and again
    gc.set_threshold(50_000, 20, 50)  # nor look at what a thousand lines leave behind for a moment
    sys.setswitchinterval(0.0005)  # seconds that the carrier waits for a thread which looks through a long body
    try:
        server = Server(settings, log)
    except OSError as error:
        place = f"{settings.host} port {settings.port}"
        if error.errno == errno.EADDRINUSE:
            words = f"{place} is taken, perhaps by an Ollama or another proxy; set PROXY_PORT to another port"
        else:
            words = f"cannot listen on {place}: {error.strerror or error}; set PROXY_HOST and PROXY_PORT"
        sys.exit(fail(words))
    threading.Thread(target=carry, args=(server,), name="carrier", daemon=True).start()
    if any(address.scheme == "https" for address in settings.upstreams):
        threading.Thread(target=tls_context, name="certificates", daemon=True).start()
    return server


def carry(server):
    """Be the carrier; should it die, so does the proxy, and whoever watches over it starts it again."""
    try:
        server.serve_forever()
    except BaseException as bug:
        server.log.event("error", "bug", f"the carrier has died: {describe(bug)}")
        server.log.close()
        os._exit(1)


# Blocked before there are threads, they wait for run(); process 1 of a container gets no others.
SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def run(server, environ):
    """Live until a signal says otherwise; returns the exit status."""
    while signal.sigwait(SIGNALS) == signal.SIGHUP:
        server.reload(environ)
    for second in signal.SIGTERM, signal.SIGINT:
        signal.signal(second, lambda number, frame: os._exit(128 + number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS - {signal.SIGHUP})
    drain = server.settings.drain
    server.log.event("info", "stop", f"no more clients; answers may go on for {drain:g} seconds (PROXY_DRAIN)")
    server.drain(drain)
    server.log.event("info", "stop", "bye")
    server.log.close()
    return 0


def fail(words, status=1):
    """Tell a person what is wrong, a line each, and return the exit status."""
    for line in words.splitlines():
        print(f"ollama_proxy: {line}", file=sys.stderr)
    return status


def serve(environ):
    """Serve until stopped."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    settings, warnings = Settings.load(environ)
    server = start(settings)
    for words in warnings:
        server.log.event("warning", "settings", words)
    server.log.event("info", "start", f"ollama_proxy {__version__} listens on {server.url} {settings.purpose}")
    return run(server, environ)


# What the demo serves: a GPU box's Ollama, a vLLM and the cloud, with models that echo, as in the README's recipe.
DEMO = {"local": ("echo", "llama3.1:latest"), "vllm": ("qwen-coder-vllm",), "cloud": (
    "deepseek-v3.1:671b", "qwen3-coder:480b", "kimi-k2:1t", "gpt-oss:120b", "gpt-oss:20b", "glm-4.6")}
DEMO_SETTINGS = {
    "PROXY_ENV_FILE": os.devnull, "PROXY_ALIASES": "code=qwen3-coder:480b-cloud; chat=gpt-oss:120b-cloud",
    "PROXY_FALLBACKS": "qwen2.5-coder:7b -> qwen-coder-vllm -> qwen3-coder:480b-cloud; "
                       "llama3.1:latest -> qwen-coder-vllm -> deepseek-v3.1:671b-cloud; * -> gpt-oss:120b-cloud",
    "PROXY_SLOTS": "cloud=3, local=4"}


def echo(name, models):
    """Start an upstream of the demo; returns `name=url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    server.models, server.is_ollama = models, name != "vllm"
    server.handle_error = lambda *_: None  # a client that leaves in mid-answer is nothing to report
    threading.Thread(target=server.serve_forever, name=f"echo {name}", daemon=True).start()
    return f"{name}=http://127.0.0.1:{server.server_port}"


def demo(environ):
    """Try everything without a key: three upstreams with models that echo, and the real proxy before them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    kept = {name: text for name, text in environ.items() if name in ("PROXY_LOG", "PROXY_LOG_FORMAT")}
    environ = {"PROXY_UPSTREAMS": ", ".join(echo(name, models) for name, models in DEMO.items()),
               "PROXY_PORT": environ.get("PROXY_PORT") or "0", **DEMO_SETTINGS, **kept}
    server = start(Settings.load(environ)[0])
    said = {"model": "echo", "messages": [{"role": "user", "content": "Every word comes the moment it is said."}]}
    print(f"A model that echoes, behind the real proxy at {server.url}, streams:\n\n    ", end="", flush=True)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(server.url + "/api/chat", json.dumps(said).encode()) as answer:
        for line in answer:
            print(json.loads(line)["message"]["content"], end="", flush=True)
    print(f"""\n\nTry it (Ctrl-C ends it); the last asks for a model that only a fallback has, and shows who answered:

  curl -N {server.url}/api/generate -d '{{"model": "echo", "prompt": "hello from curl"}}'
  curl -N {server.url}/v1/chat/completions -d '{json.dumps({**said, "stream": True})}'
  curl {server.url}/v1/models
  curl -i {server.url}/v1/chat/completions -d '{json.dumps({**said, "model": "qwen2.5-coder:7b"})}'
""", flush=True)
    return run(server, environ)


def check(environ):
    """Print the settings, and what each upstream answers; 0 if all is well, else 1."""
    settings, warnings = Settings.load(environ)
    for name, value in settings.shown():
        print(f"{name:<24}{value or '-'}")
    for words in warnings:
        print(f"warning: {words}")
    carrier, good = Carrier(Log(os.devnull)), []  # what it would log is printed
    settings.read_timeout = min(settings.read_timeout or 15, 15)  # seconds; nobody waits longer for a verdict

    def probes():
        catalogue = Catalogue(settings, carrier)
        try:
            for upstream in catalogue.upstreams:
                good.append((yield from probe(upstream)))
            if all(upstream.models is not None for upstream in catalogue.upstreams):
                wanted = [*settings.aliases.values(), *(name for chain in settings.chains.items() for name in (
                    chain[0], *chain[1]) if name != "*")]
                for name in dict.fromkeys(wanted):
                    if not catalogue.candidates(name, OPENAI_LIST):
                        print(f"\nwarning: no upstream lists {name}, which PROXY_ALIASES or PROXY_FALLBACKS names")
        except Exception as bug:
            print(f"  the proxy has a bug: {describe(bug)}")
        finally:
            carrier.close()

    carrier.start(probes())
    carrier.run()
    return 0 if good and all(good) else 1


def probe(upstream):
    """Ask an upstream something free that a wrong key is refused for; print and return whether all is well.

    On ollama.com the list of models is open to all, and so says nothing about a key; the account's usage is not.
    """
    path = "/api/usage?range=24h" if upstream.address.is_ollama_com else "/v1/models"
    began = time.monotonic()
    print(f"\n{upstream.name} ({upstream.address})")
    try:
        yield from upstream.reach()
        connected = time.monotonic()
        answer = yield from upstream.ask("GET", path, "Accept: application/json\r\n")
    except Failure as failure:
        print(f"  {failure}")
        return False
    print(f"  reachable, connected in {(connected - began) * 1000:.0f} ms, answered in "
          f"{(time.monotonic() - connected) * 1000:.0f} ms")
    if isinstance(answer.wire.sock, ssl.SSLSocket):
        print(f"  {answer.wire.sock.version()}, certificate verified")
    status = answer.head.status
    answer.wire.close()
    if status in (401, 403):
        print(f"  {'the key is refused' if upstream.key else 'it wants a key'} ({status}): set {upstream.key_name}")
        return False
    sure, unsure = (("key accepted", "whether the key is good remains open") if upstream.key else
                   ("no key set, none needed", "no key set"))
    print(f"  {sure if status < 300 else unsure} (GET {path}: {status})")
    try:
        yield from upstream.fetch("/api/tags")
        print(f"  lists {len(upstream.models)} models, in {'Ollama' if upstream.is_ollama else 'OpenAI'}'s API"
              + ("" if upstream.is_ollama else " only: it takes no part below /api"))
    except Failure as failure:
        print(f"  {failure}")
    return status < 500


def main(arguments):
    """Run a command; returns the exit status."""
    name = parse_arguments(arguments).command if arguments else "serve"
    try:
        return {"serve": serve, "demo": demo, "check": check}[name](os.environ)
    except SettingsError as error:
        return fail(str(error), 2)
    except OSError as error:  # whoever reads what it prints has gone, or a disk is full
        return fail(error.strerror or str(error))


def parse_arguments(arguments):
    import argparse  # a service has no arguments to parse

    width = max(len(setting.name) for setting in SETTINGS) + 2
    table = "\n".join(f"  {setting.name:<{width}}{setting.help.replace('`', '')}"
                      + (f" [{setting.default}]" if setting.default else "")
                      + (f" (also {', '.join(setting.aliases)})" if setting.aliases else "") for setting in SETTINGS)
    parser = argparse.ArgumentParser(
        prog="ollama_proxy.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="A streaming proxy in front of Ollama Cloud, Ollama or anything that speaks their APIs.",
        epilog=f"Settings, from the environment or a .env file; defaults in brackets:\n\n{table}\n\n"
               "A secret can also come from a file, NAME_FILE, or from systemd's credentials.")
    parser.add_argument("command", nargs="?", default="serve", choices=["serve", "demo", "check"],
                        help="serve (default); demo: try it without a key; check: show settings, try the upstream")
    parser.add_argument("--version", action="version", version=f"ollama_proxy {__version__}")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
