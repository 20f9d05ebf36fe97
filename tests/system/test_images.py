"""Image-text models: text with images, drafted, is that of `model.generate`."""

from __future__ import annotations

import functools
import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.errors import InvalidInputError, UnsupportedGenerationError
from tests.support.image_models import (
    CLASSES,
    IMAGE,
    MARKS,
    image_inputs,
    image_prompt,
    make_image_model,
)
from tests.support.models import CACHE, VOCABULARY

NAMES = list(CLASSES)
FEW = {"internvl", "smolvlm", "qwen3_vl"}
"""Close kin of others, tried on fewer seeds; `python -m benchmarks models --vision --seeds 24` tries more."""
NEW = 24


@functools.cache
def model_of(name: str) -> Any:
    return make_image_model(name)


@functools.cache
def drafter_of(name: str, method: str = "calibrated") -> RetrievalDrafter:
    return RetrievalDrafter.for_model(model_of(name), config=DraftConfig(nodes=12, method=method))


def nearly(reply: Tensor, seed: int = 0, every: int = 5) -> Tensor:
    """A reply, (length,), with a share of its tokens wrong."""
    made = torch.Generator().manual_seed(seed)
    wrong = torch.randint(3, 90, reply.shape, generator=made)
    return torch.where(torch.rand(reply.shape, generator=made) < 1 / every, wrong, reply)


def planted(stock: Tensor, prompt: Tensor, seed: int = 0) -> list[Tensor]:
    """Two nearly right copies of the first reply, so that trees are long and branch."""
    reply = stock[0, prompt.shape[1] :]
    return [nearly(reply, seed), nearly(reply, seed + 100)]


def prompt_of(name: str, seed: int = 0, **options: Any) -> dict[str, Tensor]:
    return image_prompt(name, model_of(name), seed=seed, **options)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_text_after_an_image_is_that_of_the_model(name: str) -> None:
    model, drafter = model_of(name), drafter_of(name)
    drafter.reset_stats()
    for seed in range(2 if name in FEW else 6):
        inputs = prompt_of(name, seed, lengths=(12 + seed,), images=1 + seed % 2)
        stock = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        drafted = drafter.generate(
            **inputs, max_new_tokens=NEW, do_sample=False, documents=planted(stock, inputs["input_ids"], seed)
        )
        assert torch.equal(drafted, stock)
    assert drafter.stats.accepted > 0.4 * drafter.stats.tokens


@pytest.mark.parametrize("name", NAMES)
def test_the_image_matters(name: str) -> None:
    """Otherwise nothing here says anything about images."""
    inputs = prompt_of(name)
    other = {**inputs, **image_inputs(name, [1], 7)}
    texts = [
        model_of(name).generate(**given, max_new_tokens=NEW, do_sample=False) for given in (inputs, other)
    ]
    assert not torch.equal(*texts)


@pytest.mark.parametrize("name", NAMES)
def test_seeded_text_after_an_image_needs_no_drafts_to_be_the_same(name: str) -> None:
    plain, drafter = drafter_of(name, "none"), drafter_of(name)
    for seed in range(2):
        inputs = prompt_of(name, seed)
        options = {"max_new_tokens": NEW, "do_sample": True, "temperature": 0.7, "top_k": 40, "seed": seed}
        wanted = plain.generate(**inputs, **options)
        drafted = drafter.generate(**inputs, **options, documents=planted(wanted, inputs["input_ids"], seed))
        assert torch.equal(drafted, wanted)
        assert drafter.last_stats is not None
        assert drafter.last_stats.accepted > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_ragged_prompts_with_images(name: str) -> None:
    model, drafter = model_of(name), drafter_of(name)
    inputs = prompt_of(name, 3, lengths=(21, 9, 15))
    stock = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    drafted = drafter.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, documents=planted(stock, inputs["input_ids"])
    )
    assert torch.equal(drafted, stock)


