"""Tiny configurations of any family of transformers, with an example of every kind of layer."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import re
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING

from benchmarks.models.shapes import (
    DEFAULTS,
    HEAD_WIDTH,
    HEADS,
    IMAGE_TEXT_SETTINGS,
    KEY_HEADS,
    LATE_SETTINGS,
    LAYER_COUNTS,
    LAYERS,
    NO_IDS,
    SETTINGS,
    SIZES,
    VOCABULARY,
)

__all__ = ["tiny_config"]

_ID_SUFFIXES = ("token_id", "token_index")
_MOST_KINDS = 6
"""Layers kept for their kind at most."""
_ATTEMPTS = 8


def tiny_config(family: str, settings: Mapping[str, Any] | None = None, image_text: bool = False) -> Any:
    """A configuration with tiny sizes and without special tokens.

    Args:
        family: Key of `CONFIG_MAPPING`.
        settings: Further settings, which win over all others.
        image_text: Whether those of `IMAGE_TEXT_SETTINGS` count.

    Raises:
        Exception: Any that the configuration's class raises at sizes it does not allow.
    """
    more = IMAGE_TEXT_SETTINGS.get(family, {}) if image_text else {}
    config = _shrunk(CONFIG_MAPPING[family](), {**SETTINGS.get(family, {}), **more, **(settings or {})})
    for name, value in LATE_SETTINGS.get(family, {}).items():
        *parts, last = name.split(".")
        setattr(functools.reduce(getattr, parts, config), last, value)
    return config


def _shrunk(default: Any, settings: Mapping[str, Any]) -> Any:
    """A copy of a configuration, and of those within, by the rules of `shapes`."""
    kind, own, given = type(default), vars(default), dict(settings)
    names = _settings_of(kind)
    layers = next((own[name] for name in LAYER_COUNTS if isinstance(own.get(name), int)), None)
    lists = _lists_by_layer(own, layers)
    chosen: dict[str, Any] = {}
    for name, value in own.items():
        if name.startswith("_") or name in DEFAULTS or name in lists or name.endswith(_ID_SUFFIXES):
            continue
        if hasattr(value, "to_dict"):
            chosen[name] = _shrunk(value, given.pop(name, None) or {})
        elif isinstance(value, int) and not isinstance(value, bool):
            size = _size(name, value, own)
            if size != value and (name in names or not dataclasses.is_dataclass(kind)):
                chosen[name] = size
    if lists and layers is not None:
        kept = _chosen_layers(list(lists.values()), layers)
        for name, values in lists.items():
            if name in names:
                chosen[name] = type(values)(values[index] for index in kept)
        chosen[next(name for name in LAYER_COUNTS if isinstance(own.get(name), int))] = len(kept)
    chosen |= {name: 0.3 for name in ("initializer_range", "init_std") if name in names}
    chosen |= {name: True for name in ("is_decoder", "use_cache") if name in names}
    if isinstance(own.get("rope_parameters"), dict) and "rope_parameters" in names:
        chosen["rope_parameters"] = _shrunk_rope(own["rope_parameters"])
    if "head_dim" in names and own.get("head_dim", 0) is None:
        chosen["head_dim"] = HEAD_WIDTH
    return _made(kind, {**chosen, **_token_ids(own), **given})


def _made(kind: type, chosen: dict[str, Any]) -> Any:
    """An instance; special tokens that a class insists on get an id."""
    for _ in range(_ATTEMPTS):
        try:
            return kind(**chosen)
        except Exception as error:  # of the class's own validation
            found = re.search(r"field '(\w+)'", str(error))
            if found is None or not found[1].endswith("token_id") or "NoneType" not in str(error):
                raise
            chosen[found[1]] = 1
    return kind(**chosen)


def _settings_of(kind: type) -> set[str]:
    """Names of the arguments that a configuration's class takes."""
    if dataclasses.is_dataclass(kind):
        return {field.name for field in dataclasses.fields(kind) if field.init}
    return set(inspect.signature(kind).parameters) - {"args", "kwargs"}


def _size(name: str, value: int, own: Mapping[str, Any]) -> int:
    """The value of a number in the tiny configuration."""
    if name in KEY_HEADS:
        heads = next(
            (own[each] for each in ("num_attention_heads", "n_heads") if isinstance(own.get(each), int)), 0
        )
        return HEADS if value == heads else min(value, 2)
    most = SIZES.get(name, value)
    return most if name.endswith(("vocab_size", "hidden_size")) else min(value, most)


def _lists_by_layer(own: Mapping[str, Any], layers: int | None) -> dict[str, Any]:
    """The settings that hold one value for each layer."""
    return {
        name: value
        for name, value in own.items()
        if isinstance(value, list | tuple)
        and not name.startswith("_")
        and name not in DEFAULTS
        and layers is not None
        and len(value) == layers > 2
        and not isinstance(value[0], list | dict)
    }


def _chosen_layers(lists: list[Any], layers: int) -> list[int]:
    """Indices of layers, in order: the first one of every kind, and the last ones up to `LAYERS`."""
    first: dict[tuple[str, ...], int] = {}
    for index in range(layers):
        first.setdefault(tuple(repr(values[index]) for values in lists), index)
    kept = set(list(first.values())[:_MOST_KINDS])
    for index in reversed(range(layers)):
        if len(kept) < LAYERS:
            kept.add(index)
    return sorted(kept)


def _shrunk_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters for short texts and small heads."""
    out = dict(copy.deepcopy(rope))
    for name, value in out.items():
        if isinstance(value, dict):
            out[name] = _shrunk_rope(value)
        elif name == "original_max_position_embeddings":
            out[name] = 64
        elif name == "mrope_section" and not out.get("mrope_interleaved"):
            out[name] = [2, 1, 1] if out.get("partial_rotary_factor", 1.0) < 1 else [2, 3, 3]
    return out


def _token_ids(own: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens: none that ends a text, 0 for padding, others from the end of the vocabulary."""
    special = sorted(
        name for name, value in own.items() if name.endswith(_ID_SUFFIXES) and isinstance(value, int)
    )
    others = [name for name in special if name not in (*NO_IDS, "pad_token_id")]
    ids: dict[str, Any] = {name: VOCABULARY - 1 - number for number, name in enumerate(others)}
    ids |= {name: 0 for name in special if name == "pad_token_id"}
    return ids | {name: None for name in NO_IDS if name in own}
