"""Text from captured passes, on tapes: that of `model.generate`, and of the same seed without drafts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.engine import row as row_module
from retrieval_draft.engine.decode import Batch
from retrieval_draft.engine.target import Target
from tests.support.batches import padded, ragged
from tests.support.drafters import drafter_with, near_ties, prompt_ids, reply_of
from tests.support.models import CACHE, CONFIGS, make
from tests.support.sources import OracleSource

NEW = 60


def tape(model: Any, **options: Any) -> RetrievalDrafter:
    return RetrievalDrafter.for_model(model, config=DraftConfig(nodes=12, graphs="tape", **options))


def replays(drafter: RetrievalDrafter) -> int:
    graphs = drafter.target.graphs
    assert graphs is not None
    assert graphs.reason is None
    return graphs.replays


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_and_sampled_text(name: str) -> None:
    model, prompt = make(name), prompt_ids(40)
    stock = model.generate(prompt, max_new_tokens=NEW, do_sample=False)
    drafter = tape(model)
    assert near_ties(model, drafter.generate(prompt, max_new_tokens=NEW, do_sample=False), stock) == 0
    plain = RetrievalDrafter.for_model(model, config=DraftConfig(method="none", graphs="tape"))
    eager = RetrievalDrafter.for_model(model, config=DraftConfig(nodes=12, graphs="off", cpu_kernels=False))
    for options in (
        {"top_k": 20, "top_p": 0.9, "temperature": 0.8},
        {"top_k": 0},
        {"top_k": 0, "top_p": 0.9},
        {"top_k": 0, "min_p": 0.05, "temperature": 1.3},
        {"top_k": 0, "repetition_penalty": 1.2},
    ):
        sampled = {"do_sample": True, "seed": 3, "max_new_tokens": NEW, **options}
        out = drafter.generate(prompt, **sampled)
        assert torch.equal(out, plain.generate(prompt, **sampled))
        assert torch.equal(out, eager.generate(prompt, **sampled))
    assert replays(drafter) > 20
    assert replays(plain) > 5 * (NEW - 2)
    assert drafter.stats.accepted > 0


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_batches_are_captured_until_their_last_row_ends(name: str) -> None:
    model, prompts = make(name), ragged((9, 23, 40))
    ids, mask = padded(prompts)
    drafter = tape(model)
    out = drafter.generate(ids, mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(out[row, ids.shape[1] :], alone[0, prompt.shape[1] :])
    graphs = drafter.target.graphs
    assert graphs is not None
    assert graphs.rows_reason is None
    assert {rows for rows, _, _ in graphs._passes} & {2, 4}
    assert replays(drafter) >= drafter.stats.passes - 2, "all but those that prove the eager passes"
    assert torch.equal(drafter.generate(prompt, max_new_tokens=NEW, do_sample=False), alone)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
def test_a_returned_cache_is_the_callers_own(name: str) -> None:
    """Later requests write to the memory of captured passes, not to a cache that was returned."""
    model, prompt = make(name), prompt_ids(40)
    drafter = tape(model)
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    first = drafter.generate(prompt, **options)
    cache = first[CACHE]
    held = [layer.keys.clone() for layer in cache.layers]
    drafter.generate(prompt_ids(30, seed=2), **options)
    assert all(map(torch.equal, held, [layer.keys for layer in cache.layers]))
    turn = torch.cat([first.sequences, prompt_ids(5, seed=3)], 1)
    again = drafter.generate(turn, **{CACHE: cache}, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(again, model.generate(turn, max_new_tokens=NEW, do_sample=False))
    assert replays(drafter) > 20


def test_long_replies_whose_paths_move() -> None:
    """Forced drafts, so that long paths move, in a text beyond a page of slots."""
    model, prompt = make("gemma3"), prompt_ids(40)
    stock = model.generate(prompt, max_new_tokens=420, do_sample=False)
    drafter = drafter_with(model, OracleSource(reply_of(stock, prompt)), nodes=16, graphs="tape")
    drafter.target.use_graphs("tape")
    out = drafter.generate(prompt, max_new_tokens=420, do_sample=False)
    assert near_ties(model, out, stock) == 0


def passes_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pass of every third step fails before it begins; rows are passed alone then."""
    verify, begin, step, steps = Target.verify_rows, Batch.__init__, Batch.step, [0]

    def stepping(batch: Batch) -> Any:
        steps[0] += 1
        return step(batch)

    def fails(target: Target, caches: Any, inputs: Any) -> torch.Tensor:
        if steps[0] % 3 == 0:
            steps[0] += 1
            raise RuntimeError("out of memory, say")
        return verify(target, caches, inputs)

    def telling(batch: Batch, *given: Any) -> None:
        begin(batch, *given, failed=lambda row, error: pytest.fail(repr(error)))

    monkeypatch.setattr(Batch, "step", stepping)
    monkeypatch.setattr(Target, "verify_rows", fails)
    monkeypatch.setattr(Batch, "__init__", telling)


def paths_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured passes move one slot of a path at most."""
    monkeypatch.setattr(row_module, "MOVES", 1)
    monkeypatch.setattr(row_module, "most_moves", lambda rows: 1)


def passes_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes are eager after every two that may be captured."""
    verify, calls = Target.verify_rows, [0]

    def alternating(target: Target, caches: Any, inputs: Any) -> torch.Tensor:
        calls[0] += 1
        graphs = target.graphs
        assert graphs is not None
        graphs.reason = graphs.rows_reason = "told so" if calls[0] % 4 < 2 else None
        return verify(target, caches, inputs)

    monkeypatch.setattr(Target, "verify_rows", alternating)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("change", [passes_fail, paths_are_long, passes_alternate])
def test_accepted_paths_are_in_place_whichever_pass_follows(
    rows: int, change: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = make("gemma3"), ragged((9, 23, 40))[:rows]
    ids, mask = padded(prompts)
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    plain = drafter_with(model, target=Target(model, "off"), nodes=0).generate(ids, mask, **options)
    replies = [reply[ids.shape[1] :].tolist() for reply in plain]
    target = Target(model, "tape")
    drafter = drafter_with(model, OracleSource(*replies), target=target)
    change(monkeypatch)
    out = drafter.generate(ids, mask, return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences, plain)
    assert drafter.stats.accepted > NEW // 3
    assert target.graphs is not None
    assert target.graphs.replays > 2
    if rows == 1:
        again = model(plain[:, :-1], use_cache=True)[CACHE]
        for mine, theirs in zip(out[CACHE].layers, again.layers, strict=True):
            assert torch.allclose(mine.keys, theirs.keys[:, :, -mine.keys.shape[2] :], atol=1e-4)
