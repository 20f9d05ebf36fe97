"""Options of several commands."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrieval_draft._settings import field_docs
from retrieval_draft.cli.options import Fields
from retrieval_draft.config import DraftConfig
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.models.packaged import NAMES

if TYPE_CHECKING:
    from retrieval_draft.bench.prompts import Prompt
    from retrieval_draft.drafter import RetrievalDrafter
    from retrieval_draft.http.keys import KeyRing
    from retrieval_draft.index.store.config import StoreConfig

__all__ = [
    "Address",
    "Beside",
    "Chat",
    "KeyOptions",
    "ModelOptions",
    "Nodes",
    "PromptOptions",
    "SourceOptions",
    "drafting_fields",
    "ratio_range",
    "split",
    "text_of",
    "text_of_stdin",
]

Chat = Annotated[bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")]
Nodes = Annotated[int | None, typer.Option("--nodes", min=0, help=field_docs(DraftConfig)["nodes"])]
Beside = Annotated[int, typer.Option(min=0, help="Busy processes beside the measurement.")]


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """A model, and the form in which it is loaded.

    Attributes:
        model: A folder, a hub name, or the name of a packaged model.
        dtype: float32, bfloat16, float16 or auto.
        weights: int8 or int4: round the weights, by optimum-quanto.
        device: cpu, cuda, ... or auto. CUDA where there is one, by default.
    """

    model: Annotated[str, typer.Option(help=f"A folder, a hub name, {NAMES}.")]
    dtype: str = "float32"
    weights: Annotated[str | None, typer.Option(show_default=False)] = None
    device: str | None = None

    def check(self) -> None:
        """Checks the names, before torch is imported, which takes seconds.

        Raises:
            RetrievalDraftError: No such model can be, or no such weights.
        """
        from retrieval_draft.models.loading import check_name, check_weights

        check_name(self.model)
        check_weights(self.weights)

    def load(self) -> tuple[Any, Any]:
        """The model and its tokenizer."""
        from retrieval_draft.models.loading import load_model

        self.check()
        return load_model(self.model, dtype=self.dtype, device=self.device, weights=self.weights)


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """Draft sources that are files.

    Attributes:
        corpora: A corpus index to draft from.
        phrases: A file of fixed texts to draft from: one a line, or between lines of ---.
        draft_model: A smaller model or a trained head to draft with; "self": this one with layers skipped;
            "self:window": this one over a text's first and last tokens; "int8": its copy with rounded
            weights; "mtp": its layers for multi-token prediction.
    """

    corpora: Annotated[tuple[Path, ...], typer.Option("--index")] = ()
    phrases: Path | None = None
    draft_model: str | None = None

    def drafter(
        self, model: Any, tokenizer: Any, config: DraftConfig, store: StoreConfig | None
    ) -> RetrievalDrafter:
        """A drafter for a model."""
        from retrieval_draft.drafter import RetrievalDrafter

        return RetrievalDrafter.for_model(
            model, tokenizer, method=config.method, config=config, corpora=self.corpora,
            phrases=self.phrases, store=store, draft_model=self.draft_model,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class PromptOptions:
    """Prompts of a measurement.

    Attributes:
        prompts: JSON lines or Parquet: prompts, Spec-Bench, SPEED-Bench.
        limit: So many prompts, taken in turn from every task.
        tasks: Only these tasks, by commas.
        seed: Draws the prompts.
    """

    prompts: Annotated[list[Path], typer.Option(show_default=False)]
    limit: Annotated[int | None, typer.Option(min=1)] = None
    tasks: Annotated[str, typer.Option(show_default=False)] = ""
    seed: int = 0

    def read(self, default: Path | None = None) -> list[Prompt]:
        """The chosen prompts; those of `default` where no file is named."""
        from retrieval_draft.bench.prompts import read_prompts, spread

        files = self.prompts or ([] if default is None else [default])
        return spread(read_prompts(files), self.limit, split(self.tasks), self.seed)


@dataclass(frozen=True, slots=True)
class Address:
    """The address at which a server listens.

    Attributes:
        host: Address to listen on.
        port: 0 for any that is free.
        unix_socket: A unix socket to listen on, in place of host and port.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000
    unix_socket: Path | None = None


