from __future__ import annotations

import pytest

from retrieval_draft.engine.draft_models.vocabulary import VocabularyMap
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
    assert found.allowed(20).sum() == found.shared == len(LETTERS) + 1


def test_nothing_in_common_is_refused() -> None:
    with pytest.raises(TokenizerMismatchError, match="share none"):
        VocabularyMap(Words(a=1), Words(b=1))
