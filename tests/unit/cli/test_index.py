"""Tests of ``retrieval-draft index`` and of the commands that draft from what it builds."""

import json
from pathlib import Path

import pytest

from retrieval_draft.cli import main
from tests.support.tiny import TEXT, byte_tokenizer, save_tiny


@pytest.fixture
def run(capsys):
    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(words)
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def tokenizer(tmp_path) -> str:
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer" / "tokenizer.json")


@pytest.fixture
def built(run, tmp_path, tokenizer) -> Path:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text(TEXT)
    (tmp_path / "corpus" / "b.bin").write_bytes(b"\0\1")
    out = tmp_path / "index"
    code, _, error = run(
        "index", "build", str(tmp_path / "corpus"), "--tokenizer", tokenizer, "--out", str(out)
    )
    assert code == 0, error
    return out


def test_build_says_what_it_did(run, tmp_path, tokenizer) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.bin").write_bytes(b"\0\1")
    words = ("index", "build", str(tmp_path / "a.txt"), str(tmp_path / "b.bin"), "--tokenizer", tokenizer)
    code, out, _ = run(*words, "--out", str(tmp_path / "index"), "--workers", "1", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["tokens"] == len(TEXT)
    assert found["documents"] == 1
    assert found["skipped_why"] == {"binary": 1}
    code, _, error = run(*words, "--out", str(tmp_path / "index"))
    assert code == 1
    assert "index add" in error
    code, out, _ = run(*words, "--out", str(tmp_path / "index"), "--overwrite")
    assert code == 0
    assert "1 binary" in out


def test_add_and_merge(run, tmp_path, tokenizer, built) -> None:
    (tmp_path / "more.txt").write_text("more of it")
    code, out, _ = run("index", "add", str(tmp_path / "more.txt"), "--out", str(built), "--json")
    assert code == 0
    assert json.loads(out)["documents"] == 2
    words = ("index", "build", str(tmp_path / "more.txt"), "--tokenizer", tokenizer, "--out")
    assert run(*words, str(tmp_path / "other"))[0] == 0
    code, out, _ = run(
        "index", "merge", str(built), str(tmp_path / "other"), "--out", str(tmp_path / "all"), "--json"
    )
    assert code == 0
    assert json.loads(out)["documents"] == 3
    code, _, error = run("index", "merge", str(built), str(built))
    assert code == 1
    assert "twice" in error
    assert run("index", "merge", str(built), str(built), "--out", str(tmp_path / "new"))[0] == 1
    assert not (tmp_path / "new").exists()


def test_inspect_and_its_picture(run, tmp_path, built) -> None:
    code, out, _ = run("index", "inspect", str(built), "--plot", str(tmp_path / "p.png"), "--json")
    found = json.loads(out)
    assert code == 0
    assert found["tokens"] == len(TEXT)
    assert found["median_match"] > 2
    assert not found["unfinished"]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = run("index", "inspect", str(built))
    assert "bytes_per_token" in out
    code, _, error = run("index", "inspect", str(built), "--plot", str(tmp_path / "p.nothing"))
    assert code == 1
    assert ".png or .svg" in error


def test_verify(run, built) -> None:
    assert run("index", "verify", str(built))[0] == 0
    path = next(built.glob("segment-*/tokens.npy"))
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(bytes(content))
    code, out, _ = run("index", "verify", str(built), "--json")
    assert code == 3
    assert "altered" in json.loads(out)["wrong"][0]


def test_query(run, built) -> None:
    code, out, _ = run("index", "query", "the cat sat on the d", "--index", str(built), "--json")
    found = json.loads(out)
    assert code == 0
    assert "".join(found["pieces"][:2]) == "og"
    assert found["matches"][-1]["text"] == "the cat sat on the d"
    code, out, _ = run("index", "query", "the cat", "--index", str(built))
    assert "' '" in out
    code, out, _ = run("index", "query", "ÄÖÜ", "--index", str(built))
    assert "Nothing to draft" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("inspect", "{}/none"), "There is no index"),
        (("verify", "{}"), "There is no index"),
        (("query", "x", "--index", "{}/none"), "There is no index"),
        (("add", "x", "--out", "{}/none"), "There is no index"),
        (("build", "{}/none", "--tokenizer", "{}/tokenizer/tokenizer.json", "--out", "{}/i"), "There is no"),
        (("build", "{}", "--tokenizer", "{}/tokenizer/tokenizer_config.json", "--out", "{}/i"), "tokenizer"),
    ],
)
def test_mistakes_are_told(run, tmp_path, tokenizer, words, message: str) -> None:
    code, out, error = run("index", *(word.format(tmp_path) for word in words))
    assert code == 1
    assert message in error
    assert "hint:" in error
    assert out == ""
    assert not (tmp_path / "i").exists(), "a refused command leaves no index"


def test_usage(run, tmp_path, tokenizer, built) -> None:
    assert run("index")[0] == 0
    assert run("index", "build")[0] == 2
    code, _, error = run("index", "add", str(tmp_path / "corpus"), "--out", str(built), "--executor", "dask")
    assert code == 1
    assert "Unknown executor" in error
    words = ("index", "build", str(tmp_path / "corpus"), "--tokenizer", tokenizer, "--executor", "dask")
    assert run(*words, "--out", str(tmp_path / "i"))[0] == 1
    assert not (tmp_path / "i").exists()


def test_generating_with_an_index_phrases_and_a_history(run, tmp_path) -> None:
    folder = str(save_tiny(tmp_path / "model"))
    (tmp_path / "a.txt").write_text(TEXT * 3)
    (tmp_path / "phrases.txt").write_text("the cat sat on the mat\n")
    assert (
        run("index", "build", str(tmp_path / "a.txt"), "--tokenizer", folder, "--out", str(tmp_path / "i"))[0]
        == 0
    )
    words = [
        "generate",
        "the cat sat",
        "--model",
        folder,
        "--max-new-tokens",
        "24",
        "--nodes",
        "16",
        "--json",
    ]
    plain = json.loads(run(*words, "--method", "none")[1])
    words += ["--index", str(tmp_path / "i"), "--phrases", str(tmp_path / "phrases.txt")]
    words += ["--history", str(tmp_path / "h")]
    drafted = []
    for _ in range(2):
        code, out, error = run(*words)
        assert code == 0, error
        found = json.loads(out)
        assert found["text"] == plain["text"]
        drafted.append(found["stats"]["drafted_by_source"])
    assert "history" not in drafted[0]
    assert "history" in drafted[1]
    assert found["stats"]["accepted_by_level"]["history"] > 0  # the first run's reply, from the folder
    assert run("index", "verify", str(tmp_path / "h"))[0] == 0


def test_an_index_of_another_tokenizer(run, tmp_path, built) -> None:
    folder = save_tiny(tmp_path / "model")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    code, _, error = run("generate", "x", "--model", str(folder), "--index", str(built))
    assert code == 1
    assert "fingerprint" in error
