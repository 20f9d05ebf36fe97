"""A server that decodes: one model, a drafter with a store and one without, controlled by lines on stdin."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.store_worker import WorkerProcess

__all__ = ["DecoderProcess"]

_NODES = 8


class DecoderProcess(WorkerProcess):
    """Starts a decoder.

    Args:
        model: A folder, a hub name or ``gemma3-270m``.
        timeout: Of the stores it opens.
    """

    module = "benchmarks.store_decoder"

    def __init__(self, model: str, timeout: float = 2.0) -> None:
        super().__init__(model=model, timeout=timeout)

    def __enter__(self) -> DecoderProcess:
        return self

    def open(self, url: str | None) -> None:
        """Opens two new drafters without text: one with a store, unless `url` is None, and one without."""
        self.call(do="open", url=url)

    def generate(self, ids: Sequence[int], max_new_tokens: int, with_store: bool) -> tuple[list[int], float]:
        """Greedy tokens of one of both, and their time in seconds."""
        answer = self.call(do="generate", ids=list(ids), max_new_tokens=max_new_tokens, with_store=with_store)
        return answer["tokens"], answer["seconds"]

    def store_seconds(self) -> float:
        """Processor time that the store's threads have taken so far."""
        return float(self.call(do="store_seconds")["seconds"])


class _Decoder:
    def __init__(self, model: str, timeout: float) -> None:
        from retrieval_draft.config import DraftConfig
        from retrieval_draft.drafter import RetrievalDrafter
        from retrieval_draft.models.loading import load_model

        self._model, self._tokenizer = load_model(model, dtype="float32")
        self._timeout = timeout
        # A budget by cost would be measured by each drafter, and differ by more than the measured effect.
        self._config = DraftConfig(nodes=_NODES)
        self._drafters: dict[bool, RetrievalDrafter] = {}

    def open(self, url: str | None) -> dict[str, Any]:
        """Closes the drafters there are, opens new ones, and waits until they have read the store."""
        from retrieval_draft.drafter import RetrievalDrafter
        from retrieval_draft.index.store.config import StoreConfig

        self.close()
        for with_store in (False, True):
            store = None
            if with_store and url is not None:
                store = StoreConfig(url, share="all", timeout=self._timeout)
            drafter = RetrievalDrafter.for_model(
                self._model, self._tokenizer, store=store, config=self._config
            )
            self._drafters[with_store] = drafter
            drafter.warm_up()
            # The costs of a first request, without text that later ones could draft from.
            self.generate([2, 2], 2, with_store, share=None if store is None else "none")
        return {}

    def generate(
        self, ids: list[int], max_new_tokens: int, with_store: bool, share: str | None = None
    ) -> dict[str, Any]:
        """Decodes one prompt."""
        import torch

        input_ids = torch.tensor([ids])
        begin = time.perf_counter()
        out = self._drafters[with_store].generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            share=share,
        )
        return {"tokens": out[0, len(ids) :].tolist(), "seconds": time.perf_counter() - begin}

    def status(self) -> dict[str, Any]:
        """Status of the store."""
        store = self._drafters[True].store
        return {} if store is None else store.status()

    def store_seconds(self) -> dict[str, Any]:
        """Processor time of the store's threads."""
        store = self._drafters[True].store
        threads = () if store is None else store._threads
        return {"seconds": sum(_thread_seconds(each.native_id) for each in threads)}

    def close(self) -> dict[str, Any]:
        """Ends the drafters and their store's threads."""
        for drafter in self._drafters.values():
            drafter.close()
        self._drafters.clear()
        return {}


def _thread_seconds(native_id: int | None) -> float:
    """Processor time of a thread, from the kernel; 0 where it has ended, or the kernel does not report it."""
    try:
        text = Path(f"/proc/self/task/{native_id}/stat").read_text()
    except OSError:
        return 0.0
    user, system = text.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Reads commands until stdin ends."""
    decoder = _Decoder(**json.loads(sys.argv[1]))
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(getattr(decoder, command.pop("do"))(**command)), flush=True)


if __name__ == "__main__":
    main()
