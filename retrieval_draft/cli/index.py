"""``retrieval-draft index``: build, extend, join, look into and check corpus indexes."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrieval_draft.cli._common import Json
from retrieval_draft.cli._output import print_json, print_table
from retrieval_draft.errors import DatastoreError, InvalidInputError

if TYPE_CHECKING:
    from retrieval_draft.index.build.builder import BuildState
    from retrieval_draft.index.build.encoder import Encoder
    from retrieval_draft.index.index_folder import IndexFolder

__all__ = ["app"]

app = typer.Typer(help="Corpus indexes: text on disk that requests draft from.", no_args_is_help=False)

DIFFERENT = 3

Paths = Annotated[
    list[str],
    typer.Argument(
        help="Files, folders, globs, or - for stdin: text, source code, .jsonl, .parquet, .arrow, also "
        ".gz and .zst, and folders of datasets.save_to_disk.",
        show_default=False,
    ),
]
Tokenizer = Annotated[
    str,
    typer.Option("--tokenizer", help="A model's folder or name, or a tokenizer.json.", show_default=False),
]
Column = Annotated[
    str, typer.Option("--text-column", help="Field or column with the text; a.b reaches inside.")
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Documents to take at most.")]
Skip = Annotated[int, typer.Option("--skip", min=0, help="Documents to leave out at the beginning.")]
Include = Annotated[
    list[str] | None, typer.Option("--include", help="Only files like this glob; repeatable.")
]
Exclude = Annotated[list[str] | None, typer.Option("--exclude", help="No files like this glob; repeatable.")]
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Threads. All cores by default.")]
Segment = Annotated[
    int,
    typer.Option(
        "--segment-tokens", min=0, help="Tokens of a segment at most; 0 for what suits this machine's memory."
    ),
]
Executor = Annotated[
    str | None,
    typer.Option(
        "--executor", help="ray, or the address of a Ray cluster: ray://HOST:PORT.", show_default=False
    ),
]
Folder = Annotated[Path, typer.Argument(help="An index folder.", show_default=False)]


@app.callback(invoke_without_command=True)
def _help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command("build")
def build(
    paths: Paths,
    tokenizer: Tokenizer,
    out: Annotated[Path, typer.Option("--out", help="The new index.", show_default=False)],
    text_column: Column = "text",
    limit: Limit = None,
    skip: Skip = 0,
    include: Include = None,
    exclude: Exclude = None,
    workers: Workers = None,
    segment_tokens: Segment = 0,
    executor: Executor = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an index that is there.")] = False,
    json: Json = False,
) -> None:
    """Index text for drafting. Interrupted, the same command goes on where it stopped."""
    encoder = load_encoder(tokenizer)
    from retrieval_draft.index.index_folder import IndexFolder

    index = IndexFolder.create(out, encoder.fingerprint, encoder.vocabulary, encoder.name)
    if index.manifest.segments and not overwrite:
        raise DatastoreError(
            f"{out} is an index already, of {index.manifest.tokens} tokens.",
            "Add to it with index add, or replace it with --overwrite.",
        )
    _fill(index, encoder, paths, text_column, limit, skip, include, exclude, workers, segment_tokens,
          executor, json, overwrite)  # fmt: skip


@app.command("add")
def add(
    paths: Paths,
    out: Annotated[Path, typer.Option("--out", help="The index to add to.", show_default=False)],
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="By default the one the index was built with.")
    ] = None,
    text_column: Column = "text",
    limit: Limit = None,
    skip: Skip = 0,
    include: Include = None,
    exclude: Exclude = None,
    workers: Workers = None,
    segment_tokens: Segment = 0,
    executor: Executor = None,
    json: Json = False,
) -> None:
    """Add text to an index. Readers see the old one until all is done."""
    from retrieval_draft.index.index_folder import IndexFolder

    index = IndexFolder.open(out)
    encoder = load_encoder(tokenizer or _named(index))
    _fill(index, encoder, paths, text_column, limit, skip, include, exclude, workers, segment_tokens,
          executor, json, False)  # fmt: skip


@app.command("merge")
def merge(
    indexes: Annotated[list[Path], typer.Argument(help="Index folders.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The index that takes all in. By default the first.", show_default=False),
    ] = None,
    workers: Workers = None,
    segment_tokens: Segment = 0,
    json: Json = False,
) -> None:
    """Join indexes of one tokenizer, and small segments into larger ones."""
    from retrieval_draft._progress import progress
    from retrieval_draft.index.build.builder import segment_tokens_here
    from retrieval_draft.index.build.merge import merge_indexes
    from retrieval_draft.index.index_folder import IndexFolder

    opened = [IndexFolder.open(path) for path in indexes]
    first = opened[0].manifest
    target = opened[0]
    if out is not None:
        target = IndexFolder.create(out, first.fingerprint, first.vocabulary_size, first.tokenizer)
    places = [index.path.resolve() for index in opened]
    if len(set(places)) < len(places):
        raise InvalidInputError("An index is named twice.", "Name each once.")
    sources = [index for index in opened if index.path.resolve() != target.path.resolve()]
    total = sum(index.manifest.tokens for index in (target, *sources))
    with progress("Merging", total) as advance:
        merge_indexes(target, sources, segment_tokens or segment_tokens_here(), _workers(workers), advance)
    _print_summary(target, {}, json)


@app.command("inspect")
def inspect(
    folder: Folder,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", help="Write histograms of match lengths and branching (.png, .svg).", show_default=False
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Positions sampled for them.")] = 2000,
    json: Json = False,
) -> None:
    """Say what an index holds."""
    from retrieval_draft.index.build.journal import Journal
    from retrieval_draft.index.describe import describe
    from retrieval_draft.index.index_folder import IndexFolder

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
    if json:
        print_json(facts)
        return
    rows = [(name, _shown(value)) for name, value in facts.items()]
    print_table(str(folder), ("what", "value"), rows)
    if facts["unfinished"]:
        print("An interrupted build waits here: the same command goes on with it.")


@app.command("verify")
def verify(folder: Folder, json: Json = False) -> None:
    """Compare every file with its checksum. Exit code 3 if one differs."""
    from retrieval_draft.index.index_folder import IndexFolder

    index = IndexFolder.open(folder)
    wrong = index.verify()
    if not wrong:
        index.segments()
    if json:
        print_json({"files": 4 * len(index.manifest.segments), "wrong": wrong})
    else:
        for line in wrong:
            print(line)
        if not wrong:
            print(f"{folder}: {len(index.manifest.segments)} segments, all files as they were written")
    if wrong:
        raise typer.Exit(DIFFERENT)


@app.command("query")
def query(
    text: Annotated[str, typer.Argument(help="Text that a reply could end with so far.", show_default=False)],
    index: Annotated[list[Path], typer.Option("--index", help="An index; repeatable.", show_default=False)],
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="By default the one the index was built with.")
    ] = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, max=1024, help="Nodes of the draft.")] = 24,
    json: Json = False,
) -> None:
    """Show what would be drafted after a text."""
    import numpy as np

    from retrieval_draft.index.corpus import Corpus, CorpusSource

    opened = [Corpus.open(path) for path in index]
    encoder = load_encoder(tokenizer or _named(opened[0].folder))
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
    if json:
        print_json(
            {
                "text_tokens": [int(token) for token in tokens],
                "matches": suffixes,
                "tokens": [int(token) for token in proposal.tokens],
                "pieces": [encoder.decode(proposal.tokens[node : node + 1]) for node in range(len(proposal))],
                "parents": [int(parent) for parent in proposal.parents],
                "probs": [float(prob) for prob in proposal.probs],
                "path_probs": [float(prob) for prob in paths],
                "match_lengths": [int(length) for length in proposal.match_lengths],
            }
        )
        return
    rows = [(repr(found["text"]), str(found["tokens"]), str(found["count"])) for found in suffixes[-8:]]
    print_table("", ("end of the text that occurs", "tokens", "times"), rows)
    _print_tree(encoder, proposal, paths)


def load_encoder(name: str) -> Encoder:
    """The tokenizer that a user names: a tokenizer.json, a model's folder, or a hub name."""
    from retrieval_draft.index.build.encoder import Encoder

    path = Path(name).expanduser()
    if path.is_file():
        return Encoder.from_file(path)
    from retrieval_draft.model_files import load_tokenizer

    return Encoder(load_tokenizer(name), name)


