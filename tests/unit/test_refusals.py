"""Refusals of RetrievalDrafter, and their messages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.config import METHODS
from retrieval_draft.engine.probe import probe
from retrieval_draft.engine.target import Target
from retrieval_draft.errors import (
    InvalidInputError,
    ModelFileError,
    TokenizerMismatchError,
    UnknownMethodError,
    UnsupportedGenerationError,
    UnsupportedModelError,
)
from retrieval_draft.methods.registry import get_method
from tests.support.drafters import drafter_with, prompt_ids
from tests.support.models import make
from tests.support.sources import OracleSource

MODEL = make("llama")
PROMPT = prompt_ids()


def oracle(**options: Any) -> RetrievalDrafter:
    return drafter_with(MODEL, OracleSource((), wrong=0.1), **options)


def ids(*values: Any, dtype: torch.dtype = torch.long) -> torch.Tensor:
    return torch.tensor([list(values)], dtype=dtype)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (torch.zeros((1, 0), dtype=torch.long), {}, "empty"),
        (prompt_ids(513), {}, "513 tokens; the model allows 512"),
        (ids(3, 97), {}, "token id 97"),
        (ids(3, -1), {}, "token id -1"),
        (ids(1.0, 2.0, dtype=torch.float32), {}, "dtype"),
        (torch.tensor([1, 2]), {}, "shape"),
        ([[1, 2]], {}, "list"),
        (ids(1, 2), {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (ids(1, 2), {"attention_mask": ids(1, 0)}, "left padding"),
        (ids(1, 0, 2), {"pad_token_id": 0}, "pad token as text"),
        (ids(1, 2), {"attention_mask": ids(0, 0)}, "empty"),
        (ids(1, 2), {"attention_mask": ids(1)}, "shape"),
        (ids(1, 2), {"prediction": "text"}, "tokenizer"),
        (ids(1, 2), {"prediction": [5, 97]}, "reference"),
        (ids(1, 2), {"share": True}, "share is True"),
        (ids(1, 2), {"stop_strings": ["x"]}, "tokenizer"),
    ],
)
def test_bad_input_has_its_own_error(arguments: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        oracle().generate(arguments, **{"max_new_tokens": 3, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_beams": 2, "num_return_sequences": 2},
        {"dola_layers": "low"},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"output_attentions": True, "return_dict_in_generate": True},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"cache_implementation": "static"},
        {"cache_implementation": "quantized"},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": MODEL},
        {"past_key_values": object()},
        {"inputs_embeds": torch.zeros(1, 2, 32)},
    ],
)
def test_other_generation_modes_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedGenerationError):
        oracle().generate(PROMPT, max_new_tokens=3, **options)


def test_unknown_method_and_unsupported_parts() -> None:
    with pytest.raises(UnknownMethodError):
        RetrievalDrafter.for_model(MODEL, method="magic")
    with pytest.raises(InvalidInputError, match="store needs the model's tokenizer"):
        RetrievalDrafter.for_model(MODEL, store="redis://x")
    with pytest.raises(InvalidInputError, match="names a source twice"):
        DraftConfig(sources=("automaton", "history", "automaton"))


@pytest.mark.parametrize("window", [16, 256])
def test_windows_by_place_in_the_pass_are_seen_on_texts_beyond_them(window: int) -> None:
    with pytest.raises(UnsupportedModelError, match="for a tree than for its paths"):
        probe(Target(make("gpt-neo", attention="eager", window_size=window)))


@pytest.mark.parametrize("kept", [16, 256, 505])
def test_best_keys_of_a_text_with_equal_ones_are_seen(kept: int) -> None:
    model = make("doge", keep_window_size=kept, vocab_size=5000)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.A)  # zeros value all keys alike
    with pytest.raises(UnsupportedModelError, match="for a tree than for its paths"):
        probe(Target(model))


def test_a_window_that_no_text_can_leave_does_no_harm() -> None:
    probe(Target(make("doge", keep_window_size=512)))


def test_windows_by_place_in_the_pass_are_seen_in_half_precision() -> None:
    model = make("gpt-neo", attention="eager", window_size=256, vocab_size=512).to(torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match="for a tree than for its paths"):
        probe(Target(model))


def test_a_mask_of_the_models_own_for_so_many_places_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="mask of its own for 512 tokens"):
        probe(Target(make("gpt-neo", attention="eager", window_size=512)))


@pytest.mark.parametrize("given", ["small", [MODEL, "small"]])
def test_a_draft_model_of_no_known_name_is_refused(given: Any) -> None:
    with pytest.raises(ModelFileError, match="'small' was not found"):
        RetrievalDrafter.for_model(MODEL, draft_model=given)


@pytest.mark.parametrize("given", [3, (MODEL,), [MODEL, 3]])
def test_what_is_no_draft_model_is_refused(given: Any) -> None:
    with pytest.raises(InvalidInputError, match="Pass a model"):
        RetrievalDrafter.for_model(MODEL, draft_model=given)


def test_methods_that_need_a_draft_model_say_so() -> None:
    for method in ("opt_tree", "rasd", "cascade", "ouroboros"):
        with pytest.raises(InvalidInputError, match="Pass one as draft_model="):
            RetrievalDrafter.for_model(MODEL, method=method)


@pytest.mark.parametrize("given", [None, "self"])
@pytest.mark.parametrize("method", [name for name in METHODS if get_method(name).needs_head])
def test_methods_that_need_a_head_say_so(method: str, given: str | None) -> None:
    found = "SelfDraft" if given else "none"
    with pytest.raises(InvalidInputError, match=f"{method!r} drafts with a head .*has {found}.* hub name"):
        RetrievalDrafter.for_model(MODEL, method=method, draft_model=given)


def test_a_foreign_draft_model_needs_both_tokenizers() -> None:
    with pytest.raises(InvalidInputError, match="target's tokenizer"):
        RetrievalDrafter.for_model(MODEL, draft_model=(MODEL, object()))


def test_foreign_tokenizer_is_refused() -> None:
    class Tokenizer:
        bos_token_id = eos_token_id = None

        def __init__(self, size: int, eos: int | None = None) -> None:
            self.size, self.eos_token_id = size, eos

        def __len__(self) -> int:
            return self.size

    with pytest.raises(TokenizerMismatchError, match="98 ids"):
        RetrievalDrafter.for_model(MODEL, Tokenizer(98))
    model = make("llama", eos_token_id=5)
    with pytest.raises(TokenizerMismatchError, match="eos_token_id is 6"):
        RetrievalDrafter.for_model(model, Tokenizer(97, eos=6))
    RetrievalDrafter.for_model(model, Tokenizer(97, eos=5), method="none")


@pytest.mark.parametrize("name", ["mamba", "bloom", "flash"])
def test_models_that_cannot_verify_trees_are_no_target_for_them(name: str) -> None:
    if name == "mamba":
        model: Any = MambaForCausalLM(
            MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
        )
    elif name == "bloom":
        model = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2))
    else:
        model = make("llama")
        model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError):
        probe(Target(model))


def test_probe_finds_a_model_that_ignores_the_mask() -> None:
    model = make("llama")
    forward = model.model.forward
    model.model.forward = lambda *args, attention_mask=None, **kwargs: forward(*args, **kwargs)
    with pytest.raises(UnsupportedModelError, match="says something else"):
        probe(Target(model))
    assert RetrievalDrafter.for_model(model).verification.way == "chain"


@pytest.mark.parametrize("share", ["reply", "all"])
def test_sharing_needs_a_store(share: Any) -> None:
    with pytest.raises(InvalidInputError, match="needs a store"):
        oracle().generate(PROMPT, share=share, max_new_tokens=2)
    assert oracle().generate(PROMPT, share="none", max_new_tokens=2).shape[1] == PROMPT.shape[1] + 2


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        (torch.nn.DataParallel(MODEL), InvalidInputError, "model.module"),
        ("gpt2", InvalidInputError, "model is a str: 'gpt2'.*from_pretrained"),
        (MODEL.base_model, UnsupportedModelError, "cannot generate.*AutoModelForCausalLM"),
        (torch.nn.Linear(2, 2), UnsupportedModelError, "cannot generate"),
    ],
)
def test_what_is_no_model_says_so(model: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        RetrievalDrafter.for_model(model)


def test_seeds_are_integers_of_any_kind() -> None:
    options = {"do_sample": True, "max_new_tokens": 5}
    same = [oracle().generate(PROMPT, seed=seed, **options) for seed in (3, np.int64(3), [np.int32(3)])]
    assert all(torch.equal(one, same[0]) for one in same)
    for seed in (1.5, "3", [2.0]):
        with pytest.raises(InvalidInputError, match=r"seed is .* must be an integer"):
            oracle().generate(PROMPT, seed=seed, **options)


@pytest.mark.parametrize("given", [{"a": "b"}, 3, {1, 2}])
def test_references_are_texts_or_ids(given: Any) -> None:
    with pytest.raises(InvalidInputError, match="Pass text, token ids, or a list"):
        oracle().generate(PROMPT, max_new_tokens=3, documents=given)
