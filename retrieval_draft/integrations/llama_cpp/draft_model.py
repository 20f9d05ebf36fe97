"""A draft model for llama-cpp-python that drafts by lookup."""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._settings import check_range
from retrieval_draft.config import MAX_NODES, DraftConfig
from retrieval_draft.drafting.cost import SIZES
from retrieval_draft.drafting.stats import DraftStats
from retrieval_draft.errors import UnsupportedModelError
from retrieval_draft.integrations.llama_cpp._engine import llama_cpp
from retrieval_draft.integrations.llama_cpp.gguf_tokenizer import GgufTokenizer
from retrieval_draft.integrations.llama_cpp.pass_costs import PassCosts
from retrieval_draft.models.fingerprint import vocabulary_size
from retrieval_draft.proposer import Proposer, ProposerSession

__all__ = ["RetrievalDraftModel"]

Ids = NDArray[np.intc]

_NOTHING: Ids = np.empty(0, np.intc)
_ROUNDS = 3

_log = logging.getLogger("retrieval_draft")


class RetrievalDraftModel:
    """A `llama_cpp.llama_speculative.LlamaDraftModel` that drafts from text seen before.

    llama-cpp-python passes the whole text before each pass, and nothing else. A text that continues the last
    one by at most the drafted tokens and one more is the same request; any other is a new one, and the text
    of the last one is added to the history. One draft model serves one `Llama`; several may share a
    `Proposer`.

    Args:
        proposer: Makes the drafts.
        num_pred_tokens: Length of every draft; None for as long as pays by the measured time of passes.
        max_tokens: Limit of a draft's length. llama-cpp-python passes a draft in one batch: keep it below
            n_batch.
        share: Parts of each request that other servers may learn; None for the store's default.

    Attributes:
        proposer: As given.
        costs: Learned times of passes.
        failures: Calls without a draft because of an error; the first is logged.

    Raises:
        InvalidInputError: A length is out of range.

    Example:
        draft_model = RetrievalDraftModel.for_gguf("model.gguf")
        llama = Llama("model.gguf", draft_model=draft_model)
        llama.create_completion("def main(", temperature=0.0)
    """

    def __init__(
        self,
        proposer: Proposer,
        *,
        num_pred_tokens: int | None = None,
        max_tokens: int = 32,
        share: str | None = None,
    ) -> None:
        check_range("num_pred_tokens", num_pred_tokens or 0, 0, MAX_NODES)
        check_range("max_tokens", max_tokens, 0, MAX_NODES)
        if importlib.util.find_spec("llama_cpp") is not None:
            # A subclass for isinstance, without loading the engine's libraries with this module.
            llama_cpp().llama_speculative.LlamaDraftModel.register(RetrievalDraftModel)
        self.proposer = proposer
        self.costs = PassCosts()
        self.failures = 0
        self._fixed = num_pred_tokens
        self._most = max_tokens if num_pred_tokens is None else num_pred_tokens
        self._share = share
        self._owns_proposer = False
        self._session: ProposerSession | None = None
        self._text: Ids = _NOTHING
        self._drafted = 0
        self._left = 0.0
        self._lock = threading.Lock()

    @classmethod
    def for_gguf(
        cls,
        model: Any,
        *,
        corpora: Sequence[Any] = (),
        phrases: Any = None,
        store: Any = None,
        config: DraftConfig | None = None,
        num_pred_tokens: int | None = None,
        max_tokens: int = 32,
        share: str | None = None,
    ) -> RetrievalDraftModel:
        """Makes a draft model for a GGUF file.

        Args:
            model: The file; its vocabulary is read. Or the Hugging Face tokenizer of the same model.
            corpora: Folders of ``retrieval-draft index build`` to draft from, or opened ones, built with this
                file's vocabulary or with that tokenizer: both have the same fingerprint.
            phrases: Fixed texts that the model often repeats: a file, or a list of texts.
            store: Store that servers share, with any engine: a URL, a `StoreConfig` or a `SharedStore`.
            config: All other settings. Costs are measured here: its ``nodes`` is ignored.
            num_pred_tokens: As for the class.
            max_tokens: As for the class.
            share: As for the class.

        Raises:
            ModelFileError: The file is missing, or llama.cpp cannot read it.
            TokenizerMismatchError: A corpus or the opened store belongs to another tokenizer.
            DatastoreError: A corpus is missing or torn.
            InvalidInputError: llama-cpp-python is not installed, or a length is out of range.
            UnsupportedModelError: The file's model keeps recurrent state.
        """
        tokenizer = GgufTokenizer(model) if isinstance(model, (str, os.PathLike)) else model
        if isinstance(tokenizer, GgufTokenizer) and tokenizer.is_recurrent:
            raise UnsupportedModelError(
                f"{os.fspath(model)!r} is a model with recurrent state, from which llama-cpp-python cannot "
                "take back rejected drafts: its text would change.",
                "Use it without a draft model, or with transformers, where such models are drafted for.",
            )
        rows = tokenizer.rows if isinstance(tokenizer, GgufTokenizer) else vocabulary_size(tokenizer)
        proposer = Proposer.for_tokenizer(
            tokenizer, vocabulary=rows, corpora=corpora, phrases=phrases, store=store, config=config
        )
        made = cls(proposer, num_pred_tokens=num_pred_tokens, max_tokens=max_tokens, share=share)
        made._owns_proposer = True
        return made

    def __call__(self, input_ids: Ids, /, **kwargs: Any) -> Ids:
        """Drafts the continuation of a text.

        Args:
            input_ids: intc, shape (length,). All tokens so far; read, not kept.
            **kwargs: Ignored.

        Returns:
            intc, shape (n,); empty where drafting does not pay, and where the text is empty or holds ids that
            are no tokens, such as the placeholders of images. Nothing is raised: drafts never cost the reply.
        """
        with self._lock:
            try:
                return self._draft(np.asarray(input_ids))
            except Exception as error:
                if not self.failures:
                    _log.warning("Nothing is drafted where drafting fails: %r", error, exc_info=error)
                self.failures += 1
                self._session, self._text, self._drafted = None, _NOTHING, 0
                return _NOTHING

    def warm_up(self, llama: Any = None) -> None:
        """Compiles kernels and measures costs ahead of the first request.

        Args:
            llama: The `llama_cpp.Llama` to time passes of, which loses its text; None to learn costs from
                requests.
        """
        self.proposer.warm_up()
        if llama is not None:
            self.costs.load(_seconds_by_size(llama))

    def finish(self) -> None:
        """Ends the request, so that its text can be drafted from; the next request does so too."""
        with self._lock:
            self._end()

    def flush(self) -> None:
        """Ends the running request, and waits until its and earlier texts can be drafted from."""
        self.finish()
        self.proposer.flush()

    def close(self) -> None:
        """Ends the running request, and the proposer if `for_gguf` made it."""
        self.finish()
        if self._owns_proposer:
            self.proposer.close()

    @property
    def stats(self) -> DraftStats:
        """Counts of all finished requests."""
        return self.proposer.stats

    def __enter__(self) -> RetrievalDraftModel:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _draft(self, text: Ids) -> Ids:
        if not len(text) or text.min() < 0 or text.max() >= self.proposer.stores.vocabulary:
            self._end()
            return _NOTHING
        session = self._follow(text)
        tokens, probs = session.propose_chain(self._most)
        if self._fixed is None:
            tokens = tokens[: self.costs.choose(probs, session.length)]
            session.cut(len(tokens))
        self._drafted = len(tokens)
        self._left = time.perf_counter()
        return tokens.astype(np.intc)

    def _follow(self, text: Ids) -> ProposerSession:
        """The request that a text belongs to, after appending its new tokens."""
        length = len(self._text)
        new = len(text) - length
        session = self._session
        if session is not None and 0 < new <= self._drafted + 1 and np.array_equal(text[:length], self._text):
            seconds = time.perf_counter() - self._left
            session.observe(text[length:])
            self.costs.observe(self._drafted + 1, new, length, seconds)
        else:
            self._end()
            session = self._session = self.proposer.open(text, share=self._share)
        self._text = text.copy()
        return session

    def _end(self) -> None:
        session, self._session = self._session, None
        self._text, self._drafted = _NOTHING, 0
        if session is not None:
            session.close()


def _seconds_by_size(llama: Any) -> dict[int, float]:
    """The least time of a few passes over n tokens, for n of `SIZES`, sizes alternating."""
    least = dict.fromkeys(SIZES, float("inf"))
    token = max(0, int(llama.token_bos()))
    for turn in range(_ROUNDS + 1):
        for size in SIZES:
            llama.reset()
            begin = time.perf_counter()
            llama.eval([token] * size)
            if turn:  # the first round allocates memory
                least[size] = min(least[size], time.perf_counter() - begin)
    llama.reset()
    return least
