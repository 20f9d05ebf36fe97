"""Writes the tables of docs/models.md from what `python -m benchmarks models --out` wrote.

python scripts/models_page.py CAUSAL.json VISION.json ... docs/models.md
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

MARK = "<!-- made by scripts/models_page.py from here on -->\n"
TITLES = {"causal": "Text", "image-text": "Images and text"}
OUTCOMES = {
    "refused": "refused",
    "differs": "**differs**",
    "crashed": "**fails**",
    "stock_fails": "`model.generate` fails on the tiny model",
    "not_built": "no tiny model",
}
SHOWN = 160
_SAME = ("equal", "rounding")
_DRAFTED = {True: "drafted", False: "nothing drafted"}


def main(*paths: str) -> None:
    *sources, page = paths
    results = [json.loads(Path(path).read_text(encoding="utf-8")) for path in sources]
    text, _, earlier = Path(page).read_text(encoding="utf-8").partition(MARK)
    Path(page).write_text(f"{text}{MARK}\n{tables_of(results, earlier)}", encoding="utf-8")


def tables_of(results: Iterable[dict[str, Any]], earlier: str = "") -> str:
    """A table for each kind of class; of models that several results hold the last counts.

    Args:
        results: That the command wrote.
        earlier: What this made before: its table of a kind that no result is of stays.
    """
    tables: dict[str, dict[str, dict[str, Any]]] = {mapping: {} for mapping in TITLES}
    versions = set()
    for result in results:
        versions.add(result["provenance"]["versions"]["transformers"])
        for name, entry in result["models"].items():
            tables[entry["mapping"]][name] = entry
    if len(versions) != 1:
        raise SystemExit(
            f"These results are of transformers {', '.join(sorted(versions))}: measure with one."
        )
    first, *kept = re.split(r"^(?=## )", earlier, flags=re.MULTILINE)
    begin = f"Made with transformers {versions.pop()}.\n"
    parts = [begin]
    for mapping, title in TITLES.items():
        if tables[mapping]:
            parts.append("\n".join(_table(title, tables[mapping])))
            continue
        stays = [table.rstrip("\n") + "\n" for table in kept if table.startswith(f"## {title}\n")]
        if stays and first.strip() != begin.strip():
            raise SystemExit(f"The table {title!r} is of another version: give its results too.")
        parts += stays
    return "\n".join(parts)


def _table(title: str, models: dict[str, dict[str, Any]]) -> Iterator[str]:
    ways = [_way(entry) for entry in models.values()]
    counts = ", ".join(f"{ways.count(way)} {way}" for way in ("tree", "chain", "plain"))
    yield f"## {title}\n"
    unmeasured = ways.count("")
    yield f"{len(models)} models, variants included: {counts}; {unmeasured} not measured.\n"
    yield "| model type | way | note |\n|---|---|---|"
    families = defaultdict(list)
    for name, entry in models.items():
        families[entry["family"]].append((name, entry))
    for family, members in sorted(families.items()):
        first = next((entry for name, entry in members if name == family), members[0][1])
        notes = [_note(first)]
        notes += [_variant(name, entry, first) for name, entry in members if entry is not first]
        yield f"| `{family}` | {_way(first) or '-'} | {'; '.join(filter(None, notes))} |"
    yield ""


def _way(entry: dict[str, Any]) -> str:
    """The way of a model that is equal or plain, else nothing."""
    return entry["way"] if entry["outcome"] in ("equal", "plain") else ""


def _note(entry: dict[str, Any]) -> str:
    """The reason for a way other than trees, and the way after images."""
    if not _way(entry):
        return f"{OUTCOMES[entry['outcome']]}: {_short(entry['error'])}"
    notes = [] if entry["way"] == "tree" else [_short(entry["reason"].removeprefix("no trees: "))]
    images = entry["trials"].get("images")
    if images:
        notes.append(
            "with images: "
            + (_DRAFTED[bool(images["drafted"])] if images["verdict"] in _SAME else images["verdict"])
        )
    elif entry["mapping"] == "image-text":
        notes.append("not tried with images")
    return "; ".join(notes)


def _variant(name: str, entry: dict[str, Any], first: dict[str, Any]) -> str:
    """The way of a variant, if it is another."""
    if _way(entry) == _way(first):
        return ""
    return f"`{name}`: {_way(entry) or OUTCOMES[entry['outcome']]}"


def _short(text: str) -> str:
    """One line for a cell, without numbers that only a debugger needs."""
    text = re.sub(r" \(\w+\.py:\d+\)|: the logits differ by .*? is allowed", "", text)
    text = text.replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= SHOWN else text[:SHOWN].rsplit(" ", 1)[0] + " ..."


if __name__ == "__main__":
    main(*sys.argv[1:])
