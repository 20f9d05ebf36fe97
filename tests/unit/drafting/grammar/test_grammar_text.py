"""A reply under a grammar: masks, forced tokens, looks ahead, and limits."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from retrieval_draft import Grammar
from retrieval_draft.drafting.grammar import grammar_text
from retrieval_draft.drafting.grammar.compiler import compiler_of
from retrieval_draft.drafting.grammar.grammar_text import GrammarText
from retrieval_draft.errors import InvalidInputError
from tests.support.grammars import SHAPES, json_tokenizer

TOKENIZER = json_tokenizer()
EOS = TOKENIZER.eos_token_id


def text_of(grammar: Grammar) -> GrammarText:
    return compiler_of(TOKENIZER, [EOS], len(TOKENIZER)).compile(grammar).open()


def follow(text: GrammarText, reply: list[int]) -> GrammarText:
    text.follow(np.array(reply, np.int32))
    return text


def allowed(text: GrammarText) -> list[int]:
    bits = text.mask()
    assert bits is not None
    return np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()


@pytest.mark.parametrize("shape", list(SHAPES))
def test_looks_ahead_change_nothing_and_agree_with_masks(shape: str) -> None:
    """A twin that never looks ahead has the same masks; a certain token is the only one allowed."""
    draw = random.Random(shape)
    for _ in range(3):
        looking, twin = text_of(SHAPES[shape]), text_of(SHAPES[shape])
        reply: list[int] = []
        while len(reply) < 60 and EOS not in reply:
            follow(looking, reply)
            certain = looking.certain()
            entered = 0
            for token in [*certain, *looking.likely(), draw.randrange(len(TOKENIZER))]:
                if not looking.enter(token):
                    break
                entered += 1
            looking.go_back(entered)
            choices = allowed(follow(twin, reply))
            assert allowed(looking) == choices
            if certain:
                assert choices == certain[:1]
            else:
                sample = draw.sample(range(1, len(TOKENIZER)), 60)
                for token in sample:
                    enters = looking.enter(token)
                    assert enters == (token in choices)
                    looking.go_back(int(enters))
            reply.append(draw.choice(choices))


def test_text_is_forced_from_the_first_token_on_and_open_at_its_border() -> None:
    text = text_of(Grammar.json_schema({"type": "object", "properties": {"user": {"type": "string"}},
                                        "required": ["user"], "additionalProperties": False}))  # fmt: skip
    certain = text.certain()
    decoded = TOKENIZER.decode(certain)
    assert decoded
    assert '{"user": "'.startswith(decoded)
    follow(text, certain)
    rest = '{"user": "'[len(decoded) :]
    likely = TOKENIZER.decode(text.likely())
    assert likely == rest or not rest
    assert len(allowed(text)) > 1, "pieces of the border may merge with the text after it"


def test_a_reply_ends_with_a_token_of_the_end_and_not_before() -> None:
    text = text_of(Grammar.choice(["yes"]))
    assert EOS not in allowed(text)
    reply = TOKENIZER.encode("yes")
    assert allowed(follow(text, reply)) == [EOS]
    assert text.certain() == [], "an end is no draft: nothing comes after it"
    assert not text.enter(EOS)
    follow(text, [*reply, EOS])
    assert text.mask() is None
    assert text.likely() == []
    assert not text.can_look_ahead
    follow(text, [*reply, EOS, 5, 6])  # padding


def test_a_token_against_the_grammar_is_an_error() -> None:
    text = text_of(Grammar.choice(["yes"]))
    with pytest.raises(InvalidInputError, match="breaks the grammar"):
        follow(text, TOKENIZER.encode("no"))


class Limited:
    """A matcher that met a limit of the states that it shares with others."""

    def is_error(self) -> bool:
        return True

    def get_error(self) -> str:
        return "too many\nstates"

    def try_consume_tokens(self, tokens: list[int]) -> int:
        return 0

    def compute_bitmask(self) -> bytes:
        return b""


def limited(again: Any) -> GrammarText:
    fresh = text_of(Grammar.choice(["yes"]))
    return GrammarText(Limited(), fresh._tokenizer, again)


def test_a_limit_that_others_used_up_is_no_error() -> None:
    fresh = text_of(Grammar.choice(["yes"]))
    text = limited(lambda: fresh._again())
    assert allowed(text) == allowed(fresh)
    reply = TOKENIZER.encode("ye")
    text = limited(lambda: fresh._again())
    assert allowed(follow(text, reply)) == allowed(follow(fresh, reply))


def test_a_limit_of_its_own_is_an_error() -> None:
    with pytest.raises(InvalidInputError, match="too complex to follow: too many states"):
        limited(Limited).mask()
    with pytest.raises(InvalidInputError, match="too complex"):
        follow(limited(Limited), [5])


def test_a_grammar_that_holds_up_others_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_text, "_PATIENCE", 0.0)
    monkeypatch.setattr(grammar_text, "_PATIENCE_FOR_TOKEN", 0.0)
    with pytest.raises(InvalidInputError, match="less ambiguous"):
        text_of(Grammar.choice(["yes"])).mask()


CHOICES: dict[str, list[str]] = {
    "beginnings": ["cat", "catalog", "cats"],
    "nothing": ["", "a"],
    "nothing else": [""],
    "twice": ["a", "a"],
    "letters": ['"|\n\\"', "é", "日本", "日"],
    "many": [str(number) for number in range(700)],
}


@pytest.mark.parametrize("name", CHOICES)
def test_replies_of_a_choice_are_its_texts_and_no_others(name: str) -> None:
    """All paths of tokens that the masks allow; of many texts those that begin with 69."""
    texts, begin = CHOICES[name], "69" if name == "many" else ""
    ended, paths = set[str](), [TOKENIZER(begin, add_special_tokens=False)["input_ids"]]
    while paths:
        reply = paths.pop()
        for token in allowed(follow(text_of(Grammar.choice(texts)), reply)):
            if token == EOS:
                ended.add(TOKENIZER.decode(reply))
            else:
                paths.append([*reply, token])
    assert ended == {text for text in texts if text.startswith(begin)}
