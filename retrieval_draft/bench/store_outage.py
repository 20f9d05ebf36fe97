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

STATES = ("connected", "dead", "paused", "slow")
"""``slow``: every answer comes 200 ms late."""

_DELAY = 0.1


def measure_outages(
    model: str,
    prompts: Sequence[Sequence[int]],
    folder: Path,
    *,
    max_new_tokens: int = 64,
    states: Sequence[str] = STATES,
) -> dict[str, Any]:
    """Decodes prompts in two processes in turn, one with a store and one without.

    While one decodes the other is stopped, background threads and all; who begins changes from prompt to
    prompt. A state begins with the change to it, so what a server does when the store goes away counts too.

    Args:
        model: As ``--model``.
        prompts: Token ids, dealt out to the states in turn.
        folder: For the store's data.
        max_new_tokens: Of each reply.
        states: Of `STATES`.

    Returns:
        For each state the median over prompts of tokens a second with the store over those without, tenths,
        whether all replies were the same, and the store's state as the server saw it.
    """
    found: dict[str, Any] = {}
    with ValkeyProcess(folder / "outage") as server, SlowProxy(server.port) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}"
        with DecoderProcess(model, None) as without, DecoderProcess(model, url) as with_store:
            for each in (without, with_store):
                each.generate(prompts[0][:8], 8)  # loads; the first token waits for that
            with progress("Decoding with and without a store", len(prompts), delay=0.0) as advance:
                for place, state in enumerate(states):
                    _enter(state, server, proxy)
                    ratios, same = [], True
                    # No prompt comes twice: what was said in one state would be drafted from in the next.
                    for number, ids in enumerate(prompts[place :: len(states)]):
                        runs = {}
                        order = (without, with_store) if number % 2 else (with_store, without)
                        for each in order:
                            runs[each] = each.generate(ids, max_new_tokens)
                        same = same and runs[without][0] == runs[with_store][0]
                        ratios.append(runs[without][1] / runs[with_store][1])
                        advance()
                    with with_store.awake():
                        seen = with_store.call(do="status")["state"]
                    low, middle, high = np.percentile(ratios, [10, 50, 90]).tolist()
                    found[state] = {
                        "ratio": middle, "p10": low, "p90": high, "same_text": same, "state": seen
                    }  # fmt: skip
                    _leave(state, server, proxy)
    return found


def _enter(state: str, server: ValkeyProcess, proxy: SlowProxy) -> None:
    if state == "dead":
        server.kill()
    elif state == "paused":
        server.pause()
    elif state == "slow":
        proxy.delay = _DELAY


def _leave(state: str, server: ValkeyProcess, proxy: SlowProxy) -> None:
    if state == "dead":
        server.start()
    elif state == "paused":
        server.resume()
    proxy.delay = 0.0
    time.sleep(0.5)
