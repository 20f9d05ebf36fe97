"""The drafting service in a process of its own, as engines meet it."""

from __future__ import annotations

import os
import re
import signal
import time
import urllib.request
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.draft_service import accepted, measure_draft_service, serving
from retrieval_draft.bench.replay import read_traces
from retrieval_draft.draft_service.client import DraftClient
from retrieval_draft.draft_service.errors import NotAllowedError, UnknownSessionError
from retrieval_draft.proposer import Proposer

TRACE = Path("tests/data/vicuna7b_specbench_12.jsonl.gz")
DOCUMENT = Path("docs/drafting_service.md")
VOCABULARY = ("--vocabulary", "32000")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(*VOCABULARY, "--port", "0") as found:
        yield found


def metric(url: str, name: str) -> float:
    page = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()  # noqa: S310
    found = re.search(rf"^retrieval_draft:{re.escape(name)} (\S+)$", page, re.M)
    assert found, page
    return float(found[1])


def test_replayed_trees_are_those_of_a_proposer_of_ones_own(url: str) -> None:
    tokens = steps = 0
    with DraftClient(url, timeout=30) as client, Proposer.for_tokenizer(None, vocabulary=32000) as alone:
        assert client.info().vocabulary == 32000
        for trace in islice(read_traces([TRACE]), 2):
            output = trace.output.tolist()[:150]
            session, own = client.open(trace.prompt), alone.open(trace.prompt)
            emitted, done = output[:1], 1
            while done < len(output):
                draft = session.step(emitted, nodes=24)
                own.observe(np.array(emitted, np.int32), later=True)  # as the service learns
                tree = own.propose(24)
                assert draft.tokens == tree.tokens.tolist()
                assert draft.parents == tree.parents.tolist()
                emitted = accepted(draft, output[done:])
                done, tokens, steps = done + len(emitted), tokens + len(emitted), steps + 1
            session.close(tokens=emitted, finished=False)
            own.observe(np.array(emitted, np.int32))
            own.close()
            alone.flush()
            time.sleep(0.2)  # the service merges its history in the background too
    assert tokens / steps > 1.2
    assert metric(url, "drafting_sessions") == 0
    assert metric(url, "drafting_session_tokens") == 0
    assert metric(url, "drafting_accepted_tokens_total") > 0


def test_a_batch_steps_in_one_round_trip_and_leaves_nothing(url: str) -> None:
    before = metric(url, "drafting_steps_total")
    with DraftClient(url, timeout=30) as client:
        sessions = [client.open([5, 6, 7, number, 5, 6]) for number in range(64)]
        assert metric(url, "drafting_sessions") == 64
        drafts = client.step([(session, [7]) for session in sessions], nodes=8)
        assert [number in draft.tokens[1:] for number, draft in enumerate(drafts)] == [True] * 64
        assert metric(url, "drafting_steps_total") == before + 64
        for session in sessions:
            session.close(finished=False)
    assert metric(url, "drafting_sessions") == 0


def test_the_example_of_the_documentation(url: str) -> None:
    block = re.search(r"```python\n(.*?)```", DOCUMENT.read_text("utf-8"), re.S)
    assert block
    reply = [11, 12, 13, 14] * 12
    done = [0]

    def first_token(prompt: Sequence[int]) -> int:
        done[0] = 1
        return reply[0]

    def verify(tokens: Sequence[int], parents: Sequence[int]) -> list[int]:
        from retrieval_draft.draft_service.client import Draft

        emitted = accepted(Draft(list(tokens), list(parents)), reply[done[0] :])
        done[0] += len(emitted)
        return emitted

    names: dict[str, Any] = {
        "url": url,
        "prompt": [11, 12, 13, 14],
        "first_token": first_token,
        "verify": verify,
    }
    exec(block[1], names)  # noqa: S102 - it is ours
    assert names["text"] == reply[: len(names["text"])]
    assert len(names["text"]) >= 40
    assert names["client"].failures == 0
    names["client"].close()


def test_a_unix_socket_with_keys_ends_and_cleans_up(tmp_path: Path) -> None:
    socket = tmp_path / "drafts.sock"
    keys = tmp_path / "keys"
    keys.write_text("# of two teams\nkey-of-team-a=a\nkey-of-team-b=b\n")
    with serving(*VOCABULARY, "--unix-socket", str(socket), "--api-key-file", str(keys)) as url:
        assert url == f"unix://{socket}"
        assert socket.stat().st_mode & 0o077 == 0
        with (
            DraftClient(url, api_key="key-of-team-a", timeout=30) as a,
            DraftClient(url, api_key="key-of-team-b", timeout=30) as b,
            DraftClient(url, api_key="a-wrong-key", timeout=30) as nobody,
        ):
            session = a.open([1, 2])
            theirs = b.open([1, 2])
            theirs._key = session._key
            with pytest.raises(UnknownSessionError):
                theirs.step([3])
            assert session.step([3]).length == 3
            with pytest.raises(NotAllowedError):
                nobody.open([1])
    assert not socket.exists()


@pytest.mark.slow
def test_an_engine_goes_on_when_the_service_dies(tmp_path: Path) -> None:
    socket = str(tmp_path / "drafts.sock")
    with (
        serving(*VOCABULARY, "--unix-socket", socket) as url,
        DraftClient(url, timeout=30, on_error="empty", retry_seconds=0.01) as client,
    ):
        session = client.open([7, 8, 9, 7, 8])
        assert session.step([9], nodes=8).num_draft_tokens > 0
        os.kill(_process_of(socket), signal.SIGKILL)
        time.sleep(0.1)
        for token in (7, 8):
            assert session.step([token], nodes=8).tokens == [token]
        # It comes back on the socket that was left behind; what it knew is gone.
        with serving(*VOCABULARY, "--unix-socket", socket):
            assert session.step([9], nodes=8).tokens == [9]
            assert not session.alive
            again = client.open([7, 8, 9, 7, 8])
            assert again.step([9], nodes=8).num_draft_tokens > 0


def _process_of(socket: str) -> int:
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if socket.encode() in words:
                return int(process.name)
    raise AssertionError("there is no such process")


@pytest.mark.slow
def test_the_bench_measures_what_it_says() -> None:
    result = measure_draft_service([TRACE], nodes=8, limit=1, together=3)
    assert result["steps"] > 100
    assert 0 < result["nodes_per_step"] <= 8
    for name in ("tcp", "unix"):
        assert 0 < result["step_us"][name]["p50"] <= result["step_us"][name]["p99"]
    assert result["service_us"]["p50"] < max(found["p99"] for found in result["step_us"].values())
