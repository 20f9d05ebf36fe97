"""Requests recovered from vLLM's batch, whose rows move, leave, come back and change hands."""

from __future__ import annotations

import random

import numpy as np
import pytest

from retrieval_draft.integrations.vllm.request_tracker import ABSENT_STEPS, RequestTracker
from tests.support.vllm_batch import FakeBatch


def tracker_of(batch: FakeBatch, slots: int = 16) -> tuple[RequestTracker, list[int]]:
    over: list[int] = []
    tracker = RequestTracker(slots, lambda slot: over.append(int(tracker.sessions[slot])))
    return tracker, over


def follow(tracker: RequestTracker, batch: FakeBatch, tokens: dict[str, list[int]]) -> dict[str, int]:
    """One step; returns the slot of each request by its name."""
    sampled, lengths, texts = batch.step(tokens)
    rows = np.array([row for row, each in enumerate(sampled) if each], np.int64)
    counts = np.array([len(sampled[row]) for row in rows], np.int64)
    ends = lengths[rows].astype(np.int64)
    slots, _ = tracker.follow(texts, rows, ends - counts, ends)
    found = {batch.names[row]: slot for row, slot in zip(rows.tolist(), slots.tolist(), strict=True)}
    for name, slot in found.items():
        assert tracker.text(slot).tolist() == batch.texts[name]
    return found


def test_rows_that_move_stay_the_same_requests() -> None:
    batch = FakeBatch(4, 64)
    tracker, over = tracker_of(batch)
    for name, prompt in (("a", [1, 2, 3]), ("b", [4, 5, 6]), ("c", [1, 2, 4])):
        batch.add(name, prompt)
    first = follow(tracker, batch, {"a": [7], "b": [8], "c": [7]})
    batch.remove("a")  # c takes its row
    assert batch.names == ["c", "b"]
    second = follow(tracker, batch, {"b": [9], "c": [9, 9]})
    assert second == {"b": first["b"], "c": first["c"]}
    batch.swap("b", "c")
    assert follow(tracker, batch, {"b": [1], "c": [2]}) == second
    assert len(tracker) == 3
    assert over == []


def test_rows_of_one_length_that_differ_in_one_early_token() -> None:
    batch = FakeBatch(4, 256)
    tracker, _ = tracker_of(batch)
    common = list(range(10, 140))
    batch.add("a", [1, *common])
    batch.add("b", [2, *common])
    first = follow(tracker, batch, {"a": [7], "b": [7]})
    batch.swap("a", "b")
    assert follow(tracker, batch, {"a": [7], "b": [7]}) == first
    assert first["a"] != first["b"]


def test_a_preempted_request_comes_back_in_another_row() -> None:
    batch = FakeBatch(4, 64)
    tracker, over = tracker_of(batch)
    batch.add("a", [1, 2, 3])
    batch.add("b", [4, 5])
    first = follow(tracker, batch, {"a": [6], "b": [6]})
    batch.remove("a")
    for _ in range(ABSENT_STEPS - 1):
        follow(tracker, batch, {"b": [6]})
    batch.restore("a")
    assert batch.names == ["b", "a"]
    assert follow(tracker, batch, {"a": [], "b": [6]}) == {"b": first["b"]}  # its text is computed again
    assert follow(tracker, batch, {"a": [7], "b": [6]}) == first
    assert over == []


def test_requests_that_stay_away_are_over() -> None:
    batch = FakeBatch(4, 64)
    tracker, over = tracker_of(batch)
    batch.add("a", [1, 2, 3])
    batch.add("b", [4, 5])
    slots = follow(tracker, batch, {"a": [6], "b": [6]})
    tracker.sessions[[slots["a"], slots["b"]]] = [0, 1]
    batch.remove("a")
    for _ in range(ABSENT_STEPS):
        follow(tracker, batch, {"b": [6]})
    assert over == []
    follow(tracker, batch, {"b": [6]})
    assert over == [0]


@pytest.mark.parametrize("ended", [False, True])
def test_a_new_request_or_an_end_tells_that_one_is_over(ended: bool) -> None:
    batch = FakeBatch(4, 64)
    tracker, over = tracker_of(batch)
    batch.add("a", [1, 2, 3])
    batch.add("b", [4, 5])
    slots = follow(tracker, batch, {"a": [6], "b": [6]})
    tracker.sessions[[slots["a"], slots["b"]]] = [0, 1]
    tracker.ended[slots["a"]] = ended
    if not ended:
        batch.replace(
            "a", "c", [1, 2, 3, 6, 9]
        )  # the next turn of a, in its row: another request all the same
        assert follow(tracker, batch, {"b": [7], "c": [1]})["b"] == slots["b"]
        assert len(tracker) == 2
    else:
        batch.remove("a")
        follow(tracker, batch, {"b": [7]})
    assert over == [0]


def test_an_empty_batch_and_one_without_new_tokens() -> None:
    batch = FakeBatch(4, 64)
    tracker, _ = tracker_of(batch)
    assert follow(tracker, batch, {}) == {}
    batch.add("a", [1, 2])
    assert follow(tracker, batch, {"a": []}) == {}
    assert len(tracker) == 0


def test_requests_with_equal_texts_are_kept_apart_by_count() -> None:
    batch = FakeBatch(4, 64)
    tracker, _ = tracker_of(batch)
    batch.add("a", [1, 2])
    batch.add("b", [1, 2])
    first = follow(tracker, batch, {"a": [3], "b": [3]})
    assert first["a"] != first["b"]
    follow(tracker, batch, {"a": [4], "b": [5]})
    batch.swap("a", "b")
    follow(tracker, batch, {"a": [6], "b": [6]})
    assert len(tracker) == 2


def test_the_longest_absent_makes_room() -> None:
    batch = FakeBatch(2, 64)
    tracker, over = tracker_of(batch, slots=3)
    for number in range(20):
        batch.add(str(number), [number, 2])
        follow(tracker, batch, {str(number): [3]})
        batch.remove(str(number))
    assert len(tracker) <= 3
    assert len(over) == 20 - len(tracker)


@pytest.mark.parametrize("seed", range(20))
def test_random_traffic_never_mixes_texts(seed: int) -> None:
    """Prompts of one template, aborts, preemptions, swaps and reused rows; `follow` compares whole texts."""
    draw = random.Random(seed)
    batch = FakeBatch(6, 200)
    tracker, _ = tracker_of(batch)
    slots: dict[str, int] = {}
    waiting: list[str] = []
    born = 0
    for _ in range(120):
        if len(batch.names) < 6 and draw.random() < 0.4:
            if waiting and draw.random() < 0.7:
                batch.restore(waiting.pop(0))
            else:
                name = f"r{born}"
                born += 1
                batch.add(name, [draw.randrange(3), *([9] * 20), draw.randrange(2)])
        if batch.names and draw.random() < 0.15:
            name = draw.choice(batch.names)
            batch.remove(name)
            if draw.random() < 0.5 and len(batch.texts[name]) < 120:
                waiting.append(name)
        if len(batch.names) > 1 and draw.random() < 0.3:
            batch.swap(*draw.sample(batch.names, 2))
        tokens = {
            name: [draw.randrange(2) for _ in range(draw.randrange(4))]
            for name in batch.names
            if len(batch.texts[name]) < 190
        }
        now = follow(tracker, batch, tokens)
        assert len(set(now.values())) == len(now)
        slots.update(now)