@pytest.mark.parametrize("name", ["gemma3", "llava", "qwen2_5_vl"])
def test_custom_generate_several_sequences_and_scores(name: str) -> None:
    model, drafter = model_of(name), drafter_of(name)
    inputs = prompt_of(name, 4)
    options = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}
    stock = model.generate(**inputs, **options, do_sample=False)
    drafted = model.generate(
        **inputs,
        **options,
        do_sample=False,
        custom_generate=drafter.custom_generate,
        draft_documents=planted(stock.sequences, inputs["input_ids"]),
    )
    assert torch.equal(drafted.sequences, stock.sequences)
    torch.testing.assert_close(torch.stack(drafted.logits), torch.stack(stock.logits), atol=1e-3, rtol=1e-3)
    several = {"num_return_sequences": 3, "do_sample": True, "seed": 5, "max_new_tokens": NEW}
    wanted = drafter_of(name, "none").generate(**inputs, **several)
    assert torch.equal(drafter.generate(**inputs, **several, documents=list(wanted)), wanted)
    assert len({tuple(row) for row in wanted.tolist()}) == 3


class Collects:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.put_tokens: list[int] = []
        self.ends = 0

    def put(self, tokens: Tensor) -> None:
        self.put_tokens += tokens.reshape(-1).tolist()

    def end(self) -> None:
        self.ends += 1


@pytest.mark.parametrize("custom", [False, True], ids=["drafter", "custom_generate"])
def test_streamers_get_the_prompt_once_and_each_token(custom: bool) -> None:
    model, drafter, streamer = model_of("qwen2_5_vl"), drafter_of("qwen2_5_vl"), Collects()
    inputs: dict[str, Any] = {**prompt_of("qwen2_5_vl", 5), "max_new_tokens": NEW, "do_sample": False}
    if custom:
        out = model.generate(**inputs, streamer=streamer, custom_generate=drafter.custom_generate)
    else:
        out = drafter.generate(**inputs, streamer=streamer)
    assert streamer.put_tokens == out[0].tolist()
    assert streamer.ends >= 1


def turn_of(sequences: Tensor, seed: int) -> Tensor:
    """A conversation with more text of the user."""
    made = torch.Generator().manual_seed(seed)
    return torch.cat([sequences, torch.randint(3, 90, (1, 7), generator=made)], 1)


@pytest.mark.parametrize("name", NAMES)
def test_text_goes_on_after_an_image_in_an_earlier_turn(name: str) -> None:
    """With the cache of the drafter, and with the caller's own, as in `model.generate`."""
    model, drafter = model_of(name), drafter_of(name)
    inputs = prompt_of(name, 6)
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(**inputs, **options)
    ids = turn_of(first.sequences, 1)
    mask = torch.ones_like(ids)
    second = model.generate(input_ids=ids, attention_mask=mask, **{CACHE: first[CACHE]}, **options)

    drafted = drafter.generate(**inputs, **options)
    assert torch.equal(drafted.sequences, first.sequences)
    reply = [nearly(second.sequences[0, ids.shape[1] :])]
    again = drafter.generate(
        input_ids=ids, attention_mask=mask, cache=drafted[CACHE], documents=reply, **options
    )
    assert torch.equal(again.sequences, second.sequences)

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    drafted = drafter.generate(**inputs, cache=cache, **options)
    assert cache.get_seq_length() == drafted.sequences.shape[1] - 1
    again = drafter.generate(input_ids=ids, attention_mask=mask, cache=cache, documents=reply, **options)
    assert torch.equal(again.sequences, second.sequences)
    assert cache.get_seq_length() == again.sequences.shape[1] - 1


