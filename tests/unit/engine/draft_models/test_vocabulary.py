from __future__ import annotations

import pytest

from retrieval_draft.engine.draft_models.vocabulary import VocabularyMap, token_bytes
from retrieval_draft.errors import TokenizerMismatchError
from tests.support.tokenizers_for_tests import LETTERS, byte_level, metaspace


class Words:
    """A tokenizer that is only its vocabulary."""

    all_special_tokens = ("<s>",)

    def __init__(self, **words: int) -> None:
        self.words = {"<s>": 0, **words}

    def get_vocab(self) -> dict[str, int]:
        return self.words


def test_docstring_example() -> None:
    target = Words(a=1)
    target.words["▁b"] = 2
    draft = Words(c=6)
    draft.words["Ġb"] = 5
    found = VocabularyMap(target, draft)
    assert found.to_target[5] == 2
    assert found.shared == 1
    assert found.to_target[6] == found.to_target[0] == -1


def test_letters_and_spaces_of_two_kinds_are_the_same() -> None:
    target, draft = byte_level(("ab",)), metaspace(("a",))
    found = VocabularyMap(target, draft)
    vocabulary = draft.get_vocab()
    for letter in LETTERS:
        assert found.to_target[vocabulary[letter]] == target.get_vocab()[letter]
    assert found.to_target[vocabulary["▁"]] == target.get_vocab()["Ġ"]
    assert found.to_target[vocabulary["▁a"]] == -1
    assert found.to_target[0] == -1, "special tokens mean different things"
    assert found.shared == len(LETTERS) + 1


def words(*tokens: str) -> Words:
    made = Words()
    made.words.update({token: number for number, token in enumerate(tokens, 1)})
    return made


def test_letters_beyond_ascii_are_shared_between_vocabularies_of_two_kinds() -> None:
    written = words("Ġcaf", "Ã©", "ä½łå¥½", "ä½", "Ċ", "Ġ")
    assert token_bytes(written)[1:] == [b" caf", "é".encode(), "你好".encode(), b"\xe4\xbd", b"\n", b" "]
    target = words("<0x0A>", "<0xE4>", "é", "你好", "\n", "▁caf", "<0xC3>")
    found = VocabularyMap(target, written)
    assert found.to_target.tolist() == [-1, 6, 3, 4, -1, 5, -1]
    assert found.shared == 4


def test_a_byte_and_the_character_written_out_are_one_text() -> None:
    target, draft = words("<0x41>", "A", "▁"), words("A", "<0x41>", "▁b", "▁")
    assert VocabularyMap(target, draft).to_target.tolist() == [-1, 2, -1, -1, 3]


def test_nothing_in_common_is_refused() -> None:
    with pytest.raises(TokenizerMismatchError, match="share none"):
        VocabularyMap(Words(a=1), Words(b=1))
