"""Compiles every kernel ahead of the first request."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from retrieval_draft._progress import progress
from retrieval_draft.config import DraftConfig
from retrieval_draft.engine.calibration import Calibration
from retrieval_draft.engine.drafting import prompt_contexts
from retrieval_draft.engine.fusion import fuse
from retrieval_draft.engine.logits import LogitReader
from retrieval_draft.index.locality import Locality
from retrieval_draft.index.registry import Datastores, make_sources
from retrieval_draft.index.source import NodeLogits

__all__ = ["compile_kernels"]


def compile_kernels(config: DraftConfig) -> None:
    """Runs each kernel once on sources that are thrown away, so that no request waits for numba.

    Takes seconds after a fresh install, and a fraction of one from then on: the machine code is kept beside
    the modules, or where ``NUMBA_CACHE_DIR`` says. A progress bar shows it.
    """
    nodes = 4
    prompt = np.arange(8, dtype=np.int32).repeat(2) % 4
    with progress("Compiling", None):
        said = LogitReader(config.top_k).read(torch.zeros((2, 2 * config.top_k + 8)))
        calibration = Calibration()
        # A history of its own, in memory, lest the user's be written.
        locality = Locality(make_sources(replace(config, history_folder=None), Datastores(vocabulary=16)))
        for _ in range(2):  # the second request drafts from the first
            drafts = locality.open(prompt, ())
            drafts.learn(NodeLogits(prompt_contexts(prompt, 2), said.top_tokens, said.top_probs))
            for token in (0, 0, 1):
                proposals = drafts.propose(nodes)
                emitted = np.array([token], np.int32)
                if proposals:
                    calibration.observe(fuse(0, proposals, calibration, nodes), proposals, emitted)
                drafts.observe(emitted)
            drafts.close()
            locality.flush()
        locality.close()
