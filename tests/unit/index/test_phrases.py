from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.phrase_files import read_phrases
from retrieval_draft.index.phrases import KEPT, PhraseSource, PhraseTable
from retrieval_draft.index.source import Proposal
from tests.support.tokens import ids, paths


def table(*phrases: list[int], trigger: int = 3) -> PhraseTable:
    return PhraseTable([ids(*phrase) for phrase in phrases], trigger)


def after(phrases: PhraseTable, *text: int, budget: int = 16) -> Proposal:
    return PhraseSource(phrases).open(ids(*text)).propose(budget)


def path_probs(proposal: Proposal) -> np.ndarray:
    out = np.ones(len(proposal))
    for node, parent in enumerate(proposal.parents.tolist()):
        out[node] = proposal.probs[node] * (out[parent] if parent >= 0 else 1)
    return out


def test_docstring_example() -> None:
    phrases = table([5, 6, 7, 8, 9])
    assert after(phrases, 5, 6).tokens.tolist() == [7, 8, 9]
    proposal = after(phrases, 5, 6, 7)
    assert proposal.tokens.tolist() == [8, 9]
    assert proposal.parents.tolist() == [-1, 0]
    assert proposal.match_lengths.tolist() == [3, 4]
    assert (proposal.source, proposal.level) == ("phrases", "corpus")
    assert after(phrases, 6, 7, 8).tokens.tolist() == [9]
    for text in ((5,), (7, 8), (6, 7), (4, 7, 8), (5, 6, 7, 8, 9), ()):
        assert len(after(phrases, *text)) == 0


def test_arrays_are_what_a_proposal_promises() -> None:
    for proposal in (after(table([5, 6, 7]), 5, 6), after(table([5, 6, 7]), 1)):
        dtypes = [
            each.dtype for each in (proposal.tokens, proposal.parents, proposal.probs, proposal.match_lengths)
        ]
        assert dtypes == [np.int32, np.int32, np.float32, np.int32]


@pytest.mark.parametrize(("length", "prob"), [(2, 0.6), (3, 0.7), (10, 0.95), (20, 0.99)])
def test_a_lone_occurrence_is_surer_the_longer_it_matches(length: int, prob: float) -> None:
    proposal = after(table(list(range(100, 140))), *range(100, 100 + length))
    assert proposal.probs[0] == pytest.approx(prob, abs=0.015)
    assert proposal.match_lengths[0] == length
    assert np.all(np.diff(proposal.probs) >= 0)
    assert np.all(proposal.probs < 1)


def test_a_start_triggers_inside_a_text_too() -> None:
    phrases = table([5, 6, 7, 8], [1, 5, 6, 9])
    assert after(phrases, 40, 41, 42, 5, 6).tokens.tolist() == [7, 8]
    assert set(after(phrases, 1, 5, 6).tokens.tolist()) == {9, 7, 8}
    assert after(phrases, 1, 5, 6).tokens[0] == 9


def test_a_long_trigger_leaves_no_gap_behind_the_start() -> None:
    phrases = table(list(range(10, 30)), trigger=5)
    for length in range(2, 20):
        proposal = after(phrases, 99, *range(10, 10 + length))
        assert proposal.tokens[0] == 10 + length
        assert proposal.match_lengths[0] == length
    assert len(after(phrases, 12, 13, 14, 15)) == 0
    assert after(phrases, 12, 13, 14, 15, 16).tokens[0] == 17


def test_a_match_never_crosses_phrases() -> None:
    phrases = table([1, 2, 3], [4, 5, 6])
    assert len(after(phrases, 1, 2, 3)) == 0
    assert len(after(phrases, 2, 3, 4)) == 0
    assert after(phrases, 3, 4, 5).match_lengths.tolist() == [2]
    assert paths(after(phrases, 1, 2)) == [(3,)]


def test_ids_0_and_the_largest_are_tokens_like_any_other() -> None:
    largest = 2**31 - 1
    phrases = table([0, 0, 0, largest, 0, 256, 1, 0])
    assert after(phrases, 0, 0, budget=3).tokens[0] == 0
    assert after(phrases, 0, largest, 0).tokens.tolist() == [256, 1, 0]
    assert len(after(phrases, largest, 0)) == 0


def test_tokens_of_equal_bytes_are_not_confused() -> None:
    phrases = table([1, 256, 1, 7])
    assert len(after(phrases, 256, 256, 1)) == 0
    assert len(after(phrases, 1, 1, 1)) == 0


def test_equal_continuations_are_one_node() -> None:
    phrases = table([1, 2, 3, 4, 5, 6], [9, 1, 2, 3, 4, 5, 7], [8, 1, 2, 3, 4, 5, 6])
    proposal = after(phrases, 2, 3, 4)
    assert paths(proposal) == [(5,), (5, 6), (5, 7)]
    assert proposal.probs[1] == pytest.approx(2 * proposal.probs[2])


