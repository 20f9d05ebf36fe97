"""Text of replies: whole characters, and stop strings that straddle tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from tokenizers import decoders

from retrieval_draft.server.openai.detokenize import ReplyText, StopTexts, decoder
from tests.support.tiny import byte_tokenizer
from tests.support.tokenizers_for_tests import metaspace

LETTERS = "abcdEND"


def letters(tokens: Sequence[int]) -> str:
    return "".join(LETTERS[token] for token in tokens)


def tokens(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text]


def test_a_stop_string_over_several_tokens_is_held_back_and_cut() -> None:
    text = ReplyText(letters, (), ("END",))
    assert [text.push([token]) for token in tokens("aENaEND")] == ["a", "", "", "ENa", "", "", ""]
    assert text.stopped == "END"
    assert text.push(tokens("abc")) == ""
    assert text.finish() == ""
    assert text.text == "aENa"


def test_what_might_have_become_a_stop_string_comes_at_the_end() -> None:
    text = ReplyText(letters, (), ("END",))
    assert text.push(tokens("abEN")) == "ab"
    assert text.finish() == "EN"
    assert text.text == "abEN"
    assert text.stopped is None


def test_the_first_stop_string_in_the_text_wins_and_of_two_there_the_longer() -> None:
    text = ReplyText(letters, (), ("D", "EN", "b"))
    text.push(tokens("aEND"))
    assert (text.text, text.stopped) == ("a", "EN")
    # Both begin at one position, and the token that completes the longer one comes with the shorter.
    other = ReplyText(lambda ids: "".join("xEND"[:4] for _ in ids), (), ("E", "END"))
    other.push([0])
    assert (other.text, other.stopped) == ("x", "END")


@pytest.mark.parametrize("sizes", [(1,), (2, 1), (100,)])
def test_characters_of_several_bytes_come_whole(sizes: tuple[int, ...]) -> None:
    tokenizer = byte_tokenizer()
    whole = "naïve 猫が座った 🙂🇪🇺 ok"
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    text, pieces, position = ReplyText(decoder(tokenizer)), [], 0
    while position < len(ids):
        for size in sizes:
            pieces.append(text.push(ids[position : position + size]))
            position += size
    pieces.append(text.finish())
    assert "".join(pieces) == text.text == whole
    assert all("\ufffd" not in piece for piece in pieces)


def test_bytes_that_are_no_text_do_not_hold_the_rest_back() -> None:
    tokenizer = byte_tokenizer()
    broken = tokenizer.convert_tokens_to_ids(["Ģ"])  # 0x80, which begins no character
    good = tokenizer("fine", add_special_tokens=False)["input_ids"]
    text = ReplyText(decoder(tokenizer))
    text.push(broken * 40 + good)
    assert text.text.endswith("fine")
    assert text.text.count("\ufffd") == 40


def test_chunks_do_not_change_the_text() -> None:
    tokenizer = byte_tokenizer()
    draw = random.Random(0)
    for _ in range(30):
        ids = [draw.randrange(256) for _ in range(60)]
        one = ReplyText(decoder(tokenizer), (), ("a", "bc"))
        other = ReplyText(decoder(tokenizer), (), ("a", "bc"))
        one.push(ids)
        position = 0
        while position < len(ids):
            size = draw.randint(1, 9)
            other.push(ids[position : position + size])
            position += size
        one.finish()
        other.finish()
        assert (one.text, one.stopped) == (other.text, other.stopped)


def test_the_space_before_the_first_word_stays() -> None:
    tokenizer = metaspace(("a", "ab"))
    tokenizer.backend_tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")  # as Llama 2's
    ids = tokenizer("a ab", add_special_tokens=False)["input_ids"]
    assert decoder(tokenizer)(ids[1:]) == "ab"
    text = ReplyText(decoder(tokenizer), ids[:1])
    text.push(ids[1:])
    assert text.text == " ab"


def test_the_criterion_ends_at_the_token_that_completes_the_string() -> None:
    criterion = StopTexts(ReplyText(letters, (), ("END",)))
    ends = [bool(criterion(torch.tensor([[token]]), None)[0]) for token in tokens("aEND")]
    assert ends == [False, False, False, True]
