"""Part 0: the machine, its versions, and its smallest costs."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from typing import Any

import torch

from benchmarks.gpu_check.measure import device_us, milliseconds
from benchmarks.gpu_check.report import Box, Report
from benchmarks.gpu_check.setting import Setting, synchronize
from retrieval_draft.bench.provenance import provenance

__all__ = ["run"]


def run(setting: Setting, box: Box, report: Report) -> None:
    """Collects facts first, then costs."""
    report.put(**_software(), provenance=provenance())
    if setting.cuda:
        report.put(**_card(setting.device))
    report.put(**_costs(setting))
    report.put(not_there_yet=["bitwise mode"])


def _software() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "cudnn_sdp": torch.backends.cuda.cudnn_sdp_enabled(),
        "flash_sdp": torch.backends.cuda.flash_sdp_enabled(),
        "efficient_sdp": torch.backends.cuda.mem_efficient_sdp_enabled(),
    }
    try:
        facts["sdp_priority_order"] = [str(each) for each in torch._C._get_sdp_priority_order()]
    except Exception as error:
        facts["sdp_priority_order"] = f"not told: {error}"
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = None
    return facts


def _card(device: torch.device) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(device)
    facts: dict[str, Any] = {
        "gpu": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30, 1),
    }
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
        facts["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        facts["driver"] = f"not told: {error}"
    return facts


def _costs(setting: Setting) -> dict[str, float]:
    device, pinned = setting.device, setting.cuda
    one = torch.zeros(1, device=device)
    number = 200 if setting.tiny else 2000
    for _ in range(20):
        one.add_(1)
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(number):
        one.add_(1)
    launched = time.perf_counter() - begin
    synchronize(device)
    done = time.perf_counter() - begin
    host = torch.zeros(1024, dtype=torch.float32, pin_memory=pinned)
    there = torch.zeros(1024, device=device)
    big = torch.ones((16 if setting.tiny else 1024) << 18, device=device)
    other = torch.empty_like(big)
    rounds = 20 if setting.tiny else 200

    def middle(work: Any) -> float:
        milliseconds(work, device, 3)
        return round(1e3 * statistics.median(milliseconds(work, device, rounds)), 2)

    copy = device_us(lambda: other.copy_(big), device, 10)
    return {
        "launch_us": round(1e6 * launched / number, 2),
        "op_us": round(1e6 * done / number, 2),
        "h2d_us": middle(lambda: there.copy_(host, non_blocking=True)),
        "d2h_us": middle(lambda: host.copy_(there, non_blocking=True)),
        "copy_tb_per_second": round(2 * big.nbytes / copy / 1e6, 3),
    }
