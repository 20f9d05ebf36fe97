"""Configuration of drafting."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from retrieval_draft._settings import Range, check_ranges
from retrieval_draft.errors import InvalidInputError, UnknownMethodError

__all__ = ["DRAFT_MODEL", "METHODS", "SOURCES", "DraftConfig", "SourceSpec"]

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
    "sssd",
    "opt_tree",
    "rasd",
    "cascade",
    "ouroboros",
    "eagle3",
    "mtp",
    "dflash",
    "medusa",
    "self",
)
"""Drafting methods by name, a module of `retrieval_draft.methods` each. ``none`` decodes plainly."""


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """A draft source by name.

    Attributes:
        name: As in `DraftConfig.sources`, in statistics and metrics.
        level: Its locality: "request", "history", "shared", "corpus" or "model".
        slot: Its row in the arrays of a calibration, 0 to 10, its own. Files know sources by name.
        make: "module:function", called with a `DraftConfig` and `DraftStores`. It returns the source, or None
            where there is nothing to draft from. None for draft models, which a user passes.
    """

    name: str
    level: str
    slot: int
    make: str | None


SOURCES = {
    spec.name: spec
    for spec in (
        SourceSpec("automaton", "request", 0, "retrieval_draft.index.suffix_automaton:make_source"),
        SourceSpec("adjacency", "request", 1, "retrieval_draft.index.adjacency:make_source"),
        SourceSpec("alignment", "request", 8, "retrieval_draft.index.alignment:make_source"),
        SourceSpec("runners-up", "request", 9, "retrieval_draft.index.runners_up:make_source"),
        SourceSpec("siblings", "request", 7, "retrieval_draft.index.siblings:make_source"),
        SourceSpec("history", "history", 2, "retrieval_draft.index.history:make_source"),
        SourceSpec("shared", "shared", 5, "retrieval_draft.index.shared:make_source"),
        SourceSpec("phrases", "corpus", 3, "retrieval_draft.index.phrases:make_source"),
        SourceSpec("corpus", "corpus", 4, "retrieval_draft.index.corpus:make_source"),
    )
}
"""Draft sources by name, nearest locality first. A new source is one file and one line here."""

DRAFT_MODEL = SourceSpec("model", "model", 6, None)
"""Draft models: `RetrievalDrafter.for_model(..., draft_model=...)` makes them."""

MAX_NODES = 1024
TOP_K_LIMIT = 32
BITWISE_NODES = 31
"""Draft nodes of every pass with `DraftConfig.exact`; the root makes them 32."""


@dataclass(frozen=True, slots=True)
class DraftConfig:
    """Configuration of drafting. It changes the speed of generation, never the output.

    Attributes:
        method: Drafting method: calibrated, none, or a published one by its name.
        nodes: Draft nodes verified in every step, root excluded. By default the measured cost of a forward
            pass decides, step by step.
        max_nodes: Limit of a step's draft nodes when the cost decides.
        sources: Names of `SOURCES` to draft from.
        top_k: Next tokens kept for each row of the adjacency matrix.
        adjacency_rows: Rows of the adjacency matrix; 84 bytes each at ``top_k=8``.
        prefill_logits: Whether the output head also runs over the prompt, so that the adjacency matrix has
            the prompt's alternatives: True, False, or "auto" for as many of the last prompt positions as pay
            for their measured cost.
        cpu_kernels: Faster layers for few tokens on the CPU while drafting. Results differ in the last bits.
            No effect on other devices.
        graphs: Whether passes over draft trees are captured once and replayed: "auto" as CUDA graphs on CUDA,
            "off" never, "tape" as recorded operations on any device, which saves nothing and is for tests.
        exact: "bitwise": the same text, and cache, bit for bit with and without drafts in half precision too,
            alone and in a batch, by passes of one shape. Refused, with the reason, where the model does not
            keep to it on this machine. By default equality up to rounding.
        known_noise: Whether drafts for sampled text are ranked by the noise that it will be drawn with.
            Turned off in measurements only.
        draft_beside: Whether a draft model prepares its next drafts while the target's pass runs, on a thread
            of its own. By default where it is on another device than the target, as long as that is faster.
        history_bytes: Limit of the memory for texts of earlier requests; the oldest are evicted first.
        history_folder: A folder in which prompts and replies are kept to draft from, after a restart too.
        history_prompts: Whether prompts are kept.
        history_replies: Whether replies are kept.
        prefix_cache_bytes: Limit of the memory for keys and values of earlier texts, which prompts with the
            same beginning reuse, and as much for each adapter; 0 keeps none.
    """

    method: str = "calibrated"
    nodes: Annotated[int | None, Range(0, MAX_NODES)] = None
    max_nodes: Annotated[int, Range(0, MAX_NODES)] = 60
    sources: tuple[str, ...] = field(default_factory=lambda: tuple(SOURCES))
    top_k: Annotated[int, Range(1, TOP_K_LIMIT)] = 8
    adjacency_rows: Annotated[int, Range(16, 1 << 28)] = 262144
    prefill_logits: bool | Literal["auto"] = "auto"
    cpu_kernels: bool = True
    graphs: Literal["auto", "off", "tape"] = "auto"
    exact: Literal["bitwise"] | None = None
    known_noise: bool = True
    draft_beside: bool | None = None
    history_bytes: Annotated[int, Range(1 << 20, 1 << 40)] = 1 << 28
    history_folder: str | None = None
    history_prompts: bool = True
    history_replies: bool = True
    prefix_cache_bytes: Annotated[int, Range(0, 1 << 44)] = 0

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
        if len(set(self.sources)) < len(self.sources):
            raise InvalidInputError(f"sources names a source twice: {self.sources}.", "Name each one once.")
        check_ranges(self)
        if self.graphs not in ("auto", "off", "tape"):
            raise InvalidInputError(f"graphs is {self.graphs!r}; it must be 'auto', 'off' or 'tape'.")
        if self.exact not in (None, "bitwise"):
            raise InvalidInputError(f"exact is {self.exact!r}; it must be None or 'bitwise'.")
        if self.exact and self.nodes is not None and self.nodes > BITWISE_NODES:
            raise InvalidInputError(
                f"nodes is {self.nodes}; with exact='bitwise' every pass has {BITWISE_NODES} draft nodes.",
                f"Set at most {BITWISE_NODES}.",
            )
        if self.prefill_logits not in (True, False, "auto"):
            raise InvalidInputError(
                f"prefill_logits is {self.prefill_logits!r}; it must be True, False or 'auto'."
            )
