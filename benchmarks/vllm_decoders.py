"""The methods that `bench vllm` compares: vLLM's own, and this project's."""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass, field
from typing import Any

from benchmarks.vllm_switch import Propose
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.integrations.vllm import RetrievalProposer, VllmOptions

__all__ = ["METHODS", "PLAIN", "VllmDecoder", "make_vllm_contestant"]

PLAIN = "plain"
"""vLLM without speculation, in an engine of its own."""

METHODS = ("plain", "idle", "ngram-MIN-MAX-K", "suffix", "suffix-history", "cold", "history")
"""``idle`` is the drafting engine without drafts; ``ngram-2-4-5`` looks up 2 to 4 tokens and drafts 5."""


@dataclass(slots=True, eq=False)
class VllmDecoder:
    """A drafting method.

    Attributes:
        name: As given.
        propose: Makes drafts; None without drafts.
        fresh: Whether it forgets everything before each prompt.
        made: The proposer itself, for its calls between prompts.
        config: vLLM's, as the proposer was made with it.
    """

    name: str
    propose: Propose | None = None
    fresh: bool = False
    made: Any = None
    config: Any = field(default=None, repr=False)

    def begin(self) -> None:
        """Prepares for the next prompt."""
        if self.fresh and self.name == "suffix":
            self.made = _suffix(self.config)
        elif self.fresh and self.name == "cold":
            before = self.made
            self.made = _ours(self.config, history=False)
            if before is not None:
                # The costs of steps are no knowledge of text: they are kept, as on any running server.
                self.made.rows.costs = before.rows.costs
                before.close()

    def settle(self) -> None:
        """Ends a prompt: its text can be drafted from, as it would be moments later."""
        if isinstance(self.made, RetrievalProposer):
            self.made.flush()

    def close(self) -> None:
        """Stops background threads."""
        if isinstance(self.made, RetrievalProposer):
            self.made.close()


def make_vllm_contestant(name: str, vllm_config: Any) -> VllmDecoder:
    """A method by name.

    Args:
        name: One of `METHODS`.
        vllm_config: The drafting engine's.

    Raises:
        InvalidInputError: There is no method of that name, or a package that it needs is not installed.
    """
    if name in (PLAIN, "idle"):
        return VllmDecoder(name)
    made = VllmDecoder(name, fresh=name in ("suffix", "cold"), config=vllm_config)
    if name.startswith("ngram-"):
        made.propose, made.made = _ngram(name, vllm_config)
    elif name in ("suffix", "suffix-history"):
        made.made = _suffix(vllm_config)
        made.propose = lambda batch, sampled, lengths, texts: made.made.propose(
            made.made.num_speculative_tokens, batch, sampled
        )
    elif name in ("cold", "history"):
        if name == "history":
            made.made = _ours(vllm_config, history=True)
        made.propose = lambda batch, sampled, lengths, texts: made.made.propose(sampled, lengths, texts)
    else:
        raise InvalidInputError(f"There is no method {name!r}.", f"Choose from: {', '.join(METHODS)}.")
    return made


def _ngram(name: str, vllm_config: Any) -> tuple[Propose, Any]:
    try:
        least, most, count = (int(part) for part in name.split("-")[1:])
    except ValueError as error:
        raise InvalidInputError(f"{name!r} is no setting of ngram.", "Write ngram-MIN-MAX-K.") from error
    config = _with(vllm_config, prompt_lookup_min=least, prompt_lookup_max=most, num_speculative_tokens=count)
    proposer = importlib.import_module("vllm.v1.spec_decode.ngram_proposer").NgramProposer(config)
    return lambda batch, sampled, lengths, texts: proposer.propose(count, sampled, lengths, texts), proposer


def _suffix(vllm_config: Any) -> Any:
    """VLLM's suffix method with its own defaults; its drafts may be as long as the engine allows."""
    speculative = vllm_config.speculative_config
    config = _with(vllm_config, num_speculative_tokens=min(speculative.num_speculative_tokens, SUFFIX_DEPTH))
    try:
        module = importlib.import_module("vllm.v1.spec_decode.suffix_decoding")
        return module.SuffixDecodingProposer(config)
    except ImportError as error:
        raise InvalidInputError(
            f"vLLM's suffix method needs arctic-inference ({error}).", "Run: scripts/test_vllm.sh --install"
        ) from error


SUFFIX_DEPTH = 32
"""vLLM's own default length of a suffix draft."""


def _ours(vllm_config: Any, history: bool) -> RetrievalProposer:
    options = VllmOptions.read()
    if not history:
        kept = tuple(name for name in options.sources if name not in ("history", "shared"))
        options = VllmOptions(sources=kept, min_prob=options.min_prob, costs=options.costs)
    return RetrievalProposer(vllm_config, options=options)


def _with(vllm_config: Any, **changes: Any) -> Any:
    """A copy of vLLM's configuration with another speculative part."""
    config, speculative = copy.copy(vllm_config), copy.copy(vllm_config.speculative_config)
    for name, value in changes.items():
        object.__setattr__(speculative, name, value)
    object.__setattr__(config, "speculative_config", speculative)
    return config
