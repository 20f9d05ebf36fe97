"""Costs of passes in the history's folder: kept by situation, checked on reading."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from retrieval_draft.config import DraftConfig
from retrieval_draft.drafting.cost import SIZES
from retrieval_draft.engine.pass_costs import (
    COSTS,
    MOST_SITUATIONS,
    PassCosts,
    keep_costs,
    load_costs,
    situation,
)
from retrieval_draft.engine.target import Target
from tests.support.models import make

SECONDS = {size: 0.01 + 0.001 * size for size in SIZES}
HERE, THERE = {"machine": "mine", "model": "a"}, {"machine": "mine", "model": "b"}


def test_each_situation_has_its_own_costs(tmp_path: Path) -> None:
    path = tmp_path / COSTS
    assert load_costs(path, HERE) == {}
    keep_costs(path, PassCosts(HERE, SECONDS))
    keep_costs(path, PassCosts(THERE, dict.fromkeys(SIZES, 1.0)))
    assert load_costs(path, HERE) == SECONDS
    assert load_costs(path, THERE) == dict.fromkeys(SIZES, 1.0)
    assert load_costs(path, {"machine": "another"}) == {}
    keep_costs(path, PassCosts(HERE, dict.fromkeys(SIZES, 2.0)))
    assert load_costs(path, HERE) == dict.fromkeys(SIZES, 2.0), "the newest"
    assert len(json.loads(path.read_text())) == 2


def test_the_oldest_situations_go(tmp_path: Path) -> None:
    path = tmp_path / COSTS
    for number in range(MOST_SITUATIONS + 1):
        keep_costs(path, PassCosts({"machine": str(number)}, SECONDS))
    found = [load_costs(path, {"machine": str(number)}) for number in range(MOST_SITUATIONS + 1)]
    assert found == [{}] + [SECONDS] * MOST_SITUATIONS


@pytest.mark.parametrize(
    "content",
    [b"", b"[", b"{}", b"[1]", b'[{"situation": {"machine": 1}, "seconds": {}}]', b"\xff", b"[" * 100_000],
)
def test_a_file_that_is_torn_costs_a_measurement(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / COSTS
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "retrieval_draft"):
        assert load_costs(path, HERE) == {}
    assert str(path) in caplog.text
    keep_costs(path, PassCosts(HERE, SECONDS))
    assert load_costs(path, HERE) == SECONDS


@pytest.mark.parametrize("seconds", [0.0, -1.0, 1e9])
def test_times_that_no_pass_takes_are_measured_again(seconds: float, tmp_path: Path) -> None:
    keep_costs(tmp_path / COSTS, PassCosts(HERE, SECONDS | {SIZES[0]: seconds}))
    assert load_costs(tmp_path / COSTS, HERE) == {}


def test_sizes_that_are_missing_are_measured_again(tmp_path: Path) -> None:
    keep_costs(tmp_path / COSTS, PassCosts(HERE, {1: 0.1}))
    assert load_costs(tmp_path / COSTS, HERE) == {}


def test_a_folder_in_its_place_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / COSTS).mkdir()
    keep_costs(tmp_path / COSTS, PassCosts(HERE, SECONDS))
    assert load_costs(tmp_path / COSTS, HERE) == {}
    assert "could not be saved" in caplog.text


def test_a_situation_tells_models_and_settings_apart() -> None:
    target, config = Target(make("llama")), DraftConfig()
    assert situation(target, config) == situation(Target(make("llama")), config)
    assert situation(target, config) != situation(Target(make("qwen2")), config)
    assert situation(target, config) != situation(target, DraftConfig(cpu_kernels=False))
