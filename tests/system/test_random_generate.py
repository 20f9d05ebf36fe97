"""Random calls of generate: a short slice of them, and faults that they must find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import StoppingCriteriaList

from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.engine import row
from retrieval_draft.engine.attention import tree_mask
from retrieval_draft.engine.sampling.noise import GumbelNoise
from retrieval_draft.generation import requests
from tests.random_generate.__main__ import main
from tests.random_generate.case import Case
from tests.random_generate.fuzz import Report, fuzz
from tests.random_generate.runner import Difference, Outcome, run

CASES = 30
PLANTED = 400


def test_random_calls_are_those_of_model_generate() -> None:
    report = fuzz(250.0, 5, most=CASES)
    assert report.failed is None, report.failed
    assert report.complaints == []
    assert report.outcome.calls > CASES // 2
    assert report.outcome.accepted > 20


def test_the_same_seed_draws_the_same_cases() -> None:
    drawn: list[list[str]] = []
    for _ in range(2):
        drawn.append([])

        def keep(case: Case) -> Outcome:
            drawn[-1].append(case.to_json())
            return Outcome()

        fuzz(60.0, 9, most=30, check=keep)
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 30
    assert [Case.from_json(text).to_json() for text in drawn[0]] == drawn[0]


_pack_tree = tree_mask.kernels.pack_tree


def _wrong_child(tree: DraftTree, choose: Callable[[int], int]) -> Iterator[tuple[int, int]]:
    """`walk`, but where no child of a node is right, its first one is kept."""
    node = 0
    while True:
        wanted = choose(node)
        yield node, wanted
        children = [child for child in range(len(tree)) if tree.parents[child] == node]
        right = [child for child in children if tree.tokens[child] == wanted]
        if not children:
            return
        node = (right or children)[0]


def _siblings_seen(*given: Any) -> int:
    """`pack_tree`, but every node sees all before it."""
    max_depth: int = _pack_tree(*given)
    *_, nodes, _, hidden = given
    if nodes > 1:
        hidden[: nodes * nodes] = ~np.tri(nodes, dtype=np.bool_).ravel()
    return max_depth


def _same_for_all_samples(seed: int, vocabulary: int, device: Any, sample: int = 0) -> GumbelNoise:
    """`GumbelNoise`, but equal prompts draw equal tokens."""
    return GumbelNoise(seed, vocabulary, device)


FAULTS: dict[str, tuple[Any, str, Any]] = {
    "wrong child": (row, "walk", _wrong_child),
    "siblings seen": (tree_mask.kernels, "pack_tree", _siblings_seen),
    "shared processors": (requests, "processors_of_row", lambda processors, row, rows: processors),
    "criteria unasked": (requests, "criteria_of_row", lambda criteria, rows: StoppingCriteriaList()),
    "equal samples": (requests, "GumbelNoise", _same_for_all_samples),
}


def _without_probe(case: Case) -> Outcome:
    """Trees of an oracle, whose model nobody has tried out before, in one size of pass."""
    return run(replace(case, method="oracle"), torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*FAULTS[fault])
    report = fuzz(200.0, 1, most=PLANTED, check=_without_probe, shrink=False)
    assert report.failed is not None, f"not in {report.cases} cases"


@pytest.mark.slow
def test_a_case_that_differs_shrinks_and_can_be_run_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[Case] = []

    def check(case: Case) -> Outcome:
        try:
            return _without_probe(case)
        except Difference:
            found.append(case)
            raise

    with monkeypatch.context() as planted:
        planted.setattr(*FAULTS["wrong child"])
        case, difference = fuzz(200.0, 4, most=PLANTED, check=check).failed or pytest.fail("not found")
        assert len(case.calls) == len(case.calls[0].prompts) == 1
        assert len(case.to_json()) < len(found[0].to_json())
        assert difference.what == "tokens"
        assert difference.expected != difference.got
        text = replace(case, method="oracle").to_json()
        assert main(["--case", text]) == 3
        shown = capsys.readouterr().out
        assert text in shown
        assert str(difference.expected) in shown
        assert str(difference.got) in shown
    assert main(["--case", text]) == 0


def test_a_run_that_proves_nothing_says_so() -> None:
    refused = Outcome(calls=50, accepted=9)
    refused.refused["refused"] = 20
    rounded = Outcome(calls=50, accepted=9, rounding=9)
    for outcome, word in ((refused, "refused"), (rounded, "float32"), (Outcome(calls=50), "accepted")):
        (complaint,) = Report(cases=50, outcome=outcome).complaints
        assert word in complaint
    assert Report(cases=50, outcome=Outcome(calls=50, accepted=9)).complaints == []
