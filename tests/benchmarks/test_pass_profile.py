"""Parts of a pass, of a tiny model."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.pass_profile import PARTS, measure_pass
from retrieval_draft.engine.cpu import linear_choice
from retrieval_draft.engine.cpu.linear_choice import Choice
from retrieval_draft.engine.cpu.stage_program import StageProgram
from retrieval_draft.errors import InvalidInputError
from tests.support.models import make


@pytest.fixture(autouse=True)
def our_matrices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Matrices as small as these would be stock's, and layers would keep their modules."""

    def fastest(weights: Any, *_: Any) -> tuple[Choice, dict[str, float]]:
        name = next(iter(linear_choice._kernels(weights[0])))
        return Choice(name, name, 0.0), {}

    monkeypatch.setattr(linear_choice, "cache_home", lambda: tmp_path)
    monkeypatch.setattr(linear_choice, "_fastest", fastest)


def test_each_part_has_a_time() -> None:
    run = StageProgram.run
    found = measure_pass(make("llama", head_dim=32), sizes=(1, 4), context=20, rounds=2)
    assert StageProgram.run is run
    assert set(found) == {1, 4}
    for parts in found.values():
        assert set(parts) == {"pass", *PARTS}
        assert min(parts["head"], parts["python"]) > 0
        assert parts["pass"] > parts["head"] + parts["python"], "no program ran"


def test_a_model_of_another_structure_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="No layer of GPT2LMHeadModel runs as a whole"):
        measure_pass(make("gpt2"), sizes=(1,), context=8, rounds=1)
