"""A server that decodes: a process with a model, and now with a store and now without, told line by line."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from retrieval_draft.bench.store_worker import WorkerProcess

__all__ = ["DecoderProcess"]

_NODES = 8


class DecoderProcess(WorkerProcess):
    """Starts a decoder.

    Args:
        model: A folder, a hub name or ``gemma3-270m``.
        timeout: Of the stores it opens.
    """

    module = "retrieval_draft.bench.store_decoder"

    def __init__(self, model: str, timeout: float = 2.0) -> None:
        super().__init__(model=model, timeout=timeout)

    def __enter__(self) -> DecoderProcess:
        return self

    def open(self, url: str | None) -> None:
        """A new drafter that knows nothing yet, with a store or without; the one before is closed first."""
        self.call(do="open", url=url)

    def generate(self, ids: Sequence[int], max_new_tokens: int) -> tuple[list[int], float]:
        """Greedy tokens, and the seconds they took."""
        answer = self.call(do="generate", ids=list(ids), max_new_tokens=max_new_tokens)
        return answer["tokens"], answer["seconds"]


class _Decoder:
    def __init__(self, model: str, timeout: float) -> None:
        from retrieval_draft.config import DraftConfig
        from retrieval_draft.drafter import RetrievalDrafter
        from retrieval_draft.model_files import load_model

        self._model, self._tokenizer = load_model(model, dtype="float32")
        self._timeout = timeout
        # A budget by cost would be measured by each drafter, and differ by more than what is looked for.
        self._config = DraftConfig(nodes=_NODES)
        self._drafter: RetrievalDrafter | None = None

    def open(self, url: str | None) -> dict[str, Any]:
        """Closes the drafter there is, and opens one; waits until it has read what the store holds."""
        from retrieval_draft.drafter import RetrievalDrafter
        from retrieval_draft.index.store.config import StoreConfig

        self.close()
        store = None if url is None else StoreConfig(url, share="all", timeout=self._timeout)
        self._drafter = RetrievalDrafter.for_model(
            self._model, self._tokenizer, store=store, config=self._config
        )
        self._drafter.warm_up()
        # What only the first request pays, without a word that later ones could draft from.
        self.generate([2, 2], 2, share=None if url is None else "none")
        return {}

    def generate(self, ids: list[int], max_new_tokens: int, share: str | None = None) -> dict[str, Any]:
        """Decodes one prompt."""
        import torch

        assert self._drafter is not None
        input_ids = torch.tensor([ids])
        begin = time.perf_counter()
        out = self._drafter.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            share=share,
        )
        return {"tokens": out[0, len(ids) :].tolist(), "seconds": time.perf_counter() - begin}

    def status(self) -> dict[str, Any]:
        """Of the store."""
        store = None if self._drafter is None else self._drafter.store
        return {} if store is None else store.status()

    def close(self) -> dict[str, Any]:
        """Ends the drafter and its store's threads."""
        if self._drafter is not None:
            self._drafter.close()
            self._drafter = None
        return {}


def main() -> None:
    """Reads commands until stdin ends."""
    decoder = _Decoder(**json.loads(sys.argv[1]))
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(getattr(decoder, command.pop("do"))(**command)), flush=True)


if __name__ == "__main__":
    main()
