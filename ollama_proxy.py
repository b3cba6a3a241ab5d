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
               ask           Upstream       urllib opener over kept wires     502 504
               carry         Carrier        bytes out as they come in
               account       Record         one line in the log
           <- the answer, byte for byte, or an error in the dialect of the path

Contents, in reading order; a section uses only the sections above it:

    Errors            what can go wrong, and the status each one becomes
    Settings          every variable: name, default, help, parser - declared once
    Heads and paths   pure: from the client's request line and headers to the upstream's
    Bodies            pure: where a body ends, and the model it names
    Callers           tokens, origins, hosts: who may ask
    Records           what one request cost, and the log
    Wires             sockets: reading ahead, waiting, dialling
    Upstreams         pool, urllib handler, health
    Carrier           the one thread that carries the bodies of answers
    Handler           one request, from its first line to its last byte
    Server            the ThreadingHTTPServer: workers, limits, drain, reload
    Command line      serve, demo, check
"""

from __future__ import annotations

import _thread
import base64
import binascii
import errno
import gc
import ipaddress
import json
import os
import queue
import re
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
from email.utils import formatdate
from functools import lru_cache
from http.client import responses as REASONS
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseRequestHandler, TCPServer
from urllib.parse import unquote_to_bytes, urlsplit

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


class ClientLeft(Failure):
    """The client went first; there is nobody to tell."""

    outcome = "client_left"


# ---- Settings ---------------------------------------------------------------
#
# Parsers take text and raise ValueError in words for people; a secret's parser
# never quotes its text. (Classes with slots or tuples, not dataclasses: importing
# those takes a fifth of the time that the proxy needs to start.)

OFF = "off"
TOKEN_TEXT = re.compile(r"[\x21-\x7e]+")
NAME_TEXT = re.compile(r"[A-Za-z0-9._-]+")
HOST_TEXT = re.compile(r"[A-Za-z0-9._-]+|\[?[0-9A-Fa-f:.]+\]?")
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
seconds_or_zero = parser(r"[0-9]{1,6}(\.[0-9]{1,6})?", "seconds, or 0", float)
switch = parser(r"(?i)on|true|yes|1|off|false|no|0", "on or off",
                lambda text: text.lower() in ("on", "true", "yes", "1"))
mount_path = parser(r"(/[\x21-\x22\x24-\x2e\x30-\x3e\x40-\x7e]+)*/*", "a path such as /api/ollama-proxy",
                    lambda text: text.rstrip("/"))


def size(text):
    """Parse a size in bytes.

    >>> size("64M") == 64 * 1024 * 1024
    True
    """
    match = re.fullmatch(r"([1-9][0-9]{0,11}) ?([KMG]?)(?:i?B)?", text, re.I)
    if not match:
        raise ValueError("expected a size such as 500K, 64M or 1G")
    return int(match[1]) * UNITS[match[2].upper()]


def words_of(text):
    return tuple(filter(None, re.split(r"[,\s]+", text)))


def networks(text):
    try:
        return tuple(ipaddress.ip_network(word, strict=False) for word in words_of(text))
    except ValueError:
        raise ValueError("expected addresses or networks such as 10.0.0.0/8, ::1") from None


def origins(text):
    if not all(word == "*" or "://" in word for word in words_of(text)):
        raise ValueError("expected origins such as https://app.example, or *")
    return words_of(text)


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
    for word in filter(None, map(str.strip, text.split(","))):
        name, colon, token = word.partition(":")
        name, token = (name.strip(), token) if colon else ("default", word)
        if not NAME_TEXT.fullmatch(name):
            raise ValueError("expected token, or name:token, name:token, with names of letters, digits and . _ -")
        if not token:
            raise ValueError(f"{name} has no token")
        pairs.append((name, secret(token).encode()))
    if len({token for _, token in pairs}) < max(1, len(pairs)):
        raise ValueError("two names have the same token" if pairs else "expected token, or name:token, name:token")
    return tuple(pairs)


def is_loopback(host):
    """Whether a host name or address can only mean this machine.

    >>> [is_loopback(host) for host in ("localhost", "127.8.9.1", "::1", "0.0.0.0", "gpu")]
    [True, True, True, False, False]
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost" or host.lower().endswith(".localhost")


def is_private(host):
    """Whether a host lies on a network of one's own, as far as its name tells."""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return "." not in host or host.lower().endswith((".local", ".localhost", ".internal", ".lan", ".home.arpa"))


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
        name, text = name.strip(), text.strip()
        if not TOKEN_TEXT.fullmatch(text):
            raise ValueError("expected name=url with a URL such as http://127.0.0.1:11434")
        url = urlsplit(text)
        if "@" in url.netloc or "?" in text or "#" in text:
            raise ValueError("a URL here has no user, password, query or fragment; a key has a variable of its own")
        if url.scheme not in ("http", "https") or not HOST_TEXT.fullmatch(url.hostname or ""):
            raise ValueError("expected a URL that starts with http:// or https:// and names a host")
        try:
            port = url.port if url.port is not None else (443 if url.scheme == "https" else 80)
        except ValueError:
            port = 0
        if not port or url.netloc.endswith(":"):
            raise ValueError("the URL's port is not one")
        if url.scheme == "http" and re.fullmatch(r"(.*\.)?ollama\.com\.?", url.hostname):
            raise ValueError("http://ollama.com would carry the key in clear; write https://ollama.com")
        name = name or url.hostname.replace(":", "-")
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
    def key_name(self):
        return "PROXY_KEY_" + re.sub(r"[^A-Z0-9]", "_", self.name.upper())

    def __str__(self):
        return f"{self.scheme}://{self.netloc}{self.mount}"


def upstreams(text):
    words = [word.strip() for word in text.split(",") if word.strip()]
    if len(words) != 1:
        raise ValueError("expected one upstream, name=url")
    return (Address.parse(words[0]),)


Setting = namedtuple("Setting", "field name default parse help aliases secret", defaults=((), False))

SETTINGS = (
    Setting("api_key", "OLLAMA_API_KEY", "", secret, "key of the upstream called `cloud`, and of any on the host "
            "ollama.com", ("OLLAMA_CLOUD_API_KEY",), True),
    Setting("auth_token", "PROXY_AUTH_TOKEN", "", tokens, "what clients must present: `token`, or `name:token, "
            "name:token`; `off` opens the proxy to whoever reaches it", ("AUTH_TOKEN", "AIG_AUTH_TOKEN"), True),
    Setting("host", "PROXY_HOST", "127.0.0.1",
            parser(HOST_TEXT.pattern, "an address such as 127.0.0.1, 0.0.0.0 or ::1", lambda text: text.strip("[]")),
            "where to listen"),
    Setting("port", "PROXY_PORT", "11434", parser(r"[0-9]{1,5}", "a port from 0 to 65535", int, 0, 65535),
            "port to listen on; 0 picks a free one", ("PORT",)),
    Setting("upstreams", "PROXY_UPSTREAMS", "cloud=https://ollama.com", upstreams, "whom to ask: `name=url`; a bare "
            "URL is named by its host", ("OLLAMA_CLOUD_BASE_URL", "OLLAMA_ORIGIN")),
    Setting("keys", "PROXY_KEY_<NAME>", "", secret, "bearer key of the upstream called name", (), True),
    Setting("prefix", "PROXY_PREFIX", "", mount_path, "mount path to strip, e.g. `/api/ollama-proxy`"),
    Setting("origins", "PROXY_ORIGINS", "", origins, "browser origins allowed beside loopback and app ones, `*` for "
            "all; unset, with tokens: all", ("OLLAMA_ORIGINS",)),
    Setting("client_timeout", "PROXY_CLIENT_TIMEOUT", "15", seconds, "seconds a client has for the head of its "
            "request, or for 4 KiB more of its body; an idle kept connection, and a client that takes nothing of its "
            "answer, have four times as long"),
    Setting("connect_timeout", "PROXY_CONNECT_TIMEOUT", "10", seconds, "seconds to connect and shake hands"),
    Setting("read_timeout", "PROXY_READ_TIMEOUT", "900", seconds_or_zero, "seconds an upstream may be silent; 0 is for "
            "ever"),
    Setting("max_connections", "PROXY_MAX_CONNECTIONS", "1024",
            parser(r"[0-9]{1,6}", "a whole number from 1 to 999999", int, 1),
            "clients at once; one more gets 503 and `Retry-After`"),
    Setting("max_body", "PROXY_MAX_BODY", "64M", size, "largest body held in memory to read its model name; larger "
            "413; blobs stream, unlimited"),
    Setting("public_models", "PROXY_PUBLIC_MODELS", OFF, switch, "`on` answers model lists (`/api/tags`, `/v1/models`, "
            "`/api/show`) without a token, for clients that look before they log in"),
    Setting("trusted", "PROXY_TRUSTED", "", networks, "addresses or networks (`10.0.0.0/8, ::1`) of load balancers "
            "whose `X-Forwarded-For` is believed"),
    Setting("log", "PROXY_LOG", "", str, "file to log to; unset is stderr"),
    Setting("log_format", "PROXY_LOG_FORMAT", "auto", parser("auto|text|json", "auto, text or json"),
            "`text` (a terminal's default) or `json` (everything else's)"),
    Setting("drain", "PROXY_DRAIN", "30", seconds_or_zero, "seconds that streams may run on after SIGTERM"),
    Setting("env_file", "PROXY_ENV_FILE", ".env", str, "file of `KEY=VALUE` lines, read where the environment is "
            "silent"),
)


