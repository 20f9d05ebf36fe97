"""Part 2: equal text with late copies, and with blocking launches."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_check.faults import broken
from benchmarks.gpu_check.proc import run_child
from benchmarks.gpu_check.report import Box, Report
from benchmarks.gpu_check.setting import Setting
from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.bench.agreement import compare_outputs

__all__ = ["SlowCopies", "run"]

_CYCLES = 3_000_000
"""Cycles that the device waits before each copy: more than a millisecond."""

_NEW = 24


class SlowCopies(TorchDispatchMode):
    """Makes the device wait before each copy from the host, as a busy one would.

    Attributes:
        delayed: Copies so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.delayed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is torch.ops.aten.copy_.default:
            up = args[0].is_cuda and not args[1].is_cuda
        elif func is torch.ops.aten._to_copy.default:
            device = given.get("device")
            up = not args[0].is_cuda and device is not None and torch.device(device).type == "cuda"
        else:
            up = False
        if up:
            self.delayed += 1
            torch.cuda._sleep(_CYCLES)
        return func(*args, **given)


@contextmanager
def _as_ever() -> Iterator[None]:
    yield


def run(setting: Setting, box: Box, report: Report) -> None:
    """Collects replies of all ways normally, with slow copies, and in a process with blocking launches."""
    with broken(setting.fault):
        as_ever = _collect(setting, report, "as ever", _as_ever)
        slow = SlowCopies()
        late = _collect(setting, report, "copies delayed", lambda: slow)
    report.put(copies_delayed=slow.delayed)
    if setting.cuda and not slow.delayed:
        report.fail("no copy from the host was seen to be delayed")
    sides = {"as ever": as_ever, "copies delayed": late}
    if setting.fault is None:
        sides["launches waited for"] = _blocking(setting, box, report)
    for name, replies in sides.items():
        _compare(setting, report, name, replies, as_ever)


def _collect(setting: Setting, report: Report, name: str, around: Callable[[], Any]) -> dict[str, Any]:
    with around():
        replies = _replies(setting)
    report.note(f"{name}: {len(replies)} replies")
    return replies


def _prompts(model: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(0, model.config.vocab_size, (1, length), generator=generator).to(model.device)
        for length in (23, 70)
    ]


def _replies(setting: Setting) -> dict[str, Any]:
    """Token ids by way and prompt; an error's text where a way failed."""
    model = setting.model("small", torch.float32)
    found: dict[str, Any] = {}
    options: dict[str, Any] = {"max_new_tokens": _NEW}
    for number, prompt in enumerate(_prompts(model)):
        stock = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **options)
        reply = stock[0, prompt.shape[1] :].tolist()
        found[f"generate {number}"] = reply
        drafters: dict[str, Callable[[], RetrievalDrafter]] = {
            "none": lambda: RetrievalDrafter.for_model(model, method="none"),
            "calibrated": lambda: RetrievalDrafter.for_model(model, config=DraftConfig(nodes=16)),
        }
        for name, make in drafters.items():
            extra = {} if name == "none" else {"prediction": reply}
            for sampled in (False, True):
                key = f"{name} {'sampled' if sampled else 'greedy'} {number}"
                given = {"do_sample": sampled, **options, **({"seed": 7} if sampled else {}), **extra}
                try:
                    with make() as drafter:
                        out = drafter.generate(prompt, **given)
                        found[key] = out[0, prompt.shape[1] :].tolist()
                        stats = drafter.stats
                        found[f"{key} accepted"] = stats.accepted
                except Exception as error:
                    if "CUDA error" in str(error):
                        raise
                    found[key] = f"{type(error).__name__}: {error}"[:300]
    return found


def _blocking(setting: Setting, box: Box, report: Report) -> dict[str, Any]:
    """`_replies` of a process with CUDA_LAUNCH_BLOCKING=1."""
    answer = Path(report.path.parent, "blocking.json")
    answer.unlink(missing_ok=True)
    arguments = ["-m", "benchmarks.gpu_check.races", "--device", setting.device.type, "--out", str(answer)]
    environment = {"CUDA_LAUNCH_BLOCKING": "1"}
    limit = 60.0 if setting.tiny else max(box.left - 1, 15.0)
    code, output = run_child(arguments, limit, environment)
    if code != 0 or not answer.exists():
        report.put(blocking_output=output.splitlines()[-15:])
        report.fail(f"the process whose launches block ended with {code}")
        return {}
    found: dict[str, Any] = json.loads(answer.read_text())
    answer.unlink()
    return found


def _compare(
    setting: Setting, report: Report, side: str, replies: dict[str, Any], as_ever: dict[str, Any]
) -> None:
    """Greedy replies against `model.generate` of the same process; sampled ones against undrafted ones."""
    model = setting.model("small", torch.float32)
    for number, prompt in enumerate(_prompts(model)):
        for key in (key for key in replies if key.endswith(f" {number}") and not key.startswith("generate")):
            reply = replies[key]
            greedy = "greedy" in key
            expected = as_ever.get(f"generate {number}" if greedy else f"none sampled {number}")
            if isinstance(reply, str) or not isinstance(expected, list):
                verdict = "failed"
            elif reply == expected:
                verdict = "equal"
            else:
                verdict = (
                    compare_outputs(model, prompt[0].tolist(), expected, reply) if greedy else "different"
                )
            accepted = replies.get(f"{key} accepted")
            report.row(
                side=side,
                way=key,
                verdict=verdict,
                accepted=accepted,
                error=reply if verdict == "failed" else None,
            )
            if verdict in ("different", "failed"):
                report.fail(f"{key} with {side}: {reply if verdict == 'failed' else verdict}"[:200])
            elif key == "calibrated greedy 0" and not accepted:
                report.fail(f"{key} with {side} accepted no draft, so nothing was checked")


def _child() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.tiny, options.fault = True, None
    setting = Setting.of(options)
    with contextlib.redirect_stdout(sys.stderr):
        replies = _replies(setting)
    options.out.write_text(json.dumps(replies))


if __name__ == "__main__":
    _child()