def test_a_cache_with_images_is_no_beginning_of_another_text() -> None:
    drafter, inputs = drafter_of("llava"), prompt_of("llava", 8)
    options: dict[str, Any] = {"max_new_tokens": 5, "return_dict_in_generate": True}
    out = drafter.generate(**inputs, **options)
    other = inputs["input_ids"].clone()
    other[0, 0] = 91
    with pytest.raises(InvalidInputError, match="hold images"):
        drafter.generate(other, cache=out[CACHE], max_new_tokens=5)
    with pytest.raises(UnsupportedGenerationError, match="pixel_values"):
        drafter.generate(**inputs, cache=out[CACHE], max_new_tokens=5)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_images_of_another_count_than_placeholders_raise_the_error_of_the_model(name: str) -> None:
    model, drafter = model_of(name), drafter_of(name)
    for wrong in ({**prompt_of(name), **image_inputs(name, [2])}, prompt_of(name, images=2)):
        if wrong["input_ids"].shape == prompt_of(name, images=2)["input_ids"].shape:
            wrong |= image_inputs(name, [1])
        with pytest.raises(Exception) as own:  # noqa: PT011 - of whatever kind
            model.generate(**wrong, max_new_tokens=5)
        with pytest.raises(type(own.value)) as ours:
            drafter.generate(**wrong, max_new_tokens=5)
        assert str(ours.value) == str(own.value)
    inputs = prompt_of(name, 2)  # nothing is left behind
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(drafter.generate(**inputs, **options), model.generate(**inputs, **options))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_batch_of_which_one_prompt_has_no_image(name: str) -> None:
    model, drafter = model_of(name), drafter_of(name)
    inputs = prompt_of(name, 3, lengths=(18, 12))
    inputs |= image_inputs(name, [1], 3)
    ids = inputs["input_ids"]
    ids[1, ids[1] >= 90] = 7
    for types in ("token_type_ids", "mm_token_type_ids"):
        if types in inputs:
            inputs[types] = (ids == IMAGE).long()
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    stock = model.generate(**inputs, **options)
    drafted = drafter.generate(**inputs, **options, documents=planted(stock, ids))
    assert torch.equal(drafted, stock)
    assert drafter.last_stats is not None
    assert drafter.last_stats.accepted > 0


def test_embeddings_beside_images_are_refused_by_name() -> None:
    model, inputs = model_of("llava"), prompt_of("llava")
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(UnsupportedGenerationError, match="inputs_embeds"):
        drafter_of("llava").generate(**inputs, inputs_embeds=embedded, max_new_tokens=5)


def test_placeholders_are_neither_drafted_nor_learned() -> None:
    model = model_of("qwen2_5_vl")
    drafter = RetrievalDrafter.for_model(model, config=DraftConfig(nodes=16))
    assert drafter.target.placeholders == {IMAGE, *MARKS}
    verified: list[np.ndarray] = []
    verify = drafter.target.verify_rows

    def record(caches: Any, inputs: Any) -> Tensor:
        verified.extend(given.input_ids[0, 1:].numpy() for given in inputs)
        return verify(caches, inputs)

    drafter.target.verify_rows = record  # type: ignore[method-assign]
    inputs = prompt_of("qwen2_5_vl", 9, lengths=(30,))
    reply = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, -NEW:]
    marked = torch.stack([reply, torch.full_like(reply, IMAGE)], 1).reshape(-1)
    drafter.generate(**inputs, max_new_tokens=NEW, do_sample=False, documents=[reply, marked])
    drafter.flush()
    drafts = np.concatenate(verified)
    assert len(drafts) > NEW // 2
    assert not np.isin(drafts, list(drafter.target.placeholders)).any()
    history = next(source for source in drafter.draft_engine.sources if source.name == "history")
    learned = np.concatenate([np.asarray(segment.tokens) for segment in history.history.segments])  # type: ignore[attr-defined]
    assert not np.isin(learned, list(drafter.target.placeholders)).any()
    text = [token for token in inputs["input_ids"][0].tolist() if token < 90]
    assert set(text) <= set(learned.tolist())
    assert set(reply.tolist()) <= set(learned.tolist())


