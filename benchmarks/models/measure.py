"""Trials of many models, each in a process of its own with limits of time and memory."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from benchmarks.models.shapes import NO_TEXT, VARIANTS
from benchmarks.models.tiny import tiny_model
from benchmarks.models.trials import TRIALS, described, try_model
from retrieval_draft._progress import progress
from retrieval_draft.bench.provenance import provenance
from retrieval_draft.errors import InvalidInputError

__all__ = ["OUTCOMES", "failed", "measure_models", "summary"]

OUTCOMES = ("equal", "plain", "refused", "differs", "crashed", "stock_fails", "not_built")
_LISTED = ("equal", "plain", "differs")
"""Outcomes whose models are listed; the others come with a reason each."""

_MEMORY = 12 << 30
"""Bytes of address space of one process."""


def measure_models(
    names: Sequence[str] = (),
    *,
    image_text: bool = False,
    trials: Sequence[str] = TRIALS,
    attention: str | None = None,
    limit: float = 240.0,
    jobs: int = 1,
) -> dict[str, Any]:
    """Tries models against `model.generate`.

    Args:
        names: Families, and keys of `VARIANTS`; all of them by default.
        image_text: Whether the classes that read images are meant, not those of text alone.
        trials: Names of `TRIALS`.
        attention: Attention implementation; None for each model's own choice.
        limit: Seconds for each model.
        jobs: Models at the same time.

    Returns:
        The object that ``python -m benchmarks models --json`` prints.

    Raises:
        InvalidInputError: An unknown model or trial.
    """
    classes = dict(
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if image_text else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )
    variants = {} if image_text else {name: each for name, each in VARIANTS.items() if each[0] in classes}
    _check(names, [*classes, *variants], "model")
    _check(trials, TRIALS, "trial")
    chosen = list(dict.fromkeys(names)) or [*classes, *variants]
    begin = time.monotonic()

    def run(name: str) -> dict[str, Any]:
        family, settings = variants.get(name, (name, {}))
        mapping = "image-text" if image_text else "causal"
        entry = {"family": family, "mapping": mapping, "class": classes[family]}
        if family in NO_TEXT and not image_text:
            return {**entry, "outcome": "not_built", "error": NO_TEXT[family]}
        arguments = (family, classes[family], settings, image_text, attention, tuple(trials))
        return {**entry, **_in_process(arguments, limit)}

    with ThreadPoolExecutor(jobs) as pool, progress("Trying models", len(chosen), delay=0.0) as advance:
        entries = {}
        for name, entry in zip(chosen, pool.map(run, chosen), strict=True):
            entries[name] = entry
            advance()
    return {**summary(entries), "seconds": round(time.monotonic() - begin, 1), "provenance": provenance()}


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
    return {**result, "models": models}


def failed(result: dict[str, Any]) -> bool:
    """True if a model differs or crashed."""
    return bool(result["differs"] or result["crashed"])


def _check(given: Sequence[str], allowed: Sequence[str], noun: str) -> None:
    unknown = [name for name in given if name not in allowed]
    if unknown:
        raise InvalidInputError(
            f"No such {noun}: {', '.join(unknown)}.", f"Allowed: {', '.join(sorted(allowed))}."
        )


def _in_process(arguments: tuple[Any, ...], limit: float) -> dict[str, Any]:
    """The trials of one model, in a process forked from one that has imported everything and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, *arguments), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            return {"outcome": "crashed", "error": f"not done after {limit:g} s"}
        result: dict[str, Any] = receiver.recv()
        return result
    except EOFError:
        process.join()
        return {"outcome": "crashed", "error": f"the process died with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()
        receiver.close()


def _child(sender: Connection, *arguments: Any) -> None:
    with open(os.devnull, "w") as nothing:  # models print  # noqa: PTH123
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    sender.send(_outcome(*arguments))


def _outcome(
    family: str,
    kind: str,
    settings: dict[str, Any],
    image_text: bool,
    attention: str | None,
    trials: Sequence[str],
) -> dict[str, Any]:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("retrieval_draft").setLevel(logging.ERROR)
    begin = time.monotonic()
    try:
        model = tiny_model(family, kind, settings, image_text, attention)
    except Exception as error:
        return {"outcome": "not_built", "error": described(error)}
    built = time.monotonic() - begin
    result = try_model(model, image_text, trials)
    return {**result, "seconds": {"build": round(built, 1), "all": round(time.monotonic() - begin, 1)}}
