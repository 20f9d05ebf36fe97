"""Trained heads from checkpoints, in the layouts in which they are published."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retrieval_draft.engine.draft_models.assistant import AssistantHead, make_assistant
from retrieval_draft.engine.draft_models.dflash import DFlashHead
from retrieval_draft.engine.draft_models.eagle import Eagle3Head, EagleHead
from retrieval_draft.engine.draft_models.vector_heads import HydraHead, MedusaHead, MlpSpeculator, ReDrafter
from retrieval_draft.engine.hidden_states import LAST
from retrieval_draft.errors import ModelFileError, RetrievalDraftError
from retrieval_draft.models.loading import model_folder

__all__ = ["LAYOUTS", "load_head"]

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "medusa_lm_head.pt", "hydra_lm_head.pt")
"""Files of weights; those of a kind make the ones after it unnecessary."""

_ASSISTANTS = ("gemma4_assistant", "gemma4_unified_assistant")
"""Types of models that read the target's keys."""

_LONGEST_BLOCK = 256
_MOST_LEVELS = 32

_HINT = "Name the folder or hub name of a head that was trained for this model."


def load_head(name: str, model: Any) -> Any:
    """A head from a checkpoint, if it is one.

    Args:
        name: A folder, or a hub name.
        model: The model that it drafts for.

    Returns:
        A `DraftHead`; None where the checkpoint is a model of its own.

    Raises:
        ModelFileError: There is no such checkpoint, it is torn, or its weights are not those of its layout.
    """
    folder = model_folder(name, ["config.json", *_WEIGHTS])
    config = _config(folder, name)
    layout = _layout(config, folder)
    if layout is None:
        return None
    if layout not in LAYOUTS:
        raise ModelFileError(
            f"The checkpoint {name!r} is a head of the kind {layout!r}, which is not supported.",
            f"Supported are: {', '.join(LAYOUTS)}.",
        )
    try:
        weights = _weights(folder, name)
    except ModelFileError:
        raise
    except Exception as error:  # of pickle, zip, safetensors or torch
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelFileError(
            f"A weight file of the head {name!r} cannot be read: {first}",
            "It is torn; copy or download it again.",
        ) from error
    if layout == "eagle" and not _is_eagle(weights):
        return None
    size = int(model.config.get_text_config(decoder=True).hidden_size)
    try:
        head, named = LAYOUTS[layout](config, weights, model, size)
        _fill(head, named, name, layout)
    except RetrievalDraftError:
        raise
    except Exception as error:  # of any type, by torch and transformers, for numbers that make no sense
        raise ModelFileError(
            f"The head {name!r} of the kind {layout!r} has an unusable config.json: {error!r}.", _HINT
        ) from error
    return head.eval()


