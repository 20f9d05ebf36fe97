"""Drafters that are saved to a folder and made again from it."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from retrieval_draft import DraftConfig, RetrievalDrafter, StoreConfig
from retrieval_draft.engine.pass_costs import PassCosts
from retrieval_draft.errors import (
    DatastoreError,
    InvalidInputError,
    RetrievalDraftError,
    TokenizerMismatchError,
)
from retrieval_draft.index.segments.index_folder import IndexFolder
from retrieval_draft.index.segments.segment import Segment
from retrieval_draft.index.store.redact import without_credentials
from retrieval_draft.models.fingerprint import tokenizer_fingerprint
from retrieval_draft.saved_drafter import FORMAT, SavedDrafter, _saved_store
from tests.support.models import make
from tests.support.tiny import TEXT, byte_tokenizer
from tests.support.tokenizers_for_tests import byte_level

TOKENIZER = byte_tokenizer()
MODEL = make("llama", vocab_size=len(TOKENIZER))
INPUTS = TOKENIZER(TEXT, return_tensors="pt")


def generated(drafter: RetrievalDrafter) -> torch.Tensor:
    return drafter.generate(**INPUTS, max_new_tokens=24, do_sample=False, pad_token_id=0)


def used(**options: Any) -> RetrievalDrafter:
    drafter = RetrievalDrafter.for_model(MODEL, TOKENIZER, **options)
    generated(drafter)
    return drafter


def loaded(folder: Path, **options: Any) -> RetrievalDrafter:
    return RetrievalDrafter.from_pretrained(folder, model=MODEL, tokenizer=TOKENIZER, **options)


def index(folder: Path) -> Path:
    """An index of the text of these tests."""
    made = IndexFolder.create(folder, tokenizer_fingerprint(TOKENIZER), len(TOKENIZER))
    tokens = np.array(TOKENIZER(TEXT)["input_ids"], np.int32)
    made.publish([made.write(Segment.build([tokens], len(TOKENIZER)))])
    return folder


def description(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "drafter.json").read_text())


def test_configuration_phrases_calibration_and_costs_come_back(tmp_path: Path) -> None:
    config = DraftConfig(max_nodes=7, sources=("automaton", "adjacency", "phrases"), top_k=3)
    with used(config=config, phrases=["the dog sat on the log", "x", "and the cat sat"]) as drafter:
        out = generated(drafter)
        drafter.save_pretrained(tmp_path / "drafter")
        learned = drafter.draft_engine.known()
    with loaded(tmp_path / "drafter") as again:
        assert again.config == config
        table = again.context.stores.phrases
        assert table is not None
        assert len(table) == 2
        assert torch.equal(generated(again), out)
        known = again.draft_engine.known()
        assert learned.calibration is not None
        assert known.calibration is not None
        for name in ("weights", "parameters", "expected", "accepted"):
            was, now = (getattr(each.calibration, name) for each in (learned, known))
            assert was.shape == now.shape
        # As saved, in float32, and not as shipped.
        fresh = loaded(tmp_path / "drafter").draft_engine._known
        np.testing.assert_array_equal(
            fresh.calibration.expected, learned.calibration.expected.astype(np.float32)
        )
        assert fresh.seconds == learned.seconds


def test_a_drafter_that_never_drafted_can_be_saved(tmp_path: Path) -> None:
    with RetrievalDrafter.for_model(MODEL) as drafter:
        drafter.save_pretrained(tmp_path)
    assert description(tmp_path)["calibration"] is None
    with RetrievalDrafter.from_pretrained(tmp_path, model=MODEL) as again:
        generated(again)


def test_costs_of_another_machine_are_measured_again(tmp_path: Path) -> None:
    with used() as drafter:
        drafter.save_pretrained(tmp_path)
    saved = description(tmp_path)
    assert loaded(tmp_path).draft_engine._known.seconds
    saved["costs"]["situation"]["machine"] = "another"
    (tmp_path / "drafter.json").write_text(json.dumps(saved))
    again = loaded(tmp_path)
    assert not again.draft_engine._known.seconds
    generated(again)
    assert again.draft_engine.known().seconds


def test_corpora_inside_the_folder_move_with_it(tmp_path: Path) -> None:
    home, outside = tmp_path / "drafter", tmp_path / "outside"
    home.mkdir()
    with used(corpora=[index(home / "index"), index(outside)]) as drafter:
        drafter.save_pretrained(home)
    assert description(home)["corpora"] == ["index", str(outside)]
    moved = tmp_path / "moved"
    home.rename(moved)
    with loaded(moved) as again:
        assert [corpus.folder.path for corpus in again.context.stores.corpora] == [moved / "index", outside]
    with loaded(moved, corpora=[]) as again:
        assert not again.context.stores.corpora
    shutil.rmtree(outside)
    with pytest.raises(DatastoreError, match="outside"):
        loaded(moved)


def test_no_secret_is_written(tmp_path: Path) -> None:
    store = StoreConfig(
        "redis://me:hunter2@127.0.0.1:1/3",
        tenant="acme",
        share="all",
        key="s3cr3t",
        snapshots=f"file://{tmp_path}/snapshots?secret=hunter3",
        timeout=0.1,
    )
    with RetrievalDrafter.for_model(MODEL, TOKENIZER, store=store) as drafter:
        drafter.save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "drafter.json").read_text()
    for secret in ("hunter2", "hunter3", "s3cr3t", "me:"):
        assert secret not in text
    assert description(tmp_path / "saved")["store"]["url"] == "redis://127.0.0.1:1/3"


def test_a_missing_key_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RETRIEVAL_DRAFT_STORE_KEY", raising=False)
    store = StoreConfig(f"embedded://{tmp_path / 'store'}", tenant="acme", key="s3cr3t")
    with RetrievalDrafter.for_model(MODEL, TOKENIZER, store=store) as drafter:
        drafter.save_pretrained(tmp_path / "saved")
    with (
        caplog.at_level(logging.WARNING, "retrieval_draft"),
        loaded(tmp_path / "saved", store=store) as again,
    ):
        assert again.store is not None
        assert again.store.config.tenant == "acme"
    assert "key" not in caplog.text
    with loaded(tmp_path / "saved") as again:
        assert again.store is not None
        assert (again.store.config.tenant, again.store.config.key) == ("acme", None)
    assert "RETRIEVAL_DRAFT_STORE_KEY" in caplog.text


def test_a_draft_model_is_not_kept_and_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with RetrievalDrafter.for_model(MODEL, TOKENIZER, draft_model="self") as drafter:
        drafter.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "retrieval_draft"), loaded(tmp_path, draft_model="self"):
        assert not caplog.text
        loaded(tmp_path).close()
    assert "draft_model=" in caplog.text


def test_the_history_folder_is_where_it_was_and_knows_better(tmp_path: Path) -> None:
    config = DraftConfig(history_folder=str(tmp_path / "history"))
    with used(config=config) as drafter:
        drafter.save_pretrained(tmp_path / "saved")
    with loaded(tmp_path / "saved") as again:
        generated(again)
        assert again.config.history_folder == str(tmp_path / "history")
        assert again.draft_engine._calibration is not again.draft_engine._known.calibration


def test_saving_again_leaves_one_calibration(tmp_path: Path) -> None:
    with used() as drafter:
        drafter.save_pretrained(tmp_path)
        generated(drafter)
        drafter.save_pretrained(tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == sorted([description(tmp_path)["calibration"][0], "drafter.json"])


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    with used() as drafter:
        drafter.save_pretrained(tmp_path)
    with pytest.raises(TokenizerMismatchError, match=r"fingerprint .* 258 ids; this one .* \d+ ids"):
        RetrievalDrafter.from_pretrained(tmp_path, model=MODEL, tokenizer=byte_level(()))


def test_unknown_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"'methods'.*draft_model, phrases, store"):
        loaded(tmp_path, methods="none")


def _set(name: str, value: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))

    return change


def _tear_calibration(path: Path) -> None:
    calibration = path.parent / description(path.parent)["calibration"][0]
    calibration.write_bytes(calibration.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "drafter.json is missing"),
        (lambda path: path.write_text(path.read_text()[:-20]), "torn"),
        (lambda path: path.write_text("[1]"), "describes no drafter"),
        (_set("format", "something"), "describes no drafter"),
        (_set("format_version", 2), "format version 2; this release reads 1"),
        (_set("config", {"method": "guessing"}), "Unknown method 'guessing'"),
        (_set("corpora", 3), "corpora"),
        (_set("calibration", ["missing.safetensors", "00"]), "missing.safetensors is missing"),
        (_tear_calibration, "altered"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    with used() as drafter:
        drafter.save_pretrained(tmp_path)
    damage(tmp_path / "drafter.json")
    with pytest.raises(DatastoreError, match=message) as caught:
        loaded(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.hint


def test_a_crash_before_the_description_leaves_the_old_drafter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with used() as drafter:
        drafter.save_pretrained(tmp_path)
        before = description(tmp_path)
        generated(drafter)

        def fail(*args: Any) -> None:
            raise OSError("disk full")

        monkeypatch.setattr("retrieval_draft.saved_drafter.replace_file", fail)
        with pytest.raises(OSError, match="disk full"):
            drafter.save_pretrained(tmp_path)
    assert description(tmp_path) == before
    loaded(tmp_path).close()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://host:6379/2", "redis://host:6379/2"),
        ("redis://u:p@host", "redis://host"),
        ("rediss://:p@h/0?ssl_keyfile=/k&db=1", "rediss://h/0?ssl_keyfile=/k&db=1"),
        ("redis+sentinel://a:1,b:2/m?sentinel_password=x", "redis+sentinel://a:1,b:2/m"),
        ("unix:///run/redis.sock?db=1", "unix:///run/redis.sock?db=1"),
        ("s3://id:key@bucket/x?token=1&region=eu", "s3://bucket/x?region=eu"),
        ("/some/folder", "/some/folder"),
    ],
)
def test_urls_lose_their_secrets_only(url: str, shown: str) -> None:
    assert without_credentials(url) == shown


def odd_values(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every field of a description."""
    inside = document.items() if isinstance(document, dict) else enumerate(document)
    for name, each in inside if isinstance(document, (dict, list)) else ():
        yield (*path, name)
        if isinstance(each, (dict, list)):
            yield from odd_values(each, (*path, name))


