"""Drafting methods side by side in vLLM: speed, accepted tokens per draft, and equality of texts."""

from __future__ import annotations

import importlib
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.vllm_decoders import PLAIN, VllmDecoder, make_vllm_contestant
from benchmarks.vllm_switch import SWITCH, Switchboard
from retrieval_draft._progress import progress
from retrieval_draft.bench.measuring import ratio_summary, rotated
from retrieval_draft.bench.prompts import Prompt
from retrieval_draft.bench.provenance import provenance
from retrieval_draft.bench.ties import compare
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.integrations.vllm.interface import vllm_version

__all__ = ["compare_in_vllm"]

TIE = 1e-3
"""Natural log of two tokens' probabilities: nearer ones count as a tie, whose order may change in a pass of
another shape."""

_WARM_UP = "1. one\n2. two\n3. three\n4. four\n5. five\n6. six\n7."


@dataclass(slots=True)
class _Run:
    tokens: list[int]
    seconds: float
    decoding: float
    steps: int
    drafts: int
    drafted: int
    accepted: int
    sizes: Counter[int]
    verdict: str = "equal"


class _Engines:
    """vLLM without speculation, and vLLM with the switchboard."""

    def __init__(self, folder: str, dtype: str, most: int, max_model_len: int, plain: bool) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the switchboard must be in this process
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for the result
        os.environ.setdefault("VLLM_PLUGINS", "")
        vllm = importlib.import_module("vllm")
        options: dict[str, Any] = {
            "model": folder,
            "dtype": dtype,
            "enforce_eager": True,
            "max_model_len": max_model_len,
            "max_num_seqs": 8,
            # A prompt's second reader would find its prefill done.
            "enable_prefix_caching": False,
            "disable_log_stats": False,  # they hold the time of the first token
        }
        speculative = {"method": "custom_class", "model": SWITCH, "num_speculative_tokens": most}
        self._sampling: Any = vllm.SamplingParams
        self.plain: Any = vllm.LLM(**options) if plain else None
        self.drafting = vllm.LLM(**options, speculative_config=speculative)
        core = self.drafting.llm_engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        self.switch: Switchboard = runner.drafter
        self.switch.runner = runner

    def run(self, contestant: VllmDecoder, ids: Sequence[int], max_new_tokens: int) -> _Run:
        engine = self.plain if contestant.name == PLAIN else self.drafting
        contestant.begin()
        self.switch.current = contestant.propose
        self.switch.reset()
        sampling = self._sampling(temperature=0.0, max_tokens=max_new_tokens)
        begin = time.perf_counter()
        output = engine.generate([{"prompt_token_ids": list(ids)}], sampling, use_tqdm=False)
        seconds = time.perf_counter() - begin
        contestant.settle()
        switch = self.switch
        tokens = list(output[0].outputs[0].token_ids)
        steps = len(tokens) if contestant.name == PLAIN else switch.steps
        times = output[0].metrics
        decoding = times.last_token_ts - times.first_token_ts
        return _Run(
            tokens, seconds, decoding, steps, switch.drafts, switch.drafted, switch.accepted, switch.sizes
        )

    def compare_outputs(self, ids: Sequence[int], reference: list[int], other: list[int]) -> str:
        """Returns "equal", "tie" (the first different tokens are almost equally probable) or "different"."""
        index = compare(reference, other)
        if index is None:
            return "equal"
        if index in (len(reference), len(other)):
            return "different"
        self.switch.current = None
        engine = self.drafting if self.plain is None else self.plain
        sampling = self._sampling(temperature=0.0, max_tokens=1, logprobs=5)
        text = [*ids, *reference[:index]]
        output = engine.generate([{"prompt_token_ids": text}], sampling, use_tqdm=False)
        found = {token: entry.logprob for token, entry in output[0].outputs[0].logprobs[0].items()}
        pair = (reference[index], other[index])
        if not all(token in found for token in pair):
            return "different"
        return "tie" if abs(found[pair[0]] - found[pair[1]]) < TIE else "different"


