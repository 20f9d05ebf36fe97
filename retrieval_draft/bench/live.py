"""Decoding methods side by side on a real model: speed, tokens per step, and equality of the text."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from retrieval_draft._progress import progress
from retrieval_draft.bench.agreement import Outcome, compare_outputs
from retrieval_draft.bench.decoders import PLAIN, STOCK, Run, make_contestant
from retrieval_draft.bench.measuring import ratio_summary, rotated
from retrieval_draft.bench.prompts import Prompt
from retrieval_draft.bench.provenance import provenance
from retrieval_draft.bench.recording import TraceWriter
from retrieval_draft.engine.draft_models.choose import is_self, load_draft_model
from retrieval_draft.errors import InvalidInputError

__all__ = ["live"]

_WARM_UP = "1. one\n2. two\n3. three\n4. four\n5. five\n6. six\n7."


def live(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    methods: Sequence[str],
    nodes: int | None = None,
    record: Path | None = None,
    cpu_kernels: bool = True,
    history: bool = True,
    corpora: Sequence[Path] = (),
    draft_model: Any = None,
    chat: bool = False,
) -> dict[str, Any]:
    """Decodes every prompt greedily with every method and compares them.

    The methods take turns on each prompt, with another first one for each prompt, so that a machine that
    becomes slower slows all of them. One more prompt comes first, uncounted.

    Tokens per step: new tokens over forward passes, the same for every method. The prefill is no step
    and the first token of each reply, which it yields, is not counted; so `model.generate` has 1.
    The steps of ``stock`` and ``stock-pld`` are counted by a hook on the model.
    Seconds are those of the whole call, prefill included.

    Args:
        model: The target model.
        tokenizer: Its tokenizer.
        prompts: The prompts, in the order to run.
        max_new_tokens: For each reply.
        methods: ``stock``, ``stock-pld``, ``stock-compiled`` and names of drafting methods.
        nodes: Draft nodes of every step, or None for the budget that the cost model chooses.
        record: File for the replies of ``stock`` as a trace.
        cpu_kernels: Whether drafting methods use our kernels; ``stock`` and ``stock-pld`` never do.
        history: Whether drafting methods draft from earlier prompts and replies of the run too.
        corpora: Index folders that drafting methods draft from.
        draft_model: As for `make_contestant`.
        chat: Whether prompts are put into the chat template.

    Returns:
        The object that ``bench live --json`` prints. ``equal_to_stock`` counts prompts with exactly the
        tokens of ``stock``, ``near_ties`` those that differ from it at a near tie of logits, ``different``
        the rest. ``ratio_to_none`` is relative to our own plain decoding: the gain of drafts. The ratio of
        ``none`` to ``stock`` is the gain of our kernels. ``loop_share`` is the time that our loop adds to its
        forward passes, as a share of theirs.
    """
    methods = list(dict.fromkeys(methods))
    if not methods:
        raise InvalidInputError("No method to run.", "Name some with --methods.")
    if record is not None and STOCK not in methods:
        raise InvalidInputError("A trace records the replies of 'stock'.", "Add stock to --methods.")
    if max_new_tokens < 2:
        raise InvalidInputError(f"max_new_tokens is {max_new_tokens}; a measurement needs at least 2.")
    if not prompts:
        raise InvalidInputError("No prompts to run.", "Name files with --prompts.")
    if isinstance(draft_model, str) and not is_self(draft_model):
        draft_model = load_draft_model(draft_model, model)  # once for all methods
    encoded = [prompt.encode(tokenizer, chat) for prompt in prompts]
    decoders = [
        make_contestant(name, model, tokenizer, nodes, cpu_kernels, history, corpora, draft_model)
        for name in methods
    ]
    runs: dict[str, list[Run]] = {name: [] for name in methods}
    verdicts: dict[str, list[Outcome]] = {name: [] for name in methods}
    writer = nullcontext() if record is None else TraceWriter(record)
    total = len(prompts) * len(methods)
    with writer as trace, progress("Decoding (replies)", total, delay=0.0) as advance:
        for contestant in decoders:
            contestant.generate(list(tokenizer(_WARM_UP)["input_ids"]), min(max_new_tokens, 16))
        for number, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
            for contestant in rotated(decoders, number):
                runs[contestant.name].append(contestant.generate(ids, max_new_tokens))
                advance()
            if STOCK in runs:
                stock = runs[STOCK][-1].tokens
                for name in methods:
                    verdicts[name].append(compare_outputs(model, ids, stock, runs[name][-1].tokens))
                if trace is not None:
                    trace.write(model, prompt.id, prompt.task, ids, stock)
    everything = range(len(prompts))
    tasks: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        tasks.setdefault(prompt.task, []).append(number)
    device = model.get_input_embeddings().weight.device
    return {
        "methods": {name: _summary(name, runs, verdicts, everything) for name in methods},
        "by_task": {
            task: {name: _summary(name, runs, verdicts, numbers) for name in methods}
            for task, numbers in tasks.items()
        },
        "prompts": len(prompts),
        "max_new_tokens": max_new_tokens,
        "nodes": nodes,
        "cpu_kernels": cpu_kernels,
        "history": history,
        "chat": chat,
        "corpora": [str(path) for path in corpora],
        "model": model.config.name_or_path or type(model).__name__,
        "device": str(device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "provenance": provenance(),
    }


def _summary(
    name: str, runs: dict[str, list[Run]], verdicts: dict[str, list[Outcome]], numbers: Sequence[int]
) -> dict[str, Any]:
    mine = [runs[name][number] for number in numbers]
    judged = [verdicts[name][number] for number in numbers if verdicts[name]]
    tokens = sum(len(run.tokens) for run in mine)
    steps = sum(run.steps for run in mine)
    passes = sum(run.pass_seconds for run in mine)
    return {
        "prompts": len(mine),
        "tokens_per_second": tokens / sum(run.seconds for run in mine),
        "tokens_per_step": (tokens - len(mine)) / steps if steps else 0.0,
        "nodes_per_step": sum(run.nodes for run in mine) / steps if steps else 0.0,
        "tokens": tokens,
        "steps": steps,
        "equal_to_stock": judged.count("equal") if judged else None,
        "near_ties": judged.count("tie") if judged else None,
        "different": judged.count("different") if judged else None,
        "ratio_to_stock": _ratio(name, STOCK, runs, numbers),
        "ratio_to_none": _ratio(name, PLAIN, runs, numbers),
        "loop_share": sum(run.loop_seconds for run in mine) / passes if passes else None,
    }


def _ratio(
    name: str, base: str, runs: dict[str, list[Run]], numbers: Sequence[int]
) -> dict[str, float] | None:
    if base not in runs:
        return None
    speeds = [_speed(runs[name][number]) / _speed(runs[base][number]) for number in numbers]
    return ratio_summary(speeds)


def _speed(run: Run) -> float:
    return len(run.tokens) / run.seconds
