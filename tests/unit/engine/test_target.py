"""The target model: passes over texts and trees, alone and side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from retrieval_draft.engine import target as target_module
from retrieval_draft.engine.attention.tree_mask import TreeInputs
from retrieval_draft.engine.cache.kv_cache import SpeculativeCache
from retrieval_draft.engine.hidden_states import LAST
from retrieval_draft.engine.target import Target, disagreement, tolerance
from retrieval_draft.errors import UnsupportedModelError
from tests.support.models import make
from tests.support.trees import tree_of

MODEL = make("llama")
TEXTS = (torch.arange(3, 12), torch.arange(40, 45))
TREES = (tree_of([7, 8, 9], [-1, 0, 0]), tree_of([5, 6], [-1, 0]))


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def plain(ids: Sequence[int]) -> torch.Tensor:
    """Logits of the model after each token of a text: (length, vocabulary)."""
    logits: torch.Tensor = MODEL(torch.tensor([list(ids)])).logits[0]
    return logits


def two_rows(target: Target) -> tuple[list[SpeculativeCache], list[TreeInputs]]:
    """Two texts in caches of their own, and a tree after each."""
    caches, inputs = [], []
    for text, tree in zip(TEXTS, TREES, strict=True):
        cache = target.cache(64)
        list(target.prefill(cache, text, 1))
        caches.append(cache)
        inputs.append(target.attention_of_row().prepare(tree, len(text), None))
    return caches, inputs


def expected_rows() -> torch.Tensor:
    """Logits of the model after each node of `TREES`, from texts that hold its path alone."""
    first, second = TEXTS[0].tolist(), TEXTS[1].tolist()
    paths = [[*first, 7], [*first, 7, 8], [*first, 7, 9], [*second, 5], [*second, 5, 6]]
    return torch.stack([plain(path)[-1] for path in paths])


@pytest.mark.parametrize(
    ("rows", "chunk", "sizes"),
    [(1, 4, [None, None, 1]), (3, 4, [None, 2, 1]), (9, None, [9]), (5, 2, [None, None, 2, 2, 1])],
)
def test_every_pass_over_a_text_yields_its_wanted_rows_or_nothing(
    rows: int, chunk: int | None, sizes: list[int | None]
) -> None:
    target, text = Target(MODEL), TEXTS[0]
    passes = list(target.prefill_passes(target.cache(16), text, rows, chunk))
    assert [None if each is None else len(each) for each in passes] == sizes
    kept = torch.cat([each for each in passes if each is not None])
    torch.testing.assert_close(kept, plain(text.tolist())[-rows:], atol=1e-4, rtol=1e-4)


def test_the_length_of_a_pass_may_change_between_two() -> None:
    target, cache = Target(MODEL), Target(MODEL).cache(16)
    lengths = iter([1, 5, 99])
    seen = [cache.get_seq_length() for _ in target.prefill_passes(cache, TEXTS[0], 1, lambda: next(lengths))]
    assert seen == [1, 6, 9]


def test_text_goes_on_after_what_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_module, "_APPENDED", 4)
    target, text = Target(MODEL), TEXTS[0]
    cache = target.cache(16)
    list(target.prefill(cache, text[:2], 1))
    runs = list(target.append(cache, text[2:], 2))
    assert [run.shape for run in runs] == [(1, 97), (1, 97)]
    torch.testing.assert_close(torch.cat(runs), plain(text.tolist())[[5, 8]], atol=1e-4, rtol=1e-4)


def test_nodes_of_a_tree_see_their_own_path_and_stay_out_of_the_text() -> None:
    target = Target(MODEL, "off")
    cache = target.cache(16)
    list(target.prefill(cache, TEXTS[0], 1))
    logits = target.verify_tree(cache, TREES[0], 9)
    torch.testing.assert_close(logits, expected_rows()[:3], atol=1e-4, rtol=1e-4)
    assert cache.get_seq_length() == 9
    cache.drop()
    list(target.append(cache, torch.tensor([50]), 9))
    assert cache.get_seq_length() == 10, "a later pass is text again"


def test_a_tree_that_raises_leaves_the_cache_taking_text() -> None:
    target = Target(MODEL, "off")
    cache = target.cache(16)
    list(target.prefill(cache, TEXTS[0], 1))
    inputs = target.attention.prepare(TREES[0], 9, None)
    broken = SimpleNamespace(
        input_ids=torch.tensor([[10**6]]), position_ids=inputs.position_ids, attention_mask=None
    )
    given: Any = broken
    with pytest.raises(IndexError):
        target.verify(cache, given)
    list(target.append(cache, torch.tensor([50]), 9))
    assert cache.get_seq_length() == 10


def test_rows_side_by_side_say_what_they_say_alone() -> None:
    target = Target(MODEL, "off")
    caches, inputs = two_rows(target)
    for _ in range(2):  # the first time settles the way
        for cache in caches:
            cache.drop()
        logits = target.verify_rows(caches, inputs)
        torch.testing.assert_close(logits, expected_rows(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("wrong", [(), ("_packed",), ("_packed", "_joined")])
def test_a_way_that_says_something_else_is_not_taken(
    wrong: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, asked = Target(MODEL, "off"), []
    for name in ("_packed", "_joined", "_one_by_one"):
        whole = getattr(target, name)

        def way(caches: Any, inputs: Any, name: str = name, whole: Any = whole) -> Any:
            asked.append(name)
            logits = whole(caches, inputs)
            return logits.flip(-1) if name in wrong else logits

        monkeypatch.setattr(target, name, way)
    caches, inputs = two_rows(target)
    right = ["_packed", "_joined", "_one_by_one"][len(wrong)]
    torch.testing.assert_close(target.verify_rows(caches, inputs), expected_rows(), atol=1e-4, rtol=1e-4)
    del asked[:]
    for cache in caches:
        cache.drop()
    torch.testing.assert_close(target.verify_rows(caches, inputs), expected_rows(), atol=1e-4, rtol=1e-4)
    assert asked == [right]


def test_more_keys_than_a_text_may_have_are_not_joined() -> None:
    target = Target(MODEL, "off")
    caches, inputs = two_rows(target)
    target.max_positions = 18  # 9 and 5 cached, 3 and 2 nodes: one too few
    assert target._joined(caches, inputs) is None
    target.max_positions = 19
    torch.testing.assert_close(target._joined(caches, inputs), expected_rows(), atol=1e-4, rtol=1e-4)


def test_the_states_that_sources_read_are_kept_where_that_is_wanted() -> None:
    target, text = Target(MODEL), TEXTS[0]
    with target.watching_hidden():
        list(target.prefill(target.cache(16), text, 2))
        assert target.hidden is None, "nobody reads any"
    target.hidden_states.read((1, LAST))
    expected = MODEL(text[None], output_hidden_states=True).hidden_states
    with target.watching_hidden():
        (logits,) = target.prefill(target.cache(16), text, 2)
        assert target.hidden is not None
        torch.testing.assert_close(target.hidden, torch.cat((expected[1], expected[-1]), -1)[0])
        last = target.hidden_states.columns((LAST,), target.hidden)
        torch.testing.assert_close(MODEL.lm_head(last[-2:]), logits)
    assert target.hidden is None
    with target.watching_hidden(False):
        list(target.prefill(target.cache(16), text, 2))
        assert target.hidden is None


@pytest.mark.parametrize("way", ["_packed", "_joined", "_one_by_one"])
def test_states_of_rows_that_share_a_pass_are_those_of_each(way: str) -> None:
    target = Target(MODEL)
    target.hidden_states.read((LAST,))
    caches, inputs = two_rows(target)
    with target.watching_hidden():
        logits = getattr(target, way)(caches, inputs)
        assert target.hidden is not None
        torch.testing.assert_close(MODEL.lm_head(target.hidden), logits)


def test_the_vocabulary_is_that_of_the_configuration_within_the_embedding() -> None:
    model = make("llama", vocab_size=50)
    model.resize_token_embeddings(64)
    model.config.vocab_size = 50
    target = Target(model)
    assert (target.embedding_rows, target.vocabulary, target.max_positions) == (64, 50, 512)


def test_disagreement_is_that_of_the_worst_row_in_standard_deviations() -> None:
    others = torch.tensor([[1.0, -1.0], [2.0, -2.0]])
    logits = others + torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert disagreement(others, others) == 0.0
    assert disagreement(logits, others) == pytest.approx(1.0 / 8**0.5)
    assert disagreement(logits, others) == disagreement(logits[1:], others[1:])


def test_half_precision_rounds_more() -> None:
    assert tolerance(torch.float64) <= tolerance(torch.float32) < tolerance(torch.float16)
    assert tolerance(torch.bfloat16) == tolerance(torch.float16)


def _without(*names: str) -> Any:
    model = make("llama")
    for name in names:
        setattr(model.config, name, True)
    return model


def _stateful() -> Any:
    model = make("llama")
    model._is_stateful = True
    return model


def _attending(implementation: str) -> Any:
    model = make("llama")
    model.config._attn_implementation_internal = implementation
    return model


class Placeless(transformers.LlamaForCausalLM):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, **options: Any) -> Any:
        return super().forward(input_ids, attention_mask, **options)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: MODEL.model, "no output head"),
        (lambda: _without("is_encoder_decoder"), "encoder-decoder"),
        (_stateful, "recurrent state"),
        (lambda: _attending("flash_attention_2"), "ignores tree masks"),
        (lambda: Placeless(MODEL.config), "takes no position_ids"),
    ],
    ids=["no head", "encoder", "state", "flash", "no positions"],
)
def test_a_model_that_cannot_verify_trees_says_why(model: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        Target(model())
