"""One choice as its client sees it."""

from __future__ import annotations

from collections.abc import Sequence

from retrieval_draft.drafting.stats import DraftStats
from retrieval_draft.server.openai.detokenize import ReplyText
from retrieval_draft.server.openai.reply import Reply, drafting_metrics, predicted_tokens
from retrieval_draft.server.scheduler.channel import Ended, Tokens


def letters(ids: Sequence[int]) -> str:
    """Token 1 is "a", 2 "b" and so on."""
    return "".join(chr(96 + token) for token in ids)


def reply(stops: Sequence[str] = (), silent: bool = False) -> Reply:
    return Reply([0], ReplyText(letters, stops=stops), [1, 5], silent=silent)


def end(stats: DraftStats | None = None, rest: str | None = None, **steps: int) -> Ended:
    counts = {int(name[1:]): count for name, count in steps.items()}
    return Ended(0, "stop", DraftStats() if stats is None else stats, -3.0, counts, rest)


def test_predicted_tokens_are_drafted_ones_that_go_on_as_predicted() -> None:
    made = Reply([0], ReplyText(lambda ids: ""), [1, 5])
    made.take(Tokens(0, [6], (), 0))
    made.take(Tokens(0, [7, 9], (), 1))
    made.take(Tokens(0, [8, 3, 4], (), 2))
    # 7 behind 6 is predicted and was drafted; 6 was not drafted; 8 behind 9 and 3 behind 8 are not predicted.
    assert predicted_tokens([made], [5, 6, 7, 8]) == (1, 3)
    assert predicted_tokens([made], []) == (0, 0)


def test_text_comes_piece_by_piece_with_the_end_of_it_last() -> None:
    made = reply(stops=["bcd"])
    assert made.take(Tokens(0, [1, 2], (), 1)) == "a"
    assert made.marks == [("a", True)]
    assert made.take(Tokens(0, [3], (), 0)) == ""
    assert made.end(end()) == "bc"
    assert (made.text, made.reason, made.logprob) == ("abc", "stop", -3.0)
    assert made.marks == [("bc", False)]
    assert made.offsets == [0, 1, 2]
    assert made.mean_logprob == -1.0


def test_text_that_the_engine_made_is_taken_as_it_is() -> None:
    made = Reply([0], None, [1])
    assert made.take(Tokens(0, [1, 2], (), 0, ["x", ""], [0, 1])) == "x"
    assert made.end(end(rest="yz")) == "yz"
    assert (made.text, made.offsets) == ("xyz", [0, 1])


def test_where_only_the_prompt_is_wanted_nothing_is_said() -> None:
    made = reply(silent=True)
    assert made.take(Tokens(0, [1, 2], (), 1)) == ""
    assert made.end(end()) == ""
    assert (made.tokens, made.text, made.reason) == ([], "", "length")


def test_drafting_is_counted_over_all_choices() -> None:
    one, other = reply(), reply()
    one.end(end(DraftStats(requests=1, tokens=8, steps=2, drafted=6, accepted=3), _1=1, _2=1))
    other.end(end(DraftStats(requests=1, tokens=4, steps=2, drafted=4, accepted=1), _1=1, _0=1))
    found = drafting_metrics([one, other])["speculative_decoding"]
    assert (found["num_draft_tokens"], found["num_accepted_draft_tokens"]) == (10, 4)
    assert (found["num_spec_steps"], found["acceptance_histogram"]) == (4, [1, 2, 1])
