"""Lends modules another ``forward``, and models another attention, for a while."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

__all__ = [
    "is_free",
    "is_ordinary_call",
    "lend_attention",
    "lend_forwards",
    "loan",
    "own_forwards",
    "wrap_forwards",
]

_users: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_wrapped: WeakKeyDictionary[nn.Module, tuple[int, Any, bool]] = WeakKeyDictionary()
"""Of each wrapped module: users, the ``forward`` in its dictionary before, and whether that may be lent."""

_attention_users: dict[tuple[int, str], tuple[int, str]] = {}
_loans: list[tuple[int, Callable[[], object]]] = []
"""Of each loan now: the borrowing thread, and a function that gives it back."""

_lock = threading.RLock()


def is_free(module: nn.Module) -> bool:
    """True if no other code has replaced a module's ``forward``, as hooks that move weights do."""
    forward = module.__dict__.get("forward")
    return forward is None or module in _users or forward == _own_forward(module)


def is_ordinary_call(input: Any) -> bool:
    """True if a call can do without autograd, autocast, compilers and tensor subclasses."""
    return not (
        torch.is_grad_enabled()
        or type(input) is not Tensor
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
    )


def _return_forward(module: nn.Module) -> None:
    """Ends one use of a lent ``forward``; the last one restores the module's own."""
    _users[module] -= 1
    if not _users[module]:
        del _users[module]
        module.__dict__.pop("forward", None)


@contextmanager
def lend_forwards(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Lends modules these ``forward`` functions for the duration of the context.

    Of several users of one module at a time the first decides and the last restores.
    """
    changed: list[nn.Module] = []

    def give_back() -> None:
        for module in changed:
            _return_forward(module)

    with loan(give_back):
        with _lock:
            for module, forward in forwards:
                if module not in _users:
                    module.__dict__["forward"] = _LentForward(module, forward)
                _users[module] = _users.get(module, 0) + 1
                changed.append(module)
        yield


@contextmanager
def wrap_forwards(
    wrappers: Iterable[tuple[nn.Module, Callable[[Callable[..., Any]], Callable[..., Any]]]],
) -> Iterator[None]:
    """Puts a function in front of the present ``forward`` of modules, lent ones included.

    Of several users of one module at a time the first decides and the last restores.

    Args:
        wrappers: Modules, each with a function that makes the new ``forward`` from the present one.
    """
    changed: list[nn.Module] = []

    def give_back() -> None:
        for module in changed:
            count, before, is_ours = _wrapped.pop(module)
            if count > 1:
                _wrapped[module] = count - 1, before, is_ours
                continue
            module.__dict__.pop("forward", None)
            if before is not None:
                module.__dict__["forward"] = before
            if is_ours:
                _return_forward(module)

    with loan(give_back):
        with _lock:
            for module, wrapper in wrappers:
                if module in _wrapped:
                    count, before, is_ours = _wrapped[module]
                    _wrapped[module] = count + 1, before, is_ours
                else:
                    is_ours = is_free(module)
                    _wrapped[module] = 1, module.__dict__.get("forward"), is_ours
                    if is_ours:  # no other thread lends it another one meanwhile
                        _users[module] = _users.get(module, 0) + 1
                    module.__dict__["forward"] = _LentForward(module, wrapper(module.forward))
                changed.append(module)
        yield


@contextmanager
def own_forwards(model: nn.Module) -> Iterator[None]:
    """Gives a model's modules their own ``forward`` back inside the context, on the thread that borrowed."""
    lent = {
        module: forward
        for module in model.modules()
        if isinstance(forward := module.__dict__.get("forward"), _LentForward)
    }
    with _lock:
        for module in lent:
            del module.__dict__["forward"]
    try:
        yield
    finally:
        with _lock:
            for module, forward in lent.items():
                if module in _users:
                    module.__dict__["forward"] = forward


class _LentForward:
    """A lent function; a copy of its module, as of deepcopy or pickle, gets the module's own one instead.

    It reads the weights of the module that it was made for.
    """

    __slots__ = ("_forward", "_module")

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._module, self._forward = module, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[[nn.Module], MethodType], tuple[nn.Module]]:
        return _own_forward, (self._module,)


def _own_forward(module: nn.Module) -> MethodType:
    return MethodType(type(module).forward, module)


@contextmanager
def lend_attention(model: Any, name: str, over: Collection[str]) -> Iterator[str | None]:
    """Lends a model the attention `name` inside the context; the last of several users restores its own.

    Args:
        model: Any model of transformers.
        name: An attention in transformers' registry.
        over: Attentions that it can replace; a model with another one keeps it.

    Yields:
        The attention it replaces; None where the model keeps its own.
    """
    text = model.config.get_text_config(decoder=True)
    key = id(text), name

    def give_back() -> None:
        count, before = _attention_users.pop(key)
        if count > 1:
            _attention_users[key] = count - 1, before
        else:
            text._attn_implementation = before

    with _lock:
        count, before = _attention_users.get(key, (0, text._attn_implementation))
        taken = text._attn_implementation in (*over, name)
        stack = ExitStack()
        if taken:
            stack.enter_context(loan(give_back))
            _attention_users[key] = count + 1, before
            text._attn_implementation = name
    with stack:
        yield before if taken else None


@contextmanager
def loan(give_back: Callable[[], object]) -> Iterator[None]:
    """Calls `give_back` at the end, or in the child of a fork that another thread makes meanwhile."""
    made = threading.get_ident(), give_back
    with _lock:
        _loans.append(made)
    try:
        yield
    finally:
        with _lock:
            if made in _loans:
                _loans.remove(made)
                give_back()


def _after_fork() -> None:
    """Gives back in the child what threads borrowed that it does not have: they would never do so."""
    mine = threading.get_ident()
    for thread, give_back in [made for made in _loans if made[0] != mine]:
        _loans.remove((thread, give_back))
        give_back()
    _lock.release()


if hasattr(os, "register_at_fork"):
    # No thread is in the middle of lending then.
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_after_fork)