def test_a_longer_match_ranks_above() -> None:
    phrases = table([1, 2, 3, 4, 20], [8, 2, 3, 4, 30], [9, 2, 3, 4, 40], [7, 7, 3, 4, 50])
    proposal = after(phrases, 0, 9, 2, 3, 4)
    assert proposal.tokens.tolist() == [40, 20, 30]
    assert proposal.match_lengths.tolist() == [4, 3, 3]
    assert np.all(np.diff(proposal.probs) <= 0)
    assert proposal.probs.sum() < 1


def test_a_phrase_that_ends_is_evidence_against_the_others() -> None:
    alone = after(table([1, 2, 3, 4, 5]), 1, 2, 3, 4).probs[0]
    assert after(table([1, 2, 3, 4, 5], [1, 2, 3, 4]), 1, 2, 3, 4).probs[0] == pytest.approx(alone / 2)


def test_match_length_is_of_the_text_not_of_the_trigger() -> None:
    phrase = list(range(100, 160))
    assert after(table(phrase), 101, *phrase[3:13]).match_lengths[0] == 10
    assert after(table(phrase), *phrase[:50]).match_lengths[0] == 32


@pytest.mark.parametrize("budget", [-1, 0, 1, 2, 7, 64, 500])
def test_trees_of_any_budget(budget: int) -> None:
    rng = np.random.default_rng(3)
    phrases = PhraseTable([rng.integers(0, 3, 40).astype(np.int32) for _ in range(6)])
    session = PhraseSource(phrases).open(ids(0, 1, 2, 0))
    whole = session.propose(10_000)
    proposal = session.propose(budget)
    assert len(proposal) == min(max(budget, 0), len(whole))
    assert np.all(proposal.parents < np.arange(len(proposal)))
    assert len(set(paths(proposal))) == len(proposal)
    assert np.all((proposal.probs > 0) & (proposal.probs < 1))
    assert np.all(np.diff(path_probs(proposal)) <= 1e-6), "best first"
    assert paths(proposal) == paths(whole)[: len(proposal)]


def test_observing_is_opening_with_the_whole_text() -> None:
    rng = np.random.default_rng(5)
    phrases = PhraseTable([rng.integers(0, 4, 60).astype(np.int32) for _ in range(4)])
    text = rng.integers(0, 4, 94).astype(np.int32)
    session = PhraseSource(phrases).open(text[:0])
    done = 0
    for step in (1, 0, 2, 1, 40, 1, 1, 3, 30, 15):
        session.observe(text[done : done + step])
        done += step
        one, two = session.propose(24), PhraseSource(phrases).open(text[:done]).propose(24)
        assert paths(one) == paths(two)
        assert one.probs.tolist() == two.probs.tolist()
        assert one.match_lengths.tolist() == two.match_lengths.tolist()
    session.close()


def test_proposing_changes_nothing() -> None:
    session = PhraseSource(table([1, 2, 3, 4, 5, 6])).open(ids(1, 2, 3))
    first = session.propose(2)
    first.tokens[:] = 77
    assert [session.propose(2).tokens.tolist() for _ in range(2)] == [[4, 5], [4, 5]]


def test_references_are_not_phrases() -> None:
    session = PhraseSource(table([1, 2, 3])).open(ids(7, 8, 9), (ids(7, 8, 9, 10),))
    assert len(session.propose(4)) == 0


def test_short_phrases_are_ignored_and_counted() -> None:
    phrases = table([1, 2], [], [3], [4, 5, 6])
    assert (len(phrases), phrases.ignored) == (1, 3)
    assert len(after(phrases, 1, 2)) == 0
    assert after(phrases, 4, 5).tokens.tolist() == [6]


@pytest.mark.parametrize("phrases", [[], [[1, 2]]])
def test_a_table_without_phrases_proposes_nothing(phrases: list[list[int]]) -> None:
    empty = table(*phrases)
    assert len(empty) == 0
    assert len(after(empty, 1, 2, 3)) == 0
    assert PhraseSource(empty).nbytes >= 0


def test_nbytes_counts_what_grows() -> None:
    small, large = table(list(range(50))), table(list(range(5000)))
    assert large.nbytes > 50 * small.nbytes > 50 * 50 * 16
    assert PhraseSource(large).nbytes == large.nbytes


def test_many_occurrences_are_bounded_and_spread() -> None:
    phrases = table(*([7, 8, 9, 1000 + number] for number in range(1000)))
    proposal = after(phrases, 7, 8, 9, budget=1000)
    assert len(proposal) == KEPT
    assert proposal.tokens.min() < 1100
    assert proposal.tokens.max() > 1900