def test_a_description_may_say_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded, or refused with an error of this package; nothing else is raised."""
    monkeypatch.setattr(RetrievalDrafter, "for_model", lambda *given, **named: made.append(named) or drafter)
    made: list[dict[str, Any]] = []
    store = StoreConfig("redis://127.0.0.1:1", tenant="acme")
    engine = SimpleNamespace(start_from=lambda known: None)
    drafter = SimpleNamespace(draft_engine=engine, target=None, config=DraftConfig())
    saved = SavedDrafter(
        format=FORMAT, format_version=1, library_version="1", created="now", vocabulary=300, fingerprint="",
        tokens=300, config=DraftConfig(), corpora=["index"], phrases=[[1, 2, 3]],
        store=_saved_store(store), draft_models=0, calibration=("calibration-0.safetensors", "0" * 32),
        costs=PassCosts({"machine": "mine"}, {1: 0.5}),
    )  # fmt: skip
    monkeypatch.setattr("retrieval_draft.saved_drafter.situation", lambda *_: {})
    document = msgspec.json.decode(msgspec.json.encode(saved))
    document["calibration"] = None
    path = tmp_path / "drafter.json"
    odd = [
        None,
        -1,
        0,
        2**31,
        2**62,
        10**30,
        0.5,
        1e300,
        True,
        "",
        "x",
        "../..",
        "\0",
        [],
        [-1],
        {},
        {"x": {}},
        [[10**12]],
    ]
    for where in odd_values(document):
        parent = document
        for name in where[:-1]:
            parent = parent[name]
        kept = parent[where[-1]]
        for value in odd:
            parent[where[-1]] = value
            path.write_text(json.dumps(document))
            with contextlib.suppress(RetrievalDraftError):
                loaded(tmp_path)
        parent[where[-1]] = kept
    document["calibration"] = ["../../calibration", "0" * 32]
    path.write_text(json.dumps(document))
    with pytest.raises(DatastoreError, match="is missing"):
        loaded(tmp_path)
    for content in (b"", b"[" * 100_000, b"\xff", b'"\xff"', b"null", b"{}"):
        path.write_bytes(content)
        with pytest.raises(DatastoreError, match=r"drafter\.json"):
            loaded(tmp_path)
    assert made  # some descriptions could be used
