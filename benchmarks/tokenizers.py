"""Drafts across tokenizers: tokens that two vocabularies share, and texts drafted through both.

The draft model is one that knows the text, so what is lost is lost between the tokenizers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from retrieval_draft.engine.draft_models.expansion import ExpansionLimits, ModelTree
from retrieval_draft.engine.draft_models.foreign_draft import ForeignModelDraft
from retrieval_draft.engine.draft_models.spelling import LOOK_BEHIND, Speller
from retrieval_draft.engine.draft_models.vocabulary import VocabularyMap
from retrieval_draft.index.source import TokenArray

__all__ = ["KnownText", "measure_tokenizers"]

_SURE = 0.95
_NODES = 60


class KnownText:
    """Stands for an `Expansion` of a draft model that knows how a text continues.

    Args:
        speller: Of the draft model's tokenizer.
        text: UTF-8.
        depth: Tokens that it drafts, one a pass.
    """

    def __init__(self, speller: Speller, text: bytes, depth: int) -> None:
        self._speller = speller
        self._text = text
        self._depth = depth

    def grow(
        self, text: TokenArray, budget: int, allowed: Any = None, depth: int | None = None, **others: Any
    ) -> ModelTree:
        """A chain: what follows in the text, up to the first token that may not be drafted."""
        done = len(self._speller.text(text))
        # A SentencePiece tokenizer puts a space before the text.
        done -= self._speller.text(text)[:1] == b" " != self._text[:1]
        depth = self._depth if depth is None else depth
        chain = self._speller.spell(text[-LOOK_BEHIND:], [self._text[done : done + 64 * depth]])[0]
        chain = chain[: min(depth, budget)]
        banned = [index for index, token in enumerate(chain) if not (allowed is None or allowed[token])]
        chain = chain[: banned[0]] if banned else chain
        size = len(chain)
        return ModelTree(
            np.array(chain, np.int32),
            np.arange(-1, size - 1, dtype=np.int32),
            np.full(size, _SURE, np.float32),
        )

    def close(self) -> None:
        """Does nothing."""


def measure_tokenizers(
    tokenizers: Mapping[str, Any],
    texts: Mapping[str, str],
    *,
    modes: Sequence[str] = ("text", "intersection"),
    depth: int = 6,
) -> dict[str, Any]:
    """Drafts texts with each tokenizer as the target's and each other one as the draft model's.

    Args:
        tokenizers: By name, two or more.
        texts: By language; the first is compared with.
        modes: Of `ForeignModelDraft`.
        depth: Tokens that the draft model drafts in a step.

    Returns:
        For each pair: shared tokens, those with letters beyond ASCII apart; for each language and mode the
        tokens of the target in a step, and that over the first language's.
    """
    pairs = []
    for target_name, target in tokenizers.items():
        for draft_name, draft in tokenizers.items():
            if draft_name != target_name:
                pairs.append(
                    {
                        "target": target_name,
                        "draft": draft_name,
                        **_measure_pair(target, draft, texts, modes, depth),
                    }
                )
    return {"pairs": pairs, "depth": depth}


def _measure_pair(
    target: Any, draft: Any, texts: Mapping[str, str], modes: Sequence[str], depth: int
) -> dict[str, Any]:
    shared = VocabularyMap(target, draft)
    speller = Speller(draft)
    beyond = [number for number, text in enumerate(speller.bytes) if text and max(text) > 0x7F]
    steps = {
        mode: {name: _tokens_per_step(target, draft, mode, text, depth) for name, text in texts.items()}
        for mode in modes
    }
    first = next(iter(texts))
    return {
        "tokens": sum(text is not None for text in speller.bytes),
        "shared": shared.shared,
        "beyond_ascii": len(beyond),
        "beyond_ascii_shared": int(np.count_nonzero(shared.to_target[beyond] >= 0)),
        "tokens_per_step": steps,
        "to_first": {
            mode: {name: each / found[first] for name, each in found.items()} for mode, found in steps.items()
        },
    }


def _tokens_per_step(target: Any, draft: Any, mode: Any, text: str, depth: int) -> float:
    from transformers import LlamaConfig, LlamaForCausalLM

    rows = max(draft.get_vocab().values()) + 1
    tiny = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=rows, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )  # never runs
    source = ForeignModelDraft(tiny, draft, target, mode, ExpansionLimits(depth=depth))
    known = KnownText(Speller(draft), text.encode(), depth)
    source.expansion = lambda: known  # type: ignore[method-assign]
    ids = np.array(target(text)["input_ids"], np.int32)
    begin = at = len(ids) // 8
    session = source.open(ids[:at])
    steps = 0
    while at < len(ids):
        proposal = session.propose(_NODES)
        children = {
            (parent, token): node
            for node, (parent, token) in enumerate(
                zip(proposal.parents.tolist(), proposal.tokens.tolist(), strict=True)
            )
        }
        node, end = -1, at
        while end < len(ids) and (node := children.get((node, int(ids[end])), -2)) >= 0:
            end += 1
        end = min(end + 1, len(ids))
        session.observe(ids[at:end])
        at, steps = end, steps + 1
    return (len(ids) - begin) / steps
