"""Part 6: tokens a second against strong baselines, with the drafts and acceptance of a recorded 7B model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.gpu_check.cases import EAGER, Case, Decoder
from benchmarks.gpu_check.report import Box, Report
from benchmarks.gpu_check.setting import Setting
from retrieval_draft.bench.agreement import compare_outputs
from retrieval_draft.bench.decoders import NO_CUDNN, STOCK, STOCK_COMPILED, cudnn_attention

__all__ = ["cases", "measure", "run"]


def cases(setting: Setting) -> list[Case]:
    """Cases, the most informative first. Those that are slow with cuDNN's attention run with it only once."""
    small, large = setting.geometries
    off = NO_CUDNN
    if setting.tiny:
        return [
            *(
                Case(large, name)
                for name in (STOCK, f"{STOCK}{off}", "none", "calibrated", f"calibrated{off}")
            ),
            Case(large, "calibrated", sampled=True),
            Case(large, "calibrated", rows=2),
            Case(large, "calibrated", context="96"),
            Case(large, STOCK_COMPILED),
        ]
    quick = tuple(f"{name}{off}" for name in (STOCK, "none", "calibrated"))
    eager = tuple(f"{name}{EAGER}{off}" for name in ("none", "calibrated"))
    return [
        Case(large, STOCK),
        Case(large, "calibrated"),
        *(Case(model, name) for model in (large, small) for name in (*quick, *eager)),
        *(Case(small, name, sampled=True) for name in (*quick, eager[1])),
        Case(small, STOCK_COMPILED),
        *(Case(small, name, rows=8) for name in quick),
        *(Case(large, name, context="8192") for name in quick),
        *(Case(large, name, rows=8) for name in quick),
        *(Case(large, name, sampled=True) for name in quick),
    ]


def run(setting: Setting, box: Box, report: Report) -> None:
    """Runs the cases."""
    stock: dict[str, list[int]] = {}
    took = 1.0
    for case in cases(setting):
        apart = case.decoder == STOCK_COMPILED
        if not box.has(min(took, 5.0)):
            report.note(f"out of time before {case.model}, {case.label}")
            continue
        before = box.left
        try:
            limit = max(min(box.left / 2, 30.0), 1.0)
            row = setting.compiled().measure(limit) if apart else measure(setting, case)
        except Exception as error:
            if not setting.is_sound():
                raise
            report.row(**case.key, equal="failed", error=f"{type(error).__name__}: {error}"[:300])
            report.fail(f"{case.model}, {case.label}: {type(error).__name__}: {error}"[:160])
            continue
        took = before - box.left
        if "reply" in row:
            row["equal"] = _as_stock(setting, case, row.pop("prompt"), row.pop("reply"), stock)
        report.row(**case.key, **row, took=round(took, 1))
        if row["equal"] == "different":
            report.fail(f"{case.model}, {case.label}: the reply is not the recorded one")


def measure(setting: Setting, case: Case, wait: Callable[[], object] | None = None) -> dict[str, Any]:
    """Decodes a case's prompts, each twice: to its first token, and to the measured length.

    Args:
        setting: The shared setting.
        case: The case to decode.
        wait: Called after the warm-up, before the measurement.

    Returns:
        The row; for `model.generate` with `prompt` and `reply`, to compare.
    """
    one_by_one = not case.decoder.startswith("calibrated")  # one step a token, for any text
    new = 12 if one_by_one else 24
    if not setting.tiny:
        new = 40 if one_by_one else 96
    decoder = Decoder(setting, case, new)
    groups = decoder.groups[:1] if one_by_one or setting.tiny else decoder.groups
    if case.decoder == STOCK_COMPILED:  # it compiles for every length of its cache
        for tokens in (1, new, 1, new):
            decoder.decode(groups[0], tokens)
    graphs = decoder.graphs
    if graphs is not None:
        # The sizes that these replies come to are captured; what sources learn of them is taken back.
        for group in groups:
            decoder.decode(group, new)
    captures = 0 if graphs is None else graphs.captures
    if wait is not None:
        wait()
    tokens = steps = 0
    seconds = whole = host = forward = drafted = 0.0
    equal = "reference"
    for group in groups:
        first = decoder.decode(group, 1)
        done = decoder.decode(group, new)
        whole += done.seconds
        seconds += done.seconds - first.seconds
        tokens += sum(map(len, done.tokens)) - len(group)
        steps += done.steps
        if done.stats is not None:
            stats = done.stats
            host += stats.draft_seconds + stats.commit_seconds + stats.accept_seconds + stats.learn_seconds
            forward += stats.forward_seconds
            drafted += stats.drafted
            same = all(one == other.reply[:new] for one, other in zip(done.tokens, group, strict=True))
            equal = "different" if not same or equal == "different" else "recorded"
    reason = graphs and (graphs.reason or (graphs.rows_reason if case.rows > 1 else None))
    told = {"prompt": groups[0][0].prompt, "reply": done.tokens[0]} if decoder.is_stock else {}
    return {
        "tokens_per_second": round(tokens / seconds, 1) if seconds > 0 else None,
        "tokens_per_second_with_prompt": round((tokens + sum(map(len, groups))) / whole, 1),
        "tokens_per_step": round(tokens / steps / case.rows, 2),
        "step_ms": round(1e3 * seconds / steps, 2),
        "host_us": round(1e6 * host / steps) if not decoder.is_stock else None,
        "forward_us": round(1e6 * forward / steps) if not decoder.is_stock else None,
        "nodes_per_step": round(drafted / steps, 1),
        "prompt_ms": round(1e3 * (whole - seconds) / len(groups), 2),
        "equal": equal,
        "graphs": graphs and (reason or f"{graphs.replays} replayed"),
        "captures_before": captures,
        "captures_meanwhile": graphs and graphs.captures - captures,
        **told,
    }


def _as_stock(
    setting: Setting, case: Case, prompt: list[int], reply: list[int], stock: dict[str, list[int]]
) -> str:
    """Compares `model.generate` in its other forms with its first one; none of them is this project's."""
    if case.sampled or case.rows > 1 or case.context != "recorded":
        return "reference"
    if case.model not in stock:
        stock[case.model] = reply
        return "reference"
    with cudnn_attention(False):
        verdict = compare_outputs(setting.model(case.model), prompt, stock[case.model], reply)
    return {"equal": "equal", "tie": "ties", "different": "stock differs"}[verdict]
