"""``python -m benchmarks vllm``: drafting methods in vLLM, and the cost of proposing."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from retrieval_draft.cli.common import PromptOptions, ratio_range, split
from retrieval_draft.cli.options import Fields, Report, Table, measurement
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.models.packaged import NAMES, PACKAGED, packaged_folder

__all__ = ["vllm"]

_METHODS = "plain,ngram-1-3-3,ngram-2-4-5,ngram-3-5-10,suffix,cold,history"


@measurement
def vllm(
    prompts: Annotated[PromptOptions, Fields(..., defaults={"prompts": (), "limit": 8})],
    model: Annotated[str, typer.Option(help=f"A folder, a hub name, {NAMES}.")] = "gemma3-270m",
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each reply at most.")] = 96,
    methods: Annotated[
        str,
        typer.Option(help="plain, idle, ngram-MIN-MAX-K, suffix, suffix-history, cold, history; by commas."),
    ] = _METHODS,
    drafts: Annotated[int, typer.Option(min=1, max=256, help="Tokens of a draft at most.")] = 24,
    passes: Annotated[int, typer.Option(min=1, help="Runs of all prompts.")] = 1,
    max_model_len: Annotated[int, typer.Option(min=64, help="As vLLM takes it.")] = 1024,
    dtype: Annotated[str, typer.Option(help="As vLLM takes it.")] = "float32",
    propose_only: Annotated[
        bool, typer.Option("--propose-only", help="Time proposing alone; needs neither model nor vLLM.")
    ] = False,
    requests: Annotated[int, typer.Option(min=1, help="Rows of the batch, with --propose-only.")] = 64,
    context: Annotated[int, typer.Option(min=1, help="Tokens of each row, with --propose-only.")] = 4096,
    steps: Annotated[int, typer.Option(min=1, help="Steps to time, with --propose-only.")] = 200,
    threads: Annotated[int, typer.Option(min=1, help="That propose, with --propose-only.")] = 1,
    history: Annotated[
        bool, typer.Option("--history/--no-history", help="Earlier requests too, with --propose-only.")
    ] = True,
) -> Report:
    """Compare drafting methods in vLLM on one model, one request at a time, or time proposing alone."""
    if propose_only:
        from benchmarks.vllm_propose import measure_propose

        result = measure_propose(
            requests=requests, context=context, steps=steps, drafts=drafts, threads=threads, history=history
        )
        times = result["propose_ms"]
        table = Table(
            f"{requests} requests at {context} tokens, {drafts} draft tokens at most",
            ("milliseconds a step", "p50", "p99", "mean", "least"),
            [("", *(f"{times[name]:.2f}" for name in ("p50", "p99", "mean", "least")))],
        )
        return Report(result, [table])
    result = _compare(
        model,
        prompts,
        split(methods),
        {
            "max_new_tokens": max_new_tokens,
            "most": drafts,
            "dtype": dtype,
            "max_model_len": max_model_len,
            "passes": passes,
        },
    )
    title = f"{len(result['prompts'])} prompts, {max_new_tokens} new tokens"
    return Report(
        result,
        [_table(f"{title}, pass {number}", found) for number, found in enumerate(result["passes"], 1)],
        different=any(each["different"] for found in result["passes"] for each in found.values()),
    )


def _compare(
    model: str,
    prompts: PromptOptions,
    methods: list[str],
    options: dict[str, Any],
) -> dict[str, Any]:
    import importlib.util

    if importlib.util.find_spec("vllm") is None:
        raise InvalidInputError(
            "vLLM is not installed in this environment.",
            "Run scripts/test_vllm.sh --install, then .venv-vllm/bin/retrieval-draft bench vllm.",
        )
    chosen = prompts.read()
    folder = str(packaged_folder(model)) if model in PACKAGED else model
    from transformers import AutoTokenizer

    from benchmarks.vllm import compare_in_vllm

    result = compare_in_vllm(
        folder, AutoTokenizer.from_pretrained(folder), chosen, methods=methods, **options
    )
    result["model"] = model
    return result


def _table(title: str, found: dict[str, Any]) -> Table:
    columns = ("method", "tokens/s", "request (p10..p90)", "least", "decoding (p10..p90)", "tokens/step")
    return Table(
        title,
        (*columns, "accepted/draft", "equal", "ties", "other"),
        [
            (
                name,
                f"{each['tokens_per_second']:.1f}",
                ratio_range(each["ratio"]),
                f"{each['ratio']['min']:.2f}",
                ratio_range(each["decode_ratio"]),
                f"{each['tokens_per_step']:.2f}",
                f"{each['accepted_per_draft']:.2f} of {each['drafted_per_draft']:.2f}",
                str(each["equal"]),
                str(each["ties"]),
                str(each["different"]),
            )
            for name, each in found.items()
        ],
    )
