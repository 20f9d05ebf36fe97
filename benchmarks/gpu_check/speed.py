"""Part 6: tokens a second beside honest baselines, with the drafts and acceptance of a recorded 7B."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.gpu_check.cases import Case, Decoded, Decoder
from benchmarks.gpu_check.proc import run_child
from benchmarks.gpu_check.report import Box, Report, write_json
from benchmarks.gpu_check.setting import Setting
from retrieval_draft.bench.agreement import judge
from retrieval_draft.bench.contestants import NO_CUDNN, STOCK, STOCK_COMPILED

__all__ = ["cases", "run"]

_PROMPTS = (0, 2, 8)
"""Places of a conversation, a summary and an answer from documents among the recorded replies."""


def cases(setting: Setting) -> list[Case]:
    """The most telling first, the one that compiles last."""
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
    both = (STOCK, f"{STOCK}{off}", "none", f"none{off}", "calibrated", f"calibrated{off}")
    quick = (f"{STOCK}{off}", f"none{off}", f"calibrated{off}")
    return [
        *(Case(model, name) for model in (large, small) for name in both),
        *(Case(small, name, sampled=True) for name in quick),
        *(Case(small, name, rows=8) for name in quick),
        *(Case(large, name, context="8192") for name in quick),
        *(Case(large, name, rows=8) for name in quick),
        *(Case(large, name, sampled=True) for name in quick),
        Case(small, STOCK_COMPILED),
    ]


def run(setting: Setting, box: Box, report: Report) -> None:
    """One case after the other."""
    stock: dict[str, list[int]] = {}
    for case in cases(setting):
        compiles = case.decoder == STOCK_COMPILED and not setting.tiny
        if not box.has(25.0 if compiles else 1.0):
            report.note(f"out of time before {case.model}, {case.label}")
            continue
        try:
            row = _apart(setting, case, stock, box, report) if compiles else _measure(setting, case, stock)
        except Exception as error:
            if not setting.is_sound():
                raise
            report.row(**case.key, equal="failed", error=f"{type(error).__name__}: {error}"[:300])
            report.fail(f"{case.model}, {case.label}: {type(error).__name__}: {error}"[:160])
            continue
        report.row(**case.key, **row)
        if row["equal"] == "different":
            report.fail(f"{case.model}, {case.label}: the reply is not the recorded one")
    report.note("calibrated in captured graphs: not there yet")


def _apart(
    setting: Setting, case: Case, stock: dict[str, list[int]], box: Box, report: Report
) -> dict[str, Any]:
    """`_measure` in a process of its own: a compiler may take longer than there is time."""
    folder = report.path.parent
    given, answer = folder / "compiled_stock.json", folder / "compiled.json"
    answer.unlink(missing_ok=True)
    write_json(given, {"case": asdict(case), "stock": stock, "device": setting.device.type})
    arguments = ["-m", "benchmarks.gpu_check.speed", str(given), str(answer)]
    begin = time.monotonic()
    code, output = run_child(arguments, box.left)
    given.unlink()
    if code == 0 and answer.exists():
        row: dict[str, Any] = json.loads(answer.read_text())
        answer.unlink()
        return row
    seconds = time.monotonic() - begin
    ended = f"not through after {seconds:.0f} s" if code is None else f"ended with {code}"
    return {"equal": ended, "output": output.splitlines()[-8:]}


def _child(given: Path, answer: Path) -> None:
    what = json.loads(given.read_text())
    options = SimpleNamespace(device=what["device"], tiny=False, fault=None)
    write_json(answer, _measure(Setting.of(options), Case(**what["case"]), what["stock"]))


def _measure(setting: Setting, case: Case, stock: dict[str, list[int]]) -> dict[str, Any]:
    decoder = Decoder(setting, case, 24 if setting.tiny else 96)
    new = (12 if decoder.is_stock else 24) if setting.tiny else (40 if decoder.is_stock else 96)
    if case.rows > 1:
        groups = [decoder.recorded[: case.rows]]
    elif decoder.is_stock or setting.tiny:  # stock takes one step a token, whatever the text
        groups = [[decoder.recorded[_PROMPTS[0]]]]
    else:
        groups = [[decoder.recorded[place]] for place in _PROMPTS]
    decoder.decode(groups[0], 12)
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
    if decoder.is_stock:
        equal = _as_stock(setting, case, done, groups[0][0].prompt, stock)
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
    }


def _as_stock(
    setting: Setting, case: Case, done: Decoded, prompt: list[int], stock: dict[str, list[int]]
) -> str:
    """`model.generate` in its other forms against its first one; none of them is this project's."""
    if case.sampled or case.rows > 1 or case.context != "recorded":
        return "reference"
    if case.decoder == STOCK:
        stock[case.model] = done.tokens[0]
        return "reference"
    if case.model not in stock:
        return "not compared"
    verdict = judge(setting.model(case.model), prompt, stock[case.model], done.tokens[0])
    return {"equal": "equal", "tie": "ties", "different": "stock differs"}[verdict]


if __name__ == "__main__":
    _child(Path(sys.argv[1]), Path(sys.argv[2]))
