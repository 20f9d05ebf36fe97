"""Decoder layers on the CPU in one parallel section, where modules take a dozen and Python between each."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from retrieval_draft.engine.compat import cache_parameter
from retrieval_draft.engine.cpu.attention import wide_attention_forward
from retrieval_draft.engine.cpu.linear import CpuLinear, LayerKernels
from retrieval_draft.engine.cpu.linear_kernels import PAIRS, ROWS, CompiledLinear
from retrieval_draft.engine.cpu.norm import CpuNorm, Norm
from retrieval_draft.engine.cpu.stage_program import At, StageProgram, stage_function
from retrieval_draft.engine.substitution import is_free, is_ordinary_call, lend_attention

__all__ = ["CpuDecoderLayers"]

MOST_TOKENS = 64
"""The largest pass of the kernels."""

ATTENTION_TOKENS = {torch.float32: 32, torch.bfloat16: 16}
"""The largest pass whose attention is ours, measured; of more, torch's is as fast."""

_SAVED = 2e-4
"""Seconds that a layer's programs save for sure: in Python and starts of threads, 300 to 500 µs measured."""

_TRIED = (3, 2, 1, 4, 8, 16, 32)
"""Numbers of tokens of which one is tried: the first for which our matrix kernels are the fastest."""

_TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 0.02}
"""RMS difference to the module's own result over its deviation that rounding explains."""

_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_HEAD_NORMS = ("q_norm", "k_norm")
_ALIGNED = 64

Forward = Callable[..., Any]

_LOG = logging.getLogger("retrieval_draft")


@dataclass(frozen=True, slots=True)
class _Calls:
    """The arguments of a layer's cache and attention, beside tensors.

    Attributes:
        cache_name: The layer's argument for the cache, which transformers renamed.
        layer_index: The layer's number in the cache.
        fixed: Arguments of the attention that are the same in each call.
        passed: Arguments of the layer that its attention gets.
        activation: `SILU` or `GELU_TANH`.
        head: Dimension of a head.
    """

    cache_name: str
    layer_index: int
    fixed: dict[str, Any]
    passed: tuple[str, ...]
    activation: int
    head: int

    @property
    def is_usual_attention(self) -> bool:
        """True if nothing that the attention is given changes the formula."""
        fixed = {name: value for name, value in self.fixed.items() if value is not None}
        return (
            isinstance(fixed.get("scaling"), float)
            and fixed.get("dropout", 0.0) == 0.0
            and fixed.keys() <= {"scaling", "dropout", "sliding_window"}
        )


class CpuDecoderLayers:
    """Faster ``forward`` functions for decoder layers of the usual structure.

    A layer counts as one when it has the parts, by the names that transformers gives them (RMS norms,
    separate projections of queries, keys and values, a gated MLP), and its own results on random inputs are
    reproduced: queries, keys and values as its attention gets them, and its output. Others keep their
    modules.

    Args:
        model: Any model of transformers.
        linear: Its linear layers.
        norm: Its norms.
    """

    def __init__(self, model: Any, linear: CpuLinear, norm: CpuNorm) -> None:
        self._model = model
        self._linear = linear
        self._norm = norm
        self._known: WeakKeyDictionary[nn.Module, tuple[_Parts, _Calls] | None] = WeakKeyDictionary()
        self._flow = _Flow()

    def prepare(self) -> None:
        """Observes the layers that are new, or have other parameters than before."""
        for module in list(self._model.modules()):
            known = self._known.get(module)
            if (module in self._known and known is None) or (known is not None and known[0].is_current()):
                continue
            if isinstance(getattr(module, "self_attn", None), nn.Module) and _is_free(module):
                parts = self._parts(module)
                calls = None if parts is None else _observe(self._model, module, parts)
                self._known[module] = None if parts is None or calls is None else (parts, calls)

    def forwards(self) -> Iterator[tuple[nn.Module, Forward]]:
        """Each layer whose results are reproduced with its faster ``forward``."""
        for module, known in list(self._known.items()):
            if known is not None and _is_free(module) and known[0].is_current():
                known[0].refresh()
                yield module, _forward(module, *known, self._flow)

    def _parts(self, layer: Any) -> _Parts | None:
        attention, mlp = layer.self_attn, getattr(layer, "mlp", None)
        linear = {}
        for name in _LINEAR:
            module = getattr(attention if name in _LINEAR[:4] else mlp, name, None)
            made = None if module is None else self._linear.kernels(module)
            if made is None:
                return None
            linear[name] = made
        names = ["input_layernorm", "post_attention_layernorm"]
        if hasattr(layer, "pre_feedforward_layernorm"):
            names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        modules = {name: getattr(layer, name, None) for name in names}
        if hasattr(attention, "q_norm") or hasattr(attention, "k_norm"):
            modules |= {name: getattr(attention, name, None) for name in _HEAD_NORMS}
        norms = {name: None if norm is None else self._norm.norm(norm) for name, norm in modules.items()}
        found = {name: norm for name, norm in norms.items() if norm is not None}
        if len(found) < len(norms) or not _fit(linear, found, getattr(attention, "head_dim", None)):
            return None
        return _Parts(layer, linear, found)


