"""A call in a process of its own, with limits of time and memory: a crash or a hang costs one result."""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["Failed", "isolated"]

_MEMORY = 12 << 30
"""Bytes of address space."""

_LATER = 5
"""Seconds after its limit in which the process is ended by its parent, before it ends itself."""


class Failed(Exception):
    """The process gave no result; the message names the cause."""


def isolated(call: Callable[..., Any], *arguments: Any, limit: float) -> Any:
    """The result of a call, in a process forked from one that has imported the call's module and run nothing.

    Args:
        call: A function of a module.
        *arguments: Its arguments, to be pickled.
        limit: Seconds for it.

    Raises:
        Failed: The process died, or was not done in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([call.__module__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, limit, call, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            raise Failed(f"not done after {limit:g} s")
        return receiver.recv()
    except EOFError:
        process.join()
        raise Failed(f"the process died with exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        receiver.close()


def _run(sender: Connection, limit: float, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.alarm(math.ceil(limit) + _LATER)  # its parent may have been killed
    nothing = os.open(os.devnull, os.O_WRONLY)  # models print
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    sender.send(call(*arguments))
