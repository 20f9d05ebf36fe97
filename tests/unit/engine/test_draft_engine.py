"""State that outlives a request: sources opened for groups, calibration and costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrieval_draft.config import DraftConfig
from retrieval_draft.drafting.calibration import Calibration
from retrieval_draft.drafting.cost import SIZES, CostModel
from retrieval_draft.drafting.stats import DraftStats
from retrieval_draft.engine import warm_up
from retrieval_draft.engine.draft_engine import DraftEngine, LearnedState
from retrieval_draft.engine.head_cost import HeadCost
from retrieval_draft.engine.request import DecodeRequest
from retrieval_draft.engine.target import Target
from retrieval_draft.index.source import TokenArray
from tests.support.models import make
from tests.support.sources import OracleSession, OracleSource, fuse

TARGET = Target(make("llama"))
PROMPT = np.array([1, 2, 3], np.int32)
SECONDS = {size: 1.0 + 0.01 * size for size in SIZES}


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Compilation and measurements, without the waiting."""
    done: list[str] = []

    def cost(forward: Any, device: Any, advance: Any) -> CostModel:
        done.append("passes")
        made = CostModel()
        made.load(SECONDS)
        return made

    def head(target: Target) -> HeadCost:
        done.append("head")
        return HeadCost(row=1.0, step=10.0)

    monkeypatch.setattr(CostModel, "measure", cost)
    monkeypatch.setattr(HeadCost, "measure", head)
    monkeypatch.setattr(warm_up, "compile_kernels", lambda *given: done.append("kernels"))
    return done


