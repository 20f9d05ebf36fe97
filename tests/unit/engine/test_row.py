"""One request while it is decoded: what it emits, what it keeps in its cache, what its sources are told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from retrieval_draft.drafting.predictions import Predictions
from retrieval_draft.drafting.session import DraftPlan
from retrieval_draft.drafting.stats import DraftStats
from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.engine.logits import LogitReader
from retrieval_draft.engine.request import DecodeRequest
from retrieval_draft.engine.row import Row
from retrieval_draft.engine.target import Target
from retrieval_draft.errors import NonFiniteLogitsError
from retrieval_draft.index.source import NodeLogits, TokenArray
from tests.support.models import CACHE, make
from tests.support.trees import tree_of

MODEL = make("llama")
TARGET = Target(MODEL)
PROMPT = np.array([5, 6, 7, 8, 9], np.int32)
NOTHING = torch.zeros(9, 97)


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.inference_mode():
        yield


class Told:
    """Stands for a `DraftSession`: notes what it is told, and proposes a given tree."""

    wants_hidden = learns_early = False

    def __init__(self, tree: DraftTree | None = None) -> None:
        self.tree = tree
        self.calls: list[tuple[Any, ...]] = []

    def wants_cache(self, captured: bool) -> bool:
        return False

    def propose(self, root: int, length: int, max_depth: int) -> DraftPlan:
        self.calls.append(("propose", root, length, max_depth))
        tree = DraftTree.root(root) if self.tree is None else self.tree
        return DraftPlan(tree, tree, ())

    def start(self, first: TokenArray, prompt: TokenArray, predictions: Predictions | None) -> None:
        rows = None if predictions is None else len(predictions.next_tokens)
        self.calls.append(("start", first.tolist(), prompt.tolist(), rows))

    def count(self, plan: DraftPlan, path: Any) -> None:
        self.calls.append(("count", list(path)))

    def observe(self, emitted: TokenArray) -> None:
        self.calls.append(("observe", emitted.tolist()))

    def learn_early(self, logits: NodeLogits) -> None:
        self.calls.append(("learn_early", logits.contexts.tolist()))

    def learn(
        self, plan: DraftPlan, emitted: TokenArray, logits: NodeLogits, early: bool | None = None
    ) -> None:
        assert early is (False if self.learns_early else None)
        self.calls.append(("learn", logits.contexts.tolist()))

    def learn_hidden(self, hidden: Any, begin: int) -> None:
        self.calls.append(("learn_hidden", hidden[:, 0].tolist(), begin))

    def close(self) -> None:
        self.calls.append(("close",))


def row_of(drafting: Any = None, **options: Any) -> Row:
    request = DecodeRequest(PROMPT, **{"max_length": 20, **options})
    return Row(TARGET, request, drafting, TARGET.attention_of_row(), DraftStats())


def started(drafting: Any = None, **options: Any) -> Row:
    """A row whose prompt has passed."""
    made = row_of(drafting, **options)
    for _ in made.prefill(LogitReader(2)):
        pass
    return made


def says(*tokens: int, finite: bool = True) -> Predictions:
    """The target's predictions after each node."""
    size = len(tokens)
    return Predictions(
        np.array(tokens, np.int32),
        np.full(size, finite),
        np.array([[token, 0] for token in tokens], np.int32),
        np.ones((size, 2), np.float32),
    )


def step(made: Row, tree: DraftTree, *tokens: int) -> list[int]:
    """Verifies a tree, and has the target say the given tokens after its nodes."""
    plan = DraftPlan(tree, tree, ())
    TARGET.verify(made.cache, made.prepare(plan))
    predictions = says(*tokens)
    emitted = made.accept(plan, NOTHING, predictions)
    made.apply_feedback()
    return emitted


def keys_of(text: list[int]) -> list[torch.Tensor]:
    """Keys of every layer where the model reads a text without drafts."""
    return [layer.keys for layer in MODEL(torch.tensor([text]), use_cache=True)[CACHE].layers]


def assert_cache_holds(made: Row, text: list[int]) -> None:
    for layer, keys in zip(made.cache.layers, keys_of(text), strict=True):
        torch.testing.assert_close(layer.keys, keys, atol=1e-5, rtol=1e-4)


def first_token() -> int:
    return int(MODEL(torch.from_numpy(PROMPT[None].astype(np.int64))).logits[0, -1].argmax())


def test_the_prompt_gives_the_first_token() -> None:
    emitted: list[int] = []
    made = started(emit=emitted.append)
    assert emitted == made.text.reply.tolist() == [first_token()]
    assert (made.length, made.done) == (5, False)
    assert (made.stats.requests, made.stats.prompt_tokens, made.stats.tokens) == (1, 5, 1)


@pytest.mark.parametrize(("chunk", "pauses"), [(None, 0), (2, 2), (1, 4), (9, 0)])
def test_other_rows_may_step_between_two_passes_of_a_prompt(chunk: int | None, pauses: int) -> None:
    made = row_of(prefill_chunk=chunk)
    assert sum(1 for _ in made.prefill(LogitReader(0))) == pauses
    assert made.text.reply.tolist() == [first_token()]


