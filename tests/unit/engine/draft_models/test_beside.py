"""Drafts made beside the target's passes: the text is the same, and one thread touches a session."""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.engine.draft_models.beside import (
    COMPARED,
    MOST_WAITING,
    SELDOM,
    TURN,
    BesideSession,
    DraftThread,
    WayChoice,
)
from retrieval_draft.engine.draft_models.expansion import ExpansionLimits
from retrieval_draft.engine.draft_models.foreign_draft import ForeignModelDraft
from retrieval_draft.engine.draft_models.model_draft import ModelDraft, ModelSession, ParallelDraft, SelfDraft
from retrieval_draft.index.source import NodeLogits, Proposal, TokenArray
from tests.support.drafters import near_ties, prompt_ids
from tests.support.grammars import SHAPES, json_model, json_tokenizer
from tests.support.models import make
from tests.support.tokenizers_for_tests import byte_level, metaspace

NEW = 40
FREE = ExpansionLimits(top_k=4, depth=3, entropy_stop=None)


def drafter(model: Any, draft: Any, tokenizer: Any = None, **options: Any) -> RetrievalDrafter:
    config = DraftConfig(**{"nodes": 8, "draft_beside": True, "cpu_kernels": False, **options})
    return RetrievalDrafter.for_model(model, tokenizer, draft_model=draft, config=config)


def thread_of(ours: RetrievalDrafter) -> DraftThread:
    (model,) = ours.context.models
    thread: DraftThread = getattr(model, "model", model).thread
    return thread


def source(kind: str) -> Any:
    if kind == "parallel":
        return ParallelDraft(make("llama", seed=3), 97, 96, ExpansionLimits(depth=3, entropy_stop=None))
    return ModelDraft(make("llama") if kind == "the same" else make("gemma3", seed=9), 97, FREE)


@pytest.mark.parametrize("nodes", [8, None])
@pytest.mark.parametrize("kind", ["the same", "another", "parallel"])
def test_greedy_text_is_that_of_generate(kind: str, nodes: int | None) -> None:
    model = make("llama")
    ours = drafter(model, source(kind), nodes=nodes)
    prompts = torch.cat([prompt_ids(seed=seed) for seed in range(4)])
    stock = model.generate(prompts, max_new_tokens=NEW, do_sample=False)
    alone = ours.generate(prompts[:1], max_new_tokens=NEW, do_sample=False)
    assert near_ties(model, alone, stock[:1]) == 0
    rows = ours.generate(prompts, max_new_tokens=NEW, do_sample=False)
    assert sum(near_ties(model, rows[row : row + 1], stock[row : row + 1]) for row in range(4)) == 0
    assert ours.stats.source_failures == 0
    assert thread_of(ours).prepared > 0
    if kind == "the same" and nodes:
        assert thread_of(ours).used > thread_of(ours).prepared / 2


@pytest.mark.parametrize("kind", ["the same", "another"])
def test_seeded_text_is_that_of_the_seed_undrafted(kind: str) -> None:
    model = make("gemma3")
    ours = drafter(model, source(kind))
    plain = RetrievalDrafter.for_model(model, config=DraftConfig("none", cpu_kernels=False))
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": True, "temperature": 0.8, "top_k": 0}
    for seed in range(3):
        texts = [
            each.generate(prompt_ids(), seed=seed, num_return_sequences=3, **options)
            for each in (ours, plain)
        ]
        assert torch.equal(*texts)
    assert ours.stats.source_failures == 0


@pytest.mark.parametrize("mode", ["intersection", "text"])
def test_a_model_with_another_tokenizer(mode: Any) -> None:
    theirs, own = byte_level(("ab", "abc", "de")), metaspace(("a", "ab", "abc", "f"))
    target, draft = (
        make("llama", vocab_size=max(each.get_vocab().values()) + 1, seed=seed)
        for each, seed in ((theirs, 0), (own, 5))
    )
    ours = drafter(target, ForeignModelDraft(draft, own, theirs, mode, FREE), theirs)
    prompt = torch.tensor([theirs("abc de fgh abc de ab")["input_ids"]])
    stock = target.generate(prompt, max_new_tokens=50, do_sample=False)
    out = ours.generate(prompt, max_new_tokens=50, do_sample=False)
    assert near_ties(target, out, stock) == 0
    assert ours.stats.source_failures == 0
    assert thread_of(ours).prepared > 0


