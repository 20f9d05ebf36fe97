"""Trials of one model: drafted text against that of `model.generate`."""

from __future__ import annotations

import functools
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.models.float64 import to_float64
from benchmarks.models.images import image_prompt
from benchmarks.models.served import served
from benchmarks.models.shapes import TEXT_IDS
from benchmarks.models.tiny import random_prompt
from retrieval_draft.config import DraftConfig
from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.errors import RetrievalDraftError, UnsupportedModelError

__all__ = ["COUNTS", "TRIALS", "Trial", "described", "try_model"]

TRIALS = ("greedy", "drafts", "seeded", "batch", "server", "images", "seeded-images")
"""`greedy` is `for_model(model)` as a user calls it; `drafts` are 16 nodes, with copies of the reply, a
fifth, a sixth and a ninth of their tokens wrong, as documents and prediction; `seeded` is sampling
against ``method="none"`` with the same seed; `batch` is four left-padded prompts against each alone;
`server` has the server's scheduler decode the same four, three greedily and one sampled, where something is
drafted; `images` is a prompt with an image, for classes for which one can be made, and `seeded-images` is
sampling after it."""

COUNTS = ("tokens", "passes", "drafted", "accepted", "calls")
"""Attributes of a `Trial` that several trials have in all."""

_NEW = 60
_OPTIONS: dict[str, Any] = {"max_new_tokens": _NEW, "do_sample": False, "pad_token_id": 0}
_NODES = 16
_HISTORY = 1 << 20
_SHOWN = 300
_SEEDS = 1000
_LENGTHS = (50, 33, 41, 20)
"""Tokens of the prompts of a batch; the first is the prompt of trials with one."""
_SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_k": 0}


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
        calls: Calls of the model, in `drafts`: one for the prompt and one for each pass.
    """

    verdict: str
    note: str = ""
    tokens: int = 0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    calls: int = 0


class _Subject:
    """A model with its drafters and prompts.

    Args:
        model: A tiny one.
        seed: Of the prompts and of sampling.
        config: Of all drafters, but for their nodes.
    """

    def __init__(self, model: Any, seed: int, config: DraftConfig) -> None:
        self.model = model
        self.seed = _SEEDS * seed + 11
        self.prompts = _prompts(seed)
        self.default = RetrievalDrafter.for_model(model, config=config)
        # Not "auto", which passes a prompt several times to find out.
        self._planted = RetrievalDrafter.for_model(
            model, config=replace(config, nodes=_NODES, prefill_logits=False)
        )

    @functools.cached_property
    def pictured(self) -> tuple[Tensor, Tensor, dict[str, Any]] | None:
        """A prompt with an image, as `image_prompt` makes it."""
        return image_prompt(self.model, self.seed)

    @property
    def captured(self) -> str:
        """The word yes if passes over drafts were replayed, and none made eagerly for a reason; else that."""
        graphs = self._planted.target.graphs
        if graphs is None:
            return "no"
        return graphs.reason or ("yes" if graphs.replays else "no pass over a tree")

    @property
    def is_dropped(self) -> bool:
        """True if passes over trees were to be captured, and are eager for a reason."""
        graphs = self._planted.target.graphs
        return graphs is not None and graphs.reason is not None

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


def try_model(
    model: Any,
    image_text: bool,
    trials: Iterable[str] = TRIALS,
    seed: int = 0,
    graphs: Literal["auto", "off", "tape"] = "auto",
) -> dict[str, Any]:
    """Runs trials of a model, and those that differ again in float64, to which it is then converted.

    Args:
        model: A tiny one in float32.
        image_text: Whether its class reads images.
        trials: Names of `TRIALS`.
        seed: Of the prompts and of sampling.
        graphs: As `DraftConfig.graphs`.

    Returns:
        For JSON: "outcome", one of equal, plain, refused, differs, crashed and stock_fails; "error", empty
        where there is none; "way" and "reason" of the verification; "layers", the number of each kind;
        "trials" by name, with the fields of `Trial`; "captured", whether passes over
        trees were replayed, or why not, or rounding where they are in float64 alone.
    """
    result: dict[str, Any] = {
        "class": type(model).__name__,
        "layers": _layers(model),
        "way": None,
        "reason": "",
    }
    prompt = _prompts(seed)[0]
    try:
        _stock(model, prompt, torch.ones_like(prompt))
    except _StockFails as error:
        return {**result, "outcome": "stock_fails", "error": str(error), "trials": {}}
    try:
        subject = _Subject(model, seed, DraftConfig(graphs=graphs))
    except Exception as error:  # any failure is counted
        outcome = "refused" if isinstance(error, UnsupportedModelError) else "crashed"
        return {**result, "outcome": outcome, "error": described(error), "trials": {}}
    way = subject.default.verification.way
    result |= {"way": way, "reason": subject.default.verification.reason}
    wanted = [name for name in TRIALS if name in trials and (image_text or not name.endswith("images"))]
    found = {name: trial for name in wanted if (trial := _tried(subject, name)) is not None}
    result["captured"] = subject.captured
    different = [name for name, trial in found.items() if trial.verdict == "differs"]
    repeated = list(found) if subject.is_dropped else different
    if repeated and to_float64(model, lambda: _stock(model, prompt, torch.ones_like(prompt))):
        subject = _Subject(model, seed, DraftConfig(graphs=graphs))
        for name in repeated:
            again = _tried(subject, name)
            if name in different and again is not None and again.verdict == "equal":
                found[name] = replace(
                    found[name], verdict="rounding", note=f"{found[name].note}; equal in float64"
                )
        if result["captured"] != "yes" and subject.captured == "yes":
            result["captured"] = "rounding"
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
        "server": _server,
        "images": _images,
        "seeded-images": _seeded_images,
    }
    try:
        return calls[name](subject)
    except _StockFails as error:
        return Trial("stock fails", str(error))
    except RetrievalDraftError as error:
        return Trial("refused", described(error))
    except Exception as error:  # any failure is counted
        return Trial("crashed", described(error))


def _greedy(subject: _Subject) -> Trial:
    prompt = subject.prompts[0]
    mask = torch.ones_like(prompt)
    expected = _stock(subject.model, prompt, mask)
    return _judged(_ours(subject.default, prompt, mask), expected, prompt.shape[1], subject.default)


def _drafts(subject: _Subject) -> Trial:
    prompt = subject.prompts[0]
    mask = torch.ones_like(prompt)
    expected = _stock(subject.model, prompt, mask)
    with subject.fresh() as drafter:
        drafter.warm_up()
        with _counted_calls(subject.model) as calls:
            ours = _ours(drafter, prompt, mask, **_planted(expected[0, prompt.shape[1] :]))
        return replace(_judged(ours, expected, prompt.shape[1], drafter), calls=len(calls))


def _seeded(subject: _Subject) -> Trial:
    prompt = subject.prompts[0]
    mask = torch.ones_like(prompt)
    options = {**_SAMPLED, "seed": subject.seed}
    expected = _undrafted(subject, prompt, **options)
    with subject.fresh() as drafter:
        ours = _ours(drafter, prompt, mask, **_planted(expected[0, prompt.shape[1] :]), **options)
        return _judged(ours, expected, prompt.shape[1], drafter)


def _batch(subject: _Subject) -> Trial:
    prompts = subject.prompts
    width = max(prompt.shape[1] for prompt in prompts)
    pad = torch.nn.functional.pad
    ids = torch.cat([pad(each, (width - each.shape[1], 0)) for each in prompts])
    mask = torch.cat([pad(torch.ones_like(each), (width - each.shape[1], 0)) for each in prompts])
    if subject.default.verification.way == "plain":
        # Undrafted text is that of the model's own batch, which padding may change.
        expected = _stock(subject.model, ids, mask)[:, width:]
    else:
        expected = torch.cat(_alone(subject, prompts))
    with subject.fresh() as drafter:
        ours = _ours(drafter, ids, mask, **_planted(*expected))[:, width:]
        return _judged_rows(ours.split(1), expected.split(1), drafter)


def _server(subject: _Subject) -> Trial | None:
    if subject.default.verification.way == "plain":
        return None  # the server refuses such a model
    *greedy, last = subject.prompts
    sampled = {**_SAMPLED, "seed": subject.seed}
    expected = [
        *_alone(subject, greedy),
        _undrafted(subject, last, **sampled)[:, last.shape[1] :],
    ]
    options = [
        {**_OPTIONS, **more, **_planted(text[0])}
        for text, more in zip(expected, [*({} for _ in greedy), sampled], strict=True)
    ]
    with subject.fresh() as drafter:
        replies = served(drafter, subject.prompts, options)
        ours = [torch.tensor([reply], dtype=torch.int64) for reply in replies]
        return _judged_rows(ours, expected, drafter)


def _alone(subject: _Subject, prompts: Iterable[Tensor]) -> list[Tensor]:
    """Greedy replies of the model's own generate to each prompt alone: int64, shape (1, new)."""
    return [_stock(subject.model, each, torch.ones_like(each))[:, each.shape[1] :] for each in prompts]


