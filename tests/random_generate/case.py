"""A case: a model, a drafter, and calls of it, one after the other. As JSON it can be run again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

__all__ = ["Call", "Case"]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call.

    Attributes:
        prompts: Token ids of each row. In a call that follows another they come behind what its rows said.
        follows: Whether the texts of the call before are continued.
        cut: Tokens taken off their ends first.
        changed: A position in them whose token becomes another; None to leave them.
        options: For model.generate, as JSON has them.
        options_in: Holder of the options: the call, a config or the model's own.
        processor: One of `processors.PROCESSORS`.
        criterion: Stops a row behind tokens that this number divides.
        seeds: One for all rows, or one for each.
        hint: Content of `prediction` and `documents` about the first row's reply.
        cache: The one that the call before returned, or a DynamicCache of the conversation's own.
        streamer: Whether one looks on.
        masked: Whether the attention mask is given where no row is padded.
    """

    prompts: list[list[int]]
    follows: bool = False
    cut: int = 0
    changed: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    options_in: Literal["arguments", "config", "model"] = "arguments"
    processor: str | None = None
    criterion: int | None = None
    seeds: int | list[int] = 0
    hint: Literal["none", "right", "partly", "wrong"] = "none"
    cache: Literal["none", "returned", "dynamic"] = "none"
    streamer: bool = False
    masked: bool = True


@dataclass(frozen=True, kw_only=True)
class Case:
    """A case: the model, the drafter and the calls.

    Attributes:
        architecture: A key of `architectures.ARCHITECTURES`.
        attention: The model's implementation.
        vocabulary: Token ids.
        weights: Seed of the model's weights.
        method: A drafting method, or "oracle" for trees around the true reply, with wrong siblings.
        wrong: Share of steps in which such a tree has no right child.
        config: Other values of `DraftConfig`.
        draft_model: A tiny model, or the target with layers skipped.
        route: Through the drafter, through ``custom_generate``, or row by row into a running batch.
        gap: Steps between rows that join a running batch.
        calls: In order, of one drafter.
    """

    architecture: str
    attention: Literal["sdpa", "eager"] = "sdpa"
    vocabulary: int = 13
    weights: int = 0
    method: str = "oracle"
    wrong: float = 0.2
    config: dict[str, Any] = field(default_factory=dict)
    draft_model: Literal["none", "tiny", "self"] = "none"
    route: Literal["drafter", "custom", "continuous"] = "drafter"
    gap: int = 1
    calls: list[Call]

    def to_json(self) -> str:
        """One line."""
        return msgspec.json.encode(self).decode()

    @staticmethod
    def from_json(text: str) -> Case:
        """Reads the text of `to_json`.

        Raises:
            msgspec.ValidationError: It is no case.
        """
        return msgspec.json.decode(text, type=Case)
