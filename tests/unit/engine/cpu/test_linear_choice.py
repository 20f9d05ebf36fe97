import json
from pathlib import Path

import pytest
import torch

from retrieval_draft.engine.cpu import linear_choice
from retrieval_draft.engine.cpu.linear_choice import SIZES, Choice, LinearChoices, shape_key
from retrieval_draft.engine.cpu.linear_kernels import KERNELS, Linear

WEIGHTS = [torch.randn(48, 32), torch.randn(48, 32), torch.randn(20, 64).bfloat16()]


@pytest.fixture
def measured(tmp_path: Path) -> LinearChoices:
    choices = LinearChoices(1, tmp_path)
    choices.measure(choices.missing(WEIGHTS))
    return choices


def test_each_shape_is_measured_once_and_remembered(measured: LinearChoices, tmp_path: Path) -> None:
    assert shape_key(WEIGHTS[0]) == "float32 48x32"
    assert set(measured.missing([torch.randn(3, 5)])) == {"float32 3x5"}
    again = LinearChoices(1, tmp_path)
    assert again.missing(WEIGHTS) == {}
    for weight in WEIGHTS:
        assert again.names(weight) == measured.names(weight)
        assert set(again.names(weight)) == set(SIZES)
        assert set(again.names(weight).values()) <= KERNELS.keys()


def test_the_file_is_of_a_number_of_threads(measured: LinearChoices, tmp_path: Path) -> None:
    assert LinearChoices(2, tmp_path).path != measured.path
    assert not LinearChoices(2, tmp_path).has(WEIGHTS[0])


def test_what_is_measured_later_joins_what_is_there(measured: LinearChoices, tmp_path: Path) -> None:
    other = LinearChoices(1, tmp_path)
    other.measure(other.missing([torch.randn(6, 7)]))
    assert LinearChoices(1, tmp_path).missing([*WEIGHTS, torch.randn(6, 7)]) == {}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format_version": 99}', '{"shapes": 3}', "null"])
def test_a_torn_file_costs_a_measurement(measured: LinearChoices, tmp_path: Path, text: str) -> None:
    measured.path.write_text(text)
    again = LinearChoices(1, tmp_path)
    assert not again.has(WEIGHTS[0])
    again.measure(again.missing(WEIGHTS))
    assert LinearChoices(1, tmp_path).missing(WEIGHTS) == {}


def test_an_unknown_kernel_and_another_machine_are_not_believed(
    measured: LinearChoices, tmp_path: Path
) -> None:
    kept = json.loads(measured.path.read_text())
    kept["shapes"]["float32 48x32"]["8"] = ["sorcery", "tiled", 0.0]
    measured.path.write_text(json.dumps(kept))
    assert set(LinearChoices(1, tmp_path).missing(WEIGHTS)) == {"float32 48x32"}
    kept["machine"]["processor"] = "z80"
    measured.path.write_text(json.dumps(kept))
    assert len(LinearChoices(1, tmp_path).missing(WEIGHTS)) == 2


def test_a_folder_that_cannot_be_written_costs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    choices = LinearChoices(1, tmp_path / "file" / "folder")
    choices.measure(choices.missing(WEIGHTS))
    assert choices.has(WEIGHTS[0])
    assert not choices.path.exists()


def test_out_of_time_the_rest_goes_to_our_kernel_and_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_choice, "MAX_SECONDS", 0.0)
    choices = LinearChoices(1, tmp_path)
    choices.measure(choices.missing(WEIGHTS))
    assert set(choices.names(WEIGHTS[0]).values()) == {"tiled"}
    assert not choices.path.exists()


def test_the_fastest_wins_and_the_first_among_equals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def taking(cost: dict[int, float]) -> object:
        def make(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
            def call(x: torch.Tensor) -> torch.Tensor:
                clock[0] += cost.get(len(x), 1.0)
                return x

            return call

        return make

    kernels = {
        "tiled": taking({8: 1.05, 16: 2.0, 32: 9.0}),
        "tokenwise": taking({8: 1.0, 16: 1.0, 32: 9.0}),
        "transposed": taking({8: 1.0, 16: 0.95, 32: 9.0}),
        "stock": taking({32: 1.0}),
    }
    monkeypatch.setattr(linear_choice, "KERNELS", kernels)
    monkeypatch.setattr(linear_choice, "MAX_SECONDS", 1e9)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    choices = LinearChoices(1, tmp_path)
    choices.measure(choices.missing(WEIGHTS[:1]))
    names = choices.names(WEIGHTS[0])
    assert (names[8], names[16], names[32]) == ("tiled", "tokenwise", "stock")
    # Kernels that were hopeless at 32 tokens were not tried at 64.
    assert names[64] == "stock"
    assert choices._choices[shape_key(WEIGHTS[0])][16] == Choice("tokenwise", "tokenwise", 0.0)
    assert choices._choices[shape_key(WEIGHTS[0])][32] == Choice("stock", "tiled", 8.0)
    assert choices._choices[shape_key(WEIGHTS[0])][64].loss == float("inf")


def test_numbers_of_tokens_in_between_go_by_the_next_larger(measured: LinearChoices) -> None:
    choices = dict.fromkeys(SIZES, Choice("stock", "tiled", 1e-5))
    choices |= {4: Choice("tiled", "tiled", 0.0), 16: Choice("transposed", "tokenwise", 2e-5)}
    measured._choices[shape_key(WEIGHTS[0])] = choices
    layers = measured.layers(WEIGHTS[0])
    assert len(layers) == SIZES[-1] + 1
    assert layers[3] is layers[4]
    assert layers[9] is layers[16]
    fastest = [layer for layer, _, _ in layers]
    assert fastest[5] is fastest[8] is fastest[17] is fastest[256]
    assert len({id(layer) for layer in fastest}) == 3
    assert layers[4][1] is layers[8][1] is fastest[4]
    assert layers[16][1:] == (layers[9][1], 2e-5)
