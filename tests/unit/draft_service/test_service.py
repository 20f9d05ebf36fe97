from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from retrieval_draft.config import DraftConfig
from retrieval_draft.draft_service import wire
from retrieval_draft.draft_service.errors import (
    DraftServiceError,
    OutOfStepError,
    ServiceFullError,
    TooLargeError,
    UnknownSessionError,
)
from retrieval_draft.draft_service.service import DraftService
from retrieval_draft.draft_service.tenants import Proposers
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.models.fingerprint import tokenizer_fingerprint
from retrieval_draft.proposer import Proposer
from tests.support.draft_services import VOCABULARY, Watcher, draft_service
from tests.support.tokenizers_for_tests import byte_level


def opened(service: DraftService, *prompt: int, tenant: str = "default", **fields: Any) -> str:
    return service.open(tenant, wire.OpenRequest(prompt=list(prompt), **fields)).session


def stepped(
    service: DraftService, key: str, *tokens: int, tenant: str = "default", **fields: Any
) -> wire.Draft:
    return service.step(tenant, wire.Step(session=key, tokens=list(tokens), **fields))


def test_a_step_says_what_was_accepted_and_what_comes_next() -> None:
    with draft_service() as service:
        key = opened(service, 7, 8, 9, 4)
        draft = stepped(service, key, 7, 8, nodes=8)
        assert (draft.tokens[0], draft.parents[0], draft.path_probs[0]) == (8, -1, 1.0)
        assert 9 in [token for token, parent in zip(draft.tokens, draft.parents, strict=True) if parent == 0]
        assert (draft.accepted, draft.length) == (0, 6)
        assert all(parent < node for node, parent in enumerate(draft.parents))
        assert stepped(service, key, 9, 4, 30).accepted == 2


@pytest.mark.parametrize("chain", [False, True])
def test_drafts_may_have_256_tokens_or_none(chain: bool) -> None:
    text = np.random.default_rng(1).integers(0, VOCABULARY, 300).tolist()
    with draft_service() as service:
        for _ in range(8):  # the first ones teach that long copies are right
            key = opened(service, *text, *text[:20])
            draft = stepped(service, key, *text[20:40], nodes=256, chain=chain)
            assert stepped(service, key, *text[40:], nodes=0, chain=chain).num_draft_tokens == 0
        assert draft.num_draft_tokens == 256
        if chain:
            assert draft.tokens[1:] == text[40:296]


def test_trees_are_those_of_a_proposer() -> None:
    prompt, emitted = [7, 8, 9, 4, 7, 8, 9, 5, 7], [[8], [9, 4], [7, 8, 9]]
    with (
        draft_service() as service,
        Proposer.for_tokenizer(None, vocabulary=VOCABULARY, config=DraftConfig(adjacency_rows=1024)) as alone,
    ):
        key, session = opened(service, *prompt), alone.open(np.array(prompt, np.int32))
        for tokens in emitted:
            draft = stepped(service, key, *tokens, nodes=12)
            assert draft.accepted == session.observe(np.array(tokens, np.int32), later=True)
            tree = session.propose(12)
            assert draft.tokens == tree.tokens.tolist()
            assert draft.parents == tree.parents.tolist()
            assert draft.path_probs == tree.path_probs.tolist()


def test_what_steps_taught_is_learned_behind_the_reply() -> None:
    with draft_service() as service:
        key = opened(service, 7, 8, 9, 4)
        stepped(service, key, 7, 8, nodes=8)
        stepped(service, key, 9, nodes=8)
        stats = service.table.get("default", key).proposing.stats
        before = stats.drafted
        service.apply_feedback()
        service.apply_feedback()
        assert stats.drafted > before
        assert (stats.tokens, stats.steps) == (3, 2)