def _undrafted(subject: _Subject, prompt: Tensor, **options: Any) -> Tensor:
    """Text of the same decoding loop without drafts: int64, shape (1, length + new)."""
    with RetrievalDrafter.for_model(subject.model, method="none") as undrafted:
        return _ours(undrafted, prompt, torch.ones_like(prompt), **options)


def _judged_rows(ours: Iterable[Tensor], expected: Iterable[Tensor], drafter: RetrievalDrafter) -> Trial:
    """As `_judged` for replies, int64, shape (1, new) each."""
    rows = [_judged(*pair, 0, drafter) for pair in zip(ours, expected, strict=True)]
    bad = [f"row {number} {row.note}" for number, row in enumerate(rows) if row.verdict != "equal"]
    return replace(rows[0], verdict="differs" if bad else "equal", note="; ".join(bad))


def _images(subject: _Subject) -> Trial | None:
    if subject.pictured is None:
        return None
    ids, mask, pixels = subject.pictured
    expected = _stock(subject.model, ids, mask, **pixels)
    with subject.fresh() as drafter:
        ours = _ours(drafter, ids, mask, **_planted(expected[0, ids.shape[1] :]), **pixels)
        return _judged(ours, expected, ids.shape[1], drafter)


def _seeded_images(subject: _Subject) -> Trial | None:
    if subject.pictured is None or subject.default.verification.way == "plain":
        return None  # sampled plainly, both texts are one call
    ids, mask, pixels = subject.pictured
    options = {**pixels, **_SAMPLED, "seed": subject.seed}
    with RetrievalDrafter.for_model(subject.model, method="none") as undrafted:
        expected = _ours(undrafted, ids, mask, **options)
    with subject.fresh() as drafter:
        ours = _ours(drafter, ids, mask, **_planted(expected[0, ids.shape[1] :]), **options)
        return _judged(ours, expected, ids.shape[1], drafter)


@contextmanager
def _counted_calls(model: Any) -> Iterator[list[None]]:
    """A list that grows with each call of a model."""
    calls: list[None] = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        handle.remove()


def _prompts(seed: int) -> list[Tensor]:
    """Prompts of `_LENGTHS` tokens: int64, shape (1, length) each."""
    return [random_prompt(length, _SEEDS * seed + 5 + row) for row, length in enumerate(_LENGTHS)]


def _stock(model: Any, ids: Tensor, mask: Tensor, **inputs: Any) -> Tensor:
    """Greedy text of `model.generate`: int64, shape (batch, length + new)."""
    torch.manual_seed(0)  # Reformer hashes at random
    try:
        out: Tensor = model.generate(ids, attention_mask=mask, **{**_OPTIONS, **inputs})
    except Exception as error:  # a model's own code raises anything
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
    stats = drafter.last_stats or drafter.stats  # the server counts for all of its requests
    counts = (stats.tokens, stats.passes, stats.drafted, stats.accepted)
    return Trial("differs" if note else "equal", note, *counts)


def _layers(model: Any) -> dict[str, int]:
    """Layers by the kind that the configuration names, empty where it names none."""
    text = model.config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    return dict(Counter(map(str, kinds)))
