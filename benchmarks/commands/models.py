"""``python -m benchmarks models``: every model class of transformers that generates text."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from retrieval_draft.cli.common import split
from retrieval_draft.cli.options import Out, Report, Table, measurement, save

__all__ = ["models"]


@measurement
def models(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Model types such as llama, and variants such as llama:yarn. All by default.",
            show_default=False,
        ),
    ] = None,
    vision: Annotated[
        bool, typer.Option("--vision", help="The classes that read images and text, not those of text.")
    ] = False,
    trials: Annotated[
        str, typer.Option(help="By commas: greedy, drafts, seeded, batch, server, images, seeded-images.")
    ] = "greedy,drafts,seeded,batch,server,images,seeded-images",
    seeds: Annotated[
        int, typer.Option(min=1, help="Models of each type, with other weights and prompts.")
    ] = 1,
    attention: Annotated[
        str | None, typer.Option(help="eager, sdpa, ... Each model's own choice by default.")
    ] = None,
    limit: Annotated[float, typer.Option(min=1.0, help="Seconds for each model.")] = 240.0,
    jobs: Annotated[int, typer.Option(min=1, help="Models at the same time.")] = 1,
    tape: Annotated[
        bool, typer.Option("--tape", help="Replay recorded passes over trees, as CUDA graphs are.")
    ] = False,
    out: Out = None,
) -> Report:
    """Draft for every model of transformers, tiny and random, and compare with its own generate.

    A difference that is gone in float64 counts as rounding.
    """
    from benchmarks.models.measure import failed, measure_models

    result = measure_models(
        names or (),
        image_text=vision,
        trials=split(trials),
        attention=attention,
        limit=limit,
        seeds=seeds,
        jobs=jobs,
        graphs="tape" if tape else "auto",
        keep=lambda found: save(found, out),
    )
    columns = ("model", "result", "way", "passes", "tokens", "seeds", "rounding", "note")
    counts = ", ".join(
        f"{key.replace('_', ' ')} {len(value)}"
        for key, value in result.items()
        if isinstance(value, list) or key in ("refused", "crashed", "stock_fails", "not_built")
    )
    table = Table("", columns, list(map(_row, result["models"].items())))
    return Report(result, [table, counts], different=bool(failed(result)))


def _row(item: tuple[str, dict[str, Any]]) -> tuple[str, ...]:
    name, entry = item
    drafts = entry.get("trials", {}).get("drafts", {})
    rounding = sum(trial["verdicts"].get("rounding", 0) for trial in entry.get("trials", {}).values())
    numbers = [str(drafts.get(key, "")) for key in ("passes", "tokens")]
    numbers += [str(entry["seeds"]), str(rounding)]
    return (
        name,
        entry["outcome"].replace("_", " "),
        entry.get("way") or "",
        *numbers,
        (entry["error"] or entry.get("reason", ""))[:100],
    )
