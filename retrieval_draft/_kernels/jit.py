"""Compilation of all kernels of the package."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar, cast

from numba import njit
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc
from numba.extending import is_jitted

from retrieval_draft._forks import lock_for_moments

__all__ = ["c_address", "c_function", "kernel", "kernel_files", "source_stamp", "sum_kernel"]

_log = logging.getLogger("retrieval_draft")

Function = TypeVar("Function", bound=Callable[..., object])


def kernel(function: Function) -> Function:
    """Compiles on first call, keeps the machine code beside the module, and runs without the GIL.

    Floating point stays strict (no fastmath): the same input gives the same tree on every run.
    """
    return _compiled(function, fastmath=False)


def inner_kernel(function: Function) -> Function:
    """Compiles a function that only kernels call: faster than `kernel`, and not callable from Python."""
    return _compiled(function, fastmath=False, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def sum_kernel(function: Function) -> Function:
    """Compiles a kernel whose sums may be reordered so that they run in vector registers.

    NaN and infinity are kept, and one machine reorders the same way every time.
    """
    return _compiled(function, fastmath={"reassoc", "contract"})


def c_function(function: Callable[..., object], signature: Any) -> Any:
    """Compiles now, for callers outside Python: `address` of the result is that of the machine code.

    The caller keeps the result as long as the address is in use. Cached on disk as other kernels are.
    """
    arguments = (signature.args, signature.return_type)
    compiled: Any = CFunc(function, arguments, locals={}, options={"error_model": "numpy"})
    _keep_code(compiled, function)
    compiled.compile()
    return compiled


_compiling = lock_for_moments()


def c_address(function: Callable[..., object], signature: Any) -> int:
    """The address of a function compiled by `c_function`, once; it is good as long as the process."""
    with _compiling:
        return int(_c_function(function, signature).address)


@cache
def _c_function(function: Callable[..., object], signature: Any) -> Any:
    return c_function(function, signature)


def _compiled(function: Function, fastmath: bool | set[str], **options: bool) -> Function:
    jit: Any = njit
    compiled = jit(nogil=True, error_model="numpy", fastmath=fastmath, **options)(function)
    if is_jitted(compiled):  # else compilation is off, and it is the function itself
        _keep_code(compiled, function)
    return cast(Function, compiled)


class _KeptCode(FunctionCache):
    """numba's cache of machine code on disk; where a file is unusable the function is compiled again."""

    @contextmanager
    def _guard_against_spurious_io_errors(self) -> Iterator[None]:
        # numba calls this around each access. Beside OSError: errors of unpacking an altered file.
        try:
            yield
        except OSError as error:
            _log.debug("Machine code of %s is not kept: %r", self._name, error)
        except Exception as error:
            _log.debug("Kept machine code of %s is thrown away: %r", self._name, error)
            cache_file: Any = self._cache_file
            with suppress(OSError):
                cache_file.flush()


def _keep_code(compiled: Any, function: Callable[..., object]) -> None:
    """Caches machine code beside the module, else in the user's cache folder, else not at all."""
    try:
        make: Any = _KeptCode
        kept = make(function)
    except (RuntimeError, OSError):  # no folder can be written: it is compiled in each process
        return
    # numba regards cached machine code as fresh while the function's own file has its time and size. But
    # kernels are inlined across files, and wheels are built with one time for all files: an upgrade could run
    # the last version's code. So the stamp is the text of all kernels.
    kept._cache_file._source_stamp = source_stamp()
    compiled._cache = kept


def kernel_files() -> list[Path]:
    """The files of all kernels of the package, in a fixed order."""
    return sorted(Path(__file__).parents[1].glob("**/_kernels/*.py"))


@cache
def source_stamp() -> str:
    """A digest of the text of all kernels: code or measurements with another one are out of date."""
    digest = sha256()
    for path in kernel_files():
        digest.update(path.read_bytes())
    return digest.hexdigest()
