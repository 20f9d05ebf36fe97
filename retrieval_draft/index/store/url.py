"""The URL of a store: address, options and user. It never shows a secret."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from retrieval_draft.errors import InvalidInputError

__all__ = ["PASSWORD_VARIABLE", "USERNAME_VARIABLE", "StoreURL", "parse_store_url"]

USERNAME_VARIABLE = "RETRIEVAL_DRAFT_REDIS_USERNAME"
PASSWORD_VARIABLE = "RETRIEVAL_DRAFT_REDIS_PASSWORD"  # noqa: S105 - its name

_SCHEMES = {
    "redis": ("redis", False),
    "rediss": ("redis", True),
    "unix": ("unix", False),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "embedded": ("embedded", False),
}
"""Kind and TLS of each. ``valkey`` and ``valkeys`` may replace ``redis`` and ``rediss``."""

_TLS_OPTIONS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname")
_SENTINEL_OPTIONS = ("sentinel_username", "sentinel_password")
_SENTINEL_PORT, _REDIS_PORT = 26379, 6379
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")


@dataclass(frozen=True, slots=True)
class StoreURL:
    """A parsed URL.

    Attributes:
        kind: "redis", "unix", "cluster", "sentinel" or "embedded".
        shown: The URL without secrets, as `str` returns it.
        hosts: Hosts and ports, for "redis", "cluster" and "sentinel".
        path: The socket of "unix", or the folder of "embedded".
        service: The master's name at Sentinel.
        database: Number.
        tls: redis-py's arguments for TLS; None without TLS.
        username: Of an ACL.
        password: Of that user.
        sentinel: redis-py's arguments for the Sentinels themselves.
    """

    kind: str
    shown: str
    hosts: tuple[tuple[str, int], ...] = ()
    path: Path | None = None
    service: str = ""
    database: int = 0
    tls: Mapping[str, str | bool] | None = None
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    sentinel: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return self.shown


def parse_store_url(url: str, environ: Mapping[str, str] = os.environ) -> StoreURL:
    """Parses a store's URL.

    Args:
        url: ``redis://host:port/db``, ``rediss://`` with TLS, ``unix:///path``,
            ``redis+cluster://host:port``, ``redis+sentinel://host:port,host:port/service/db`` or
            ``embedded://folder``. Options of TLS and Sentinel follow a question mark, by redis-py's names.
        environ: Environment with user and password where the URL has none.

    Raises:
        InvalidInputError: It is none of these; the message holds no secret.

    Example:
        redis://me:secret@host/2  ->  kind "redis", hosts (("host", 6379),), database 2, shown
        "redis://host:6379/2"
    """
    if "://" not in url:
        _refuse("The store is no URL.", "Write redis://HOST:PORT or embedded://FOLDER.")
    name = url.partition("://")[0].lower()
    scheme = name.replace("valkey", "redis", 1)
    if scheme not in _SCHEMES:
        begin = f"{name}://" if _SCHEME.fullmatch(name) else "that"
        _refuse(f"A store's URL cannot begin with {begin}.", f"Use one of: {', '.join(_SCHEMES)}.")
    kind, has_tls = _SCHEMES[scheme]
    if kind == "embedded":
        return _embedded(url, environ)
    try:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError:
        _refuse(f"The {name}:// URL of the store cannot be read.", "Percent-encode what is special in it.")
    _check_encoding(parts, options, kind, name)
    _check_options(options, has_tls, kind, "@" in parts.netloc)
    user = parts.netloc.rpartition("@")[0]
    username, _, password = user.partition(":")
    tls = _tls(options) if has_tls else None
    path, service, database, hosts = _where(parts, kind, name, options)
    shown = f"{name}://" + (
        str(path) if path else ",".join(f"{_bracketed(host)}:{port}" for host, port in hosts)
    )
    shown += f"/{service}" if service else ""
    shown += f"/{database}" if database and kind != "unix" else ""
    sentinel = {key.removeprefix("sentinel_"): options[key] for key in _SENTINEL_OPTIONS if key in options}
    return StoreURL(
        kind,
        shown,
        hosts,
        path,
        service,
        database,
        tls,
        unquote(username) or environ.get(USERNAME_VARIABLE) or None,
        unquote(password) or environ.get(PASSWORD_VARIABLE) or None,
        sentinel,
    )


def _refuse(message: str, hint: str) -> NoReturn:
    raise InvalidInputError(message, hint) from None


def _embedded(url: str, environ: Mapping[str, str]) -> StoreURL:
    folder = url.partition("://")[2]
    if not folder:
        _refuse("embedded:// names no folder.", "Write embedded://FOLDER.")
    if "@" in folder.partition(":")[2]:  # it would be shown
        _refuse("embedded:// takes no user and password.", f"Put the password in {PASSWORD_VARIABLE}.")
    try:
        path = Path(folder).expanduser()
    except RuntimeError:
        _refuse("embedded:// names the home of a user who is not there.", "Write embedded://FOLDER.")
    if "\0" in folder:
        _refuse("embedded:// names no folder.", "Write embedded://FOLDER.")
    return StoreURL(
        "embedded",
        f"embedded://{folder}",
        path=path,
        username=environ.get(USERNAME_VARIABLE) or None,
        password=environ.get(PASSWORD_VARIABLE) or None,
    )


def _check_encoding(parts: SplitResult, options: Mapping[str, str], kind: str, name: str) -> None:
    """Refuses user and password that are not percent-encoded: they end early, and the rest would be shown."""
    others = [key + value for key, value in options.items() if key not in (*_TLS_OPTIONS, *_SENTINEL_OPTIONS)]
    path = "" if kind == "unix" else parts.path
    if parts.fragment or "@" in "".join((path, *others)):
        _refuse(f"The {name}:// URL of the store cannot be read.", "Percent-encode what is special in it.")
    if kind == "unix" and parts.netloc.rpartition("@")[2]:
        _refuse("unix:// takes an absolute path.", "Write unix:///PATH.")


def _check_options(options: Mapping[str, str], has_tls: bool, kind: str, has_secret: bool) -> None:
    allowed = ["db"] if kind != "cluster" else []
    allowed += _TLS_OPTIONS if has_tls else ()
    allowed += _SENTINEL_OPTIONS if kind == "sentinel" else ()
    for option in options:
        if option not in allowed:
            hint = f"Allowed: {', '.join(allowed) or 'none'}."
            if option in _TLS_OPTIONS:
                hint = "Write rediss:// for TLS."
            # The name of an option may be part of a password with & in it.
            hidden = has_secret or any(key in options for key in _SENTINEL_OPTIONS)
            named = "" if hidden else f" {option!r}"
            _refuse(f"The store's URL has an option{named} that does not belong there.", hint)


def _tls(options: Mapping[str, str]) -> dict[str, str | bool]:
    tls: dict[str, str | bool] = {key: value for key, value in options.items() if key in _TLS_OPTIONS}
    check = str(tls.pop("ssl_check_hostname", "true")).lower()
    if check not in ("true", "false"):
        _refuse(f"ssl_check_hostname is {check!r}.", "Write true or false.")
    for key, value in tls.items():
        if not _is_file(str(value)):
            _refuse(f"{key} names {str(value)!r}, which is no file.", "Name a PEM file.")
    return tls | {"ssl_check_hostname": check == "true"}


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # too long, or in a folder that we may not read
        return False


def _where(
    parts: SplitResult, kind: str, name: str, options: Mapping[str, str]
) -> tuple[Path | None, str, int, tuple[tuple[str, int], ...]]:
    """Path, service, database and hosts."""
    if kind == "unix":
        if not parts.path:
            _refuse("unix:// names no socket.", "Write unix:///PATH.")
        return Path(unquote(parts.path)), "", _database(options.get("db", "0")), ()
    segments = [unquote(part) for part in parts.path.split("/") if part]
    service = ""
    if kind == "sentinel":
        if not segments:
            _refuse(f"{name}:// names no service.", f"Write {name}://HOST:PORT,HOST:PORT/SERVICE.")
        service = segments.pop(0)
    if len(segments) > 1 or (kind == "cluster" and segments):
        _refuse(f"The path of the {name}:// URL is too long.", "Behind the hosts comes a database's number.")
    database = _database(segments[0] if segments else options.get("db", "0"))
    port = _SENTINEL_PORT if kind == "sentinel" else _REDIS_PORT
    listed = parts.netloc.rpartition("@")[2].split(",")
    if kind == "redis" and len(listed) > 1:
        _refuse(f"{name}:// names several hosts.", f"Write {name}+cluster:// or {name}+sentinel://.")
    return None, service, database, tuple(_host(each, port, name) for each in listed)


def _host(text: str, port: int, name: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname or "", port if parts.port is None else parts.port
        if port == 0:
            raise ValueError(port)
    except ValueError:
        _refuse(f"A host of the {name}:// URL cannot be read.", "Write HOST:PORT, with a port in 1..65535.")
    if not host:
        _refuse(f"The {name}:// URL names no host.", f"Write {name}://HOST:PORT.")
    return host, port


def _database(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 8) or int(text) > 1 << 20:
        _refuse(f"The store's database is {text!r}.", "It must be a number, as in redis://HOST:PORT/0.")
    return int(text)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
