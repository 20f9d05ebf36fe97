"""The warm-up: after it no request waits for a kernel."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import gc
import sys

import torch
from numba.core.dispatcher import Dispatcher

from retrieval_draft.config import DraftConfig
from retrieval_draft.drafter import RetrievalDrafter
from tests.support.models import make
from tests.support.tokenizers_for_tests import byte_level

torch.set_num_threads(int(sys.argv[1]))
tokenizer = byte_level(("ab", "cd"))
model = make("llama", vocab_size=len(tokenizer), max_position_embeddings=4096)
drafter = RetrievalDrafter.for_model(model, tokenizer, config=DraftConfig(prefix_cache_bytes=1 << 20))

def compiled():
    made = [each for each in gc.get_objects() if isinstance(each, Dispatcher)]
    return {(each.py_func.__module__, each.__name__, str(call)) for each in made for call in each.signatures}

drafter.warm_up()
before = compiled()
assert len(before) > 20
for turn in range(3):
    text = "ab cd ab cd x" + "ab cd ef gh" * 40 * turn
    for options in ({}, {"do_sample": True, "seed": turn}):
        ids = tokenizer(text, return_tensors="pt").input_ids
        drafter.generate(ids, max_new_tokens=200, prediction="ab cd xy ab cd", **options)
        drafter.generate(ids.repeat(3, 1), max_new_tokens=20, **options)
print(sorted(compiled() - before))
"""


@pytest.mark.parametrize("threads", ["1", "2"])
def test_requests_compile_no_kernel(threads: str) -> None:
    told = subprocess.run(
        [sys.executable, "-c", CODE, threads], capture_output=True, text=True, timeout=600, check=False
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout.strip() == "[]"
