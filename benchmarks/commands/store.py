"""``python -m benchmarks store``: costs and gains of sharing, on real servers on loopback."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from retrieval_draft.cli.common import split
from retrieval_draft.cli.options import Report, Table, measurement
from retrieval_draft.errors import InvalidInputError

__all__ = ["store"]

PARTS = ("propagation", "outages", "soak", "start", "ingest", "split", "fuzz", "versions")


@measurement
def store(
    servers: Annotated[int, typer.Option(min=2, help="Servers that learn from each other.")] = 4,
    parts: Annotated[str, typer.Option(help=f"Measurements, by commas: {', '.join(PARTS)}.")] = (
        "propagation,outages,soak,start,ingest,fuzz"
    ),
    rounds: Annotated[int, typer.Option(min=1, help="Requests of propagation.")] = 200,
    entries: Annotated[int, typer.Option(min=100, help="Of the soak.")] = 100_000,
    soak_servers: Annotated[int, typer.Option(min=2, help="Of the soak.")] = 10,
    kills: Annotated[int, typer.Option(min=0, help="Of servers in the soak; of Redis half as many.")] = 10,
    tokens: Annotated[int, typer.Option(min=100_000, help="Of the snapshot; twice as many for ingest.")] = (
        10_000_000
    ),
    model: Annotated[str, typer.Option(help="The model that decodes through outages.")] = "gemma3-270m",
    prompts: Annotated[
        list[Path] | None,
        typer.Option(help="Prompt files for outages; random prompts by default.", show_default=False),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Prompts decoded in each state of an outage.")] = 20,
    traces: Annotated[
        list[Path] | None, typer.Option(help="Trace files for split.", show_default=False)
    ] = None,
    fuzzed: Annotated[
        int, typer.Option(min=1, help="Bad entries, and a tenth as many foreign ones.")
    ] = 10_000,
    older: Annotated[
        Path | None,
        typer.Option(
            help="Wheel of an older version for versions, or a checkout's folder.", show_default=False
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder for temporary files; the system's by default.", show_default=False),
    ] = None,
) -> Report:
    """Measure the shared store: propagation, outages, kills, start, ingest, traces over servers, fuzz."""
    chosen = split(parts)
    unknown = [part for part in chosen if part not in PARTS]
    if unknown or not chosen:
        raise InvalidInputError(f"--parts names {unknown or 'nothing'}.", f"Choose from: {', '.join(PARTS)}.")
    if "split" in chosen and not traces:
        raise InvalidInputError("The part split replays traces; there are none.", "Name files with --traces.")
    if "versions" in chosen and older is None:
        raise InvalidInputError("The part versions needs an older version.", "Name its wheel with --older.")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        work = Path(scratch)
        measures: dict[str, Callable[[], dict[str, Any]]] = {
            "propagation": lambda: _propagation(work, servers, rounds),
            "outages": lambda: _outages(work, model, prompts, limit),
            "soak": lambda: _soak(work, soak_servers, entries, kills),
            "start": lambda: _start(work, tokens),
            "ingest": lambda: _ingest(work, 2 * tokens),
            "split": lambda: _split(work, traces or [], servers),
            "fuzz": lambda: _fuzz(work, fuzzed),
            "versions": lambda: _versions(work, older),
        }
        found = {part: measures[part]() for part in PARTS if part in chosen}
    result = _summary(found)
    return Report(result, [Table(f"{servers} servers", ("what", "measured"), _rows(found))])


def _propagation(folder: Path, servers: int, rounds: int) -> dict[str, Any]:
    from benchmarks.store_sharing import measure_propagation

    return measure_propagation(folder, servers=servers, rounds=rounds)


def _outages(folder: Path, model: str, prompts: list[Path] | None, limit: int) -> dict[str, Any]:
    from benchmarks.store_outage import STATES, measure_outages
    from retrieval_draft.bench.prompts import random_prompts, read_prompts, spread
    from retrieval_draft.models.loading import load_model

    _, tokenizer = load_model(model)  # converts the packaged one, once
    if prompts:
        ids = [prompt.encode(tokenizer) for prompt in spread(read_prompts(prompts), len(STATES) * limit)]
    else:
        ids = [
            list(prompt.ids) for prompt in random_prompts(len(STATES) * limit, 64, min(30000, len(tokenizer)))
        ]
    return measure_outages(model, ids, folder)


def _soak(folder: Path, servers: int, entries: int, kills: int) -> dict[str, Any]:
    from benchmarks.store_soak import measure_soak

    return measure_soak(folder, servers=servers, entries=entries, kills=kills)


def _start(folder: Path, tokens: int) -> dict[str, Any]:
    from benchmarks.store_sharing import measure_start

    return measure_start(folder, tokens=tokens)


def _ingest(folder: Path, tokens: int) -> dict[str, Any]:
    from benchmarks.store_sharing import measure_ingest

    return measure_ingest(folder, tokens=tokens)


def _split(folder: Path, traces: list[Path], servers: int) -> dict[str, Any]:
    from benchmarks.store_replay import measure_split
    from benchmarks.valkey_process import ValkeyProcess

    with ValkeyProcess(folder / "split") as server:
        return measure_split(traces, server.url, servers=servers)


def _fuzz(folder: Path, fuzzed: int) -> dict[str, Any]:
    from benchmarks.store_fuzz import measure_fuzz

    return measure_fuzz(folder, fuzzed=fuzzed, foreign=fuzzed // 10)


def _versions(folder: Path, older: Path | None) -> dict[str, Any]:
    from benchmarks.store_versions import measure_versions

    assert older is not None
    return measure_versions(folder, older)


def _summary(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Numbers quoted in the README, and all parts."""
    from retrieval_draft.bench.provenance import provenance

    result: dict[str, Any] = {"provenance": provenance()}
    if "propagation" in found:
        result["propagation_ms"] = {name: found["propagation"][name] for name in ("p50", "p99")}
    if "soak" in found:
        result |= {"entries": found["soak"]["entries"], "lost": found["soak"]["lost"]}
    if "outages" in found:
        result["decode_ratio_redis_down"] = found["outages"]["dead"]["ratio"]
    return result | {"parts": found}


