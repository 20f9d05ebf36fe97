"""Prompts with images, sound or video: the model passes them itself, and drafts follow."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache

from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.engine.cache.cache_rows import RowCache, copied_row
from retrieval_draft.engine.cache.chain_cache import ChainCache
from retrieval_draft.engine.compat import CACHE_NAMES, given_cache, next_inputs
from retrieval_draft.engine.probe import named_sizes
from retrieval_draft.engine.request import DecodeRequest, PassedPrompt
from retrieval_draft.engine.target import Target, disagreement, tolerance
from retrieval_draft.engine.wrapped_models import is_compiled, uncompiled

__all__ = ["NotVerifiable", "pass_prompts"]

_SPARE = 64
"""Tree nodes that a row's cache makes room for at once."""


class NotVerifiable(Exception):
    """Text after these inputs cannot be verified with drafts; the message names the reason."""


@dataclass(slots=True)
class _Passed:
    """A batch after a pass of the model's own.

    Attributes:
        ids: int64, shape (batch, length), padding included.
        inputs: Model inputs, updated for the next pass.
        logits: (batch, m, vocabulary), float.
        hidden: (batch, 1, d). States that draft sources read, at the last position; None without.
    """

    ids: Tensor
    inputs: dict[str, Any]
    logits: Tensor
    hidden: Tensor | None

    @property
    def cache(self) -> DynamicCache:
        """The model's own cache."""
        cache: DynamicCache = given_cache(self.inputs)
        return cache


def pass_prompts(
    target: Target,
    requests: Sequence[DecodeRequest],
    input_ids: Tensor,
    config: GenerationConfig,
    model_inputs: Mapping[str, Any],
    kind: Hashable,
) -> float:
    """Has the model pass prompts with images as it does itself, and hands the requests the result.

    The first prompts of a kind are followed by two tokens in both ways, the model's own and as a tree: so it
    is found out if a model needs more than keys and positions.

    Args:
        target: The model.
        requests: One for each row. `cache` and `passed` are set.
        input_ids: int64, shape (batch, length), left padding included.
        config: As prepared by model.generate.
        model_inputs: As prepared by model.generate; they are left as they are, the cache included.
        kind: Kind of the inputs, such as their names, of which one trial is enough.

    Returns:
        Seconds of it all.

    Raises:
        NotVerifiable: Text after these inputs cannot be verified with drafts.
    """
    begin = perf_counter()
    _refuse_known(target, requests, model_inputs, kind)
    wants_all = any(request.keep_prompt_logits for request in requests)
    passed = _pass_own(target, input_ids, config, model_inputs, wants_all)
    padding = [input_ids.shape[1] - len(request.prompt) for request in requests]
    caches = _checked(target, kind, passed, requests, padding)
    if target.graphs is not None:
        target.graphs.recheck()
    for row, (request, cache) in enumerate(zip(requests, caches, strict=True)):
        found = np.flatnonzero(np.isin(request.prompt, np.fromiter(request.placeholders, np.int32)))
        cache.fixed = int(found[-1]) + 1 if len(found) else len(request.prompt)
        wanted = len(request.prompt) if request.keep_prompt_logits else 1
        hidden = None if passed.hidden is None else passed.hidden[row]
        request.cache, request.passed = cache, PassedPrompt(passed.logits[row, -wanted:], hidden)
    return perf_counter() - begin


def _refuse_known(
    target: Target, requests: Sequence[DecodeRequest], model_inputs: Mapping[str, Any], kind: Hashable
) -> None:
    if target.width is not None:
        raise NotVerifiable("exact='bitwise' passes a prompt as text alone")
    if target.media_ways.get(kind):
        raise NotVerifiable(target.media_ways[kind])
    if target.rope is not None and max(request.max_length for request in requests) > target.rope.length:
        raise NotVerifiable("rotary factors change at a length that the text may reach, and images pass once")


def _pass_own(
    target: Target, ids: Tensor, config: GenerationConfig, model_inputs: Mapping[str, Any], wants_all: bool
) -> _Passed:
    """The prompts' pass, in a copy of the cache."""
    inputs = {
        name: copy.deepcopy(value) if name in CACHE_NAMES else value for name, value in model_inputs.items()
    }
    if wants_all and "logits_to_keep" in inputs:
        inputs["logits_to_keep"] = 0
    model: Any = target.model
    with uncompiled(is_compiled(model)), target.hidden_states.taken():
        outputs = model._prefill(ids, config, inputs)
        states = target.hidden_states.last
    return _updated(model, ids, inputs, outputs, None if states is None else states[:, -1:])


def _step_own(target: Target, passed: _Passed, tokens: Tensor) -> _Passed:
    """The model's own pass over one more token of each row, int64, shape (batch, 1)."""
    model: Any = target.model
    ids = torch.cat([passed.ids, tokens], 1)
    with uncompiled(is_compiled(model)):
        outputs = model(**next_inputs(model, ids, passed.inputs), return_dict=True)
    return _updated(model, ids, passed.inputs, outputs, None)


def _updated(model: Any, ids: Tensor, inputs: dict[str, Any], outputs: Any, hidden: Tensor | None) -> _Passed:
    inputs = model._update_model_kwargs_for_generation(outputs, inputs, is_encoder_decoder=False)
    logits: Tensor = outputs.logits
    return _Passed(ids, inputs, logits, hidden)


