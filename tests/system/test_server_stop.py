"""The command: SIGTERM under load, addresses that need keys, and what is refused before anything loads."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serve_client import Ask, ask_server
from benchmarks.serve_model import save_tiny_model
from benchmarks.serve_process import ServeProcess

GRACE = 20.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    save_tiny_model(made)
    return made


def start(folder: Path, *options: str) -> ServeProcess:
    return ServeProcess(["--model", str(folder), "--threads", "1", "--method", "prompt_lookup", *options])


@pytest.fixture
def server(folder: Path) -> Iterator[ServeProcess]:
    made = start(folder, "--grace", str(GRACE), "--max-batch", "4", "--log-format", "json")
    yield made
    made.stop()


def post(port: int, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    finally:
        connection.close()


def test_what_runs_is_finished_and_what_comes_is_refused(server: ServeProcess) -> None:
    asks = [Ask("the cat sat on the mat", seed, 600, 1.0) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        futures = [
            pool.submit(ask_server, server.port, ask, stream=bool(number % 2), name=f"r{number}")
            for number, ask in enumerate(asks)
        ]
        time.sleep(0.3)
        begin = time.monotonic()
        server.signal()
        time.sleep(0.05)
        late = None
        if server.health() == 503:  # it still runs
            late = post(server.port, {"prompt": "a", "max_tokens": 1})
        answers = [each.result() for each in futures]
    code = server.wait(GRACE + 10)
    assert code == 0, server.last_lines
    assert time.monotonic() - begin < GRACE + 10
    # Each was answered whole, or refused as one that came too late; none was cut.
    for told in answers:
        assert not told.wrong or told.wrong.startswith(("status 503", "ConnectionRefused")), told.wrong
    assert any(not told.wrong for told in answers)
    if late is not None:
        assert late[0] == 503
        assert int(late[1]["retry-after"]) >= 1
    logged = [json.loads(line) for line in server.last_lines if line.startswith("{")]
    ended = [line for line in logged if "completion_tokens" in line]
    assert ended
    assert all("cat" not in json.dumps(line) for line in ended)


def test_what_takes_longer_than_the_grace_is_told(folder: Path) -> None:
    server = start(folder, "--grace", "0.5", "--max-tokens", "1000000")
    body = {"prompt": "the cat", "max_tokens": 4000, "ignore_eos": True, "logprobs": 15, "temperature": 1}
    with ThreadPoolExecutor(6) as pool:
        futures = [
            pool.submit(post, server.port, {**body, "seed": seed, "n": 2, "stream": seed % 2 == 0})
            for seed in range(6)
        ]
        time.sleep(1.0)
        server.signal()
        code = server.wait(60)
        answers = [each.result() for each in futures]
    assert code == 0, server.last_lines
    aborted = 0
    for status, _, content in answers:
        if content.startswith(b"data: "):
            lines = [line for line in content.splitlines() if line]
            assert lines[-1] == b"data: [DONE]"
            aborted += b'"error"' in lines[-2]
        else:
            assert status in (200, 503)
            aborted += status == 503
    assert aborted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "--no-auth"),
        (["--api-key", "short"], "8 characters"),
        (["--api-key", "long-enough-key=bad tenant"], "no name"),
        (["--no-auth", "--api-key", "long-enough-key"], "Leave one"),
        (["--engine", "other"], "transformers or vllm"),
        (["--", "--max-model-len", "512"], "Name the model with --model"),
        (["--log-format", "xml"], "text or json"),
        (["--engine", "vllm", "--api-key", "key-number-1", "--api-key", "key-number-2"], "one API key"),
        (["--engine", "vllm", "--nodes", "8", "--stock-kernels"], "has no --nodes, --cpu-kernels/--stock"),
        (["--engine", "vllm", "--tool-parser", "qwen", "--store", "redis://a"], "It takes --model, --dtype"),
    ],
)
def test_bad_options_end_it_at_once(options: list[str], message: str, capfd: Any) -> None:
    from retrieval_draft.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["serve", "--model", "nowhere", *options])
    assert stopped.value.code == 1
    assert message in capfd.readouterr().err


def test_a_model_that_is_not_there_ends_it(tmp_path: Path, capfd: Any) -> None:
    from retrieval_draft.errors import RetrievalDraftError

    with pytest.raises(RetrievalDraftError) as error:
        ServeProcess(["--model", str(tmp_path / "nowhere")], 60)
    assert "nowhere" in error.value.hint
