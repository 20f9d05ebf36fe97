"""Runs a case, and says at what call and how it differs from model.generate."""

from __future__ import annotations

import copy
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import dropwhile
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.drafting.stats import DraftStats
from retrieval_draft.errors import RetrievalDraftError
from tests.random_generate.architectures import model_of
from tests.random_generate.case import Call, Case
from tests.random_generate.processors import PROCESSORS, DividedBy
from tests.random_generate.reference import keyed_draws
from tests.support.drafters import drafter_with
from tests.support.models import CACHE
from tests.support.sources import OracleSource
from tests.support.tiny import letter_tokenizer

__all__ = ["Difference", "Outcome", "compare_outputs", "run"]

CLOSE = 2e-3
"""Largest difference of scores and logits between sizes of pass, in float32."""

_ROW_BY_ROW = frozenset({
    "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff",
    "eta_cutoff", "suppress_tokens", "eos_token_id", "pad_token_id", "min_new_tokens", "renormalize_logits",
    "num_return_sequences", "output_scores", "output_logits", "return_dict_in_generate", "prefill_chunk_size",
    "remove_invalid_values", "use_cache",
})  # fmt: skip
"""Options that mean the same to a row with padding and without."""

_WORDS = ("cache", "attention_mask", "prompt", "row", "embedding", "processor")
"""Words that a refusal may name beside options."""


class Difference(AssertionError):
    """A call that says something else than model.generate.

    Attributes:
        call: Its number.
        what: The part that differs.
        expected: Token ids of model.generate, or its error.
        got: Those of the drafter.
    """

    def __init__(self, call: int, what: str, expected: Any, got: Any) -> None:
        super().__init__(f"call {call}: {what}: expected {expected}, got {got}")
        self.call, self.what, self.expected, self.got = call, what, expected, got


