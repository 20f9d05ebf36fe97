"""``python -m benchmarks tokenizers``: drafts from a model whose tokenizer is not the target's."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from retrieval_draft.cli.common import split
from retrieval_draft.cli.options import Report, Table, measurement
from retrieval_draft.errors import InvalidInputError

__all__ = ["tokenizers"]

TEXTS = Path(__file__).parents[1] / "languages.json"


@measurement
def tokenizers(
    names: Annotated[
        str, typer.Option("--tokenizers", help="Models or folders, by commas; each drafts for each other.")
    ] = "gemma3-270m,smollm2-135m",
    texts: Annotated[
        Path,
        typer.Option(help='JSON, {"language": "text", ...}; the first is compared with.', show_default=False),
    ] = TEXTS,
    depth: Annotated[int, typer.Option(min=1, help="Tokens of the draft model in a step.")] = 6,
) -> Report:
    """Draft texts of several languages through pairs of tokenizers, by a model that knows them."""
    from benchmarks.tokenizers import measure_tokenizers

    chosen = split(names)
    if len(chosen) < 2:
        raise InvalidInputError(f"--tokenizers names {len(chosen)}.", "Name two or more.")
    result = measure_tokenizers({name: _tokenizer(name) for name in chosen}, _read(texts), depth=depth)
    tables = [
        Table(
            f"{pair['draft']} drafts for {pair['target']}: {pair['shared']:,} of its {pair['tokens']:,} "
            f"tokens are shared, {pair['beyond_ascii_shared']:,} of {pair['beyond_ascii']:,} beyond ASCII",
            ("text", "mode", "tokens per step", "of the first text's"),
            [
                (name, mode, f"{value:.2f}", f"{pair['to_first'][mode][name]:.3f}")
                for mode, found in pair["tokens_per_step"].items()
                for name, value in found.items()
            ],
        )
        for pair in result["pairs"]
    ]
    return Report(result, tables)


def _tokenizer(name: str) -> Any:
    """The tokenizer of a model, or of a folder with nothing but a tokenizer.json."""
    from retrieval_draft.models.loading import load_tokenizer

    file = Path(name) / "tokenizer.json"
    if not file.is_file():
        return load_tokenizer(name)
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(file))


def _read(path: Path) -> dict[str, str]:
    try:
        found = json_module.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"Cannot read the texts {path}: {error}.") from error
    if (
        not isinstance(found, dict)
        or not found
        or not all(isinstance(text, str) and text for text in found.values())
    ):
        raise InvalidInputError(f"{path} holds no texts.", 'Write {"language": "text", ...}.')
    return found
