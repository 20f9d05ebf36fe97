"""``python -m benchmarks grammars``: passes for replies that follow a grammar."""

from __future__ import annotations

from typing import Annotated

import typer

from retrieval_draft.cli.common import split
from retrieval_draft.cli.options import Report, Table, measurement

__all__ = ["grammars"]


@measurement
def grammars(
    model: Annotated[str, typer.Option(help="Name or folder of a chat model.")] = "smollm2-135m",
    requests: Annotated[int, typer.Option(min=1, max=25, help="Of each of eight shapes.")] = 25,
    shapes: Annotated[
        str, typer.Option(help="By commas, to measure in parts; all by default.", show_default=False)
    ] = "",
    history: Annotated[bool, typer.Option(help="Draft from earlier requests of the same shape.")] = True,
    ways: Annotated[
        str, typer.Option(help="alternating: half greedy, half seeded; reversed: the other halves; or both.")
    ] = "alternating",
) -> Report:
    """Count passes for replies of eight shapes, greedy and seeded; compare them and validate them."""
    from benchmarks.grammar_tasks import TASKS
    from benchmarks.grammars import measure_grammars
    from retrieval_draft.bench.provenance import provenance

    result = measure_grammars(model, requests, shapes=split(shapes) or (*TASKS,), history=history, ways=ways)
    rows = [
        [name, str(each["fewer_passes"]), str(each["tokens"]),
         *(f"{each[key]}/{each['requests']}" for key in ("equal", "ended", "valid"))]
        for name, each in result["shapes"].items()
    ]  # fmt: skip
    columns = ("shape", "times fewer passes", "tokens", "equal", "ended", "valid")
    title = f"Replies by grammars, {result['model']}: {result['fewer_passes']}"
    different = min(result["equal"], result["valid"]) < result["requests"]
    return Report(result, [Table(title, columns, rows)], different, saved=result | provenance())
