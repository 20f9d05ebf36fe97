"""The draft source of CONTRIBUTING.md is one file and one line, and what the page promises of it holds."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retrieval_draft.bench.replay import replay
from retrieval_draft.config import DRAFT_MODEL, SOURCES, DraftConfig, SourceSpec
from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.drafting.calibration import AGREEMENT, AGREEMENT_ODDS, Calibration, columns_of
from tests.support.commands import Command
from tests.support.servers import serving, tiny_model, tiny_tokenizer

PAGE = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
TRACE = Path(__file__).parents[1] / "data" / "vicuna7b_specbench_12.jsonl.gz"
NAME = "last-seen"
PROMPT = "ab cd ef gh ab cd ef ab gh cd ab"


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SourceSpec]:
    """The page's file where Python finds it, and the page's line in the table."""
    begin = PAGE.index("## Add a draft source")
    section = PAGE[begin : PAGE.index("\n## ", begin)]
    file, line = re.findall(r"^```(?:python|text)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    (tmp_path / "last_seen.py").write_text(file, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    line = line.replace("retrieval_draft.index.last_seen", "last_seen")
    (made,) = eval(line.strip(), {"SourceSpec": SourceSpec})  # noqa: S307 - our own page
    assert made.name == NAME
    taken = {other.slot for other in (*SOURCES.values(), DRAFT_MODEL)}
    made = replace(made, slot=min(set(range(11)) - taken))  # as the page says, for a table that has grown too
    monkeypatch.setitem(SOURCES, NAME, made)
    columns_of.cache_clear()
    yield made
    columns_of.cache_clear()


@pytest.fixture
def drafter(spec: SourceSpec) -> RetrievalDrafter:
    tokenizer = tiny_tokenizer()
    config = DraftConfig(nodes=12, adjacency_rows=1024)
    return RetrievalDrafter.for_model(tiny_model(tokenizer), tokenizer, config=config)


def learned(drafter: RetrievalDrafter) -> Calibration:
    found = drafter.draft_engine.known().calibration
    assert found is not None
    return found


def test_its_slot_is_its_own_and_starts_as_any_lookup(spec: SourceSpec) -> None:
    others = [other for name, other in SOURCES.items() if name != NAME]
    assert spec.slot not in {other.slot for other in (*others, DRAFT_MODEL)}
    _, used = columns_of((*SOURCES, DRAFT_MODEL.name))
    _, before = columns_of((*(other.name for other in others), DRAFT_MODEL.name))
    assert used == before | 1 << spec.slot
    calibration = Calibration()
    assert calibration.weights[1 << spec.slot, [spec.slot, -1]].tolist() == [1.0, 0.0]
    for other in others:
        if other.name != "siblings":
            both = calibration.weights[1 << spec.slot | 1 << other.slot]
            assert both[[spec.slot, other.slot, -1]].tolist() == [
                AGREEMENT / 2,
                AGREEMENT / 2,
                AGREEMENT_ODDS,
            ]
    assert not calibration.parameters[spec.slot].any()


def test_it_is_drafted_from_beside_all_others_and_changes_no_text(
    spec: SourceSpec, drafter: RetrievalDrafter, tmp_path: Path
) -> None:
    assert drafter.config.sources == tuple(SOURCES)
    model, tokenizer = tiny_model(tiny_tokenizer()), tiny_tokenizer()
    before = Calibration()
    for prompt in (PROMPT, PROMPT[3:], PROMPT[:-3]):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        ours = drafter.generate(ids, max_new_tokens=60, do_sample=False)
        stock = model.generate(ids, max_new_tokens=60, do_sample=False)
        assert torch.equal(ours, stock)
    stats = drafter.stats
    assert stats.source_failures == 0
    assert {"automaton", "adjacency", "history", NAME} <= set(stats.drafted_by_source)
    assert stats.drafted_by_source[NAME] > stats.accepted_by_source[NAME] > 0

    calibration, bit = learned(drafter), 1 << spec.slot
    rows = np.flatnonzero((calibration.weights != before.weights).any(1))
    assert (rows & bit != 0).any(), "its weights moved"
    assert not (rows & (1 << DRAFT_MODEL.slot | 1 << SOURCES["siblings"].slot)).any(), "nobody took its place"
    assert calibration.parameters[spec.slot].any()
    assert calibration.expected.reshape(len(calibration.weights), -1)[rows[rows & bit != 0]].sum() > 0

    calibration.save(tmp_path / "c.safetensors")
    again = Calibration()
    again.load(tmp_path / "c.safetensors")
    np.testing.assert_allclose(again.weights, calibration.weights, rtol=1e-6)


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as response:  # noqa: S310 - a loopback address
        return response.read() if not url.endswith("events") else response.readline()


def test_metrics_and_dashboard_show_it_by_name(drafter: RetrievalDrafter) -> None:
    with serving(drafter, tiny_tokenizer()) as running:
        body: Any = {"prompt": PROMPT, "max_tokens": 60, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(  # noqa: S310 - a loopback address
            f"{running.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=60).close()  # noqa: S310
        assert running.wait_idle()
        metrics = get(f"{running.url}/metrics").decode()
        for kind in ("draft", "accepted"):
            line = rf'^retrieval_draft:source_{kind}_tokens_total{{.*source="{NAME}".*}} (\S+)$'
            found = re.search(line, metrics, re.MULTILINE)
            assert found is not None, f"no {kind} tokens of {NAME}"
            assert float(found[1]) > 0
        feed = json.loads(get(f"{running.url}/dashboard/events").removeprefix(b"data: "))
        shown = {name: (drafted, accepted) for name, drafted, accepted in feed["by_source"]}
        assert shown[NAME][0] > shown[NAME][1] > 0
        assert {"automaton", "adjacency"} <= set(shown)


def test_the_page_measures_it_with_a_command_that_works(spec: SourceSpec, command: Command) -> None:
    found = re.search(rf"`retrieval-draft (bench replay TRACE [^`]*{NAME})`", PAGE)
    assert found is not None
    arguments = [str(TRACE) if word == "TRACE" else word for word in found[1].split()]
    code, printed, _ = command(*arguments, "--limit", "2", "--json")
    assert code == 0
    result = json.loads(printed)
    assert result["config"]["sources"] == ["automaton", NAME]
    alone = replay([TRACE], nodes=60, sources=[NAME], limit=2)
    assert result["tokens_per_step"] > alone["tokens_per_step"] > 1.2
