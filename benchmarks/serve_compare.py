"""The same load on a server with drafts and on one without, in turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

from benchmarks.serve_client import Ask, Told, ask_server
from benchmarks.serve_process import ServeProcess

__all__ = ["compare_servers"]


def compare_servers(
    servers: dict[str, ServeProcess], asks: Sequence[Ask], clients: int, rounds: int
) -> dict[str, Any]:
    """Sends both servers the same requests, one server after the other, in rounds of new requests.

    Args:
        servers: By name; the ratio is of the first to the second.
        asks: All requests; each round takes its share.
        clients: At the same time.
        rounds: Number of shares.

    Returns:
        Tokens a second of each server in each round, their ratios, and the number of different answers.
    """
    names = list(servers)
    rates: dict[str, list[float]] = {name: [] for name in names}
    ratios, differ, wrong, tokens = [], 0, [], 0
    for turn in range(rounds):
        share = asks[turn::rounds]
        answers: dict[str, list[Told]] = {}
        for name in names if turn % 2 == 0 else names[::-1]:
            begin = time.monotonic()
            answers[name] = _ask_all(servers[name].port, share, clients, f"{name}{turn}")
            taken = time.monotonic() - begin
            count = sum(len(told.tokens) for told in answers[name])
            rates[name].append(count / taken)
            tokens += count
            wrong += [told.wrong for told in answers[name] if told.wrong]
        ratios.append(rates[names[0]][-1] / rates[names[1]][-1])
        differ += sum(a.tokens != b.tokens for a, b in zip(*answers.values(), strict=True))
    return {
        "tokens_per_second": {name: median(each) for name, each in rates.items()},
        "rounds": rates,
        "ratios": ratios,
        "ratio": median(ratios),
        "answers": len(asks),
        "answers_that_differ": differ,
        "wrong": wrong[:5],
        "tokens": tokens,
    }


def _ask_all(port: int, asks: Sequence[Ask], clients: int, name: str) -> list[Told]:
    def one(numbered: tuple[int, Ask]) -> Told:
        number, ask = numbered
        return ask_server(port, ask, stream=bool(number % 2), name=f"{name}-{number}")

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(one, enumerate(asks)))