def _config(folder: Path, name: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (ValueError, OSError) as error:
        raise ModelFileError(f"config.json of {name!r} cannot be read: {error}.", _HINT) from error
    if not isinstance(config, dict):
        raise ModelFileError(f"config.json of {name!r} holds a {type(config).__name__}.", _HINT)
    return config


def _number(config: Mapping[str, Any], key: str, most: int, default: int | None = None) -> int:
    """A count or size of a config.json, 1 to `most`: what it makes is made before it meets the weights."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"{key} is {value!r}; it must be a whole number in 1..{most}")
    return value


def _widest(weights: Mapping[str, Tensor]) -> int:
    """The largest dimension of all weights, beyond which no size of a head lies."""
    return max((max(each.shape, default=1) for each in weights.values()), default=1)


def _layout(config: Mapping[str, Any], folder: Path) -> str | None:
    """The layout of a checkpoint; None for a model of its own."""
    if "speculators_model_type" in config:
        return f"speculators {config['speculators_model_type']}"
    if "medusa_num_heads" in config:
        return "medusa"
    if config.get("model_type") in ("mlp_speculator", "recurrent_drafting_drafter", *_ASSISTANTS):
        return str(config["model_type"])
    for key, kind in (("hydra_num_heads", "hydra"), ("dflash_config", "dflash")):
        if key in config:
            return kind
    given = config.get("architectures")
    names = given if isinstance(given, list) else []
    if "draft_vocab_size" in config or any("Eagle3" in str(each) for each in names):
        return "eagle3"
    # EAGLE's config.json is that of a Llama with one layer: `_is_eagle` tells them apart by their weights.
    if config.get("num_hidden_layers") in (1, 2) and not (folder / "tokenizer_config.json").is_file():
        return "eagle"
    return None


def _is_eagle(weights: Mapping[str, Tensor]) -> bool:
    return "fc.weight" in weights and "layers.0.self_attn.q_proj.weight" in weights


def _weights(folder: Path, name: str) -> dict[str, Tensor]:
    """All tensors of a checkpoint. Pickled ones are read without running code."""
    from safetensors.torch import load_file

    for pattern in _WEIGHTS:
        found = sorted(folder.glob(pattern))
        weights: dict[str, Tensor] = {}
        for path in found:
            weights |= (
                load_file(path)
                if path.suffix == ".safetensors"
                else torch.load(path, map_location="cpu", weights_only=True)
            )
        if found:
            return weights
    raise ModelFileError(f"The head {name!r} has no weights.", f"Expected is one of: {', '.join(_WEIGHTS)}.")


def _fill(head: nn.Module, weights: Mapping[str, Tensor], name: str, layout: str) -> None:
    """Sets a head's weights, all of them and no others."""
    expected = {key: tuple(each.shape) for key, each in head.state_dict().items()}
    given = {key: tuple(each.shape) for key, each in weights.items()}
    for key in sorted(expected.keys() | given.keys()):
        wanted, found = expected.get(key), given.get(key)
        if wanted != found:
            raise ModelFileError(
                f"The head {name!r} of the kind {layout!r} has {_shape(found)} for {key!r}; expected is "
                f"{_shape(wanted)}.",
                _HINT,
            )
    head.load_state_dict(dict(weights))


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no weight" if shape is None else f"one of shape {list(shape)}"


_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def _llama(config: Mapping[str, Any], weights: Mapping[str, Tensor], size: int | None = None) -> Any:
    """The configuration of a head's layers, whose states have `size` columns, if that is given."""
    import transformers

    kinds = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}
    kind = config.get("model_type", "llama")
    if kind not in kinds:
        raise ValueError(f"layers of {kind!r}; known are {', '.join(kinds)}")
    for key in _WIDTHS:
        if config.get(key) is not None:
            _number(config, key, _widest(weights))
    _number(config, "num_hidden_layers", len(weights), 1)
    if size not in (None, int(config["hidden_size"])):
        raise ValueError(f"hidden_size is {config['hidden_size']}, the target's states have {size} columns")
    return kinds[kind](**{key: value for key, value in config.items() if key != "architectures"})


_Made = tuple[Any, dict[str, Tensor]]


def _eagle(config: Mapping[str, Any], weights: Mapping[str, Tensor], model: Any, size: int) -> _Made:
    """SafeAILab's layout: `fc`, `layers`, and mostly `embed_tokens`."""
    head = EagleHead(_llama(config, weights, size), "fc.bias" in weights, "embed_tokens.weight" in weights)
    return head, _renamed(weights, {"layers.": "decoder."})


def _speculators_eagle(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], model: Any, size: int
) -> _Made:
    """The layout of speculators: `fusion_fc` and `transformer`; the rest is the target's."""
    if config.get("layernorms"):
        raise ValueError("layernorms is set, which is not supported")
    head = EagleHead(
        _llama(config["transformer_layer_config"], weights, size), "fusion_fc.bias" in weights, False
    )
    own = {key: each for key, each in weights.items() if not key.startswith(("embed_tokens.", "lm_head."))}
    return head, _renamed(own, {"fusion_fc.": "fc.", "transformer.": "decoder.0."})


