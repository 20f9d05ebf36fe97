"""Drafts for engines that keep their own model."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from retrieval_draft.bench.replay import read_traces
from retrieval_draft.config import DraftConfig
from retrieval_draft.drafting._kernels.chain import best_chain
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.source import NodeLogits
from retrieval_draft.index.store.config import StoreConfig
from retrieval_draft.proposer import Proposer
from tests.support.tokenizers_for_tests import byte_level
from tests.support.tokens import ids

TRACE = Path("tests/data/vicuna7b_specbench_12.jsonl.gz")


def test_a_chain_is_what_followed_before() -> None:
    with Proposer.for_tokenizer(None, vocabulary=20) as proposer:
        session = proposer.open(ids(7, 8, 9, 4, 7, 8))
        tokens, probs = session.propose_chain(2)
        assert tokens.tolist() == [9, 4]
        assert (np.diff(probs) <= 0).all()
        assert probs[0] <= 1
        assert session.observe(ids(9, 4, 0)) == 2
        assert session.length == 9
        assert (session.stats.drafted, session.stats.accepted, session.stats.steps) == (2, 2, 1)


def test_a_tree_continues_from_what_was_observed() -> None:
    with Proposer.for_tokenizer(None, vocabulary=20) as proposer:
        session = proposer.open(ids(7, 8, 9, 4))
        session.observe(ids(7, 8))
        tree = session.propose(4)
        assert tree.tokens[0] == 8
        assert 9 in tree.tokens[tree.parents == 0]
        assert session.observe(ids(3)) == 0
        assert session.propose(0).num_draft_tokens == 0
        assert session.propose(8, 1).depths.max(initial=0) <= 1


def test_what_a_finished_request_said_is_history_for_the_next() -> None:
    with Proposer.for_tokenizer(None, vocabulary=50) as proposer:
        first = proposer.open(ids(1, 2, 3))
        first.observe(ids(30, 31, 32, 33))
        first.close()
        first.close()
        proposer.flush()
        second = proposer.open(ids(5, 6, 30, 31))
        tokens, _ = second.propose_chain(2)
        assert tokens.tolist() == [32, 33]
        second.observe(ids(32, 33, 1))
        second.close()
        assert proposer.stats.requests == 2
        assert proposer.stats.accepted_by_level["history"] == 2
        assert proposer.nbytes > 0


def test_only_finished_requests_are_shared(tmp_path: Path) -> None:
    config = StoreConfig(f"embedded://{tmp_path / 'store'}", share="all")
    with Proposer.for_tokenizer(byte_level(()), store=config) as proposer:
        store = proposer.store
        assert store is not None
        store.wait_ready()
        for finished, tokens in ((True, ids(1, 2, 3, 4)), (False, ids(5, 6, 7, 1))):
            session = proposer.open(ids(8))
            session.observe(tokens)
            session.close(finished=finished)
        proposer.flush()
        assert sum(segment.count(ids(1, 2, 3, 4)) for segment in store.segments) == 1
        assert sum(segment.count(ids(7)) for segment in store.segments) == 0


def test_replayed_chains_accept_as_they_promise() -> None:
    """Chosen from all sources, a chain of four saves a third of the passes on real replies."""
    tokens = steps = 0
    with Proposer.for_tokenizer(None, vocabulary=32000) as proposer:
        for trace in read_traces([TRACE]):
            session = proposer.open(trace.prompt)
            session.observe(trace.output[:1])
            done = 1
            while done < len(trace.output):
                chain, _ = session.propose_chain(4)
                rest = trace.output[done:]
                right = 0
                while right < min(len(chain), len(rest) - 1) and chain[right] == rest[right]:
                    right += 1
                assert session.observe(rest[: right + 1]) == right
                done += right + 1
                steps += 1
            tokens += len(trace.output) - 1
            session.close()
            proposer.flush()
    assert tokens / steps > 1.5, tokens / steps


def test_logits_teach_more_than_the_tokens() -> None:
    with Proposer.for_tokenizer(None, vocabulary=20) as proposer:
        session = proposer.open(ids(1, 2))
        logits = NodeLogits(ids(-1, 1, 2, 3)[None], ids(5, 6)[None], np.array([[0.6, 0.3]], np.float32))
        session.observe(ids(3), logits)
        assert {5, 6} <= set(session.propose(8).tokens.tolist())


def test_what_a_step_taught_may_wait() -> None:
    """The same tokens come in at once, and the same is learned, at the next step at the latest."""
    with (
        Proposer.for_tokenizer(None, vocabulary=20) as soon,
        Proposer.for_tokenizer(None, vocabulary=20) as late,
    ):
        one, other = soon.open(ids(7, 8, 9, 4, 7, 8)), late.open(ids(7, 8, 9, 4, 7, 8))
        for step in (ids(9, 4), ids(7, 8), ids(9, 1), ids(2)):
            one.propose(4)
            other.propose(4)
            assert one.observe(step) == other.observe(step, later=True)
            assert one.length == other.length
        assert one.stats.drafted > other.stats.drafted
        other.apply_feedback()
        other.apply_feedback()
        assert one.stats == other.stats
        one.close()
        other.close()
        assert soon.stats == late.stats


def brute_chain(parents: list[int], probs: list[float], max_depth: int) -> float:
    best = 0.0
    for node in range(1, len(parents)):
        path, at = [], node
        while at > 0:
            path.append(at)
            at = parents[at]
        if len(path) <= max_depth:
            best = max(best, sum(probs[at] for at in path))
    return best


def test_the_best_chain_equals_brute_force() -> None:
    numbers = np.random.default_rng(5)
    for _ in range(200):
        size, max_depth = int(numbers.integers(1, 14)), int(numbers.integers(0, 6))
        parents, probs, depths = [-1], [1.0], [0]
        for node in range(1, size):
            above = int(numbers.integers(0, node))
            parents.append(above)
            depths.append(depths[above] + 1)
            probs.append(probs[above] * float(numbers.random()))
        chain = np.empty(max_depth, np.int32)
        length = best_chain(
            np.array(parents, np.int32),
            np.array(depths, np.int32),
            np.array(probs, np.float32),
            max_depth,
            0.0,
            np.empty(size, np.float32),
            chain,
        )
        path = [0, *chain[:length].tolist()]
        assert all(parents[below] == above for above, below in pairwise(path))
        assert sum(probs[node] for node in path[1:]) == pytest.approx(
            brute_chain(parents, probs, max_depth), 1e-5
        )


def test_refusals() -> None:
    with pytest.raises(InvalidInputError, match="which ids"):
        Proposer.for_tokenizer(None)
    with pytest.raises(InvalidInputError, match="drafts with a model"):
        Proposer.for_tokenizer(None, vocabulary=9, config=DraftConfig(method="opt_tree"))
    with Proposer.for_tokenizer(None, vocabulary=9) as proposer:
        for prompt, message in ((ids(), "empty"), (ids(9), "id 9"), (ids(1)[None], "shape"), (ids(-1), "-1")):
            with pytest.raises(InvalidInputError, match=message):
                proposer.open(prompt)
        with pytest.raises(InvalidInputError, match="needs a store"):
            proposer.open(ids(1), share="reply")
        session = proposer.open(ids(1))
        with pytest.raises(InvalidInputError, match="nodes is -1"):
            session.propose(-1)
        with pytest.raises(InvalidInputError, match="id 10"):
            session.observe(ids(10))
        assert session.observe(ids()) == 0
        assert session.length == 1
        session.close()
        with pytest.raises(InvalidInputError, match="closed"):
            session.propose(4)


def test_only_what_is_kept_of_a_chain_counts_as_drafted() -> None:
    with Proposer.for_tokenizer(None, vocabulary=20) as proposer:
        session = proposer.open(ids(7, 8, 9, 4, 5, 7, 8))
        assert session.propose_chain(3)[0].tolist() == [9, 4, 5]
        session.cut(1)
        assert session.observe(ids(9, 4)) == 1
        assert (session.stats.drafted, session.stats.accepted) == (1, 1)
        session.cut(0)  # nothing proposed: nothing to cut