class Settings:
    """What an operator can set, an attribute each; read once, then passed around, never global, never changed.

    `given` is the text of those that were set, by name. Times are seconds, sizes bytes.
    """

    def __init__(self, values, given):
        for setting in SETTINGS:
            setattr(self, setting.field, setting.parse(setting.default) if setting.default else "")
        self.__dict__.update(values)
        self.given = given

    @classmethod
    def load(cls, environ):
        """Read the environment, the .env file and credential files; name every bad value at once.

        Returns (settings, warnings). Raises SettingsError.
        """
        sources, values, given = Sources(environ), {"keys": {}}, {}
        for setting in SETTINGS:
            if setting.field == "keys":
                continue
            name, text = sources.find((setting.name,) + setting.aliases, setting.secret)
            if text:
                given[setting.name] = text
                sources.parse(values, setting.field, setting, name, text)
        for address in values.get("upstreams", ()):
            name, text = sources.find((address.key_name,), secret=True)
            if text:
                given[name] = text
                sources.parse(values["keys"], address.name, SETTINGS[0], name, text)
        settings = cls(values, given)
        problems = sources.problems or list(settings.contradictions())
        if problems:
            raise SettingsError("\n".join(problems))
        return settings, sources.strangers(settings) + settings.doubts()

    def key(self, address):
        """The bearer key for an upstream, or an empty value."""
        return self.keys.get(address.name) or (self.api_key if address.is_cloud else "")

    def contradictions(self):
        """Yield what is wrong with values that are each fine alone."""
        if any(address.is_ollama_com and not self.key(address) for address in self.upstreams):
            yield ("OLLAMA_API_KEY is not set: make a key at https://ollama.com/settings/keys and set it, or name "
                   "another server in PROXY_UPSTREAMS; `ollama_proxy.py demo` runs without a key")
        if not self.auth_token and not is_loopback(self.host):
            yield (f"PROXY_HOST={self.host} lets other machines in, and PROXY_AUTH_TOKEN is not set: set it to a token "
                   "that clients must present, or to off if whoever reaches the proxy may spend the key")

    def doubts(self):
        """Return warnings about values that are obeyed all the same."""
        return [f"the key of {address.name} travels in clear to {address}: use https"
                for address in self.upstreams
                if self.key(address) and address.scheme == "http" and not is_private(address.host)]

    def shown(self):
        """Yield (name, text) of every setting, with secrets masked."""
        names = {setting.name: setting for setting in SETTINGS if setting.field != "keys"}
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
            self.maps.append(values)
        self.credentials = environ.get("CREDENTIALS_DIRECTORY", "")

    def find(self, names, secret):
        """Return (name, text) of the first name that has a value; an empty one is none."""
        for source in self.maps:
            for name in names:
                if source.get(name, "").strip():
                    return name, source[name].strip()
                if secret and source.get(name + "_FILE", "").strip():
                    return name, self._read(source[name + "_FILE"].strip(), name + "_FILE")
        for name in names if secret and self.credentials else ():
            path = os.path.join(self.credentials, name)
            if os.path.exists(path):
                return name, self._read(path, f"credential {name}")
        return names[0], ""

    def parse(self, values, key, setting, name, text):
        """Put a setting's value among the values, or its error among the problems."""
        called = {"OLLAMA_CLOUD_BASE_URL": "cloud", "OLLAMA_ORIGIN": "origin"}.get(name)
        try:
            values[key] = (Address.parse(text, called),) if called else setting.parse(text)
        except ValueError as error:
            shown = "" if setting.secret or re.search("[@?]", text) else f"={text[:80]!r}"
            self.problems.append(f"{name}{shown}: {error}")

    def strangers(self, settings):
        """Return warnings about PROXY_ variables that nothing here reads."""
        known = {name for setting in SETTINGS for name in (setting.name,) + setting.aliases}
        known |= {address.key_name for address in settings.upstreams}
        known |= {name + "_FILE" for name in known}
        strange = sorted({name for source in self.maps for name in source if name.startswith("PROXY_")} - known)
        if not strange:
            return []
        from difflib import get_close_matches  # rarely needed, and slow to load

        return [f"{name} is not a setting; the nearest is {get_close_matches(name, known, 1, 0)[0]}"
                if not name.startswith("PROXY_KEY_") else f"{name} is of no use: no upstream has that name"
                for name in strange]

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
        line = line.strip()
        match = re.fullmatch(r"""(?:export\s+)?([A-Za-z_]\w*)\s*=\s*(?:"([^"]*)"|'([^']*)'|(.*?))(?:\s+\#.*)?""", line)
        if match:
            values[match[1]] = match[2] or match[3] or match[4] or ""
        elif line and line[0] != "#":
            bad.append(number)
    return values, bad


# ---- Heads and paths --------------------------------------------------------
#
# Everything here is pure. http.server and http.client accept heads that smuggle
# requests; what this section cannot parse exactly is never passed on.

HEAD_LIMIT = 64 * 1024
TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
REQUEST_LINE = re.compile(rf"({TOKEN}) ([\x21-\x7e\x80-\xff]+) HTTP/([0-9])\.([0-9])")
STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-9][0-9]{2})(?: ([^\x00\r\n]*))?")
FIELD_LINE = re.compile(rf"({TOKEN}):[ \t]*([^\x00\r\n]*)".encode())
HOST_FIELD = re.compile(r"[A-Za-z0-9._~!$&'()*+;=%:\[\]-]*")
LENGTH = re.compile(r"[0-9]{1,18}", re.ASCII)
BARE_LF = re.compile(rb"(?<!\r)\n")

CHUNKED, UNTIL_CLOSE = -1, -2  # sizes of a body that does not say how long it is


class Head:
    """A message's head: its start line, and its fields as they came, in order and with repeats.

    `fields` are (lower-case name, value, line). Of a request `method`, `target` and `version` are set, of an
    answer `status`, `reason` and `version`; the version is HTTP/1.x's x.
    """

    __slots__ = ("method", "target", "version", "status", "reason", "fields", "_last")

    def __init__(self, lines):
        self.fields = [short_field(line) if len(line) < 200 else field_of(line) for line in lines]
        self._last = {name: value for name, value, _ in self.fields}

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

    def keeps(self):
        """Whether the sender of this head will use the connection again."""
        words = self.tokens("connection")
        return "close" not in words if self.version else "keep-alive" in words

    def size(self):
        """The length that the head declares for its body, CHUNKED, or None (RFC 9112, section 6)."""
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


short_field = lru_cache(maxsize=2048)(field_of)  # clients and upstreams say the same again and again


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
    head = Head(lines)
    head.method, head.target, head.version = method, target, min(int(minor), 1)
    hosts = head.all("host")
    if len(hosts) > 1 or head.version and not hosts or not HOST_FIELD.fullmatch(head.get("host")):
        raise Malformed("a request has one Host header, and in it one host")
    if len(head.all("authorization")) > 1 or len(head.all("origin")) > 1:
        raise Malformed("two Authorization or Origin headers: which one counts is unclear")
    return head


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
    head = Head(lines)
    head.version, head.status, head.reason = int(match[1]), int(match[2]), match[3] or ""
    return head


def answer_size(head, method):
    """How long the body of an answer is: a number, CHUNKED or UNTIL_CLOSE (RFC 9112, section 6.3)."""
    declared = head.size()
    if method == "HEAD" or head.status in (204, 304):
        return 0
    return UNTIL_CLOSE if declared is None else declared


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
    "x-accel-buffering".split())


def fields_up(head, identity):
    """The lines of a request's end-to-end headers; with `identity`, an answer without compression is asked for."""
    barred = NOT_SENT_UP | head.tokens("connection")
    if not identity:
        return [line for name, _, line in head.fields if name not in barred]
    lines = [line for name, _, line in head.fields if name not in barred and name != "accept-encoding"]
    return lines + ["Accept-Encoding: identity\r\n"]


def fields_down(head, key):
    """The lines of an answer's headers that are the client's business, without the key should an upstream echo it."""
    barred = NOT_SENT_DOWN | head.tokens("connection")
    return [line.replace(key, "***") if key and key in line else line for name, _, line in head.fields
            if name not in barred and not name.startswith("access-control-")]


NATIVE = frozenset("generate chat tags show ps pull push create copy delete embed version me blobs "
                   "web_search web_fetch".split())
OPENAI = frozenset("completions models responses messages".split())
INFERENCE = frozenset("/api/generate /api/chat /api/embed /api/embeddings /embeddings /v1/chat/completions "
                      "/v1/completions /v1/responses /v1/embeddings /v1/messages".split())
LISTS = frozenset(["GET /api/tags", "HEAD /api/tags", "GET /v1/models", "HEAD /v1/models", "POST /api/show"])
OWN_ALIASES = {"/healthz": "/-/health", "/readyz": "/-/ready", "/metrics": "/-/metrics"}
AUTHORITY = re.compile(r"https?://[^/?#]*", re.I)
LAST_PREFIX = re.compile(r"(?:/+(?:api|v1)(?=/|$))*/+(api|v1)(?:/+|$)")
DOT_SEGMENT = re.compile(r"(?:^|/)\.\.?(?:;[^/]*)?(?:/|$)")


class Target(namedtuple("Target", "path query token shown")):
    """What a request asks for, once its path is repaired.

    `path` as it goes upstream, but for the upstream's mount; `query` with its question mark; `token` of
    /t/TOKEN/... as bytes, or None; `shown`, the path as the client said it, fit for a log.
    """

    __slots__ = ()

    @property
    def is_own(self):
        return self.path in ("", "/") or self.path.startswith("/-/")


def parse_target(target, prefix=""):
    """Repair what clients make of a base URL; percent-escapes and the query stay as they came.

    >>> [parse_target(t).path for t in ("/chat", "/v1/v1/models", "//api/tags", "/chat/completions", "/rerank")]
    ['/api/chat', '/v1/models', '/api/tags', '/v1/chat/completions', '/rerank']
    >>> parse_target("/t/s3cret/api/chat?x=%2F")
    Target(path='/api/chat', query='?x=%2F', token=b's3cret', shown='/t/***/api/chat')
    """
    whole = target
    if AUTHORITY.match(target):  # absolute-form: whatever host it names, it came to us
        target = AUTHORITY.sub("", target, count=1)
        target = target if target[:1] == "/" else "/" + target
    if target[:1] != "/":
        raise Malformed(f"the request's target must be a path, not {whole[:80]!r}")
    path, mark, query = target.partition("?")
    path, token, shown = strip_mounts(path, prefix)
    decoded = unquote_to_bytes(path.encode("latin-1")).replace(b"\\", b"/")
    if DOT_SEGMENT.search(decoded.decode("latin-1")):
        raise Refused("a path here has no . or .. segments")
    return Target(repair(path), mark + query, token, shown)


short_target = lru_cache(maxsize=1024)(parse_target)  # for those of usual length: what is kept is bounded


def strip_mounts(path, prefix):
    """Take PROXY_PREFIX and /t/TOKEN, in either order, off a path: (path, token or None, path fit for a log)."""
    token, shown = None, path
    for _ in range(2):
        if prefix and (path + "/").startswith(prefix + "/"):
            path = path[len(prefix):] or "/"
        match = re.match(r"/+t/([^/]+)", path)
        if match and token is None:
            token = unquote_to_bytes(match[1].encode("latin-1"))
            shown = shown.replace(match[0], match[0][:-len(match[1])] + "***", 1)
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
    return OWN_ALIASES.get(path, path)


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
    return (first_line + "".join(lines) + "\r\n").encode("latin-1")


# ---- Bodies -----------------------------------------------------------------
#
# Where a body ends, whatever pieces it comes in, and the little that is read of
# one: the model that a request names, the tokens that an answer counts.

CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;[\t\x20-\x7e\x80-\xff]{0,4000})?")
CHUNK_LINE_LIMIT, TRAILER_LIMIT = 4096, 8192


@lru_cache(maxsize=1024)  # of lines of 4 KiB at the most
def chunk_size(line):
    """The size in a chunk's line.

    >>> chunk_size(b"1f;ext=1")
    31
    """
    match = CHUNK_LINE.fullmatch(line)
    if not match:
        raise Malformed("a chunk's size line is malformed")
    return int(match[1], 16)


