"""``python -m benchmarks agents``, ``restart``: a scripted coding agent on servers, also after a restart."""

from __future__ import annotations

import inspect
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from retrieval_draft.cli.common import split
from retrieval_draft.cli.options import Report, Table, measurement
from retrieval_draft.errors import InvalidInputError

__all__ = ["agents", "restart"]

_CACHE_OPTION = "prefix_cache_bytes"
"""Parameter of ``serve`` that keeps keys and values of earlier turns."""


@measurement
def agents(
    model: Annotated[
        str | None, typer.Option(help="A tiny one with random weights by default.", show_default=False)
    ] = None,
    length: Annotated[str, typer.Option(help="short, medium or long: lines that a turn reads.")] = "medium",
    turns: Annotated[int, typer.Option(min=1, max=100, help="Requests of the conversation.")] = 20,
    servers: Annotated[
        str, typer.Option(help="Of drafts, plain, transformers; with -uncached where a cache is there.")
    ] = "drafts,plain,transformers",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a reply.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Conversations with each server, in turns.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of the servers' torch.", show_default=False)
    ] = None,
) -> Report:
    """Run a coding agent of 20 turns: time to the first token, tokens a second, equal replies."""
    from benchmarks.agent_run import run_agent, serving, transformers_serving
    from benchmarks.agent_script import agent_turns
    from retrieval_draft.bench.provenance import provenance

    asked = agent_turns(length, turns)
    names = split(servers)
    runs: dict[str, Any] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        folder = _folder(model, Path(scratch))
        for _ in range(rounds):
            for name in names:
                if name == "transformers":
                    with transformers_serving(folder, threads) as port:
                        runs[name].append(run_agent(port, folder, asked, max_new_tokens, False))
                    continue
                options = ["--model", folder, "--served-model-name", "agent", *_options(name)]
                if threads is not None:
                    options += ["--threads", str(threads)]
                with serving(options) as port:
                    runs[name].append(run_agent(port, "agent", asked, max_new_tokens, True))
    result: dict[str, Any] = {"model": model or "tiny", "length": length, "turns": turns, "servers": {}}
    first = runs[names[0]][0]
    for name in names:
        best = min(runs[name], key=lambda run: sum(run.seconds))
        equal = sum(a == b for a, b in zip(best.texts, first.texts, strict=True))
        result["servers"][name] = best.summary() | {
            "equal_replies": equal,
            "seconds_of_rounds": [sum(run.seconds) for run in runs[name]],
        }
    result["different"] = [
        name
        for name in names
        if name != "transformers" and any(run.tokens != first.tokens for run in runs[name])
    ]
    return Report(result, [_table(result)], different=bool(result["different"]), saved=result | provenance())


@measurement
def restart(
    model: Annotated[
        str | None, typer.Option(help="A tiny one with random weights by default.", show_default=False)
    ] = None,
    length: Annotated[str, typer.Option(help="short, medium or long: lines that a turn reads.")] = "short",
    turns: Annotated[int, typer.Option(min=1, max=100, help="Requests of the conversation.")] = 12,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a reply.")] = 48,
) -> Report:
    """Start a server again, with its history and from a snapshot: seconds, tokens per step, equal replies."""
    from benchmarks.agent_script import agent_turns
    from benchmarks.restart import measure_restart
    from retrieval_draft.bench.provenance import provenance

    with tempfile.TemporaryDirectory() as scratch:
        folder, asked = _folder(model, Path(scratch) / "model"), agent_turns(length, turns)
        runs = measure_restart(folder, asked, Path(scratch), new=max_new_tokens)
    rows = [
        (name, f"{run['ready_seconds']:.1f}", f"{run['all_seconds']:.1f}",
         f"{run['tokens_per_step']:.2f}", f"{run['cached_share']:.0%}",
         f"{run['equal']} of {run['turns']}")
        for name, run in runs.items()
    ]  # fmt: skip
    columns = ("server", "s to serve", "s to the end", "tokens/step", "cached", "equal")
    return Report(
        runs,
        [Table(f"{model or 'tiny'}, {length}", columns, rows)],
        different=any(run["equal"] < run["turns"] for run in runs.values()),
        saved={"model": model or "tiny", "length": length, "runs": runs} | provenance(),
    )


def _folder(model: str | None, scratch: Path) -> str:
    """Folder of a model; None makes a tiny one."""
    from benchmarks.serve_model import save_tiny_model
    from retrieval_draft.models.packaged import PACKAGED, packaged_folder

    if model is None:
        return _with_template(save_tiny_model, scratch)
    return str(packaged_folder(model)) if model in PACKAGED else model


def _options(name: str) -> list[str]:
    """Options of ``serve`` for a server's name.

    Raises:
        InvalidInputError: There is no such server.
    """
    from retrieval_draft.cli.serve import serve

    kind, dash, cache = name.partition("-")
    if kind not in ("drafts", "plain") or (dash and cache != "uncached"):
        raise InvalidInputError(
            f"There is no server {name!r}.", "Choose from drafts, plain, drafts-uncached, transformers."
        )
    options = [] if kind == "drafts" else ["--method", "none"]
    if cache:
        if _CACHE_OPTION not in inspect.signature(serve).parameters:
            raise InvalidInputError(f"serve has no {_CACHE_OPTION}: every server here is without a cache.")
        options += [f"--{_CACHE_OPTION.replace('_', '-')}", "0"]
    return options


def _with_template(save: Any, folder: Path) -> str:
    """A tiny model with a chat template."""
    from transformers import AutoTokenizer

    save(folder)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(str(folder))
    return str(folder)


def _table(result: dict[str, Any]) -> Table:
    rows = []
    for name, each in result["servers"].items():
        first = each["first_token_seconds"]
        steps = each["tokens_per_step"]
        rows.append(
            (
                name,
                f"{each['seconds']:.1f}",
                f"{each['tokens_per_second']:.1f}",
                f"{first['cold']:.2f}",
                f"{first['median_later']:.2f}",
                f"{first['last']:.2f}",
                "" if steps is None else f"{steps:.2f}",
                f"{each['cached_share']:.0%}",
                f"{each['equal_replies']} of {result['turns']}",
            )
        )
    return Table(
        f"{result['model']}, {result['length']}: {result['turns']} turns",
        ("server", "s", "tokens/s", "first token: cold", "later", "last", "tokens/step", "cached", "equal"),
        rows,
    )
