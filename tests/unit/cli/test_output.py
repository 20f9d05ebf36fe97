"""Tests of what all commands print and read alike."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from retrieval_draft.cli.common import text_of, text_of_stdin
from retrieval_draft.cli.output import print_json, print_table
from retrieval_draft.errors import InvalidInputError
from tests.support.tiny import byte_tokenizer

COLUMNS = ("task", "tokens per step", "tokens per second", "ratio to stock", "equal to model.generate")
ROWS = [
    ("summarisation of long documents", "3.141", "12,345.6", "2.72 (1.05..3.99)", "100 of 100"),
    ("code [bold]", "1.000", "1.0", "1.00 (1.00..1.00)", "99 of 100"),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [20, 40, 80, 120, 200])
@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_nothing_in_a_table_is_cut(monkeypatch, width: int, stream: type[io.StringIO]) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    out = stream()
    print_table("What was measured, and of what, on a long line", COLUMNS, ROWS, out)
    printed = re.sub("\x1b\\[[0-9;]*m", "", out.getvalue())
    assert "…" not in printed
    for word in (*COLUMNS, *ROWS[0], *ROWS[1], "What was measured, and of what, on a long line"):
        assert any(word in line for line in printed.splitlines()), word
    if stream is Terminal and width < 200:
        # No line is wider than a heading and a value, so a terminal breaks no table in its middle.
        assert max(map(len, printed.splitlines())) <= max(width, 46)


def test_a_narrow_table_is_a_table_everywhere(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    for stream in (Terminal(), io.StringIO()):
        print_table("", ("what", "value"), [("tokens", "5")], stream)
        assert len(stream.getvalue().splitlines()) == 5


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252", "koi8-r"])
def test_json_is_json_in_every_encoding(monkeypatch, encoding: str) -> None:
    value = {"text": "na\u00efve \u6f22 \U0001f388", "path": "caf\udce9"}
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", out)
    print_json(value)
    out.flush()
    assert json.loads(out.buffer.getvalue().decode(encoding)) == value


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_commands_where_the_terminal_is_not_utf_8(tmp_path: Path, encoding: str) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text(
        "na\u00efve caf\u00e9 \u6f22\u5b57 the cat sat\n" * 9, encoding="utf-8"
    )

    def run(*words: str | bytes, given: bytes = b"") -> tuple[int, bytes, bytes]:
        environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-m", "retrieval_draft.cli", "index", *words],
            input=given, capture_output=True, check=False, env=environment,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    index = str(tmp_path / "index")
    tokenizer = str(tmp_path / "tokenizer" / "tokenizer.json")
    path = tmp_path / "text.txt"
    code, out, err = run("build", str(path), "--tokenizer", tokenizer, "--out", index)
    assert code == 0, err
    for words in (("query", "na\u00efve caf\u00e9 \u6f22"), ("inspect",)):
        where = ("--index", index) if words[0] == "query" else (index,)
        for more in ((), ("--json",)):
            code, out, err = run(*words, *where, *more)
            assert code == 0, err
            assert out
            if more:
                json.loads(out.decode(encoding))
    code, out, err = run("query", b"caf\xe9", "--index", index)
    assert code == 1
    assert b"UTF-8" in err
    assert b"unexpected" not in err
    # Text indexed from stdin is UTF-8 on any terminal.
    given = "\u6f22\u5b57\n".encode()
    code, out, err = run("build", "-", "--tokenizer", tokenizer, "--out", index + "2", "--json", given=given)
    assert json.loads(out)["tokens"] == len(given)


def test_texts_of_the_command_line() -> None:
    assert text_of("na\u00efve \u6f22") == "na\u00efve \u6f22"
    assert text_of(os.fsdecode("na\u00efve".encode())) == "na\u00efve"
    assert text_of("na\udcc3\udcafve") == "na\u00efve"  # UTF-8 in a locale of ASCII
    with pytest.raises(InvalidInputError, match="UTF-8"):
        text_of("caf\udce9")
    with pytest.raises(InvalidInputError, match="UTF-8"):
        text_of("half a pair \ud83d")


@pytest.mark.parametrize(
    ("content", "encoding", "expected"),
    [
        (b"caf\xc3\xa9", "utf-8", "caf\u00e9"),
        (b"caf\xe9", "cp1252", "caf\u00e9"),
        (b"caf\xc3\xa9", "ascii", "caf\u00e9"),
        (b"caf\xe9", "ascii", None),
        (b"caf\xe9", "utf-8", None),
    ],
)
def test_text_of_stdin(monkeypatch, content: bytes, encoding: str, expected: str | None) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding=encoding))
    if expected is None:
        with pytest.raises(InvalidInputError, match="PYTHONIOENCODING"):
            text_of_stdin()
    else:
        assert text_of_stdin() == expected


@pytest.mark.parametrize("words", [["generate", "x"], ["serve"], ["bench", "forward"]])
def test_an_unknown_model_is_told_before_anything_large_is_imported(words: list[str]) -> None:
    program = (
        "import sys\n"
        "from retrieval_draft.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    print('torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words, "--model", "nobody/no-such-model"],
        capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert "HF_HUB_OFFLINE is set" in done.stderr
    assert (done.returncode, done.stdout) == (1, "False\n")
