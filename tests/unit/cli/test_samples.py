"""Many samples from the command line, on a tiny model."""

from __future__ import annotations

import json

import pytest

from tests.support.commands import Command
from tests.support.tiny import TEXT


def test_samples_are_printed_between_dashes_and_the_best_come_first(command: Command, tiny: str) -> None:
    words = ["generate", TEXT, "--model", tiny, "--max-new-tokens", "8", "--temperature", "1", "--seed", "3"]
    code, out, err = command(*words, "--samples", "3", "--stats")
    assert code == 0
    assert out.count("-" * 20) == 2
    assert "tokens per step" in err
    code, out, _ = command(*words, "--samples", "2", "--best-of", "5", "--json")
    result = json.loads(out)
    assert code == 0
    assert len(result["samples"]) == 2
    assert result["samples"][0]["mean_logprob"] >= result["samples"][1]["mean_logprob"]
    assert result["stats"]["requests"] == 5


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