def _checked(
    target: Target, kind: Hashable, passed: _Passed, requests: Sequence[DecodeRequest], padding: Sequence[int]
) -> list[RowCache]:
    """A cache for each row; the first time of a kind after a trial."""
    try:
        caches = _caches(target, passed, requests, padding)
        if kind not in target.media_ways:
            _refuse_shifted_chains(target, caches)
            _try(target, passed, caches, requests)
            target.media_ways[kind] = ""
        return caches
    except (MemoryError, torch.OutOfMemoryError) as error:  # perhaps not the next time
        raise NotVerifiable("there is no memory for drafts") from error
    except Exception as error:  # the model generates in its own way all the same
        reason = str(error) if isinstance(error, NotVerifiable) else f"{type(error).__name__}: {error}"
        target.media_ways[kind] = reason
        raise NotVerifiable(reason) from error


def _refuse_shifted_chains(target: Target, caches: Sequence[RowCache]) -> None:
    """Refuses positions that are not numbers of keys where the model masks chains by windows or the like.

    Some count positions for that and some count keys (HYV4); few keys after the prompt do not show which.
    """
    sizes = list(named_sizes(target))
    if target.verification.way == "chain" and sizes and any(cache.shift for cache in caches):
        raise NotVerifiable(
            f"its positions after images are not numbers of keys, and it chooses keys beyond {min(sizes)}"
        )


def _caches(
    target: Target, passed: _Passed, requests: Sequence[DecodeRequest], padding: Sequence[int]
) -> list[RowCache]:
    length = passed.ids.shape[1]
    if not isinstance(passed.cache, DynamicCache):
        raise NotVerifiable(f"its cache is a {type(passed.cache).__name__}")
    if passed.cache.get_seq_length() != length:
        raise NotVerifiable(f"the prompt of {length} tokens has {passed.cache.get_seq_length()} keys")
    positions = _next_positions(target, passed)
    caches = []
    for row, (request, left, position) in enumerate(zip(requests, padding, positions, strict=True)):
        capacity = min(request.max_length, len(request.prompt) + 4096) + _SPARE
        cache = _row_cache(target, passed, row, left, capacity)
        if cache.get_seq_length() != len(request.prompt):
            raise NotVerifiable("its cache holds keys of another number of tokens than the prompt has")
        cache.shift = position - len(request.prompt)
        caches.append(cache)
    return caches


def _row_cache(target: Target, passed: _Passed, row: int, left: int, capacity: int) -> RowCache:
    """A copy of one row, for trees or for chains."""
    if target.verification.way == "tree":
        return copied_row(passed.cache, row, left, target, capacity)
    if left:
        raise NotVerifiable("states of padded prompts do not go on without their padding")
    own = copy.deepcopy(passed.cache)
    if len(passed.ids) > 1:
        own.batch_select_indices(torch.tensor([row], dtype=torch.int64, device=passed.ids.device))
    cache: ChainCache = target.cache(capacity)
    cache.load(own, passed.ids.shape[1])
    return cache


def _next_positions(target: Target, passed: _Passed) -> list[int]:
    """The position at which the model continues each row; where it names none, the number of keys."""
    batch, length = passed.ids.shape
    ids = torch.cat([passed.ids, passed.ids[:, -1:]], 1)
    given = next_inputs(target.model, ids, passed.inputs).get("position_ids")
    if given is None:
        return [length] * batch
    # Of several rows of positions, (rows, batch, 1), the last are those of the rotary factors.
    last = given.reshape(-1, *given.shape[-2:])[-1, :, -1].tolist()
    return [int(position) for position in (last * batch if len(last) == 1 else last)]


def _try(
    target: Target, passed: _Passed, caches: Sequence[RowCache], requests: Sequence[DecodeRequest]
) -> None:
    """Compares a tree after each prompt with the model's own passes over one of its paths."""
    first = passed.logits[:, -1:].argmax(-1)
    one = _step_own(target, passed, first)
    second = one.logits[:, -1:].argmax(-1)
    two = _step_own(target, one, second)
    for row, (cache, request) in enumerate(zip(caches, requests, strict=True)):
        tokens = [int(first[row]), int(second[row])]
        if target.verification.way == "tree":
            tokens.insert(1, (tokens[1] + 1) % target.vocabulary)
        size = len(tokens)
        tree = DraftTree(
            tokens=np.array(tokens, np.int32),
            parents=np.array([-1, *[0] * (size - 1)], np.int32),
            depths=np.array([0, *[1] * (size - 1)], np.int32),
            probs=np.ones(size, np.float32),
            path_probs=np.ones(size, np.float32),
            sources=np.zeros(size, np.int64),
        )
        # With masks of its own: in a running batch those of the target may be another row's.
        inputs = target.attention_of_row().prepare(tree, len(request.prompt), None, cache.shift)
        logits = target.verify(cache, inputs)[[0, size - 1]]
        cache.drop()
        own = torch.stack([one.logits[row, -1], two.logits[row, -1]])
        found = disagreement(logits, own.to(logits.device))
        if not found <= tolerance(target.model.dtype):
            raise NotVerifiable(
                f"the logits of drafts differ by {found:.2g} of their standard deviation from its own"
            )
