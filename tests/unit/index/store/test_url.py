"""Tests of the URLs of stores, and that none of them shows a secret."""

import traceback
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.store.url import parse_store_url

SECRET = "s3cr%20et!"
SPECIAL = [
    "s3cr/et",
    "s3cr#et",
    "s3cr?et",
    "s3cr@et",
    "s3cr[et",
    "s3cr%et",
    "s3cr:et",
    "s3cr\u2100et",
    "s3cr et",
]


def shown(url: str, environ: dict[str, str] | None = None) -> str:
    """Whatever a user may come to see of a URL."""
    try:
        found = parse_store_url(url, environ or {})
    except InvalidInputError as error:
        lines = traceback.TracebackException.from_exception(error).format()
        return "".join(line for line in lines if not line.startswith("  File"))
    assert found.password is not None
    return f"{found} {found!r}"


@pytest.mark.parametrize(
    ("url", "kind", "hosts", "shown"),
    [
        ("redis://h", "redis", (("h", 6379),), "redis://h:6379"),
        ("redis://h:1234/3", "redis", (("h", 1234),), "redis://h:1234/3"),
        ("redis://h?db=3", "redis", (("h", 6379),), "redis://h:6379/3"),
        ("redis://[::1]:1234", "redis", (("::1", 1234),), "redis://[::1]:1234"),
        ("valkey://h", "redis", (("h", 6379),), "valkey://h:6379"),
        ("rediss://h", "redis", (("h", 6379),), "rediss://h:6379"),
        ("valkeys://h", "redis", (("h", 6379),), "valkeys://h:6379"),
        ("redis+cluster://a,b:7", "cluster", (("a", 6379), ("b", 7)), "redis+cluster://a:6379,b:7"),
        ("valkey+cluster://a", "cluster", (("a", 6379),), "valkey+cluster://a:6379"),
        (
            "redis+sentinel://a,b:7/main/2",
            "sentinel",
            (("a", 26379), ("b", 7)),
            "redis+sentinel://a:26379,b:7/main/2",
        ),
    ],
)
def test_schemes(url, kind, hosts, shown) -> None:
    found = parse_store_url(url, {})
    assert (found.kind, found.hosts, str(found)) == (kind, hosts, shown)
    assert (found.tls is not None) == url.startswith(("rediss", "valkeys"))
    assert (found.username, found.password) == (None, None)


def test_sockets_and_folders() -> None:
    assert parse_store_url("unix:///run/redis.sock?db=2", {}).path == Path("/run/redis.sock")
    assert parse_store_url("unix:///run/redis.sock?db=2", {}).database == 2
    assert parse_store_url("embedded://some/folder", {}).path == Path("some/folder")
    assert parse_store_url("embedded:///srv/store", {}).path == Path("/srv/store")
    assert parse_store_url("embedded://~/store", {}).path == Path("~/store").expanduser()


def test_user_and_password() -> None:
    environ = {"RETRIEVAL_DRAFT_REDIS_USERNAME": "env", "RETRIEVAL_DRAFT_REDIS_PASSWORD": "environ"}
    found = parse_store_url("redis://me:a%2Fb%40c@h", environ)
    assert (found.username, found.password) == ("me", "a/b@c")
    found = parse_store_url("redis://h", environ)
    assert (found.username, found.password) == ("env", "environ")
    assert parse_store_url("redis://:only@h", {}).password == "only"
    assert parse_store_url("embedded://folder", environ).password == "environ"
    found = parse_store_url("unix://me:a%40b@/run/s", {})
    assert (found.username, found.password, str(found)) == ("me", "a@b", "unix:///run/s")
    found = parse_store_url("redis+sentinel://h/main?sentinel_password=x&sentinel_username=y", {})
    assert dict(found.sentinel) == {"password": "x", "username": "y"}


