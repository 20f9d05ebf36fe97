"""The draft proposer that vLLM loads."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from weakref import ref

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.drafting.batch.chain_batch import MAX_CHAIN
from retrieval_draft.integrations.vllm.draft_stores import DraftStores
from retrieval_draft.integrations.vllm.drafting_rank import DraftingRank
from retrieval_draft.integrations.vllm.interface import check_interface
from retrieval_draft.integrations.vllm.options import VllmOptions
from retrieval_draft.integrations.vllm.row_drafter import RowDrafter
from retrieval_draft.integrations.vllm.step_costs import StepCosts

__all__ = ["RetrievalProposer"]

_log = logging.getLogger("retrieval_draft")


class RetrievalProposer:
    """Drafts chains for vLLM from the request's text, earlier requests, corpora and the shared store.

    Options come from the environment and a file, see `VllmOptions`. vLLM passes the sampled tokens and the
    batch's texts, without request ids; `RequestTracker` finds each row's request from them. Drafts change
    vLLM's speed, never its output; an error here is logged once and costs drafts only.

    Args:
        vllm_config: vLLM's.
        options: None to read them from environment and file.
        runner: The class that calls proposers, for the check of its interface; None for vLLM's own.
        group: The tensor-parallel group; None to ask vLLM for it.

    Attributes:
        options: As read.
        rows: The drafter; None on ranks that do not draft.
        failures: Steps with an error.

    Raises:
        UnsupportedEngineError: This vLLM calls proposers in another way.
        InvalidInputError: An option cannot be used.
        DatastoreError: A corpus is missing or torn.
        TokenizerMismatchError: A corpus belongs to another tokenizer.

    Example:
        LLM(model, speculative_config={"method": "custom_class", "num_speculative_tokens": 24,
                                       "model": "retrieval_draft.integrations.vllm.RetrievalProposer"})
    """

    def __init__(
        self, vllm_config: Any, *, options: VllmOptions | None = None, runner: Any = None, group: Any = None
    ) -> None:
        check_interface(vllm_config, runner)
        self.options = VllmOptions.read() if options is None else options
        self.failures = 0
        self._rank = DraftingRank(vllm_config.parallel_config, group)
        self._lock = threading.RLock()
        self._called = time.monotonic()
        self._stores: DraftStores | None = None
        self.rows: RowDrafter | None = None
        if not self._rank.drafts:
            return
        model = vllm_config.model_config
        most = min(int(vllm_config.speculative_config.num_speculative_tokens), MAX_CHAIN)
        vocabulary = int(model.get_vocab_size())
        tokenizer = _tokenizer(model) if self.options.needs_tokenizer else None
        self._stores = DraftStores(self.options, tokenizer, vocabulary, most)
        self.rows = RowDrafter(
            self._stores.chains,
            most=most,
            max_rows=int(vllm_config.scheduler_config.max_num_seqs),
            max_length=int(model.max_model_len),
            vocabulary=vocabulary,
            eos=_eos(model),
            costs=StepCosts() if self.options.costs == "learned" else None,
            min_prob=self.options.min_prob,
        )
        self._stores.chains.warm_up()
        atexit.register(_close, ref(self))
        self._stop = threading.Event()
        threading.Thread(
            target=_watch,
            args=(ref(self), self._stop, self.options.idle_seconds),
            name="retrieval_draft idle",
            daemon=True,
        ).start()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: there is no model to load. vLLM calls it with its own."""

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: NDArray[np.int32],
        token_ids_cpu: NDArray[np.int32],
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts for the batch, as `RowDrafter.propose`; never raises.

        Args:
            sampled_token_ids: Tokens that each row sampled in this step.
            num_tokens_no_spec: int32, shape (batch,) or more. Tokens of each row.
            token_ids_cpu: int32, shape (batch or more, max_model_len). Texts of the rows.
            slot_mappings: Not used.
        """
        return self._rank.share(
            len(sampled_token_ids),
            lambda: self._propose(sampled_token_ids, num_tokens_no_spec, token_ids_cpu),
        )

    def finish_idle(self) -> None:
        """Finishes all running requests if vLLM has not called for `idle_seconds`."""
        with self._lock:
            if self.rows is not None and time.monotonic() - self._called >= self.options.idle_seconds:
                self.rows.finish()

    def flush(self) -> None:
        """Finishes all running requests, and waits until their texts can be drafted from."""
        with self._lock:
            if self.rows is not None and self._stores is not None:
                self.rows.finish()
                self._stores.flush()

    def close(self) -> None:
        """Saves and sends pending data, and stops background threads; later steps get no drafts."""
        with self._lock:
            if self.rows is not None and self._stores is not None:
                self._stop.set()
                self.rows.finish()
                self._stores.close()
            self.rows = self._stores = None

    def _propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: NDArray[np.int32],
        token_ids_cpu: NDArray[np.int32],
    ) -> list[list[int]]:
        with self._lock:
            self._called = time.monotonic()
            if self.rows is not None:
                try:
                    return self.rows.propose(sampled_token_ids, num_tokens_no_spec, token_ids_cpu)
                except Exception as error:
                    self._failed(error)
        return [[] for _ in sampled_token_ids]

    def _failed(self, error: Exception) -> None:
        """Resets all sessions: after an interrupted step they may disagree with the texts."""
        if not self.failures:
            _log.warning(
                "Drafting failed and goes on with the next step; further failures are only counted: %r",
                error,
                exc_info=error,
            )
        self.failures += 1
        with suppress(Exception):
            assert self.rows is not None
            self.rows.finish()


def _tokenizer(model: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        model.tokenizer, revision=model.tokenizer_revision, trust_remote_code=model.trust_remote_code
    )


def _eos(model: Any) -> set[int]:
    """Every token that ends a reply, from the model's configuration and its generation_config.json."""
    found: set[int] = set()
    configs = [model.hf_config, getattr(model.hf_config, "text_config", None)]
    with suppress(Exception):
        configs.append(model.try_get_generation_config())
    for config in configs:
        value = (
            config.get("eos_token_id") if isinstance(config, dict) else getattr(config, "eos_token_id", None)
        )
        found.update([value] if isinstance(value, int) else value or ())
    return found


def _watch(proposer: ref[RetrievalProposer], stop: threading.Event, seconds: float) -> None:
    while not stop.wait(seconds / 2):
        mine = proposer()
        if mine is None:
            return
        with suppress(Exception):
            mine.finish_idle()
        del mine


def _close(proposer: ref[RetrievalProposer]) -> None:
    mine = proposer()
    if mine is not None:
        with suppress(Exception):
            mine.close()
