"""vLLM's own server, started by ``retrieval-draft serve --engine vllm``, and two tensor-parallel ranks."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

pytest.importorskip("vllm")

from retrieval_draft.models.packaged import packaged_folder

pytestmark = pytest.mark.timeout(3600)

LIST = "red, green, blue, red, green, blue, red, green, blue, red,"
NEW = 24
TWO_RANKS = """
import sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    options = {"max_model_len": 256, "max_num_seqs": 2, "enforce_eager": True, "dtype": "float32"}
    speculative = {
        "method": "custom_class",
        "model": "retrieval_draft.integrations.vllm.RetrievalProposer",
        "num_speculative_tokens": 6,
    }
    llm = LLM(sys.argv[1], tensor_parallel_size=2, distributed_executor_backend="mp",
              speculative_config=speculative, disable_log_stats=False, **options)
    [output] = llm.generate([sys.argv[2]], SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
    counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    print("ACCEPTED", int(counts["vllm:spec_decode_num_accepted_tokens"]))
    print("TEXT", output.outputs[0].text.encode())
"""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "RETRIEVAL_DRAFT_COSTS": "ignored",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    words = [sys.executable, "-m", "retrieval_draft.cli", "serve", "--engine", "vllm"]
    words += [
        "--model",
        "gemma3-270m",
        "--port",
        str(port),
        "--",
        "--max-model-len",
        "512",
        "--enforce-eager",
    ]
    process = subprocess.Popen(words, env=environment, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 900
        while time.monotonic() < until:
            assert process.poll() is None, "vLLM has ended"
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(1.0)
        yield url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_the_launcher_starts_a_server_that_drafts(server: str) -> None:
    request = {"model": "gemma3-270m", "prompt": LIST, "max_tokens": NEW, "temperature": 0}
    reply = httpx.post(f"{server}/v1/completions", json=request, timeout=600).raise_for_status().json()
    assert "blue" in reply["choices"][0]["text"]
    metrics = httpx.get(f"{server}/metrics").text
    accepted = re.findall(r"^vllm:spec_decode_num_accepted_tokens_total\{.*\} ([\d.e+]+)$", metrics, re.M)
    assert sum(map(float, accepted)) > 0


def test_two_tensor_parallel_ranks_verify_the_first_ones_drafts(server: str, tmp_path: Path) -> None:
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    environment = {**os.environ, "RETRIEVAL_DRAFT_COSTS": "ignored", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"  # else each rank wants a NUMA node of its own
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    done = subprocess.run(
        [sys.executable, str(script), str(packaged_folder("gemma3-270m")), LIST],
        capture_output=True, text=True, env=environment, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(re.findall(r"^ACCEPTED (\d+)$", done.stdout, re.M)[0]) > 0
    request = {"model": "gemma3-270m", "prompt": LIST, "max_tokens": NEW, "temperature": 0}
    reply = httpx.post(f"{server}/v1/completions", json=request, timeout=600).json()
    assert f"TEXT {reply['choices'][0]['text'].encode()}" in done.stdout
