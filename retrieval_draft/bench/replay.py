"""Replay of recorded greedy outputs: tokens that each step would have accepted, without a model.

A draft node is accepted when it continues the recorded output, exactly as in greedy decoding. The target's
predictions at nodes off the recorded path are not in a trace, so sources that learn from logits do worse here
than with a model.
"""

from __future__ import annotations

import gzip
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.bench.measuring import percentiles
from retrieval_draft.bench.reliability import Reliability
from retrieval_draft.config import SOURCES, DraftConfig
from retrieval_draft.drafting.calibration import Calibration
from retrieval_draft.drafting.hierarchy import SourceHierarchy, SourceSessions
from retrieval_draft.drafting.session import count_names, proposed_nodes
from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.engine.sampling.noise import GumbelNoise
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.corpus import Corpus
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.source import CONTEXT, NodeLogits, Proposal, TokenArray
from retrieval_draft.methods.method import MethodContext, as_proposed
from retrieval_draft.methods.registry import get_method

__all__ = ["Counts", "Replayer", "Trace", "read_traces", "replay"]


@dataclass(frozen=True, slots=True)
class Trace:
    """One recorded request.

    Attributes:
        task: Kind of request.
        prompt: int32, shape (prompt,).
        output: int32, shape (output,).
        top_tokens: int32, shape (output, k), the target's best tokens at each output position, or None.
        top_probs: float32, shape (output, k), their probabilities, or None.
        noise: Noise that the output was drawn with, or None where it is greedy.
        references: int32, shape (length,) each. Texts that the caller passed along.
        turn: Number of the turn in its conversation.
    """

    task: str
    prompt: TokenArray
    output: TokenArray
    top_tokens: NDArray[np.int32] | None = None
    top_probs: NDArray[np.float32] | None = None
    noise: GumbelNoise | None = None
    references: tuple[TokenArray, ...] = ()
    turn: int = 0


