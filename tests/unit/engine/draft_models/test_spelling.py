"""Texts in the target's tokens: cut where its tokenizer cuts, byte by byte."""

from __future__ import annotations

import numpy as np
import pytest

from retrieval_draft.engine.draft_models import spelling
from retrieval_draft.engine.draft_models.expansion import ModelTree
from retrieval_draft.engine.draft_models.spelling import Speller, cut_off, joined_tree
from tests.support.tokenizers_for_tests import byte_level, metaspace

TARGET = byte_level(("ab", "abc", "de"))


def ids(text: str) -> np.ndarray:
    return np.array(TARGET(text)["input_ids"], np.int32)


@pytest.mark.parametrize("text", ["a", "é", "你", "😀", "a你"])
def test_the_beginning_of_a_character_is_counted(text: str) -> None:
    encoded = text.encode()
    size = len(text[-1].encode())
    assert [cut_off(encoded[: len(encoded) - missing]) for missing in range(size)] == [
        0,
        *range(size - 1, 0, -1),
    ]
    assert cut_off(b"") == cut_off(b"\x80\x80\x80\x80") == 0


def test_texts_are_cut_as_after_the_tail() -> None:
    speller = Speller(TARGET)
    assert speller.spell(ids("h de"), [b"abc de", b"a", b""]) == [
        ids("abc de").tolist(),
        ids("a").tolist(),
        [],
    ]
    assert speller.spell(ids("d"), [b"eab"]) == [ids("eab").tolist()], (
        "cut alone where the tail would be joined"
    )
    assert speller.spell(ids("d"), [b"a\xe4\xbd"]) == [ids("a").tolist()], (
        "a character's beginning is left out"
    )
    assert speller.spell(ids("d"), ["é".encode()]) == [[]], "no token for it"


def test_special_tokens_have_no_text_and_begin_the_tail_anew() -> None:
    speller = Speller(TARGET)
    assert speller.text(np.array([0, *ids("ab"), 99])) == b"ab"
    assert speller.spell(np.array([*ids("a"), 0]), [b"bc"]) == [ids("bc").tolist()]


def test_a_space_that_a_tokenizer_puts_first_is_no_part_of_a_text() -> None:
    tokenizer = metaspace(("a", "ab"))
    speller = Speller(tokenizer)
    tail = np.array(tokenizer("c ab")["input_ids"])
    assert speller.spell(tail, [b"c ab"]) == [tokenizer("c ab")["input_ids"]]


def test_texts_are_tokenized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    class Counting:
        get_vocab = TARGET.get_vocab

        def __call__(self, texts: list[str], **options: bool) -> dict[str, list[list[int]]]:
            calls.append(texts)
            return dict(TARGET(texts, **options))

    speller = Speller(Counting())
    monkeypatch.setattr(spelling, "_MOST_KNOWN", 2)
    for _ in range(2):
        speller.spell(ids("h"), [b"a", b"a"])
    assert calls == [["ha"]]
    speller.spell(ids("h"), [b"b", b"c"])
    speller.spell(ids("h"), [b"a"])
    assert calls == [["ha"], ["hb", "hc"], ["ha"]]


def test_paths_that_are_spelled_alike_add_up() -> None:
    """The docstring's example, and two paths of one text."""
    tree = ModelTree(
        np.array([1, 2], np.int32), np.array([-1, 0], np.int32), np.array([0.9, 0.8], np.float32)
    )
    found = joined_tree(tree, [[7], [9]], 9)
    assert (found.tokens.tolist(), found.parents.tolist()) == ([9, 7], [-1, -1])
    np.testing.assert_allclose(found.probs, [0.72, 0.18], rtol=1e-5)
    tree = ModelTree(
        np.array([1, 2, 3, 4], np.int32),
        np.array([-1, -1, 1, 2], np.int32),
        np.array([0.5, 0.4, 1, 0.5], np.float32),
    )
    found = joined_tree(tree, [[5, 6], [5], [5, 6], [5, 6, 8]], 9)
    assert (found.tokens.tolist(), found.parents.tolist()) == ([5, 6, 8], [-1, 0, 1])
    np.testing.assert_allclose(found.probs, [0.9, 1.0, 0.2 / 0.9], rtol=1e-5)
    assert len(joined_tree(tree, [[], [], [], []], 9).tokens) == 0
