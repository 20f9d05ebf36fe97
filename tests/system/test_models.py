"""Models of every family, tiny and random: drafted text is that of `model.generate`, in whatever way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CAUSAL = (
    # attention: full, sliding, latent, with learned positions, rotary factors that change, experts
    "llama", "gemma3_text", "deepseek_v3", "gpt2", "phi3:longrope", "mixtral:sliding",
    # no position argument, ALiBi, own windows, chunks, an index
    "bart", "bloom", "gpt_neo", "llama4_text", "deepseek_v32",
    # recurrent state: gated delta rule, KDA, Mamba-2, short convolutions; Mamba-1, RWKV, RG-LRU
    "qwen3_5_text", "kimi_linear", "nemotron_h", "falcon_h1", "lfm2", "mamba", "rwkv", "recurrent_gemma",
)  # fmt: skip
IMAGE_TEXT = ("gemma3", "llava", "qwen2_5_vl")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("words", [CAUSAL, ("--vision", *IMAGE_TEXT)], ids=["causal", "image-text"])
def test_no_model_differs_and_none_crashes(words: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "models.json"
    command = [sys.executable, "-m", "benchmarks", "models", *words, "--out", str(out), "--jobs", "2"]
    command += ["--trials", "drafts,seeded,batch,server,images"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["differs"] == []
    assert result["crashed"] == {}
    assert result["stock_fails"] == {}
    assert result["not_built"] == {}
    names = [name for name in words if not name.startswith("-")]
    assert sorted([*result["equal"], *result["plain"], *result["refused"]]) == sorted(names)
    for name in result["equal"]:
        trial = result["models"][name]["trials"]["drafts"]
        assert trial["passes"] < 0.5 * trial["tokens"], name
