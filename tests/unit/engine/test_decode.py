"""The loop's own parts: text, usable nodes, contexts, prompt rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from retrieval_draft import RetrievalDrafter
from retrieval_draft.config import DraftConfig
from retrieval_draft.drafting.budget import Budget
from retrieval_draft.drafting.session import DraftSession, _usable, prompt_contexts
from retrieval_draft.drafting.stats import DraftStats
from retrieval_draft.engine.decode import Batch, decode
from retrieval_draft.engine.logits import LogitReader
from retrieval_draft.engine.request import DecodeRequest
from retrieval_draft.engine.row import Row
from retrieval_draft.engine.target import Target
from retrieval_draft.engine.transcript import Transcript
from tests.support.batches import padded, ragged
from tests.support.models import make
from tests.support.trees import tree_of


def test_transcript_grows_and_keeps_padding_in_ids_only() -> None:
    text = Transcript(np.array([5, 6], np.int32), torch.tensor([[0, 0, 5, 6]]), 2)
    for token in range(10):
        text.append(token)
    assert text.tokens.tolist() == [5, 6, *range(10)]
    assert text.reply.tolist() == list(range(10))
    assert text.ids.tolist() == [[0, 0, 5, 6, *range(10)]]
    assert Transcript(np.array([5], np.int32), None, 4).ids is None


def test_nodes_too_deep_or_unknown_are_left_out_with_what_hangs_below() -> None:
    tree = tree_of([8, 9, 70, 3, 5, 6], [-1, 0, 0, 2, 1, 4])
    kept = _usable(tree, max_depth=2, vocabulary=50)
    assert kept.tokens.tolist() == [8, 9, 5]
    assert kept.parents.tolist() == [-1, 0, 1]
    assert _usable(tree, max_depth=0, vocabulary=99).tokens.tolist() == [8]
    assert _usable(tree, max_depth=9, vocabulary=99) is tree


def test_prompt_contexts() -> None:
    assert prompt_contexts(np.array([5, 6, 7], np.int32), 2).tolist() == [[-1, -1, 5, 6], [-1, 5, 6, 7]]


@pytest.mark.parametrize("rows", [1, 5, 30])
@pytest.mark.parametrize("chunk", [None, 1, 7, 64])
def test_prefill_yields_the_last_rows_in_order(
    rows: int, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("gemma3")
    target = Target(model)
    ids = torch.arange(30) % 9
    with torch.no_grad():
        expected = model(ids[None]).logits[0, -rows:]
        for limit in (1, 1 << 30):
            monkeypatch.setattr("retrieval_draft.engine.target._LOGIT_BYTES", limit)
            parts = list(target.prefill(target.cache(64), ids, rows, chunk))
            assert all(len(part) <= (16 if limit == 1 else 30) for part in parts)
            torch.testing.assert_close(torch.cat(parts), expected, atol=1e-3, rtol=1e-3)


def test_stats_add_up() -> None:
    total, one = DraftStats(), DraftStats(requests=1, tokens=9, steps=4)
    one.accepted_by_source["a"] = 3
    one.nodes[8] = 4
    total.add(one)
    total.add(one)
    assert (total.tokens, total.tokens_per_step) == (18, 2.0)
    assert total.accepted_by_source == {"a": 6}
    assert total.as_dict()["nodes"] == {8: 8}


def test_plain_decoding_needs_no_drafting() -> None:
    model = make("gpt2")
    prompt = torch.tensor([[1, 2, 3]])
    stock = model.generate(prompt, max_new_tokens=12, do_sample=False)
    request = DecodeRequest(np.array([1, 2, 3], np.int32), max_length=15)
    with torch.no_grad():
        row = decode(Target(model), [request], LogitReader(0), DraftStats())[0]
    assert row.text.tokens.tolist() == stock[0].tolist()
    assert row.cache.get_seq_length() == 14


def late_batch(failed: list[Row] | None = None) -> Batch:
    """A batch that learns as on a device, while a pass runs."""
    target = Target(make("gemma3"))
    target.model.eval()
    note = None if failed is None else (lambda row, error: failed.append(row))
    batch = Batch(target, LogitReader(4), DraftStats(), Budget(), note)
    batch._learns_late = True
    return batch


def joined(batch: Batch, drafter: RetrievalDrafter, prompt: list[int], length: int) -> Row:
    stats = DraftStats()
    request = DecodeRequest(np.array(prompt, np.int32), max_length=length)
    (session,) = drafter.draft_engine.open([request], [], [stats])
    return batch.join(request, session, stats)


def test_learning_waits_until_the_pass_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def note(owner: type, name: str) -> None:
        call = getattr(owner, name)

        def noted(*args: Any, **options: Any) -> Any:
            calls.append(name)
            return call(*args, **options)

        monkeypatch.setattr(owner, name, noted)

    note(Target, "verify_rows")
    note(LogitReader, "read")
    note(DraftSession, "observe")
    note(DraftSession, "learn_early")
    note(DraftSession, "propose")
    note(DraftSession, "learn")
    batch = late_batch()
    drafter = RetrievalDrafter.for_model(batch._target.model, config=DraftConfig(nodes=8))
    drafter.warm_up()
    with torch.no_grad():
        row = joined(batch, drafter, [1, 2, 3, 1, 2, 3], 12)
        while not row.done:
            calls.clear()
            batch.step()
            begun = [] if calls[0] == "propose" else ["observe", "learn_early"]
            assert calls == [*begun, "propose", "verify_rows", *(["learn"] if begun else []), "read"]
        batch.leave()
    assert calls[-3:] == ["observe", "learn_early", "learn"]
    stock = batch._target.model.generate(torch.tensor([[1, 2, 3, 1, 2, 3]]), max_length=12, do_sample=False)
    assert row.text.tokens.tolist() == stock[0].tolist()


def test_a_row_that_fails_while_a_pass_runs_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[Row] = []
    batch = late_batch(failed)
    drafter = RetrievalDrafter.for_model(batch._target.model, config=DraftConfig(nodes=8))
    drafter.warm_up()
    with torch.no_grad():
        bad = joined(batch, drafter, [5, 6, 7], 30)
        good = joined(batch, drafter, [1, 2, 3, 1, 2, 3], 20)
        learn = Row.learn

        def fails(row: Row) -> None:
            if row is bad and len(row.text) > 8:
                raise RuntimeError("no")
            learn(row)

        monkeypatch.setattr(Row, "learn", fails)
        while batch.rows:
            length = len(bad.text)
            step = batch.step()
            assert bad in step.rows or len(bad.text) == length
            batch.leave()
    assert failed == [bad]
    stock = batch._target.model.generate(torch.tensor([[1, 2, 3, 1, 2, 3]]), max_length=20, do_sample=False)
    assert good.text.tokens.tolist() == stock[0].tolist()


def test_rows_passed_alone_after_a_failed_pass_draw_from_their_own_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Captured passes of one row after the other write their logits to the same memory."""
    model, prompts = make("llama"), ragged((9, 23, 40))
    ids, mask = padded(prompts)
    options = {"do_sample": True, "seed": 3, "max_new_tokens": 30, "pad_token_id": 0, "top_k": 0}
    plain = RetrievalDrafter.for_model(model, config=DraftConfig(method="none", graphs="off"))
    wanted = plain.generate(ids, mask, **options)
    drafter = RetrievalDrafter.for_model(model, config=DraftConfig(nodes=8, graphs="tape"))
    verify_rows, begin, failed = Target.verify_rows, Batch.__init__, []

    def fails(target: Target, caches: Any, inputs: Any) -> torch.Tensor:
        if len(caches) > 1:
            raise RuntimeError("out of memory, say")
        return verify_rows(target, caches, inputs)

    def noting(batch: Batch, *given: Any) -> None:
        begin(batch, *given, failed=lambda row, error: failed.append(error))

    monkeypatch.setattr(Target, "verify_rows", fails)
    monkeypatch.setattr(Batch, "__init__", noting)
    assert torch.equal(drafter.generate(ids, mask, **options), wanted)
    assert not failed
    assert drafter.target.graphs is not None
    assert drafter.target.graphs.replays > 60