@pytest.mark.parametrize("method", ["opt_tree", "rasd", "cascade", "ouroboros", "sam_decoding"])
def test_published_methods_with_a_draft_model(method: str) -> None:
    model = make("llama")
    ours = drafter(model, source("the same"), method=method)
    stock = model.generate(prompt_ids(), max_new_tokens=NEW, do_sample=False)
    assert near_ties(model, ours.generate(prompt_ids(), max_new_tokens=NEW, do_sample=False), stock) == 0
    assert ours.stats.source_failures == 0
    assert ours.stats.accepted > 0


@pytest.mark.parametrize("shape", ["nested", "regex"])
def test_a_grammar_forces_tokens_before_the_target_emits_them(shape: str) -> None:
    model, tokenizer = json_model(), json_tokenizer()
    options: dict[str, Any] = {"max_new_tokens": 80, "do_sample": False, "pad_token_id": 0}
    ids = prompt_ids(7, 390)
    plain = RetrievalDrafter.for_model(model, tokenizer, method="none")
    ours = drafter(model, ModelDraft(copy.deepcopy(model), len(tokenizer), FREE), tokenizer)
    expected = plain.generate(ids, grammar=SHAPES[shape], **options)
    assert torch.equal(ours.generate(ids, grammar=SHAPES[shape], **options), expected)
    assert ours.stats.source_failures == 0
    assert thread_of(ours).prepared > 0


class Slow(ModelSession):
    """Takes its time, and may fail where it prepares."""

    fails_after: int | None = None
    seconds = 0.03

    def propose_after(self, tokens: TokenArray, budget: int, stop: Callable[[], bool]) -> Proposal:
        time.sleep(self.seconds)
        if self.fails_after is not None:
            type(self).fails_after = self.fails_after - 1
            if self.fails_after < 0:
                raise RuntimeError("the draft model's device is gone")
        return super().propose_after(tokens, budget, stop)


class SlowDraft(ModelDraft):
    def _session(self, prompt: TokenArray, limits: ExpansionLimits | None, reranked: int) -> ModelSession:
        return Slow(self.expansion(limits), prompt, self._allowed, reranked, self.trims)


@pytest.mark.parametrize("fails_after", [None, 0, 5])
def test_a_slow_or_failing_thread_costs_drafts_only(
    fails_after: int | None, monkeypatch: pytest.MonkeyPatch, logged: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Slow, "fails_after", fails_after)
    model = make("llama")
    ours = drafter(model, SlowDraft(make("llama"), 97, FREE), sources=())
    prompts = torch.cat([prompt_ids(seed=seed) for seed in range(2)])
    stock = model.generate(prompts, max_new_tokens=20, do_sample=False)
    out = ours.generate(prompts, max_new_tokens=20, do_sample=False)
    assert sum(near_ties(model, out[row : row + 1], stock[row : row + 1]) for row in range(2)) == 0
    assert ours.stats.source_failures == (0 if fails_after is None else 2)
    assert ("device is gone" in logged.text) == (fails_after is not None)


def test_it_is_off_where_both_are_on_one_device() -> None:
    model = make("llama")
    for draft, beside in (
        (source("the same"), None),  # one device
        (source("the same"), False),
        (SelfDraft(model, skip=[1]), True),  # the target's own layers and cache
        (ModelDraft(model, 97), True),
    ):
        assert thread_of(drafter(model, draft, draft_beside=beside)) is None
    given = source("the same")
    assert thread_of(drafter(model, given)) is not None
    assert given.thread is None, "another drafter may draft with it in another way"