def test_logits_of_the_prompt_are_kept_or_read_run_by_run() -> None:
    whole = MODEL(torch.from_numpy(PROMPT[None].astype(np.int64))).logits[0]
    runs: list[torch.Tensor] = []
    made = started(
        keep_prompt_logits=True, prefill_chunk=2, read_prompt=lambda each: runs.append(each.clone())
    )
    assert [len(each) for each in runs] == [2, 2, 1]
    torch.testing.assert_close(made.prompt_logits, whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat(runs), whole, atol=1e-4, rtol=1e-4)
    assert started().prompt_logits is None


def test_sources_learn_from_as_many_positions_of_the_prompt_as_they_want() -> None:
    told = Told()
    started(told, prompt_rows=3)
    assert told.calls == [("start", [first_token()], PROMPT.tolist(), 3)]


def test_a_tree_is_walked_as_the_target_says() -> None:
    made = started()
    root = first_token()
    tree = tree_of([root, 30, 31, 32], [-1, 0, 1, 0])
    assert step(made, tree, 30, 31, 40, 0) == [30, 31, 40]
    assert made.path == [0, 1, 2]
    assert made.text.tokens.tolist() == [*PROMPT.tolist(), root, 30, 31, 40]
    assert (made.stats.steps, made.stats.tokens) == (1, 4)


def test_the_cache_holds_what_the_accepted_path_alone_would_leave() -> None:
    made = started()
    root = first_token()
    step(made, tree_of([root, 30, 31, 32, 33], [-1, 0, 0, 2, 3]), 31, 0, 32, 33, 50)  # jumps over node 1
    step(made, tree_of([50, 60], [-1, 0]), 61, 0)
    step(made, tree_of([61, 62, 63], [-1, 0, 1]), 62, 64, 0)
    made.finish()
    text = [*PROMPT.tolist(), root, 31, 32, 33, 50, 61, 62, 64]
    assert made.text.tokens.tolist() == text
    assert made.cache.text.tolist() == text[:-1]
    assert_cache_holds(made, text[:-1])


def test_a_pass_that_failed_leaves_the_committed_text() -> None:
    made = started()
    root = first_token()
    step(made, tree_of([root, 30, 31], [-1, 0, 0]), 31, 0, 40)
    tree = tree_of([40, 41], [-1, 0])
    plan = DraftPlan(tree, tree, ())
    TARGET.verify(made.cache, made.prepare(plan))  # as far as the cache knows
    TARGET.verify(made.cache, made.prepare_again(plan))
    made.accept(plan, NOTHING, says(41, 42))
    made.finish()
    assert_cache_holds(made, [*PROMPT.tolist(), root, 31, 40, 41])


def test_nothing_is_emitted_after_an_end_token_or_the_last_place() -> None:
    root = first_token()
    tree = tree_of([root, 30, 31], [-1, 0, 1])
    ended: list[bool] = []
    made = started(eos=frozenset({30}), ended=lambda: ended.append(True))
    assert step(made, tree, 30, 31, 32) == [30]
    assert (made.done, ended) == (True, [True])
    made = started(max_length=8)
    assert step(made, tree, 30, 31, 32) == [30, 31]
    assert made.done


