"""The decoding methods that `bench live` compares."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from transformers import CompileConfig

from retrieval_draft.bench.forward_passes import ForwardPasses
from retrieval_draft.config import METHODS, SOURCES, DraftConfig
from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.engine.draft_models.choose import SELF
from retrieval_draft.errors import UnknownMethodError
from retrieval_draft.methods.registry import get_method

__all__ = [
    "LOOKUP_TOKENS",
    "NO_CUDNN",
    "PLAIN",
    "STOCK",
    "STOCK_COMPILED",
    "STOCK_LOOKUP",
    "Decoder",
    "Run",
    "cudnn_attention",
    "make_contestant",
]

STOCK = "stock"
STOCK_LOOKUP = "stock-pld"
STOCK_COMPILED = "stock-compiled"
NO_CUDNN = "-no-cudnn"
"""Suffix of any other name: without cuDNN's attention, which recent torch prefers and which makes a new plan
for every length."""
PLAIN = "none"
LOOKUP_TOKENS = 10
"""``prompt_lookup_num_tokens`` of the prompt lookup in the comparison."""


@dataclass(frozen=True, slots=True)
class Run:
    """One prompt decoded by one method.

    Attributes:
        tokens: The reply, ended by eos or by the limit.
        seconds: From the call to its return, prefill included.
        steps: Forward passes after the prefill.
        nodes: Draft tokens verified in them.
        pass_seconds: Of those forward passes; 0 where the method does not report it.
        loop_seconds: Of the loop's other work: drafting, masks, reading logits, commit, learning.
    """

    tokens: list[int]
    seconds: float
    steps: int
    nodes: int
    pass_seconds: float = 0.0
    loop_seconds: float = 0.0


class Decoder(Protocol):
    """A decoding method."""

    name: str

    def generate(self, ids: Sequence[int], max_new_tokens: int) -> Run:
        """Decodes one prompt greedily."""
        ...

    def call(self, inputs: dict[str, Any]) -> Any:
        """Output of `model.generate` for these arguments; any number of rows, greedy or sampled."""
        ...


def make_contestant(
    name: str,
    model: Any,
    tokenizer: Any,
    nodes: int | None,
    cpu_kernels: bool = True,
    history: bool = False,
    corpora: Sequence[Path] = (),
    draft_model: Any = None,
    graphs: Literal["auto", "off"] = "auto",
) -> Decoder:
    """``stock`` is `model.generate`, ``stock-pld`` its prompt lookup, all else a drafting method.

    ``stock-compiled`` is `model.generate` with a static cache and ``torch.compile`` ("reduce-overhead"; on a
    CPU without code generation, as a smoke test only). Any name may end in ``-no-cudnn``.

    Args:
        name: Name of the method.
        model: The target model.
        tokenizer: The model's.
        nodes: Of each step; None for the measured cost to choose.
        cpu_kernels: Whether drafting methods use our kernels.
        history: Whether they draft from earlier prompts and replies too.
        corpora: Index folders that they draft from.
        draft_model: For `calibrated` and for the methods that need one, as `RetrievalDrafter.for_model` takes
            it; without one those that need it draft with the model's own layers, some skipped.
        graphs: As `DraftConfig.graphs`.

    Raises:
        UnknownMethodError: None of these.
    """
    if name.endswith(NO_CUDNN):
        inner = name.removesuffix(NO_CUDNN)
        with cudnn_attention(False):  # a drafter measures passes when it is made
            return _NoCudnn(
                name,
                make_contestant(
                    inner, model, tokenizer, nodes, cpu_kernels, history, corpora, draft_model, graphs
                ),
            )
    if name == STOCK:
        return _Stock(name, model, {})
    if name == STOCK_LOOKUP:
        return _Stock(name, model, {"prompt_lookup_num_tokens": LOOKUP_TOKENS})
    if name == STOCK_COMPILED:
        return _Stock(name, model, _compiled(model))
    if name not in METHODS:
        known = ", ".join((STOCK, STOCK_LOOKUP, STOCK_COMPILED, *METHODS))
        raise UnknownMethodError(
            f"Unknown method {name!r}.", f"Choose from: {known}; or one with {NO_CUDNN}."
        )
    sources = tuple(source for source in SOURCES if history or source != "history")
    config = DraftConfig(method=name, nodes=nodes, cpu_kernels=cpu_kernels, sources=sources, graphs=graphs)
    method = get_method(name)
    if draft_model is None and method.needs_model and not method.needs_head:
        draft_model = SELF
    return _Drafted(
        name,
        model,
        tokenizer,
        config,
        corpora if name != PLAIN else (),
        draft_model if name != PLAIN else None,
    )


class _Stock:
    def __init__(self, name: str, model: Any, options: dict[str, Any]) -> None:
        self.name = name
        self._model = model
        self._options = options

    def call(self, inputs: dict[str, Any]) -> Any:
        """Implements `Decoder.call`."""
        return self._model.generate(**inputs, **self._options)

    def generate(self, ids: Sequence[int], max_new_tokens: int) -> Run:
        """Implements `Decoder.generate`."""
        if "compile_config" in self._options:  # a hook would be compiled too, and count one pass for all
            tokens, seconds = _timed(self._model, self.call, ids, max_new_tokens)
            return Run(tokens, seconds, len(tokens) - 1, 0)
        # One hook of a few microseconds a pass: negligible beside a forward pass of any model.
        with ForwardPasses(self._model) as count:
            tokens, seconds = _timed(self._model, self.call, ids, max_new_tokens)
        steps = count.passes - 1
        return Run(tokens, seconds, steps, count.fed - steps)


class _Drafted:
    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        config: DraftConfig,
        corpora: Sequence[Path],
        draft_model: Any,
    ) -> None:
        self.name = name
        self._model = model
        self.drafter = RetrievalDrafter.for_model(
            model, tokenizer, config=config, corpora=corpora, draft_model=draft_model
        )
        self.drafter.warm_up()

    def call(self, inputs: dict[str, Any]) -> Any:
        """Implements `Decoder.call`."""
        return self.drafter.generate(**inputs)

    def generate(self, ids: Sequence[int], max_new_tokens: int) -> Run:
        """Implements `Decoder.generate`."""
        tokens, seconds = _timed(self._model, self.call, ids, max_new_tokens)
        stats = self.drafter.last_stats
        assert stats is not None
        loop = stats.draft_seconds + stats.commit_seconds + stats.accept_seconds + stats.learn_seconds
        return Run(tokens, seconds, stats.steps, stats.drafted, stats.forward_seconds, loop)


class _NoCudnn:
    """Another contestant, without cuDNN's attention."""

    def __init__(self, name: str, inner: Any) -> None:
        self.name = name
        self._inner = inner

    def call(self, inputs: dict[str, Any]) -> Any:
        """Implements `Decoder.call`."""
        with cudnn_attention(False):
            return self._inner.call(inputs)

    def generate(self, ids: Sequence[int], max_new_tokens: int) -> Run:
        """Implements `Decoder.generate`."""
        with cudnn_attention(False):
            run: Run = self._inner.generate(ids, max_new_tokens)
        return run

    @property
    def drafter(self) -> Any:
        """Drafter of the other contestant, if it has one."""
        return self._inner.drafter


def _compiled(model: Any) -> dict[str, Any]:
    """Options of `model.generate` for a static cache and a compiled decoding pass."""
    if model.device.type == "cuda":
        return {"cache_implementation": "static", "compile_config": CompileConfig(mode="reduce-overhead")}
    config: Any = CompileConfig(backend="eager")
    config.mode = None
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


@contextmanager
def cudnn_attention(wanted: bool) -> Iterator[None]:
    """Allows or forbids cuDNN's attention inside the context, in the whole process."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(wanted)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _timed(model: Any, call: Any, ids: Sequence[int], max_new_tokens: int) -> tuple[list[int], float]:
    device = model.get_input_embeddings().weight.device
    input_ids = torch.tensor([list(ids)], device=device)
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
    }
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    out = call(inputs)
    tokens = out[0, input_ids.shape[1] :].tolist()
    return tokens, time.perf_counter() - begin
