"""Single tokens as text and bytes, for log probabilities."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

__all__ = ["TokenTexts"]

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """Texts and bytes of a vocabulary's tokens.

    Args:
        tokenizer: Any of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._pair = lru_cache(maxsize=65536)(self._find)
        self._before, self._known = _anchor(tokenizer)

    def text(self, token: int) -> str:
        r"""The token's text; bytes that are none as ``bytes:\xe4``."""
        return self._pair(token)[0]

    def bytes(self, token: int) -> list[int] | None:
        """Its bytes; None where they are not known."""
        return self._pair(token)[1]

    def _find(self, token: int) -> tuple[str, list[int] | None]:
        # After another token: decoders drop the space before the first word of a text.
        whole: str = self._tokenizer.decode([*self._before, token], clean_up_tokenization_spaces=False)
        text = whole[len(self._known) :]
        if "\ufffd" not in text:
            return text, list(text.encode("utf-8"))
        raw = _raw_bytes(self._tokenizer.convert_ids_to_tokens(token))
        if raw is None:
            return text, None
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), list(raw)


def _anchor(tokenizer: Any) -> tuple[list[int], str]:
    """A token and its text, to which those of others can be appended; none where there is no such token."""
    ids = list(tokenizer("a", add_special_tokens=False)["input_ids"])[-1:]
    one: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    two: str = tokenizer.decode([*ids, *ids], clean_up_tokenization_spaces=False)
    return (ids, one) if ids and "\ufffd" not in two and two.startswith(one) else ([], "")


def _raw_bytes(piece: str) -> bytes | None:
    """Bytes of a byte token, ``<0xE4>``, or of one in GPT-2's alphabet of printable bytes."""
    found = _BYTE.fullmatch(piece)
    if found:
        return bytes([int(found[1], 16)])
    alphabet = _alphabet()
    try:
        return bytes(alphabet[letter] for letter in piece)
    except KeyError:
        return None


@lru_cache(maxsize=1)
def _alphabet() -> dict[str, int]:
    """Byte by letter: printable bytes are themselves, the others are numbered from 256, in order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {chr(byte): byte for byte in plain}
    for number, byte in enumerate(byte for byte in range(256) if byte not in plain):
        letters[chr(256 + number)] = byte
    return letters
