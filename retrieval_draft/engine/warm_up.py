"""Compiles every kernel ahead of the first request."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from retrieval_draft._progress import progress
from retrieval_draft.drafting.calibration import Calibration
from retrieval_draft.drafting.locality import Locality
from retrieval_draft.drafting.session import Fuse, prompt_contexts
from retrieval_draft.engine.logits import LogitReader
from retrieval_draft.engine.sampling.noise import GumbelNoise
from retrieval_draft.index.source import DraftSource, NodeLogits

__all__ = ["compile_kernels"]


def compile_kernels(sources: Sequence[DraftSource], tree: Fuse, top_k: int) -> None:
    """Runs each kernel once, so that no request waits for numba.

    Takes seconds after a fresh install, and a fraction of one from then on: the machine code is kept beside
    the modules, or where ``NUMBA_CACHE_DIR`` says. A progress bar shows it.

    Args:
        sources: Thrown away afterwards.
        tree: Unites their proposals.
        top_k: Next tokens that sources learn for each node.
    """
    nodes = 4
    prompt = np.arange(8, dtype=np.int32).repeat(2) % 4
    with progress("Compiling", None):
        said = LogitReader(top_k).read(torch.zeros((2, 2 * top_k + 8), dtype=torch.float32, device="cpu"))
        flat = torch.zeros(8, dtype=torch.float32, device="cpu")
        GumbelNoise(0, 8, flat.device).draw(flat, 0)
        calibration = Calibration()
        locality = Locality(sources)
        for _ in range(2):  # the second request drafts from the first
            drafts = locality.open(prompt, ())
            drafts.learn(NodeLogits(prompt_contexts(prompt, 2), said.top_tokens, said.top_probs))
            for token in (0, 0, 1):
                proposals = drafts.propose(nodes)
                emitted = np.array([token], np.int32)
                if proposals:
                    calibration.observe(tree(0, proposals, calibration, nodes), proposals, emitted)
                drafts.observe(emitted)
            drafts.close()
            locality.flush()
        locality.close()
