from __future__ import annotations

import sys

import pytest

from retrieval_draft._kernels.lazy import LazyKernels


def test_imports_when_first_used_and_keeps_what_it_found() -> None:
    sys.modules.pop("colorsys", None)
    kernels = LazyKernels("colorsys")
    assert "colorsys" not in sys.modules
    found = kernels.rgb_to_hsv
    assert vars(kernels)["rgb_to_hsv"] is found is sys.modules["colorsys"].rgb_to_hsv


def test_names_that_are_not_there() -> None:
    with pytest.raises(AttributeError):
        _ = LazyKernels("colorsys").nothing
