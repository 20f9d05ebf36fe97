"""vLLM on the CPU with Gemma 3 270M, with and without drafts."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SPECULATIVE = {
    "method": "custom_class",
    "model": "retrieval_draft.integrations.vllm.RetrievalProposer",
    "num_speculative_tokens": 6,
}
TIE = 1e-3

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that a test can look inside
for name, value in (
    ("VLLM_CPU_KVCACHE_SPACE", "1"),
    ("VLLM_NO_USAGE_STATS", "1"),
    ("VLLM_LOGGING_LEVEL", "WARNING"),
    ("VLLM_PLUGINS", ""),
):
    os.environ.setdefault(name, value)


def engine(model: str, speculative: dict[str, Any] | None = None, **options: Any) -> Any:
    """vLLM in this process."""
    with several_engines():
        from vllm import LLM

        return LLM(
            model=model,
            dtype="float32",
            enforce_eager=True,
            speculative_config=speculative,
            **{"max_model_len": 512, "max_num_seqs": 4, "enable_prefix_caching": False, **options},
        )


@contextmanager
def several_engines() -> Iterator[None]:
    """Lets vLLM make an engine where numba is loaded already.

    Without Triton it looks through the attributes of all modules, and trips over one of llvmlite's, numba's
    compiler: its ``vars()`` is no dict.
    """
    hidden = sys.modules.pop("llvmlite.binding.ffi", None)
    try:
        yield
    finally:
        if hidden is not None:
            sys.modules["llvmlite.binding.ffi"] = hidden


def core_of(llm: Any) -> Any:
    """vLLM's scheduling loop."""
    return llm.llm_engine.engine_core.engine_core


def proposer_of(llm: Any) -> Any:
    """The proposer that vLLM made."""
    return core_of(llm).model_executor.driver_worker.worker.model_runner.drafter


def same_or_tie(plain: Any, ids: list[int], reference: list[int], other: list[int]) -> bool:
    """True if two replies are equal, or part where the model finds both tokens as good."""
    from vllm import SamplingParams

    if reference == other:
        return True
    index = next(n for n, pair in enumerate(zip(reference, other, strict=True)) if pair[0] != pair[1])
    prompt = {"prompt_token_ids": [*ids, *reference[:index]]}
    sampling = SamplingParams(temperature=0, max_tokens=1, logprobs=5)
    found = plain.generate([prompt], sampling, use_tqdm=False)[0].outputs[0].logprobs[0]
    return abs(found[reference[index]].logprob - found[other[index]].logprob) < TIE