class Parallel(OracleSource):
    """Notes which requests are opened together, and how their sources are prepared."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[tuple[list[int], int]] = []
        self.prepared = 0

    def open_parallel(
        self, prompt: TokenArray, references: Sequence[TokenArray], count: int
    ) -> list[OracleSession]:
        self.groups.append((prompt.tolist(), count))
        return [self.open(prompt, references) for _ in range(count)]

    def prepare(self) -> None:
        self.prepared += 1


def engine(*sources: Any, of_method: int | None = None, **options: Any) -> DraftEngine:
    return DraftEngine(TARGET, DraftConfig(**options), sources, fuse, of_method)


def request(*prompt: int, owner: DecodeRequest | None = None) -> DecodeRequest:
    return DecodeRequest(np.array(prompt, np.int32), max_length=20, prefix_owner=owner)


def opened(made: DraftEngine, *requests: DecodeRequest) -> Any:
    made.prepare()
    return made.open(requests, (), [DraftStats() for _ in requests])


@pytest.mark.parametrize("made", [engine(), engine(OracleSource(), nodes=0)], ids=["no source", "no nodes"])
def test_plain_decoding_opens_and_measures_nothing(made: DraftEngine, measured: list[str]) -> None:
    assert opened(made, request(1, 2), request(3)) == [None, None]
    assert measured == []
    assert made.reader.k == 0


def test_what_is_needed_is_made_once(measured: list[str]) -> None:
    source = Parallel()
    made = engine(source, prefill_logits="auto")
    made.prepare()
    made.prepare()
    assert measured == ["kernels", "head", "passes"]
    assert source.prepared == 1


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"nodes": 8, "prefill_logits": True}, ["kernels"]),
        ({"nodes": 8, "prefill_logits": "auto"}, ["kernels", "head"]),
        ({"prefill_logits": False}, ["kernels", "passes"]),
    ],
)
def test_only_what_the_configuration_leaves_open_is_measured(
    options: dict[str, Any], steps: list[str], measured: list[str]
) -> None:
    engine(OracleSource(), **options).prepare()
    assert measured == steps


@pytest.mark.parametrize(
    ("of_method", "options", "size"),
    [
        (None, {"nodes": 5}, 5),
        (7, {}, 7),
        (7, {"nodes": 5}, 5),
        (99, {"max_nodes": 20}, 20),
        (None, {"max_nodes": 9}, 9),
    ],
)
def test_a_step_has_as_many_nodes_as_are_asked_for(
    of_method: int | None, options: dict[str, Any], size: int
) -> None:
    made = engine(OracleSource((4,) * 40, wrong=0.0), of_method=of_method, **options)
    (session,) = opened(made, request(1, 2, 3))
    assert len(session.propose(3, 2, 99).fused) == size + 1


def test_requests_of_one_prompt_are_opened_together_and_keep_their_places() -> None:
    source = Parallel()
    first = request(1, 2)
    other = request(9)
    requests = [first, other, request(1, 2, owner=first), request(1, 2, owner=first)]
    sessions = opened(engine(source, nodes=4), *requests)
    assert source.groups == [([1, 2], 3)]
    assert len(source.sessions) == 4
    for index, session in enumerate(sessions):
        session.observe(np.array([50 + index], np.int32))
    by_text = sorted(session.text for session in source.sessions)
    assert by_text == [[1, 2, 50], [1, 2, 52], [1, 2, 53], [9, 51]]


@pytest.mark.parametrize(("wanted", "rows"), [(True, 3), (False, 1), ("auto", 2)])
def test_a_prompt_is_learned_from_as_the_configuration_says(
    wanted: Any, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        HeadCost, "paying_rows", lambda self, new, prompt: 2 if (new, prompt) == (17, 3) else -1
    )
    asked = request(1, 2, 3)
    opened(engine(OracleSource(), nodes=4, prefill_logits=wanted), asked)
    assert asked.prompt_rows == rows


@pytest.mark.parametrize("known", [True, False])
def test_noise_is_handed_on_only_where_it_may_be_known(known: bool) -> None:
    noise: Any = object()
    asked = request(1)
    asked.noise = noise
    made, seen = engine(OracleSource(), nodes=4, known_noise=known), []
    made.prepare()

    class Opens:
        def open(self, prompt: Any, *, noise: Any) -> Any:
            seen.append(noise)
            return Calibration().open()

    made._calibration = Opens()
    made.open([asked], (), [DraftStats()])
    assert seen == [noise if known else None]


def test_what_one_process_measured_another_takes(measured: list[str]) -> None:
    first = engine(OracleSource())
    first.prepare()
    known = first.known()
    assert known.seconds == pytest.approx(SECONDS)
    del measured[:]
    second = engine(OracleSource(), prefill_logits=False)
    second.start_from(known)
    assert second.known() is known, "until it has learned something itself"
    second.prepare()
    assert measured == ["kernels"]
    assert second.known().calibration is known.calibration
    assert second.budget.plain_seconds(1) == pytest.approx(SECONDS[1])


def test_namespaces_measure_nothing_and_learn_apart(measured: list[str]) -> None:
    first, source = engine(OracleSource()), Parallel()
    first.prepare()
    del measured[:]
    second = engine(source)
    second.prepare_like(first)
    second.prepare()
    assert measured == []
    assert source.prepared == 1
    assert second.budget is first.budget
    assert second.known().calibration is not first.known().calibration


def test_a_history_keeps_the_calibration(tmp_path: Path) -> None:
    made = engine(OracleSource(), nodes=4, history_folder=str(tmp_path))
    made.prepare()
    made.flush()
    kept = made.known().calibration
    again = engine(OracleSource(), nodes=4, history_folder=str(tmp_path))
    stale = Calibration()
    again.start_from(LearnedState(stale, {}))
    again.prepare()
    assert kept is not None
    assert again.known().calibration is not stale, "a history's is newer"


def test_a_history_keeps_the_costs_of_passes(tmp_path: Path, measured: list[str]) -> None:
    made = engine(OracleSource(), history_folder=str(tmp_path))
    made.prepare()
    assert "passes" in measured
    made.close()
    measured.clear()
    again = engine(OracleSource(), history_folder=str(tmp_path))
    again.prepare()
    assert "passes" not in measured
    assert again.known().seconds == pytest.approx(SECONDS)
    other = engine(OracleSource(), history_folder=str(tmp_path), cpu_kernels=False)
    other.prepare()
    assert "passes" in measured, "other kernels take other times"


def test_costs_are_kept_with_a_history_alone(tmp_path: Path) -> None:
    for options in ({"nodes": 4, "history_folder": str(tmp_path)}, {}):
        made = engine(OracleSource(), **options)
        made.prepare()
        made.close()
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.safetensors"]


def test_failures_of_sources_are_counted() -> None:
    class Broken(OracleSource):
        def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> OracleSession:
            raise OSError("broken on purpose")

    made = engine(Broken(), nodes=4)
    opened(made, request(1), request(2))
    assert made.failures == 2
