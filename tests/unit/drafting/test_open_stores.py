"""Tests of what a drafter drafts from besides the request."""

import numpy as np
import pytest
import torch

from retrieval_draft import RetrievalDrafter
from retrieval_draft.config import DraftConfig
from retrieval_draft.errors import DatastoreError, InvalidInputError, TokenizerMismatchError
from retrieval_draft.index.corpus import Corpus
from retrieval_draft.index.segments.index_folder import IndexFolder
from retrieval_draft.index.segments.segment import Segment
from retrieval_draft.models.fingerprint import tokenizer_fingerprint
from tests.support.models import make
from tests.support.tiny import byte_tokenizer

PROMPT = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make("llama", vocab_size=len(tokenizer))


@pytest.fixture(scope="module")
def reply(model) -> np.ndarray:
    out = model.generate(PROMPT, max_new_tokens=40, do_sample=False)
    return out[0, PROMPT.shape[1] :].numpy().astype(np.int32)


def index(path, tokenizer, *texts: np.ndarray) -> IndexFolder:
    made = IndexFolder.create(path, tokenizer_fingerprint(tokenizer), len(tokenizer))
    made.publish([made.write(Segment.build(texts, len(tokenizer)))])
    return made


def generate(drafter: RetrievalDrafter) -> list[int]:
    out = drafter.generate(PROMPT, max_new_tokens=40, do_sample=False)
    return out[0, PROMPT.shape[1] :].tolist()


def only(*sources: str, **options) -> DraftConfig:
    return DraftConfig(nodes=16, sources=sources, **options)


def test_a_corpus_is_drafted_from(tmp_path, model, tokenizer, reply) -> None:
    folder = index(tmp_path / "i", tokenizer, reply).path
    for corpora in ([folder], folder, str(folder), [Corpus.open(folder)]):
        drafter = RetrievalDrafter.for_model(model, tokenizer, config=only("corpus"), corpora=corpora)
        assert generate(drafter) == reply.tolist()
        assert drafter.stats.accepted_by_level["corpus"] > 20
        assert drafter.stats.drafted_by_level["corpus"] >= drafter.stats.accepted_by_level["corpus"]
        assert drafter.stats.steps < 20


def test_an_index_without_text_is_told(tmp_path, caplog, model, tokenizer) -> None:
    """As a first build leaves it that ends early: a reader would think that a corpus does not help."""
    IndexFolder.create(tmp_path / "empty", tokenizer_fingerprint(tokenizer), len(tokenizer))
    with RetrievalDrafter.for_model(model, tokenizer, corpora=[tmp_path / "empty"]) as drafter:
        drafter.generate(PROMPT, max_new_tokens=4)
    assert f"{tmp_path / 'empty'} holds no text" in caplog.text


def test_several_corpora(tmp_path, model, tokenizer, reply) -> None:
    folders = [
        index(tmp_path / "a", tokenizer, reply[:20]).path,
        index(tmp_path / "b", tokenizer, reply[15:]).path,
    ]
    drafter = RetrievalDrafter.for_model(model, tokenizer, config=only("corpus"), corpora=folders)
    assert generate(drafter) == reply.tolist()
    assert drafter.stats.steps < 20


def test_the_second_time_comes_from_the_history(model, reply) -> None:
    with RetrievalDrafter.for_model(model, config=only("history")) as drafter:
        assert generate(drafter) == reply.tolist()
        assert drafter.last_stats.accepted == 0
        drafter.flush()
        assert generate(drafter) == reply.tolist()
        assert drafter.last_stats.accepted_by_level["history"] > 20


def test_a_history_on_disk_outlives_the_drafter(tmp_path, model, tokenizer, reply) -> None:
    config = only("history", history_folder=str(tmp_path / "h"))
    with RetrievalDrafter.for_model(model, tokenizer, config=config) as drafter:
        generate(drafter)
    with RetrievalDrafter.for_model(model, tokenizer, config=config) as drafter:
        assert generate(drafter) == reply.tolist()
        assert drafter.last_stats.accepted_by_level["history"] > 20


def test_phrases_are_drafted_from(tmp_path, model, tokenizer) -> None:
    (tmp_path / "p.txt").write_text("the cat sat on the mat and the dog\n")
    for phrases in (tmp_path / "p.txt", str(tmp_path / "p.txt"), ["the cat sat on the mat and the dog"]):
        drafter = RetrievalDrafter.for_model(model, tokenizer, config=only("phrases"), phrases=phrases)
        session = drafter.draft_engine._hierarchy.open(
            np.array(tokenizer("the cat sat")["input_ids"], np.int32)
        )
        [proposal] = session.propose(4)
        assert tokenizer.decode(proposal.tokens.tolist()) == " on "


def test_without_a_tokenizer(tmp_path, model, tokenizer, reply) -> None:
    folder = index(tmp_path / "i", tokenizer, reply).path
    with pytest.raises(InvalidInputError, match="corpora needs the model's tokenizer"):
        RetrievalDrafter.for_model(model, corpora=[folder])
    with pytest.raises(InvalidInputError, match="phrases needs"):
        RetrievalDrafter.for_model(model, phrases=["some text"])


def test_what_is_wrong_is_told_before_anything_is_generated(tmp_path, model, tokenizer) -> None:
    with pytest.raises(DatastoreError, match="no index"):
        RetrievalDrafter.for_model(model, tokenizer, corpora=[tmp_path])
    IndexFolder.create(tmp_path / "other", "0" * 32, len(tokenizer))
    with pytest.raises(TokenizerMismatchError, match="fingerprint"):
        RetrievalDrafter.for_model(model, tokenizer, corpora=[tmp_path / "other"])
    with pytest.raises(InvalidInputError, match="texts"):
        RetrievalDrafter.for_model(model, tokenizer, phrases=[3])
    with pytest.raises(InvalidInputError, match="history_bytes"):
        DraftConfig(history_bytes=3)


def test_an_index_that_changes_under_a_reader_fails_no_generation(tmp_path, model, tokenizer, reply) -> None:
    made = index(tmp_path / "i", tokenizer, reply)
    drafter = RetrievalDrafter.for_model(model, tokenizer, config=only("corpus"), corpora=[made.path])
    made.publish([])
    made.sweep()
    assert generate(drafter) == reply.tolist()


def test_fingerprints_tell_vocabularies_apart(tokenizer) -> None:
    class Other:
        def get_vocab(self) -> dict[str, int]:
            changed = dict(tokenizer.get_vocab())
            changed["a"], changed["b"] = changed["b"], changed["a"]
            return changed

    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(tokenizer.backend_tokenizer)
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(Other())


def test_calibration_is_kept_beside_the_history(tmp_path, caplog, model, tokenizer):
    config = DraftConfig(nodes=8, history_folder=str(tmp_path))
    with RetrievalDrafter.for_model(model, tokenizer, config=config) as drafter:
        drafter.generate(PROMPT, max_new_tokens=40, do_sample=False)
    file = tmp_path / "calibration.safetensors"
    again = RetrievalDrafter.for_model(model, tokenizer, config=config)
    again.warm_up()
    learned, known = (d.draft_engine._calibration.expected for d in (drafter, again))
    assert learned.sum() > 0
    np.testing.assert_allclose(known, learned, rtol=1e-5)
    again.close()
    file.write_bytes(b"torn")
    third = RetrievalDrafter.for_model(model, tokenizer, config=config)
    third.generate(PROMPT, max_new_tokens=10, do_sample=False)
    third.close()
    assert "starts afresh" in caplog.text
    assert len(file.read_bytes()) > 1000, "and is whole again"