def _rows(found: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for part, value in found.items():
        if part == "propagation":
            rows.append(("from one server to the others, ms: p50, p99", _numbers(value, "p50", "p99")))
            rows.append(("the same for rows, ms: p50, p99", _numbers(value, "rows_p50", "rows_p99")))
        elif part == "outages":
            rows += [
                (
                    f"tokens a second, store {state} / no store; of a core its threads took",
                    _numbers(each, "ratio", "core_share"),
                )
                for state, each in value.items()
            ]
            rows += [
                (
                    f"store {state}, afterwards: entries of texts and of rows sent, texts waiting",
                    _numbers(each, "sent", "sent_learned", "waiting"),
                )
                for state, each in value.items()
                if state != "none"
            ]
        elif part == "soak":
            kills = f"{value['server_kills']} + {value['redis_kills']}"
            rows.append((f"{value['entries']:,} entries, {value['servers']} servers, kills", kills))
            rows.append(("lost, doubled, all the same", _numbers(value, "lost", "doubled", "agree")))
        elif part == "start":
            seconds = _numbers(value, "usable_seconds", "ready_seconds")
            rows.append((f"start from {value['tokens']:,} tokens, s: lookups, log read", seconds))
        elif part == "ingest":
            rows.append(("taken in, tokens a second", f"{value['tokens_per_second'] / 1e6:.1f}M"))
            rows.append(("a step held by that, us: p99, p99.9", _numbers(value["held_us"], "p99", "p99.9")))
        elif part == "split":
            names = ("one_server", "not_shared", "replies_shared", "all_shared", "ratio")
            rows += [(f"tokens per step, {name.replace('_', ' ')}", f"{value[name]:.3f}") for name in names]
        elif part == "versions":
            older, newer = value["older"], value["newer"]
            drafted = f"{older['drafted']}, {newer['drafted']} of {value['texts']}"
            rows.append((f"the other's texts drafted from, by {older['version']} and this", drafted))
            rows.append(("entries of the other's that each dropped", f"{_counts(older)}; {_counts(newer)}"))
        else:
            names = ("written", "ingested", "uncounted", "bad_texts", "foreign_drafts")
            rows.append((f"fuzz: {', '.join(names)}", _numbers(value, *names)))
    return rows


def _counts(server: dict[str, Any]) -> str:
    dropped = {reason: count for reason, count in server["dropped"].items() if count}
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"


def _numbers(value: dict[str, Any], *names: str) -> str:
    found = [value[name] for name in names]
    return ", ".join(f"{each:.3g}" if isinstance(each, float) else str(each) for each in found)