@dataclass(frozen=True, slots=True)
class KeyOptions:
    """API keys of a server.

    Attributes:
        api_key: KEY or KEY=TENANT, also in RETRIEVAL_DRAFT_API_KEYS.
        api_key_file: The same, one a line.
        no_auth: Accept requests without a key, on any address.
    """

    api_key: Annotated[list[str] | None, typer.Option(metavar="KEY")] = None
    api_key_file: Path | None = None
    no_auth: Annotated[bool, typer.Option("--no-auth")] = False

    def read(self, tenant: str) -> dict[str, str]:
        """Tenant by key; `tenant` for keys without one."""
        from retrieval_draft.http.keys import read_keys

        return read_keys(self.api_key or (), self.api_key_file, tenant)

    def ring(self, address: Address, tenant: str, max_tenants: int = 1024) -> KeyRing:
        """The keys; none only where they are not needed or turned off.

        Raises:
            InvalidInputError: Other machines could reach the server without a key, or there are too many
                tenants.
        """
        from retrieval_draft.http.keys import KEYS_VARIABLE, KeyRing, is_loopback

        keys = self.read(tenant)
        if self.no_auth and keys:
            raise InvalidInputError("There are API keys, and --no-auth.", "Leave one of them out.")
        reachable = address.unix_socket is None and not is_loopback(address.host)
        if not keys and not self.no_auth and reachable:
            raise InvalidInputError(
                f"Everybody who can reach {address.host} could use the server.",
                f"Set --api-key or {KEYS_VARIABLE}, or say --no-auth.",
            )
        ring = KeyRing(keys, tenant)
        if len(ring.tenants) > max_tenants:
            raise InvalidInputError(
                f"The API keys have {len(ring.tenants)} tenants.", f"One server has {max_tenants} at most."
            )
        return ring


def drafting_fields(*names: str, **defaults: Any) -> Fields:
    """Fields of `DraftConfig` that every command with a drafter has as options, and more of them by name."""
    return Fields(
        "method",
        "nodes",
        "exact",
        "draft_beside",
        *names,
        cpu_kernels="--cpu-kernels/--stock-kernels",
        history_folder=typer.Option("--history", metavar="PATH"),
        defaults=defaults,
    )


def ratio_range(ratio: dict[str, float] | None) -> str:
    """A median with its tenths; empty where there is none."""
    return "" if ratio is None else f"{ratio['median']:.2f} ({ratio['p10']:.2f}..{ratio['p90']:.2f})"


def split(words: str) -> list[str]:
    """The words between commas."""
    return [word.strip() for word in words.split(",") if word.strip()]


def text_of(argument: str) -> str:
    """A text from the command line.

    Raises:
        InvalidInputError: Its bytes are no text.
    """
    # Bytes that the terminal's encoding lacks arrive as halves of surrogate pairs.
    try:
        return os.fsencode(argument).decode() if not _is_text(argument) else argument
    except UnicodeError as error:
        raise InvalidInputError(
            f"The text {argument[:40]!a} has bytes that are neither {sys.getfilesystemencoding()} nor UTF-8.",
            "Write it in UTF-8, or set the locale (LC_ALL) to the terminal's encoding.",
        ) from error


def text_of_stdin() -> str:
    """All of stdin, in its declared encoding, else in UTF-8.

    Raises:
        InvalidInputError: It is in neither.
    """
    stdin = sys.stdin
    if stdin is None:
        return ""
    buffer = getattr(stdin, "buffer", None)
    if buffer is None:  # text already
        return stdin.read()
    content = buffer.read()
    for encoding in (stdin.encoding, "utf-8"):
        try:
            return str(content.decode(encoding))
        except (UnicodeDecodeError, LookupError):
            pass
    raise InvalidInputError(
        f"What stands on stdin is neither {stdin.encoding} nor UTF-8.",
        "Write it in UTF-8, or name its encoding in PYTHONIOENCODING.",
    )


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
