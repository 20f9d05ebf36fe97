"""The draft model under the real engine, on a tiny float32 model: the text is the same with any draft."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

llama_cpp = pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")

from retrieval_draft.errors import DatastoreError, ModelFileError, TokenizerMismatchError  # noqa: E402
from retrieval_draft.index.segments.index_folder import IndexFolder  # noqa: E402
from retrieval_draft.index.segments.segment import Segment  # noqa: E402
from retrieval_draft.integrations.llama_cpp import GgufTokenizer, RetrievalDraftModel  # noqa: E402
from retrieval_draft.models.fingerprint import tokenizer_fingerprint, vocabulary_size  # noqa: E402
from tests.integrations.llama_cpp.tiny_gguf import VOCABULARY, write_tiny  # noqa: E402

PROMPTS = ["the cat sat on the mat", "a b a b a b a", "zebra", "the cat sat on the mat and the cat"]
FLOAT32 = 0


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny(tmp_path_factory.mktemp("gguf") / "tiny.gguf"))


def engine(path: str, draft_model: Any = None, **options: Any) -> Any:
    return llama_cpp.Llama(
        path, n_ctx=512, n_threads=1, n_threads_batch=1, type_k=FLOAT32, type_v=FLOAT32, verbose=False,
        draft_model=draft_model, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def plain(path: str) -> Any:
    return engine(path)


@pytest.fixture(params=[{}, {"num_pred_tokens": 10}, {"num_pred_tokens": 40}, {"max_tokens": 3}])
def drafted(request: Any, path: str) -> Iterator[tuple[Any, RetrievalDraftModel]]:
    with RetrievalDraftModel.for_gguf(path, **request.param) as drafts:
        yield engine(path, drafts), drafts


def reply(llama: Any, prompt: list[int], new: int = 80, **options: Any) -> list[int]:
    emitted = []
    for token in llama.generate(prompt, **{"temp": 0.0, **options}):
        emitted.append(token)
        if len(emitted) == new:
            break
    return emitted


def test_a_draft_model_is_one_to_the_engine(path: str) -> None:
    with RetrievalDraftModel.for_gguf(path) as drafts:
        assert isinstance(drafts, llama_cpp.llama_speculative.LlamaDraftModel)


def test_greedy_text_is_the_same(plain: Any, drafted: tuple[Any, RetrievalDraftModel]) -> None:
    llama, drafts = drafted
    for prompt in (*PROMPTS, *PROMPTS):  # twice: the second time with a history
        ids = llama.tokenize(prompt.encode())
        assert reply(llama, ids) == reply(plain, ids)
    drafts.finish()
    assert drafts.stats.requests == 8
    assert drafts.stats.accepted > 100


@pytest.mark.parametrize(
    "options",
    [
        {"temp": 0.7},
        {"temp": 1.2, "top_k": 20, "top_p": 0.8},
        {"temp": 0.9, "repeat_penalty": 1.3, "presence_penalty": 0.2},
        {"temp": 0.0, "repeat_penalty": 1.3},
        {"temp": 0.8, "mirostat_mode": 2},
    ],
)
def test_sampled_text_of_a_seed_is_the_same(path: str, plain: Any, options: dict[str, Any]) -> None:
    with RetrievalDraftModel.for_gguf(path, num_pred_tokens=8) as drafts:
        llama = engine(path, drafts)
        for seed, prompt in enumerate(PROMPTS):
            ids = llama.tokenize(prompt.encode())
            for each in (llama, plain):
                each.set_seed(seed)
            assert reply(llama, ids, **options) == reply(plain, ids, **options)
        drafts.finish()
        assert drafts.stats.drafted > 50


def test_a_grammar_holds_and_advances_once_a_token(path: str, plain: Any) -> None:
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= ("ab" | "ba" | "c")*', verbose=False)
    with RetrievalDraftModel.for_gguf(path, num_pred_tokens=8) as drafts:
        llama = engine(path, drafts)
        ids = llama.tokenize(b"ab")
        assert reply(llama, ids, 40, grammar=grammar) == reply(plain, ids, 40, grammar=grammar)


def test_conversations_and_abandoned_replies(plain: Any, drafted: tuple[Any, RetrievalDraftModel]) -> None:
    llama, drafts = drafted
    text = llama.tokenize(b"the cat sat")
    for turn in range(4):
        emitted = reply(llama, text, 30)
        assert emitted == reply(plain, text, 30)
        reply(llama, llama.tokenize(b"something else"), 3)  # left after three tokens
        text = text + emitted[:20] + llama.tokenize(f" turn {turn}".encode(), add_bos=False)
    drafts.finish()
    assert drafts.stats.requests == 8


def test_completions_stop_and_stream_alike(plain: Any, drafted: tuple[Any, RetrievalDraftModel]) -> None:
    llama, _ = drafted
    options = {"prompt": "the cat", "max_tokens": 60, "temperature": 0.0}
    expected = plain.create_completion(**options)
    found = llama.create_completion(**options)
    assert found["choices"][0]["text"] == expected["choices"][0]["text"]
    assert found["usage"] == expected["usage"]
    streamed = [
        "".join(part["choices"][0]["text"] for part in each.create_completion(**options, stream=True))
        for each in (llama, plain)
    ]
    assert streamed[0] == streamed[1]
    options["stop"] = [expected["choices"][0]["text"][10:12]]
    assert llama.create_completion(**options)["choices"] == plain.create_completion(**options)["choices"]


def test_the_end_of_the_context(plain: Any, drafted: tuple[Any, RetrievalDraftModel]) -> None:
    llama, _ = drafted
    ids = [1, *([300 % VOCABULARY, 260, 261] * 165)]  # 496 of 512
    assert len(ids) == 496
    assert reply(llama, ids, 15) == reply(plain, ids, 15)


def test_reset_between_requests(plain: Any, drafted: tuple[Any, RetrievalDraftModel]) -> None:
    llama, drafts = drafted
    ids = llama.tokenize(b"the cat")
    first = reply(llama, ids)
    llama.reset()
    assert reply(llama, ids) == first == reply(plain, ids)
    drafts.finish()
    assert drafts.stats.requests == 2


def test_a_corpus_of_the_same_vocabulary_is_taken(path: str, plain: Any, tmp_path: Path) -> None:
    tokenizer = GgufTokenizer(path)
    ids = tokenizer(["the cat"], add_special_tokens=True)["input_ids"][0]
    emitted = np.array(reply(plain, ids, 80), np.int32)
    for name, fingerprint in (("own", tokenizer_fingerprint(tokenizer)), ("foreign", "0" * 32)):
        folder = IndexFolder.create(tmp_path / name, fingerprint, vocabulary_size(tokenizer))
        folder.publish([folder.write(Segment.build([emitted], vocabulary_size(tokenizer)))])
    with RetrievalDraftModel.for_gguf(path, corpora=[tmp_path / "own"]) as drafts:
        drafts.warm_up(engine(path))
        assert reply(engine(path, drafts), ids) == emitted.tolist()
        drafts.finish()
        assert drafts.stats.accepted_by_level["corpus"] > 0
    with pytest.raises(TokenizerMismatchError):
        RetrievalDraftModel.for_gguf(path, corpora=[tmp_path / "foreign"])
    with pytest.raises(DatastoreError):
        RetrievalDraftModel.for_gguf(path, corpora=[tmp_path / "missing"])


def test_the_vocabulary_is_that_of_the_hugging_face_tokenizer(path: str) -> None:
    tokenizer = GgufTokenizer(path)
    vocabulary = tokenizer.get_vocab()
    assert tokenizer.rows == VOCABULARY
    known = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x00>": 3, "▁": 259, "a": 260, "▁▁": 286}
    assert known.items() <= vocabulary.items()
    assert not [token for token in vocabulary if token.startswith("[PAD")]


def test_phrases_are_cut_by_the_engine(path: str) -> None:
    with RetrievalDraftModel.for_gguf(path, phrases=["quick brown fox"], num_pred_tokens=4) as drafts:
        text = drafts.proposer.stores.phrases
        assert text is not None
        assert len(text) == 1
        tokenizer = GgufTokenizer(path)
        ids = np.array(tokenizer(["quick"])["input_ids"][0], np.intc)
        assert drafts(ids).tolist() == tokenizer(["quick brown fox"])["input_ids"][0][len(ids) : len(ids) + 4]


def test_what_is_no_gguf_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"missing\.gguf"):
        RetrievalDraftModel.for_gguf(tmp_path / "missing.gguf")
    (tmp_path / "torn.gguf").write_bytes(b"GGUF123")
    with pytest.raises(ModelFileError, match=r"torn\.gguf"):
        RetrievalDraftModel.for_gguf(str(tmp_path / "torn.gguf"))