def test_a_long_match_is_found_among_a_thousand_short_ones() -> None:
    phrases = table(*([2000 + number, 2, 3, 7, 8, 9, 1000 + number] for number in range(1000)))
    for number in (0, 1, 517, 999):
        proposal = after(phrases, 2000 + number, 2, 3, 7, 8, 9, budget=4)
        assert proposal.tokens[0] == 1000 + number
        assert proposal.match_lengths[0] == 6


@pytest.mark.parametrize(
    ("phrase", "found"),
    [
        (np.array([1, -2, 3]), "-2"),
        (np.array([1, 2**31, 3]), "2147483648"),
        (np.array([1.0, 2.0, 3.0]), "float64"),
        (np.array([[1, 2, 3]]), r"\(1, 3\)"),
    ],
)
def test_phrases_that_are_no_token_ids_are_refused(phrase: np.ndarray, found: str) -> None:
    with pytest.raises(InvalidInputError, match=rf"Phrase 1 .*{found}"):
        PhraseTable([ids(1, 2, 3), phrase])


@pytest.mark.parametrize("trigger", [-1, 0, 1, 33])
def test_a_single_token_is_no_trigger(trigger: int) -> None:
    with pytest.raises(InvalidInputError, match=r"2\.\.32"):
        table([1, 2, 3], trigger=trigger)


def test_negative_ids_in_the_text_are_refused() -> None:
    source = PhraseSource(table([1, 2, 3]))
    with pytest.raises(InvalidInputError, match="-1"):
        source.open(ids(1, -1))
    session = source.open(ids(1))
    with pytest.raises(InvalidInputError, match="-7"):
        session.observe(ids(-7))
    session.observe(ids(2))
    assert session.propose(1).tokens.tolist() == [3]


def test_importing_and_using_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, numpy as np\n"
        "from retrieval_draft.index.phrases import PhraseSource, PhraseTable\n"
        "PhraseSource(PhraseTable([np.array([1, 2, 3])])).open(np.array([1, 2], np.int32)).propose(4)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "phrases"),
    [
        (
            "lines.txt",
            "one phrase\n\n  another --- one\n   \nthree",
            ["one phrase", "  another --- one", "three"],
        ),
        ("blocks.txt", "a\n  b\n\nc\n---\n\n  d\n-----  \ne\n", ["a\n  b\n\nc", "  d", "e"]),
        ("edges.txt", "---\na\n---\n---\n--\n-- -\n", ["a", "--\n-- -"]),
        ("windows.txt", "\ufeffa\r\nb\r\n---\r\nc\r\n", ["a\nb", "c"]),
        ("odd breaks.md", "a\u2028b\x0cc\nü", ["a\u2028b\x0cc", "ü"]),
        ("list.json", json.dumps(["a\n", "", "---", "ü"]), ["a\n", "---", "ü"]),
        ("UPPER.JSON", '["a"]', ["a"]),
        ("lines.jsonl", '"a\\nb"\n\n{"text": "c", "id": 3}\n', ["a\nb", "c"]),
    ],
)
def test_reader(tmp_path: Path, name: str, content: str, phrases: list[str]) -> None:
    assert read_phrases(written(tmp_path, name, content)) == phrases


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("p.txt", "", "no phrase"),
        ("p.txt", " \n---\n\n", "no phrase"),
        ("p.txt", b"ab\xffc", "not UTF-8: byte 2 is 0xff"),
        ("p.json", "[]", "no phrase"),
        ("p.json", "[1", "as JSON"),
        ("p.json", "[" * 200_000, "as JSON"),
        ("p.json", '{"a": "b"}', "an object with 'a'; it must be a list of strings"),
        ("p.json", '["a", 7]', "Entry 2 .* is the value 7"),
        ("p.jsonl", '"a"\n\nb\n', "p.jsonl:3 must hold strings as JSON"),
        ("p.jsonl", '"a"\n[1, 2]\n', "p.jsonl:2 is a list of 2"),
        ("p.jsonl", '{"txt": "a"}\n', "p.jsonl:1 is an object with 'txt'"),
        ("p.jsonl", '{"text": null}\n', "p.jsonl:1 is an object with 'text'"),
    ],
)
def test_reader_says_what_is_wrong(tmp_path: Path, name: str, content: str | bytes, found: str) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(InvalidInputError, match=found) as caught:
        read_phrases(path)
    assert str(path) in str(caught.value)


def test_reader_names_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(InvalidInputError, match="Cannot read") as caught:
            read_phrases(path)
        assert str(path) in str(caught.value)
