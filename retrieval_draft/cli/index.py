"""``retrieval-draft index``: build, extend, merge, inspect and check corpus indexes."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrieval_draft.cli import index_look
from retrieval_draft.cli._encoder import load_encoder, named_tokenizer
from retrieval_draft.cli.options import Fields, Report, command
from retrieval_draft.errors import DatastoreError, InvalidInputError
from retrieval_draft.index.build.options import BuildOptions

if TYPE_CHECKING:
    from retrieval_draft.index.build.builder import BuildState
    from retrieval_draft.index.build.documents import DocumentFile, ReadReport
    from retrieval_draft.index.build.encoder import Encoder
    from retrieval_draft.index.segments.index_folder import IndexFolder

__all__ = ["app"]

app = typer.Typer(help="Corpus indexes: text on disk that requests draft from.", no_args_is_help=False)
app.command("inspect")(index_look.inspect)
app.command("verify")(index_look.verify)
app.command("query")(index_look.query)

Tokenizer = Annotated[
    str,
    typer.Option("--tokenizer", help="A model's folder or name, or a tokenizer.json.", show_default=False),
]


@dataclass(frozen=True, slots=True)
class Building:
    """Text to index, and how it is read.

    Attributes:
        paths: Files, pipes, folders, globs, or - for stdin: text, source code, .json, .jsonl, .parquet,
            .arrow, also .gz, .zst, .bz2 and .xz, and folders of datasets.save_to_disk.
        include: Only files like this glob; repeatable.
        exclude: No files like this glob; repeatable.
        executor: ray, or the address of a Ray cluster: ray://HOST:PORT.
    """

    paths: Annotated[list[str], typer.Argument(show_default=False)]
    include: list[str] | None = None
    exclude: list[str] | None = None
    executor: Annotated[str | None, typer.Option(show_default=False)] = None

    def __post_init__(self) -> None:
        executor = self.executor
        if executor is not None and executor != "ray" and not executor.startswith("ray://"):
            raise InvalidInputError(
                f"Unknown executor {executor!r}.", "Choose ray, or an address like ray://HOST:PORT."
            )

    def found(self) -> tuple[list[DocumentFile], ReadReport]:
        """Files to read, and a report of those left out; without a file no index must be made."""
        from retrieval_draft.index.build.documents import ReadReport, find_files

        report = ReadReport()
        return find_files(
            self.paths, include=self.include or (), exclude=self.exclude or (), report=report
        ), report


@app.callback(invoke_without_command=True)
def _help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command("build")
@command
def build(
    building: Annotated[Building, Fields(...)],
    options: Annotated[BuildOptions, Fields(...)],
    tokenizer: Tokenizer,
    out: Annotated[Path, typer.Option("--out", help="The new index.", show_default=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing index.")] = False,
) -> Report:
    """Index text for drafting. After an interruption the same command continues."""
    found = building.found()
    encoder = load_encoder(tokenizer)
    from retrieval_draft.index.segments.index_folder import IndexFolder

    index = IndexFolder.create(out, encoder.fingerprint, encoder.vocabulary, encoder.name)
    if index.manifest.segments and not overwrite:
        raise DatastoreError(
            f"{out} is an index already, of {index.manifest.tokens} tokens.",
            "Add to it with index add, or replace it with --overwrite.",
        )
    return _fill(index, encoder, found, building.executor, options, overwrite)


@app.command("add")
@command
def add(
    building: Annotated[Building, Fields(...)],
    options: Annotated[BuildOptions, Fields(...)],
    out: Annotated[Path, typer.Option("--out", help="The index to add to.", show_default=False)],
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="By default the one the index was built with.")
    ] = None,
) -> Report:
    """Add text to an index. Readers see the old one until all is done."""
    from retrieval_draft.index.segments.index_folder import IndexFolder

    index = IndexFolder.open(out)
    found = building.found()
    encoder = load_encoder(tokenizer or named_tokenizer(index))
    return _fill(index, encoder, found, building.executor, options, False)


@app.command("merge")
@command
def merge(
    indexes: Annotated[list[Path], typer.Argument(help="Index folders.", show_default=False)],
    options: Annotated[BuildOptions, Fields("workers", "segment_tokens")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="The index that gets all texts. By default the first.", show_default=False
        ),
    ] = None,
) -> Report:
    """Join indexes of one tokenizer, and small segments into larger ones."""
    from retrieval_draft._progress import progress
    from retrieval_draft.index.build.merge import merge_indexes
    from retrieval_draft.index.segments.index_folder import IndexFolder

    opened = [IndexFolder.open(path) for path in indexes]
    paths = [index.path.resolve() for index in opened]
    if len(set(paths)) < len(paths):
        raise InvalidInputError("An index is named twice.", "Name each once.")
    first = opened[0].manifest
    target = opened[0]
    if out is not None:
        target = IndexFolder.create(out, first.fingerprint, first.vocabulary_size, first.tokenizer)
    sources = [index for index in opened if index.path.resolve() != target.path.resolve()]
    total = sum(index.manifest.tokens for index in (target, *sources))
    with progress("Merging", total) as advance:
        merge_indexes(target, sources, options.most, options.workers, advance)
    return _summary(target, {})


def _fill(
    index: IndexFolder,
    encoder: Encoder,
    found: tuple[list[DocumentFile], ReadReport],
    executor: str | None,
    options: BuildOptions,
    replace: bool,
) -> Report:
    """Fills an index, for build and add."""
    from retrieval_draft.cli._build_progress import build_progress
    from retrieval_draft.index.build.builder import build_index

    files, report = found
    # Read by the tokenizer's thread pool when it starts.
    os.environ.setdefault("RAYON_NUM_THREADS", str(options.workers))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    begin = time.perf_counter()
    with build_progress(len(files), sum(file.nbytes for file in files)) as watch:
        if executor is None:
            state = build_index(index, files, encoder, options, watch, replace)
        else:
            from retrieval_draft.index.build.shards import build_on_ray

            address = None if executor == "ray" else executor
            state = build_on_ray(index, files, encoder, options, address, watch, replace)
    report.merge(state.report)
    return _summary(index, _build_facts(state, report, len(files), time.perf_counter() - begin))


def _build_facts(state: BuildState, report: ReadReport, files: int, seconds: float) -> dict[str, Any]:
    return {
        "files": files,
        "read_documents": report.documents,
        "resumed_documents": state.resumed,
        "skipped": report.skipped,
        "skipped_why": dict(report.reasons),
        "skipped_first": list(report.named),
        "seconds": seconds,
    }


def _summary(index: IndexFolder, facts: dict[str, Any]) -> Report:
    manifest = index.manifest
    result = {
        "out": str(index.path),
        "tokens": manifest.tokens,
        "documents": manifest.documents,
        "segments": len(manifest.segments),
        "nbytes": manifest.nbytes,
        **facts,
    }
    each = manifest.nbytes / manifest.tokens if manifest.tokens else 0.0
    lines = [
        f"{index.path}: {manifest.tokens:,} tokens of {manifest.documents:,} documents in "
        f"{len(manifest.segments)} segments, {each:.2f} bytes a token"
    ]
    if facts.get("resumed_documents"):
        lines.append(f"went on behind {facts['resumed_documents']:,} documents of an interrupted build")
    if facts.get("skipped"):
        why = ", ".join(f"{count} {reason}" for reason, count in facts["skipped_why"].items())
        lines.append(f"left out {facts['skipped']}: {why}; for instance")
        lines += [f"  {name}" for name in facts["skipped_first"][:5]]
    return Report(result, lines)
