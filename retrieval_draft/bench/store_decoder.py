"""A server that decodes: a process with a model and maybe a store, told what to do line by line."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from retrieval_draft.bench.store_worker import WorkerProcess

__all__ = ["DecoderProcess"]

_NODES = 8


class DecoderProcess(WorkerProcess):
    """Starts a decoder, and stops it while another one is measured.

    Args:
        model: A folder, a hub name or ``gemma3-270m``.
        url: Of a store; None for none.
        timeout: Of the store.
    """

    module = "retrieval_draft.bench.store_decoder"

    def __init__(self, model: str, url: str | None, timeout: float = 2.0) -> None:
        super().__init__(model=model, url=url, timeout=timeout)

    def __enter__(self) -> DecoderProcess:
        return self

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Lets the process run; outside of it, it does not, its background threads included."""
        self.process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGSTOP)

    def generate(self, ids: Sequence[int], max_new_tokens: int) -> tuple[list[int], float]:
        """Greedy tokens, and the seconds they took."""
        with self.awake():
            answer = self.call(do="generate", ids=list(ids), max_new_tokens=max_new_tokens)
        return answer["tokens"], answer["seconds"]


class _Decoder:
    def __init__(self, model: str, url: str | None, timeout: float) -> None:
        from retrieval_draft.config import DraftConfig
        from retrieval_draft.drafter import RetrievalDrafter
        from retrieval_draft.index.store.config import StoreConfig
        from retrieval_draft.model_files import load_model

        loaded, tokenizer = load_model(model, dtype="float32")
        store = None if url is None else StoreConfig(url, share="all", timeout=timeout)
        # A budget by cost would be measured in each process, and differ by more than what is looked for.
        config = DraftConfig(nodes=_NODES)
        self._drafter = RetrievalDrafter.for_model(loaded, tokenizer, store=store, config=config)
        self._drafter.warm_up()

    def generate(self, ids: list[int], max_new_tokens: int) -> dict[str, Any]:
        """Decodes one prompt."""
        import torch

        input_ids = torch.tensor([ids])
        begin = time.perf_counter()
        out = self._drafter.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        return {"tokens": out[0, len(ids) :].tolist(), "seconds": time.perf_counter() - begin}

    def status(self) -> dict[str, Any]:
        """Of the store."""
        store = self._drafter.store
        return {} if store is None else store.status()


def main() -> None:
    """Reads commands until stdin ends."""
    decoder = _Decoder(**json.loads(sys.argv[1]))
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(getattr(decoder, command.pop("do"))(**command)), flush=True)


if __name__ == "__main__":
    main()