def _eagle3(config: Mapping[str, Any], weights: Mapping[str, Tensor], model: Any, size: int) -> _Made:
    """SafeAILab's layout (`midlayer`) and that of speculators (`layers.0`); `d2t` holds differences."""
    layers = config.get("transformer_layer_config", config)
    nested = config.get("eagle_config") or {}
    read = config.get("eagle_aux_hidden_state_layer_ids") or nested.get("eagle_aux_hidden_state_layer_ids")
    if read is None:
        count = int(model.config.get_text_config(decoder=True).num_hidden_layers)
        read = (2, count // 2, count - 3)
    widest, rows = _widest(weights), int(model.get_input_embeddings().weight.shape[0])
    columns = _number({**layers, **config}, "draft_vocab_size", widest, layers["vocab_size"])
    head = Eagle3Head(
        _llama(layers, weights),
        _layers(read),
        _number(config, "target_hidden_size", widest, size),
        columns,
        "embed_tokens.weight" in weights,
        bool(config.get("norm_before_residual", False)),
        bool(config.get("norm_before_fc", False)),
    )
    own = {key: each for key, each in weights.items() if key not in ("d2t", "t2d")}
    head.ids = _draft_ids(weights, columns, rows)
    return head, _renamed(own, {"midlayer.": "decoder.0.", "layers.": "decoder."})


def _draft_ids(weights: Mapping[str, Tensor], columns: int, rows: int) -> Any:
    """Token of each column of a head's own vocabulary; None where they are the target's first ones."""
    if "d2t" not in weights:
        if columns > rows:
            raise ValueError(f"it guesses {columns} tokens, the target has {rows}")
        return None
    differences = weights["d2t"].long().numpy()
    if differences.shape != (columns,):
        raise ValueError(f"d2t has the shape {list(differences.shape)}; expected is [{columns}]")
    ids = np.arange(columns) + differences
    if not 0 <= ids.min() <= ids.max() < rows:
        raise ValueError(f"d2t names tokens beyond the {rows} of the target")
    return ids


def _medusa(config: Mapping[str, Any], weights: Mapping[str, Tensor], model: Any, size: int) -> _Made:
    """FasterDecoding's layout: head, block, weight, with or without ``medusa_head.`` in front."""
    heads = _number(config, "medusa_num_heads", len(weights))
    blocks = _number(config, "medusa_num_layers", len(weights), 1)
    head = MedusaHead(heads, blocks, size, int(model.get_input_embeddings().weight.shape[0]))
    named = {f"heads.{key.removeprefix('medusa_head.')}": each for key, each in weights.items()}
    return head, named


def _hydra(config: Mapping[str, Any], weights: Mapping[str, Tensor], model: Any, size: int) -> _Made:
    """FasterDecoding's layout: ``hydra_mlp.HEAD.BLOCK`` and ``hydra_lm_head.HEAD``."""
    kind, offset = config.get("hydra_head_arch", "mlp"), config.get("hidden_state_offset", 0)
    if (kind, offset) != ("mlp", 0):
        raise ValueError(f"hydra_head_arch is {kind!r}, hidden_state_offset {offset}; known are 'mlp' and 0")
    heads = _number(config, "hydra_num_heads", len(weights))
    blocks = _number(config, "hydra_num_layers", len(weights), 1)
    rows = int(model.get_input_embeddings().weight.shape[0])
    return HydraHead(heads, blocks, size, rows, bool(config.get("grounded_heads", True))), dict(weights)


def _redrafter(config: Mapping[str, Any], weights: Mapping[str, Tensor], model: Any, size: int) -> _Made:
    """Apple's layout: `input_proj`, `lm_head`, `rnn_u` and `rnn_w`; the embeddings are the target's."""
    if int(config["hidden_size"]) != size:
        raise ValueError(f"hidden_size is {config['hidden_size']}, the target's states have {size} columns")
    inner = _number(config, "exit_dim", 2 * _widest(weights))
    blocks = _number(config, "num_draft_layers", len(weights))
    columns = _number(config, "vocab_size", int(model.get_input_embeddings().weight.shape[0]))
    return ReDrafter(size, inner, blocks, columns, bool(config["rnn"])), dict(weights)


def _dflash(config: Mapping[str, Any], weights: Mapping[str, Tensor], model: Any, size: int) -> _Made:
    """z-lab's layout: `fc`, `hidden_norm`, `layers` of Qwen 3, `norm`; the rest is the target's."""
    nested = config["dflash_config"]
    layers, read = _dflash_layers(
        {**config, "model_type": "qwen3"}, nested["target_layer_ids"], weights, model
    )
    block = _number({**nested, **config}, "block_size", _LONGEST_BLOCK)
    head = DFlashHead(layers, read, block, int(nested["mask_token_id"]))
    return head, _renamed(weights, {"layers.": "decoder."})


def _speculators_dflash(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], model: Any, size: int
) -> _Made:
    """The layout of speculators: as z-lab's, and with `d2t` an output head over a vocabulary of its own.

    Embeddings, and an output head without `d2t`, are the target's, even where files repeat them.
    """
    for key, known in (("projector_type", "dflash"), ("sample_from_anchor", False)):
        if config.get(key, known) != known:
            raise ValueError(f"{key} is {config[key]!r}; known is {known!r}")
    given = config["transformer_layer_config"]
    layers, read = _dflash_layers(given, config["aux_hidden_state_layer_ids"], weights, model)
    block = _number(config, "block_size", _LONGEST_BLOCK)
    columns = None
    if "d2t" in weights:
        columns = _number(config, "draft_vocab_size", _widest(weights))
    head = DFlashHead(layers, read, block, int(config["mask_token_id"]), columns=columns)
    repeated = ["embed_tokens.", "verifier_", "d2t", "t2d", *(["lm_head."] if columns is None else [])]
    own = {key: each for key, each in weights.items() if not key.startswith(tuple(repeated))}
    if columns is not None:
        head.ids = _draft_ids(weights, columns, int(model.get_input_embeddings().weight.shape[0]))
    return head, _renamed(own, {"layers.": "decoder."})