def test_by_default_another_device_is_used_as_long_as_that_is_faster() -> None:
    model = make("llama")
    given = source("the same")
    given.target.device = torch.device("meta")
    thread = thread_of(drafter(model, given, draft_beside=None))
    assert thread is not None
    assert thread.choice is not None


class Told:
    """A draft model that knows the text to come; it notes its calls and their threads.

    Args:
        text: The text.
        wrong: Index of a token that it has wrong.
    """

    def __init__(self, text: list[int], at: int, wrong: int | None = None) -> None:
        self.text, self.at, self.wrong = text, at, wrong
        self.calls: list[str] = []
        self.threads: set[int] = set()
        self.observed: list[int] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.stopped = 0

    def wait(self, preparations: int) -> None:
        while self.calls.count("propose_after") < preparations:
            time.sleep(0.001)

    def _called(self, name: str) -> None:
        self.calls.append(name)
        self.threads.add(threading.get_ident())

    def _from(self, at: int, budget: int) -> Proposal:
        tokens = [0 if self.wrong == at + n else t for n, t in enumerate(self.text[at : at + budget])]
        size = len(tokens)
        return Proposal(
            np.array(tokens, np.int32),
            np.arange(-1, size - 1, dtype=np.int32),
            np.full(size, 0.5, np.float32),
            np.zeros(size, np.int32),
            "model",
            "model",
        )

    def propose(self, budget: int) -> Proposal:
        self._called("propose")
        return self._from(self.at, budget)

    def propose_after(self, tokens: TokenArray, budget: int, stop: Callable[[], bool]) -> Proposal:
        self._called("propose_after")
        while not self.go_on.wait(0.005):
            if stop():
                self.stopped += 1
                break
        return self._from(self.at + len(tokens), budget)

    def observe(self, tokens: TokenArray) -> None:
        self._called("observe")
        self.observed += tokens.tolist()
        self.at += len(tokens)

    def learn(self, logits: NodeLogits) -> None:
        self._called("learn")

    def close(self) -> None:
        self._called("close")


TEXT = list(range(10, 40))


def int32(*tokens: int) -> TokenArray:
    return np.array(tokens, np.int32)


def test_drafts_of_the_outcome_that_came_are_there_and_others_are_made_anew() -> None:
    thread, told = DraftThread(), Told(TEXT, 0)
    session = BesideSession(told, thread)
    session.prepare_for([int32(10, 11)])  # nobody has asked it yet
    assert told.calls == []
    assert session.propose(4).tokens.tolist() == [10, 11, 12, 13]
    session.prepare_for([int32(10, 11), int32(10)])
    session.observe(int32(10, 11, 12))
    assert session.propose(4).tokens.tolist() == [13, 14, 15]
    assert told.calls.count("propose") == 1
    # The outcome was not among the ones prepared for: what it has observed is taken up, and it is asked.
    session.prepare_for([int32(13, 14), int32()])
    session.observe(int32(99))
    session.learn(NodeLogits(np.zeros((1, 4), np.int32), np.zeros((1, 2), np.int32), np.ones((1, 2))))
    assert session.propose(2).tokens.tolist() == [14, 15]
    assert told.observed == [10, 11, 12, 99]
    assert told.calls.count("learn") == 1
    assert (thread.prepared, thread.used) == (2, 1)
    # A token that it had not drafted.
    told.wrong = 5
    session.prepare_for([int32(14)])
    session.observe(int32(14, 15))
    assert len(session.propose(3)) == 3
    assert thread.used == 1
    session.close()
    assert told.calls[-1] == "close"
    assert threading.get_ident() not in told.threads
    assert len(told.threads) == 1
    thread.close()
    assert told.threads.isdisjoint(each.ident for each in threading.enumerate())


