"""Functional checks of the ways in which a model can verify drafts, on the model itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.engine.attention.tree_mask import TreeInputs
from retrieval_draft.engine.bitwise_target import BitwiseTarget
from retrieval_draft.engine.cache.chain_cache import ChainCache
from retrieval_draft.engine.chain_target import ChainTarget
from retrieval_draft.engine.plain_target import PlainTarget
from retrieval_draft.engine.row_invariance import check_row_invariance
from retrieval_draft.engine.target import Target, disagreement, tolerance
from retrieval_draft.engine.verification import Verification
from retrieval_draft.engine.wrapped_models import check_generates, is_compiled, uncompiled, unwrap
from retrieval_draft.errors import RetrievalDraftError, UnsupportedModelError

__all__ = ["find_target", "named_sizes", "probe", "probe_chain"]

_log = logging.getLogger("retrieval_draft")

_PROMPT = 8
_LONG_WINDOW = 64

_LONGEST_PROBE = 4096
"""The longest text that is tried; a window of a configuration above it is not seen."""


_MANY = 256
"""Children of a root, so that a window that counts slots loses keys enough to be noticed in any dtype."""


_SHORT = (2, _PROMPT)
"""Texts that chains are tried on always; the first is shorter than most convolutions."""

_REPLY = 7
"""Tokens that a model generates on its own, to compare chains with."""

_LEAST = _PROMPT + _REPLY
"""The least size beyond which alone nothing is drafted."""

_NEAR_END = 1024
"""The longest text of a model that is tried up to its end."""

_SIZE_NAMES = ("window", "chunk", "topk", "top_k", "budget", "local_attention")
"""Parts of the names of settings that limit the keys of a token."""

_TOGETHER = 1 << 12
"""Embeddings that are compared with zero at a time."""

_WORDS = 8
"""Different tokens of a probed text: few, so that a model that keeps the best keys finds equal ones in it."""


def find_target(model: Any, strict: bool = False, graphs: str = "auto", exact: str | None = None) -> Target:
    """The model as it can be decoded with: by trees, else by chains, else by its own ``generate`` alone.

    Args:
        model: Any model of transformers that generates text.
        strict: Whether a model that can only be decoded plainly is refused.
        graphs: As `DraftConfig.graphs`.
        exact: As `DraftConfig.exact`.

    Raises:
        UnsupportedModelError: It generates no text, or `strict` or `exact` forbids it.
    """
    check_generates(unwrap(model))
    if exact is not None:
        return _bitwise_target(model, graphs)
    try:
        target = Target(model, "off")
        probe(target)
        target.use_graphs(graphs)
        return target
    except UnsupportedModelError as error:
        no_tree = error
    try:
        chain = ChainTarget(model)
        probe_chain(chain)
    except UnsupportedModelError as error:
        if strict:
            raise
        plain = PlainTarget(model)
        plain.verification = Verification("plain", error.message)
        return plain
    reason = f"no trees: {no_tree.message}"
    if chain.longest is not None:
        reason += (
            f" No drafts for texts that may become longer than {chain.longest} tokens, where several tokens "
            "at once differ from single ones."
        )
    chain.verification = Verification("chain", reason)
    return chain


def _bitwise_target(model: Any, graphs: str) -> Target:
    """The model with passes of one shape, after trees and the independence of rows were tried."""
    usual = Target(model, "off")
    probe(usual)
    if usual.passes_whole:
        raise UnsupportedModelError(
            f"{type(usual.model).__name__} reads a prompt as a whole, which passes of one shape cannot.",
            "Leave out exact='bitwise' for this model.",
        )
    target = BitwiseTarget(model, graphs)
    target.check = check_row_invariance
    target.check_now()
    return target


@torch.no_grad()
def probe_chain(target: ChainTarget) -> float:
    """Compares chains, refused and continued ones too, with the model's own ``generate``.

    On a text shorter than a convolution, a short one, and one beyond each window, chunk or number of chosen
    keys that the configuration names, and up to the end of short contexts. Where a model fails beyond one of
    these sizes only, texts that end before it are drafted for. Where it fails there only on tokens whose
    embedding is zero, these are no part of drafts.

    Args:
        target: The model; its `longest` and `blank` are set.

    Returns:
        The largest difference found, RMS over the standard deviation of the logits.

    Raises:
        UnsupportedModelError: Several tokens after a state give other logits than one after another, or a
            pass fails.
    """
    end = 2 * _LONGEST_PROBE if target.max_positions is None else target.max_positions
    longest = end - _REPLY
    target.blank = _blank_ids(target)
    found = max((_compare_chain(target, length) for length in _SHORT if length <= longest), default=0.0)
    sizes = sorted({size for size in named_sizes(target) if size <= _LONGEST_PROBE})
    tried = [(window, window + max(2, window // 4)) for window in sizes]
    if max(_SHORT) < longest and end <= _NEAR_END:
        tried.append((min([end, *(window for window in sizes if window >= _LEAST)]), longest))
    for window, length in tried:
        if length > longest:
            continue
        try:
            found = max(found, _compare_chain(target, length))
        except UnsupportedModelError:
            if not _LEAST <= window < end:
                raise
            _compare_chain(target, window - _REPLY)
            target.longest, target.blank = window, frozenset()
            return found
    if target.blank:
        with suppress(UnsupportedModelError):  # where they fail they stay
            for _, length in tried:
                if length <= longest:
                    _compare_chain(target, length, [min(target.blank)])
            target.blank = frozenset()
    return found


def _blank_ids(target: Target) -> frozenset[int]:
    """Ids whose embedding is zero, as that of padding is unless it was trained."""
    embedding: Any = target.model.get_input_embeddings()
    ids = torch.arange(target.vocabulary, device=target.device)
    return frozenset(int(each) for part in ids.split(_TOGETHER) for each in part[~embedding(part).any(-1)])


def named_sizes(target: Target) -> Iterator[int]:
    """Windows, chunks and numbers of chosen keys that the configuration names."""
    text = target.model.config.get_text_config(decoder=True)
    for name, value in text.to_dict().items():
        if any(part in name for part in _SIZE_NAMES) and not name.endswith("layers"):
            for size in value.values() if isinstance(value, dict) else (value,):
                if type(size) is int and size > 1:
                    yield size


def _compare_chain(target: ChainTarget, length: int, allowed: Sequence[int] = ()) -> float:
    """`probe_chain` of one text of `length` tokens, its reply of `allowed` ones, or any but `blank`."""
    random = np.random.default_rng(0)
    words = random.integers(0, min(target.vocabulary, 1000), 2 * _WORDS)
    prompt = torch.from_numpy(random.choice(words, length)).to(target.device)
    name = type(target.model).__name__
    if target.blank and not allowed:
        allowed = [token for token in range(target.vocabulary) if token not in target.blank]
    try:
        reply, wanted = _generated(target.model, prompt[None], allowed=allowed)
        wrong = [next(int(word) for word in words if word != token) for token in reply]

        def passed(cache: ChainCache, chain: list[int], kept: int) -> Tensor:
            """Logits after the first `kept` tokens of a chain, the others of which are refused."""
            ids = torch.tensor([chain], dtype=torch.int64, device=target.device)
            logits = target.verify(cache, TreeInputs(ids, ids, None, None))
            cache.commit(None, kept, kept)
            return logits[:kept]

        found = []
        for parts, chains in (
            (1, [(reply[:4], 4), (reply[4:5], 1)]),
            (
                2,
                [
                    ([reply[0], wrong[1]], 1),
                    ([*reply[1:3], *wrong[3:5]], 2),
                    (reply[3:4], 1),
                    (reply[4:6], 2),
                ],
            ),
        ):
            cache = target.cache(length)
            logits = [*target.prefill(cache, prompt, 1, -(-length // parts))]
            logits += [passed(cache, *chain) for chain in chains]
            together = torch.cat(logits)
            found.append(disagreement(together, wanted[: len(together)]))
    except RetrievalDraftError:
        raise
    except Exception as error:  # a model's own code raises anything
        raise UnsupportedModelError(
            f"{name} failed on several tokens after a state: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}",
            "Use model.generate for this model.",
        ) from error
    difference, limit = max(found), tolerance(target.model.dtype)
    # As for trees, NaN compares false.
    if difference > limit:
        raise UnsupportedModelError(
            f"{name} says something else for several tokens after a text of {length} than for one after "
            f"another: the logits differ by {difference:.2g} of their standard deviation, at most {limit:g} "
            "is allowed.",
            "Use model.generate for this model.",
        )
    return difference


def _generated(
    model: Any, prompt: Tensor, count: int = _REPLY, allowed: Sequence[int] = ()
) -> tuple[list[int], Tensor]:
    """A reply of `count` tokens by the model's own ``generate``, and its logits, (tokens, vocabulary).

    Args:
        model: Of transformers.
        prompt: int64, shape (1, length).
        count: Tokens of the reply.
        allowed: Tokens that may be chosen; none for any.
    """
    limits = {"prefix_allowed_tokens_fn": lambda *_: allowed} if allowed else {}
    config = GenerationConfig(
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)  # of settings that sampling alone would use
    try:
        with uncompiled(is_compiled(model)):
            out = type(model).generate(
                model, prompt, attention_mask=torch.ones_like(prompt), generation_config=config, **limits
            )
    finally:
        log.setLevel(level)
    return out.sequences[0, prompt.shape[1] :].tolist(), torch.cat(out.logits)


@torch.no_grad()
def probe(target: Target) -> float:
    """Compares a small tree's logits with those of its paths decoded token by token.

    Costs one pass over a few prompt tokens, one over 4 nodes and 4 over one token; as much again, with more
    nodes, on a text beyond each window that the configuration names and its layer types do not: models that
    choose keys by their index in the pass, not by position, fail only there. GPT-Neo cuts a
    window by index; Doge keeps the best keys, and of equal ones those that its search meets first.

    Args:
        target: The model.

    Returns:
        The largest difference found, RMS over the standard deviation of the logits.

    Raises:
        UnsupportedModelError: The model fails on trees or its logits differ from those for single tokens,
            as models with ALiBi or with code that ignores the mask do.
    """
    windows = [window for window in target.windows.values() if window is not None and window <= _LONG_WINDOW]
    tried = [(max([_PROMPT, *(window + 2 for window in windows)]), 2)]
    longest = 2 * _LONGEST_PROBE if target.max_positions is None else target.max_positions - 4
    tried += [
        (min(window + max(2, window // 4), longest), _MANY)
        for window in _own_windows(target)
        if window < longest
    ]
    found = max((_compare(target, *text) for text in tried if text[0] <= longest), default=0.0)
    _refuse_fixed_masks(target)
    _refuse_own_positions(target, min(tried[0][0], longest))
    target.passes_whole = _differs_in_parts(target, max(min(2 * tried[0][0], longest), 1))
    return found


def _refuse_own_positions(target: Target, length: int) -> None:
    """Refuses a model that reads the positions 0, 1, 2, ... otherwise than its own ``generate`` sets them.

    Some make positions of the token ids where none are given (Kosmos-2.5). Models whose ``generate`` does not
    take text alone are not tried.
    """
    if length < 1:
        return
    prompt = torch.from_numpy(np.random.default_rng(0).integers(1, min(target.vocabulary, 1000), length))
    prompt = prompt.to(target.device)
    try:
        reply, wanted = _generated(target.model, prompt[None], 2)
    except Exception as error:  # a model's own code raises anything
        _log.debug("%s generates nothing after a short text: %r", type(target.model).__name__, error)
        return
    cache = target.cache(length + 2)
    *_, first = target.prefill(cache, prompt, 1)
    *_, second = target.append(cache, prompt.new_tensor(reply[:1]), length)
    difference = disagreement(torch.cat([first[-1:], second[-1:]]), wanted)
    limit = tolerance(target.model.dtype)
    if difference > limit:
        raise UnsupportedModelError(
            f"{type(target.model).__name__} has other logits at given positions than in its own generate: "
            f"they differ by {difference:.2g} of their standard deviation, at most {limit:g} is allowed.",
            "Use model.generate for this model.",
        )


def _differs_in_parts(target: Target, length: int) -> bool:
    """True if a text of `length` tokens passed in two parts has other logits at its end than at once.

    As in models that read a prompt in both directions, or whose window layers forget between two passes.
    """
    prompt = torch.from_numpy(np.random.default_rng(0).integers(0, min(target.vocabulary, 1000), length))
    prompt, ends = prompt.to(target.device), []
    for parts in (1, 2):
        try:
            *_, logits = target.prefill(target.cache(length), prompt, 1, -(-length // parts))
        except Exception:  # a model's own code raises anything
            return True
        ends.append(logits[-1:])
    return disagreement(*ends) > tolerance(target.model.dtype)


def _refuse_fixed_masks(target: Target) -> None:
    """Refuses attention that cuts its mask from one for the longest text, by a token's index in the pass.

    Near its end it has no columns for the last nodes of a tree. Attention that transformers can exchange uses
    the given mask, even if a layer keeps another one.
    """
    longest = target.max_positions
    if longest is None or getattr(target.model, "_supports_sdpa", False):
        return
    for name, buffer in target.model.named_buffers():
        if buffer.shape[-2:] == (longest, longest):
            raise UnsupportedModelError(
                f"{type(target.model).__name__} has a mask of its own for {longest} tokens in a pass. "
                f"Near the end of so long a text the nodes of a tree lie outside it ({name}).",
                "Use model.generate for this model.",
            )


def _own_windows(target: Target) -> list[int]:
    """Windows and chunks that the configuration names beside those of its layer types."""
    text = target.model.config.get_text_config(decoder=True)
    known = set(target.windows.values())
    return [
        value
        for name, value in text.to_dict().items()
        if ("window" in name or "chunk" in name)
        and not name.endswith("layers")
        and type(value) is int
        and value not in known
        and _PROMPT < value <= _LONGEST_PROBE
    ]


def _compare(target: Target, length: int, width: int = 2) -> float:
    """`probe` of one text, with a tree of a root, its children, and last a child of the first of them.

    The more children, the further apart are a node's index in the pass and its position.
    """
    if target.rope is not None and length < target.rope.length <= length + 2:
        length = target.rope.length  # no tree reaches over it
    model, tokens = target.model, min(target.vocabulary, 1000)
    slots = tokens if target.max_positions is None else target.max_positions - length - 2
    width = min(width, tokens - 1, slots)
    random = np.random.default_rng(0)
    words = random.integers(0, tokens, _WORDS)
    prompt = torch.from_numpy(random.choice(words, length)).to(target.device)
    root, first, second = (int(token) for token in random.choice(words, 3))
    children = [(first + step) % tokens for step in range(width)]
    size = width + 2
    tree = DraftTree(
        tokens=np.array([root, *children, second], np.int32),
        parents=np.array([-1, *[0] * width, 1], np.int32),
        depths=np.array([0, *[1] * width, 2], np.int32),
        probs=np.ones(size, np.float32),
        path_probs=np.ones(size, np.float32),
        sources=np.zeros(size, np.int64),
    )
    last = size - 1
    try:
        cache = target.cache(length + size)
        for _ in target.prefill(cache, prompt, 1):
            pass
        together = target.verify_tree(cache, tree, length)[[0, 1, 2, last]]
        cache.drop()
        alone = []
        for node, position, keep in ((0, 0, 1), (2, 1, 0), (1, 1, 1), (last, 2, 0)):
            single = DraftTree.root(int(tree.tokens[node]))
            alone.append(target.verify_tree(cache, single, length + position)[:1])
            cache.commit(None, keep, keep)
            cache.drop()
        apart = torch.cat([alone[0], alone[2], alone[1], alone[3]])
    except RetrievalDraftError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} failed on a draft tree: {type(error).__name__}: {error}",
            "It may take no 4-D attention mask, or one cache layout only; use model.generate for this model.",
        ) from error
    difference, limit = disagreement(together, apart), tolerance(model.dtype)
    # NaN compares false: a model that returns NaN is reported when it generates, with the position.
    if difference > limit:
        raise UnsupportedModelError(
            f"{type(model).__name__} says something else for a tree than for its paths: the logits differ by "
            f"{difference:.2g} of their standard deviation, at most {limit:g} is allowed.",
            "It ignores the tree mask or the positions, as ALiBi does, or chooses keys by their index in the "
            "pass; use model.generate for this model.",
        )
    return difference