def _fill(
    index: IndexFolder,
    encoder: Encoder,
    paths: Sequence[str],
    text_column: str,
    limit: int | None,
    skip: int,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    workers: int | None,
    segment_tokens: int,
    executor: str | None,
    json: bool,
    replace: bool,
) -> None:
    """What build and add have in common."""
    from retrieval_draft.cli._build_progress import build_progress
    from retrieval_draft.index.build.builder import BuildOptions, build_index
    from retrieval_draft.index.build.documents import find_files

    files = find_files(paths, include=include or (), exclude=exclude or ())
    threads = _workers(workers)
    # Read by the tokenizer's thread pool when it starts.
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    options = BuildOptions(text_column, skip, limit, segment_tokens, threads)
    begin = time.perf_counter()
    with build_progress(len(files), sum(file.nbytes for file in files)) as watch:
        if executor is None:
            state = build_index(index, files, encoder, options, watch, replace)
        else:
            from retrieval_draft.index.build.shards import build_on_ray

            if executor != "ray" and not executor.startswith("ray://"):
                raise InvalidInputError(
                    f"Unknown executor {executor!r}.", "Choose ray, or an address like ray://HOST:PORT."
                )
            address = None if executor == "ray" else executor
            state = build_on_ray(index, files, encoder, options, address, watch, replace)
    _print_summary(index, _build_facts(state, len(files), time.perf_counter() - begin), json)