class Decoder:
    """Follows one body through whatever pieces it comes in.

    `size` is its length, CHUNKED or UNTIL_CLOSE. When `done`, `rest` is what came behind it.
    """

    BULK = 4096  # bytes from which on chunks are worth taking by the dozen

    __slots__ = ("size", "done", "rest", "_left", "_line", "_trailer")

    def __init__(self, size):
        self.size, self.done, self.rest = size, size == 0, b""
        self._left = size if size > 0 else 0  # of the body, or of the chunk that is being read
        self._line = b"\r\n"  # an unfinished size line: the CRLF that ends a chunk is read as part of the next line
        self._trailer = False

    def feed(self, data):
        """Return the payload among these bytes; raises Malformed."""
        if self.size == CHUNKED:
            return self._chunks(data)
        if self.size == UNTIL_CLOSE:
            return data
        payload = data[:self._left]
        self._left -= len(payload)
        if not self._left:
            self.done, self.rest = True, data[len(payload):]
        return payload

    def _chunks(self, data):
        if self._trailer:
            self._end(self._line + data)
            return b""
        end = data.find(b"\r\n")
        if not self._left and self._line == b"\r\n" and end > 0 and data.endswith(b"\r\n"):
            size = chunk_size(data[:end])
            if size and len(data) == end + size + 4:  # nearly always: what has come is one chunk
                return data[end + 2:-2]
        at, left, pieces, many = 0, self._left, [], len(data) > self.BULK
        if not left:
            data = self._line + data
        while True:
            if left:
                piece = data[at:at + left]
                pieces.append(piece)
                at += len(piece)
                left -= len(piece)
                if left:
                    break
            if many:
                at, many = at + self._take_bulk(data[at:], pieces), False
            end = data.find(b"\r\n", at + 2)
            if end < 0 or not data.startswith(b"\r\n", at):
                self._keep_line(data[at:])
                break
            left = chunk_size(data[at + 2:end])
            at = end + 2
            if not left:
                self._trailer = True
                self._end(data[end:])
                break
        self._left = left
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    @staticmethod
    def _take_bulk(data, pieces):
        """Take many whole chunks at once where none holds a CRLF, as lines of JSON do not; return their length."""
        parts = data.split(b"\r\n")  # "", size, chunk, size, chunk, ..., and a pair that may be cut
        sizes, chunks = parts[1:-2:2], parts[2:-2:2]
        sizes, lengths = sizes[:len(chunks)], [*map(len, chunks)]
        try:
            if parts[0] or 0 in lengths or lengths != [*map(chunk_size, sizes)]:
                return 0
        except Malformed:  # or a chunk that holds a CRLF
            return 0
        pieces += chunks
        return sum(lengths) + sum(map(len, sizes)) + 4 * len(chunks)

    def _keep_line(self, line):
        """Remember the part of a size line that has come, unless it cannot become one any more."""
        bad_start = line[:2] != b"\r\n"[:len(line)] or line[2:3].strip(b"0123456789abcdefABCDEF")
        if bad_start or b"\n" in line[2:] or len(line) > CHUNK_LINE_LIMIT:
            raise Malformed("a chunk is not followed by a size line")
        self._line = line

    def _end(self, data):
        """Read trailers, which are dropped, up to the empty line. `data` starts with the last size line's CRLF."""
        end = data.find(b"\r\n\r\n")
        if end > TRAILER_LIMIT or end < 0 and len(data) > TRAILER_LIMIT:
            raise Malformed("the trailers are too long")
        self._line = data
        if end >= 0:
            Head(data[2:end].split(b"\r\n") if end else ())
            self.done, self.rest = True, data[end + 4:]


STRUCTURE = re.compile(rb'["{}\[\]]')
# Bounded, since the matcher takes memory for each repetition, and holds up all threads while it runs.
STRING_PART = re.compile(rb'[^"\\]{0,100000}(?:\\.[^"\\]{0,1000}){0,500}', re.S)
MODEL_FIRST = re.compile(rb'\s*\{\s*"model"\s*:\s*("[^"\\]{0,500}")')
ESCAPED_MODEL = re.compile(rb"\\u006[4c-fC-F]")  # a letter of the key, as nobody but an attacker writes it
COLON = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*")
PATIENCE = 500_000  # brackets and strings that are looked at: more, and no name is found


def members(body):
    """Return {key: raw value} of a JSON object's own members; the value of one that is no string is b"".

    Reads no further than it must: no number, no nesting limit, no copy of a long prompt. What is not JSON
    has no members.

    >>> members(b'{"model": "a", "messages": [{"model": "b"}], "n": 1}')
    {b'model': b'"a"', b'messages': b'', b'n': b''}
    """
    found, depth, at, key = {}, 0, 0, None
    if body[:64].lstrip(b" \t\r\n")[:1] != b"{":
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
                key, at = (json_string(body[begin:at]) or "").encode("utf-8", "replace"), colon.end()
                found[key] = b""
            elif depth == 1 and key is not None:
                found[key], key = body[begin:at], None
        elif mark in b"{[":
            depth, key = depth + 1, None
        else:
            depth -= 1
            if depth == 0:
                return found
    return {}


def string_end(body, at):
    """The index behind the JSON string whose content begins at `at`, None if it does not end."""
    while True:
        end = STRING_PART.match(body, at).end()
        if body[end:end + 1] == b'"':
            return end + 1
        if end == at:
            return None
        at = end


def named_model(body):
    """The model that a request's JSON names, None if it names none."""
    match = MODEL_FIRST.match(body)
    if match and body.count(b'"model"') == 1 and not ESCAPED_MODEL.search(body):  # nearly always: it can mean no other
        return json_string(match[1])
    return json_string(members(body).get(b"model", b""))


