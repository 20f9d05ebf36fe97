"""Grammars compiled for a tokenizer, the latest ones kept."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

from retrieval_draft.drafting.grammar.grammar import Grammar, import_llguidance
from retrieval_draft.drafting.grammar.grammar_text import GrammarText
from retrieval_draft.errors import InvalidInputError

__all__ = ["CompiledGrammar", "GrammarCompiler", "compiler_of"]

_KEPT = 32
_KEPT_CHARACTERS = 1 << 21
"""Limits of the compiled grammars that are kept: number, and characters of their sources."""

_MAX_MESSAGE = 300

_LIMITS = {
    "initial_lexer_fuel": 400_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_items_in_row": 500,
    "max_lexer_states": 16_384,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
"""Limits of llguidance: most grammars that reach none compile within 0.1 s, hold less than 30 MB, and follow
a token within 10 ms."""

_STACK = 1 << 28
"""Bytes of the stack of a compiling thread, of which only those in use exist. llguidance recurses into rules
and references, of which the longest grammar may have thousands in a row: 8 MB end the process."""


class CompiledGrammar:
    """A grammar compiled for a tokenizer, from which any number of replies start.

    Args:
        tokenizer: Of llguidance.
        source: The grammar, as llguidance reads it.

    Raises:
        InvalidInputError: The grammar is wrong, too large, or asks for what cannot be followed.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        self._tokenizer, self._source = tokenizer, source
        self._first = self._made()
        self.nbytes = len(source)
        error = self._first.get_error()
        if error:
            raise InvalidInputError(f"The grammar cannot be followed: {_shortened(error)}.")
        # The first mask may take the longest of all: here no batch waits for it, and all replies share it.
        self._first.compute_bitmask()
        error = self._first.get_error()
        if error:
            raise InvalidInputError(f"The grammar is too complex to follow: {_shortened(error)}.")

    def _made(self) -> Any:
        llguidance = import_llguidance()
        limits = llguidance.LLParserLimits(**_LIMITS)
        made: list[Any] = []

        def make() -> None:
            made.append(llguidance.LLMatcher(self._tokenizer, self._source, limits=limits, log_level=0))

        with _stack:
            before = threading.stack_size(_STACK)
            try:
                thread = threading.Thread(target=make, name="grammar")
                thread.start()
            finally:
                threading.stack_size(before)
        thread.join()
        return made[0]

    def open(self) -> GrammarText:
        """Starts a reply."""
        # Copies share the states that were met so far, up to a limit: one that meets it starts afresh.
        return GrammarText(self._first.deep_copy(), self._tokenizer, self._made)


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and keeps those used last. Safe for threads.

    Args:
        tokenizer: A fast tokenizer of transformers.
        eos: Tokens that end a reply.
        vocabulary: Number of logits; more than the tokenizer has ids, if the model's head is padded.

    Raises:
        InvalidInputError: The tokenizer is not of that kind, or no token ends a reply.
    """

    def __init__(self, tokenizer: Any, eos: Iterable[int], vocabulary: int) -> None:
        llguidance = import_llguidance()
        ends = sorted(set(eos))
        if not ends:
            raise InvalidInputError(
                "A grammar needs a token that ends the reply, and the model has none.", "Pass eos_token_id."
            )
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InvalidInputError(
                f"Grammars need a fast tokenizer; {type(tokenizer).__name__} is none.",
                "Load it with use_fast=True.",
            )
        if backend.padding is not None or backend.truncation is not None:
            backend = type(backend).from_str(backend.to_str())
            backend.no_padding()
            backend.no_truncation()
        size = max(vocabulary, backend.get_vocab_size(with_added_tokens=True))
        try:
            self._tokenizer = llguidance.LLTokenizer(backend.to_str(), n_vocab=size, eos_token=ends)
        except Exception as error:  # llguidance raises many types
            raise InvalidInputError(
                f"This tokenizer cannot follow a grammar: {_shortened(str(error))}."
            ) from error
        self._special: dict[str, int] = {token: backend.token_to_id(token) for token in _special(tokenizer)}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._names = (
            re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
        )
        self._kept: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """The compiled grammar.

        Raises:
            InvalidInputError: As `CompiledGrammar` does.
        """
        with self._lock:
            if grammar in self._kept:
                self._kept.move_to_end(grammar)
                return self._kept[grammar]
        made = CompiledGrammar(self._tokenizer, grammar.compiled_from(self._parts))
        with self._lock:
            self._kept[grammar] = made
            while len(self._kept) > _KEPT or self._nbytes() > _KEPT_CHARACTERS:
                self._kept.popitem(last=False)
        return made

    def _parts(self, text: str) -> list[str | int]:
        """A text, split into texts and ids of special tokens."""
        if self._names is None:
            return [text] if text else []
        return [self._special.get(part, part) for part in self._names.split(text) if part]

    def _nbytes(self) -> int:
        return sum(each.nbytes for each in self._kept.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the sources of the grammars that are kept."""
        with self._lock:
            return self._nbytes()


def _special(tokenizer: Any) -> list[str]:
    return [
        token.content for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if token.special
    ]


def _shortened(message: str) -> str:
    """The head of an error of llguidance, in one line."""
    line = " ".join(message.split())
    return (line if len(line) <= _MAX_MESSAGE else line[:_MAX_MESSAGE] + "...").rstrip(".")


_compilers: WeakKeyDictionary[Any, dict[tuple[tuple[int, ...], int], GrammarCompiler]] = WeakKeyDictionary()
_making, _stack = threading.Lock(), threading.Lock()


def compiler_of(tokenizer: Any, eos: Iterable[int], vocabulary: int) -> GrammarCompiler:
    """The compiler of a tokenizer, made once: that takes up to a second.

    Args:
        tokenizer: A fast tokenizer of transformers.
        eos: Tokens that end a reply.
        vocabulary: Number of logits.

    Raises:
        InvalidInputError: As `GrammarCompiler` does.
    """
    key = (tuple(sorted(set(eos))), vocabulary)
    with _making:
        made = _compilers.setdefault(tokenizer, {})
        if key not in made:
            made[key] = GrammarCompiler(tokenizer, *key)
        return made[key]
