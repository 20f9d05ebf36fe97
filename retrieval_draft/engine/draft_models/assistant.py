"""Gemma 4's assistant: a small decoder without keys of its own, which attends to the target's.

Its layers read the keys and values that the target's last layer of the same type keeps of the text. Its first
input is the last token's embedding beside the target's state before it, and at nodes of the tree the
assistant's own state stands for the target's. All nodes have the position of the last token, so that those of
a level pass together and see the same keys. The layers, their weights and their names are those of
transformers' `Gemma4AssistantForCausalLM`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retrieval_draft.engine.compat import layer_kinds
from retrieval_draft.engine.draft_models.expansion import ExpansionLimits
from retrieval_draft.engine.draft_models.vector_heads import PathHead, PathState
from retrieval_draft.engine.wrapped_models import decoder_layers
from retrieval_draft.errors import InvalidInputError

__all__ = ["AssistantHead", "make_assistant"]


def make_assistant(config: Mapping[str, Any]) -> nn.Module:
    """Transformers' model of a config.json, with random weights.

    Raises:
        ValueError: This transformers has no such model, or refuses the configuration.
    """
    import transformers

    kind = str(config["model_type"])
    auto: Any = transformers.AutoConfig
    models: Any = transformers.AutoModelForCausalLM
    if kind not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"transformers {transformers.__version__} has no {kind!r}; upgrade it, for example with pip"
        )
    given = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    made = auto.for_model(kind, **given)
    model: nn.Module = models.from_config(made, attn_implementation="sdpa")
    return model


class AssistantHead(PathHead):
    """Gemma 4's assistant, as a `DraftHead` that reads the target's cache.

    Args:
        model: Transformers' model.
        limits: Limits on the growth of its trees.
    """

    reads_cache = True

    def __init__(self, model: Any, limits: ExpansionLimits | None = None) -> None:
        super().__init__(None, limits)
        self.model = model
        self._sources: dict[str, int] = {}

    def bind(self, model: Any) -> None:
        """Takes the target's embeddings, device and dtype, and finds the layers whose keys are read.

        Raises:
            InvalidInputError: The target has no such layer, or its keys are of another size.
        """
        super().bind(model)
        targets = [kind for kind, _ in layer_kinds(model.config.get_text_config(decoder=True))]
        layers = decoder_layers(model)
        for layer in self.model.model.layers:
            own = layer.self_attn
            kind = own.layer_type
            at = max((i for i, each in enumerate(targets) if each == kind), default=None)
            heads = own.config.num_attention_heads // own.num_key_value_groups
            found = None if at is None else _key_columns(layers[at])
            if at is None or found != heads * own.head_dim:
                raise InvalidInputError(
                    f"The assistant reads {kind} keys of {heads} heads of {own.head_dim} columns; "
                    + (
                        f"the model has no {kind}." if at is None else f"layer {at} of the model has {found}."
                    ),
                    "Use an assistant that was trained for this model.",
                )
            self._sources[kind] = at

    def outputs(self) -> list[nn.Module]:
        """The output head, but for an assistant that chooses clusters of tokens before it."""
        return [] if self.model.config.use_ordered_embeddings else [self.model.lm_head]

    def steps(
        self, states: Sequence[PathState], counts: Sequence[int], level: int, tokens: Tensor, vectors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Passes the nodes of one text after the other, over its keys; see `PathHead.steps`."""
        joined = torch.cat((self._target_embeddings[0](tokens).to(vectors.dtype), vectors), -1)
        passed = [
            self._pass(state.cache, rows)
            for state, rows in zip(states, joined.split(list(counts)), strict=True)
        ]
        out = torch.cat(passed)
        return self.model.post_projection(out), self._logits(out)

    def _pass(self, cache: Any, rows: Tensor) -> Tensor:
        """The decoder's output, (nodes, d), at nodes after the text in a cache."""
        inputs = self.model.pre_projection(rows)[None]
        seen = {}
        for kind, at in self._sources.items():
            layer = cache.layers[at]
            seen[kind] = (layer.keys.to(rows.device), layer.values.to(rows.device))
        # Without a mask, attention over several nodes would be taken for a causal one.
        masks = {
            kind: None if len(rows) == 1 else inputs.new_zeros((1, 1, len(rows), keys.shape[2]))
            for kind, (keys, _) in seen.items()
        }
        position = cache.get_seq_length() + cache.shift
        passed = self.model.model(
            inputs_embeds=inputs,
            attention_mask=masks,
            position_ids=torch.full((1, len(rows)), position, dtype=torch.int64, device=rows.device),
            shared_kv_states=seen,
            use_cache=False,
            logits_to_keep=None,  # a number has 5.24 cut inputs by layer, which there are none of
        )
        out: Tensor = passed.last_hidden_state[0]
        return out

    def _logits(self, states: Tensor) -> Tensor:
        if not self.model.config.use_ordered_embeddings:
            return self.guesses(states)
        logits: Tensor = self.model.masked_embedding(states[None], self.model.lm_head.weight)[0]
        # Tokens of the clusters that were not chosen have one value below all others; they are not guessed.
        return logits.masked_fill(logits <= logits.min(), float("-inf"))


def _key_columns(layer: Any) -> int | None:
    """Columns of a decoder layer's keys; None where it has no such projection."""
    projection = getattr(getattr(layer, "self_attn", None), "k_proj", None)
    columns: int | None = getattr(projection, "out_features", None)
    return columns