class NeedsMore(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def warned() -> Any:
    handler, logger = NeedsMore(), logging.getLogger("retrieval_draft")
    logger.addHandler(handler)
    yield handler.messages
    logger.removeHandler(handler)


def needing_more_than_keys() -> Any:
    """A model whose text after an image depends on an input of every pass."""
    model = make_image_model("llava", seed=1)
    forward, prepare = type(model).forward, type(model).prepare_inputs_for_generation
    kind = type("LlavaWithHints", (type(model),), {})

    def forward_with_hint(self: Any, *args: Any, hint: Tensor | None = None, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        if hint is not None:
            out.logits = out.logits + hint
        return out

    kind.forward = functools.wraps(forward)(forward_with_hint)  # type: ignore[attr-defined]
    import inspect

    parameters = list(inspect.signature(forward).parameters.values())
    hint = inspect.Parameter("hint", inspect.Parameter.KEYWORD_ONLY, default=None)
    kind.forward.__signature__ = inspect.Signature([*parameters[:-1], hint, parameters[-1]])  # type: ignore[attr-defined]
    kind.prepare_inputs_for_generation = prepare  # type: ignore[attr-defined]
    model.__class__ = kind
    return model


def test_a_model_that_needs_more_than_keys_and_positions_generates_in_its_own_way(warned: list[str]) -> None:
    model = needing_more_than_keys()
    drafter = RetrievalDrafter.for_model(model, config=DraftConfig(nodes=8))
    hint = torch.randn(1, 1, VOCABULARY, generator=torch.Generator().manual_seed(3)) * 4
    inputs = {**prompt_of("llava", 2), "hint": hint}
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    stock = model.generate(**inputs, **options)
    streamer = Collects()
    for _ in range(2):
        out = drafter.generate(**inputs, **options, streamer=streamer)
        assert torch.equal(out, stock)
    assert streamer.put_tokens == 2 * stock[0].tolist()
    assert len([message for message in warned if "own loop" in message]) == 1
    assert drafter.last_stats is not None
    assert (drafter.last_stats.tokens, drafter.last_stats.drafted) == (NEW, 0)
    sampled = {"max_new_tokens": NEW, "do_sample": True, "seed": 4}
    assert torch.equal(drafter.generate(**inputs, **sampled), drafter.generate(**inputs, **sampled))
    with pytest.raises(UnsupportedGenerationError, match="best_of"):
        drafter.generate(**inputs, **sampled, best_of=2)
    # Without the input it is drafted for.
    assert torch.equal(
        drafter.generate(**prompt_of("llava", 2), **options),
        model.generate(**prompt_of("llava", 2), **options),
    )
    assert drafter.last_stats.drafted >= 0


def test_prompt_logits_are_those_of_the_model() -> None:
    model, inputs = model_of("mistral3"), prompt_of("mistral3", 3)
    out = drafter_of("mistral3").generate(
        **inputs, max_new_tokens=3, output_prompt_logits=True, return_dict_in_generate=True
    )
    with torch.no_grad():
        wanted = model(**inputs).logits[0]
    torch.testing.assert_close(out.prompt_logits[0], wanted, atol=1e-4, rtol=1e-4)


def test_captured_passes_after_an_image_see_a_changed_model() -> None:
    """A hook, as adapters are, comes between two requests that both have images."""
    model, inputs = make_image_model("qwen3_vl"), prompt_of("qwen3_vl")
    drafter = RetrievalDrafter.for_model(model, config=DraftConfig(nodes=12, graphs="tape"))
    options = {"max_new_tokens": NEW, "do_sample": False}
    first = drafter.generate(**inputs, **options)
    layer = model.get_decoder().layers[0].mlp
    layer.register_forward_hook(lambda module, args, out: -3 * out)
    stock = model.generate(**inputs, **options)
    assert not torch.equal(first, stock)
    assert torch.equal(drafter.generate(**inputs, **options), stock)
    graphs = drafter.target.graphs
    assert graphs is not None
    assert graphs.reason is None
    assert graphs.replays > 0
