"""``python -m benchmarks grammars``: passes for JSON under schemas."""

from __future__ import annotations

from typing import Annotated

import typer

from retrieval_draft.cli.bench_common import Out, finish
from retrieval_draft.cli.common import Json
from retrieval_draft.cli.output import print_json, print_table

__all__ = ["grammars"]


def grammars(
    model: Annotated[str, typer.Option(help="Name or folder of a chat model.")] = "smollm2-135m",
    seeds: Annotated[int, typer.Option(min=0, help="Sampled replies of each task.")] = 2,
    out: Out = None,
    json: Json = False,
) -> None:
    """Count passes for JSON that follows a schema, with drafts and without, and compare the texts."""
    from benchmarks.grammars import measure_grammars

    result = measure_grammars(model, seeds)
    finish(result, out)
    if json:
        print_json(result)
        return
    rows = [
        [name, str(each["fewer_passes"]), str(each["tokens"]), f"{each['equal']}/{each['replies']}",
         f"{each['finished']}/{each['replies']}"]
        for name, each in result["tasks"].items()
    ]  # fmt: skip
    columns = ("task", "times fewer passes", "tokens", "equal", "JSON")
    print_table(f"JSON under schemas, {result['model']}", columns, rows)
