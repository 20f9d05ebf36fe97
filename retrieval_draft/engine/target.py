"""The target model in the decoding loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.engine.attention.chain_inputs import ChainAttention
from retrieval_draft.engine.attention.cuda import CUDA_ATTENTION, cuda_attention
from retrieval_draft.engine.attention.packed import can_pack, packed_attention
from retrieval_draft.engine.attention.tree_mask import TreeAttention, TreeInputs
from retrieval_draft.engine.cache.kv_cache import SpeculativeCache, layer_windows
from retrieval_draft.engine.cache.packed_cache import PackedCache
from retrieval_draft.engine.compat import cache_parameter
from retrieval_draft.engine.cpu.attention import WIDE_ATTENTION
from retrieval_draft.engine.graph.arena import PassMemory
from retrieval_draft.engine.graph.attention import graph_attention
from retrieval_draft.engine.graph.graph_passes import NODES, GraphPasses, graph_kind
from retrieval_draft.engine.hidden_states import HiddenStates
from retrieval_draft.engine.logits import Wanted
from retrieval_draft.engine.placeholders import placeholder_ids, takes_media
from retrieval_draft.engine.rope_switch import RopeSwitch, rope_switch
from retrieval_draft.engine.sampling.node_draws import draw_words, drawn_summary
from retrieval_draft.engine.thread_choice import ThreadChoice
from retrieval_draft.engine.verification import Verification
from retrieval_draft.engine.wrapped_models import (
    check_decoder,
    check_generates,
    check_layers,
    device_of,
    is_compiled,
    uncompiled,
    unwrap,
)
from retrieval_draft.errors import UnsupportedModelError

__all__ = ["Target", "disagreement", "tolerance"]

_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
_HALF_TOLERANCE = 0.15
"""RMS difference over standard deviation. A mask or position that is ignored gives 0.1 to 1 in any dtype."""

_APPENDED = 2048
"""Tokens of text in one pass of `append`."""

_LOGIT_BYTES = 256 << 20
"""The most memory that prompt logits take at a time."""


Attention = TreeAttention | ChainAttention
"""Makes model inputs of drafts."""


class Target:
    """Forward passes over prompts and trees, through one reusable set of masks.

    Args:
        model: Any causal language model of transformers that takes a 4-D mask and positions. Wrappers of
            torch.compile or PEFT are removed.
        graphs: As `DraftConfig.graphs`.

    Raises:
        UnsupportedModelError: The model cannot verify trees.

    Attributes:
        verification: The way in which drafts are verified, and the reason for it.
        shares_passes: Whether the rows of a batch share a pass; each gets its own else.
        width: Nodes of every pass, the root included; None where passes have as many as are asked for.
        passes_whole: Whether a prompt is passed at once unless its caller asks for parts: its tokens may see
            later ones.
        passes_parts: Whether a prompt may be passed in parts, one after another.
        blank: Ids that are neither drafted nor drafted after. Their embedding is zero, so that all keys are
            equally good for them, and which of these the model keeps depends on the number of tokens passed,
            later ones included.
        graphs: Captured passes; None where all are eager.
        hidden_states: The layers that draft sources read.
        hidden: (n, d * number of those layers), their states at the tokens of the last pass, inside of
            `watching_hidden`; None outside.
    """

    verification = Verification("tree", "the model takes masks and positions of a tree")
    shares_passes = True
    width: int | None = None
    passes_whole = False
    passes_parts = True
    blank: frozenset[int] = frozenset()

    graphs: GraphPasses | None = None

    def __init__(self, model: PreTrainedModel, graphs: str = "auto") -> None:
        model = self._describe(model)
        self._compiled = is_compiled(model)
        self.threads: ThreadChoice | None = ThreadChoice() if self.device.type == "cpu" else None
        self.hidden_states = HiddenStates(model)
        parameters = inspect.signature(model.forward).parameters
        self._cache_parameter = cache_parameter(model)
        self._keeps_logits = "logits_to_keep" in parameters
        self._takes_mask = "attention_mask" in parameters
        self._takes_positions = "position_ids" in parameters
        self._watches_hidden = False
        self._wanted = Wanted()
        self._set_up()
        self.use_graphs(graphs)

    def _describe(self, model: PreTrainedModel) -> PreTrainedModel:
        """Reads the facts of a model that callers ask for. Returns the model without wrappers."""
        self.model = model = unwrap(model)
        check_generates(model)
        embedding: Any = model.get_input_embeddings()
        text = model.config.get_text_config(decoder=True)
        self.embedding_rows = int(embedding.weight.shape[0])
        self.vocabulary = min(self.embedding_rows, int(getattr(text, "vocab_size", self.embedding_rows)))
        limit = getattr(text, "max_position_embeddings", None)
        self.max_positions: int | None = limit if isinstance(limit, int) and limit > 0 else None
        self.rope: RopeSwitch | None = None
        self.device: torch.device = device_of(embedding)
        self.hidden: Tensor | None = None
        return model

    def _set_up(self) -> None:
        """Prepares for trees, or refuses the model."""
        _check(self.model)
        layers = layer_windows(self.model.config)
        self.windows = {kind: window for kind, window in layers if kind != "dummy"}
        self.rope = rope_switch(self.model)
        self.attention: Attention = self.attention_of_row()
        self._kinds = [kind for kind, _ in layers]
        self._rows_by: Callable[..., Tensor | None] | None = None

    def use_graphs(self, setting: str) -> None:
        """Has trees verified by captured passes from now on, or not; see `DraftConfig.graphs`."""
        kind = graph_kind(setting, self.device)
        if kind is None or self.rope is not None or self.verification.way != "tree":
            return  # rotary factors that depend on a text's length are chosen on the host

        def agrees(logits: Tensor, others: Tensor) -> bool:
            return disagreement(logits, others) <= tolerance(self.model.dtype)

        self.graphs = GraphPasses(
            self.model,
            self.device,
            self.windows,
            kind,
            self._rows_eagerly,
            self._call_fixed,
            agrees,
            self.vocabulary,
            self.max_positions,
        )
        self.attention = self.attention_of_row()

    @cached_property
    def takes_media(self) -> bool:
        """True if the model reads images, sound or video beside text."""
        return takes_media(self.model)

    @cached_property
    def placeholders(self) -> frozenset[int]:
        """Ids that stand for images and the like in a text."""
        return placeholder_ids(self.model.config) if self.takes_media else frozenset()

    @cached_property
    def media_ways(self) -> dict[Hashable, str]:
        """Kinds of inputs with images that were tried, with a reason against trees, empty for none."""
        return {}

    @cached_property
    def media_lock(self) -> Lock:
        """Held while inputs with images are prepared or passed: some models keep positions between both."""
        return Lock()

    @contextmanager
    def watching_hidden(self, wanted: bool = True) -> Iterator[None]:
        """Keeps the states that draft sources read, of each pass until the next, in `hidden`."""
        if not wanted or not self.hidden_states.layers:
            yield
            return
        with self.hidden_states.taken():
            self._watches_hidden = True
            try:
                yield
            finally:
                self._watches_hidden, self.hidden = False, None

    def _keep_hidden(self, last: int | None = None) -> None:
        """Keeps the states of the pass that has just run, at its last tokens, or all."""
        if self._watches_hidden:
            states = self.hidden_states.last
            self.hidden = None if states is None else states[0] if last is None else states[0, -last:]

    def cache(self, capacity: int, keeps_all: bool = False) -> Any:
        """An empty cache with room for `capacity` tokens: a `SpeculativeCache`, or a `ChainCache`."""
        return SpeculativeCache(self.model.config, capacity, keeps_all)

    @property
    def pass_memory(self) -> PassMemory | None:
        """The memory in which passes hold caches; None where caches stay in their own."""
        return self.graphs

    @property
    def captures(self) -> int:
        """Passes captured so far."""
        return 0 if self.graphs is None else self.graphs.captures

    def summarised_for(self, k: int, wanted: Wanted) -> Wanted:
        """Has captured passes summarise their logits for a `LogitReader`, before their trees are packed.

        Args:
            k: Its alternatives.
            wanted: Parts of the logits that the next pass's rows choose among. They never become fewer again,
                since passes would be captured anew each time.

        Returns:
            Parts that are read.
        """
        wanted = wanted._replace(best=min(wanted.best, self.vocabulary))
        if self.graphs is None:
            return wanted
        wanted = self._wanted = self._wanted.joined(wanted)
        k = min(k, self.vocabulary)
        self.graphs.summarised(
            (k, wanted, self.hidden_states.layers),
            partial(drawn_summary, k=k, wanted=wanted),
            self.draw_words,
        )
        return wanted

    @cached_property
    def logit_width(self) -> int:
        """Tokens that have logits; more than `vocabulary` where the last are padding."""
        head: Any = self.model.get_output_embeddings()
        return self.vocabulary if head is None else int(head.weight.shape[0])

    @property
    def draw_words(self) -> int:
        """Words of each tree for draws at its nodes."""
        return 0 if self.graphs is None else draw_words(self._wanted, self.logit_width)

    def summary_of(self, logits: Tensor) -> Tensor | None:
        """The summary of a captured pass's logits, made with them; None for others."""
        return None if self.graphs is None else self.graphs.summary_of(logits)

    def release(self, cache: Any) -> None:
        """Gives a cache memory of its own, before a caller keeps it."""
        if self.graphs is not None:
            self.graphs.release(cache)

    def prefill(self, cache: Any, prompt: Tensor, rows: int, chunk: int | None = None) -> Iterator[Tensor]:
        """Appends `prompt` to the cache.

        Args:
            cache: Receives the keys; the text that it holds comes before the prompt.
            prompt: int64, shape (length,), on the model's device.
            rows: Last positions whose logits are wanted, at least 1.
            chunk: Tokens in one pass at most.

        Yields:
            (m, vocabulary), float, logits of runs of positions in order, `rows` in all.
        """
        for logits in self.prefill_passes(cache, prompt, rows, chunk):
            if logits is not None:
                yield logits

    def prefill_passes(
        self,
        cache: Any,
        prompt: Tensor,
        rows: int,
        chunk: int | Callable[[], int | None] | None = None,
        further: int = 0,
    ) -> Iterator[Tensor | None]:
        """Runs `prefill`, yielding after every pass: None where none of its positions is wanted.

        `prompt` is int64, shape (length,). `chunk` may be a function that is called before each pass.
        `further` tokens belong to the text and are passed elsewhere.
        """
        length, offset = len(prompt), cache.get_seq_length()
        whole = offset + length + further
        if self.graphs is not None:
            self.graphs.recheck()
        if self.passes_whole and (chunk() if callable(chunk) else chunk) is None:
            yield self._forward(cache, prompt[None], offset, rows, whole)
            return
        together = max(16, _LOGIT_BYTES // (4 * self.vocabulary))
        done = 0
        while done < length:
            most = chunk() if callable(chunk) else chunk
            size = length - done if most is None else min(most, length - done)
            wanted = min(size, done + size - (length - rows))
            if wanted > together:
                # Stop where at most `together` of the positions so far are wanted.
                size = min(size, max(length - rows - done, 0) + together)
                wanted = min(size, done + size - (length - rows))
            part = prompt[None, done : done + size]
            logits = self._forward(cache, part, offset + done, max(wanted, 1), whole)
            done += size
            yield logits if wanted > 0 else None

    def append(self, cache: Any, text: Tensor, offset: int) -> Iterator[Tensor]:
        """Appends `text`, int64, shape (length,), after `offset` cached tokens, in runs of `_APPENDED`.

        Yields:
            (1, vocabulary), float, logits after each run.
        """
        whole = offset + len(text)
        for part in text.split(_APPENDED):
            yield self._forward(cache, part[None], offset, 1, whole)
            offset += len(part)

    def refill(self, cache: Any, text: Tensor, chunk: int | None) -> None:
        """Passes a text, int64, shape (length,), to an empty cache; one more token follows elsewhere."""
        for _ in self.prefill_passes(cache, text, 1, chunk, further=1):
            pass

    def max_depth(self, root: int, wanted: int) -> int:
        """The largest depth, at most `wanted`, of drafts below a root at position `root`."""
        return wanted if self.rope is None else self.rope.max_depth(root, wanted)

    def _forward(self, cache: Any, ids: Tensor, offset: int, keep: int, whole: int) -> Tensor:
        """A pass over a part of a text of `whole` tokens."""
        end = offset + ids.shape[1]
        positions = torch.arange(offset + cache.shift, end + cache.shift, device=ids.device)[None]
        extra = None if self.rope is None else self.rope.extra_position(end, whole)
        if extra is None:
            logits = self._call(cache, ids, positions, None, keep)
            self._keep_hidden()
            return logits
        ids = torch.cat([ids, ids[:, -1:]], 1)
        positions = torch.cat([positions, positions.new_tensor([[extra]])], 1)
        logits = self._call(cache, ids, positions, None, keep + 1)[:-1]
        self._keep_hidden()
        self.hidden = None if self.hidden is None else self.hidden[:-1]
        kept = cache.keep(end)
        assert kept, "a window layer holds one token more than it sees"
        cache.made_for(whole)
        return logits

    def _call(
        self, cache: Any, ids: Tensor, positions: Tensor, mask: Any, keep: int, timed: bool = True
    ) -> Tensor:
        options = {self._cache_parameter: cache}
        if self._keeps_logits:
            options["logits_to_keep"] = keep
        factors = nullcontext() if self.rope is None else self.rope.as_new()
        with uncompiled(self._compiled), cuda_attention(self.model, self.device), factors:
            forward = partial(
                self.model,
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                return_dict=True,
                **options,
            )
            threads = self.threads if timed else None
            out = forward() if threads is None else threads.run(ids.shape[1], forward)
        logits: Tensor = out.logits[0] if len(ids) == 1 else out.logits.flatten(0, 1)
        return logits if self._keeps_logits else logits[-keep:]

    def verify(self, cache: Any, inputs: TreeInputs) -> Tensor:
        """One pass over a tree, whose nodes stay staged in the cache.

        Returns:
            (n, vocabulary), float, logits after each node, padded nodes included; they hold until the next
            pass.
        """
        logits = None if self.graphs is None else self.graphs.verify(cache, inputs)
        return self._verify_eagerly(cache, inputs) if logits is None else self._captured(logits)

    def _captured(self, logits: Tensor) -> Tensor:
        """The logits of the captured pass that has just run, whose states are kept."""
        if self._watches_hidden and self.graphs is not None:
            hidden = self.graphs.hidden
            self.hidden = None if hidden is None else hidden.clone()
        return logits

    def _call_fixed(
        self, cache: Any, ids: Tensor, positions: Tensor, mask: Any
    ) -> tuple[Tensor, Tensor | None]:
        """A pass to be captured: its logits, and the states that draft sources read, row by row."""
        with self.hidden_states.taken(), graph_attention(self.model):
            logits = self._call(cache, ids, positions, mask, ids.shape[1], timed=False)
            states = self.hidden_states.last
        return logits, None if states is None else states.flatten(0, 1)

    def _verify_eagerly(self, cache: Any, inputs: TreeInputs) -> Tensor:
        cache.stage(True)
        try:
            logits = self._call(
                cache, inputs.input_ids, inputs.position_ids, inputs.attention_mask, inputs.input_ids.shape[1]
            )
        finally:
            cache.stage(False)
        self._keep_hidden()
        return logits

    def verify_rows(self, caches: Sequence[Any], inputs: Sequence[TreeInputs]) -> Tensor:
        """One pass over the trees of several requests, whose nodes stay staged in their caches.

        Args:
            caches: One for each request.
            inputs: Their trees, from a `TreeAttention` each.

        Returns:
            (nodes of all, vocabulary), float, logits after each node, padded nodes included; `begins` tells
            where those of each request begin.
        """
        if len(caches) == 1:
            return self.verify(caches[0], inputs[0])
        logits = None if self.graphs is None else self.graphs.verify_rows(caches, inputs)
        return self._rows_eagerly(caches, inputs) if logits is None else self._captured(logits)

    def begins(self, logits: Tensor, inputs: Sequence[TreeInputs]) -> list[int]:
        """First row of `verify_rows`'s logits, (nodes of all, vocabulary), of each request.

        Example:
            trees of 8 nodes: 0, 8, 16; from a captured pass, the requests in lanes 2, 0, 1: 16, 0, 8
        """
        lanes = [given.lane for given in inputs]
        if len(inputs) > 1 and self.graphs is not None and self.graphs.made(logits):
            return [lane[0].nodes * lane[1] for lane in lanes if lane is not None]
        begins, at = [], 0
        for given in inputs:
            begins.append(at)
            at += given.input_ids.shape[1]
        return begins

    def _rows_eagerly(self, caches: Sequence[Any], inputs: Sequence[TreeInputs]) -> Tensor:
        """`verify_rows`, one request after the other, without captured passes."""
        if len(caches) == 1:
            return self._verify_eagerly(caches[0], inputs[0])
        if self._rows_by is None:
            return self._settle_rows(caches, inputs)
        logits = self._rows_by(caches, inputs)
        if logits is not None:
            return logits
        return (
            self._one_by_one(caches, inputs)
            if self._rows_by == self._joined
            else self._settle_rows(caches, inputs)
        )

    def _settle_rows(self, caches: Sequence[SpeculativeCache], inputs: Sequence[TreeInputs]) -> Tensor:
        """Tries each variant of `_rows_eagerly` until one agrees with the rows alone, and keeps that one.

        A model that changes its values between cache and attention (DiffLlama), or makes its own mask, gives
        other logits where the rows' keys are found by the tensors that the cache was given.
        """
        alone = self._one_by_one(caches, inputs)
        for way in (self._packed, self._joined):
            for cache in caches:
                cache.drop()
            logits = way(caches, inputs)
            if logits is not None and not disagreement(logits, alone) > tolerance(self.model.dtype):
                self._rows_by = way
                return logits
        for cache in caches:
            cache.drop()
        self._rows_by = self._one_by_one
        return self._one_by_one(caches, inputs)

    def _packed(self, caches: Sequence[SpeculativeCache], inputs: Sequence[TreeInputs]) -> Tensor | None:
        """The rows side by side, each attending to its own keys; None where some layer did not."""
        if not can_pack(self.model):
            return None
        ids, positions = _side_by_side(inputs)
        packed = PackedCache(caches, inputs, self._kinds)
        # Any mask of four dimensions keeps the model from making its own; ours are the requests' own.
        unused = ids.new_zeros((1, 1, 1, 1), dtype=self.model.dtype)
        with cuda_attention(self.model, self.device), packed_attention(self.model, packed):
            logits = self._call(packed, ids, positions, unused, ids.shape[1])
        self._keep_hidden()
        if packed.is_read:
            return logits
        packed.drop()
        return None

    def _joined(self, caches: Sequence[SpeculativeCache], inputs: Sequence[TreeInputs]) -> Tensor | None:
        """The rows side by side over the keys of all, under one mask.

        Returns:
            None for more keys than a text may have: attention of some models holds a mask of its own for so
            many and no more.
        """
        ids, positions = _side_by_side(inputs)
        keys = sum(cache.get_seq_length() for cache in caches) + ids.shape[1]
        if self.max_positions is not None and keys > self.max_positions:
            return None
        joined = PackedCache(caches, inputs, self._kinds, joined=True)
        logits = self._call(joined, ids, positions, joined.joined_mask(), ids.shape[1])
        self._keep_hidden()
        return logits

    def _one_by_one(self, caches: Sequence[Any], inputs: Sequence[TreeInputs]) -> Tensor:
        return self._each(self._verify_eagerly, caches, inputs)

    def _each(
        self, verify: Callable[..., Tensor], caches: Sequence[Any], inputs: Sequence[TreeInputs]
    ) -> Tensor:
        """A pass for each request: logits of all, and their states."""
        logits, hidden = [], []
        for cache, given in zip(caches, inputs, strict=True):
            logits.append(verify(cache, given))
            if self.hidden is not None:
                hidden.append(self.hidden)
        if hidden:
            self.hidden = torch.cat(hidden)
        return torch.cat(logits)

    def attention_of_row(self) -> Attention:
        """Masks for one more request beside others; `attention` serves one that is alone."""
        sizes = NODES if self.graphs is not None else ()
        return TreeAttention(self.windows, self.model.dtype, self.device, sizes)

    def verify_tree(
        self, cache: Any, tree: DraftTree, length: int, moved: NDArray[np.int64] | None = None
    ) -> Tensor:
        """Runs `verify` on a tree without a pending commit, for probes and measurements.

        Args:
            cache: Holds `length` committed tokens.
            tree: The tree to verify, the root included.
            length: Committed tokens; the root's position, unless the cache shifts it.
            moved: int64, shape (m,). As for `TreeAttention.prepare`.
        """
        return self.verify(cache, self.attention.prepare(tree, length, moved, cache.shift))


def disagreement(logits: Tensor, others: Tensor) -> float:
    """The largest RMS difference of two rows, over the second's standard deviation: (n, vocabulary) each."""
    logits, others = logits.float(), others.float()
    return float(((logits - others).square().mean(-1).sqrt() / (others.std(-1) + 1e-9)).max())


def tolerance(dtype: torch.dtype) -> float:
    """The most `disagreement` that rounding can explain."""
    return _TOLERANCE.get(dtype, _HALF_TOLERANCE)


def _side_by_side(inputs: Sequence[TreeInputs]) -> tuple[Tensor, Tensor]:
    """Tokens and positions of all trees in one row: int64, (1, nodes of all) each."""
    ids = torch.cat([given.input_ids for given in inputs], 1)
    return ids, torch.cat([given.position_ids for given in inputs], 1)


def _check(model: PreTrainedModel) -> None:
    """Refuses models that are known not to work, before anything runs."""
    check_decoder(model)
    name = type(model).__name__
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModelError(
            f"{name} has recurrent state, which cannot be rolled back after a rejected draft token.",
            "Use model.generate for this model.",
        )
    check_layers(model)
    text = model.config.get_text_config(decoder=True)
    for implementation in {model.config._attn_implementation, text._attn_implementation}:
        if implementation not in ("sdpa", "eager", WIDE_ATTENTION, CUDA_ATTENTION, None):
            raise UnsupportedModelError(
                f"{name} uses attention implementation {implementation!r}, which ignores tree masks.",
                'Load it with attn_implementation="sdpa".',
            )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(
            f"{name}.forward takes no position_ids, so the nodes of a tree cannot be placed.",
            "Use model.generate for this model.",
        )
