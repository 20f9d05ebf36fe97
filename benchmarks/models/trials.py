"""Trials of one model: drafted text against that of `model.generate`."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.models.images import image_prompt
from benchmarks.models.shapes import TEXT_IDS
from benchmarks.models.tiny import random_prompt
from retrieval_draft.config import DraftConfig
from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.drafting.stats import DraftStats
from retrieval_draft.errors import RetrievalDraftError, UnsupportedModelError

__all__ = ["TRIALS", "Trial", "described", "try_model"]

TRIALS = ("greedy", "drafts", "seeded", "batch", "images")
"""`greedy` is `for_model(model)` as a user calls it; `drafts` are 16 nodes, with copies of the reply, a
fifth, a sixth and a ninth of their tokens wrong, as documents and prediction; `seeded` is sampling
against ``method="none"`` with the same seed; `batch` is three left-padded prompts against each alone;
`images` is a prompt with an image, for classes for which one can be made."""

_NEW = 60
_OPTIONS: dict[str, Any] = {"max_new_tokens": _NEW, "do_sample": False, "pad_token_id": 0}
_NODES = 16
_HISTORY = 1 << 20
_SHOWN = 300


@dataclass(frozen=True, slots=True)
class Trial:
    """Result of one trial.

    Attributes:
        verdict: "equal"; "rounding", a difference that is gone in float64; "differs", "refused", "crashed";
            or "stock fails" where `model.generate` fails on the same call.
        note: Position of the difference, or the error.
        tokens: Emitted ones.
        passes: Forward passes over drafts, that of the prompt left out.
        drafted: Draft tokens verified.
        accepted: Draft tokens emitted.
    """

    verdict: str
    note: str = ""
    tokens: int = 0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0


class _Subject:
    """A model with its drafters.

    Args:
        model: A tiny one.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.default = RetrievalDrafter.for_model(model)
        self._planted = RetrievalDrafter.for_model(model, config=DraftConfig(nodes=_NODES))

    def fresh(self) -> RetrievalDrafter:
        """A drafter of `_NODES` nodes that has seen no text."""
        return self._planted.namespace("trial", _HISTORY)


class _StockFails(Exception):
    """An error of `model.generate`."""


