"""Configuration of drafting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from retrieval_draft.errors import InvalidInputError, UnknownMethodError

__all__ = ["METHODS", "SOURCES", "DraftConfig"]

METHODS = (
    "calibrated",
    "none",
    "prompt_lookup",
    "sam_decoding",
    "token_recycling",
    "sam_token_recycling",
    "hierarchy_drafting",
    "rest",
    "suffix_decoding",
    "anpd",
    "aded",
    "stand",
    "racer",
    "logit_spec",
    "opt_tree",
    "rasd",
    "cascade",
    "ouroboros",
)
"""Drafting methods by name, a module of `retrieval_draft.methods` each. ``none`` decodes plainly."""

SOURCES = ("automaton", "adjacency", "siblings", "history", "shared", "phrases", "corpus")
"""Draft sources by name, nearest locality first."""

MAX_NODES = 1024
TOP_K_LIMIT = 32


@dataclass(frozen=True, slots=True)
class DraftConfig:
    """Configuration of drafting. It changes the speed of generation, never the output.

    Attributes:
        method: A name of `METHODS`.
        nodes: Draft nodes verified in every step, root excluded, or None to let the measured
            cost of a forward pass decide step by step.
        max_nodes: Limit of a step's draft nodes when the cost decides.
        sources: Names of `SOURCES` to draft from.
        top_k: Next tokens kept for each row of the adjacency matrix.
        adjacency_rows: Rows of the adjacency matrix; 84 bytes each at ``top_k=8``.
        prefill_logits: Whether the output head also runs over the prompt, so that the adjacency matrix has
            the prompt's alternatives: True, False, or "auto" for as many of the last prompt positions as pay
            for their measured cost.
        cpu_kernels: Whether the model's linear layers and norms use faster kernels for few tokens on the
            CPU while the drafter decodes. Results differ in the last bits. No effect on other devices.
        known_noise: Whether drafts for sampled text are ranked by the noise that it will be drawn with.
            Turned off in measurements only.
        history_bytes: Limit of the memory for texts of earlier requests; the oldest are evicted first.
        history_folder: Folder to save these texts in, for use after a restart; None to lose them at exit.
        history_prompts: Whether prompts are kept.
        history_replies: Whether replies are kept.
    """

    method: str = "calibrated"
    nodes: int | None = None
    max_nodes: int = 60
    sources: tuple[str, ...] = SOURCES
    top_k: int = 8
    adjacency_rows: int = 262144
    prefill_logits: bool | Literal["auto"] = "auto"
    cpu_kernels: bool = True
    known_noise: bool = True
    history_bytes: int = 1 << 28
    history_folder: str | None = None
    history_prompts: bool = True
    history_replies: bool = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UnknownMethodError(
                f"Unknown method {self.method!r}.", f"Choose one of: {', '.join(METHODS)}."
            )
        unknown = [name for name in self.sources if name not in SOURCES]
        if unknown:
            raise InvalidInputError(
                f"Unknown draft source {unknown[0]!r}.", f"Choose from: {', '.join(SOURCES)}."
            )
        for name, value, low, high in (
            ("nodes", 0 if self.nodes is None else self.nodes, 0, MAX_NODES),
            ("max_nodes", self.max_nodes, 0, MAX_NODES),
            ("top_k", self.top_k, 1, TOP_K_LIMIT),
            ("adjacency_rows", self.adjacency_rows, 16, 1 << 28),
            ("history_bytes", self.history_bytes, 1 << 20, 1 << 40),
        ):
            if not low <= value <= high:
                raise InvalidInputError(f"{name} is {value}; it must lie in {low}..{high}.")
        if self.prefill_logits not in (True, False, "auto"):
            raise InvalidInputError(
                f"prefill_logits is {self.prefill_logits!r}; it must be True, False or 'auto'."
            )
