"""Cost of an outage of the store for a server that decodes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.slow_proxy import SlowProxy
from benchmarks.store_decoder import DecoderProcess
from benchmarks.valkey_process import ValkeyProcess
from retrieval_draft._progress import progress
from retrieval_draft.bench.measuring import ratio_summary

__all__ = ["STATES", "measure_outages"]

STATES = ("none", "connected", "dead", "paused", "slow")
"""``none``: no store on either side, which shows the noise of this bench. ``slow``: every answer
comes 200 ms late."""

_DELAY = 0.1

_SECONDS = 20.0
"""Limit of the wait for what an outage has held back."""


def measure_outages(
    model: str,
    prompts: Sequence[Sequence[int]],
    folder: Path,
    *,
    max_new_tokens: int = 32,
    states: Sequence[str] = STATES,
) -> dict[str, Any]:
    """Decodes each prompt twice in one process, with a drafter that has a store and with one that has none.

    Two processes on the same machine differ by more than the measured effect, from their start to their end,
    and the machine itself does within some seconds. So both drafters share one process and one model, both
    start without text, they take turns prompt by prompt, and the first one changes each time. The processor
    time that the store's threads take from either of them does not show in this; it is counted separately. A
    state begins when both are open and connected, right before the first prompt, so the reaction of a server
    to the loss of the store counts too.

    Args:
        model: As ``--model``.
        prompts: Token ids, distributed to the states in turn.
        folder: For the store's data.
        max_new_tokens: Of each reply.
        states: Of `STATES`.

    Returns:
        For each state the median over prompts of tokens a second with the store over those without, tenths,
        that of all tokens together, whether all replies were equal, their number, the share of one core that
        the store's threads took, the store's state at the end; and, with the outage over, entries of texts
        and of what was learned that the store has taken, and texts that wait.
    """
    found: dict[str, Any] = {}
    with (
        ValkeyProcess(folder / "outage") as server,
        SlowProxy(server.port) as proxy,
        DecoderProcess(model) as decoder,
        progress("Decoding with and without a store", len(prompts), delay=0.0) as advance,
    ):
        url = f"redis://127.0.0.1:{proxy.port}"
        for index, state in enumerate(states):
            decoder.open(None if state == "none" else url)
            taken, begin = decoder.store_seconds(), time.perf_counter()
            _enter(state, server, proxy)
            seconds: dict[bool, list[float]] = {True: [], False: []}
            same = True
            for number, ids in enumerate(prompts[index :: len(states)]):
                texts = []
                for with_store in (bool(number % 2), not number % 2):
                    tokens, took = decoder.generate(ids, max_new_tokens, with_store)
                    texts.append(tokens)
                    seconds[with_store].append(took)
                same = same and texts[0] == texts[1]
                advance()
            share = (decoder.store_seconds() - taken) / (time.perf_counter() - begin)
            seen = decoder.call(do="status").get("state", "none")
            _leave(state, server, proxy)
            status = _when_sent(decoder) if state != "none" else {}
            decoder.call(do="close")
            ratio = ratio_summary(np.divide(seconds[False], seconds[True]))
            assert ratio is not None
            found[state] = {
                "ratio": ratio["median"],
                "p10": ratio["p10"],
                "p90": ratio["p90"],
                "of_all": sum(seconds[False]) / sum(seconds[True]),
                "core_share": share,
                "replies": len(seconds[True]),
                "same_text": same,
                "state": seen,
                **{name: status.get(name, 0) for name in ("sent", "sent_learned", "waiting")},
            }
    return found


def _enter(state: str, server: ValkeyProcess, proxy: SlowProxy) -> None:
    if state == "dead":
        server.kill()
    elif state == "paused":
        server.pause()
    elif state == "slow":
        proxy.delay = _DELAY


def _leave(state: str, server: ValkeyProcess, proxy: SlowProxy) -> None:
    proxy.delay = 0.0
    if state == "dead":
        server.start()
    elif state == "paused":
        server.resume()
    if state in ("dead", "paused", "slow"):
        time.sleep(0.5)


def _when_sent(decoder: DecoderProcess) -> dict[str, Any]:
    """The store's status once it has taken what waited, or after `_SECONDS`."""
    end = time.monotonic() + _SECONDS
    last: dict[str, Any] = {}
    while True:
        status: dict[str, Any] = decoder.call(do="status")
        is_still = status["sent_learned"] == last.get("sent_learned") and not status["waiting"]
        if is_still or time.monotonic() > end:
            return status
        last = status
        time.sleep(1.0)  # rows go after the texts
