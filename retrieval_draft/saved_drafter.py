"""A drafter's configuration, calibration and measurements in a folder."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from retrieval_draft import __version__
from retrieval_draft._files import file_checksum, read_bounded, replace_file
from retrieval_draft.config import DraftConfig
from retrieval_draft.drafting.calibration import Calibration
from retrieval_draft.engine.draft_engine import LearnedState
from retrieval_draft.engine.pass_costs import PassCosts, situation
from retrieval_draft.errors import DatastoreError, InvalidInputError, TokenizerMismatchError
from retrieval_draft.index.phrases import PhraseTable
from retrieval_draft.index.store.config import StoreConfig
from retrieval_draft.index.store.redact import without_credentials
from retrieval_draft.index.store.store import KEY_VARIABLE
from retrieval_draft.index.store.url import parse_store_url
from retrieval_draft.models.fingerprint import tokenizer_fingerprint, vocabulary_size

if TYPE_CHECKING:
    from retrieval_draft.drafter import RetrievalDrafter

__all__ = ["FORMAT", "SavedDrafter", "SavedStore", "load_drafter", "save_drafter"]

DRAFTER = "drafter.json"
FORMAT = "retrieval_draft drafter"
FORMAT_VERSION = 1
_MAX_BYTES = 1 << 30
"""Largest size of a description: phrases of a hundred million tokens."""

_AGAIN = "Save the drafter again, or copy the whole folder."
_log = logging.getLogger("retrieval_draft")


class SavedStore(msgspec.Struct):
    """The store that servers share, without its secrets.

    Attributes:
        url: Without user and password.
        snapshots: A folder or URL, likewise.
        signed: Whether there was a key, which the caller must provide to load this.
        options: The other fields of `StoreConfig`.
    """

    url: str
    snapshots: str | None
    signed: bool
    options: dict[str, Any]


class SavedDrafter(msgspec.Struct, kw_only=True):
    """The description of a drafter. It may be edited by hand.

    Attributes:
        format: Kind of the file.
        format_version: Of the file.
        library_version: Version that wrote it.
        created: Time of creation, UTC.
        vocabulary: Rows of the model's embedding.
        fingerprint: Of the tokenizer; empty without one.
        tokens: Number of the tokenizer's ids.
        config: The drafting configuration.
        corpora: Index folders; relative ones lie in this folder.
        phrases: Token ids of the fixed texts; null for none.
        store: Store that servers share; null without one.
        draft_models: Number of draft models, which are not saved.
        calibration: File and checksum (xxh3, 128 bits); null before the first draft.
        costs: Measured costs; null before the first measurement.
    """

    format: str
    format_version: int
    library_version: str
    created: str
    vocabulary: int
    fingerprint: str
    tokens: int
    config: DraftConfig
    corpora: list[str]
    phrases: list[list[int]] | None
    store: SavedStore | None
    draft_models: int
    calibration: tuple[str, str] | None
    costs: PassCosts | None


def save_drafter(drafter: RetrievalDrafter, folder: str | Path) -> None:
    """Writes a drafter for `load_drafter`. The description is last, so that a reader never sees half of it.

    Args:
        drafter: Any.
        folder: Made if it is missing.

    Raises:
        OSError: It cannot be written.
    """
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    parts, tokenizer = drafter.context, drafter.tokenizer
    known = drafter.draft_engine.known()
    calibration = None if known.calibration is None else _write_calibration(known.calibration, home)
    config = parts.config
    if config.history_folder is not None:
        config = replace(config, history_folder=str(Path(config.history_folder).absolute()))
    store = parts.stores.shared
    saved = SavedDrafter(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        library_version=__version__,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        vocabulary=drafter.target.embedding_rows,
        fingerprint="" if tokenizer is None else tokenizer_fingerprint(tokenizer),
        tokens=0 if tokenizer is None else vocabulary_size(tokenizer),
        config=config,
        corpora=[_portable(corpus.folder.path, home) for corpus in parts.stores.corpora],
        phrases=_phrases(parts.stores.phrases),
        store=None if store is None else _saved_store(store.config),
        draft_models=len(parts.models),
        calibration=calibration,
        costs=PassCosts(situation(drafter.target, config), known.seconds) if known.seconds else None,
    )
    text = msgspec.json.format(msgspec.json.encode(saved), indent=1)
    replace_file(home / DRAFTER, text + b"\n")
    for old in home.glob("calibration-*.safetensors"):
        if calibration is None or old.name != calibration[0]:
            old.unlink(missing_ok=True)


def load_drafter(
    kind: type[RetrievalDrafter], folder: str | Path, model: Any, tokenizer: Any, given: dict[str, Any]
) -> RetrievalDrafter:
    """Makes a drafter from a folder of `save_drafter`.

    Args:
        kind: The class of the drafter.
        folder: The folder.
        model: Any; calibration fits the model best that it was learned with.
        tokenizer: The model's.
        given: Arguments of ``for_model`` that override the saved ones.

    Raises:
        DatastoreError: A file is missing, torn, foreign or of a newer format.
        TokenizerMismatchError: The drafter was saved with another tokenizer.
        InvalidInputError: An unknown argument.
    """
    unknown = given.keys() - {"corpora", "phrases", "store", "draft_model", "config"}
    if unknown:
        raise InvalidInputError(
            f"from_pretrained knows no argument {min(unknown)!r}.",
            "Choose from: config, corpora, draft_model, phrases, store.",
        )
    home = Path(folder)
    saved = _read(home / DRAFTER)
    _check_tokenizer(saved, tokenizer, home)
    calibration = _read_calibration(saved, home)
    signed = saved.store is not None and saved.store.signed
    if signed and "store" not in given and not os.environ.get(KEY_VARIABLE):
        _log.warning(
            "The store of %s has a key, which is not kept: pass store=, or set %s.", home, KEY_VARIABLE
        )
    if saved.draft_models and "draft_model" not in given:
        _log.warning("%s was saved with a draft model, which it does not hold: pass draft_model=.", home)
    options: dict[str, Any] = {
        "config": saved.config,
        "corpora": [home / path for path in saved.corpora],  # an absolute path stays as it is
        "phrases": _table(saved.phrases),
        "store": None if saved.store is None else _store_config(saved.store),
        **given,
    }
    drafter = kind.for_model(model, tokenizer, **options)
    costs = saved.costs
    seconds = {} if costs is None else costs.seconds_in(situation(drafter.target, drafter.config))
    drafter.draft_engine.start_from(LearnedState(calibration, seconds))
    return drafter


def _read(path: Path) -> SavedDrafter:
    try:
        content = read_bounded(path, _MAX_BYTES)
    except FileNotFoundError as error:
        raise DatastoreError(f"{path} is missing.", "Name a folder that save_pretrained wrote.") from error
    except (OSError, ValueError) as error:
        raise DatastoreError(f"{path} cannot be read: {error}.", _AGAIN) from error
    try:
        head = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DatastoreError(f"{path} is torn: found {error}, expected JSON.", _AGAIN) from error
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise DatastoreError(
            f"{path} describes no drafter: its format should be {FORMAT!r}.",
            "Name a folder that RetrievalDrafter.save_pretrained wrote.",
        )
    if head.get("format_version") != FORMAT_VERSION:
        raise DatastoreError(
            f"{path} has format version {head.get('format_version')}; this release reads {FORMAT_VERSION}.",
            "Use the release of retrieval_draft that wrote it, or save the drafter again.",
        )
    try:
        saved = msgspec.convert(head, SavedDrafter, strict=True, str_keys=True)
    except msgspec.ValidationError as error:
        raise DatastoreError(f"{path} cannot be used: {error}.", _AGAIN) from error
    _check(saved, path)
    return saved


def _check(saved: SavedDrafter, path: Path) -> None:
    """Checks values beyond their types against those that `save_drafter` can have written."""
    ids = [token for phrase in saved.phrases or () for token in phrase]
    seconds = [] if saved.costs is None else list(saved.costs.seconds.values())
    wrong = (
        (
            "an id in phrases",
            next((token for token in ids if not 0 <= token < 2**31), None),
            "in 0..2^31 - 1",
        ),
        (
            "a time in costs",
            next((each for each in seconds if not 0.0 < each < 1e6), None),
            "a time in seconds",
        ),
        ("vocabulary", None if 0 < saved.vocabulary < 2**31 else saved.vocabulary, "in 1..2^31 - 1"),
        ("tokens", None if 0 <= saved.tokens < 2**31 else saved.tokens, "in 0..2^31 - 1"),
    )
    for what, found, allowed in wrong:
        if found is not None:
            raise DatastoreError(f"{path}: {what} is {found}; it must be {allowed}.", _AGAIN)
    if saved.store is not None:
        try:
            _store_config(saved.store)
        except (TypeError, ValueError) as error:
            raise DatastoreError(f"{path}: its store cannot be used: {error}", _AGAIN) from error


def _check_tokenizer(saved: SavedDrafter, tokenizer: Any, home: Path) -> None:
    if tokenizer is None or not saved.fingerprint:
        return
    found = tokenizer_fingerprint(tokenizer)
    if found != saved.fingerprint:
        raise TokenizerMismatchError(
            f"The drafter in {home} was saved with a tokenizer of fingerprint {saved.fingerprint} and "
            f"{saved.tokens} ids; this one has fingerprint {found} and {vocabulary_size(tokenizer)} ids.",
            "Load the tokenizer that it was saved with.",
        )


def _write_calibration(calibration: Calibration, home: Path) -> tuple[str, str]:
    """Writes the calibration under a name from its content, so that older descriptions stay valid."""
    scratch = home / "calibration.safetensors"
    calibration.save(scratch)
    checksum = file_checksum(scratch)
    name = f"calibration-{checksum[:16]}.safetensors"
    scratch.replace(home / name)
    return name, checksum


def _read_calibration(saved: SavedDrafter, home: Path) -> Calibration | None:
    if saved.calibration is None:
        return None
    name, expected = saved.calibration
    path = home / Path(name).name
    if not path.is_file():
        raise DatastoreError(f"{path} is missing; {DRAFTER} names it.", _AGAIN)
    found = file_checksum(path)
    if found != expected:
        raise DatastoreError(f"{path} was altered: found checksum xxh3 {found}, expected {expected}.", _AGAIN)
    calibration = Calibration()
    calibration.load(path)
    return calibration


def _portable(path: Path, home: Path) -> str:
    """Path relative to the folder if it lies in it, so that both can be moved; else absolute."""
    whole, base = path.absolute(), home.absolute()
    return str(whole.relative_to(base)) if whole.is_relative_to(base) else str(whole)


def _table(phrases: list[list[int]] | None) -> PhraseTable | None:
    return None if phrases is None else PhraseTable([np.array(phrase, np.int32) for phrase in phrases])


def _phrases(table: PhraseTable | None) -> list[list[int]] | None:
    if table is None:
        return None
    tokens = np.frombuffer(table.flat, np.int32)
    return [part.tolist() for part in np.split(tokens, list(table.ends)[:-1])] if len(table) else []


def _saved_store(config: StoreConfig) -> SavedStore:
    apart = ("url", "key", "snapshots")
    options = {name: value for name, value in asdict(config).items() if name not in apart}
    snapshots = None if config.snapshots is None else without_credentials(str(config.snapshots))
    parsed = parse_store_url(config.url)
    url = without_credentials(config.url)
    if parsed.kind == "embedded" and parsed.path is not None:
        url = f"embedded://{parsed.path.absolute()}"
    return SavedStore(url, snapshots, config.key is not None, options)


def _store_config(saved: SavedStore) -> StoreConfig:
    known = {field.name for field in fields(StoreConfig)}
    options = {name: value for name, value in saved.options.items() if name in known}
    return StoreConfig(saved.url, snapshots=saved.snapshots, **options)