@dataclass
class Outcome:
    """Outcome of cases.

    Attributes:
        calls: Calls that returned and were equal.
        tokens: New tokens in them.
        accepted: Draft tokens among those.
        refused: Calls that were refused, by message.
        raised: Calls that raised, as model.generate did, by its error.
        rounding: Cases that differed in float32, and not in float64.
    """

    calls: int = 0
    tokens: int = 0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    raised: Counter[str] = field(default_factory=Counter)
    rounding: int = 0

    def add(self, other: Outcome) -> None:
        """Adds the counts of `other`."""
        for name in ("calls", "tokens", "accepted", "rounding"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.refused += other.refused
        self.raised += other.raised


def compare_outputs(case: Case) -> Outcome:
    """Runs a case; one that differs in float32 is run again in float64, where rounding decides nothing.

    Raises:
        Difference: It differs in both.
    """
    try:
        return run(case, torch.float32)
    except Difference as difference:
        try:
            outcome = run(case, torch.float64)
        except Difference:
            raise difference from None
        outcome.rounding = 1
        return outcome


def run(case: Case, dtype: torch.dtype) -> Outcome:
    """Runs the calls of a case.

    Raises:
        Difference: From model.generate; or something raised outside the calls.
    """
    try:
        return _run(case, dtype)
    except Difference:
        raise
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise Difference(
            -1, f"{type(error).__name__}: {error}", None, f"{at.filename}:{at.lineno}"
        ) from error


def _run(case: Case, dtype: torch.dtype) -> Outcome:
    model = model_of(case.architecture, case.attention, case.vocabulary, case.weights, dtype)
    outcome, oracle = Outcome(), OracleSource(vocabulary=case.vocabulary, wrong=case.wrong)
    if case.method == "oracle":
        drafter = drafter_with(model, oracle, **case.config)
    else:
        draft = {"none": None, "self": "self"}.get(case.draft_model)
        if case.draft_model == "tiny":
            draft = model_of("llama", "sdpa", case.vocabulary, 99, dtype)
        config = DraftConfig(method=case.method, **case.config)
        drafter = RetrievalDrafter.for_model(model, config=config, draft_model=draft)
    conversation = _Conversation(case, model, drafter, oracle, outcome)
    with drafter:
        for number, call in enumerate(case.calls):
            conversation.take(number, call)
    return outcome


class _Conversation:
    """Calls of one drafter, and what they have said so far."""

    def __init__(
        self, case: Case, model: Any, drafter: RetrievalDrafter, oracle: OracleSource, outcome: Outcome
    ) -> None:
        self.case, self.model, self.drafter, self.oracle = case, model, drafter, oracle
        self.outcome = outcome
        self.texts: list[list[int]] = []
        self.returned: Any = None
        self.dynamic = DynamicCache(config=model.config)

    def take(self, number: int, call: Call) -> None:
        """Makes a call, and compares it with model.generate."""
        prompts = self._prompts(call)
        width = max(map(len, prompts))
        samples = int(call.options.get("num_return_sequences", 1))
        seeds = call.seeds if isinstance(call.seeds, list) else [call.seeds] * len(prompts)
        seeds = [seeds[row % len(seeds)] for row in range(len(prompts))]
        alone: list[Any] = []
        if self.case.route == "continuous":
            for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
                alone.append(self._stock(self._of_row(call, row), [prompt], [seed]))
            failed = [each for each in alone if isinstance(each, Exception)]
            expected = failed[0] if failed else alone[0]
        else:
            expected = self._stock(call, prompts, seeds)
        wanted: list[list[int]] = []
        if alone and not failed:
            for prompt, each in zip(prompts, alone, strict=True):
                wanted += each.sequences[:, len(prompt) :].tolist()
        elif not isinstance(expected, Exception):
            wanted = expected.sequences[:, width:].tolist()
        # Sessions are opened row by row.
        self.oracle.replies = [*([[]] * len(self.oracle.sessions)), *(wanted or [[]])]
        before = self.drafter.stats.accepted
        try:
            got = self._ours(call, prompts, seeds, wanted)
        except RetrievalDraftError as error:
            self._refused(number, call, error, expected)
            self.texts, self.returned = [], None
            return
        except Exception as error:
            if isinstance(expected, Exception):
                self.outcome.raised[_named(expected, error)] += 1
                self.texts, self.returned = [], None
                return
            at = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{at.filename}:{at.lineno}"
            raise Difference(number, f"raised {type(error).__name__}: {error}", wanted, where) from error
        if isinstance(expected, Exception):
            # A failure in a row that has ended, or in one sample, fails a batch of model.generate.
            alone = alone or [self._stock(call, [p], [s]) for p, s in zip(prompts, seeds, strict=True)]
            if (len(prompts) == 1 and samples == 1) or any(type(e) is type(expected) for e in alone):
                raise Difference(number, "did not raise", repr(expected), got.rows)
            self.outcome.raised[f"{type(expected).__name__} in a batch, ours nothing"] += 1
            self.texts, self.returned = [], None
            return
        if self.case.route == "continuous":
            pad = call.options.get("pad_token_id", 0)
            for row, (mine, theirs) in enumerate(zip(got.rows, wanted, strict=True)):
                if not _same(mine, theirs, pad):
                    raise Difference(number, f"tokens of row {row}", theirs, mine)
        else:
            self._compare(number, call, prompts, expected, got)
            self._compare_alone(number, call, prompts, seeds, got)
        self.outcome.calls += 1
        self.outcome.tokens += sum(map(len, got.rows))
        self.outcome.accepted += self.drafter.stats.accepted - before
        self.texts = [prompts[got.owner(row, samples)] + reply for row, reply in enumerate(got.rows)]
        self.returned = got.cache
        self.drafter.flush()

    def _prompts(self, call: Call) -> list[list[int]]:
        if not (call.follows and self.texts):
            return call.prompts
        out = []
        for row, whole in enumerate(self.texts):
            text = whole[: max(len(whole) - call.cut, 0)]
            if call.changed is not None and text:
                index = call.changed % len(text)
                text[index] = (text[index] + 1) % self.case.vocabulary
            out.append(text + call.prompts[row % len(call.prompts)])
        return out

    def _refused(self, number: int, call: Call, error: RetrievalDraftError, expected: Any) -> None:
        message = f"{type(error).__name__}: {error}"
        if isinstance(expected, Exception):
            self.outcome.raised[_named(expected, error)] += 1
            return
        if not any(name in message for name in (*call.options, *_WORDS)):
            raise Difference(number, "refused without a name", expected.sequences.tolist(), message)
        self.outcome.refused["".join("#" if c.isdigit() else c for c in message)[:100]] += 1

    def _stock(self, call: Call, prompts: list[list[int]], seeds: list[int]) -> Any:
        """The dictionary that model.generate returns, or the error it raises."""
        samples = int(call.options.get("num_return_sequences", 1))
        rows = [prompt for prompt in prompts for _ in range(samples)]
        row_seeds = [seed for seed in seeds for _ in range(samples)]
        streamer = _Streamer() if call.streamer else None
        try:
            given = self._arguments(call, prompts)
            seen = _seen(rows, given, call.options)
            with self._configured(call, given), keyed_draws(seen, row_seeds, self.case.vocabulary):
                out = self.model.generate(**given, streamer=streamer)
        except Exception as error:
            return error
        if isinstance(out, Tensor):
            out = _Sequences(out)
        out.shown = streamer
        return out

    def _ours(self, call: Call, prompts: list[list[int]], seeds: list[int], wanted: list[list[int]]) -> _Got:
        if self.case.route == "continuous":
            return self._joined(call, prompts, seeds, wanted)
        given, streamer = self._arguments(call, prompts), _Streamer() if call.streamer else None
        cache = {"none": None, "returned": self.returned, "dynamic": self.dynamic}[call.cache]
        if call.cache == "dynamic" and (len(prompts) > 1 or call.cut or call.changed is not None):
            cache = None  # A cache of transformers knows no text; its caller answers for that.
        hints = _hints(call, wanted[0] if wanted else [0], self.case.vocabulary)
        with self._configured(call, given):
            if self.case.route == "drafter":
                out = self.drafter.generate(**given, streamer=streamer, cache=cache, seed=seeds, **hints)
            else:
                more = {f"draft_{name}": value for name, value in hints.items()}
                if cache is not None:
                    more[CACHE] = cache
                out = self.model.generate(
                    **given, streamer=streamer, custom_generate=self.drafter, draft_seed=seeds, **more
                )
        if isinstance(out, Tensor):
            out = _Sequences(out)
        width = max(map(len, prompts))
        return _Got(out.sequences[:, width:].tolist(), out, getattr(out, CACHE, None), streamer)

    def _joined(
        self, call: Call, prompts: list[list[int]], seeds: list[int], wanted: list[list[int]]
    ) -> _Got:
        """Rows that join a running batch one after the other, and leave it when they are done."""
        continuous, rows, owners = self.drafter.continuous, [], list[int]()
        hints = _hints(call, wanted[0] if wanted else [0], self.case.vocabulary)
        with continuous.running() as batch:
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
                own = self._of_row(call, index)
                given = self._arguments(own, [prompt])
                with self._configured(own, given):
                    prepared = continuous.prepare(given.pop("input_ids"), seed=seed, **given, **hints)
                stats = [DraftStats() for _ in prepared.requests]
                prefix_owner = None
                opened = continuous.open(prepared, stats)
                for request, drafting, each in zip(prepared.requests, opened, stats, strict=True):
                    row = batch.join(request, drafting, each, prefix_owner)
                    prefix_owner = prefix_owner or row
                    rows.append(row)
                    owners.append(index)
                batch.leave()
                for _ in range(self.case.gap):
                    if batch.rows:
                        batch.step()
                        batch.leave()
            while batch.rows:
                batch.step()
                batch.leave()
        self.drafter.stats.accepted += sum(row.stats.accepted for row in rows)
        return _Got([row.text.reply.tolist() for row in rows], None, None, None, owners)

    def _of_row(self, call: Call, row: int) -> Call:
        """The call as a row of a running batch makes it: every other one samples where the first does not."""
        call = replace(call, masked=True)
        if row % 2 == 0:
            return call
        options = {**call.options, "do_sample": not call.options["do_sample"]}
        options.pop("num_return_sequences", None)
        return replace(call, options=options, processor=None)

    def _arguments(self, call: Call, prompts: list[list[int]]) -> dict[str, Any]:
        """Arguments of model.generate, with processors that have seen nothing."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        given: dict[str, Any] = {"input_ids": ids}
        if call.masked or not bool(mask.all()):
            given["attention_mask"] = mask
        options = copy.deepcopy(call.options)
        if "stop_strings" in options:
            given["tokenizer"] = letter_tokenizer(self.case.vocabulary)
        if call.processor is not None:
            given |= PROCESSORS[call.processor](self.case.vocabulary)
        if call.criterion is not None:
            given["stopping_criteria"] = [DividedBy(call.criterion)]
        if call.options_in == "config":
            return {**given, "generation_config": GenerationConfig(**options)}
        return {**given, **({} if call.options_in == "model" else options)}

    @contextmanager
    def _configured(self, call: Call, given: dict[str, Any]) -> Iterator[None]:
        """The options in the model's own configuration, where the call has them there."""
        if call.options_in != "model":
            yield
            return
        own = self.model.generation_config
        try:
            self.model.generation_config = copy.deepcopy(own)
            self.model.generation_config.update(**copy.deepcopy(call.options))
            yield
        finally:
            self.model.generation_config = own

    def _compare(self, number: int, call: Call, prompts: list[list[int]], expected: Any, got: _Got) -> None:
        width = max(map(len, prompts))
        wanted = expected.sequences[:, width:].tolist()
        if wanted != got.rows:
            raise Difference(number, "tokens", wanted, got.rows)
        if not torch.equal(expected.sequences, got.out.sequences):
            raise Difference(number, "prompts", expected.sequences.tolist(), got.out.sequences.tolist())
        if type(expected) is _Sequences and type(got.out) is not _Sequences:
            raise Difference(number, "kind", "a tensor", type(got.out).__name__)
        if call.streamer and expected.shown.seen != got.streamer.seen:
            raise Difference(number, "streamed", expected.shown.seen, got.streamer.seen)
        alive = self._alive(call, wanted)
        for name in ("scores", "logits"):
            mine, theirs = getattr(got.out, name, None), getattr(expected, name, None)
            if (mine is None) != (theirs is None) or (theirs is not None and len(mine) != len(theirs)):
                raise Difference(number, name, _shape(theirs), _shape(mine))
            for step, (a, b) in enumerate(zip(mine or (), theirs or (), strict=True)):
                if a.shape != b.shape or a.dtype != b.dtype:
                    raise Difference(number, f"{name} of step {step}", _shape((b,)), _shape((a,)))
                rows = [row for row, length in enumerate(alive) if step < length]
                if not torch.allclose(a[rows], b[rows], atol=CLOSE, rtol=CLOSE, equal_nan=True):
                    raise Difference(number, f"{name} of step {step}", b[rows].tolist(), a[rows].tolist())

    def _alive(self, call: Call, rows: list[list[int]]) -> list[int]:
        """Tokens of each row up to its end; 0 where nothing but the row itself knows."""
        if len(rows) == 1:
            return [len(rows[0])]
        if call.criterion is not None or "stop_strings" in call.options:
            return [0] * len(rows)
        eos = call.options.get("eos_token_id")
        ends = set([] if eos is None else [eos] if isinstance(eos, int) else eos)
        return [next((at + 1 for at, t in enumerate(row) if t in ends), len(row)) for row in rows]

    def _compare_alone(
        self, number: int, call: Call, prompts: list[list[int]], seeds: list[int], got: _Got
    ) -> None:
        """Rows of a batch say what model.generate says of their prompts alone."""
        if call.processor == "of-rows" or len(prompts) == 1:
            return
        width, samples = max(map(len, prompts)), int(call.options.get("num_return_sequences", 1))
        blind = call.processor is None and call.options.keys() <= _ROW_BY_ROW
        for index, prompt in enumerate(prompts):
            twin = any(prompts[i] == prompt and seeds[i] == seeds[index] for i in range(index))
            if (len(prompt) < width and not blind) or (twin and call.options.get("do_sample")):
                continue
            alone = self._stock(replace(call, masked=True), [prompt], [seeds[index]])
            if isinstance(alone, Exception):
                raise Difference(number, "alone", repr(alone), got.rows[index])
            wanted = alone.sequences[:, len(prompt) :].tolist()
            pad = call.options.get("pad_token_id", 0)
            for sample in range(samples):
                mine, theirs = got.rows[index * samples + sample], wanted[sample]
                if not _same(mine, theirs, pad):
                    raise Difference(number, f"row {index}, sample {sample} alone", theirs, mine)


class _Streamer:
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append("end")


@dataclass
class _Sequences:
    """A bare tensor of sequences, under the name it has in a dictionary."""

    sequences: Tensor
    shown: Any = None


@dataclass
class _Got:
    """New tokens by row, what was returned, its cache, what a streamer saw; rows' prompts where they vary."""

    rows: list[list[int]]
    out: Any
    cache: Any
    streamer: Any
    owners: list[int] | None = None

    def owner(self, row: int, samples: int) -> int:
        """The prompt of a row."""
        return row // samples if self.owners is None else self.owners[row]


def _seen(rows: list[list[int]], given: dict[str, Any], options: dict[str, Any]) -> list[list[int]]:
    """Prompts as the model sees them: without a mask, transformers takes leading pad ids for padding."""
    pad, eos = options.get("pad_token_id"), options.get("eos_token_id")
    if "attention_mask" in given or pad is None or pad in (eos if isinstance(eos, list) else [eos]):
        return rows
    return [list(dropwhile(lambda token: token == pad, row)) for row in rows]


def _same(one: list[int], other: list[int], pad: int) -> bool:
    """True if replies are equal up to the padding after the end of shorter rows."""
    longest = max(len(one), len(other))
    return one + [pad] * (longest - len(one)) == other + [pad] * (longest - len(other))


def _hints(call: Call, reply: Sequence[int], vocabulary: int) -> dict[str, Any]:
    """`prediction` and `documents`: the true reply, one with errors, or another."""
    if call.hint == "none":
        return {}
    step = {"right": len(reply) + 1, "partly": 5, "wrong": 1}[call.hint]
    text = [(token + (at % step == step - 1)) % vocabulary for at, token in enumerate(reply)]
    return {"prediction": text, "documents": [text[::-1], text[3:]]}


def _named(expected: Exception, error: Exception) -> str:
    """Both errors, without numbers."""
    text = f"{type(expected).__name__}: {str(expected)[:50]}; ours {type(error).__name__}: {str(error)[:50]}"
    return "".join("#" if letter.isdigit() else letter for letter in text.replace("\n", " "))


def _shape(kept: Sequence[Tensor] | None) -> Any:
    return None if kept is None else [(tuple(each.shape), str(each.dtype)) for each in kept]
