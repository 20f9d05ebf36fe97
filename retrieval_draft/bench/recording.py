"""Recording of greedy replies as a trace, with the target's best tokens at every position."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from retrieval_draft.bench.teacher_forcing import reply_logits

__all__ = ["TOP", "TraceWriter"]

TOP = 8
"""Next tokens recorded at each position."""


class TraceWriter:
    """Writes a trace: gzipped JSON lines, one a request. The file appears when all requests are written.

    Args:
        path: The trace file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(path.name + ".part")
        self._file: IO[str] | None = None

    def __enter__(self) -> TraceWriter:
        self._file = gzip.open(self._part, "wt", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()
        if error is not None:
            self._part.unlink(missing_ok=True)
            return
        with self._part.open("rb+") as file:
            os.fsync(file.fileno())
        self._part.replace(self._path)

    def write(self, model: Any, name: str, task: str, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Adds one request, after one more pass of the model over its prompt and output."""
        assert self._file is not None
        record = {"id": name, "task": task, "turn": 0, "prompt": list(prompt), "output": list(output)}
        if output:
            record["top"] = _top(model, prompt, output)
        self._file.write(json.dumps(record, separators=(",", ":")) + "\n")


def _top(model: Any, prompt: Sequence[int], output: Sequence[int]) -> list[Any]:
    """The target's `TOP` tokens and their probabilities at each output position, best first."""
    probs = reply_logits(model, prompt, output).softmax(-1)
    best, tokens = probs.topk(min(TOP, probs.shape[1]))
    return [tokens.tolist(), [[round(p, 6) for p in row] for row in best.tolist()]]
