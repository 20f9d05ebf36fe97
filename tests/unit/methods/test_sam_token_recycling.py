"""SAM[Token Recycling]: a chain behind a match of five tokens or more, else the recycled tree."""

from __future__ import annotations

from retrieval_draft.methods.sam_token_recycling import METHOD
from tests.support.tokens import ids, method_source, predictions_after


def source(vocabulary=64, texts=()):
    """One corpus of the texts given."""
    return method_source(METHOD, *([texts] if texts else []), vocabulary=vocabulary)


def test_a_match_of_five_is_copied_and_the_tree_is_not_asked():
    opened = source().open(ids(1, 2, 3, 4, 5, 8, 9, 1, 2, 3, 4, 5))
    opened.learn(predictions_after(5, 7))
    proposal = opened.propose(80)
    assert proposal.tokens.tolist() == [8, 9, 1, 2, 3, 4, 5]
    assert proposal.parents.tolist() == [-1, 0, 1, 2, 3, 4, 5]
    assert proposal.match_lengths.tolist() == [5] * 7


def test_a_match_of_four_is_left_to_the_tree():
    opened = source().open(ids(8, 2, 3, 4, 5, 8, 9, 1, 2, 3, 4, 5))
    assert len(opened.propose(80)) == 0
    opened.learn(predictions_after(5, 7, 6))
    assert opened.propose(80).tokens.tolist() == [7, 6]


def test_the_oldest_occurrence_of_the_longest_match_wins():
    run = (1, 2, 3, 4, 5)
    opened = source().open(ids(*run, 20, *run, 21, 9, *run, 22, 9))
    opened.observe(ids(*run))
    # "9 1 2 3 4 5" is the longest match and stood once; "1 2 3 4 5" alone would have gone on with 20
    assert opened.propose(3).tokens.tolist() == [22, 9, 1]
    opened = source().open(ids(*run, 20, *run, 21, *run, 22, 8))
    opened.observe(ids(*run))
    assert opened.propose(3).tokens.tolist() == [20, 1, 2]


def test_forty_tokens_at_most_and_the_budget_cuts():
    opened = source(200).open(ids(*range(100), *range(5)))
    assert opened.propose(80).tokens.tolist() == list(range(5, 45))
    assert opened.propose(1).tokens.tolist() == [5]


def test_a_run_of_one_token_overlaps_itself():
    assert source().open(ids(*[0] * 6)).propose(80).tokens.tolist() == [0]


def test_matches_are_of_tokens_not_of_bytes():
    """Shifted by one byte, 0x01000000 looks like 1: only the whole tokens count."""
    shifted = [value << 8 for value in (1, 2, 3, 4, 5)]
    opened = source().open(ids(7, *shifted, 0, 1, 2, 3, 4, 5, 8, 1, 2, 3, 4, 5))
    assert opened.propose(1).tokens.tolist() == [8]


def test_a_static_match_of_ten_is_copied_from_its_oldest_place():
    run = list(range(1, 11))
    made = source(200, [[90, *run, 31, 32], [*run, 21, 22], [*range(40, 45), *range(100, 180)]])
    opened = made.open(ids(0, *run[1:]))
    opened.learn(predictions_after(10, 7))
    assert opened.propose(80).tokens.tolist() == [7]  # nine tokens, five of bias
    proposal = made.open(ids(*run)).propose(80)
    assert proposal.tokens.tolist() == [31, 32]
    assert proposal.level == "corpus"
    assert len(made.open(ids(*range(40, 45), *range(100, 110))).propose(80)) == 40


def test_the_text_wins_ties_and_a_static_match_that_ends_counts_for_nothing():
    run = list(range(1, 11))
    opened = source(200, [[*run, 21]]).open(ids(*run[5:], 31, *run))  # five against ten less five
    assert opened.propose(1).tokens.tolist() == [31]
    assert opened.propose(1).level == "request"
    opened = source(200, [run]).open(ids(*run))
    opened.learn(predictions_after(10, 7))
    assert opened.propose(80).tokens.tolist() == [7]


def test_empty_prompt_and_rows_across_requests():
    made = source()
    opened = made.open(ids())
    opened.observe(ids())
    assert len(opened.propose(80)) == 0
    opened.learn(predictions_after(3, 0))
    opened.close()
    assert made.open(ids(3)).propose(80).tokens.tolist() == [0]
    assert made.nbytes == 64 * 8 * 4