def _dflash_layers(
    config: Mapping[str, Any], ids: Any, weights: Mapping[str, Tensor], model: Any
) -> tuple[Any, list[int]]:
    """The configuration of DFlash's layers, and the layers of the target that it reads."""
    text = model.config.get_text_config(decoder=True)
    layers = _llama(config, weights, int(text.hidden_size))
    kinds = sorted(set(getattr(layers, "layer_types", None) or ()) - {"full_attention"})
    if kinds:
        raise ValueError(f"layers of {', '.join(kinds)}; known are those of full_attention")
    # They count what layers give, this package what layers take.
    last = int(text.num_hidden_layers)
    return layers, [LAST if each + 1 == last else each + 1 for each in _layers(ids)]


def _mlp_speculator(config: Mapping[str, Any], weights: Mapping[str, Tensor], model: Any, size: int) -> _Made:
    """IBM's layout: ``speculator.emb``, `proj`, `ln` and `head` of each level; tied ones may be repeated."""
    widest, ties = _widest(weights), bool(config.get("tie_weights", False))
    emb = _number(config, "emb_dim", widest)
    inner, depth = _number(config, "inner_dim", widest, emb), _number(config, "n_predict", _MOST_LEVELS)
    if emb != size:
        raise ValueError(f"emb_dim is {emb}, the target's states have {size} columns")
    scales = bool(config.get("scale_input", False))
    head = MlpSpeculator(depth, size, inner, _number(config, "vocab_size", widest), ties, scales)
    named = {key.removeprefix("speculator."): each for key, each in weights.items()}
    if ties:  # files may repeat the first levels' weights for the others
        own = head.state_dict().keys()
        levels = {f"{part}.{at}." for part in ("emb", "proj", "ln", "head") for at in range(1, depth)}
        named = {k: each for k, each in named.items() if k in own or not k.startswith(tuple(levels))}
    return head, named


def _assistant(config: Mapping[str, Any], weights: Mapping[str, Tensor], model: Any, size: int) -> _Made:
    """Google's layout, of transformers' class: `model`, `pre_projection`, `post_projection`, `lm_head`."""
    text, widest = config["text_config"], _widest(weights)
    for key in (*_WIDTHS, "vocab_size"):
        if text.get(key) is not None:
            _number(text, key, widest)
    _number(text, "num_hidden_layers", len(weights))
    if config.get("use_ordered_embeddings"):
        _number(config, "num_centroids", widest)
        _number(config, "centroid_intermediate_top_k", config["num_centroids"])
    backbone = _number(config, "backbone_hidden_size", widest)
    if backbone != size:
        raise ValueError(f"backbone_hidden_size is {backbone}, the target's states have {size} columns")
    rows = int(model.get_input_embeddings().weight.shape[0])
    if text["vocab_size"] > rows:
        raise ValueError(f"it guesses {text['vocab_size']} tokens, the target has {rows}")
    named = {f"model.{key}": each for key, each in weights.items()}
    embeddings = named.get("model.model.embed_tokens.weight")
    if embeddings is not None and config.get("tie_word_embeddings", True):
        named.setdefault("model.lm_head.weight", embeddings)
    return AssistantHead(make_assistant(config)), named


def _layers(given: Any) -> list[int]:
    """Indices of the target's layers."""
    if not all(isinstance(layer, int) and layer >= 0 for layer in given):
        raise ValueError(f"layers {given} are read; they must be numbers of 0 and above")
    return list(given)


def _renamed(weights: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    out = {}
    for key, each in weights.items():
        old = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        out[key if old is None else prefixes[old] + key[len(old) :]] = each
    return out


LAYOUTS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Tensor], Any, int], _Made]] = {
    "eagle": _eagle,
    "speculators eagle": _speculators_eagle,
    "eagle3": _eagle3,
    "speculators eagle3": _eagle3,
    "medusa": _medusa,
    "mlp_speculator": _mlp_speculator,
    "hydra": _hydra,
    "recurrent_drafting_drafter": _redrafter,
    "dflash": _dflash,
    "speculators dflash": _speculators_dflash,
    **dict.fromkeys(_ASSISTANTS, _assistant),
}
"""Makes a head and names its weights, by layout."""
