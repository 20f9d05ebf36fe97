"""Differences between versions of transformers, 5.0 to the newest: the only module that depends on them.

Features are looked for, not version numbers, so that a release in between, or a later one that keeps a
feature, works without a change here. In words of this package a "cache" is the argument that `model.generate`
calls ``cache`` from 5.24 on and ``past_key_values`` before.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, GenerationMixin, cache_utils
from transformers.generation.utils import GenerateDecoderOnlyOutput

from retrieval_draft.engine.substitution import loan
from retrieval_draft.errors import UnsupportedEngineError

__all__ = [
    "CACHE_NAMES",
    "cache_parameter",
    "callers_model_inputs",
    "can_parse_responses",
    "croppable_layers",
    "empty_layer",
    "given_cache",
    "has_length",
    "hidden_arguments",
    "is_callers_own",
    "is_empty",
    "layer_kinds",
    "limited_steps",
    "makes_cache_anew",
    "mtp_classes",
    "next_inputs",
    "output_cache_name",
    "own_cache",
    "query_length",
    "require_parts",
    "response_parser",
    "steps_as_alone",
]

CACHE_NAMES = ("cache", "past_key_values")
"""Names of the cache among the arguments of `generate` and of a model's forward pass, the newest first."""

_NEEDED = ("AttentionInterface", "AttentionMaskInterface", "PreTrainedConfig")
"""Parts of transformers 5 that this package needs; 4.57 lacks the last."""


def require_parts(module: Any) -> None:
    """Refuses a transformers that is too old, before anything of it is used.

    Args:
        module: The package transformers.

    Raises:
        UnsupportedEngineError: It lacks a part; the message names the installed version and how to get a
            newer one.
    """
    if not all(hasattr(module, name) for name in _NEEDED):
        raise UnsupportedEngineError(
            f"transformers {module.__version__} is installed; retrieval_draft needs 5.0 or newer.",
            "Run: pip install --upgrade 'transformers>=5.0'",
        )


require_parts(transformers)


def mtp_classes() -> tuple[Any, Any] | None:
    """Classes of a model's layers for multi-token prediction and of their cache; None where there are none.

    The layers must be callable one by one, which is newer than the classes.
    """
    from transformers import modeling_layers

    model, own_cache_class = (
        getattr(modeling_layers, "MtpModel", None),
        getattr(cache_utils, "MtpCache", None),
    )
    if own_cache_class is None or not hasattr(model, "forward_layer"):
        return None
    return model, own_cache_class


def cache_parameter(model: Any) -> str:
    """Name of the cache among the arguments of a model's forward pass, which may be older code from a hub."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), output_cache_name())


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments of `generate` or model inputs, under either name, or None."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def output_cache_name() -> str:
    """Name of the cache in the output of `generate`, and among its arguments."""
    names = {field.name for field in fields(GenerateDecoderOnlyOutput)}
    return next(name for name in CACHE_NAMES if name in names)


def is_callers_own(cache: Any) -> bool:
    """True if the cache that a custom decoding loop received is its caller's, not made by `generate`.

    Newer versions mark the caller's. In older ones the arguments of the calling `generate` show it; a cache
    that reached the loop without any `generate` is the caller's.
    """
    if getattr(cache, "_is_user_defined", False):
        return True
    found = hidden_arguments()
    return found is None or given_cache(found) is cache


def is_empty(cache: Any) -> bool:
    """True if a cache of transformers holds no token: by its keys, or without any by its states."""
    states = [getattr(layer, "has_previous_state", None) for layer in cache.layers]
    if any(any(state.values()) if isinstance(state, dict) else bool(state) for state in states):
        return False
    return not has_length(cache) or cache.get_seq_length() == 0


def has_length(cache: Any) -> bool:
    """True if some layer of a cache counts tokens, as attention does and recurrent states do not."""
    return any(isinstance(layer, cache_utils.CacheLayerMixin) for layer in cache.layers)


def hidden_arguments() -> dict[str, Any] | None:
    """Arguments of the `model.generate` that called the decoding loop that runs; None outside of any.

    transformers shows a streamer the prompt and then withholds it from custom decoding loops, and it does not
    tell them which model inputs came from the caller. So they are read from the frame of `generate` itself.
    """
    generate = inspect.unwrap(GenerationMixin.generate)
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not generate.__code__:
        frame = frame.f_back
    if frame is None:
        return None
    names = inspect.signature(generate).parameters
    variables = {name: frame.f_locals.get(name) for name in names if name != "self"}
    return {**(variables.pop("kwargs") or {}), **variables}


def callers_model_inputs(model_inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Model inputs that the caller of `generate` gave; not those that transformers made or added.

    Args:
        model_inputs: As the custom decoding loop received them; they are returned unchanged where no
            `generate` called it.

    Example:
        generate(ids, max_new_tokens=8, pixel_values=image)  ->  {"pixel_values": image}
    """
    found = hidden_arguments()
    if found is None:
        return dict(model_inputs)
    return {name: value for name, value in found.items() if name not in _options_of_generate()}


@cache
def _options_of_generate() -> frozenset[str]:
    """Arguments of `generate` that are no model inputs: its own, and those of a configuration."""
    named = inspect.signature(inspect.unwrap(GenerationMixin.generate)).parameters
    return frozenset([*named, *dir(GenerationConfig())])


