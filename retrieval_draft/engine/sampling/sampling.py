"""The target's choice after one node when logits processors or sampling take part."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from retrieval_draft.engine.logits import BestLogits, Wanted, non_finite
from retrieval_draft.engine.sampling.noise import GumbelNoise
from retrieval_draft.engine.sampling.penalties import penalties_of
from retrieval_draft.engine.sampling.token_logprobs import TokenLogprobs, token_logprobs
from retrieval_draft.engine.sampling.warpers import Choice, Warpers, split
from retrieval_draft.errors import (
    InvalidInputError,
    NonFiniteLogitsError,
    RetrievalDraftError,
    UnsupportedGenerationError,
)

__all__ = ["Sampler", "non_finite"]


class Sampler:
    """Chooses tokens as plain decoding does: processors on the node's own prefix, then one draw.

    Unless the scores are kept, the warpers at the end of the list and the draw are one kernel on
    the host, to which a device's row is copied; a row that is there is not even copied without other
    processors. After a captured pass, the few scores that the pass has left decide most draws.

    Args:
        processors: LogitsProcessorList with their state, called once for each accepted token.
        noise: Gumbel noise for sampling, or None for greedy.
        keep_scores: Whether to keep processed scores in `scores`.
        keep_logits: Whether to keep raw logits in `logits`.
        keep_logprob: Whether to keep log probabilities of the chosen tokens, under the processed scores.
        keep_top: Number of alternatives to keep of each token, with log probabilities under the raw logits;
            None for nothing.

    Attributes:
        scores: Processed scores, each float32, shape (1, vocabulary), or None.
        logits: Raw logits, each float32, shape (1, vocabulary), or None.
        logprobs: Natural logarithms of the chosen tokens' probabilities, in order; empty unless kept.
        top: The alternatives of `keep_top`, in order; empty unless kept.
        noise: As given.
        penalties: The processors before those warpers, where they are penalties or none; None for others.
        wanted: Parts of a node's logits that `choose_among` chooses among; none where it takes the row.

    Example:
        With a temperature of 0.5 and logits ``[1.0, 0.0]``, token 0 is drawn with probability 0.88; where it
        is drawn, `logprobs` grows by -0.13.
    """

    def __init__(
        self,
        processors: Any,
        noise: GumbelNoise | None,
        keep_scores: bool = False,
        keep_logits: bool = False,
        *,
        keep_logprob: bool = False,
        keep_top: int | None = None,
    ) -> None:
        own = list(processors)
        # Division can make scores equal, and then argmax looks at ids: greedy takes them as they are.
        head, tail = (own, []) if keep_scores or noise is None else split(own)
        self._head: Any = LogitsProcessorList(head)
        self._tail: Any = LogitsProcessorList(tail)
        self._warpers = Warpers(tail)
        self.noise = noise
        self._keep_logprob = keep_logprob
        self.scores: list[Tensor] | None = [] if keep_scores else None
        self.logits: list[Tensor] | None = [] if keep_logits else None
        self.logprobs: list[float] = []
        self._keep_top = keep_top
        self.penalties = penalties_of(head)
        keeps_any = keep_scores or keep_logits or keep_top is not None or (keep_logprob and noise is None)
        self.wanted = Wanted() if keeps_any or self.penalties is None else self._wanted(bool(head))
        self.top: list[TokenLogprobs] = []

    def _wanted(self, has_penalties: bool) -> Wanted:
        if self.noise is None:
            return Wanted(candidates=has_penalties, penalties=has_penalties)
        wanted = self._warpers.wanted
        if not has_penalties or wanted == Wanted():
            return wanted
        return wanted.joined(Wanted(candidates=True, penalties=True))

    @property
    def temperature(self) -> float:
        """Divides the scores of `wanted`."""
        return self._warpers.temperature

    @property
    def logprob(self) -> float:
        """Natural logarithm of the probability of all chosen tokens together."""
        return sum(self.logprobs)

    def choose(self, row: Tensor, ids: Tensor, position: int) -> int:
        """The next token after the prefix `ids`.

        Args:
            row: (vocabulary,). The node's logits; left as they are.
            ids: int64, shape (1, length). The node's prefix, its own token last, padding included.
            position: Of the token to be chosen, padding not counted.

        Raises:
            NonFiniteLogitsError: A logit is NaN; or a token is to be drawn, and a score is infinite.
            InvalidInputError: The processors leave no token.
            UnsupportedGenerationError: A processor returned other scores than those of one row.
        """
        # Processors write into their input; plain decoding copies the row too.
        copied = len(self._head) > 0 or self.scores is not None
        scores = row[None].to(torch.float32, copy=copied)
        if self.logits is not None:
            self.logits.append(row[None].to(device=ids.device, dtype=torch.float32, copy=True))
        if len(self._head):
            scores = _checked(self._head(ids.to(row.device), scores), scores.shape)
        if self.scores is not None:
            self.scores.append(scores.to(ids.device))
        key = None if self.noise is None else self.noise.key(position)
        choice = self._warpers.choose(scores[0].to("cpu"), key, self._keep_logprob)
        if choice is None:
            tailed = _checked(self._tail(ids.to(row.device), scores), scores.shape)
            choice = self._choose_in_torch(tailed, position, row)
        if self._keep_logprob:
            self.logprobs.append(choice.logprob)
        if self._keep_top is not None:
            self.top.append(token_logprobs(row, choice.token, self._keep_top))
        return choice.token

    def choose_among(self, best: BestLogits, node: int, position: int) -> int | None:
        """The token of `choose`, from the best logits of a node.

        Args:
            best: `wanted` of each node, or more.
            node: Index of the node.
            position: Of the token to be chosen, padding not counted.

        Returns:
            None where these logits do not tell: more may be equal, or kept, or come first in the draw.
        """
        if self.wanted.penalties and best.candidates is None:
            return None
        if self.noise is None:
            return None if best.candidates is None else int(best.candidates.argmax[node])
        choice = self._warpers.choose_among(best, node, self.noise.key(position), self._keep_logprob)
        if choice is None:
            return None
        if self._keep_logprob:
            self.logprobs.append(choice.logprob)
        return choice.token

    def _choose_in_torch(self, scores: Tensor, position: int, row: Tensor) -> Choice:
        from retrieval_draft.engine._kernels.warp import MAX_SCORE

        keyed = scores if self.noise is None else scores + self.noise.at(position)
        best = keyed.argmax(-1)
        columns = [best[0].double(), keyed.gather(-1, best[:, None])[0, 0].double()]
        if self._keep_logprob:
            columns.append(scores.log_softmax(-1).gather(-1, best[:, None])[0, 0].double())
        token, score, *logprob = torch.stack(columns).tolist()
        if self.noise is not None and float(MAX_SCORE) < abs(score) < math.inf:
            return self._choose_in_torch(scores - scores.amax(), position, row)
        # argmax finds a token among infinite scores, which are no distribution to draw from.
        if math.isnan(score) or (self.noise is not None and math.isinf(score)):
            raise non_finite(position) if bool(row.isnan().any()) else _no_choice(position, score)
        return Choice(int(token), logprob[0] if logprob else float("nan"))


def _no_choice(position: int, score: float) -> RetrievalDraftError:
    """The error for logits processors that turn finite logits into NaN or an infinite best score."""
    if score == math.inf:
        return NonFiniteLogitsError(
            f"A score is infinite at position {position}, so the tokens have no probabilities to draw by.",
            "Use a higher temperature, or do_sample=False; check the logits processors for infinity.",
        )
    return InvalidInputError(
        f"The logits processors leave no token to choose at position {position}: they ban every one.",
        "Ban fewer: see no_repeat_ngram_size, bad_words_ids, suppress_tokens and logits_processor.",
    )


def _checked(scores: Tensor, shape: torch.Size) -> Tensor:
    """Scores that processors returned, if they are of one row; one made for a batch may return all rows."""
    if scores.shape != shape:
        raise UnsupportedGenerationError(
            f"A logits processor made scores of shape {tuple(scores.shape)} of one row's {tuple(shape)}.",
            "Each row has its own copies of the processors: make them for one row, or generate row by row.",
        )
    return scores
