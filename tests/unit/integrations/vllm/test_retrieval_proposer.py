"""The proposer that vLLM loads, against a faithful batch and without vLLM."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrieval_draft.drafting.calibration import Calibration
from retrieval_draft.errors import InvalidInputError, UnsupportedEngineError
from retrieval_draft.integrations.vllm import RetrievalProposer, VllmOptions
from retrieval_draft.integrations.vllm.draft_stores import DraftStores
from tests.support.tiny import byte_tokenizer
from tests.support.vllm_batch import FakeBatch
from tests.support.vllm_configs import FakeRunner, vllm_config

LOOP = [11, 12, 13, 14, 15]


def make(**options: Any) -> RetrievalProposer:
    known = {name: options.pop(name) for name in list(options) if name in VllmOptions.__struct_fields__}
    chosen = VllmOptions(**{"costs": "ignored", **known})
    return RetrievalProposer(vllm_config(**options), options=chosen, runner=FakeRunner)


@pytest.fixture
def proposer() -> Iterator[RetrievalProposer]:
    made = make(sources=("automaton",))
    yield made
    made.close()


def ask(proposer: RetrievalProposer, batch: FakeBatch, tokens: dict[str, list[int]]) -> dict[str, list[int]]:
    drafts = proposer.propose(*batch.step(tokens), slot_mappings=None)
    assert proposer.failures == 0
    assert len(drafts) == len(batch.names)
    batch.show_drafts(drafts)
    return dict(zip(batch.names, drafts, strict=True))


def test_a_text_that_repeats_itself_is_drafted(proposer: RetrievalProposer) -> None:
    batch = FakeBatch(4, 256)
    batch.add("a", LOOP * 3)
    batch.add("b", [20, 21, 22])
    drafts = ask(proposer, batch, {"a": [11], "b": [23]})
    assert drafts["a"] == [12, 13, 14, 15, 11, 12]
    assert drafts["b"] == []


def test_drafts_may_have_256_tokens() -> None:
    text = np.random.default_rng(1).integers(10, 900, 300).tolist()
    made = make(sources=("automaton", "history"), drafts=300, width=1024, min_prob=0.0)
    for _ in range(8):  # the first ones teach that long copies are right
        batch = FakeBatch(4, 1024)
        batch.add("a", text + text[:39])
        draft = ask(made, batch, {"a": text[39:40]})["a"]
        ask(made, batch, {"a": text[40:]})
        made.flush()
    assert draft == text[40:296]
    made.close()


def test_rows_without_tokens_get_no_drafts_and_keep_their_places(proposer: RetrievalProposer) -> None:
    batch = FakeBatch(4, 256)
    batch.add("prefill", LOOP * 4)
    batch.add("a", LOOP * 3)
    assert ask(proposer, batch, {"prefill": [], "a": [11]}) == {
        "prefill": [],
        "a": [12, 13, 14, 15, 11, 12],
    }
    assert ask(proposer, batch, {}) == {"prefill": [], "a": []}
    assert proposer.propose([], batch.lengths, batch.token_ids) == []


def test_drafts_end_before_the_longest_text(proposer: RetrievalProposer) -> None:
    batch = FakeBatch(2, 256)
    batch.add("a", (LOOP * 60)[:251])
    assert len(ask(proposer, batch, {"a": [12]})["a"]) == 3  # 252 tokens, a bonus token, 256 at most
    assert ask(proposer, batch, {"a": [13, 14, 15]})["a"] == []


@pytest.mark.parametrize("seed", range(6))
def test_no_draft_is_from_another_request(proposer: RetrievalProposer, seed: int) -> None:
    """Each request has token ids of its own, so a draft shows whose text it is from: aborts, preemption with
    resumption, swaps between steps and rows that change hands."""
    draw = random.Random(seed)
    batch = FakeBatch(5, 256)
    waiting: list[str] = []
    drafted = born = 0
    for _ in range(150):
        if len(batch.names) < 5 and draw.random() < 0.5:
            if waiting and draw.random() < 0.6:
                batch.restore(waiting.pop(0))
            else:
                batch.add(str(born), [10 + 10 * born + token % 7 for token in range(20)])
                born += 1
        if batch.names and draw.random() < 0.1:
            name = draw.choice(batch.names)
            if draw.random() < 0.3:
                batch.replace(name, str(born), [10 + 10 * born + token % 7 for token in range(20)])
                born += 1
            else:
                batch.remove(name)
                if draw.random() < 0.6 and len(batch.texts[name]) < 200:
                    waiting.append(name)
        if len(batch.names) > 1 and draw.random() < 0.3:
            batch.swap(*draw.sample(batch.names, 2))
        tokens = {}
        for name in batch.names:
            text = batch.texts[name]
            count = draw.randrange(4) if len(text) < 240 else 0
            tokens[name] = [10 + 10 * int(name) + (len(text) + each) % 7 for each in range(count)]
        for name, draft in ask(proposer, batch, tokens).items():
            drafted += len(draft)
            assert all(10 + 10 * int(name) <= token < 20 + 10 * int(name) for token in draft), (name, draft)
            if not tokens[name]:
                assert draft == []
    assert drafted > 100


def test_what_finished_requests_said_is_drafted_from_by_others() -> None:
    with_history = make(sources=("automaton", "history"))
    batch = FakeBatch(4, 256)
    batch.add("a", [30, 31])
    ask(with_history, batch, {"a": [32, 33, 34, 35, 36, 37]})
    batch.remove("a")
    with_history.flush()
    batch.add("b", [90, 31, 32])
    assert ask(with_history, batch, {"b": [33]})["b"][:1] == [34]
    with_history.close()


def test_what_was_learned_is_written_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written: list[Path] = []
    save = Calibration.save
    monkeypatch.setattr(Calibration, "save", lambda self, path: (written.append(path), save(self, path)))
    tokenizer = byte_tokenizer()
    folder = str(tmp_path / "history")
    stores = DraftStores(VllmOptions(history_folder=folder), tokenizer, len(tokenizer), 8)
    session = stores.chains.open(np.array([5, 6, 5, 6], np.int32))
    stores.chains.step([session], [5], [1])
    stores.flush()
    assert written == [tmp_path / "history" / "calibration.safetensors"]
    stores.close()
    assert len(written) == 2


def test_what_comes_behind_the_end_of_a_reply_is_not_kept() -> None:
    made = make(sources=("automaton", "history"))
    batch = FakeBatch(4, 256)
    batch.add("a", [30, 31])
    assert ask(made, batch, {"a": [32, 33, 1, 40, 41, 42]})["a"] == []  # 1 ends it; vLLM drops the rest
    batch.remove("a")
    made.flush()
    batch.add("b", [33, 1, 40])
    assert ask(made, batch, {"b": [41]})["b"] == []
    made.close()


def test_where_the_end_is_ignored_nothing_is_lost(proposer: RetrievalProposer) -> None:
    batch = FakeBatch(4, 256)
    batch.add("a", [30, 31, 40, 41, 1])
    ask(proposer, batch, {"a": [1, 40, 41, 50, 51, 52, 53]})
    assert ask(proposer, batch, {"a": [1, 40, 41, 50]})["a"][:3] == [51, 52, 53]


def test_prompts_with_foreign_ids_are_left_alone(proposer: RetrievalProposer) -> None:
    batch = FakeBatch(4, 256)
    batch.add("images", [5000, *LOOP, *LOOP])
    batch.add("a", LOOP * 3)
    drafts = ask(proposer, batch, {"images": [11], "a": [11]})
    assert drafts["images"] == []
    assert drafts["a"]
    batch.remove("images")
    assert ask(proposer, batch, {"a": [12]})["a"]


def test_a_failure_costs_drafts_and_is_logged_once(
    proposer: RetrievalProposer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    batch = FakeBatch(4, 256)
    batch.add("a", LOOP * 3)
    assert proposer.rows is not None
    broken = proposer.rows.tracker
    with monkeypatch.context() as patch:
        patch.setattr(type(broken), "follow", lambda *arguments: 1 / 0)
        for _ in range(3):
            assert proposer.propose(*batch.step({"a": [11]})) == [[]]
    assert proposer.failures == 3
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert "ZeroDivisionError" in caplog.text
    assert proposer.propose(*batch.step({"a": [12]}))[0]
    assert proposer.propose([[1]], np.zeros(1, np.int32), "no array") == [[]]  # type: ignore[arg-type]


def test_idle_requests_are_over() -> None:
    made = make(sources=("automaton", "history"), idle_seconds=0.05)
    batch = FakeBatch(4, 256)
    batch.add("a", [30, 31, 32])
    ask(made, batch, {"a": [33]})
    assert made.rows is not None
    limit = time.monotonic() + 20
    while len(made.rows.tracker) and time.monotonic() < limit:
        time.sleep(0.02)
    assert len(made.rows.tracker) == 0
    assert ask(made, batch, {"a": [34]}) == {"a": []}  # it goes on all the same
    made.close()
    assert made.propose(*batch.step({"a": [35]})) == [[]]


def test_a_runner_that_calls_in_another_way_is_refused() -> None:
    class Newer:
        def propose_draft_token_ids(self, sampled_token_ids: Any) -> Any:
            if self.method == "custom_class":  # type: ignore[attr-defined]
                return self.drafter.propose(4, sampled_token_ids, self.texts)  # type: ignore[attr-defined]
            return None

    class Without:
        def propose_draft_token_ids(self) -> None:
            return None

    with pytest.raises(UnsupportedEngineError, match=r"calls propose\(4, sampled_token_ids, texts\)"):
        RetrievalProposer(vllm_config(), options=VllmOptions(), runner=Newer)
    with pytest.raises(UnsupportedEngineError, match="no proposer of method custom_class"):
        RetrievalProposer(vllm_config(), options=VllmOptions(), runner=Without)
    with pytest.raises(UnsupportedEngineError, match="no propose_draft_token_ids"):
        RetrievalProposer(vllm_config(), options=VllmOptions(), runner=object)
    lacking = vllm_config()
    del lacking.scheduler_config.max_num_seqs
    with pytest.raises(UnsupportedEngineError, match=r"no scheduler_config\.max_num_seqs"):
        RetrievalProposer(lacking, options=VllmOptions(), runner=FakeRunner)


def test_what_cannot_be_used_is_said_when_it_is_built(tmp_path: Any) -> None:
    with pytest.raises((InvalidInputError, OSError)):
        make(index=(str(tmp_path / "none"),))


class SequenceGroup:
    """A tensor-parallel group of two."""

    def __init__(self, rank: int, wire: list[Any]) -> None:
        self.rank_in_group, self._wire = rank, wire

    def broadcast_object(self, value: Any = None, src: int = 0) -> Any:
        if self.rank_in_group == src:
            self._wire.append(value)
        return self._wire[-1]


def test_one_rank_drafts_for_all() -> None:
    options = VllmOptions(sources=("automaton",), costs="ignored")
    wire: list[Any] = []
    for backend, expected in (("mp", []), ("external_launcher", [12, 13, 14, 15, 11, 12])):
        config = vllm_config(ranks=2)
        config.parallel_config.distributed_executor_backend = backend
        first, second = (
            RetrievalProposer(config, options=options, runner=FakeRunner, group=SequenceGroup(rank, wire))
            for rank in (0, 1)
        )
        batch = FakeBatch(2, 256)
        batch.add("a", LOOP * 3)
        seen = batch.step({"a": [11]})
        assert first.propose(*seen) == [[12, 13, 14, 15, 11, 12]]
        assert second.propose(*seen) == [expected]
        assert second.rows is None  # nothing is kept twice
        first.close()
        second.close()
