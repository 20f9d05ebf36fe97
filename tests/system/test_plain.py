"""Models that verify no drafts: the text is that of model.generate, and one warning says why."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers

from retrieval_draft import RetrievalDrafter
from retrieval_draft.errors import InvalidInputError, UnsupportedGenerationError, UnsupportedModelError
from tests.support.chain_models import make_family
from tests.support.drafters import prompt_ids

OPTIONS = {"max_new_tokens": 12, "pad_token_id": 0}
_SHAPE = {
    "vocab_size": 97,
    "d_model": 16,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
_LAYERS = {
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}


def _t5() -> tuple[Any, dict[str, Any]]:
    config = transformers.T5Config(**_SHAPE, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config), {"input_ids": prompt_ids(9)}


def _bart() -> tuple[Any, dict[str, Any]]:
    config = transformers.BartConfig(**_SHAPE, **_LAYERS, forced_eos_token_id=None)
    return transformers.BartForConditionalGeneration(config), {"input_ids": prompt_ids(9)}


def _whisper() -> tuple[Any, dict[str, Any]]:
    config = transformers.WhisperConfig(
        **_SHAPE, **_LAYERS, max_source_positions=20, max_target_positions=40, num_mel_bins=8
    )
    torch.manual_seed(2)
    return transformers.WhisperForConditionalGeneration(config), {"input_features": torch.randn(1, 8, 40)}


def _mamba() -> tuple[Any, dict[str, Any]]:
    return make_family("mamba"), {"input_ids": prompt_ids(9)}


MODELS = {"t5": _t5, "bart": _bart, "whisper": _whisper, "mamba": _mamba}


def made(name: str) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.generation_config.eos_token_id = None
    return model.eval(), inputs


@pytest.mark.parametrize("name", MODELS)
def test_the_text_is_that_of_model_generate(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = made(name)
    with caplog.at_level(logging.WARNING, "retrieval_draft"):
        drafter = RetrievalDrafter.for_model(model)
        assert drafter.verification.way == "plain"
        for options in ({"do_sample": False}, {"num_beams": 2}, {"do_sample": True, "top_k": 5}):
            torch.manual_seed(3)
            wanted = model.generate(**inputs, **OPTIONS, **options)
            torch.manual_seed(3)
            ours = drafter.generate(**inputs, **OPTIONS, **options)
            assert torch.equal(ours, wanted)
    said = [record for record in caplog.records if "Nothing is drafted" in record.message]
    assert len(said) == 1
    assert drafter.verification.reason in said[0].message
    assert drafter.stats.requests >= 3
    with pytest.raises(UnsupportedModelError):
        RetrievalDrafter.for_model(model, strict=True)


def test_seeds_streamers_outputs_and_custom_loops() -> None:
    model, inputs = made("mamba")
    drafter = RetrievalDrafter.for_model(model)
    prompt = inputs["input_ids"]
    sampled = {"do_sample": True, "top_k": 0, **OPTIONS}
    state = torch.get_rng_state()
    first = drafter.generate(prompt, seed=5, **sampled)
    assert torch.equal(first, drafter.generate(prompt, seed=5, **sampled))
    assert not torch.equal(first, drafter.generate(prompt, seed=6, **sampled))
    assert torch.equal(torch.get_rng_state(), state), "a seed of ours is not torch's"
    wanted = model.generate(
        prompt, do_sample=False, return_dict_in_generate=True, output_scores=True, **OPTIONS
    )
    out = drafter.generate(
        prompt, do_sample=False, return_dict_in_generate=True, output_scores=True, **OPTIONS
    )
    assert torch.equal(torch.stack(out.scores), torch.stack(wanted.scores))
    looped = model.generate(prompt, do_sample=False, custom_generate=drafter, **OPTIONS)
    assert torch.equal(looped, wanted.sequences)
    model.generate = drafter.generate
    assert torch.equal(model.generate(prompt, do_sample=False, **OPTIONS), wanted.sequences)
    assert drafter.last_stats is not None
    assert drafter.last_stats.tokens == 12


def test_what_only_our_own_loop_has_is_refused_by_name() -> None:
    model, inputs = made("mamba")
    drafter = RetrievalDrafter.for_model(model)
    for name, value in (("best_of", 2), ("output_prompt_logits", True), ("sample", 1)):
        with pytest.raises(UnsupportedGenerationError, match=name):
            drafter.generate(**inputs, **OPTIONS, **{name: value})
    with pytest.raises(InvalidInputError, match="seed is"):
        drafter.generate(**inputs, **OPTIONS, do_sample=True, seed=[1, 2])
    with pytest.raises(UnsupportedModelError, match="running batch"):
        _ = drafter.continuous
