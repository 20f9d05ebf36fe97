"""A decode request."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from torch import Tensor
from transformers import StoppingCriteriaList

from retrieval_draft.drafting.grammar.grammar_text import GrammarText
from retrieval_draft.engine.cache.chain_cache import ChainCache
from retrieval_draft.engine.cache.kv_cache import SpeculativeCache
from retrieval_draft.engine.cache.prefix_cache import Prefixes
from retrieval_draft.engine.placeholders import text_runs
from retrieval_draft.engine.sampling.noise import GumbelNoise
from retrieval_draft.engine.sampling.sampling import Sampler
from retrieval_draft.index.source import TokenArray

__all__ = ["DecodeRequest", "PassedPrompt"]


@dataclass(frozen=True, slots=True, eq=False)
class PassedPrompt:
    """Results of a prompt's pass that the model made itself.

    Attributes:
        logits: (m, vocabulary), float, at the last positions.
        hidden: (1, d). States that draft sources read, at the last one; None where none are read.
    """

    logits: Tensor
    hidden: Tensor | None = None


@dataclass(slots=True, eq=False)
class DecodeRequest:
    """One text to be continued.

    Attributes:
        prompt: int32, shape (length,), padding stripped.
        max_length: Prompt and reply together.
        eos: Tokens that end the reply.
        criteria: Further stopping criteria, called after each token.
        sampler: Chooses tokens where processors or sampling take part; None for the argmax.
        noise: Noise that the sampler draws with; None for greedy.
        padded: int64, shape (1, length + padding). Needed by `criteria` and `sampler`.
        emit: Called with each new token, once and in order.
        ended: Called once the reply is complete.
        finished: Called with the reply, int32, once the request has left the batch; a view of a buffer.
        max_draft_tokens: Draft tokens in one step at most, 0 for none; None for as many as pay.
        prompt_rows: Last prompt positions whose predictions the sources learn from.
        prefill_chunk: Prompt tokens in one pass at most.
        cache: Holds the beginning of the prompt already, all but one token at most; None to begin anew.
        prefix_owner: An earlier request of the batch with the same prompt, whose prompt pass serves both.
        keep_prompt_logits: Whether the logits at the prompt's positions are kept.
        read_prompt: Called with those logits instead, run by run: (m, vocabulary) each; they are not kept.
        placeholders: Ids that stand for images and the like, from which nothing is learned.
        prefixes: Finds the texts that the prompt may continue, and that this one joins; None for neither.
        passed: Results of the prompt's pass, where the model made that itself; `cache` holds the whole prompt
            then.
        grammar: Follows the reply, whose drafts keep to it; `sampler` masks what it forbids. None without.
        owner: Tenant and salt, apart from those of others.
    """

    prompt: TokenArray
    max_length: int
    eos: frozenset[int] = frozenset()
    criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    sampler: Sampler | None = None
    noise: GumbelNoise | None = None
    padded: Tensor | None = None
    emit: Callable[[int], None] | None = None
    ended: Callable[[], None] | None = None
    finished: Callable[[TokenArray], None] | None = None
    max_draft_tokens: int | None = None
    prompt_rows: int = 1
    prefill_chunk: int | None = None
    cache: SpeculativeCache | ChainCache | None = None
    prefix_owner: DecodeRequest | None = None
    keep_prompt_logits: bool = False
    read_prompt: Callable[[Tensor], None] | None = None
    placeholders: frozenset[int] = frozenset()
    passed: PassedPrompt | None = None
    grammar: GrammarText | None = None
    prefixes: Callable[[], Prefixes | None] | None = None
    owner: Hashable = None

    @property
    def runs(self) -> list[TokenArray]:
        """The prompt's text between placeholders: int32 each; the last leads to the reply, or is empty."""
        *earlier, context = text_runs(self.prompt, self.placeholders)
        return [*filter(len, earlier), context]