def _build_facts(state: BuildState, files: int, seconds: float) -> dict[str, Any]:
    report = state.report
    return {
        "files": files,
        "read_documents": report.documents,
        "resumed_documents": state.resumed,
        "skipped": report.skipped,
        "skipped_why": dict(report.reasons),
        "skipped_first": list(report.named),
        "seconds": seconds,
    }


def _print_summary(index: IndexFolder, facts: dict[str, Any], json: bool) -> None:
    manifest = index.manifest
    result = {
        "out": str(index.path),
        "tokens": manifest.tokens,
        "documents": manifest.documents,
        "segments": len(manifest.segments),
        "nbytes": manifest.nbytes,
        **facts,
    }
    if json:
        print_json(result)
        return
    each = manifest.nbytes / manifest.tokens if manifest.tokens else 0.0
    print(
        f"{index.path}: {manifest.tokens:,} tokens of {manifest.documents:,} documents in "
        f"{len(manifest.segments)} segments, {each:.2f} bytes a token"
    )
    if facts.get("resumed_documents"):
        print(f"went on behind {facts['resumed_documents']:,} documents of an interrupted build")
    if facts.get("skipped"):
        why = ", ".join(f"{count} {reason}" for reason, count in facts["skipped_why"].items())
        print(f"left out {facts['skipped']}: {why}; for instance")
        for name in facts["skipped_first"][:5]:
            print(f"  {name}")


def _print_tree(encoder: Encoder, proposal: Any, paths: Any) -> None:
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    root = Tree("draft")
    branches = [root]
    for node, parent in enumerate(proposal.parents):
        piece = encoder.decode(proposal.tokens[node : node + 1])
        line = Text(f"{piece!r}  {paths[node]:.2f}")
        branches.append(branches[parent + 1].add(line))
    if len(proposal):
        Console().print(root)
    else:
        print("Nothing to draft: the index does not know the text's end.")


def _named(index: IndexFolder) -> str:
    if not index.manifest.tokenizer:
        raise InvalidInputError(f"{index.path} does not say its tokenizer.", "Name it with --tokenizer.")
    return index.manifest.tokenizer


def _workers(workers: int | None) -> int:
    if workers is None and hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return workers or os.cpu_count() or 1


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