def test_a_chain_is_a_tree_of_one_path() -> None:
    with draft_service() as service:
        key = opened(service, 7, 8, 9, 4, 5)
        draft = stepped(service, key, 7, 8, nodes=3, chain=True)
        assert draft.tokens[:3] == [8, 9, 4]
        assert draft.parents == list(range(-1, len(draft.tokens) - 1))
        assert draft.path_probs == sorted(draft.path_probs, reverse=True)
        assert stepped(service, key, 9, 4, 1).accepted == 2
        assert len(stepped(service, key, 7, 8, nodes=3, chain=True, min_prob=1.0).tokens) == 1
        assert len(stepped(service, key, nodes=9, chain=True, max_depth=1).tokens) <= 2


def test_open_drafts_at_once_if_asked() -> None:
    with draft_service() as service:
        reply = service.open("default", wire.OpenRequest(prompt=[7, 8, 9, 7, 8], nodes=4))
        assert 9 in reply.draft.tokens[1:]
        assert service.open("default", wire.OpenRequest(prompt=[7])).draft.tokens == []


def test_references_are_drafted_from() -> None:
    with draft_service() as service:
        key = opened(service, 1, 2, references=[[40, 41, 42, 43]])
        assert 42 in stepped(service, key, 40, 41, nodes=8).tokens[1:]


def test_a_step_that_is_sent_again_is_taken_in_once() -> None:
    with draft_service() as service:
        key = opened(service, 7, 8, 9, 4)
        first = stepped(service, key, 7, 8, at=4, nodes=8)
        assert stepped(service, key, 7, 8, at=4, nodes=8).tokens == first.tokens
        # The answer may have been lost, and more has been emitted since.
        more = stepped(service, key, 7, 8, 9, 4, at=4, nodes=8)
        assert (more.length, more.accepted) == (8, 2)
        again = stepped(service, key, 9, 4, at=6, nodes=0)
        assert (again.length, again.accepted) == (8, 2)


def test_a_gap_and_another_text_are_told() -> None:
    with draft_service() as service:
        key = opened(service, 7, 8)
        stepped(service, key, 1, 2, at=2)
        for at, tokens in ((5, (3,)), (3, (3,)), (2, (1, 3)), (2, (1,)), (0, ())):
            with pytest.raises(OutOfStepError, match=f"4 tokens; the step begins at {at}"):
                stepped(service, key, *tokens, at=at)
        assert stepped(service, key, 3, at=4).length == 5


def test_what_a_session_said_is_history_for_the_next_of_its_tenant_only() -> None:
    with draft_service() as service:
        key = opened(service, 1, 2, tenant="a")
        stepped(service, key, 30, 31, 32, 33, tenant="a", close="finished")
        service.proposers["a"].flush()
        mine = opened(service, 5, 30, 31, tenant="a")
        theirs = opened(service, 5, 30, 31, tenant="b")
        assert 32 in stepped(service, mine, tenant="a", nodes=8).tokens[1:]
        assert 32 not in stepped(service, theirs, tenant="b", nodes=8).tokens[1:]
        with pytest.raises(UnknownSessionError):
            stepped(service, mine, tenant="b")
        with pytest.raises(UnknownSessionError):
            stepped(service, key, tenant="a")


def test_what_the_target_said_is_learned() -> None:
    with draft_service() as service:
        key = opened(service, 1, 2)
        stepped(service, key, 3, top_logprobs=wire.TopLogprobs([[3, 20]], [[0.6, 0.3]]), nodes=8)
        draft = stepped(service, key, 1, 2, nodes=32)
        assert 20 in draft.tokens[1:], "an alternative that was never emitted"
        node = draft.tokens.index(20)
        about = wire.TopLogprobs([[50, 51]], [[0.5, 0.4]], nodes=[node])
        stepped(service, key, 20, top_logprobs=about, nodes=8)
        assert {50, 51} & set(stepped(service, key, nodes=32).tokens[1:])


