from typing import Any

import pytest
import torch

from retrieval_draft.bench.forward import SIZES, measure_forward
from retrieval_draft.errors import InvalidInputError
from tests.support.models import make


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return measure_forward([make("llama"), make("llama").bfloat16()], context=20, rounds=2)


def test_every_number_of_tokens_is_timed_stock_and_ours(results: list[dict[str, Any]]) -> None:
    assert [result["dtype"] for result in results] == ["float32", "bfloat16"]
    for result in results:
        for times in (result, result["stock"], result["limit"]):
            assert tuple(times["milliseconds"]) == SIZES
            assert all(value > 0 for value in times["milliseconds"].values())
        assert result["ratio"][1] == result["stock"]["ratio"][1] == 1
        assert result["kernels"]
        assert result["threads"] == torch.get_num_threads()
        assert (result["device"], result["context"]) == ("cpu", 20)


def test_the_limit_is_that_of_bytes_or_of_arithmetic(results: list[dict[str, Any]]) -> None:
    wide, half = results
    model = make("llama")
    embedding = model.get_input_embeddings().weight
    numbers = sum(p.numel() for p in model.parameters() if p.dim() > 1 and p is not embedding)
    assert wide["parameters"] == half["parameters"] == numbers
    assert wide["weight_bytes"] == 4 * numbers
    assert half["weight_bytes"] == 2 * numbers
    for result in results:
        read = result["weight_bytes"] / result["read_gb_per_second"] / 1e9
        for size, milliseconds in result["limit"]["milliseconds"].items():
            multiply = 2 * size * numbers / result["sgemm_gflop_per_second"] / 1e9
            assert milliseconds == pytest.approx(1000 * max(read, multiply))


def test_a_tied_embedding_counts_once_and_counts() -> None:
    model = make("llama", tie_word_embeddings=True)
    result = measure_forward([model], context=4, rounds=1)[0]
    assert result["parameters"] == sum(p.numel() for p in model.parameters() if p.dim() > 1)


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"context": 0}])
def test_nothing_to_measure_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InvalidInputError, match="at least 1"):
        measure_forward([make("llama")], **wrong)
