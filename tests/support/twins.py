"""Naive twins: the same answers as the indexes, from plain Python over the whole text."""

from __future__ import annotations

from collections.abc import Sequence

END = -1
"""Ends a text inside a list of tokens."""


def occurrences(text: Sequence[int], word: tuple[int, ...]) -> frozenset[int]:
    """Positions just behind each occurrence of `word`."""
    size = len(word)
    return frozenset(
        start + size for start in range(len(text) - size + 1) if tuple(text[start : start + size]) == word
    )


def followers(text: Sequence[int], word: tuple[int, ...]) -> dict[int, int]:
    """Counts of the tokens that followed `word`."""
    counts: dict[int, int] = {}
    for end in sorted(occurrences(text, word)):
        if end < len(text) and text[end] != END:
            counts[text[end]] = counts.get(text[end], 0) + 1
    return counts


def newest_first(text: Sequence[int], word: tuple[int, ...]) -> list[int]:
    """Tokens that followed `word`, the one seen last first."""
    seen: list[int] = []
    for end in sorted(occurrences(text, word), reverse=True):
        if end < len(text) and text[end] != END and text[end] not in seen:
            seen.append(text[end])
    return seen


def match_length(text: Sequence[int]) -> int:
    """Length of the longest suffix, inside the last text, that was followed by something earlier."""
    current = list(text[len(text) - list(reversed(text)).index(END) :]) if END in text else list(text)
    for size in range(len(current), 0, -1):
        if followers(text, tuple(current[-size:])):
            return size
    return 0


def contexts(text: Sequence[int], suffix: tuple[int, ...]) -> list[tuple[tuple[int, ...], int]]:
    """Suffixes of `suffix` that occur, longest first, one for each set of end positions.

    Returns:
        (the longest of the class, length of the longest of the next class).
    """
    classes: list[tuple[tuple[int, ...], int]] = []
    last: frozenset[int] = frozenset()
    for size in range(len(suffix), 0, -1):
        word = suffix[-size:]
        ends = occurrences(text, word)
        if ends and ends != last:
            if classes:
                classes[-1] = (classes[-1][0], size)
            classes.append((word, 0))
            last = ends
    return classes


def blend(
    text: Sequence[int], suffix: tuple[int, ...], escape: float, cap: int, recency: float
) -> dict[int, tuple[float, int]]:
    """P(next token) after `suffix`, and the longest context that saw it, by the rule of the kernel."""
    mass = 1.0
    out: dict[int, tuple[float, int]] = {}
    for word, below in contexts(text, suffix):
        counts = followers(text, word)
        total = sum(counts.values())
        if not total:
            continue
        escape_per_order = escape * len(counts) / (total + escape * len(counts))
        escape_prob = escape_per_order ** max(1, min(len(word), cap) - min(below, cap))
        weight = mass * (1 - escape_prob) / (total + recency)
        mass *= escape_prob
        newest = newest_first(text, word)[0]
        for token, count in counts.items():
            share = weight * (count + (recency if token == newest else 0.0))
            prob, length = out.get(token, (0.0, len(word)))
            out[token] = (prob + share, length)
    return out


def tree(
    text: Sequence[int], budget: int, escape: float, cap: int, recency: float
) -> dict[tuple[int, ...], float]:
    """Every path of the best-first tree with its path probability."""
    suffix = tuple(text[len(text) - match_length(text) :])
    waiting: list[tuple[float, tuple[int, ...], tuple[int, ...]]] = []
    nodes: dict[tuple[int, ...], float] = {}

    def expand(path: tuple[int, ...], matched: tuple[int, ...], prob: float) -> None:
        for token, (share, length) in blend(text, matched, escape, cap, recency).items():
            known = matched[len(matched) - length :]
            waiting.append((prob * min(share, 0.999), (*path, token), (*known, token)))

    expand((), suffix, 1.0)
    while waiting and len(nodes) < budget:
        best = max(range(len(waiting)), key=lambda item: (waiting[item][0], -item))
        prob, path, matched = waiting.pop(best)
        nodes[path] = prob
        expand(path, matched, prob)
    return nodes
