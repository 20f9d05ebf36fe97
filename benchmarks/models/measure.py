"""Trials of many models, each in a process of its own, and the numbers of them by outcome."""

from __future__ import annotations

import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from typing import Any, Literal

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from benchmarks.models.isolated import Failed, isolated
from benchmarks.models.shapes import NO_TEXT, VARIANTS
from benchmarks.models.tiny import tiny_model
from benchmarks.models.trials import COUNTS, TRIALS, described, try_model
from retrieval_draft._progress import progress
from retrieval_draft.bench.provenance import provenance
from retrieval_draft.errors import InvalidInputError

__all__ = ["OUTCOMES", "failed", "measure_models", "merged", "summary"]

OUTCOMES = ("equal", "plain", "refused", "differs", "crashed", "stock_fails", "not_built")
_LISTED = ("equal", "plain", "differs")
"""Outcomes whose models are listed; the others come with a reason each."""

_WORST = ("crashed", "differs", "refused", "stock_fails", "not_built", "plain", "equal")
_WORST_VERDICTS = ("crashed", "differs", "refused", "stock fails", "rounding", "equal")


def measure_models(
    names: Sequence[str] = (),
    *,
    image_text: bool = False,
    trials: Sequence[str] = TRIALS,
    attention: str | None = None,
    limit: float = 240.0,
    seeds: int = 1,
    jobs: int = 1,
    graphs: Literal["auto", "off", "tape"] = "auto",
    keep: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Tries models against `model.generate`.

    Args:
        names: Families, and keys of `VARIANTS`; all of them by default.
        image_text: Whether the classes that read images are meant, not those of text alone.
        trials: Names of `TRIALS`.
        attention: Attention implementation; None for each model's own choice.
        limit: Seconds for each model.
        seeds: Models of each name, with other weights and prompts.
        jobs: Models at the same time.
        graphs: As `DraftConfig.graphs`.
        keep: Called after every model with the object so far.

    Returns:
        The object that ``python -m benchmarks models --json`` prints.

    Raises:
        InvalidInputError: An unknown model or trial.
    """
    classes = dict(
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if image_text else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )
    variants = {} if image_text else {name: each for name, each in VARIANTS.items() if each[0] in classes}
    _check(names, [*classes, *variants], "a model type of transformers with such a class, or a variant")
    _check(trials, TRIALS, "a trial")
    chosen = list(dict.fromkeys(names)) or [*classes, *variants]
    begin, source = time.monotonic(), provenance()

    def run(name: str, seed: int) -> dict[str, Any]:
        family, settings = variants.get(name, (name, {}))
        mapping = "image-text" if image_text else "causal"
        entry = {"family": family, "mapping": mapping, "class": classes[family]}
        if family in NO_TEXT and not image_text:
            return {**entry, "outcome": "not_built", "error": NO_TEXT[family]}
        arguments = (family, classes[family], settings, image_text, attention, tuple(trials), seed, graphs)
        try:
            found: dict[str, Any] = isolated(_tried, *arguments, limit=limit)
        except Failed as error:
            return {**entry, "outcome": "crashed", "error": str(error)}
        return {**entry, **found}

    runs = [(name, seed) for name in chosen for seed in range(seeds)]
    with ThreadPoolExecutor(jobs) as pool, progress("Trying models", len(runs), delay=0.0) as advance:
        found: dict[str, list[dict[str, Any]]] = {}
        result = summary({})
        for (name, seed), entry in zip(runs, pool.map(lambda each: run(*each), runs), strict=True):
            found.setdefault(name, []).append(entry)
            advance()
            if seed < seeds - 1:
                continue
            seconds = round(time.monotonic() - begin, 1)
            entries = {name: merged(each) for name, each in found.items()}
            result = {**summary(entries), "seconds": seconds, "provenance": source}
            if keep is not None:
                keep(result)
    return result


def merged(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One entry for models of several seeds, in their order.

    Returns:
        The entry with the worst outcome, in which "error", and each "note" of a trial, names the seeds; the
        counts of a trial are those of all. New are "seeds", their number, "ways", the number of models by
        way, and "verdicts" of each trial, the number of models by verdict.
    """
    worst = min(entries, key=lambda entry: _WORST.index(entry["outcome"]))
    trials: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for entry in entries for name in entry.get("trials", {})):
        each = [entry.get("trials", {}).get(name) for entry in entries]
        verdicts = Counter(trial["verdict"] for trial in each if trial)
        trials[name] = {
            "verdict": min(verdicts, key=_WORST_VERDICTS.index),
            "note": _by_seed([trial["note"] if trial else "" for trial in each]),
            **{key: sum(trial[key] for trial in each if trial) for key in COUNTS},
            "verdicts": dict(verdicts),
        }
    return {
        **worst,
        "error": _by_seed([entry["error"] for entry in entries]),
        "trials": trials,
        "seeds": len(entries),
        "ways": dict(Counter(entry.get("way") for entry in entries)),
    }


def _by_seed(texts: Sequence[str]) -> str:
    """The texts that are not empty, with the number of each if there are several in all."""
    if len(texts) == 1:
        return texts[0]
    return "; ".join(f"seed {seed}: {text}" for seed, text in enumerate(texts) if text)


def summary(models: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The models by outcome, and the numbers of them by way.

    Args:
        models: By name, each with an "outcome" of `OUTCOMES`, an "error" and, where it was made, a "way".
    """
    result: dict[str, Any] = {}
    for outcome in OUTCOMES:
        found = {name: entry["error"] for name, entry in models.items() if entry["outcome"] == outcome}
        result[outcome] = list(found) if outcome in _LISTED else found
    result["rounding"] = [
        name
        for name, entry in models.items()
        if any(trial["verdict"] == "rounding" for trial in entry.get("trials", {}).values())
    ]
    ways = [models[name].get("way") for name in (*result["equal"], *result["plain"])]
    result["ways"] = {way: ways.count(way) for way in ("tree", "chain", "plain")}
    captured = [entry["captured"] for entry in models.values() if "captured" in entry]
    counts = {answer: captured.count(answer) for answer in ("yes", "rounding")}
    result["captured"] = {**counts, "no": len(captured) - sum(counts.values())}
    return {**result, "models": models}


def failed(result: dict[str, Any]) -> bool:
    """True if a model differs or crashed."""
    return bool(result["differs"] or result["crashed"])


def _check(given: Sequence[str], allowed: Sequence[str], noun: str) -> None:
    for name in given:
        if name not in allowed:
            close = get_close_matches(name, allowed, n=8, cutoff=0.3) or sorted(allowed)[:8]
            raise InvalidInputError(
                f"{name!r} is not {noun}.", f"There are {len(allowed)}, such as {', '.join(close)}."
            )


def _tried(
    family: str,
    kind: str,
    settings: dict[str, Any],
    image_text: bool,
    attention: str | None,
    trials: Sequence[str],
    seed: int,
    graphs: Literal["auto", "off", "tape"],
) -> dict[str, Any]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("retrieval_draft").setLevel(logging.ERROR)
    begin = time.monotonic()
    try:
        model = tiny_model(family, kind, settings, image_text, attention, seed)
    except Exception as error:  # a class's own code raises anything
        return {"outcome": "not_built", "error": described(error)}
    built = time.monotonic() - begin
    result = try_model(model, image_text, trials, seed, graphs)
    return {**result, "seconds": {"build": round(built, 1), "all": round(time.monotonic() - begin, 1)}}