def test_tls_options(tmp_path) -> None:
    pem = tmp_path / "ca.pem"
    pem.touch()
    found = parse_store_url(f"rediss://h?ssl_ca_certs={pem}&ssl_check_hostname=false", {})
    assert found.tls == {"ssl_ca_certs": str(pem), "ssl_check_hostname": False}
    assert parse_store_url("rediss://h", {}).tls == {"ssl_check_hostname": True}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:6379", "no URL"),
        ("http://h", "cannot begin with http://"),
        ("redis://", "names no host"),
        ("redis://h:99999", "cannot be read"),
        ("redis://h:port", "cannot be read"),
        ("redis://a,b", "several hosts"),
        ("redis://h/one", "database is 'one'"),
        ("redis://h/1/2", "path"),
        ("redis+cluster://h/1", "path"),
        ("redis+sentinel://h", "names no service"),
        ("redis://h?timeout=3", "'timeout' that does not belong"),
        ("redis://h?ssl_certfile=x", "Write rediss:// for TLS"),
        ("rediss://h?ssl_ca_certs=/no/such/file", "no file"),
        ("rediss://h?ssl_check_hostname=maybe", "'maybe'"),
        ("rediss://h?ssl_ca_certs=" + "x" * 300, "no file"),
        ("redis://h:0", "cannot be read"),
        ("redis://h/" + "9" * 5000, "must be a number"),
        ("redis://h/\u0663", "must be a number"),
        ("redis://h?db=", "must be a number"),
        ("redis://[h", "cannot be read"),
        ("redis://h#1", "cannot be read"),
        ("redis+sentinel://h/main?ssl_keyfile=x", "Write rediss:// for TLS"),
        ("redis+cluster://h?db=1", "'db' that does not belong"),
        ("unix://", "names no socket"),
        ("unix://run/redis.sock", "absolute path"),
        ("embedded://~nobody-of-that-name/x", "home of a user"),
        ("embedded://a\0b", "names no folder"),
        ("embedded://me:word@folder", "RETRIEVAL_DRAFT_REDIS_PASSWORD"),
        ("embedded://", "names no folder"),
    ],
)
def test_bad_urls(url, message) -> None:
    with pytest.raises(InvalidInputError, match=message):
        parse_store_url(url, {})


@pytest.mark.parametrize(
    "url",
    [
        "redis://u:{}@h:6379/1",
        "rediss://u:{}@h",
        "redis+cluster://u:{}@a,b",
        "redis+sentinel://u:{}@a/main?sentinel_password={}",
        "redis://u:{}@h:port",
        "redis://u:{}@h:99999999",
        "redis://u:{}@",
        "redis://u:{}@h/x",
        "redis://u:{}@h?no=1",
        "other://u:{}@h",
        "redis://u:{}@[h",
        "redis://u:{}/@h",
        "redis://u:{}@a,b",
        "redis://u:12/{}@h",
        "redis://u:12#{}@h",
        "redis://u:a@b#{}@h",
        "redis://u:a@b/{}@h",
        "redis://u:12?{}=x@h",
        "redis://u:12?db={}@h",
        "redis://u:a@b?{}=1",
        "redis+sentinel://a/main?sentinel_password=a&{}=1",
        "unix://u:12/{}@/run/s",
        "unix://u:{}@/run/s",
        "embedded://u:{}@folder",
        "u:{}@h://x",
        "{}",
        "u:{}@h:6379",
    ],
)
def test_no_secret_is_shown(url) -> None:
    assert "s3cr" not in shown(url.format(SECRET, SECRET))


@pytest.mark.parametrize("password", SPECIAL)
@pytest.mark.parametrize("scheme", ["redis", "rediss", "redis+cluster", "redis+sentinel", "other"])
def test_a_password_that_is_not_encoded_is_not_shown(scheme, password) -> None:
    assert "s3cr" not in (text := shown(f"{scheme}://me:{password}@h/main"))
    assert "me:" not in text


def test_what_the_environment_holds_is_not_shown() -> None:
    environ = {"RETRIEVAL_DRAFT_REDIS_USERNAME": "us3cr", "RETRIEVAL_DRAFT_REDIS_PASSWORD": "s3cret"}
    for url in ("redis://h", "embedded://folder", "unix:///run/s", "redis+sentinel://h/main", "redis://h/x"):
        assert "s3cr" not in shown(url, environ)


@given(st.text(max_size=60))
def test_any_text_is_a_url_or_refused(text) -> None:
    for prefix in (
        "",
        "redis://",
        "rediss://h?",
        "redis+sentinel://",
        "unix://",
        "embedded://",
        "redis://h/",
    ):
        with suppress(InvalidInputError):
            parse_store_url(prefix + text, {})


@given(st.text(alphabet="0123456789ab@:/?#[]&=%,;.~ ", max_size=40))
def test_marks_of_urls_in_any_order_are_a_url_or_refused(text) -> None:
    for scheme in ("redis", "rediss", "redis+cluster", "redis+sentinel", "unix", "embedded"):
        with suppress(InvalidInputError):
            parse_store_url(f"{scheme}://{text}", {})


@given(st.text(alphabet="xyz0123456789@:/?#[]&=%,;.~ ", max_size=20))
def test_no_password_is_shown_that_was_read_as_one(password) -> None:
    found = parse_store_url(f"redis://me:{quote('s3cr' + password, safe='')}@h", {})
    assert found.password == "s3cr" + password
    assert f"{found}" == "redis://h:6379"
    assert "s3cr" not in repr(found)
