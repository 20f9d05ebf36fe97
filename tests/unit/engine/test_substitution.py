"""Forwards in front of lent ones: a module has each as long as its user runs, and its own at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from retrieval_draft.engine.substitution import lend_forwards, wrap_forwards


def plus(step: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return lambda present: lambda value: present(value) + step


def test_a_lent_forward_is_wrapped_and_comes_back() -> None:
    module = nn.Identity()
    value = torch.zeros(1)
    with lend_forwards([(module, lambda value: value + 10)]):
        with wrap_forwards([(module, plus(1))]):
            assert module(value) == 11
            with wrap_forwards([(module, plus(100))]):  # the first of two decides
                assert module(value) == 11
            assert module(value) == 11
        assert module(value) == 10
    assert module(value) == 0
    assert "forward" not in module.__dict__


def test_the_lender_may_leave_first() -> None:
    module = nn.Identity()
    value = torch.zeros(1)
    lent = lend_forwards([(module, lambda value: value + 10)])
    wrapped = wrap_forwards([(module, plus(1))])
    lent.__enter__()
    wrapped.__enter__()
    lent.__exit__(None, None, None)
    assert module(value) == 11
    wrapped.__exit__(None, None, None)
    assert module(value) == 0


def test_nobody_lends_a_wrapped_module_another_forward() -> None:
    module = nn.Identity()
    value = torch.zeros(1)
    with wrap_forwards([(module, plus(1))]), lend_forwards([(module, lambda value: value + 10)]):
        assert module(value) == 1
    assert module(value) == 0


def test_a_forward_of_other_code_stays() -> None:
    module = nn.Identity()
    value = torch.zeros(1)
    module.forward = lambda value: value + 5  # type: ignore[method-assign, assignment]
    with wrap_forwards([(module, plus(1))]):
        assert module(value) == 6
    assert module(value) == 5
