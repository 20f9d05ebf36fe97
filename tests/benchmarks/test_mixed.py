from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.idle_loop import IdleLoop
from benchmarks.mixed_asks import BAD_ASKS, make_mixed_asks
from benchmarks.mixed_load import MixedResult, ask_bad, ask_mixed, spread_ms
from benchmarks.mixed_model import save_mixed_model
from retrieval_draft.models.loading import load_model, load_processor
from tests.support.servers import Running, serving, tiny_drafter


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder: Path = tmp_path_factory.mktemp("mixed")
    save_mixed_model(folder)
    model, tokenizer = load_model(str(folder))
    drafter = tiny_drafter(model, tokenizer)
    with serving(drafter, tokenizer, processor=load_processor(str(folder))) as running:
        yield running


def test_each_kind_is_answered_alike_streamed_and_whole(running: Running) -> None:
    asks = make_mixed_asks(10)
    assert len({ask.kind for ask in asks}) == 10
    for ask in asks:
        whole, streamed = (ask_mixed(running.port, ask, stream=stream) for stream in (False, True))
        assert (whole.fault, streamed.fault) == ("", "")
        assert whole.answer == streamed.answer
        assert streamed.first > 0
        left = ask_mixed(running.port, ask, stream=True, leave_after=0)
        assert (left.status, left.fault) == (0, "")
    assert running.wait_idle()


def test_bad_requests_are_refused(running: Running) -> None:
    assert [ask_bad(running.port, path, body) for path, body in BAD_ASKS] == [""] * len(BAD_ASKS)
    assert ask_bad(running.port, "/v1/completions", {"prompt": "a", "max_tokens": 1}).startswith("/v1/comp")


def test_an_idle_loop_tells_how_late_it_woke() -> None:
    began = time.monotonic()
    with IdleLoop() as idle:
        time.sleep(0.5)
    assert idle.late
    assert all(at >= began and late > -0.01 for at, late in idle.late)


def test_a_result_names_what_is_long() -> None:
    gaps, idle = [(1.0, 0.1), (2.0, 0.3), (3.0, 0.3)], [(1.5, 0.4), (1.8, 0.04), (2.4, 0.2), (3.1, 0.15)]
    result = MixedResult(gaps=gaps, resident=[1 << 20] * 8, data=[1 << 19] * 8, idle=idle)
    summary = result.summary()
    assert summary["gaps_over_200_ms"] == [
        {"second": 2.0, "ms": 300, "idle_loop_ms": 40},
        {"second": 3.0, "ms": 300, "idle_loop_ms": 150},
    ]
    assert summary["gaps_over_200_ms_beyond_the_idle_loop"] == 1
    assert summary["resident_mib"] == {"quarters": [1.0] * 5, "peak": 1.0, "per_minute": 0.0}
    assert summary["besides_data_mib"]["peak"] == 0.5
    assert spread_ms([]) == {"count": 0}