def described(error: BaseException) -> str:
    """An error in one line, with the line of code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    at = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:_SHOWN]}{at}"


def try_model(model: Any, image_text: bool, trials: Iterable[str] = TRIALS) -> dict[str, Any]:
    """Runs trials of a model, and those that differ again in float64, to which it is then converted.

    Args:
        model: A tiny one in float32.
        image_text: Whether its class reads images.
        trials: Names of `TRIALS`.

    Returns:
        For JSON: "outcome", one of equal, plain, refused, differs, crashed and stock_fails; "error", empty
        where there is none; "way" and "reason" of the verification; "layers", the number of each kind;
        "trials" by name, with the fields of `Trial`.
    """
    result: dict[str, Any] = {
        "class": type(model).__name__,
        "layers": _layers(model),
        "way": None,
        "reason": "",
    }
    prompt = random_prompt(50, 5)
    try:
        _stock(model, prompt, torch.ones_like(prompt))
    except _StockFails as error:
        return {**result, "outcome": "stock_fails", "error": str(error), "trials": {}}
    try:
        subject = _Subject(model)
    except Exception as error:
        outcome = "refused" if isinstance(error, UnsupportedModelError) else "crashed"
        return {**result, "outcome": outcome, "error": described(error), "trials": {}}
    way = subject.default.verification.way
    result |= {"way": way, "reason": subject.default.verification.reason}
    wanted = [name for name in TRIALS if name in trials and (name != "images" or image_text)]
    found = {name: trial for name in wanted if (trial := _tried(subject, name)) is not None}
    different = [name for name, trial in found.items() if trial.verdict == "differs"]
    if different and _to_float64(model):
        subject = _Subject(model)
        for name in different:
            again = _tried(subject, name)
            if again is not None and again.verdict == "equal":
                found[name] = replace(
                    found[name], verdict="rounding", note=f"{found[name].note}; equal in float64"
                )
    return {**result, **_outcome(found, way), "trials": {name: asdict(each) for name, each in found.items()}}


def _outcome(trials: dict[str, Trial], way: str) -> dict[str, str]:
    """The worst verdict of all, with its note."""
    for verdict in ("crashed", "differs", "refused"):
        bad = [f"{name}: {trial.note}" for name, trial in trials.items() if trial.verdict == verdict]
        if bad:
            return {"outcome": verdict, "error": "; ".join(bad)}
    return {"outcome": "plain" if way == "plain" else "equal", "error": ""}


def _tried(subject: _Subject, name: str) -> Trial | None:
    """A trial by name; None where no input can be made for it."""
    calls: dict[str, Callable[[_Subject], Trial | None]] = {
        "greedy": _greedy,
        "drafts": _drafts,
        "seeded": _seeded,
        "batch": _batch,
        "images": _images,
    }
    try:
        return calls[name](subject)
    except _StockFails as error:
        return Trial("stock fails", str(error))
    except RetrievalDraftError as error:
        return Trial("refused", described(error))
    except Exception as error:
        return Trial("crashed", described(error))


def _greedy(subject: _Subject) -> Trial:
    prompt = random_prompt(50, 5)
    mask = torch.ones_like(prompt)
    expected = _stock(subject.model, prompt, mask)
    return _judged(_ours(subject.default, prompt, mask), expected, prompt.shape[1], subject.default)


def _drafts(subject: _Subject) -> Trial:
    prompt = random_prompt(50, 5)
    mask = torch.ones_like(prompt)
    expected = _stock(subject.model, prompt, mask)
    with subject.fresh() as drafter:
        ours = _ours(drafter, prompt, mask, **_planted(expected[0, prompt.shape[1] :]))
        return _judged(ours, expected, prompt.shape[1], drafter)


def _seeded(subject: _Subject) -> Trial:
    prompt = random_prompt(50, 5)
    mask = torch.ones_like(prompt)
    options = {"do_sample": True, "temperature": 0.7, "top_k": 0, "seed": 11}
    with RetrievalDrafter.for_model(subject.model, method="none") as undrafted:
        expected = _ours(undrafted, prompt, mask, **options)
    with subject.fresh() as drafter:
        ours = _ours(drafter, prompt, mask, **_planted(expected[0, prompt.shape[1] :]), **options)
        return _judged(ours, expected, prompt.shape[1], drafter)


def _batch(subject: _Subject) -> Trial:
    prompts = [random_prompt(length, seed) for length, seed in ((50, 5), (33, 6), (41, 7))]
    width = max(prompt.shape[1] for prompt in prompts)
    pad = torch.nn.functional.pad
    ids = torch.cat([pad(each, (width - each.shape[1], 0)) for each in prompts])
    mask = torch.cat([pad(torch.ones_like(each), (width - each.shape[1], 0)) for each in prompts])
    if subject.default.verification.way == "plain":
        # Undrafted text is that of the model's own batch, which padding may change.
        expected = _stock(subject.model, ids, mask)[:, width:]
    else:
        alone = [_stock(subject.model, each, torch.ones_like(each))[:, each.shape[1] :] for each in prompts]
        expected = torch.cat(alone)
    with subject.fresh() as drafter:
        ours = _ours(drafter, ids, mask, **_planted(*expected))[:, width:]
        rows = [_judged(*pair, 0, drafter) for pair in zip(ours.split(1), expected.split(1), strict=True)]
    bad = [f"row {number} {row.note}" for number, row in enumerate(rows) if row.verdict != "equal"]
    return replace(rows[0], verdict="differs" if bad else "equal", note="; ".join(bad))


def _images(subject: _Subject) -> Trial | None:
    inputs = image_prompt(subject.model)
    if inputs is None:
        return None
    ids, mask, pixels = inputs
    expected = _stock(subject.model, ids, mask, **pixels)
    with subject.fresh() as drafter:
        ours = _ours(drafter, ids, mask, **_planted(expected[0, ids.shape[1] :]), **pixels)
        return _judged(ours, expected, ids.shape[1], drafter)


def _stock(model: Any, ids: Tensor, mask: Tensor, **inputs: Any) -> Tensor:
    """Greedy text of `model.generate`: int64, shape (batch, length + new)."""
    torch.manual_seed(0)  # Reformer hashes at random
    try:
        out: Tensor = model.generate(ids, attention_mask=mask, **{**_OPTIONS, **inputs})
    except Exception as error:
        raise _StockFails(described(error)) from error
    return out


def _ours(drafter: RetrievalDrafter, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    """The drafter's text from the same state of torch's generator: int64, shape (batch, length + new)."""
    torch.manual_seed(0)
    out: Tensor = drafter.generate(ids, mask, **{**_OPTIONS, **options})
    return out


def _planted(*replies: Tensor) -> dict[str, Any]:
    """Texts to draft from, in which every fifth, sixth or ninth token of a reply is another."""
    documents: list[list[int]] = []
    for seed, every in enumerate((5, 6, 9)):
        generator = torch.Generator().manual_seed(seed)
        for reply in replies:
            wrong = reply.clone()
            count = len(wrong[every - 1 :: every])
            wrong[every - 1 :: every] = torch.randint(
                TEXT_IDS.start, TEXT_IDS.stop, (count,), generator=generator
            )
            documents.append(wrong.tolist())
    return {"documents": documents[:-1], "prediction": documents[-1]}


def _judged(ours: Tensor, expected: Tensor, start: int, drafter: RetrievalDrafter) -> Trial:
    """The first difference of two texts, int64, shape (1, length), after `start` tokens."""
    note = ""
    if not torch.equal(ours, expected):
        size = min(ours.shape[1], expected.shape[1])
        different = (ours[0, :size] != expected[0, :size]).nonzero()
        note = f"after {int(different[0]) - start if len(different) else size - start} tokens"
    stats = drafter.last_stats or DraftStats()
    counts = (stats.tokens, stats.passes, stats.drafted, stats.accepted)
    return Trial("differs" if note else "equal", note, *counts)


def _to_float64(model: Any) -> bool:
    """Converts a model, except where it cannot be."""
    for part in model.modules():
        if hasattr(getattr(part, "config", None), "_experts_implementation"):
            part.config._experts_implementation = "eager"  # grouped products know no float64
    prompt = random_prompt(50, 5)
    try:
        _stock(model.double(), prompt, torch.ones_like(prompt))
    except _StockFails:
        return False
    return True


def _layers(model: Any) -> dict[str, int]:
    """Layers by the kind that the configuration names, empty where it names none."""
    text = model.config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    return dict(Counter(map(str, kinds)))