def json_string(raw):
    """Decode a raw JSON string; None if it is none."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, str) else None


COUNTS = re.compile(rb'"(?:(prompt_eval_count|prompt_tokens|input_tokens)|'
                    rb'(eval_count|completion_tokens|output_tokens))"'
                    rb"\s*:\s*([0-9]{1,12})\b")
ERROR_LINE = re.compile(rb'^(?:(?:data: ?)?\{"error":|event: ?(?:error|response\.failed)\b)', re.M)


def ends_in_error(tail):
    """Whether the last bytes of a stream hold an error instead of an end, as Ollama and OpenAI write it."""
    return (b"error" in tail or b"failed" in tail) and bool(ERROR_LINE.search(tail))


def token_counts(tail):
    """Find (tokens in, tokens out) in the last bytes of an answer of any dialect, None where it does not say.

    The last mention wins. A key within a JSON string cannot be taken for one: its quotes are escaped there.

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
    try:
        return base64.b64decode(text, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


def caller_name(tokens, presented):
    """The name whose token is among the presented credentials, or None; takes as long whichever it is."""
    import hmac  # slow to load, and not for everybody

    name = None
    for credential in presented:
        for candidate, token in tokens:
            if hmac.compare_digest(token, credential):
                name = candidate
    return name


@lru_cache(maxsize=256)
def names_loopback(host):
    """Whether a Host header, its port aside, means this machine.

    >>> names_loopback("[::1]:11434"), names_loopback("localhost:11434"), names_loopback("evil.example")
    (True, True, False)
    """
    return is_loopback(host[1:].partition("]")[0] if host[:1] == "[" else host.partition(":")[0])


class Doorman:
    """Who may ask, by token, Host and Origin; made of the settings alone."""

    def __init__(self, settings):
        self.is_open = settings.auth_token == OFF  # whoever reaches the proxy may ask
        self.tokens = () if self.is_open else settings.auth_token
        self.any_origin = "*" in settings.origins or bool(self.tokens and not settings.origins)
        self.cors_unseen = ["Access-Control-Allow-Origin: *\r\n"] if self.any_origin else []
        self.origins = tuple(re.compile(re.escape(word).replace(r"\*", "[^/]*"), re.I) for word in settings.origins)

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
        if not self.is_open and host and not names_loopback(host):
            raise Refused(f"without a token only localhost is served, not the host {host}: set PROXY_AUTH_TOKEN "
                          "(off opens the proxy to whoever reaches it)", 403)
        chain = head.joined("x-forwarded-for")
        if not self.is_open and not all(is_loopback(word.strip()) for word in chain.split(",") if word.strip()):
            raise Refused("without a token only this machine is served, and this request was forwarded for another: "
                          "set PROXY_AUTH_TOKEN", 403)
        if not origin and head.get("sec-fetch-site") == "cross-site" and head.get("sec-fetch-mode") != "navigate":
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
        return name

    def cors(self, head):
        """The header lines by which a browser lets its page read the answer."""
        origin = head.get("origin")
        if not origin or not self.allows_origin(origin):
            return [] if self.any_origin else ["Vary: Origin\r\n"]
        lines = self.cors_unseen or [f"Access-Control-Allow-Origin: {origin}\r\n", "Vary: Origin\r\n"]
        return lines + ["Access-Control-Expose-Headers: X-Request-Id, X-Proxy-Upstream, Retry-After\r\n"]


def preflight(head):
    """The header lines that answer a browser's question whether it may send a request."""
    asked = head.get("access-control-request-headers")
    method = head.get("access-control-request-method")
    lines = [f"Access-Control-Allow-Methods: {method or 'GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS'}\r\n",
             "Access-Control-Max-Age: 7200\r\n"]
    if asked:
        lines.append(f"Access-Control-Allow-Headers: {asked}\r\n")
    if head.get("access-control-request-private-network") == "true":
        lines.append("Access-Control-Allow-Private-Network: true\r\n")
    return lines


def client_address(peer, forwarded, trusted):
    """The client's address: the last in X-Forwarded-For that no trusted load balancer wrote of itself.

    >>> client_address("10.0.0.1", "6.6.6.6, 1.2.3.4, 10.0.0.2", networks("10.0.0.0/8"))
    '1.2.3.4'
    """
    for word in reversed(forwarded.split(",")):
        try:
            if not is_trusted(peer, trusted):
                return peer
            peer = str(ipaddress.ip_address(word.strip()))
        except ValueError:  # not an address: whoever wrote it is as far as we can see
            return peer
    return peer


def is_trusted(address, trusted):
    return bool(trusted) and any(ipaddress.ip_address(address) in network for network in trusted)


# ---- Records ----------------------------------------------------------------


class Record:
    """What one request cost; its public attributes are the keys of its log line, in order."""

    KEYS = ("time id caller client method path model upstream status first_byte_ms total_ms bytes_in bytes_out "
            "tokens_in tokens_out outcome").split()
    __slots__ = KEYS + ["started"]

    def __init__(self, client):
        self.started = time.monotonic()
        self.time = time.time()
        self.client = client
        self.id = os.urandom(8).hex()
        self.caller = self.method = self.path = self.model = self.upstream = self.status = None
        self.first_byte_ms = self.total_ms = self.tokens_in = self.tokens_out = self.outcome = None
        self.bytes_in = self.bytes_out = 0

    def answered(self, status):
        """Note the first byte that goes to the client."""
        self.status = status
        self.first_byte_ms = self.elapsed_ms()

    def elapsed_ms(self):
        return round((time.monotonic() - self.started) * 1000, 3)


def timestamp(seconds):
    """RFC 3339, UTC, milliseconds.

    >>> timestamp(0.0625)
    '1970-01-01T00:00:00.062Z'
    """
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + ".%03dZ" % (seconds % 1 * 1000)


def printable(text, limit=200):
    """Make text that came from outside fit for one line of a log or a terminal."""
    return "".join(c if c.isprintable() else "\\x%02x" % ord(c) for c in str(text)[:limit])


def text_line(entry):
    """One line for a person at a terminal, of a record's or an event's values."""
    clock = entry["time"][11:19]
    if "event" in entry:
        return f"{clock} {entry['level']} {entry['event']}: {printable(entry['words'], 2000)}"
    waited = "" if entry["first_byte_ms"] is None else f" first byte {entry['first_byte_ms'] / 1000:.2f} s,"
    counts = ("" if entry["tokens_out"] is None and entry["tokens_in"] is None else
              f", tokens {entry['tokens_in']} in, {entry['tokens_out']} out")
    words = [clock, entry["method"], entry["path"], entry["model"], entry["status"] or "---", entry["outcome"],
             entry["caller"], entry["client"]]
    line = " ".join(printable(word) for word in words if word is not None)
    return f"{line}{waited} all {entry['total_ms'] / 1000:.2f} s, {entry['bytes_out']} bytes{counts}"


class Log:
    """Writes lines from a thread of its own, so that a stuck pipe or disk stops no request.

    Not more than LIMIT lines wait; the number of those that were lost is logged when lines flow again.
    """

    LIMIT = 10_000
    GATHER = 0.02  # seconds that lines wait for company: one write for many

    def __init__(self, path="", form="auto"):
        self._path, self._form = path, form
        self._lines, self._lost = queue.SimpleQueue(), 0
        self._busy = False
        self._stream = self._open()
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def request(self, record, outcome):
        """Log a finished request."""
        record.outcome, record.total_ms = outcome, record.elapsed_ms()
        self._put(record)

    def event(self, level, event, words):
        """Log anything else: level is info, warning or error, event a word or two to search for."""
        self._put({"time": time.time(), "level": level, "event": event, "words": words})

    def reopen(self, path, form):
        """Follow a log file that was moved away; raises OSError, and then goes on as before."""
        old, self._path, self._form = (self._stream, self._path, self._form), path, form
        try:
            self._stream = self._open()
        except OSError:
            self._stream, self._path, self._form = old
            raise

    def close(self, patience=1.0):
        """Wait until what was logged is written, but not for ever."""
        deadline = time.monotonic() + patience
        while (self._busy or not self._lines.empty()) and time.monotonic() < deadline:
            time.sleep(0.005)

    def _open(self):
        if self._path:
            return open(self._path, "ab", buffering=0)
        try:  # not sys.stderr, whose buffer and lock would hold up the exit if nobody reads
            return open(2, "wb", buffering=0, closefd=False)
        except OSError:  # it was closed before the start
            return open(os.devnull, "wb", buffering=0)

    def _put(self, entry):
        if self._lines.qsize() < self.LIMIT:
            self._lines.put(entry)
        else:
            self._lost += 1

    def _run(self):
        while True:
            entries = [self._lines.get()]
            self._busy = True
            time.sleep(self.GATHER)
            while len(entries) < 1000 and not self._lines.empty():
                entries.append(self._lines.get())
            if self._lost:
                lost, self._lost = self._lost, 0
                entries.append({"time": time.time(), "level": "warning", "event": "log",
                                "words": f"{lost} lines were lost: the log was written too slowly"})
            try:
                self._write("".join(map(self._line, entries)).encode("utf-8", "backslashreplace"))
            except (OSError, ValueError):  # a broken pipe, a full disk: later lines may fare better
                self._lost += len(entries)
            self._busy = False

    def _line(self, entry):
        if isinstance(entry, Record):
            entry = {key: getattr(entry, key) for key in Record.KEYS}
        entry["time"] = timestamp(entry["time"])
        is_text = self._form == "text" or self._form == "auto" and self._stream.isatty()
        return (text_line(entry) if is_text else json.dumps(entry)) + "\n"

    def _write(self, data):
        while data:
            written = self._stream.write(data)
            if written is None:  # somebody else made it non-blocking, and it is full
                time.sleep(self.GATHER)
            data = data[written or 0:]


# ---- Wires ------------------------------------------------------------------
#
# A wire is a connection to a client or to an upstream, the same on both sides:
# a non-blocking socket, and the bytes that were read from it ahead of their use.
# Threads wait for a wire with poll, and see at the same time whether the client
# has gone; the carrier waits for many with a selector.

PIECE = 64 * 1024
# Linux tells a farewell apart from data; elsewhere one must look (Wire.has_left).
LEAVING = getattr(select, "POLLRDHUP", select.POLLIN)
NOT_YET = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Wire:
    """One connection. `ahead` is what has been read from it and not been used."""

    __slots__ = ("sock", "ahead", "used")

    def __init__(self, sock):
        self.sock, self.ahead, self.used = sock, b"", 0.0
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            keep_alive(sock)

    def receive(self):
        """Return what has come, b"" at the end of it, None if nothing has; raises OSError."""
        try:
            return self.sock.recv(PIECE)
        except NOT_YET:
            return None

    def send(self, data):
        """Send what the socket takes now, and return how much that was; raises OSError."""
        try:
            return self.sock.send(data)
        except NOT_YET:
            return 0

    def look(self):
        """Read what has come into `ahead`; whether anything, or the end, has."""
        data = self.receive()
        self.ahead += data or b""
        return data is not None

    def has_left(self):
        """Whether the other side has left; Linux can tell even when unread data comes before its farewell."""
        poll = select.poll()
        poll.register(self.sock, LEAVING)
        events = poll.poll(0)
        if not events or events[0][1] != select.POLLIN:
            return bool(events)
        try:
            return not socket.socket.recv(self.sock, 1, socket.MSG_PEEK)
        except OSError:
            return True

    def take_head(self):
        """Cut a message's head off `ahead` and return its lines; None while it is not whole; raises Malformed."""
        data = self.ahead
        end = data.find(b"\r\n\r\n")
        if end > HEAD_LIMIT or end < 0 and len(data) > HEAD_LIMIT:
            raise Malformed("the headers are longer than 64 KiB", 431)
        if end < 0:
            if BARE_LF.search(data):
                raise Malformed("a line ends in LF without CR")
            return None
        self.ahead = data[end + 4:]
        return data[:end + 2]

    def close(self, abruptly=False):
        """Close; abruptly, the other side learns that the end is no end (RST instead of FIN)."""
        try:
            if abruptly:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.sock.close()
        except OSError:
            return


def keep_alive(sock):
    """Have the system notice a peer that vanished, and keep NAT routers from forgetting a silent stream."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in ("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 6):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def wait(wire, events, deadline, client=None, also=None):
    """Wait until `wire` is ready for poll's `events`, or `also` is readable; whether `wire` is.

    Raises ClientLeft as soon as `client` has gone, TimeoutError at the deadline (None is never).
    """
    poll, fd = select.poll(), wire.sock.fileno()
    poll.register(fd, events)
    if client:
        poll.register(client.sock, LEAVING)
    if also:
        poll.register(also.sock, select.POLLIN)
    while True:
        ready = poll.poll(None if deadline is None else max(0, deadline - time.monotonic()) * 1000)
        if not ready:
            raise TimeoutError
        ready = {other for other, _ in ready}
        if client and client.sock.fileno() in ready:
            if client.has_left():
                raise ClientLeft("the client left")
            poll.unregister(client.sock)  # it sent its next request: nothing more to learn here
        if fd in ready:
            return True
        if also and also.sock.fileno() in ready:
            return False


def push(wire, data, deadline, client=None):
    """Send all of `data` to a wire."""
    data = memoryview(data)
    while data:
        sent = wire.send(data)
        data = data[sent:]
        if not sent:
            wait(wire, select.POLLOUT, deadline, client)


def next_head(wire, deadline, client=None):
    """Return the lines of the next head on a wire; raises EOFError, Malformed, and what `wait` raises."""
    while True:
        block = wire.take_head() if wire.ahead else None
        if block is not None:
            return block
        wait(wire, select.POLLIN, deadline, client)
        data = wire.receive()
        if data == b"":
            raise EOFError("the connection was closed")
        wire.ahead += data or b""


def dial(address, proxy, context, deadline, client):
    """Connect to an upstream, by way of an HTTP proxy (host, port, Proxy-Authorization) if there is one.

    Returns a Wire. Raises OSError, EOFError, TimeoutError, ClientLeft, Malformed.
    """
    places = resolve(*(proxy[:2] if proxy else (address.host, address.port)), deadline, client)
    for number, place in enumerate(places):
        now = time.monotonic()
        share = now + (deadline - now) / (len(places) - number)  # a dead address leaves time for the next
        try:
            wire = connect(place, share, client)
            break
        except OSError:
            if place is places[-1]:
                raise
    try:
        if proxy:
            open_tunnel(wire, address, proxy[2], deadline, client)
        if address.scheme == "https":
            shake_hands(wire, context, address.host, deadline, client)
    except BaseException:
        wire.close()
        raise
    return wire


def resolve(host, port, deadline, client):
    """Look up a host's addresses, in a thread where that may ask the network: it can be neither timed nor stopped."""
    if re.fullmatch(r"[0-9.]+|.*:.*", host):
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    found, (bell, ring) = [], socket.socketpair()

    def look_up():
        with ring:
            try:
                found.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
            except (OSError, ValueError) as error:
                found.append(error)

    with bell:
        _thread.start_new_thread(look_up, ())
        wait(Wire(bell), select.POLLIN, deadline, client)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def connect(place, deadline, client):
    family, kind, protocol, _, address = place
    wire = Wire(socket.socket(family, kind, protocol))
    try:
        code = wire.sock.connect_ex(address)
        if code in (errno.EINPROGRESS, errno.EWOULDBLOCK):
            wait(wire, select.POLLOUT, deadline, client)
            code = wire.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
    except BaseException:
        wire.close()
        raise
    return wire


def open_tunnel(wire, address, authorization, deadline, client):
    """Have an HTTP proxy connect this wire to the upstream (RFC 9110, section 9.3.6)."""
    place = f"{f'[{address.host}]' if ':' in address.host else address.host}:{address.port}"
    lines = [f"Host: {place}\r\n"] + ([f"Proxy-Authorization: {authorization}\r\n"] if authorization else [])
    push(wire, head_bytes(f"CONNECT {place} HTTP/1.1\r\n", lines), deadline, client)
    head = parse_answer(next_head(wire, deadline, client))
    if head.status != 200 or wire.ahead:
        raise ConnectionError(f"the proxy of HTTPS_PROXY answered {head.status} {printable(head.reason)}")


def shake_hands(wire, context, host, deadline, client):
    """Speak TLS on a connected wire."""
    wire.sock = context.wrap_socket(wire.sock, server_hostname=host, do_handshake_on_connect=False,
                                    suppress_ragged_eofs=False)
    while True:
        try:
            return wire.sock.do_handshake()
        except ssl.SSLWantReadError:
            wait(wire, select.POLLIN, deadline, client)
        except ssl.SSLWantWriteError:
            wait(wire, select.POLLOUT, deadline, client)


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


class Upload:
    """The body of a client's request, read as it is wanted."""

    DRIP = 4096  # bytes that must come within PROXY_CLIENT_TIMEOUT, or the body's end

    def __init__(self, client, size, expects, patience):
        self.declared = size  # a number, CHUNKED, or None where the head speaks of no body
        self.decoder = Decoder(size or 0)
        self.received = 0
        self._client, self._expects, self._patience = client, expects, patience

    @property
    def done(self):
        return self.decoder.done

    def pieces(self, upstream=None):
        """Yield the payload as it comes; end early when the upstream begins to answer.

        Raises Refused (408), Malformed, ClientLeft.
        """
        patience, fresh = self._patience, 0
        while not self.done:
            data, self._client.ahead = self._client.ahead, b""
            if not data:
                began = time.monotonic()
                if not self._more_comes(began + patience, upstream):
                    return
                patience -= time.monotonic() - began
                data = self._receive()
            fresh += len(data)
            if fresh >= self.DRIP:
                patience, fresh = self._patience, 0
            payload = self.decoder.feed(data)
            self.received += len(payload)
            if self.done:
                self._client.ahead = self.decoder.rest
            if payload:
                yield payload

    def whole(self, limit):
        """Return the body as bytes; raises Refused (413) beyond the limit."""
        too_large = Refused(f"the body is larger than PROXY_MAX_BODY, {limit} bytes", 413)
        if self.decoder.size > limit:
            raise too_large
        pieces = []
        for piece in self.pieces():
            pieces.append(piece)
            if self.received > limit:
                raise too_large
        return b"".join(pieces)

    def skip(self):
        """Forget what of the body has come already; whether that was all of it."""
        if not self.done:
            try:
                self.decoder.feed(self._client.ahead)
            except Malformed:
                return False
            self._client.ahead = self.decoder.rest
        return self.done

    def _more_comes(self, deadline, upstream):
        try:
            if self._expects:
                self._expects = False
                self._client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        except OSError as error:
            raise ClientLeft("the client left before its body") from error
        try:
            while not wait(self._client, select.POLLIN, deadline, also=upstream):
                if upstream.look():
                    return False
        except TimeoutError:
            raise Refused("the body of the request came too slowly", 408) from None
        return True

    def _receive(self):
        try:
            data = self._client.receive()
        except OSError as error:
            raise ClientLeft("the client was cut off") from error
        if data == b"":
            raise ClientLeft("the client left within its body")
        return data or b""


class Ask(urllib.request.Request):
    """A request as urllib's handlers see it, and what it is to them only luggage.

    `selector` is the target; `head` all bytes of the head; then comes `body`, bytes in memory, or `upload`.
    `client` is the wire to watch meanwhile. `sent` and `heard` say whether anything has gone up, or come down.
    """

    head, body, upload, client, sent, heard = b"", b"", None, None, False, False

    def pieces(self, upstream):
        """Yield the bytes to send."""
        if len(self.body) < PIECE:
            yield self.head + self.body
        else:
            yield self.head
            yield self.body
        if self.upload:
            chunked = self.upload.decoder.size == CHUNKED
            for payload in self.upload.pieces(upstream):
                yield b"%x\r\n%b\r\n" % (len(payload), payload) if chunked else payload
            if chunked and self.upload.done:
                yield b"0\r\n\r\n"


# An upstream's answer, its body still to come on the wire, which is good for another request if it `keep`s.
Answer = namedtuple("Answer", "head decoder wire keep")


class Pool:
    """Kept wires to one upstream, the last used first."""

    IDLE = 60.0  # seconds; longer, and a router on the way may have forgotten the connection

    def __init__(self):
        self._lock = threading.Lock()  # guards _wires
        self._wires, self._closed = deque(), False

    def take(self):
        """A wire that is still open and silent, or None."""
        while True:
            with self._lock:
                if not self._wires:
                    return None
                wire = self._wires.pop()
            try:
                if not wire.look():
                    return wire
            except OSError:  # a reset is an end as good as any
                pass
            wire.close()

    def put(self, wire):
        wire.used = time.monotonic()
        with self._lock:
            self._wires.append(wire)
        if self._closed:
            self.prune(0)

    def prune(self, idle=IDLE):
        """Close the wires that nobody has used for so many seconds."""
        with self._lock:
            while self._wires and time.monotonic() - self._wires[0].used >= idle:
                self._wires.popleft().close()

    def close(self):
        self._closed = True
        self.prune(0)


class Upstream(urllib.request.BaseHandler):
    """A server to ask: urllib's handler for it, its kept wires, and what is known of its health."""

    FRESH = 10.0  # seconds that what is known of its health holds

    def __init__(self, address, settings, log):
        self.address, self.key, self.name = address, settings.key(address), address.name
        self.mask = self.key if len(self.key) >= 12 else ""  # a placeholder is no secret, but may be any word
        self.pool = Pool()
        self._connect_timeout, self._read_timeout = settings.connect_timeout, settings.read_timeout
        self._log = log
        self._template = Ask(f"{address.scheme}://{address.netloc}/")
        self._seen_at, self._reachable, self._looking = float("-inf"), None, threading.Lock()
        self._opener = urllib.request.OpenerDirector()
        proxy = urllib.request.getproxies_environment().get("https")
        if proxy and not is_loopback(address.host):  # a key in clear over an HTTP_PROXY: never
            self._opener.add_handler(urllib.request.ProxyHandler({"https": proxy}))
        self._opener.add_handler(self)

    def ask(self, method, path, lines, body=b"", upload=None, client=None):
        """Send a request, header `lines` given, and return its Answer; raises a Failure."""
        ask = self._new_ask()
        ask.method, ask.body, ask.upload, ask.client = method, body, upload, client
        ask.selector = self.address.mount + path
        own = f"{method} {ask.selector} HTTP/1.1\r\nHost: {self.address.netloc}\r\n"
        if self.key:
            own += f"Authorization: Bearer {self.key}\r\n"
        ask.head = head_bytes(own, lines)
        return self._opener.open(ask)

    def _new_ask(self):
        ask = Ask.__new__(Ask)  # a Request parses its URL, and this one is always the same
        ask.__dict__.update(self._template.__dict__)
        return ask

    def http_open(self, ask):
        """Called by urllib: send a request over a kept wire, else a new one.

        A kept wire that proves stale is replaced, and the request sent again, when not a byte of an answer has
        come and nothing can have been executed twice.
        """
        if not ask.head:  # is_reachable() wants no more than a wire
            return self._dial(ask)
        while True:
            wire = self.pool.take()
            kept = wire is not None
            if not kept:
                wire = self._dial(ask)
            try:
                return self._exchange(wire, ask)
            except UpstreamLost:
                wire.close()
                heard = ask.heard or wire.ahead
                if not kept or heard or ask.upload or ask.sent and ask.method not in SAFE:
                    raise
            except BaseException:
                wire.close()
                raise

    https_open = http_open

    def is_reachable(self):
        """Whether it can be connected to, by traffic or a look in the last FRESH seconds; sends no request."""
        with self._looking:
            if time.monotonic() - self._seen_at > self.FRESH:
                wire = self.pool.take()
                try:
                    self.pool.put(wire or self._opener.open(self._new_ask()))
                    self._note(True)
                except Unreachable:
                    return False
            return self._reachable

    def _note(self, reachable, words=""):
        if reachable != self._reachable and (self._reachable is not None or not reachable):
            self._log.event("info" if reachable else "warning", "upstream",
                            f"{self.name} is reachable again" if reachable else words)
        self._seen_at, self._reachable = time.monotonic(), reachable

    def _dial(self, ask):
        proxy = None
        try:
            if ask.host != self.address.netloc:  # ProxyHandler has put its own there
                place = urlsplit("//" + ask.host)
                proxy = place.hostname, place.port or 80, ask.get_header("Proxy-authorization")
            context = tls_context() if self.address.scheme == "https" else None
            wire = dial(self.address, proxy, context, time.monotonic() + self._connect_timeout, ask.client)
        except TimeoutError as error:
            words = str(error) if error.errno else f"no connection within {self._connect_timeout:g} seconds"
        except ssl.SSLCertVerificationError as error:
            words = f"its certificate is not trusted ({error.verify_message}); SSL_CERT_FILE can name more authorities"
        except ssl.SSLError as error:
            words = f"TLS failed ({error.reason or error}); does it speak https?"
        except (OSError, EOFError, ValueError, Malformed) as error:  # a ValueError: of a host name, or of HTTPS_PROXY
            words = getattr(error, "strerror", None) or str(error)
        else:
            self._note(True)
            return wire
        words = f"upstream {self.name} cannot be reached: {words}"
        self._note(False, words)
        raise Unreachable(words)

    def _exchange(self, wire, ask):
        """Send and hear the head of the answer, however early it comes; raises a Failure."""
        try:
            for piece in ask.pieces(wire):
                if not self._push(wire, piece, ask):
                    break
            return self._hear(wire, ask)
        except TimeoutError:
            raise Silent(f"upstream {self.name} was silent for {self._read_timeout:g} seconds "
                         "(PROXY_READ_TIMEOUT)") from None
        except (OSError, EOFError) as error:
            words = getattr(error, "strerror", None) or str(error)
            raise UpstreamLost(f"upstream {self.name} broke off before its answer: {words}") from error

    def _push(self, wire, data, ask):
        """Send one piece; False when the upstream answers, or hangs up, instead of taking it."""
        data = memoryview(data)
        while data:
            try:
                sent = wire.send(data)
            except OSError:
                if ask.sent:  # it may have said why
                    return False
                raise
            if sent:
                ask.sent, data = True, data[sent:]
            else:
                wait(wire, select.POLLIN | select.POLLOUT, self._deadline(), ask.client)
                if wire.look():
                    return False
        return True

    def _hear(self, wire, ask):
        status = 100
        while status < 200:  # 1xx are for us alone
            try:
                block = next_head(wire, self._deadline(), ask.client)
                ask.heard, head = True, parse_answer(block)
                size, status = answer_size(head, ask.method), head.status
            except Malformed as error:
                raise UpstreamLost(f"upstream {self.name} gave an answer that is not HTTP: {error}") from None
            if status == 101:
                raise UpstreamLost(f"upstream {self.name} switched to a protocol that nobody asked for")
        taken = not ask.upload or ask.upload.done
        return Answer(head, Decoder(size), wire, taken and head.keeps() and size != UNTIL_CLOSE)

    def _deadline(self):
        return time.monotonic() + self._read_timeout if self._read_timeout else None


# ---- Carrier ----------------------------------------------------------------
#
# Threads decide, one thread carries. From the moment the head of an answer has
# gone out, this thread alone touches the two wires, until it gives them back.

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
FOR_EVER = float("inf")


class Client(Wire):
    """A client's wire. `clients` is the set of all that are open; `deadline` is the carrier's."""

    __slots__ = ("address", "deadline", "served", "_clients")

    def __init__(self, sock, address, clients):
        super().__init__(sock)
        self.address, self.deadline, self.served, self._clients = address, FOR_EVER, False, clients
        clients.add(self)

    def close(self, abruptly=False):
        self._clients.discard(self)
        super().close(abruptly)


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
    """One answer on its way: out of the upstream's framing, into the client's.

    `out` is what the client has not taken yet; while there is any, nothing more is read. `outcome` is set once the
    body has ended, one way or the other. `over` is when nothing is left to do.
    """

    TAIL = 2048  # bytes of the body that are kept to find its token counts in

    __slots__ = ("client", "wire", "answer", "record", "out", "chunked", "keep", "outcome", "deadline", "blocked",
                 "_pool", "_tail", "_silence", "_stall", "_mask")

    def __init__(self, client, answer, record, upstream, settings):
        self.client, self.wire, self.answer, self.record = client, answer.wire, answer, record
        self._pool = upstream.pool
        self._mask = Mask(upstream.mask.encode()) if upstream.mask and answer.head.status >= 300 else None
        self.out, self.chunked, self.keep, self.outcome = b"", False, False, None
        self.deadline, self.blocked, self._tail = FOR_EVER, False, b""
        self._silence, self._stall = settings.read_timeout or FOR_EVER, 4 * settings.client_timeout

    @property
    def over(self):
        return self.outcome is not None and not self.out

    @property
    def needs_reset(self):
        """Whether a plain close would end the body as if it were whole."""
        return not self.chunked and self.answer.decoder.size < 0

    def begin(self, head):
        """Send the client its head, with what of the body has come already."""
        self.out = head
        data, self.wire.ahead = self.wire.ahead, b""
        if self.answer.decoder.done:
            self.answer.decoder.rest = data
            self._complete()
        elif data:
            self.take(data)
        if self.outcome:
            self.release()
        self.flush(time.monotonic())

    def take(self, data):
        """Take bytes from the upstream; b"" is its end."""
        decoder = self.answer.decoder
        try:
            payload = decoder.feed(data)
        except Malformed:
            self.outcome = UpstreamLost.outcome
            return
        if self._mask:
            payload = self._mask.hide(payload, last=decoder.done or not data)
        if payload:
            self.record.bytes_out += len(payload)
            self._tail = (self._tail + payload if len(payload) < self.TAIL else payload)[-self.TAIL:]
            self.out += b"%x\r\n%b\r\n" % (len(payload), payload) if self.chunked else payload
        if decoder.done or not data and decoder.size == UNTIL_CLOSE:
            self._complete()
        elif not data:
            self.outcome = UpstreamLost.outcome

    def _complete(self):
        if self.chunked:
            self.out += b"0\r\n\r\n"
        failed = self.record.status >= 400 or ends_in_error(self._tail)
        self.outcome = "error" if failed else "ok"

    def flush(self, now):
        """Send what the client takes; raises OSError when it takes nothing any more."""
        if self.out:
            sent = self.client.send(self.out)
            self.out = self.out[sent:] if sent < len(self.out) else b""
        self.deadline = now + (self._stall if self.out else self._silence)

    def release(self):
        """Give the upstream's wire back to its pool, or close it; nobody else must be watching it."""
        wire, self.wire = self.wire, None
        if wire and self.answer.keep and self.answer.decoder.done and not self.answer.decoder.rest:
            self._pool.put(wire)
        elif wire:
            wire.close()

    def close(self, log, outcome):
        """Account for the exchange; whether the client's wire can go on."""
        self.release()
        record, answer = self.record, self.answer
        if record.status < 400 and not answer.head.get("content-encoding"):
            record.tokens_in, record.tokens_out = token_counts(self._tail)
        log.request(record, outcome)
        return self.keep and self.over and outcome in ("ok", "error")


class Carrier(threading.Thread):
    """One selector over all that needs no thread: answers, idle clients, clients that take their leave."""

    TICK = 0.25  # seconds between looks at the deadlines
    AHEAD = 64 * 1024  # bytes that a client may send ahead of the answer it waits for
    LINGER, LINGERERS = 1.0, 256  # seconds, and clients, that are heard out after a last answer

    def __init__(self, resume, log, settings):
        super().__init__(name="carrier", daemon=True)
        self.resume, self.log, self.settings = resume, log, settings
        self.draining, self.stopped = False, threading.Event()
        self._selector = selectors.DefaultSelector()
        self._inbox = deque()  # (method, argument) from other threads
        self._bell, bell = socket.socketpair()
        for end in self._bell, bell:
            end.setblocking(False)
        self._held = {}  # what is watched -> what to do with it at its deadline
        self._now = self._next_look = time.monotonic()
        self._selector.register(bell, READ, (self._open_inbox, bell))
        self._held[bell] = None
        self._lingering = 0

    # What other threads call:

    def carry(self, exchange):
        """Take over an exchange whose head has gone out."""
        self._call(self._carry, exchange)

    def park(self, client):
        """Keep a client until its next request begins."""
        self._call(self._park, client)

    def linger(self, client):
        """Close a client, but so that it can still read the last answer although it sends (RFC 9112, section 9.6)."""
        self._call(self._linger, client)

    def drain(self):
        """Let go of idle clients, from now on."""
        self._call(self._drain, None)

    def stop(self):
        """Cut what is left, and come back when that is done."""
        self._call(self._stop, None)
        self.stopped.wait(1)

    def _call(self, method, argument):
        self._inbox.append((method, argument))
        try:
            self._bell.send(b"!")
        except BlockingIOError:  # it is ringing already
            return

    # What its own thread does:

    def run(self):
        while True:
            ready = self._selector.select(self.TICK if len(self._held) > 1 else None)
            self._now = now = time.monotonic()
            for key, events in ready:
                act, held = key.data
                if held in self._held:  # else it ended earlier in this round
                    try:
                        act(held, events)
                    except Exception as bug:
                        self._drop(held, bug)
            if now >= self._next_look:
                self._next_look = now + self.TICK
                for held, expire in [*self._held.items()]:
                    if expire and now > held.deadline:
                        self._guard(expire, held)
                    elif isinstance(held, Exchange) and len(held.client.ahead) > self.AHEAD and held.client.has_left():
                        self._guard(self._leave, held)

    def _guard(self, method, held):
        try:
            method(held)
        except Exception as bug:
            self._drop(held, bug)

    def _drop(self, held, bug):
        self.log.event("error", "bug", f"the carrier dropped a connection: {describe(bug)}")
        self._held.pop(held, None)
        for wire in filter(None, (held.client, held.wire) if isinstance(held, Exchange) else (held,)):
            self._watch(wire, 0)
            wire.close(abruptly=True)

    def _open_inbox(self, bell, _):
        bell.recv(4096)
        while self._inbox:
            self._guard(*self._inbox.popleft())

    def _watch(self, wire, events, act=None, held=None):
        watched = wire.sock.fileno() >= 0 and wire.sock in self._selector.get_map()
        if events and watched:
            self._selector.modify(wire.sock, events, (act, held))
        elif events:
            self._selector.register(wire.sock, events, (act, held))
        elif watched:
            self._selector.unregister(wire.sock)

    def _carry(self, exchange):
        self._held[exchange] = self._expire
        exchange.blocked = bool(exchange.out)
        self._watch(exchange.client, READ | WRITE if exchange.blocked else READ, self._from_client, exchange)
        if not exchange.blocked:
            self._watch(exchange.wire, READ, self._from_upstream, exchange)
        if self.stopped.is_set():
            self._finish(exchange, "stopped")

    def _from_upstream(self, exchange, _):
        try:
            data = exchange.wire.receive()
        except OSError:  # a reset; or TLS without a goodbye, which may be a cut
            exchange.outcome = UpstreamLost.outcome
        else:
            if data is None:
                return
            exchange.take(data)
        if exchange.outcome:
            self._watch(exchange.wire, 0)
            exchange.release()
        self._flush(exchange)

    def _from_client(self, exchange, events):
        client = exchange.client
        if events & READ:
            try:
                client.look()
            except OSError:
                return self._leave(exchange)
            if client.has_left():
                return self._leave(exchange)
            if len(client.ahead) > self.AHEAD:
                self._watch(client, WRITE if exchange.blocked else 0, self._from_client, exchange)
        if events & WRITE:
            self._flush(exchange)

    def _flush(self, exchange):
        """Send, and then listen to whichever side is to move."""
        try:
            exchange.flush(self._now)
        except OSError:
            return self._leave(exchange)
        if exchange.over:
            return self._finish(exchange, exchange.outcome)
        blocked = bool(exchange.out)
        if blocked != exchange.blocked:
            exchange.blocked = blocked
            hears = READ if len(exchange.client.ahead) <= self.AHEAD else 0
            self._watch(exchange.client, hears | (WRITE if blocked else 0), self._from_client, exchange)
            if exchange.wire:
                self._watch(exchange.wire, 0 if blocked else READ, self._from_upstream, exchange)

    def _leave(self, exchange):
        self._finish(exchange, ClientLeft.outcome)

    def _expire(self, exchange):
        self._finish(exchange, ClientLeft.outcome if exchange.out else Silent.outcome)

    def _finish(self, exchange, outcome):
        client = exchange.client
        del self._held[exchange]
        if exchange.wire:
            self._watch(exchange.wire, 0)
        if exchange.close(self.log, outcome):
            self._park(client)
        elif exchange.over and outcome in ("ok", "error"):
            self._linger(client)
        else:
            self._watch(client, 0)
            client.close(abruptly=exchange.needs_reset)

    def _park(self, client):
        if client.ahead:
            self._watch(client, 0)
            self.resume(client)
        elif self.draining:
            self._close(client)
        else:
            client.deadline = time.monotonic() + self.settings.client_timeout * (4 if client.served else 1)
            self._held[client] = self._close
            self._watch(client, READ, self._wake, client)

    def _wake(self, client, _):
        try:
            gone = client.look() and not client.ahead
        except OSError:
            gone = True
        if gone:
            return self._close(client)
        if client.ahead:
            del self._held[client]
            self._watch(client, 0)
            self.resume(client)

    def _close(self, client):
        self._held.pop(client, None)
        self._watch(client, 0)
        client.close()

    def _linger(self, client):
        if self._lingering >= self.LINGERERS:
            return self._close(client)
        try:
            client.sock.shutdown(socket.SHUT_WR)
        except OSError:
            return self._close(client)
        client.deadline = time.monotonic() + self.LINGER
        self._lingering += 1
        self._held[client] = self._give_up
        self._watch(client, READ, self._hear_out, client)

    def _hear_out(self, client, _):
        try:
            ended = client.receive() == b""
        except OSError:
            ended = True
        if ended:
            self._give_up(client)

    def _give_up(self, client):
        self._lingering -= 1
        self._close(client)

    def _drain(self, _):
        self.draining = True
        for held in [held for held, expire in self._held.items() if expire == self._close]:
            self._close(held)

    def _stop(self, _):
        self._drain(_)
        for held in [held for held in self._held if isinstance(held, Exchange)]:
            self._finish(held, "stopped")
        self.stopped.set()


def describe(bug):
    """Say where an exception that nobody expected came from, in one line."""
    place = bug.__traceback__
    while place.tb_next:
        place = place.tb_next
    return f"{type(bug).__name__}: {bug} (line {place.tb_lineno}, {place.tb_frame.f_code.co_name})"


# ---- Handler ----------------------------------------------------------------

OWN_VERSION = "0.33.0"  # of the Ollama API; what an upstream without /api/version is said to have
JSON_TYPE = "Content-Type: application/json\r\n"
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Handler(BaseRequestHandler):
    """What a thread does for one client, from a request's first line until the carrier takes over."""

    PAUSE = 0.02  # seconds that a thread waits for a kept client's next request before the carrier does

    def handle(self):
        self.client = self.request
        try:
            while self.client.ahead or self._comes():
                if not self.answer():
                    return
        except OSError:
            return self.client.close()
        self.server.carrier.park(self.client)

    def _comes(self):
        try:
            wait(self.client, select.POLLIN, time.monotonic() + self.PAUSE)
        except TimeoutError:
            return False
        if self.client.look() and not self.client.ahead:
            raise ConnectionError("the client left between requests")
        return True

    def answer(self):
        """Answer one request; whether the client is still this thread's. The one place where an exception meets it."""
        self.head = self.target = self.upload = None
        self.settings, self.doorman, self.upstream = self.server.rules
        self.cors, self.record = self.doorman.cors_unseen, Record(self.client.address)
        try:
            self.read_head()
            page = self.own_page()
            return self.reply(*page) if page else self.relay()
        except Failure as failure:
            return self.refuse(failure)
        except Exception as bug:
            self.server.log.event("error", "bug", describe(bug))
            return self.refuse(Failure("the proxy has a bug; its log says where"))

    # What the request is:

    def read_head(self):
        """Read the head and decide who asks for what; raises a Failure."""
        settings, client, record = self.settings, self.client, self.record
        try:
            head = parse_request(next_head(client, time.monotonic() + settings.client_timeout))
        except TimeoutError:
            raise Refused("the head of the request took too long", 408) from None
        except (OSError, EOFError) as error:
            raise ClientLeft("the client left before its request was whole") from error
        client.served = True
        self.head, record.method = head, head.method
        given = head.get("x-request-id")
        if REQUEST_ID.fullmatch(given):
            record.id = given
        self.cors = self.doorman.cors(head)
        if head.method in ("CONNECT", "TRACE"):
            raise Refused(f"{head.method} is not for this proxy", 405, [("Allow", "GET, HEAD, POST, PUT, DELETE")])
        if self.server.name in head.joined("via"):
            raise Refused("this request has come from this proxy itself: PROXY_UPSTREAMS names it as its upstream", 508)
        expected = head.get("expect").lower()
        self.upload = Upload(client, head.size(), bool(expected and head.version), settings.client_timeout)
        if expected not in ("", "100-continue"):
            raise Refused("the only expectation met here is 100-continue", 417)
        parse = short_target if len(head.target) < 300 else parse_target
        self.target = parse(head.target if head.target != "*" else "/", settings.prefix)
        record.path = self.target.shown[:500]
        if settings.trusted:
            record.client = client_address(client.address, head.joined("x-forwarded-for"), settings.trusted)

    def own_page(self):
        """Let the doorman look, and answer what the proxy answers itself: (status, body, header lines), else None."""
        head, target = self.head, self.target
        self.doorman.check_place(head)
        if head.method == "OPTIONS":
            return 204, b"", preflight(head)
        reads = head.method in ("GET", "HEAD")
        if target.is_own:
            page = OWN_PAGES.get(target.path)
            if page is None:
                raise Refused(f"there is no page {printable(target.shown)} here", 404)
            if not reads:
                raise Refused("this page is only to be read", 405, [("Allow", "GET, HEAD")])
            return page(self)
        is_open = target.path == "/api/version" and reads or (
            self.settings.public_models and f"{head.method} {target.path}" in LISTS)
        try:
            self.record.caller = self.doorman.admit(head, target)
        except Refused:
            if not is_open:
                raise
        return None

    def page_root(self):
        return 200, b"Ollama is running", ["Content-Type: text/plain; charset=utf-8\r\n"]

    def page_health(self):
        return 200, b'{"status": "ok"}', [JSON_TYPE]

    def page_ready(self):
        status = "draining" if self.server.draining else (
            "ok" if self.upstream.is_reachable() else "no upstream can be reached")
        return 200 if status == "ok" else 503, json.dumps({"status": status}).encode(), [JSON_TYPE]

    # What goes up:

    def relay(self):
        """Ask the upstream, and send its answer on its way to the client."""
        head, path, upload = self.head, self.target.path, self.upload
        self.record.upstream = self.upstream.name
        held, body = head.method == "POST" and path in INFERENCE, b""
        if held:
            body = upload.whole(self.settings.max_body)
            self.record.model = (named_model(body) or "")[:200] or None
            if path == "/embeddings":
                path = "/v1/embeddings" if b"input" in members(body) else "/api/embeddings"
        asked = (head.method, path + self.target.query, self.lines_up(held, len(body)), body,
                 None if upload.done else upload, self.client)
        return self.give_version(asked) if path == "/api/version" else self.give(self.upstream.ask(*asked))

    def lines_up(self, held, length):
        """The header lines of the request, but for the upstream's own Host and key."""
        head, client = self.head, self.client
        trusted = is_trusted(client.address, self.settings.trusted)
        chain = head.all("x-forwarded-for") if trusted else ()
        lines = fields_up(head, identity=held)
        if held or self.upload.declared is not None and self.upload.declared >= 0:
            lines.append(f"Content-Length: {length if held else self.upload.declared}\r\n")
        elif self.upload.declared == CHUNKED:
            lines.append("Transfer-Encoding: chunked\r\n")
        lines.append(f"Via: 1.1 {self.server.name}\r\nX-Forwarded-For: {', '.join((*chain, client.address))}\r\n"
                     f"X-Forwarded-Proto: {trusted and head.get('x-forwarded-proto') or 'http'}\r\n"
                     f"X-Request-Id: {self.record.id}\r\n")
        host = trusted and head.get("x-forwarded-host") or head.get("host")
        if host:
            lines.append(f"X-Forwarded-Host: {host}\r\n")
        return lines

    # What comes down:

    def give(self, answer):
        """Send the answer's head and what of its body is there; the rest is the carrier's."""
        head, record, server, upstream = self.head, self.record, self.server, self.upstream
        exchange = Exchange(self.client, answer, record, upstream, self.settings)
        lines = fields_down(answer.head, upstream.mask)
        size = answer.decoder.size
        exchange.chunked = size < 0 and head.version == 1
        if exchange.chunked:
            lines.append("Transfer-Encoding: chunked\r\n")
        elif size >= 0 and answer.head.all("content-length") and answer.head.status != 204:
            lines.append(f"Content-Length: {answer.head.get('content-length')}\r\n")
        exchange.keep = self.keeps() and (exchange.chunked or size >= 0)
        lines += self.closing_lines(exchange.keep)
        lines.append(f"X-Proxy-Upstream: {upstream.name}\r\nX-Accel-Buffering: no\r\n")
        record.answered(answer.head.status)
        record.bytes_in = self.upload.received
        if answer.head.status == 401:
            server.complain("key", f"upstream {upstream.name} answers 401: " + (
                "it refuses the key" if upstream.key else f"it wants a key, {upstream.address.key_name}"))
        reason = answer.head.reason
        if upstream.mask and upstream.mask in reason:
            reason = ""
        try:
            exchange.begin(head_bytes(f"HTTP/1.1 {answer.head.status} {reason}\r\n", lines))
        except OSError:
            exchange.close(server.log, ClientLeft.outcome)
            self.client.close()
            return False
        if not exchange.over:
            server.carrier.carry(exchange)
        elif exchange.close(server.log, exchange.outcome):
            return True
        elif exchange.outcome == UpstreamLost.outcome:
            self.client.close(abruptly=exchange.needs_reset)
        else:
            server.carrier.linger(self.client)
        return False

    def give_version(self, asked):
        """Relay the upstream's version; where it has none, say one that clients accept."""
        try:
            answer = self.upstream.ask(*asked)
        except (Unreachable, UpstreamLost, Silent):
            answer = None
        if answer and answer.head.status == 200:
            return self.give(answer)
        if answer:
            answer.wire.close()
        self.record.upstream = None
        self.record.answered(200)
        self.server.log.request(self.record, "ok")
        return self.reply(200, json.dumps({"version": OWN_VERSION}).encode(), [JSON_TYPE])

    def keeps(self):
        return self.head.keeps() and self.upload.done and not self.server.draining

    def closing_lines(self, keep):
        """The lines that every answer ends its head with."""
        connection = [] if keep and self.head.version else [f"Connection: {'keep-alive' if keep else 'close'}\r\n"]
        return [f"X-Request-Id: {self.record.id}\r\n", *self.cors, *connection]

    def reply(self, status, body, lines):
        """Send an answer of the proxy's own; whether the client is still this thread's."""
        keep = bool(self.upload and self.upload.skip()) and self.keeps()
        lines = [*lines, f"Date: {formatdate(usegmt=True)}\r\nCache-Control: no-store\r\n", *self.closing_lines(keep)]
        if status != 204:
            lines.append(f"Content-Length: {len(body)}\r\n")
        if self.head and self.head.method == "HEAD":
            body = b""
        data = head_bytes(f"HTTP/1.1 {status} {REASONS.get(status, '')}\r\n", lines) + body
        try:
            push(self.client, data, time.monotonic() + self.settings.client_timeout)
        except OSError:
            self.client.close()
            return False
        if not keep:
            self.server.carrier.linger(self.client)
        return keep

    def refuse(self, failure):
        """End the request with an error in the dialect of its path."""
        record, status, words, path = self.record, failure.status, str(failure), ""
        record.bytes_in = self.upload.received if self.upload else 0
        outcome = failure.outcome
        if isinstance(failure, ClientLeft):
            if not self.server.stopping or not self.head:
                if self.head:
                    self.server.log.request(record, outcome)
                self.client.close()
                return False
            status, words, outcome = 503, "the proxy is being stopped", "stopped"
        if not self.head or self.target is None or not self.target.is_own:
            record.answered(status)
            self.server.log.request(record, outcome)
        if self.target:
            path = self.target.path
        lines = [JSON_TYPE, *(f"{name}: {value}\r\n" for name, value in failure.headers)]
        return self.reply(status, error_body(path, status, words, record.id), lines)


OWN_PAGES = {"/": Handler.page_root, "/-/health": Handler.page_health, "/-/ready": Handler.page_ready}


# ---- Server -----------------------------------------------------------------


class Workers:
    """Threads that wait for work, the last to finish first in line; surplus ones end after a while."""

    IDLE = 2.0  # seconds

    def __init__(self, work):
        self._work, self._idle = work, deque()

    def put(self, item):
        """Have a thread do its work on the item at once."""
        try:
            inbox = self._idle.pop()
        except IndexError:
            inbox = queue.SimpleQueue()
            _thread.start_new_thread(self._run, (inbox,))  # a Thread would have us wait until it runs
        inbox.put(item)

    def _run(self, inbox):
        item = inbox.get()
        while True:
            self._work(item)
            del item
            self._idle.append(inbox)
            try:
                item = inbox.get(timeout=self.IDLE)
            except queue.Empty:
                try:
                    self._idle.remove(inbox)
                    return
                except ValueError:  # somebody has just taken it to put an item in
                    item = inbox.get()


class Server(ThreadingHTTPServer):
    """Listens, gives each client that has something to say a thread, and knows who is there."""

    request_queue_size = 1024
    daemon_threads = True
    block_on_close = False
    allow_reuse_port = False
    PAUSE = 0.1  # seconds without accepting when there are no descriptors left

    def __init__(self, settings, log):
        self.settings, self.log = settings, log
        self.draining = self.stopping = False
        self.clients = set()
        self.name = "ollama_proxy-" + os.urandom(4).hex()  # by which it knows its own requests
        self._complained = {}
        if ":" in settings.host:
            self.address_family = socket.AF_INET6
        super().__init__((settings.host, settings.port), Handler)
        self.adopt(settings)
        self.workers = Workers(self.serve)
        self.carrier = Carrier(self.workers.put, log, settings)
        self.carrier.start()

    def adopt(self, settings):
        """Obey new settings from the next request on."""
        self.settings, self.upstream = settings, Upstream(settings.upstreams[0], settings, self.log)
        self.rules = settings, Doorman(settings), self.upstream  # what one request goes by from its start to its end

    @property
    def url(self):
        host, port = self.server_address[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def server_bind(self):
        TCPServer.server_bind(self)  # HTTPServer's asks DNS for this host's name, which can take long

    def get_request(self):
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self.complain("limit", f"no descriptors are left for clients ({error.strerror}): raise LimitNOFILE")
                time.sleep(self.PAUSE)
            raise

    def process_request(self, request, client_address):
        """Give a new client a thread, or say that there are too many."""
        crowded = len(self.clients) >= self.settings.max_connections
        address = client_address[0].partition("%")[0]
        address = address[7:] if address.startswith("::ffff:") else address  # IPv4, on a socket for both
        client = Client(request, address, set() if crowded else self.clients)
        if not crowded:
            try:
                return self.workers.put(client)
            except RuntimeError as error:
                self.complain("limit", f"a client was sent away: {error}")
                return client.close()
        self.complain("limit", f"over {self.settings.max_connections} clients (PROXY_MAX_CONNECTIONS): some get 503")
        body = error_body("", 503, "too many clients are connected to the proxy", None)
        client.send(head_bytes("HTTP/1.1 503 Service Unavailable\r\n", [
            *self.rules[1].cors_unseen, "Content-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n",
            f"X-Request-Id: {os.urandom(8).hex()}\r\nContent-Length: {len(body)}\r\n"]) + body)
        self.carrier.linger(client)

    def serve(self, client):
        """What a worker does: let a handler answer the client's requests."""
        try:
            self.finish_request(client, client.address)
        except Exception as bug:
            self.log.event("error", "bug", describe(bug))
            client.close(abruptly=True)

    def handle_error(self, request, client_address):
        self.complain("limit", f"a client could not be taken: {sys.exc_info()[1]}")

    def service_actions(self):
        self.upstream.pool.prune()

    def complain(self, event, words):
        """Log what may happen very often, once a minute."""
        if time.monotonic() - self._complained.get(event, float("-inf")) > 60:
            self._complained[event] = time.monotonic()
            self.log.event("warning", event, words)

    def reload(self, environ):
        """Read the settings again; bad ones change nothing."""
        try:
            settings, warnings = Settings.load(environ)
            self.log.reopen(settings.log, settings.log_format)
        except (ValueError, OSError) as error:
            for line in str(error).splitlines():
                self.log.event("error", "reload", f"the old settings stay: {line}")
            return
        if (settings.host, settings.port) != (self.settings.host, self.settings.port):
            warnings.append("PROXY_HOST and PROXY_PORT change with a restart only")
        old = self.upstream
        self.adopt(settings)
        self.carrier.settings = settings
        old.pool.close()
        for words in warnings:
            self.log.event("warning", "settings", words)
        self.log.event("info", "reload", "the settings have been read again")

    def stop_listening(self):
        """Take those who have knocked already, and close the door; a plain close would reset them."""
        self.shutdown()
        self.socket.setblocking(False)
        try:
            while True:
                self.process_request(*super().get_request())
        except OSError:
            self.server_close()

    def drain(self, seconds):
        """Let requests end for so long, then cut what is left."""
        self.draining = True
        self.carrier.drain()
        deadline = time.monotonic() + seconds
        while self.clients and time.monotonic() < deadline:
            time.sleep(0.02)
        self.stopping = True
        self.carrier.stop()
        for client in [*self.clients]:  # of those that threads still hold: they notice, and say 503
            try:
                client.sock.shutdown(socket.SHUT_RD)
            except OSError:
                continue
        deadline = time.monotonic() + 1
        while self.clients and time.monotonic() < deadline:
            time.sleep(0.02)


# ---- Command line -----------------------------------------------------------


class Echo(BaseHTTPRequestHandler):
    """The demo's upstream: a model that says the prompt back, word by word, in three dialects."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    MODEL = {"model": "echo"}
    LISTED = {**MODEL, "name": "echo", "modified_at": "2026-01-01T00:00:00Z", "size": 0, "digest": "", "details": {
        "format": "", "family": "echo", "parameter_size": "0B", "quantization_level": ""}}
    PAGES = {"/api/tags": {"models": [LISTED]}, "/api/version": {"version": OWN_VERSION},
             "/v1/models": {"object": "list", "data": [{"id": "echo", "object": "model", "owned_by": "demo"}]},
             "/api/show": {"details": LISTED["details"], "model_info": {}, "capabilities": ["completion"]}}

    def log_message(self, *args):
        """The proxy in front keeps the log."""

    def do_GET(self):
        self.send(200 if self.path in self.PAGES else 404, self.PAGES.get(self.path, {"error": "no such page"}))

    do_HEAD = do_GET

    def do_POST(self):
        try:
            asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
            said = asked["messages"][-1]["content"] if "messages" in asked else asked.get("prompt", "")
            said = said if isinstance(said, str) else " ".join(part.get("text", "") for part in said)
        except (ValueError, AttributeError, LookupError, TypeError):
            return self.send(400, {"error": "expected a JSON object with a prompt or messages"})
        dialect = {"/api/chat": self.native, "/api/generate": self.native, "/v1/chat/completions": self.openai,
                   "/v1/messages": self.anthropic}.get(self.path)
        if not dialect:
            return self.do_GET()
        whole, events = dialect(said, re.findall(r"\S*\s*", said)[:-1])
        if asked.get("stream", dialect == self.native):
            self.stream(events)
        else:
            self.send(200, whole)

    def native(self, said, words):
        def piece(text, **more):
            chat = {"message": {"role": "assistant", "content": text}}
            said = chat if self.path == "/api/chat" else {"response": text}
            return {**self.MODEL, "created_at": timestamp(time.time()), **said, **more}

        last = {"done": True, "done_reason": "stop", "prompt_eval_count": len(words), "eval_count": len(words)}
        events = [piece(word, done=False) for word in words] + [piece("", **last)]
        return piece(said, **last), [json.dumps(event) + "\n" for event in events]

    def openai(self, said, words):
        def piece(kind, usage=None, **choice):
            return {"id": "chatcmpl-demo", "object": kind, "created": int(time.time()), **self.MODEL, "usage": usage,
                    "choices": [{"index": 0, "finish_reason": None, **choice}]}

        usage = {"prompt_tokens": len(words), "completion_tokens": len(words), "total_tokens": 2 * len(words)}
        events = [piece("chat.completion.chunk", delta={"role": "assistant", "content": word}) for word in words]
        events.append(piece("chat.completion.chunk", usage, delta={}, finish_reason="stop"))
        whole = piece("chat.completion", usage, message={"role": "assistant", "content": said}, finish_reason="stop")
        return whole, [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"]

    def anthropic(self, said, words):
        usage = {"input_tokens": len(words), "output_tokens": len(words)}
        whole = {"id": "msg_demo", "type": "message", "role": "assistant", **self.MODEL, "stop_reason": "end_turn",
                 "stop_sequence": None, "usage": usage, "content": [{"type": "text", "text": said}]}
        events = [{"type": "message_start", "message": {**whole, "content": [], "stop_reason": None}},
                  {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}]
        events += [{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}}
                   for word in words]
        events += [{"type": "content_block_stop", "index": 0},
                   {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage},
                   {"type": "message_stop"}]
        return whole, [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events]

    def send(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data if self.command != "HEAD" else b"")

    def stream(self, events):
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson" if events[0][0] == "{" else "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in events:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(event.encode()), event.encode()))
            time.sleep(0.05)
        self.wfile.write(b"0\r\n\r\n")


class EchoServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that leaves in mid-answer is nothing to report."""


def start(settings, log):
    """Listen, and serve in a thread of its own; returns the Server, or exits when the port cannot be had."""
    raise_file_limit(settings.max_connections)
    gc.freeze()  # what is loaded stays: the collector need not go through it again and again
    try:
        server = Server(settings, log)
    except OSError as error:
        place = f"{settings.host} port {settings.port}"
        if error.errno == errno.EADDRINUSE:
            words = f"{place} is taken, perhaps by an Ollama or another proxy; set PROXY_PORT to another port"
        else:
            words = f"cannot listen on {place}: {error.strerror or error}; set PROXY_HOST and PROXY_PORT"
        sys.exit(fail(words))
    threading.Thread(target=server.serve_forever, args=(0.2,), name="listener", daemon=True).start()
    if settings.upstreams[0].scheme == "https":
        threading.Thread(target=tls_context, name="certificates", daemon=True).start()
    return server


def raise_file_limit(clients):
    """Have descriptors for every client and its upstream, as far as the system's hard limit allows."""
    try:
        import resource  # not on every system
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * clients + 64
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        except (OSError, ValueError):  # a system with another limit yet: accepting will say so if it matters
            return


def run(server, signals, environ):
    """Live until a signal says otherwise; returns the exit status."""
    while True:
        number = signals.recv(1)[0]
        if number != getattr(signal, "SIGHUP", None):
            break
        server.reload(environ)
    for second in signal.SIGTERM, signal.SIGINT:
        signal.signal(second, lambda number, frame: os._exit(128 + number))
    drain = server.settings.drain
    server.draining = True
    server.log.event("info", "stop", f"no more clients; answers may go on for {drain:g} seconds (PROXY_DRAIN)")
    server.stop_listening()
    server.drain(drain)
    server.log.event("info", "stop", "bye")
    server.log.close()
    return 0


def catch_signals():
    """Return a socket that gives a byte, its number, for each signal that comes.

    A queue would not do: the system may deliver a signal to any thread, and nothing then wakes the main one, which
    alone runs handlers. As process 1 of a container, nothing but a handler obeys signals at all.
    """
    signals, bell = socket.socketpair()
    bell.setblocking(False)
    signal.set_wakeup_fd(bell.detach())
    for name in "SIGTERM", "SIGINT", "SIGHUP":
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, frame: None)
    return signals


def open_log(settings):
    try:
        return Log(settings.log, settings.log_format)
    except (OSError, ValueError) as error:
        sys.exit(fail(f"PROXY_LOG={settings.log!r}: {getattr(error, 'strerror', error)}", 2))


def fail(words, status=1):
    """Tell a person what is wrong, a line each, and return the exit status."""
    for line in words.splitlines():
        print(f"ollama_proxy: {line}", file=sys.stderr)
    return status


def serve(environ):
    """Serve until stopped."""
    signals = catch_signals()
    settings, warnings = Settings.load(environ)
    log = open_log(settings)
    server = start(settings, log)
    for words in warnings:
        log.event("warning", "settings", words)
    who = "whoever reaches it" if settings.auth_token == OFF else (
        "whoever has a token" if settings.auth_token else "this machine only, without a token")
    log.event("info", "start", f"ollama_proxy {__version__} listens on {server.url} for {who}, "
              f"and asks {', '.join(f'{a.name} ({a})' for a in settings.upstreams)}")
    return run(server, signals, environ)


def demo(environ):
    """Try everything without a key: a built-in model that echoes, and the real proxy before it."""
    signals = catch_signals()
    echo = EchoServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=echo.serve_forever, name="echo", daemon=True).start()
    kept = {name: environ[name] for name in ("PROXY_LOG", "PROXY_LOG_FORMAT") if name in environ}
    environ = {"PROXY_UPSTREAMS": f"demo=http://127.0.0.1:{echo.server_port}", "PROXY_ENV_FILE": os.devnull,
               "PROXY_PORT": environ.get("PROXY_PORT") or "0", **kept}
    settings, _ = Settings.load(environ)
    server = start(settings, open_log(settings))
    said = {"model": "echo", "messages": [{"role": "user", "content": "Every word comes the moment it is said."}]}
    print(f"A model that echoes, behind the real proxy at {server.url}, streams:\n\n    ", end="", flush=True)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(server.url + "/api/chat", json.dumps(said).encode()) as answer:
        for line in answer:
            print(json.loads(line)["message"]["content"], end="", flush=True)
    print(f"""\n\nTry it (Ctrl-C ends it):

  curl -N {server.url}/api/generate -d '{{"model": "echo", "prompt": "hello from curl"}}'
  curl -N {server.url}/v1/chat/completions -d '{json.dumps({**said, "stream": True})}'
""", flush=True)
    return run(server, signals, environ)