def test_a_preparation_ends_where_its_outcome_did_not_come_or_the_request_ends() -> None:
    thread, told = DraftThread(), Told(TEXT, 0)
    session = BesideSession(told, thread)
    session.propose(4)
    told.go_on.clear()
    session.prepare_for([int32(10, 11), int32(10)])
    told.wait(preparations=1)
    session.observe(int32(77))
    assert session.propose(2).tokens.tolist() == [11, 12]
    assert told.stopped == 1, "the second outcome did not come either, and was not begun"
    session.prepare_for([int32(11)])
    told.wait(preparations=2)
    session.close()
    assert told.stopped == 2
    thread.close()


def test_drafts_that_are_there_do_not_wait_for_those_of_another_outcome() -> None:
    class Second(Told):
        def propose_after(self, tokens: TokenArray, budget: int, stop: Callable[[], bool]) -> Proposal:
            if self.calls[-1] == "propose_after":
                self.go_on.clear()
            return super().propose_after(tokens, budget, lambda: False)

    thread, told = DraftThread(), Second(TEXT, 0)
    session = BesideSession(told, thread)
    session.propose(4)
    session.prepare_for([int32(10, 11), int32(10)])
    told.wait(preparations=2)
    session.observe(int32(10, 11, 12))
    assert session.propose(4).tokens.tolist() == [13, 14, 15]
    told.go_on.set()
    session.close()
    thread.close()


def test_what_waits_for_a_session_that_sleeps_is_bounded() -> None:
    thread, told = DraftThread(), Told(TEXT, 0)
    session = BesideSession(told, thread)
    for _ in range(MOST_WAITING + 2):
        session.observe(int32(5))
        session.prepare_for([int32()])
    assert len(session._waiting) < MOST_WAITING
    assert thread.prepared == 0
    session.close()
    thread.close()


def test_an_error_of_a_preparation_that_nobody_fetches_ends_the_session() -> None:
    class Failing(Told):
        def propose_after(self, tokens: TokenArray, budget: int, stop: Callable[[], bool]) -> Proposal:
            raise OSError("no")

    thread = DraftThread()
    session = BesideSession(Failing(TEXT, 0), thread)
    session.propose(4)
    session.prepare_for([int32(10)])
    assert session._preparation is not None
    session._preparation.done.exception()
    session.observe(int32(10, 11))
    session.prepare_for([int32(12)])  # in this step it was not asked
    with pytest.raises(OSError, match="no"):
        session.propose(4)
    session.close()
    thread.close()


def test_the_thread_is_there_again_after_a_close_and_in_a_forked_process() -> None:
    thread = DraftThread()
    assert thread.run(lambda: 1) == 1
    thread.close()
    assert thread.run(lambda: 2) == 2
    child = os.fork()
    if not child:
        os._exit(0 if thread.run(lambda: 3) == 3 else 1)
    assert os.waitpid(child, 0)[1] == 0
    thread.close()


@pytest.mark.parametrize(("beside", "before"), [(1.0, 2.0), (2.0, 1.0)])
def test_the_faster_way_is_taken(beside: float, before: float) -> None:
    now = [0.0]
    choice = WayChoice(lambda: now[0])
    ways = []
    for _ in range(TURN * 40):
        is_beside = choice.begin_step()
        ways.append(is_beside)
        now[0] += beside if is_beside else before
        choice.emitted(3)
    later = ways[TURN * COMPARED :]
    share = sum(later) / len(later)
    assert share == pytest.approx(1 - 1 / SELDOM if beside < before else 1 / SELDOM, abs=0.05)
    assert choice.rate(True) == pytest.approx(3 / beside)
    assert choice.rate(False) == pytest.approx(3 / before)


def test_time_in_which_the_model_is_not_asked_does_not_count() -> None:
    now = [0.0]
    choice = WayChoice(lambda: now[0])
    for step in range(8):
        if step == 4:
            choice.pause()
            now[0] += 1000.0
        choice.begin_step()
        choice.emitted(2)
        now[0] += 0.5
    assert choice.rate(True) == pytest.approx(4.0)
