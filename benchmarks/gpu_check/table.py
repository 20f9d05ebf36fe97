"""The last lines: one table of at most sixty rows, and the failures."""

from __future__ import annotations

from typing import Any

__all__ = ["make_table", "reasons"]

_MOST = 60
_MEASURING = ("races", "attention", "passes", "anatomy", "speed", "half_precision")
_COLUMNS = (
    "model", "context", "decoder", "tokens/s", "tokens per step", "ms a step", "host us", "kernels", "syncs",
    "equal",
)  # fmt: skip


def reasons(parts: dict[str, dict[str, Any]], names: list[str]) -> list[str]:
    """Reasons for which the check failed; empty where it passed."""
    found = []
    for name in names:
        part = parts.get(name)
        if part is None:
            found.append(f"{name}: did not run")
            continue
        found += [f"{name}: {reason}" for reason in part.get("failures", [])]
        if part.get("rows") == [] and name in _MEASURING and part.get("status") in ("done", "cut"):
            found.append(f"{name}: had no time for anything")
        if part.get("status") == "running":
            found.append(f"{name}: was not through")
    return found


def make_table(parts: dict[str, dict[str, Any]]) -> str:
    """The rows of the speed part, with the counts of anatomy, and passes in captured graphs."""
    counts = {_key(row): row for row in parts.get("anatomy", {}).get("rows", [])}
    rows = []
    for row in parts.get("speed", {}).get("rows", []):
        counted = counts.get(_key(row)) or {}
        rows.append([
            row["model"], row["context"], row["decoder"], row.get("tokens_per_second"),
            row.get("tokens_per_step"), row.get("step_ms"), row.get("host_us"), counted.get("kernels"),
            counted.get("syncs"), row.get("equal"),
        ])  # fmt: skip
    for row in parts.get("passes", {}).get("rows", []):
        if row.get("kind") == "captured" and row["nodes"] in (1, 32, 64):
            name, equal = f"captured pass over {row['nodes']}", row["reason"] or "replayed"
            rows.append([
                row["model"], row["context"], name, None, None, row["wall_ms"], None, None, None, equal,
            ])  # fmt: skip
        if row.get("graph") == "captured":
            ms = row["graph_ms"]
            equal = "equal" if row.get("graph_equals_eager") else f"off by {row['graph_error']:.1g}"
            rows.append([
                row["model"], row["context"], "graph of a plain pass", round(1e3 / ms, 1), 1.0, ms, None,
                None, None, equal,
            ])  # fmt: skip
    cells = [list(_COLUMNS), *([_cell(value) for value in row] for row in rows[:_MOST])]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_COLUMNS))]
    lines = [
        " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    # The kind of attention changes little in the composition of a step.
    return str(row["model"]), str(row["context"]), str(row["decoder"]).replace("-no-cudnn", "")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)
