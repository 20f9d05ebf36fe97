"""Gain of an index of a code base, for prompts cut from files that it does not contain."""

from __future__ import annotations

import sysconfig
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_draft._progress import progress
from retrieval_draft.bench.decoders import Run, make_contestant
from retrieval_draft.bench.measuring import ratio_summary
from retrieval_draft.bench.provenance import provenance
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.build.builder import build_index
from retrieval_draft.index.build.documents import (
    DocumentFile,
    NoTextColumnError,
    ReadReport,
    find_files,
    read_documents,
)
from retrieval_draft.index.build.encoder import Encoder
from retrieval_draft.index.build.options import BuildOptions
from retrieval_draft.index.segments.index_folder import IndexFolder
from retrieval_draft.index.source import TokenArray

__all__ = ["measure_corpus", "standard_library"]

STOP_AT = 0.2, 0.8
"""Part of a file in which prompts end: not in its licence, not at its end."""


def standard_library() -> tuple[list[str], list[str], list[str]]:
    """The folder of Python's standard library, globs of other files in it, and globs of its tests."""
    packages = ["site-packages/**", "dist-packages/**"]
    tests = [f"{folder}/**" for folder in ("test", "**/tests", "**/test", "**/*_test")]
    return [sysconfig.get_path("stdlib")], packages, tests


def measure_corpus(
    model: Any,
    tokenizer: Any,
    paths: Sequence[str],
    *,
    include: Sequence[str] = ("*.py",),
    exclude: Sequence[str] = (),
    no_prompts: Sequence[str] = (),
    prompts: int = 30,
    prompt_tokens: int = 192,
    max_new_tokens: int = 96,
    nodes: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Indexes most files, then generates from beginnings of the others, with and without the index.

    Args:
        model: The target model, decoded greedily.
        tokenizer: The model's.
        paths: The code base.
        include: Globs of files to take.
        exclude: Globs of files to leave out entirely.
        no_prompts: Globs of files that are indexed but that no prompt is cut from.
        prompts: Number of prompts, each from a file of its own, which the index does not hold.
        prompt_tokens: Length of each.
        max_new_tokens: Of each reply.
        nodes: Of each step; None for the measured cost to choose.
        seed: Draws files and positions.

    Returns:
        Tokens per step with and without, their ratio, ratios of speed, and the number of equal replies.
    """
    files = find_files(paths, include=include, exclude=exclude)
    sources = find_files(paths, include=include, exclude=[*exclude, *no_prompts])
    encoder = Encoder(tokenizer, getattr(tokenizer, "name_or_path", ""))
    random = np.random.default_rng(seed)
    # A model that expects a first token of its own generates nonsense without it.
    start = tokenizer("")["input_ids"][:1]
    cut = [
        (file, [*start, *ids])
        for file, ids in _cut_prompts(sources, encoder, random, prompts, prompt_tokens, max_new_tokens)
    ]
    held_out = {file.path for file, _ in cut}
    with tempfile.TemporaryDirectory() as folder:
        index = IndexFolder.create(Path(folder) / "index", encoder.fingerprint, encoder.vocabulary)
        with progress("Indexing", None):
            indexed = [file for file in files if file.path not in held_out]
            build_index(index, indexed, encoder, BuildOptions(workers=1))
        without = make_contestant("calibrated", model, tokenizer, nodes)
        with_index = make_contestant("calibrated", model, tokenizer, nodes, corpora=[index.path])
        runs: dict[str, list[Run]] = {"without": [], "with": []}
        with progress("Decoding", 2 * len(cut)) as advance:
            for number, (_, ids) in enumerate(cut):
                turn = [("without", without), ("with", with_index)]
                for name, contestant in turn if number % 2 else turn[::-1]:
                    runs[name].append(contestant.generate(ids, max_new_tokens))
                    advance()
        tokens = index.manifest.tokens
    per_step = {name: _tokens_per_step(each) for name, each in runs.items()}
    speed = [one.seconds / two.seconds for one, two in zip(runs["without"], runs["with"], strict=True)]
    return {
        "tokens_per_step": per_step,
        "ratio": per_step["with"] / per_step["without"],
        "speed_ratio": ratio_summary(speed),
        "equal": sum(
            one.tokens == two.tokens for one, two in zip(runs["without"], runs["with"], strict=True)
        ),
        "by_prompt": {
            name: [(len(run.tokens) - 1) / max(run.steps, 1) for run in each] for name, each in runs.items()
        },
        "prompts": len(cut),
        "prompt_tokens": prompt_tokens,
        "max_new_tokens": max_new_tokens,
        "nodes": nodes,
        "index_tokens": tokens,
        "held_out": sorted(Path(path).name for path in held_out),
        "provenance": provenance(),
    }


def _cut_prompts(
    files: Sequence[DocumentFile],
    encoder: Encoder,
    random: np.random.Generator,
    prompts: int,
    length: int,
    reply: int,
) -> list[tuple[DocumentFile, list[int]]]:
    cut: list[tuple[DocumentFile, list[int]]] = []
    for index in random.permutation(len(files)):
        text = ""
        with suppress(NoTextColumnError):  # no prompt is cut from it, as it is not indexed
            text = next((text for _, text in read_documents(files[index], ReadReport())), "")
        tokens: TokenArray = encoder.encode([text])[0]
        first, last = (int(part * len(tokens)) for part in STOP_AT)
        if first < length or last + reply > len(tokens) or last <= first:
            continue
        end = int(random.integers(first, last))
        cut.append((files[index], [int(token) for token in tokens[end - length : end]]))
        if len(cut) == prompts:
            return cut
    raise InvalidInputError(
        f"Only {len(cut)} files are long enough for a prompt of {length} tokens; {prompts} are needed.",
        "Ask for fewer or shorter prompts, or name more files.",
    )


def _tokens_per_step(runs: Sequence[Run]) -> float:
    return sum(len(run.tokens) - 1 for run in runs) / max(sum(run.steps for run in runs), 1)
