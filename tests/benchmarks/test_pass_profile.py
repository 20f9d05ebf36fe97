"""Parts of a pass, of a tiny model."""

import pytest
import torch

from benchmarks.pass_profile import PARTS, measure_pass
from retrieval_draft.engine.cpu.stage_program import StageProgram
from tests.support.models import make


def test_each_part_has_a_time() -> None:
    found = measure_pass(make("llama", head_dim=32), sizes=(1, 4), context=20, rounds=2)
    assert set(found) == {1, 4}
    for parts in found.values():
        assert set(parts) == {"pass", *PARTS}
        assert sum(parts[name] for name in PARTS) == pytest.approx(parts["pass"])
        assert parts["head"] > 0


def test_the_program_that_was_changed_is_put_back() -> None:
    run = StageProgram.run
    measure_pass(make("llama", head_dim=32), sizes=(1,), context=8, rounds=1)
    assert StageProgram.run is run
    assert torch.get_num_threads() >= 1
