"""Tests of the measurements of datastores."""

import numpy as np
import pytest

from retrieval_draft.bench.corpus import measure_corpus, standard_library
from retrieval_draft.bench.datastores import measure_history, measure_index
from retrieval_draft.bench.synthetic_text import SyntheticText
from retrieval_draft.errors import InvalidInputError
from tests.support.models import make
from tests.support.tiny import byte_tokenizer


def test_synthetic_text_repeats_itself_and_is_the_same_every_time() -> None:
    text = SyntheticText(1000)
    one = text.tokens(20_000, seed=1)
    assert one.tolist() == SyntheticText(1000).tokens(20_000, seed=1).tolist()
    assert one.tolist() != text.tokens(20_000, seed=2).tolist()
    assert 0 <= one.min() <= one.max() < 1000
    grams = {tuple(gram) for gram in np.lib.stride_tricks.sliding_window_view(one, 4).tolist()}
    assert len(grams) < 19_000
    joined, documents = text.joined(2000, seed=1)
    assert (joined == 1000).sum() == len(documents) == 3
    assert documents.tolist() == [0, 701, 1401]


def test_an_index_is_measured(tmp_path) -> None:
    found = measure_index(30_000, vocabulary=500, folder=tmp_path, segment_tokens=20_000)
    assert found["segments"] == 2
    assert 29_950 < found["tokens"] < 30_000  # separators are not counted
    assert 6 < found["bytes_per_token"] < 6.2
    assert found["build_tokens_per_second"] > 0
    assert 0 < found["lookup_us"]["p50"] <= found["lookup_us"]["p99"] <= found["lookup_us"]["max"]
    assert not list(tmp_path.iterdir())


def test_a_history_is_measured() -> None:
    found = measure_history(250_000, vocabulary=500)
    assert found["tokens"] == 250_000
    assert found["bytes_per_token"] < 6.2
    assert found["tokens_after_eviction"] < found["tokens"]
    for name in ("step_us", "step_us_ingesting", "step_us_evicting"):
        assert 0 < found[name]["p50"] <= found[name]["max"]


def test_a_code_base_is_measured(tmp_path) -> None:
    for number in range(6):
        (tmp_path / f"{number}.py").write_text(
            f"def function_{number}(argument):\n    return argument\n" * 20
        )
    tokenizer = byte_tokenizer()
    model = make("llama", vocab_size=len(tokenizer))
    options = {"prompt_tokens": 40, "max_new_tokens": 12, "nodes": 8}
    found = measure_corpus(model, tokenizer, [str(tmp_path)], prompts=2, **options)
    assert found["equal"] == found["prompts"] == 2
    assert len(set(found["held_out"])) == 2
    assert found["ratio"] == pytest.approx(
        found["tokens_per_step"]["with"] / found["tokens_per_step"]["without"]
    )
    with pytest.raises(InvalidInputError, match="6 files are long enough"):
        measure_corpus(model, tokenizer, [str(tmp_path)], prompts=7, **options)


def test_the_standard_library_is_there() -> None:
    [folder], left_out, tests = standard_library()
    assert folder
    assert "site-packages/**" in left_out
    assert "test/**" in tests
