"""Single tokens as text and bytes."""

from __future__ import annotations

from retrieval_draft.server.openai.token_text import TokenTexts
from tests.support.tiny import byte_tokenizer


def test_tokens_that_are_no_text_show_their_bytes() -> None:
    tokenizer = byte_tokenizer()
    texts = TokenTexts(tokenizer)
    letter, euro = tokenizer("a€", add_special_tokens=False)["input_ids"][:2]
    assert (texts.text(letter), texts.bytes(letter)) == ("a", [97])
    assert (texts.text(euro), texts.bytes(euro)) == ("bytes:\\xe2", [0xE2])