def check(environ):
    """Print the settings, and what each upstream answers; 0 if all is well, else 1."""
    settings, warnings = Settings.load(environ)
    for name, value in settings.shown():
        print(f"{name:<24}{value or '-'}")
    for words in warnings:
        print(f"warning: {words}")
    log = Log(os.devnull)  # what it would say is printed
    good = [probe(Upstream(address, settings, log)) for address in settings.upstreams]
    return 0 if all(good) else 1


def probe(upstream):
    """Ask an upstream something free that a wrong key is refused for; print and return whether all is well.

    On ollama.com the list of models is open to all, and so says nothing about a key; the account's usage is not.
    """
    path = "/api/usage?range=24h" if upstream.address.is_ollama_com else "/v1/models"
    began = time.monotonic()
    print(f"\n{upstream.name} ({upstream.address})")
    try:
        upstream.is_reachable()
        connected = time.monotonic()
        answer = upstream.ask("GET", path, ["Accept: application/json\r\n"])
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
        print(f"  the key is refused ({status})" if upstream.key else f"  it wants a key ({status}): set "
              f"{'OLLAMA_API_KEY' if upstream.address.is_cloud else upstream.address.key_name}")
        return False
    verdict = "key accepted" if upstream.key and status < 300 else "no key set, none needed" if status < 300 else (
        "whether the key is good remains open" if upstream.key else "no key set")
    print(f"  {verdict} (GET {path}: {status})")
    return status < 500


def main(arguments):
    """Run a command; returns the exit status."""
    commands = {"serve": serve, "demo": demo, "check": check}
    command = commands["serve"] if not arguments else commands[parse_arguments(arguments).command]
    try:
        return command(os.environ)
    except SettingsError as error:
        return fail(str(error), 2)


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
