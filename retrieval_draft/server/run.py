"""Running of the application until a signal, after which open requests finish first."""

from __future__ import annotations

import asyncio
import gc
import logging
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

import uvicorn

from retrieval_draft.errors import RetrievalDraftError
from retrieval_draft.http.protocol import http_config
from retrieval_draft.server.service import Service

__all__ = ["DrainingServer", "run", "set_aside"]

_log = logging.getLogger("retrieval_draft.server")
_POLL_SECONDS = 0.05
_LAST_WORDS_SECONDS = 2.0
"""Seconds in which streams end with a last event when the server stops."""


class DrainingServer(uvicorn.Server):
    """A server that stops in two steps: it refuses requests until the running ones are done, then it ends.

    Args:
        config: Of uvicorn.
        service: The served service.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: Any = None) -> None:
        """Starts listening."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            addresses = ", ".join(_address(self.config, server) for server in self.servers)
            _log.info("Listening on %s", addresses)
            self._watch = asyncio.create_task(self._end_if_not_loaded())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Starts draining at the first signal, ends at once at the second."""
        # uvicorn would raise the signal again at the end; a stop by a signal is no failure here.
        if self._service.is_draining:
            self.should_exit = self.force_exit = True
            return
        self._service.drain()
        loop = self._loop
        if loop is None:
            self.should_exit = True
        else:
            loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        grace = self._service.settings.grace_seconds
        _log.info("Stopping: what runs has %g s to finish.", grace)
        deadline = monotonic() + grace
        while not self._is_quiet and monotonic() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        if not self._is_quiet:
            _log.warning("What still runs after %g s is given up.", grace)
            self._service.abort()
            until = monotonic() + _LAST_WORDS_SECONDS
            while not self._is_quiet and monotonic() < until:
                await asyncio.sleep(_POLL_SECONDS)
        self.should_exit = True

    @property
    def _is_quiet(self) -> bool:
        return self._service.is_idle and not self.server_state.tasks

    async def _end_if_not_loaded(self) -> None:
        while not self._service.is_ready and not self.should_exit:
            self.should_exit = self._service.error is not None
            await asyncio.sleep(_POLL_SECONDS)


def set_aside() -> None:
    """Takes all objects that there are out of later garbage collections, which stop every thread.

    To be called once, when the model is loaded: what becomes garbage of these objects is not collected any
    more, all later objects are as ever. A full collection over the half million of torch, transformers and
    the model takes a quarter of a second.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # else the next one waits for as many new objects as a quarter of those that were set aside


def run(
    app: Any, service: Service, *, host: str = "127.0.0.1", port: int = 8000, socket: Path | None = None
) -> None:
    """Serves until a signal.

    Args:
        app: Of `create_app`.
        service: The served service.
        host: Address to listen on.
        port: 0 for any that is free.
        socket: A unix socket to listen on, instead of both.

    Raises:
        RetrievalDraftError: The address cannot be listened on.
        Exception: The error of loading the model.
    """
    config = http_config(
        app,
        host=host,
        port=port,
        uds=None if socket is None else str(socket),
        log_config=None,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(_LAST_WORDS_SECONDS) + 1,
    )
    server = DrainingServer(config, service)
    service.when_loaded.append(lambda _: set_aside())
    try:
        server.run()
    except SystemExit as error:  # uvicorn ends the process where it cannot listen
        address = str(socket) if socket is not None else f"{host}:{port}"
        raise RetrievalDraftError(f"The server cannot listen on {address}.", "Is the port taken?") from error
    except OSError as error:  # uvicorn does not handle those of unix sockets
        if socket is None or server.started:
            raise
        raise RetrievalDraftError(
            f"The server cannot listen on {socket}: {error.strerror or error}.",
            "Name a socket in a folder that is there and can be written, in at most 100 bytes.",
        ) from error
    if service.error is not None:
        raise service.error


def _address(config: uvicorn.Config, server: Any) -> str:
    if config.uds:
        return str(config.uds)
    address = server.sockets[0].getsockname()
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"http://{host}:{address[1]}"