@pytest.mark.parametrize(
    ("top_logprobs", "message"),
    [
        (wire.TopLogprobs([[1], [2]], [[0.5], [0.5]]), "2 rows for 1 tokens"),
        (wire.TopLogprobs([[1, 2]], [[0.5]]), "no table"),
        (wire.TopLogprobs([[]], [[]]), "no table"),
        (wire.TopLogprobs([[1] * 33], [[0.1] * 33]), "no table"),
        (wire.TopLogprobs([[99]], [[0.5]]), "token id 99"),
        (wire.TopLogprobs([[1]], [[0.5]], nodes=[0]), "tree has 0 nodes"),
        (wire.TopLogprobs([[1]], [[float("nan")]]), "no number"),
    ],
)
def test_what_is_no_table_is_refused_and_nothing_is_taken_in(
    top_logprobs: wire.TopLogprobs, message: str
) -> None:
    with draft_service() as service:
        key = opened(service, 1, 2)
        with pytest.raises(InvalidInputError, match=message):
            stepped(service, key, 3, top_logprobs=top_logprobs)
        assert stepped(service, key).length == 2


def test_one_step_that_fails_leaves_the_others_alone() -> None:
    watcher = Watcher()
    with draft_service(watcher) as service:
        good, bad = opened(service, 7, 8), opened(service, 7, 8)
        steps = [
            wire.Step(session=good, tokens=[7]),
            wire.Step(session="nobody"),
            wire.Step(session=bad, tokens=[99]),
            wire.Step(session=good, tokens=[8]),
        ]
        drafts = service.steps("default", steps)
        assert [draft.error and draft.error.code for draft in drafts] == [None, 404, 400, None]
        assert drafts[3].length == 4
        assert stepped(service, bad).length == 2
        assert service.table.tokens == 6
    assert watcher.statuses == [404, 400]


def test_limits_hold_and_nothing_leaks() -> None:
    with draft_service(max_sessions=2, max_session_tokens=6, max_tokens=8) as service:
        with pytest.raises(TooLargeError):
            opened(service, *range(7))
        with pytest.raises(InvalidInputError, match="id 64"):
            opened(service, 64)
        with pytest.raises(InvalidInputError, match="needs a store"):
            opened(service, 1, share="all")
        assert (len(service.table), service.table.tokens) == (0, 0)
        key = opened(service, 1, 2, 3)
        with pytest.raises(TooLargeError):
            stepped(service, key, 1, 2, 3, 4)
        stepped(service, key, 1, 2, 3)
        opened(service, 1)
        with pytest.raises(ServiceFullError):
            opened(service, 1)
        stepped(service, key, close="dropped")
        opened(service, 1)


def test_sessions_expire() -> None:
    watcher = Watcher()
    with draft_service(watcher, idle_seconds=0.05) as service:
        opened(service, 1)
        done = threading.Event()
        for _ in range(200):
            if watcher.closed["expired"]:
                break
            done.wait(0.02)
        assert watcher.closed == {"expired": 1}
        assert len(service.table) == 0


def test_many_threads_and_no_leak() -> None:
    watcher = Watcher()
    with draft_service(watcher) as service:
        shared = opened(service, 1, 2)
        failures: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for _ in range(15):
                    key = opened(service, 1, 2, number)
                    stepped(service, shared, number)
                    for token in range(4):
                        assert stepped(service, key, token).length == 4 + token
                    stepped(service, key, close="finished" if number % 2 else "dropped")
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert len(service.table) == 1
        assert service.table.tokens == 2 + 6 * 15
        assert stepped(service, shared).length == 2 + 6 * 15
    assert watcher.closed == {"finished": 45, "dropped": 45, "shutdown": 1}


def test_a_closed_service_opens_nothing() -> None:
    with draft_service() as service:
        pass
    with pytest.raises(DraftServiceError, match="shutting down"):
        opened(service, 1)


def test_another_tokenizer_is_refused() -> None:
    tokenizer = byte_level(("ab",))
    service = DraftService(Proposers.for_tokenizer(tokenizer, store=None))
    try:
        with pytest.raises(InvalidInputError, match="id 11"):
            opened(service, 11)
        info = service.info("default")
        assert info.vocabulary == 11
        assert info.fingerprint == tokenizer_fingerprint(tokenizer)
        opened(service, 1, fingerprint=info.fingerprint)
        with pytest.raises(OutOfStepError, match="fingerprint"):
            opened(service, 1, fingerprint="0" * 32)
    finally:
        service.close()
