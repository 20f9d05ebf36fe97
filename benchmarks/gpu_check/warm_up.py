"""Warm-up before the parts: compiles the kernels, once on a machine, so that no part's time includes that."""

from __future__ import annotations

import torch

from benchmarks.gpu_check.report import Box, Report
from benchmarks.gpu_check.setting import Setting
from retrieval_draft import DraftConfig, RetrievalDrafter

__all__ = ["run"]


def run(setting: Setting, box: Box, report: Report) -> None:
    """Generates a little, greedily and sampled, with and without drafts."""
    if "speed" in setting.parts:
        setting.compiled()  # its compiler works while nothing is timed
    model = setting.model("small", torch.float32)
    prompt = torch.arange(5, 40, device=setting.device)[None].repeat(1, 2)
    for config in (DraftConfig(method="none"), DraftConfig(nodes=8)):
        with RetrievalDrafter.for_model(model, config=config) as drafter:
            drafter.warm_up()
            for options in ({"do_sample": False}, {"do_sample": True, "seed": 1}):
                drafter.generate(prompt, max_new_tokens=8, prediction=[7, 8, 9, 10], **options)
