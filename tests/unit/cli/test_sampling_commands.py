"""Many samples from the command line, and the benches of batches, samples and draws, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from retrieval_draft.cli import main
from tests.support.tiny import TEXT, save_tiny

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    texts = [TEXT, TEXT[5:40], "a b a b a b", "1. one\n2. two\n"]
    path.write_text("".join(json.dumps({"prompt": text, "task": "t"}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            main(words)
        out, err = capsys.readouterr()
        return int(done.value.code or 0), out, err

    return run


def test_samples_are_printed_between_dashes_and_the_best_come_first(command: Command, tiny: str) -> None:
    words = ["generate", TEXT, "--model", tiny, "--max-new-tokens", "8", "--temperature", "1", "--seed", "3"]
    code, out, err = command(*words, "--samples", "3", "--stats")
    assert code == 0
    assert out.count("-" * 20) == 2
    assert "tokens per step" in err
    code, out, _ = command(*words, "--samples", "2", "--best-of", "5", "--json")
    said = json.loads(out)
    assert code == 0
    assert len(said["samples"]) == 2
    assert said["samples"][0]["mean_logprob"] >= said["samples"][1]["mean_logprob"]
    assert said["stats"]["requests"] == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "2"], "Greedy decoding has one text"),
        (["--samples", "3", "--best-of", "2", "--temperature", "1"], "best_of is 2"),
    ],
)
def test_samples_that_cannot_be(command: Command, tiny: str, words: list[str], message: str) -> None:
    code, out, err = command("generate", TEXT, "--model", tiny, "--max-new-tokens", "4", *words)
    assert code == 1
    assert out == ""
    assert message in err


def test_bench_batch(command: Command, tiny: str, prompts: str) -> None:
    words = ["bench", "batch", "--model", tiny, "--prompts", prompts, "--rows", "2", "--max-new-tokens", "12"]
    code, out, _ = command(*words, "--json")
    assert code == 0
    said = json.loads(out)
    assert said["batches"] == 2
    assert set(said["methods"]) == {"stock", "none", "calibrated"}
    for entry in said["methods"].values():
        assert entry["equal_to_stock_alone"] + entry["near_ties"] == 4
    assert said["methods"]["none"]["tokens_per_step"] == 1.0
    code, out, _ = command(*words, "--methods", "stock,calibrated")
    assert code == 0
    assert "calibrated" in out
    assert command(*words[:-4], "--rows", "9")[0] == 1


def test_bench_samples(command: Command, tiny: str, prompts: str) -> None:
    words = ["bench", "samples", "--model", tiny, "--prompts", prompts, "--samples", "3", "--limit", "2"]
    every = "alone,alone_without_noise,together,plain"
    code, out, _ = command(*words, "--max-new-tokens", "12", "--ways", every, "--json")
    assert code == 0
    said = json.loads(out)
    assert said["same_in_all_ways"] == said["samples"] == 6
    assert said["ways"]["plain"]["tokens_per_step"] == 1.0
    assert len({entry["tokens"] for entry in said["ways"].values()}) == 1
    assert command(*words, "--ways", "apart")[0] == 1
    assert "together" in command(*words, "--max-new-tokens", "4")[1]


def test_bench_draw(command: Command, tiny: str, prompts: str) -> None:
    words = ["bench", "draw", "--model", tiny, "--prompts", prompts, "--tokens", "8"]
    code, out, _ = command(*words, "--json")
    assert code == 0
    said = json.loads(out)
    assert all(taken > 0 for taken in said["draw_ms"].values())
    assert "share of a step" in command(*words)[1]
