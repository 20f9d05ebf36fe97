"""``retrieval-draft index inspect``, ``verify`` and ``query``: the contents of an index."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from retrieval_draft.cli._encoder import load_encoder, named_tokenizer
from retrieval_draft.cli.common import text_of
from retrieval_draft.cli.options import Report, Table, command
from retrieval_draft.errors import InvalidInputError

__all__ = ["inspect", "query", "verify"]

Folder = Annotated[Path, typer.Argument(help="An index folder.", show_default=False)]


@command
def inspect(
    folder: Folder,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", help="Write histograms of match lengths and branching (.png, .svg).", show_default=False
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Positions sampled for them.")] = 2000,
) -> Report:
    """Describe an index: its segments, texts and tokenizer."""
    from retrieval_draft.index.build.journal import Journal
    from retrieval_draft.index.segments.describe import describe
    from retrieval_draft.index.segments.index_folder import IndexFolder

    index = IndexFolder.open(folder)
    manifest = index.manifest
    found = describe(index.segments(), samples)
    facts: dict[str, Any] = {
        "tokens": manifest.tokens,
        "documents": manifest.documents,
        "segments": [entry.tokens for entry in manifest.segments],
        "nbytes": manifest.nbytes,
        "bytes_per_token": manifest.nbytes / manifest.tokens if manifest.tokens else 0.0,
        "vocabulary_size": manifest.vocabulary_size,
        "tokenizer": manifest.tokenizer,
        "fingerprint": manifest.fingerprint,
        "format_version": manifest.format_version,
        "created": manifest.created,
        "changed": manifest.changed,
        "unfinished": Journal.exists(index.path),
        "median_match": found.median_match,
        "mean_branching": {
            str(length): float(counts.mean()) for length, counts in found.branching.items() if len(counts)
        },
    }
    if plot is not None:
        from retrieval_draft.cli._index_plot import plot_description

        plot_description(found, manifest.tokens, plot)
        facts["plot"] = str(plot)
    rows = [(name, _shown(value)) for name, value in facts.items()]
    parts: list[Table | str] = [Table(str(folder), ("what", "value"), rows)]
    if facts["unfinished"]:
        parts.append("An interrupted build waits here: the same command goes on with it.")
    return Report(facts, parts)


@command
def verify(folder: Folder) -> Report:
    """Compare every file with its checksum. Exit code 3 if one differs."""
    from retrieval_draft.index.segments.index_folder import IndexFolder

    index = IndexFolder.open(folder)
    wrong = index.verify()
    if not wrong:
        index.segments()
    segments = len(index.manifest.segments)
    lines = wrong or [f"{folder}: {segments} segments, all files as they were written"]
    return Report({"files": 4 * segments, "wrong": wrong}, lines, different=bool(wrong))


@command
def query(
    text: Annotated[str, typer.Argument(help="Text that a reply could end with so far.", show_default=False)],
    index: Annotated[list[Path], typer.Option("--index", help="An index; repeatable.", show_default=False)],
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="By default the one the index was built with.")
    ] = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, max=1024, help="Nodes of the draft.")] = 24,
) -> Report:
    """Show the draft after a text."""
    import numpy as np

    from retrieval_draft.index.corpus import Corpus, CorpusSource

    text = text_of(text)
    opened = [Corpus.open(path) for path in index]
    encoder = load_encoder(tokenizer or named_tokenizer(opened[0].folder))
    for corpus in opened:
        corpus.folder.check(encoder.fingerprint, encoder.vocabulary)
    tokens = encoder.encode([text])[0]
    if not len(tokens):
        raise InvalidInputError("The text is empty.", "Give some text.")
    session = CorpusSource(opened).open(tokens)
    proposal = session.propose(nodes)
    suffixes = [
        {"tokens": length, "text": encoder.decode(tokens[-length:]),
         "count": sum(segment.count(tokens[-length:]) for corpus in opened for segment in corpus.segments)}
        for length in range(1, min(len(tokens), 32) + 1)
    ]  # fmt: skip
    suffixes = [found for found in suffixes if found["count"]]
    paths = np.ones(len(proposal))
    for node, parent in enumerate(proposal.parents):
        paths[node] = proposal.probs[node] * (paths[parent] if parent >= 0 else 1.0)
    pieces = [encoder.decode(proposal.tokens[node : node + 1]) for node in range(len(proposal))]
    result = {
        "text_tokens": tokens.tolist(),
        "matches": suffixes,
        "tokens": proposal.tokens.tolist(),
        "pieces": pieces,
        "parents": proposal.parents.tolist(),
        "probs": proposal.probs.tolist(),
        "path_probs": paths.tolist(),
        "match_lengths": proposal.match_lengths.tolist(),
    }
    rows = [(repr(found["text"]), str(found["tokens"]), str(found["count"])) for found in suffixes[-8:]]
    table = Table("", ("end of the text that occurs", "tokens", "times"), rows)
    return Report(result, [table, _tree(pieces, proposal, paths)])


def _tree(pieces: list[str], proposal: Any, paths: Any) -> str:
    """The draft as text, each node below its parent."""
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    if not pieces:
        return "Nothing to draft: the index does not know the text's end."
    root = Tree("draft")
    branches = [root]
    for node, parent in enumerate(proposal.parents):
        branches.append(branches[parent + 1].add(Text(f"{pieces[node]!r}  {paths[node]:.2f}")))
    console = Console()
    with console.capture() as capture:
        console.print(root)
    return capture.get().rstrip("\n")


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(each)}" for key, each in value.items())
    if isinstance(value, list):
        shown = ", ".join(_shown(each) for each in value[:8])
        return f"{len(value)}: {shown}{', ...' if len(value) > 8 else ''}"
    return str(value)
