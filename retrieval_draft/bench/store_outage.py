"""What an outage of the store costs a server that decodes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_draft._progress import progress
from retrieval_draft.bench.slow_proxy import SlowProxy
from retrieval_draft.bench.store_decoder import DecoderProcess
from retrieval_draft.bench.valkey_process import ValkeyProcess

__all__ = ["STATES", "measure_outages"]

STATES = ("none", "connected", "dead", "paused", "slow")
"""``none``: no store on either side, which shows what this bench cannot tell apart. ``slow``: every answer
comes 200 ms late."""

_DELAY = 0.1
_TOGETHER = 3
"""Prompts that a drafter decodes before it is closed: opening one takes longer than decoding one."""


def measure_outages(
    model: str,
    prompts: Sequence[Sequence[int]],
    folder: Path,
    *,
    max_new_tokens: int = 64,
    states: Sequence[str] = STATES,
) -> dict[str, Any]:
    """Decodes each prompt twice in one process, with a store and without.

    Two processes on the same machine differ by more than what is looked for, from their start to their
    end: so one process has the model, and opens a drafter with a store or without, neither of which has seen
    anything, for every three replies. Without a store its threads are gone. Which way begins changes from
    three to three. The state begins after the drafter has connected and right before the first of its
    replies, so what a server does when the store goes away counts too.

    Args:
        model: As ``--model``.
        prompts: Token ids, dealt out to the states in turn.
        folder: For the store's data.
        max_new_tokens: Of each reply.
        states: Of `STATES`.

    Returns:
        For each state the median over prompts of tokens a second with the store over those without, tenths,
        the ratio of all tokens a second, whether all replies were the same, how many there were, and the
        store's state as the server saw it at their ends.
    """
    found: dict[str, Any] = {}
    with (
        ValkeyProcess(folder / "outage") as server,
        SlowProxy(server.port) as proxy,
        DecoderProcess(model) as decoder,
        progress("Decoding with and without a store", len(prompts), delay=0.0) as advance,
    ):
        url = f"redis://127.0.0.1:{proxy.port}"
        for place, state in enumerate(states):
            seconds: dict[bool, list[float]] = {True: [], False: []}
            same, seen = True, set()
            mine = prompts[place :: len(states)]
            for number, first in enumerate(range(0, len(mine), _TOGETHER)):
                texts = []
                for with_store in (bool(number % 2), not number % 2):
                    decoder.open(url if with_store and state != "none" else None)
                    if with_store:
                        _enter(state, server, proxy)
                    runs = [decoder.generate(ids, max_new_tokens) for ids in mine[first : first + _TOGETHER]]
                    if with_store:
                        seen.add(decoder.call(do="status").get("state", "none"))
                        _leave(state, server, proxy)
                    decoder.call(do="close")
                    texts.append([tokens for tokens, _ in runs])
                    seconds[with_store] += [took for _, took in runs]
                same = same and texts[0] == texts[1]
                advance(len(runs))
            low, middle, high = np.percentile(np.divide(seconds[False], seconds[True]), [10, 50, 90]).tolist()
            found[state] = {
                "ratio": middle,
                "p10": low,
                "p90": high,
                "of_all": sum(seconds[False]) / sum(seconds[True]),
                "replies": len(seconds[True]),
                "same_text": same,
                "state": "/".join(sorted(seen)),
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