def compare_in_vllm(
    folder: str,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    methods: Sequence[str],
    max_new_tokens: int,
    most: int = 24,
    dtype: str = "float32",
    max_model_len: int = 1024,
    passes: int = 1,
) -> dict[str, Any]:
    """Decodes every prompt greedily with every method, one request at a time.

    Methods take turns on each prompt, with another first one for each prompt. ``plain`` runs in an
    engine without speculation, all others in one engine whose proposer changes, so that they share the model
    and differ in their drafts only. Prefix caching is off. ``ratio`` is of tokens a second over the whole
    request, to the first method's; ``decode_ratio`` of the time from the first token to the last.

    ``cold`` and ``suffix`` draft from the prompt and the reply so far only: both are made again for every
    prompt. ``history`` and ``suffix-history`` draft from all earlier requests of the run too; from the second
    pass on they have seen the same prompts before.

    Args:
        folder: The model.
        tokenizer: Its tokenizer.
        prompts: In the order to run; those that do not fit `max_model_len` are left out.
        methods: Names of `vllm_contestants.METHODS`.
        max_new_tokens: For each reply.
        most: Draft tokens at most; `ngram` has its own number.
        dtype: A value of vLLM's option of that name.
        max_model_len: A value of vLLM's option of that name.
        passes: Number of runs of all prompts.

    Raises:
        InvalidInputError: There is no such method, no prompt that fits, or no vLLM.
    """
    names = list(dict.fromkeys(methods))
    fitting = [
        (prompt, ids)
        for prompt in prompts
        if len(ids := prompt.encode(tokenizer)) + max_new_tokens + 33 < max_model_len
    ]
    if not names or not fitting:
        raise InvalidInputError(
            "No method, or no prompt that is short enough.", "See --methods and --max-model-len."
        )
    counts = [
        int(name.rsplit("-", 1)[1]) for name in names if name.startswith("ngram-") and name[-1].isdigit()
    ]
    reach = max([most, *counts])
    engines = _Engines(folder, dtype, reach, max_model_len, PLAIN in names)
    decoders = [make_vllm_contestant(name, engines.switch.vllm_config) for name in names]
    for contestant in decoders:
        engines.run(contestant, list(tokenizer(_WARM_UP)["input_ids"]), 12)
    runs: list[dict[str, list[_Run]]] = [{name: [] for name in names} for _ in range(passes)]
    with progress("Decoding (replies)", passes * len(fitting) * len(names), delay=0.0) as advance:
        for found in runs:
            for number, (_, ids) in enumerate(fitting):
                for contestant in rotated(decoders, number):
                    found[contestant.name].append(engines.run(contestant, ids, max_new_tokens))
                    advance()
                reference = found[names[0]][-1].tokens
                for name in names[1:]:
                    run = found[name][-1]
                    run.verdict = engines.compare_outputs(ids, reference, run.tokens)
    costs = {c.name: _curve(c) for c in decoders if hasattr(c.made, "rows")}
    for contestant in decoders:
        contestant.close()
    return {
        "passes": [{name: _summary(name, found, names[0]) for name in names} for found in runs],
        "prompts": [{"id": prompt.id, "task": prompt.task, "tokens": len(ids)} for prompt, ids in fitting],
        "step_milliseconds": costs,
        "max_new_tokens": max_new_tokens,
        "num_speculative_tokens": most,
        "dtype": dtype,
        "vllm": vllm_version(),
        "provenance": provenance(),
    }


def _curve(contestant: VllmDecoder) -> dict[str, float]:
    rows = contestant.made.rows
    if rows is None or rows.costs is None:
        return {}
    return {str(size): seconds * 1000 for size, seconds in rows.costs.seconds_by_size().items()}


def _summary(name: str, runs: dict[str, list[_Run]], base: str) -> dict[str, Any]:
    mine, reference = runs[name], runs[base]
    speeds = [len(run.tokens) / run.seconds for run in mine]
    ratios = [
        speed * other.seconds / len(other.tokens) for speed, other in zip(speeds, reference, strict=True)
    ]
    # From the first token on, which the prompt's pass yields: the part that drafts can change.
    decoded = [
        other.decoding / run.decoding for run, other in zip(mine, reference, strict=True) if run.decoding > 0
    ]
    tokens, steps = sum(len(run.tokens) for run in mine), sum(run.steps for run in mine)
    drafts = sum(run.drafts for run in mine)
    sizes: Counter[int] = sum((run.sizes for run in mine), Counter())
    verdicts = [run.verdict for run in mine]
    return {
        "tokens_per_second": tokens / sum(run.seconds for run in mine),
        "ratio": _spread(ratios),
        "decode_ratio": _spread(decoded),
        "total_ratio": (tokens / sum(run.seconds for run in mine))
        / (sum(len(run.tokens) for run in reference) / sum(run.seconds for run in reference)),
        "tokens_per_step": tokens / steps,
        "drafts": drafts,
        "accepted_per_draft": sum(run.accepted for run in mine) / drafts if drafts else 0.0,
        "drafted_per_draft": sum(run.drafted for run in mine) / drafts if drafts else 0.0,
        "passes_by_drafts": {str(size): count for size, count in sorted(sizes.items())},
        "equal": verdicts.count("equal"),
        "ties": verdicts.count("tie"),
        "different": verdicts.count("different"),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "decode_ratios": [round(ratio, 3) for ratio in decoded],
    }


def _spread(ratios: Sequence[float]) -> dict[str, float] | None:
    found = ratio_summary(ratios)
    return found and found | {"min": min(ratios)}