def read_traces(paths: Sequence[Path]) -> Iterator[Trace]:
    """Reads traces: JSON lines ``{"task", "prompt": [ids], "output": [ids]}``, gzipped or not.

    Optional fields: ``"turn"``, the number of the turn in its conversation, whose prompt holds the turns
    before; ``"references"``, texts that were passed along; ``"top"``, ids and probabilities of the target's
    best tokens; ``"noise"``, ``{"seed", "sample", "vocabulary"}`` of an output that was sampled.

    Raises:
        InvalidInputError: A line is not such an object; the message names file and line.
    """
    for path in paths:
        opener = gzip.open if path.suffix == ".gz" else open
        try:
            with opener(path, "rt", encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    try:
                        yield _trace(json.loads(line))
                    except (ValueError, KeyError, TypeError, OverflowError) as error:
                        raise InvalidInputError(
                            f"{path}, line {number} is not a trace: {error!r}.",
                            'Each line is {"task": name, "prompt": [ids], "output": [ids]}.',
                        ) from error
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise InvalidInputError(f"Cannot read the trace {path}: {error}.") from error


def _trace(record: Any) -> Trace:
    if not isinstance(record, dict):
        raise TypeError("not an object")
    top = record.get("top")
    return Trace(
        task=str(record.get("task", "all")),
        prompt=np.array(record["prompt"], np.int32),
        output=np.array(record["output"], np.int32),
        top_tokens=None if top is None else np.array(top[0], np.int32),
        top_probs=None if top is None else np.array(top[1], np.float32),
        noise=_noise(record.get("noise")),
        references=tuple(np.array(text, np.int32) for text in record.get("references") or ()),
        turn=int(record.get("turn") or 0),
    )


def _noise(record: Any) -> GumbelNoise | None:
    """Noise by the record's ``{"seed", "sample", "vocabulary"}``."""
    if record is None:
        return None
    import torch

    numbers = [int(record[name]) for name in ("seed", "vocabulary", "sample")]
    return GumbelNoise(numbers[0], numbers[1], torch.device("cpu"), sample=numbers[2])


@dataclass(slots=True)
class Counts:
    """Tokens, and the steps that they took."""

    tokens: int = 0
    steps: int = 0

    @property
    def tokens_per_step(self) -> float:
        """All tokens over all steps."""
        return self.tokens / self.steps if self.steps else 0.0


class Replayer:
    """Sources and calibration that live from one trace to the next.

    Args:
        config: The drafting configuration.
        nodes: Draft nodes of every step.
        keep: Whether sources keep learned state from one request to the next.
        stores: Data that sources are made from.
        calibration: The calibration, updated in place.
        late: Whether all but a step's tokens is learned after the next step's drafts, as while a device runs
            the pass; sources that draft from the last predictions get these before, as there.
    """

    def __init__(
        self,
        config: DraftConfig,
        nodes: int,
        keep: bool,
        stores: DraftStores,
        calibration: Calibration,
        late: bool = False,
    ) -> None:
        self._method = get_method(config.method)
        if self._method.needs_model:
            raise InvalidInputError(
                f"The method {config.method!r} drafts with a model, which a replay does not have.",
                "Measure it with retrieval-draft bench live.",
            )
        self._parts = MethodContext(config, stores)
        self._nodes = nodes
        self._keep = keep
        self._late = late
        self._hierarchy = SourceHierarchy(self._method.sources(self._parts))
        self.calibration = calibration
        self.reliability = Reliability()
        self.verified = 0
        self.drafted: Counter[str] = Counter()
        self.accepted: Counter[str] = Counter()
        self.draft_us: list[float] = []
        self.fuse_us: list[float] = []
        self.observe_us: list[float] = []

    @property
    def nbytes(self) -> int:
        """Bytes held by the sources."""
        return self._hierarchy.nbytes

    def close(self) -> None:
        """Ends the sources."""
        self._hierarchy.close()

    def run(self, trace: Trace, oracle: bool = False) -> Counts:
        """Replays one request. Its first token comes from the prefill and costs no step.

        Args:
            trace: The request.
            oracle: Whether to verify, in each step, the one source that turns out best.
        """
        counts = Counts(tokens=len(trace.output))
        if not len(trace.output):
            return counts
        if not self._keep:  # request-level sources only, without state between requests
            self._hierarchy.close()
            self._hierarchy = SourceHierarchy(self._method.sources(self._parts))
        calibration = self.calibration.open(trace.prompt, noise=trace.noise)
        drafts = self._hierarchy.open(trace.prompt, trace.references)
        text = np.concatenate((trace.prompt, trace.output))
        start = len(trace.prompt)
        drafts.observe(trace.output[:1])
        self._learn(drafts, trace, text, 0, 1)
        done = 1
        learn: Callable[[], None] | None = None
        while done < len(trace.output):
            root, rest = int(text[start + done - 1]), trace.output[done:]
            begin = time.perf_counter()
            calibration.position = start + done
            proposals = drafts.propose(proposed_nodes(self._nodes, calibration.noise is not None))
            proposed = time.perf_counter()
            tree = self._method.tree(root, proposals, calibration, self._nodes)
            drafted = time.perf_counter()
            if self._late and learn is not None:
                learn()
            if oracle:
                alone = [as_proposed(root, [proposal], None, self._nodes) for proposal in proposals]
                tree = max(alone, key=lambda tree: len(tree.walk(rest)), default=tree)
            path = tree.walk(rest)
            emitted = trace.output[done : done + len(path)]
            drafts.observe(emitted)
            calibration.count(emitted)
            if self._late:
                self._learn(drafts, trace, text, done, done + len(emitted), early=True)
            learn = partial(
                self._learn_step, calibration, drafts, trace, text, tree, proposals, emitted, done,
                drafted - proposed,
            )  # fmt: skip
            if not self._late:
                learn()
            self.draft_us.append((drafted - begin) * 1e6)
            self.verified += tree.num_draft_tokens
            count_names(proposals, Counter(tree.sources[1:].tolist()), Counter(), self.drafted)
            count_names(proposals, Counter(tree.sources[path[1:]].tolist()), Counter(), self.accepted)
            done += len(emitted)
            counts.steps += 1
        if self._late and learn is not None:
            learn()
        drafts.close()
        self._hierarchy.flush()  # so that a replay is deterministic
        return counts

    def _learn_step(
        self,
        calibration: Calibration,
        drafts: SourceSessions,
        trace: Trace,
        text: TokenArray,
        tree: DraftTree,
        proposals: Sequence[Proposal],
        emitted: TokenArray,
        done: int,
        fuse_seconds: float,
    ) -> None:
        """Learns from the step after `done` outputs, but for its tokens."""
        walked = time.perf_counter()
        outcomes = calibration.observe(tree, proposals, emitted)
        observed = time.perf_counter()
        early = False if self._late else None
        self._learn(drafts, trace, text, done, done + len(emitted), early)
        self.observe_us.append((time.perf_counter() - walked) * 1e6)
        self.fuse_us.append((fuse_seconds + observed - walked) * 1e6)
        self.reliability.observe(tree, outcomes)

    def _learn(
        self,
        drafts: SourceSessions,
        trace: Trace,
        text: TokenArray,
        first: int,
        last: int,
        early: bool | None = None,
    ) -> None:
        """Passes the sources the target's predictions at outputs first..last-1: top-k, or the choice only."""
        if trace.top_tokens is None or trace.top_probs is None:
            top_tokens = trace.output[first:last, None]
            top_probs = np.ones((last - first, 1), np.float32)
        else:
            top_tokens, top_probs = trace.top_tokens[first:last], trace.top_probs[first:last]
        contexts = np.full((last - first, CONTEXT), -1, np.int32)
        for row, position in enumerate(range(first, last)):
            end = len(trace.prompt) + position
            tail = text[max(0, end - CONTEXT) : end]
            if len(tail):
                contexts[row, CONTEXT - len(tail) :] = tail
        drafts.learn(NodeLogits(contexts, top_tokens, top_probs), early)


def replay(
    paths: Sequence[Path],
    *,
    nodes: int,
    sources: Sequence[str] | None = None,
    history: bool = True,
    method: str = "calibrated",
    limit: int | None = None,
    corpora: Sequence[Path] = (),
    part: str = "all",
    without: Sequence[str] = (),
    priors: bool = True,
    oracle: bool = False,
    calibration: Calibration | None = None,
    late: bool = False,
    prompt_tokens: int | None = None,
    references: bool = True,
) -> dict[str, Any]:
    """Replays traces and reports tokens per step.

    Args:
        paths: Trace files.
        nodes: Draft nodes of every step.
        sources: Names of draft sources; None for all.
        history: Whether sources keep learned state from one request to the next.
        method: A drafting method by name; "none" drafts nothing.
        limit: Replay only so many requests.
        corpora: Index folders to draft from, built with the traces' tokenizer.
        part: "all" requests, or only those with "even" or "odd" indices; priors are fitted on the even ones.
        without: Evidence that calibration does not learn from, to measure its value.
        priors: Whether calibration starts from the shipped priors.
        oracle: Whether to verify, in each step, only the source that turns out best.
        late: Whether all but a step's tokens is learned after the next step's drafts, as on a device.
        calibration: Calibration to start from instead; updated in place.
        prompt_tokens: Leave only so many tokens at the end of each prompt; what is before them becomes a
            reference text. None leaves prompts whole.
        references: Whether to pass reference texts along.

    Returns:
        The object that ``bench replay --json`` prints: tokens_per_step is all tokens over all steps, the
        first token of a reply coming from the prefill; times are in microseconds, `fuse_us` being fusion,
        selection and calibration updates, without the sources.

    Raises:
        InvalidInputError: The traces have no request to replay, or an argument is invalid.
    """
    config = DraftConfig(method=method, nodes=nodes, sources=tuple(SOURCES if sources is None else sources))
    if part not in PARTS:
        raise InvalidInputError(f"part is {part!r}.", f"Choose from: {', '.join(PARTS)}.")
    traces = list(islice(read_traces(paths), limit))[PARTS[part]]
    traces = [_given(trace, prompt_tokens, references) for trace in traces]
    ids = [
        int(ids.max(initial=0)) for trace in traces for ids in (trace.prompt, trace.output, *trace.references)
    ]
    opened = tuple(Corpus.open(corpus) for corpus in corpora)
    vocabulary = (
        max([*ids, *(corpus.folder.manifest.vocabulary_size - 1 for corpus in opened)], default=0) + 1
    )
    replayer = Replayer(
        config,
        nodes if method != "none" else 0,
        history,
        DraftStores(vocabulary, corpora=opened),
        Calibration(priors, without) if calibration is None else calibration,
        late,
    )
    total = Counts()
    tasks: dict[str, Counts] = {}
    turns: dict[int, Counts] = {}
    for trace in traces:
        counts = replayer.run(trace, oracle)
        for sums in (total, tasks.setdefault(trace.task, Counts()), turns.setdefault(trace.turn, Counts())):
            sums.tokens += counts.tokens
            sums.steps += counts.steps
    if total.steps == 0:
        raise InvalidInputError(
            f"Nothing to replay in {', '.join(map(str, paths)) or 'no file'}.",
            "A trace needs an output of two tokens at least.",
        )
    result = {
        "tokens_per_step": total.tokens_per_step,
        "by_task": {task: counts.tokens_per_step for task, counts in tasks.items()},
        "by_turn": {turn: counts.tokens_per_step for turn, counts in sorted(turns.items())},
        "steps": total.steps,
        "tokens": total.tokens,
        "nodes_per_step": replayer.verified / total.steps,
        "draft_us": _summary(replayer.draft_us),
        "fuse_us": _summary(replayer.fuse_us),
        "observe_us": _summary(replayer.observe_us),
        "drafted_by_level": dict(replayer.drafted),
        "accepted_by_level": dict(replayer.accepted),
        "nbytes": replayer.nbytes,
        "config": {
            "method": method,
            "nodes": nodes,
            "sources": list(config.sources),
            "history": history,
            "part": part,
            "without": list(without),
            "priors": priors,
            "oracle": oracle,
            "late": late,
            "prompt_tokens": prompt_tokens,
            "references": references,
            "traces": [path.name for path in paths],
        },
    }
    if get_method(method).calibrates and not oracle:
        result["calibration"] = replayer.reliability.summary()
    return result


def _given(trace: Trace, prompt_tokens: int | None, references: bool) -> Trace:
    """The request with `prompt_tokens` of its prompt; those before are a reference text, or left out.

    Example:
        prompt 5 6 7 8, two tokens left  ->  prompt 7 8, references (5 6)
    """
    start = 0 if prompt_tokens is None else max(0, len(trace.prompt) - prompt_tokens)
    texts = (trace.prompt[:start], *trace.references) if start else trace.references
    return replace(trace, prompt=trace.prompt[start:], references=texts if references else ())


PARTS = {"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}


def _summary(values: Sequence[float]) -> dict[str, float]:
    warm = np.array(values[min(len(values) // 2, 16) :])  # the first calls compile or load kernels
    return percentiles(warm, mean=True)