class Asked(StoppingCriteria):
    """Notes the texts it is asked about, and ends one that ends in a given token."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.texts: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        self.texts.append(input_ids[0].tolist())
        return input_ids[:, -1] == self.last


def test_criteria_are_asked_after_each_token_as_in_plain_decoding() -> None:
    root = first_token()
    asked = Asked(31)
    padded = torch.tensor([[0, *PROMPT.tolist()]])
    made = started(criteria=StoppingCriteriaList([asked]), padded=padded, eos=frozenset({31}))
    step(made, tree_of([root, 30, 31], [-1, 0, 1]), 30, 31, 32)
    begin = [0, *PROMPT.tolist()]
    assert asked.texts == [[*begin, root], [*begin, root, 30], [*begin, root, 30, 31]]
    assert made.done


def test_logits_that_are_no_numbers_are_an_error_that_names_the_position() -> None:
    made = started()
    tree = DraftTree.root(first_token())
    made.prepare(DraftPlan(tree, tree, ()))
    with pytest.raises(NonFiniteLogitsError, match="position 6"):
        made.accept(DraftPlan(tree, tree, ()), NOTHING, says(3, finite=False))


def test_sources_are_told_what_was_accepted_and_after_which_contexts() -> None:
    told, root = Told(), first_token()
    made = started(told)
    del told.calls[:]
    step(made, tree_of([root, 30, 31], [-1, 0, 0]), 31, 0, 40)
    assert told.calls == [
        ("count", [0, 2]),
        ("observe", [31, 40]),
        ("learn", [[7, 8, 9, root], [8, 9, root, 30], [8, 9, root, 31]]),
    ]


def test_the_hidden_states_of_the_accepted_path_are_passed_on() -> None:
    told, root = Told(), first_token()
    told.wants_hidden = True
    made = started(told)
    tree = tree_of([root, 30, 31], [-1, 0, 0])
    plan = DraftPlan(tree, tree, ())
    TARGET.verify(made.cache, made.prepare(plan))
    made.accept(plan, NOTHING, says(31, 0, 40), torch.tensor([[10.0], [11.0], [12.0]]))
    made.apply_feedback()
    assert told.calls[-1] == ("learn_hidden", [10.0, 12.0], 5)


def test_drafts_are_asked_for_no_deeper_than_the_reply_has_room() -> None:
    told = Told()
    made = started(told, max_length=9)
    made.propose()
    assert told.calls[-1] == ("propose", first_token(), 5, 2)  # two after the token that comes anyway
    plain = started()
    assert plain.propose().tree.tokens.tolist() == [first_token()]


def test_rows_of_one_prompt_share_its_pass_and_nothing_after_it() -> None:
    owner, told = started(keep_prompt_logits=True), Told()
    other = row_of(told)
    other.fork(owner)
    root = first_token()
    assert other.text.reply.tolist() == [root]
    assert other.prompt_logits is owner.prompt_logits
    assert told.calls == [("start", [root], PROMPT.tolist(), None)], "the owner's sources learned the prompt"
    step(owner, tree_of([root, 30], [-1, 0]), 30, 31)
    step(other, tree_of([root, 40], [-1, 0]), 40, 41)
    for made, reply in ((owner, [30, 31]), (other, [40, 41])):
        made.finish()
        assert made.text.reply.tolist() == [root, *reply]
        assert_cache_holds(made, [*PROMPT.tolist(), root, reply[0]])


def test_who_waits_for_the_reply_gets_it_at_the_end() -> None:
    replies: list[list[int]] = []
    made = started(max_length=6, finished=lambda reply: replies.append(reply.tolist()))
    assert (made.done, replies) == (True, [])
    made.finish()
    assert replies == [[first_token()]]


def test_a_step_is_learned_from_once_and_at_the_latest_at_the_end() -> None:
    told, root = Told(), first_token()
    made = started(told)
    tree = tree_of([root, 30], [-1, 0])
    plan = DraftPlan(tree, tree, ())
    TARGET.verify(made.cache, made.prepare(plan))
    made.accept(plan, NOTHING, says(30, 31))
    assert [call for call, *_ in told.calls] == ["start"], "tokens are out before anything is learned"
    made.forget()
    assert [call for call, *_ in told.calls] == ["start", "count", "observe", "learn", "close"]


def test_sources_of_the_last_predictions_get_them_before_the_next_step_drafts() -> None:
    told, root = Told(), first_token()
    told.learns_early = True
    made = started(told)
    tree = tree_of([root, 30], [-1, 0])
    plan = DraftPlan(tree, tree, ())
    TARGET.verify(made.cache, made.prepare(plan))
    made.accept(plan, NOTHING, says(30, 31))
    told.calls.clear()
    made.observe()
    made.propose()
    made.learn()
    made.learn()
    assert [call for call, *_ in told.calls] == ["count", "observe", "learn_early", "propose", "learn"]
    assert told.calls[2][1] == told.calls[4][1] == [[7, 8, 9, root], [8, 9, root, 30]]


def test_what_cannot_be_learned_of_a_request_that_is_over_is_left(caplog: pytest.LogCaptureFixture) -> None:
    told, root = Told(), first_token()
    told.observe = None  # type: ignore[assignment]  # a call of it raises
    made = started(told)
    tree = DraftTree.root(root)
    plan = DraftPlan(tree, tree, ())
    TARGET.verify(made.cache, made.prepare(plan))
    made.accept(plan, NOTHING, says(30))
    made.forget()
    assert told.calls[-1] == ("close",)
    assert "was not learned from" in caplog.text


@pytest.mark.parametrize(("said", "observed"), [((30, 31), []), ((31, 30), [31]), ((31, 40), [31, 40])])
def test_drafting_ends_with_a_placeholder(said: tuple[int, int], observed: list[int]) -> None:
    told = Told()
    made = started(told, placeholders=frozenset({30}))
    told.calls.clear()
    step(made, tree_of([first_token(), said[0]], [-1, 0]), *said)
    assert (made.drafting is None) == (30 in said)
    assert [call[1] for call in told.calls if call[0] == "observe"] == ([observed] if observed else [])
    assert (("close",) in told.calls) == (30 in said)


def test_a_row_may_leave_with_a_placeholder_that_nobody_observed_yet() -> None:
    told, root = Told(), first_token()
    made = started(told, placeholders=frozenset({31}))
    plan = DraftPlan(tree := DraftTree.root(root), tree, ())
    TARGET.verify(made.cache, made.prepare(plan))
    made.accept(plan, NOTHING, says(31))
    made.forget()
    assert made.drafting is None
    assert [call for call, *_ in told.calls].count("close") == 1


def test_nothing_is_drafted_after_a_placeholder_that_begins_the_reply() -> None:
    told = Told()
    made = started(told, placeholders=frozenset({first_token()}))
    assert made.drafting is None
    assert told.calls == [("close",)]


def test_sources_are_closed_once() -> None:
    told = Told()
    made = started(told)
    made.forget()
    made.forget()
    assert told.calls[1:] == [("close",)]
    assert made.drafting is None
