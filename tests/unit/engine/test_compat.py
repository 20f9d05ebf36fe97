"""Differences between versions of transformers, pretended where another version has them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import cache_utils
from transformers.generation.utils import GenerateDecoderOnlyOutput

from retrieval_draft.engine import compat
from retrieval_draft.errors import UnsupportedEngineError
from tests.support.models import CACHE, CONFIGS, make


def test_an_older_transformers_is_told_which_to_install() -> None:
    old = SimpleNamespace(__version__="4.57.6", AttentionInterface=1, AttentionMaskInterface=1)
    with pytest.raises(UnsupportedEngineError, match=r"4\.57\.6 is installed.*5\.0 or newer.*pip install"):
        compat.require_parts(old)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_cache_goes_in_under_the_name_that_the_model_gives_it(name: str) -> None:
    model = make(name)
    assert compat.cache_parameter(model) == CACHE
    given = cache_utils.DynamicCache(config=model.config)
    model(torch.tensor([[1, 2, 3]]), use_cache=True, **{CACHE: given})
    assert given.get_seq_length() == 3


@pytest.mark.parametrize("name", compat.CACHE_NAMES)
def test_code_from_a_hub_may_keep_the_older_name(name: str) -> None:
    model: Any = SimpleNamespace(forward=eval(f"lambda input_ids, {name}=None: None"))  # noqa: S307 - a signature
    assert compat.cache_parameter(model) == name


def test_the_cache_is_found_under_either_name() -> None:
    cache = object()
    assert compat.given_cache({"cache": None, "past_key_values": cache}) is cache
    assert compat.given_cache({"cache": cache, "use_cache": True}) is cache
    assert compat.given_cache({}) is None


def test_a_dictionary_of_output_has_the_cache() -> None:
    output = GenerateDecoderOnlyOutput(sequences=torch.zeros(1, 1), **{CACHE: "kept"})
    assert output[compat.output_cache_name()] == "kept"


KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
PARTS: dict[str, Any] = {
    "before 5.17": None,
    "5.17": lambda text: (KINDS, {"sliding_window": 16}),
    "from 5.19 on": lambda text: (KINDS, [{"sliding_window": 16}, {}, {"sliding_window": 16}]),
}


@pytest.mark.parametrize("version", PARTS)
def test_layer_types_and_windows(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if PARTS[version] is None:
        monkeypatch.delattr(cache_utils, "get_layer_types_and_kwargs", raising=False)
    else:
        monkeypatch.setattr(cache_utils, "get_layer_types_and_kwargs", PARTS[version], raising=False)
    text = SimpleNamespace(layer_types=KINDS, sliding_window=16, num_hidden_layers=3)
    assert compat.layer_kinds(text) == [
        ("sliding_attention", 16), ("full_attention", None), ("sliding_attention", 16)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "kinds"),
    [
        ({}, ["full_attention"] * 3),
        ({"sliding_window": 8}, ["sliding_attention"] * 3),
        ({"attention_chunk_size": 8}, ["chunked_attention"] * 3),
        ({"num_kv_shared_layers": 1}, ["full_attention"] * 2),
        ({"num_kv_shared_layers": 0}, ["full_attention"] * 3),
    ],
)
def test_layer_types_that_a_configuration_leaves_open(
    given: dict[str, int], kinds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(cache_utils, "get_layer_types_and_kwargs", raising=False)
    found = compat.layer_kinds(SimpleNamespace(num_hidden_layers=3, **given))
    assert [kind for kind, _ in found] == kinds


def test_a_pass_is_told_as_a_number_or_as_positions() -> None:
    assert compat.query_length(5) == 5
    assert compat.query_length(torch.arange(7, 12)) == 5


def test_a_loop_sees_what_its_caller_gave() -> None:
    seen: list[Any] = []

    def loop(model: Any, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append((compat.callers_model_inputs(options), compat.hidden_arguments(), options))
        return input_ids

    model, streamer = make("llama"), SimpleNamespace(put=lambda _: None, end=lambda: None)
    given = cache_utils.DynamicCache(config=model.config)
    ids, mask = torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.long)
    for cache in (given, None):
        more = {} if cache is None else {CACHE: cache}
        model.generate(
            ids, attention_mask=mask, max_new_tokens=2, streamer=streamer, custom_generate=loop, **more
        )
        inputs, arguments, options = seen.pop()
        assert set(inputs) == {"attention_mask", *more}
        assert arguments["streamer"] is streamer
        assert (compat.given_cache(options) is given) == (cache is not None)
    assert compat.hidden_arguments() is None
    assert compat.callers_model_inputs({"pixel_values": 1}) == {"pixel_values": 1}
