"""Compilation: errors with their reason, limits that hold, and the grammars that are kept."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import weakref
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from retrieval_draft import Grammar
from retrieval_draft.drafting.grammar import compiler
from retrieval_draft.drafting.grammar.compiler import CompiledGrammar, GrammarCompiler, compiler_of
from retrieval_draft.errors import InvalidInputError
from tests.support.grammars import json_tokenizer


def made() -> GrammarCompiler:
    tokenizer = json_tokenizer()
    return compiler_of(tokenizer, [tokenizer.eos_token_id], len(tokenizer))


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar.json_schema({"type": "foo"}), "Invalid type: foo"),
        (Grammar.json_schema({"not": {}}), 'Unimplemented keys: \\["not"\\]'),
        (Grammar.json_schema({"$ref": "http://127.0.0.1/a"}), "does not fetch"),
        (Grammar.json_schema({"$ref": "file:///etc/passwd"}), "does not fetch"),
        (Grammar.json_schema({"enum": []}), "Unsatisfiable"),
        (Grammar.json_schema({"type": "string", "pattern": "["}), "regex parse error"),
        (Grammar.regex("(?=a)b"), "look-around"),
        (Grammar.rules("start: x"), "unknown name"),
        (Grammar.rules("start: " + "(" * 5000 + '"a"' + ")" * 5000), "nested"),
    ],
    ids=lambda given: given[:20] if isinstance(given, str) else given.kind,
)
def test_what_cannot_be_followed_is_refused_with_the_reason(grammar: Grammar, reason: str) -> None:
    with pytest.raises(InvalidInputError, match=reason) as error:
        made().compile(grammar)
    assert len(error.value.message) < 400


def test_keywords_are_ignored_only_where_that_is_wanted() -> None:
    made().compile(Grammar.json_schema({"type": "array", "uniqueItems": True}, strict=False))


RECURSION = """
from retrieval_draft.drafting.grammar.compiler import CompiledGrammar
from retrieval_draft import Grammar
import json, llguidance
count = 4500
names = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(count)}
schema = {"$ref": "#/$defs/d0", "$defs": names | {f"d{count}": {"type": "string"}}}
rules = "start: r0\\n" + "\\n".join(f"r{i}: r{i + 1}" for i in range(1900)) + '\\nr1900: "a"'
for grammar in (Grammar.json_schema(schema), Grammar.rules(rules)):
    text = CompiledGrammar(llguidance.LLTokenizer("byte"), grammar.compiled_from(lambda text: [text])).open()
    print(text.mask() is not None)
"""


def test_long_chains_of_references_do_not_end_the_process() -> None:
    """They overflow a stack of the usual size, which no handler survives."""
    done = subprocess.run([sys.executable, "-c", RECURSION], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["True", "True"]), done.stderr


def test_the_latest_ones_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = json_tokenizer()
    ours = GrammarCompiler(tokenizer, [0], len(tokenizer))
    compiled: list[str] = []

    class Counted(CompiledGrammar):
        def __init__(self, given: Any, source: str) -> None:
            compiled.append(source)
            super().__init__(given, source)

    monkeypatch.setattr(compiler, "CompiledGrammar", Counted)
    first = Grammar.choice(["first"])
    assert ours.compile(first) is ours.compile(first)
    for number in range(31):
        ours.compile(Grammar.choice([f"text {number}"]))
    ours.compile(first)
    assert len(compiled) == 32, "used again, so not the oldest"
    ours.compile(Grammar.choice(["one more"]))
    ours.compile(first)
    assert len(compiled) == 33
    for number in range(30):
        ours.compile(Grammar.choice([f"{number}" + "a" * 100_000]))
        assert ours.nbytes <= 1 << 21
    with pytest.raises(InvalidInputError):
        ours.compile(Grammar.rules("start: x"))


def test_one_reply_does_not_move_another() -> None:
    compiled = made().compile(Grammar.json_schema({"type": "string"}))
    one, other = compiled.open(), compiled.open()
    before = other.mask()
    one.follow(np.array(json_tokenizer().encode('"abc'), np.int32))
    after = other.mask()
    assert before is not None
    assert after is not None
    assert before.tolist() == after.tolist()


def test_threads_compile_and_follow_at_once() -> None:
    tokenizer = json_tokenizer()
    text = json.dumps({"a": ["x", 1, None]})
    ids = np.array([*tokenizer.encode(text), tokenizer.eos_token_id], np.int32)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for each in range(20):
                reply = made().compile(Grammar.json_schema({"title": f"{(number + each) % 7}"})).open()
                for end in range(len(ids) + 1):
                    reply.follow(ids[:end])
                    reply.mask()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_tokenizer_takes_its_compilers_with_it() -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=json_tokenizer().backend_tokenizer, eos_token="<eos>"
    )
    seen = weakref.ref(compiler_of(tokenizer, [0], 400))
    assert compiler_of(tokenizer, [0], 400) is seen()
    assert compiler_of(tokenizer, [0, 1], 400) is not seen()
    del tokenizer
    gc.collect()
    assert seen() is None


def test_what_has_no_end_or_no_bytes_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="ends the reply"):
        compiler_of(json_tokenizer(), [], 400)
    with pytest.raises(InvalidInputError, match="fast tokenizer"):
        GrammarCompiler(object(), [0], 400)