def layer_kinds(text: Any) -> list[tuple[str, int | None]]:
    """Type and sliding window of each layer, in order.

    Args:
        text: Configuration of the text model.

    Returns:
        For each layer its type as in ``config.layer_types``, "dummy" for one without keys of its own, and its
        window in tokens or None. Before 5.20 the layers that share the keys of others, which come last, are
        left out.

    Example:
        Gemma 3 with a window of 512  ->  [("sliding_attention", 512), ..., ("full_attention", None), ...]
    """
    ask: Any = getattr(cache_utils, "get_layer_types_and_kwargs", None)
    if ask is None:  # before 5.17
        kinds = _inferred_kinds(text)
        windows = [getattr(text, "sliding_window", None)] * len(kinds)
    else:
        kinds, options = ask(text)
        # Before 5.19 one dictionary serves all layers.
        each = [options] * len(kinds) if isinstance(options, dict) else options
        windows = [of_layer.get("sliding_window") for of_layer in each]
    return [
        (kind, window if kind == "sliding_attention" else None)
        for kind, window in zip(kinds, windows, strict=True)
    ]


def _inferred_kinds(text: Any) -> list[str]:
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        if getattr(text, "sliding_window", None) is not None:
            kind = "sliding_attention"
        elif getattr(text, "attention_chunk_size", None) is not None:
            kind = "chunked_attention"
        else:
            kind = "full_attention"
        kinds = [kind] * int(text.num_hidden_layers)
    shared = getattr(text, "num_kv_shared_layers", None) or 0
    return list(kinds[: len(kinds) - shared])


@cache
def croppable_layers() -> tuple[type, ...]:
    """Types of cache layers, without their children, that can be cropped to any shorter text."""
    names = ("DynamicLayer", "DynamicIndexedLayer", "DummyLayer")
    return tuple(getattr(cache_utils, name) for name in names if hasattr(cache_utils, name))


def own_cache(model: Any) -> Any:
    """An empty cache as `model.generate` makes it; None for models that make one in their first pass."""
    if not model._supports_default_dynamic_cache():
        return None
    return cache_utils.DynamicCache(config=model.config.get_text_config(decoder=True))


def empty_layer() -> Any:
    """A cache layer for a "dummy" of `layer_kinds`, which holds nothing."""
    kind: Any = cache_utils.DummyLayer
    return kind()


def makes_cache_anew(model: Any, cache: Any, length: int) -> bool:
    """True if `model.generate` drops a cache of fewer tokens where the text has become `length` tokens long.

    The model's own preparation of a pass's inputs is tested for that. Phi-3 and PhiMoE up to 5.19, and
    Phi-4-multimodal still in 5.24, then pass the last token alone, which forgets the text; here
    they get the whole text, as Phi-3 does in 5.24.

    Args:
        model: Of transformers.
        cache: An empty one, which is left empty.
        length: Tokens.
    """
    ids = torch.zeros((1, length), dtype=torch.int64, device=model.device)
    given = {cache_parameter(model): cache, "attention_mask": torch.ones_like(ids), "use_cache": True}
    if "cache_position" in inspect.signature(model.prepare_inputs_for_generation).parameters:
        given["cache_position"] = torch.arange(length, device=model.device)
    return given_cache(model.prepare_inputs_for_generation(ids, **given)) is None


_NO_LIMIT = (0.0, float("inf"))


def limited_steps(model: Any) -> list[Any]:
    """Layers that limit the time steps of tokens in passes over several of them only: those of Nemotron-H."""
    return [
        part for part in model.modules() if tuple(getattr(part, "time_step_limit", _NO_LIMIT)) != _NO_LIMIT
    ]


@contextmanager
def steps_as_alone(layers: list[Any]) -> Iterator[None]:
    """Gives the tokens of a pass over several the time steps that each has in a pass of its own.

    Args:
        layers: Those of `limited_steps`.
    """
    limits = [layer.time_step_limit for layer in layers]

    def give_back() -> None:
        for layer, limit in zip(layers, limits, strict=True):
            layer.time_step_limit = limit

    with loan(give_back):
        for layer in layers:
            layer.time_step_limit = _NO_LIMIT
        yield


def next_inputs(model: Any, ids: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a model's forward pass over the last of `ids`, as its own decoding loop makes them.

    Args:
        model: Of transformers.
        ids: int64, shape (batch, length), the new token included.
        inputs: Model inputs, updated by the model after its last pass.
    """
    known = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    # Before 5.2 positions in the cache, which are among the inputs, mark the new tokens.
    new = {"next_sequence_length": 1} if "next_sequence_length" in known else {}
    prepared: dict[str, Any] = model.prepare_inputs_for_generation(ids, **new, **inputs)
    return prepared


def query_length(given: Any) -> int:
    """Tokens of a pass, from the argument of a cache layer: their number, or before 5.2 their positions."""
    return given if isinstance(given, int) else int(given.shape[0])


def can_parse_responses() -> bool:
    """True if transformers parses replies as they arrive, by a tokenizer's `response_template`."""
    return find_spec("transformers.utils.chat_parsing") is not None


def response_parser(template: Any, prefix: str, tools: Any) -> Any:
    """A parser of one reply by transformers, where `can_parse_responses`.

    Args:
        template: A `response_template`.
        prefix: The prompt.
        tools: As of chat templates.
    """
    parsing: Any = import_module("transformers.utils.chat_parsing")
    return parsing.ResponseParser(template, prefix=prefix, tools=tools)
