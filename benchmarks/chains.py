"""Times of chains for whole batches, and their tokens per step on recorded replies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.bench.measuring import percentiles
from retrieval_draft.bench.replay import Trace, read_traces
from retrieval_draft.bench.synthetic_text import SyntheticText
from retrieval_draft.config import DraftConfig
from retrieval_draft.drafting.batch import ChainBatch
from retrieval_draft.drafting.sources import make_sources
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.history import HistorySource
from retrieval_draft.index.source import TokenArray
from retrieval_draft.methods.prompt_lookup import PromptLookupSession
from retrieval_draft.proposer import Proposer, ProposerSession

__all__ = ["measure_chains", "replay_chains"]

SOURCES = ("automaton", "adjacency", "history")
WARM = 20
PIECE = 20000

Draft = Callable[[], TokenArray]
Observe = Callable[[TokenArray], object]


def measure_chains(
    requests: Sequence[int],
    *,
    context: int = 4096,
    history_tokens: int = 1_000_000,
    steps: int = 200,
    max_chain: int = 16,
    min_prob: float = 0.05,
    threads: int = 1,
    vocabulary: int = 32000,
) -> dict[str, Any]:
    """Steps batches of requests over synthetic text, and accepts each chain's tokens that continue the text.

    A step appends the tokens that the last one emitted, learns from them and proposes a chain for every
    request.

    Args:
        requests: Rows of the batches, each measured with and without a history.
        context: Tokens of each prompt.
        history_tokens: Tokens of earlier requests.
        steps: Steps of each batch; the first 20 are not counted.
        max_chain: The longest chain.
        min_prob: Path probability at which a chain ends.
        threads: Number that propose at once.
        vocabulary: Number of token ids.

    Returns:
        ``{"requests": {rows: {"step_us": {"p50", "p99", "mean", "least"}, "us_per_request",
        "cpu_us_per_request", "tokens_per_step", "drafted_per_step", "history": the same with one}},
        "config"}``. `us_per_request` is the p50 of a step over its rows; that of the processor counts the
        calling thread only.
    """
    text = SyntheticText(vocabulary)
    config = DraftConfig(sources=SOURCES)
    results: dict[str, Any] = {}
    for rows in requests:
        for tokens in dict.fromkeys((0, history_tokens)):
            sources = make_sources(config, DraftStores(vocabulary))
            batch = ChainBatch(
                DraftStores(vocabulary), config, max_chain=max_chain, sources=sources, threads=threads
            )
            batch.warm_up()
            reply = text.tokens(tokens, seed=1)
            for source in sources:
                if isinstance(source, HistorySource):
                    for begin in range(0, tokens, PIECE):
                        source.history.add(reply[:0], reply[begin : begin + PIECE])
            batch.flush()
            texts = [text.tokens(context + steps * (max_chain + 1) + 1, seed=2 + row) for row in range(rows)]
            found = _stepped(batch, texts, context, steps, min_prob)
            batch.shut_down()
            for source in sources:
                source.close()
            if tokens:
                results[str(rows)]["history"] = found
            else:
                results[str(rows)] = found
    settings = {
        "context": context, "history_tokens": history_tokens, "steps": steps, "max_chain": max_chain,
        "min_prob": min_prob, "threads": threads, "vocabulary": vocabulary, "sources": list(SOURCES),
    }  # fmt: skip
    return {"requests": results, "config": settings}


def _stepped(
    batch: ChainBatch, texts: Sequence[TokenArray], context: int, steps: int, min_prob: float
) -> dict[str, Any]:
    rows = len(texts)
    ids = np.array([batch.open(text[:context]) for text in texts])
    positions = np.full(rows, context)
    counts = np.ones(rows, np.int32)
    wall, cpu = np.empty(steps), np.empty(steps)
    emitted = drafted = 0
    for step in range(steps):
        new = np.concatenate(
            [text[at : at + count] for text, at, count in zip(texts, positions, counts, strict=True)]
        )
        begin, busy = time.perf_counter(), time.thread_time()
        tokens, lengths, _ = batch.step(ids, new, counts, min_prob=min_prob)
        wall[step], cpu[step] = time.perf_counter() - begin, time.thread_time() - busy
        positions += counts
        emitted += int(counts.sum())
        drafted += int(lengths.sum())
        for row, text in enumerate(texts):
            counts[row] = 1 + _common(tokens[row, : lengths[row]], text[positions[row] :])
    for session in ids:
        batch.close(int(session), finished=False)
    wall, cpu = wall[min(WARM, steps // 2) :] * 1e6, cpu[min(WARM, steps // 2) :] * 1e6
    return {
        "step_us": percentiles(wall, 50, 99, 0, mean=True),
        "us_per_request": float(np.median(wall)) / rows,
        "cpu_us_per_request": float(np.median(cpu)) / rows,
        "tokens_per_step": emitted / steps / rows,
        "drafted_per_step": drafted / steps / rows,
    }


def replay_chains(
    paths: Sequence[Path], *, max_chain: int = 16, min_prob: float = 0.0, limit: int | None = None
) -> dict[str, Any]:
    """Replays recorded replies with one chain a step: of a batch, of a proposer's tree, and of prompt lookup.

    Args:
        paths: Trace files.
        max_chain: The longest chain of each.
        min_prob: Path probability at which chains end; prompt lookup has none.
        limit: Replay only so many requests.

    Returns:
        ``{"batch": {"tokens_per_step", "drafted_per_step", "acceptance_rate"}, "proposer": …,
        "prompt_lookup": …, "requests", "config"}``.

    Raises:
        InvalidInputError: The traces have no request to replay.
    """
    traces = [trace for trace in islice(read_traces(paths), limit) if len(trace.output) > 1]
    if not traces:
        raise InvalidInputError(
            f"Nothing to replay in {', '.join(map(str, paths)) or 'no file'}.",
            "A trace needs an output of two tokens at least.",
        )
    vocabulary = 1 + max(int(max(trace.prompt.max(initial=0), trace.output.max())) for trace in traces)
    config = DraftConfig(sources=SOURCES)

    def batches() -> Iterator[tuple[int, int, int]]:
        batch = ChainBatch(DraftStores(vocabulary), config, max_chain=max_chain)
        for trace in traces:
            row = _BatchRow(batch, trace.prompt, min_prob)
            yield _replayed(trace, row.draft, row.observe)
            row.close()
            batch.flush()
        batch.shut_down()

    def proposed() -> Iterator[tuple[int, int, int]]:
        with Proposer(DraftStores(vocabulary), config) as proposer:
            for trace in traces:
                session = proposer.open(trace.prompt)
                yield _replayed(trace, partial(_best_chain, session, max_chain, min_prob), session.observe)
                session.close()
                proposer.flush()

    def looked_up() -> Iterator[tuple[int, int, int]]:
        for trace in traces:
            session = PromptLookupSession(trace.prompt)
            yield _replayed(trace, partial(_copied, session, max_chain), session.observe)

    result: dict[str, Any] = {}
    for name, runs in (("batch", batches()), ("proposer", proposed()), ("prompt_lookup", looked_up())):
        steps, drafted, accepted = (int(each) for each in np.array(list(runs)).sum(0))
        result[name] = {
            "tokens_per_step": sum(len(trace.output) for trace in traces) / steps,
            "drafted_per_step": drafted / steps,
            "acceptance_rate": accepted / max(drafted, 1),
        }
    result["requests"] = len(traces)
    result["config"] = {"max_chain": max_chain, "min_prob": min_prob, "traces": [path.name for path in paths]}
    return result


def _best_chain(session: ProposerSession, max_chain: int, min_prob: float) -> TokenArray:
    return session.propose_chain(max_chain, min_prob)[0]


def _copied(session: PromptLookupSession, max_chain: int) -> TokenArray:
    return session.propose(max_chain).tokens


class _BatchRow:
    """One session of a batch, stepped alone."""

    def __init__(self, batch: ChainBatch, prompt: TokenArray, min_prob: float) -> None:
        self._batch, self._session, self._min_prob = batch, batch.open(prompt), min_prob
        self._emitted = prompt[:0]

    def draft(self) -> TokenArray:
        emitted, self._emitted = self._emitted, self._emitted[:0]
        tokens, lengths, _ = self._batch.step(
            [self._session], emitted, [len(emitted)], min_prob=self._min_prob
        )
        chain: TokenArray = tokens[0, : lengths[0]]
        return chain

    def observe(self, tokens: TokenArray) -> None:
        self._emitted = tokens

    def close(self) -> None:
        self._batch.step([self._session], self._emitted, [len(self._emitted)], 0)
        self._batch.close(self._session)


def _replayed(trace: Trace, draft: Draft, observe: Observe) -> tuple[int, int, int]:
    """Steps, drafted and accepted tokens of one request, whose first token comes from the prefill."""
    observe(trace.output[:1])
    done, steps, drafted, accepted = 1, 0, 0, 0
    while done < len(trace.output):
        chain = draft()
        taken = _common(chain, trace.output[done:])
        observe(trace.output[done : done + taken + 1])
        done += taken + 1
        steps += 1
        drafted += len(chain)
        accepted += taken
    return steps, drafted, accepted


def _common(chain: NDArray[np.int32], text: TokenArray) -> int:
    """Length of the common start of a chain and a text."""
    size = min(len(chain), len(text))
    wrong = np.flatnonzero(chain[:size] != text[:size])
    return int(wrong[0]) if len(wrong) else size