def _fit(linear: dict[str, LayerKernels], norms: dict[str, Norm], head: Any) -> bool:
    """True if all are of one dtype and of shapes for each other: kernels read memory by them.

    Args:
        linear: By name, the matrices.
        norms: By name.
        head: The dimension of a head.
    """
    from retrieval_draft.engine.cpu._kernels.stages import MAX_HEAD, MAX_ROW

    if not isinstance(head, int) or not 0 < head <= MAX_HEAD or head % 2:
        return False
    q, k, v, o, gate, up, down = (tuple(linear[name].weight.shape) for name in _LINEAR)
    width = q[1]
    return (
        len({made.weight.dtype for made in linear.values()} | {norm.weight.dtype for norm in norms.values()})
        == 1
        and width <= MAX_ROW
        and all(rows % head == 0 for rows, _ in (q, k, v))
        and k == v
        and k[1] == width
        and q[0] % k[0] == 0
        and o == (width, q[0])
        and gate == up == (gate[0], width)
        and down == (width, gate[0])
        and all(len(norm.scale) == (head if name in _HEAD_NORMS else width) for name, norm in norms.items())
    )


class _Parts:
    """A layer's matrices and norms, and its two programs for each number of tokens.

    It holds parameters and the layer's modules, but not the layer, which could then not be freed.

    Args:
        layer: A decoder layer.
        linear: Kernels of the matrices, by name.
        norms: By name.
    """

    def __init__(self, layer: Any, linear: dict[str, LayerKernels], norms: dict[str, Norm]) -> None:
        self.linear, self.norms = linear, norms
        self.dtype: torch.dtype = layer.self_attn.q_proj.weight.dtype
        self.width = int(layer.self_attn.q_proj.weight.shape[1])
        self.own: Forward = type(layer).forward
        self._hooks = [
            hooks
            for module in layer.modules()
            if module is not layer
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        inner = [getattr(layer.self_attn, name, None) or getattr(layer.mlp, name) for name in _LINEAR]
        known: list[tuple[dict[str, Any], str, Any]] = [
            (module._parameters, name, parameter)
            for module in inner
            for name, parameter in module._parameters.items()
        ]
        known += [(norm.parameters, "weight", norm.weight) for norm in norms.values()]
        # Another module may come to stand for one of these, as an adapter does.
        known += [
            (module._modules, name, child)
            for module in layer.modules()
            for name, child in module._modules.items()
        ]
        self._holders, self._names, self._known = zip(*known, strict=True)
        self._registered = -1
        self._addresses = [tensor.data_ptr for made in linear.values() for tensor in made.tensors]
        self._programs: dict[int, tuple[list[int], _Programs | None]] = {}

    def is_current(self) -> bool:
        """True while modules and parameters are those that were read, and no module in the layer has hooks.

        After a matrix nothing of Python is left in the caches of the processor, and each object that is
        looked at takes a fifth of a microsecond: hooks are looked at when any have been registered.
        """
        registered = RemovableHandle.next_id
        if registered != self._registered:
            if any(self._hooks):
                return False
            self._registered = registered
        return all(map(is_, map(dict.get, self._holders, self._names), self._known))

    def layers(self, tokens: int) -> dict[str, CompiledLinear] | None:
        """Our kernels for so many tokens; None where others save more time than the programs do."""
        found: dict[str, CompiledLinear] = {}
        lost = 0.0
        for name, made in self.linear.items():
            _, ours, loss = made.by_tokens[tokens]
            if not isinstance(ours, CompiledLinear):
                return None
            found[name] = ours
            lost += loss
        if len({layer.is_ordered for layer in found.values()}) > 1 or lost > _SAVED:
            return None
        return found

    def refresh(self) -> None:
        """Reads the weights of norms again, which may have been changed in place."""
        for norm in self.norms.values():
            norm.refresh()

    def programs(self, tokens: int, calls: _Calls) -> _Programs | None:
        """The layer's programs; None where our kernels are not the fastest.

        Args:
            tokens: Number of tokens, at most `MOST_TOKENS`.
            calls: Those of the layer.
        """
        found = self._programs.get(tokens)
        if found is None or (found[1] is not None and found[0] != [address() for address in self._addresses]):
            layers = self.layers(tokens)
            made = None
            if layers is not None:
                before = _Before(layers, self.norms, tokens, calls.head, self.dtype)
                after = _After(layers, self.norms, tokens, calls.activation, self.dtype)
                whole = None
                if (
                    calls.is_usual_attention
                    and tokens <= ATTENTION_TOKENS[self.dtype]
                    and _can_attend(calls.head)
                ):
                    whole = _Whole(layers, self.norms, tokens, calls, self.dtype)
                made = before, after, whole
            found = self._programs[tokens] = [address() for address in self._addresses], made
        return found[1]


class _Builder:
    """A program over scratch memory, which grows as stages need it."""

    def __init__(self, bases: tuple[str, ...], tokens: int, dtype: torch.dtype) -> None:
        from retrieval_draft.engine.cpu._kernels.vector_tile import LANES

        self.program = StageProgram((*bases, "scratch"))
        self.bytes = 0
        self._tokens = tokens
        self._columns = -(-tokens // LANES) * LANES
        self._half = int(dtype is torch.bfloat16)
        self._size = dtype.itemsize

    def room(self, elements: int, size: int = 0) -> At:
        """Scratch memory for so many elements of `size` bytes, by default the dtype's."""
        at = At("scratch", self.bytes)
        self.bytes += -(-elements * (size or self._size) // _ALIGNED) * _ALIGNED
        return at

    def norm(
        self, x: At, length: int, *, first: Norm | None = None, residual: At | None = None,
        out: At | None = None, second: Norm | None = None, ordered: bool = False,
    ) -> At:  # fmt: skip
        """Adds a stage of `add_and_norm`, and returns the rows normed by `second`, float32."""
        y = self.room(self._tokens * length if second else 0, 4)
        self.program.stage(
            stage_function("add_and_norm"),
            [
                0, x, residual or 0, first.address if first else 0, out or 0, second.address if second else 0,
                y, self._tokens, length,
                *(_bits(norm.eps if norm else 0.0) for norm in (first, second)),
                *(int(norm.twice) if norm else 0 for norm in (first, second)), self._half, int(ordered),
            ],
        )  # fmt: skip
        self.program.barrier()
        return y

    def multiply(self, x: At, layers: list[CompiledLinear], outs: list[At], given: bool = False) -> None:
        """Adds stages that multiply the same rows, and writes each product to one of `outs`.

        Args:
            x: The rows: float32 in the kernels' order, or, if `given`, as a module gives them.
            layers: Matrices that need no product of another.
            outs: (tokens, rows) of each.
            given: Whether x is of the dtype.
        """
        length, ordered = layers[0].length, layers[0].is_ordered
        half = self._half if given else 0
        laid_out: dict[int, At] = {}
        for packing in sorted({layer.packing for layer in layers}):
            if packing == ROWS and not (given and (half or ordered)):
                laid_out[packing] = x
                continue
            columns = 0 if packing == ROWS else self._columns
            y = self.room(length * (columns or self._tokens), 4)
            self.program.stage(
                stage_function("layout"),
                [
                    0, x, y, self._tokens, length, half, columns, int(ordered and half),
                    int(packing == PAIRS),
                ],
            )  # fmt: skip
            laid_out[packing] = y
        if any(y is not x for y in laid_out.values()):
            self.program.barrier()
        for layer, out in zip(layers, outs, strict=True):
            source = laid_out[layer.packing]
            # The job wants integers; addresses of input and output are put in afterwards.
            fields: list[int | At] = [*layer.job(0, 0, self._tokens)]
            fields[2], fields[4] = source, out
            self.program.stage(layer.function, fields)
        self.program.barrier()

    def before(
        self, layers: dict[str, CompiledLinear], norms: dict[str, Norm], head: int, heads: At,
        outs: Sequence[tuple[At, int | At, int] | None],
    ) -> None:  # fmt: skip
        """Adds the stages from a layer's input, `x`, to its queries, keys and values.

        Args:
            layers: The matrices, by name.
            norms: The norms, by name.
            head: Dimension of a head.
            heads: Memory of the three, each (tokens, heads, dim).
            outs: For each of the three an address, and the elements there from a head to the next and from a
                token to the next; None if it stays in `heads`.
        """
        matrices = [layers[name] for name in _LINEAR[:3]]
        starts = [0, matrices[0].rows, matrices[0].rows + matrices[1].rows]
        at = [At(heads.base, heads.offset + self._size * self._tokens * start) for start in starts]
        first = matrices[0]
        y = self.norm(At("x"), first.length, second=norms["input_layernorm"], ordered=first.is_ordered)
        self.multiply(y, matrices, at)
        for index, norm in enumerate((norms.get("q_norm"), norms.get("k_norm"), None)):
            rows, turns = matrices[index].rows, index < 2
            out, from_head, from_token = outs[index] or (at[index], head, rows)
            if turns or outs[index]:
                self.program.stage(
                    stage_function("head_positions"),
                    [
                        0, at[index], norm.address if norm else 0, At("cos") if turns else 0,
                        At("sin") if turns else 0, self._tokens, rows // head, head,
                        _bits(norm.eps if norm else 0.0), int(norm.twice) if norm else 0, self._half, out,
                        from_head, from_token,
                    ],
                )  # fmt: skip

    def attend(self, query: At, out: At, heads: int, groups: int, dim: int, scale: float) -> None:
        """Adds a stage of `attend`, of keys, values and a mask given when the program runs.

        Args:
            query: (tokens, heads, dim).
            out: The same.
            heads: Heads of queries.
            groups: Heads of keys.
            dim: Dimension of a head.
            scale: Scale of the scores.
        """
        from retrieval_draft.engine.cpu._kernels.stages import MAX_QUERIES

        some = min(-(-self._tokens * heads // max(torch.get_num_threads(), groups)), MAX_QUERIES)
        key, value, mask, keys, key_stride, value_stride, mask_stride, times, is_bool = map(
            At, _ATTENTION[2:]
        )
        self.program.stage(
            stage_function("attend"),
            [
                0, query, key, value, mask, out, self._tokens, heads, dim, keys, key_stride, value_stride,
                mask_stride, times, _bits(scale), self._half, is_bool, some,
            ],
        )  # fmt: skip
        self.program.barrier()

    def after(
        self, layers: dict[str, CompiledLinear], norms: dict[str, Norm], activation: int, attended: At
    ) -> None:
        """Adds the stages from the output of a layer's attention, beside its input, to its output, `out`.

        Args:
            layers: The matrices, by name.
            norms: The norms, by name.
            activation: `SILU` or `GELU_TANH`.
            attended: The attention's output, (tokens, heads, dim).
        """
        tokens = self._tokens
        o, gate, up, down = (layers[name] for name in _LINEAR[3:])
        product = self.room(tokens * o.rows)
        self.multiply(attended, [o], [product], given=True)
        hidden = self.room(tokens * o.rows)
        is_sandwich = "pre_feedforward_layernorm" in norms
        y = self.norm(
            product,
            o.rows,
            first=norms["post_attention_layernorm"] if is_sandwich else None,
            residual=At("x"),
            out=hidden,
            second=norms["pre_feedforward_layernorm" if is_sandwich else "post_attention_layernorm"],
            ordered=gate.is_ordered,
        )
        gates, ups = self.room(tokens * gate.rows), self.room(tokens * gate.rows)
        self.multiply(y, [gate, up], [gates, ups])
        inner = self.room(tokens * gate.rows, 4)
        self.program.stage(
            stage_function("gate"),
            [0, gates, ups, inner, tokens, gate.rows, activation, self._half, int(down.is_ordered)],
        )
        self.program.barrier()
        product = self.room(tokens * down.rows)
        self.multiply(inner, [down], [product])
        self.norm(
            product,
            down.rows,
            first=norms["post_feedforward_layernorm"] if is_sandwich else None,
            residual=hidden,
            out=At("out"),
        )


_ATTENTION = (
    "new key", "new value", "key", "value", "mask", "keys", "key stride", "value stride", "mask stride",
    "times", "bool",
)  # fmt: skip
"""Addresses and numbers of a layer's keys, values and mask that are known when it runs."""


class _Before:
    """From a layer's input to the queries, keys and values of its attention.

    Args:
        layers: The matrices, by name.
        norms: The norms, by name.
        tokens: Number of tokens.
        head: Dimension of a head.
        dtype: Type of the layer.
    """

    def __init__(
        self, layers: dict[str, CompiledLinear], norms: dict[str, Norm], tokens: int, head: int,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        made = _Builder(("x", "cos", "sin", "heads"), tokens, dtype)
        made.before(layers, norms, head, At("heads"), (None, None, None))
        self._program, self._bytes, self._dtype = made.program, made.bytes, dtype
        rows = [layers[name].rows for name in _LINEAR[:3]]
        self._elements = tokens * sum(rows)
        # Shapes, strides and offsets of (1, heads, tokens, dim) in memory of (tokens, heads, dim).
        self._views = [
            ((1, count // head, tokens, head), (count * tokens, head, count, 1), tokens * start)
            for count, start in zip(rows, (0, rows[0], rows[0] + rows[1]), strict=True)
        ]

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        """Queries, keys and values, (1, heads, tokens, dim) each, of x, (1, tokens, width)."""
        heads = torch.empty(self._elements, dtype=self._dtype, device="cpu")
        scratch = torch.empty(self._bytes, dtype=torch.uint8, device="cpu")
        addresses = [tensor.data_ptr() for tensor in (x, cos, sin, heads, scratch)]
        self._program.run(addresses, torch.get_num_threads())
        return [heads.as_strided(*view) for view in self._views]


class _After:
    """From the output of a layer's attention to the layer's.

    Args:
        layers: The matrices, by name.
        norms: The norms, by name.
        tokens: Number of tokens.
        activation: `SILU` or `GELU_TANH`.
        dtype: Type of the layer.
    """

    def __init__(
        self, layers: dict[str, CompiledLinear], norms: dict[str, Norm], tokens: int, activation: int,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        made = _Builder(("x", "out", "attended"), tokens, dtype)
        made.after(layers, norms, activation, At("attended"))
        self._program, self._bytes = made.program, made.bytes

    def __call__(self, x: Tensor, attended: Tensor) -> Tensor:
        """The layer's output, (1, tokens, width), of its input and the attention's output, contiguous."""
        out = torch.empty_like(x)
        scratch = torch.empty(self._bytes, dtype=torch.uint8, device="cpu")
        addresses = [tensor.data_ptr() for tensor in (x, out, attended, scratch)]
        self._program.run(addresses, torch.get_num_threads())
        return out


class _Whole:
    """From a layer's input to its output; keys and values are written where the attention reads them.

    Args:
        layers: The matrices, by name.
        norms: The norms, by name.
        tokens: Number of tokens.
        calls: Those of the layer, of the usual attention.
        dtype: Type of the layer.
    """

    def __init__(
        self, layers: dict[str, CompiledLinear], norms: dict[str, Norm], tokens: int, calls: _Calls,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        q, k, v, o = (layers[name] for name in _LINEAR[:4])
        self._tokens, self._heads, self._head, self._dtype = tokens, q.rows // calls.head, calls.head, dtype
        head = calls.head
        made = _Builder(("x", "cos", "sin", "out", *_ATTENTION), tokens, dtype)
        heads, attended = made.room(tokens * (q.rows + k.rows + v.rows)), made.room(tokens * o.length)
        keys, values = ((At(f"new {name}"), At(f"{name} stride"), head) for name in ("key", "value"))
        made.before(layers, norms, head, heads, (None, keys, values))
        made.program.barrier()
        scale = float(calls.fixed["scaling"])
        made.attend(heads, attended, self._heads, k.rows // head, head, scale)
        made.after(layers, norms, calls.activation, attended)
        self._program, self._bytes = made.program, made.bytes

    def given(self, key: Tensor, value: Tensor, mask: Any) -> tuple[int, ...] | None:
        """The values of `_ATTENTION`; None for what the stage does not read.

        Args:
            key: (1, heads of keys, keys, dim), as `value`; the last ones are to be written.
            value: Rows are contiguous, as those of keys.
            mask: (1, 1, tokens, keys), or None, which for one token means that all is seen.
        """
        tokens, dtype = self._tokens, self._dtype
        _, groups, keys, dim = key.shape
        strides = key.stride(), value.stride()
        if not (
            key.shape == value.shape
            and key.dtype is value.dtype is dtype
            and dim == self._head
            and keys >= tokens
            and strides[0][2:] == strides[1][2:] == (dim, 1)
        ):
            return None
        at, stride, is_bool = 0, 0, False
        if mask is None:
            if tokens > 1:
                return None
        elif mask.shape == (1, 1, tokens, keys) and mask.stride(3) == 1 and mask.dtype in (dtype, torch.bool):
            at, stride, is_bool = mask.data_ptr(), mask.stride(2), mask.dtype is torch.bool
        else:
            return None
        keys_at, values_at, begin = key.data_ptr(), value.data_ptr(), (keys - tokens) * dim * dtype.itemsize
        return (
            keys_at + begin, values_at + begin, keys_at, values_at, at, keys, strides[0][1], strides[1][1],
            stride, self._heads // groups, int(is_bool),
        )  # fmt: skip

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, attention: tuple[int, ...]) -> Tensor:
        """The layer's output, (1, tokens, width).

        Args:
            x: Its input, of that shape.
            cos: Of each token's position, (1, tokens, dim).
            sin: As cos.
            attention: The values of `_ATTENTION`.
        """
        out = torch.empty_like(x)
        scratch = torch.empty(self._bytes, dtype=torch.uint8, device="cpu")
        at = [tensor.data_ptr() for tensor in (x, cos, sin, out)]
        self._program.run((*at, *attention, scratch.data_ptr()), torch.get_num_threads())
        return out


_Programs = tuple[_Before, _After, _Whole | None]
"""Before the attention, after it, and all of the layer, where our own attention does."""


def _is_free(layer: nn.Module) -> bool:
    """True if no other code has replaced the ``forward`` of a module in the layer."""
    return all(map(is_free, layer.modules()))


def _bits(value: float) -> int:
    return int(np.float64(value).view(np.int64))


_OUR_ATTENTION = (sdpa_attention_forward, wide_attention_forward)
"""Attention that the stage `attend` computes too."""

_LAYER_ARGUMENTS = frozenset(
    ["attention_mask", "position_ids", "use_cache", "cache_position", "position_embeddings"]
)


class _Flow(threading.local):
    """Findings and the output of the last layer of a thread, which hold for the next one of the same pass.

    Attributes:
        output: The layer's output. Who is called with it follows that layer, in the same pass.
        config: The configuration that names the attention.
        attend: That attention.
        positions: Cos and sin, as the layer was called with them.
        rotary: The same, contiguous, if they are usual.
    """

    def __init__(self) -> None:
        self.output: Tensor | None = None
        self.config: Any = None
        self.attend: Any = None
        self.positions: Any = None
        self.rotary: tuple[Tensor, Tensor] | None = None


def _forward(module: nn.Module, parts: _Parts, calls: _Calls, flow: _Flow) -> Forward:
    """A layer's ``forward``; calls with other arguments go to the layer's own."""
    layer, own = ref(module), parts.own
    dtype, width, known = parts.dtype, parts.width, _LAYER_ARGUMENTS | {calls.cache_name}
    config: Any = cast(Any, module.self_attn).config

    def is_usual(x: Tensor) -> bool:
        return (
            is_ordinary_call(x)
            and x.device.type == "cpu"
            and x.dim() == 3
            and x.shape[0] == 1
            and 0 < x.shape[1] <= MOST_TOKENS
        )

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        module: Any = layer()
        cache: Any = kwargs.get(calls.cache_name)
        positions: Any = kwargs.get("position_embeddings")
        follows = hidden_states is flow.output
        if not (
            not args
            and (follows or is_usual(hidden_states))
            and hidden_states.dtype is dtype
            and hidden_states.shape[2] == width
            and getattr(cache, "takes_states_alone", False)
            and not module.training
            and all(name in known or kwargs[name] is None or kwargs[name] is False for name in kwargs)
            and parts.is_current()
        ):
            return own(module, hidden_states, *args, **kwargs)
        tokens = hidden_states.shape[1]
        if not (follows and flow.config is config):
            flow.config, flow.attend = config, ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation)
        if not (follows and flow.positions is positions):
            flow.positions, flow.rotary = positions, _rotary(positions, tokens, dtype)
        attend, rotary = flow.attend, flow.rotary
        flow.output = programs = None
        if attend is not None and rotary is not None and rotary[0].shape[2] == calls.head:
            programs = parts.programs(tokens, calls)
        if programs is None or rotary is None:
            return own(module, hidden_states, *args, **kwargs)
        before, after, whole = programs
        hidden_states = hidden_states.contiguous()
        cos, sin = rotary
        mask = kwargs.get("attention_mask")
        seen: tuple[Tensor, Tensor] | None = None
        if whole is not None and attend in _OUR_ATTENTION and hasattr(cache, "extend"):
            seen = cache.extend(tokens, calls.layer_index)
            given = None if seen is None else whole.given(seen[0], seen[1], mask)
            if given is not None:
                flow.output = whole(hidden_states, cos, sin, given)
                return flow.output
        query, key, value = before(hidden_states, cos, sin)
        if seen is None:
            seen = cache.update(key, value, calls.layer_index)
        else:
            for view, states in zip(seen, (key, value), strict=True):
                view[:, :, -tokens:].copy_(states)
        passed = {name: kwargs.get(name) for name in calls.passed}
        attended, _ = attend(module.self_attn, query, *seen, mask, **calls.fixed, **passed)
        flow.output = after(hidden_states, attended.contiguous())
        return flow.output

    return forward


def _can_attend(dim: int) -> bool:
    from retrieval_draft.engine.cpu._kernels.vector_tile import STEP

    return dim % STEP == 0


def _rotary(positions: Any, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Cos and sin, (1, tokens, dim), contiguous; None for other `positions`."""
    if not isinstance(positions, tuple) or len(positions) != 2:
        return None
    if not all(
        type(tensor) is Tensor
        and tensor.dtype is dtype
        and tensor.device.type == "cpu"
        and tensor.dim() == 3
        and tensor.shape == (1, tokens, positions[0].shape[2])
        for tensor in positions
    ):
        return None
    cos, sin = positions
    return cos.contiguous(), sin.contiguous()


_RECORDER = "retrieval_draft_recorder"
_recording = threading.local()


class _Recorder:
    """A cache that notes what it is given, and an attention's arguments and result.

    Args:
        attended: The attention's result.
    """

    takes_states_alone = True

    def __init__(self, attended: Tensor) -> None:
        self.attended = attended
        self.layer_index = -1
        self.states: list[Tensor] = []
        self.mask: Any = None
        self.kwargs: dict[str, Any] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Returns keys and values as they are."""
        self.layer_index = layer_idx
        return key, value


def _record(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    """The attention of a thread that observes a layer; for other threads of that time, torch's."""
    recorder = getattr(_recording, "recorder", None)
    if recorder is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    recorder.states, recorder.mask, recorder.kwargs = [query, key, value], attention_mask, kwargs
    return recorder.attended, None


AttentionInterface.register(_RECORDER, _record)
AttentionMaskInterface.register(_RECORDER, sdpa_mask)


@torch.no_grad()
def _observe(model: Any, layer: Any, parts: _Parts) -> _Calls | None:
    """The calls of a layer, if its results are ours; None for one of another structure."""
    head, activation = layer.self_attn.head_dim, _activation(layer.mlp)
    tokens = next((size for size in _TRIED if parts.layers(size)), 0)
    if activation is None or not tokens:
        return None
    random = np.random.default_rng(0)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(random.standard_normal(shape, np.float32)).to(parts.dtype)

    x = normal(1, tokens, parts.width)
    x[:, -1] *= 0.01  # of a small row a constant that is added before a root shows
    angles = torch.cat([normal(1, tokens, head // 2).float()] * 2, -1)
    mask = normal(1, 1, tokens, tokens)
    given = {
        "attention_mask": mask,
        "position_ids": torch.arange(tokens, device="cpu")[None],
        "position_embeddings": (angles.cos().to(parts.dtype), angles.sin().to(parts.dtype)),
    }
    attended = normal(1, tokens, layer.self_attn.q_proj.weight.shape[0] // head, head)
    cache_name = cache_parameter(layer)
    own, ours = _Recorder(attended), _Recorder(attended)
    with lend_attention(model, _RECORDER, ("sdpa",)) as replaced:
        if replaced is None:
            return None
        try:
            _recording.recorder = own
            try:
                expected = parts.own(layer, x, **given, **{cache_name: own})
            except Exception as error:  # a layer that is called in another way
                _LOG.debug("%s keeps its modules: %r", type(layer).__name__, error)
                return None
            inner = _LAYER_ARGUMENTS & own.kwargs.keys()
            fixed = {name: value for name, value in own.kwargs.items() if name not in inner}
            calls = _Calls(cache_name, own.layer_index, fixed, tuple(inner), activation, head)
            _recording.recorder = ours
            got = _forward(layer, parts, calls, _Flow())(x, **given, **{cache_name: ours})
        finally:
            _recording.recorder = None
    if (
        len(own.states) == 3
        and own.mask.shape == mask.shape
        and torch.equal(own.mask, mask)  # a layer may make another one of it, as Doge does
        and own.layer_index == ours.layer_index >= 0
        and all(value is None or isinstance(value, bool | int | float | str) for value in fixed.values())
        and type(expected) is Tensor
        and all(_agree(*pair) for pair in zip([got, *ours.states], [expected, *own.states], strict=True))
    ):
        return calls
    return None


def _activation(mlp: Any) -> int | None:
    """`SILU` or `GELU_TANH`, if the activation of a gated MLP is one of them."""
    from retrieval_draft.engine.cpu._kernels.stages import GELU_TANH, SILU

    x = torch.linspace(-8, 8, 161, dtype=torch.float32, device="cpu")
    own = getattr(mlp, "act_fn", None)
    try:
        got = own(x).reshape(x.shape)  # type: ignore[misc]
    except Exception:  # none, or one of several arguments
        return None
    for kind, expected in ((SILU, functional.silu(x)), (GELU_TANH, functional.gelu(x, approximate="tanh"))):
        if torch.allclose(got, expected, rtol=1e-4, atol=1e-6):
            return kind
    return None


def _agree(got: Tensor, expected: Tensor) -> bool:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    difference = (got.float() - expected.float()).square().mean(-1).sqrt()
    return bool((difference <= _TOLERANCE[got.dtype] * expected.float().square().mean(-1).sqrt()).all())
