"""Captured passes of a model: when they are used, tried, dropped and given up."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.engine.attention.tree_mask import TreeAttention, TreeInputs, slots_of_moves
from retrieval_draft.engine.graph import graph_passes
from retrieval_draft.engine.graph.arena import PAGE, Arena
from retrieval_draft.engine.graph.captured import TapeGraph, UncapturableError
from retrieval_draft.engine.graph.graph_passes import NODES, graph_kind, row_sizes
from retrieval_draft.engine.hidden_states import LAST
from retrieval_draft.engine.logits import LogitReader, Wanted, summary
from retrieval_draft.engine.target import Target
from tests.support.dispatched import Dispatched
from tests.support.models import CONFIGS, make
from tests.support.trees import tree_of

TREE = tree_of([5, 6, 7, 8, 9], [-1, 0, 1, 0, 3])
CHAIN = tree_of([1, 2, 3], [-1, 0, 1])


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def prompt(length: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 97, length))


def begun(target: Target, length: int = 40) -> Any:
    cache = target.cache(length + 30)
    for _ in target.prefill(cache, prompt(length), 1):
        pass
    return cache


@pytest.mark.parametrize("name", [*CONFIGS, "diffllama", "doge"])
def test_every_architecture_passes_trees_as_an_eager_pass_does(name: str) -> None:
    """Over steps that move paths, the text growing beyond a page."""
    model = make(name)
    eager, target = Target(model, "off"), Target(model, "tape")
    mine, theirs = begun(target, 230), begun(eager, 230)
    for step in range(12):
        tree = TREE if step % 3 else CHAIN
        length = mine.get_seq_length()
        found = target.verify_tree(mine, tree, length)[: len(tree)]
        wanted = eager.verify_tree(theirs, tree, length)
        assert float((found - wanted).abs().max()) < 1e-4
        for cache in (mine, theirs):
            cache.commit(torch.tensor([3, 4]) if step % 3 else torch.tensor([2]), 1, 3 if step % 3 else 2)
    assert target.graphs is not None
    assert target.graphs.reason is None
    assert target.graphs.replays == 12
    assert target.graphs.captures <= 3


PATH = [0, 2, 3, 4]
"""Moves by one slot each: each slot but the last is read as another is written to it."""


@pytest.mark.parametrize("name", CONFIGS)
def test_a_path_moves_in_the_pass_over_the_next_tree(name: str) -> None:
    """One copy of its inputs is all that is launched besides the replay."""
    model, tree = make(name), tree_of([5, 6, 7, 8, 9], [-1, 0, 0, 2, 3])
    eager, target = Target(model, "off"), Target(model, "tape")
    mine, theirs = begun(target), begun(eager)
    moved = np.array(PATH[1:])
    for step in range(5):
        path = PATH if step else []
        first = mine.get_seq_length()
        moves = slots_of_moves(moved, first, 1) if path else None
        length = first + len(path)
        assert isinstance(target.attention, TreeAttention)
        inputs = target.attention.prepare(tree, length, moved if path else None, moves=moves)
        wait(inputs, mine, path)
        replays: list[int] = []
        with (
            mock.patch.object(TapeGraph, "replay", apart(replays, TapeGraph.replay)),
            Dispatched(replays) as calls,
        ):
            found = target.verify(mine, inputs)[:5]
        assert (inputs.waiting, inputs.commit) == (0, None)
        if step:
            theirs.commit(torch.from_numpy(moved), 1, len(path))
            assert calls.launches == ["copy_"]
        assert close(found, eager.verify_tree(theirs, tree, length))
        assert mine.get_seq_length() == length
        for layer, other in zip(mine.attention_layers, theirs.attention_layers, strict=True):
            assert layer.staged == 8
            assert torch.allclose(layer.keys, other.keys, atol=1e-5)
            assert torch.allclose(layer.values, other.values, atol=1e-5)


def apart(depth: list[int], call: Any) -> Any:
    """`call`, with `depth` not empty meanwhile."""

    def run(*given: Any) -> Any:
        depth.append(1)
        out = call(*given)
        depth.pop()
        return out

    return run


@pytest.mark.parametrize("change", ["grows", "captures", "leaves", "gives up"])
def test_a_path_is_in_place_where_the_pass_does_not_move_it(change: str) -> None:
    """Once, for all that may come between a tree and the next."""
    model, tree = make("gemma3", max_position_embeddings=4096), tree_of([5, 6, 7, 8, 9], [-1, 0, 0, 2, 3])
    eager, target = Target(model, "off"), Target(model, "tape")
    mine, theirs = begun(target), begun(eager)
    graphs, length = target.graphs, 40
    assert graphs is not None
    for each, cache in ((target, mine), (eager, theirs)):
        each.verify_tree(cache, tree, length)
    moved = np.array(PATH[1:])
    attention = target.attention_of_row()
    assert isinstance(attention, TreeAttention)
    inputs = attention.prepare(tree, length + 4, moved, moves=slots_of_moves(moved, length, 1))
    wait(inputs, mine, PATH)
    theirs.commit(torch.from_numpy(moved), 1, 4)
    if change == "grows":
        for _ in range(2):
            other = begun(target, 300)
            target.verify_tree(other, TREE, 300)
    elif change == "captures":
        graphs._forget()
    elif change == "leaves":
        graphs.release(mine)
    else:
        graphs._give_up("told so", 1)
    found = target.verify(mine, inputs)[:5]
    assert close(found, eager.verify_tree(theirs, tree, length + 4))
    assert mine.get_seq_length() == length + 4
    for layer, twin in zip(mine.attention_layers, theirs.attention_layers, strict=True):
        assert torch.allclose(layer.keys, twin.keys, atol=1e-5)


def test_a_mask_by_the_number_of_keys_is_found_out() -> None:
    """GPT-Neo's own, which counts from the last slot: right for few keys, wrong for many."""
    model = make("gpt-neo", attention="eager")
    target, eager = Target(model, "tape"), Target(model, "off")
    assert target.graphs is not None
    for length, reason in ((40, None), (260, "the replay of a pass over 8 tokens gave other logits")):
        found = target.verify_tree(begun(target, length), TREE, length)[:5]
        assert torch.allclose(found, eager.verify_tree(begun(eager, length), TREE, length), atol=1e-4)
        assert str(target.graphs.reason).startswith(str(reason))


@pytest.mark.parametrize(("setting", "kind"), [("auto", None), ("off", None), ("tape", "tape")])
def test_settings_on_the_cpu(setting: str, kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(graph_passes.AUTO, "cpu", raising=False)
    assert graph_kind(setting, torch.device("cpu")) == kind
    assert (Target(make("llama"), setting).graphs is not None) == (kind is not None)


def test_auto_is_a_cuda_graph_on_cuda() -> None:
    assert graph_kind("auto", torch.device("cuda", 1)) == "cuda"


def test_models_whose_factors_the_host_chooses_are_passed_eagerly() -> None:
    assert Target(make("llama-dynamic"), "tape").graphs is None


def test_a_second_cache_moves_in_and_the_first_moves_out() -> None:
    target, eager = Target(make("llama"), "tape"), Target(make("llama"), "off")
    first, second = begun(target), begun(target, 20)
    target.verify_tree(first, TREE, 40)
    held = [layer.keys.clone() for layer in first.layers]
    found = target.verify_tree(second, TREE, 20)[:5]
    assert torch.allclose(found, eager.verify_tree(begun(eager, 20), TREE, 20), atol=1e-4)
    assert target.graphs is not None
    assert target.graphs.replays == 2
    assert all(map(torch.equal, held, [layer.keys for layer in first.layers]))
    first.commit(torch.tensor([3]), 1, 2)
    assert first.get_seq_length() == 42


def test_growth_captures_anew() -> None:
    target = Target(make("gemma3", max_position_embeddings=4096), "tape")
    cache = begun(target)
    assert target.graphs is not None
    for round_number in (1, 2):
        target.verify_tree(cache, TREE, cache.get_seq_length())
        cache.commit(None, 1, 1)
        assert target.graphs.captures == round_number
        for _ in target.prefill(cache, prompt(3 * PAGE), 1):
            pass


def test_a_change_of_the_model_is_seen_at_the_next_request() -> None:
    model = make("llama")
    target = Target(model, "tape")
    cache = begun(target)
    before = target.verify_tree(cache, TREE, 40).clone()
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.mul_(2)
    cache.drop()
    after = target.verify_tree(cache, TREE, 40).clone()
    assert not torch.equal(before, after), "values are read anew"
    weight.data = weight.data / 2
    cache = begun(target)
    assert torch.allclose(target.verify_tree(cache, TREE, 40), before, atol=1e-5)
    assert target.graphs is not None
    assert target.graphs.captures == 2


def test_a_pass_that_reads_on_the_host_is_made_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    model = make("llama")
    own = model.model.norm.forward
    model.model.norm.forward = lambda states: own(states) * (1 + 0 * int(states.isfinite().sum().item()))
    target, eager = Target(model, "tape"), Target(model, "off")
    cache, other = begun(target), begun(eager)
    wanted = eager.verify_tree(other, TREE, 40)
    for _ in range(3):
        assert torch.allclose(target.verify_tree(cache, TREE, 40)[:5], wanted, atol=1e-5)
        cache.drop()
    assert target.graphs is not None
    assert "_local_scalar_dense" in str(target.graphs.reason)
    assert UncapturableError.__name__ in str(target.graphs.reason)
    assert len(caplog.records) == 1


def test_a_pass_that_freezes_a_length_is_found_out() -> None:
    model = make("llama")
    rotary = model.model.rotary_emb
    own = rotary.forward
    counted = []

    def forward(states: torch.Tensor, position_ids: torch.Tensor) -> Any:
        counted.append(1)
        first = int(position_ids.numpy()[0, 0]) if len(counted) > 2 else 0
        return own(states, position_ids * 0 + first + torch.arange(position_ids.shape[1])[None])

    rotary.forward = forward
    target = Target(model, "tape")
    target.verify_tree(begun(target), CHAIN, 40)
    assert target.graphs is not None
    assert target.graphs.reason is not None


def test_trees_at_the_end_of_the_longest_text_are_passed_eagerly() -> None:
    target = Target(make("llama", max_position_embeddings=44), "tape")
    cache = begun(target)
    target.verify_tree(cache, CHAIN, 40)
    assert target.graphs is not None
    assert (target.graphs.captures, target.graphs.reason) == (0, None)


def test_hidden_states_are_those_of_an_eager_pass() -> None:
    model = make("llama")
    target, eager = Target(model, "tape"), Target(model, "off")
    found = []
    for each in (target, eager):
        each.hidden_states.read((LAST,))
        cache = begun(each)
        with each.watching_hidden():
            each.verify_tree(cache, TREE, 40)
            assert each.hidden is not None
            found.append(each.hidden[:5])
        assert each.hidden is None
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.parametrize("k", [0, 8])
def test_the_summary_is_that_of_the_reader(k: int) -> None:
    target = Target(make("llama"), "tape")
    target.summarised_for(k, Wanted())
    cache = begun(target)
    logits = target.verify_tree(cache, TREE, 40)
    made = target.summary_of(logits)
    assert made is not None
    reader = LogitReader(k)
    one, other = reader.read(logits, 5, made), reader.read(logits.clone(), 5)
    assert (one.next_tokens == other.next_tokens).all()
    assert one.finite.all()
    assert (one.top_tokens == other.top_tokens).all()
    assert np.allclose(one.top_probs, other.top_probs, atol=1e-6)
    assert target.summary_of(logits.clone()) is None


def test_a_row_with_nan_is_not_finite_in_the_summary() -> None:
    logits = torch.randn(3, 50)
    logits[1, 7] = float("nan")
    assert summary(logits, 4)[:, 1].tolist() == [0, 1, 0]


@pytest.mark.parametrize(("vocabulary", "is_kept"), [(97, False), (4000, True)])
def test_memory_is_a_share_of_the_weights_so_that_longer_texts_fit(
    vocabulary: int, is_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_passes, "_WEIGHTS_PER_ARENA", 1)
    target = Target(make("llama", vocab_size=vocabulary, max_position_embeddings=4096), "tape")
    graphs, memories = target.graphs, []
    assert graphs is not None
    for length in (40, 800):
        target.verify_tree(begun(target, length), TREE, length)
        memories.append(graphs._arena)
    assert graphs.replays == 2
    assert (memories[0] is memories[1]) == is_kept


def test_no_smaller_pass_is_tried_where_the_largest_was_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target = Target(make("llama"), "tape")
    graphs = target.graphs
    assert graphs is not None
    graphs._kind = "cuda"
    monkeypatch.setattr(graphs, "_recorder", TapeGraph)
    monkeypatch.setattr(graphs, "_agrees", lambda *logits: False)
    target.verify_tree(begun(target), TREE, 40)
    assert graphs.captures == 1
    assert len(caplog.records) == 1


def wait(inputs: TreeInputs, cache: Any, path: list[int]) -> None:
    """Leaves the commit of a path, of which the first node lies in place, to the pass over the next tree."""

    def commit(in_pass: bool) -> None:
        cache.commit(None if in_pass or not path[1:] else torch.tensor(path[1:]), 1, len(path))

    if path:
        inputs.waiting, inputs.commit = len(path), commit


def together(
    target: Target, caches: list[Any], trees: list[DraftTree], moved: list[list[int]] | None = None
) -> list[torch.Tensor] | None:
    """Logits of the trees of several rows from one captured pass, padding left out; None where it is eager.

    `moved` are the paths of the step before, root included, of which the first node lies in place.
    """
    graphs = target.graphs
    assert graphs is not None
    paths = [[] for _ in caches] if moved is None else moved
    lengths = [cache.get_seq_length() + len(path) for cache, path in zip(caches, paths, strict=True)]
    rows = graphs.begin_rows(caches, lengths, max(map(len, trees)))
    if rows is None:
        return None
    for cache, tree, length, path in zip(caches, trees, lengths, paths, strict=True):
        rows.pack(cache, tree, length, np.array(path[1:], np.int64) if path[1:] else None, 1)
    assert graphs.send_rows(rows)
    inputs = [rows.inputs(cache, target.attention_of_row()) for cache in caches]  # type: ignore[arg-type]
    for given, cache, path in zip(inputs, caches, paths, strict=True):
        wait(given, cache, path)
    logits = graphs.verify_rows(caches, inputs)
    if logits is None:
        return None
    begins = target.begins(logits, inputs)
    return [logits[begin : begin + len(tree)] for begin, tree in zip(begins, trees, strict=True)]


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found - wanted).abs().max() < 1e-4)


@pytest.mark.parametrize("name", [*CONFIGS, "diffllama", "doge"])
def test_rows_are_passed_as_each_alone(name: str) -> None:
    """Over steps that move paths, with rows that leave, come, and stand in another order."""
    model = make(name)
    eager, target = Target(model, "off"), Target(model, "tape")
    lengths = (40, 7, 20, 33, 11)
    mine, theirs = ([begun(each, length) for length in lengths] for each in (target, eager))
    present, path = [0, 1, 2], [0, 3, 4]
    for step in range(8):
        if step == 3:
            present, path = [2, 0], []
            for cache in mine + theirs:
                cache.drop()
        elif step == 5:
            present, path = [4, 0, 2, 1, 3], []
            for cache in mine + theirs:
                cache.drop()
        moved = [path if step not in (0, 3, 5) else [] for _ in present]
        trees = [CHAIN if (row + step) % 3 == 2 and step in (2, 4, 7) else TREE for row in present]
        if moved[0]:
            for row in present:
                theirs[row].commit(torch.tensor(path[1:]), 1, len(path))
        found = together(target, [mine[row] for row in present], trees, moved)
        assert found is not None
        for row, tree, logits in zip(present, trees, found, strict=True):
            assert close(logits, eager.verify_tree(theirs[row], tree, theirs[row].get_seq_length()))
        path = [0, 1, 2]
    assert target.graphs is not None
    assert (target.graphs.reason, target.graphs.rows_reason) == (None, None)
    assert target.graphs.replays == 8


def test_a_row_of_nan_costs_itself_only() -> None:
    target, eager = Target(make("gemma3"), "tape"), Target(make("gemma3"), "off")
    caches, others = ([begun(each, length) for length in (40, 7, 20)] for each in (target, eager))
    assert together(target, caches, [TREE] * 3) is not None
    for cache in caches:
        cache.drop()
    caches[1].layers[0].keys[..., 0, 0] = float("nan")
    for captured in (True, False):
        if not captured:  # also where it is there as passes are tried
            assert target.graphs is not None
            target.graphs._forget()
        found = together(target, caches, [TREE] * 3)
        assert found is not None
        assert not found[1].isfinite().any()
        for row in (0, 2):
            assert close(found[row], eager.verify_tree(others[row], TREE, others[row].get_seq_length()))
        for cache in caches + others:
            cache.drop()
    # The next request in its lane finds nothing of it.
    del caches[1]
    caches.append(begun(target, 33))
    found = together(target, caches, [TREE] * 3)
    assert found is not None
    assert close(found[2], eager.verify_tree(begun(eager, 33), TREE, 33))


def test_rows_that_disagree_are_passed_eagerly_and_single_ones_captured(
    caplog: pytest.LogCaptureFixture,
) -> None:
    target = Target(make("llama"), "tape")
    graphs = target.graphs
    assert graphs is not None
    own = graphs._call

    def wrong(cache: Any, ids: torch.Tensor, *rest: Any) -> Any:
        logits, hidden = own(cache, ids, *rest)
        return logits.flip(0) if len(ids) > 1 else logits, hidden

    graphs._call = wrong
    caches = [begun(target, length) for length in (40, 7)]
    for _ in range(2):
        assert together(target, caches, [TREE] * 2) is None
        for cache in caches:
            cache.drop()
    assert graphs.rows_reason is not None
    assert len(caplog.records) == 1
    target.verify_tree(caches[1], TREE, 7)
    assert (graphs.reason, graphs.replays) == (None, 1)


@pytest.mark.parametrize("leaves", [True, False])
def test_rows_for_which_there_is_no_memory_keep_their_own(
    leaves: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Even where there is none to move out of the memory of passes."""
    target, eager = Target(make("llama"), "tape"), Target(make("llama"), "off")
    caches, others = ([begun(each, length) for length in (40, 7, 20)] for each in (target, eager))
    assert together(target, caches[:2], [TREE] * 2) is not None
    for cache in caches:
        cache.drop()

    def short(*given: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("no memory, say")

    monkeypatch.setattr(graph_passes, "Arena", short)
    if not leaves:
        monkeypatch.setattr(Arena, "clear", short)
    assert together(target, caches, [TREE] * 3) is None
    assert len(caplog.records) == 1
    graphs = target.graphs
    assert graphs is not None
    assert graphs.nbytes == 0
    for cache, other in zip(caches, others, strict=True):
        assert torch.equal(cache.layers[0].keys, other.layers[0].keys)
        found = target.verify_rows([cache], [target.attention.prepare(TREE, cache.get_seq_length())])[:5]
        assert close(found, eager.verify_tree(other, TREE, other.get_seq_length()))


def test_growth_keeps_the_rows() -> None:
    target, eager = (Target(make("gemma3", max_position_embeddings=4096), kind) for kind in ("tape", "off"))
    caches, others = ([begun(each, length) for length in (40, 7)] for each in (target, eager))
    assert target.graphs is not None
    for round_number in (1, 2):
        found = together(target, caches, [TREE] * 2)
        assert found is not None
        assert target.graphs.captures == round_number
        for row, logits in enumerate(found):
            length = others[row].get_seq_length()
            assert close(logits, eager.verify_tree(others[row], TREE, length))
        for each, cache in [(target, caches[0]), (eager, others[0]), (target, caches[1]), (eager, others[1])]:
            cache.drop()
            if cache in (caches[0], others[0]):
                for _ in each.prefill(cache, prompt(3 * PAGE), 1):
                    pass


def test_under_a_limit_memory_is_given_back_before_a_text_outgrows_it() -> None:
    target = Target(make("llama", max_position_embeddings=4096), "tape")
    graphs = target.graphs
    assert graphs is not None
    caches = [begun(target, length) for length in (40, 7)]
    assert together(target, caches, [TREE] * 2) is not None
    assert all(map(graphs.holds, caches))
    graphs.limit(graphs.nbytes)
    assert graphs.nbytes
    for cache in caches:
        cache.drop()
    for _ in target.prefill(caches[0], prompt(3 * PAGE), 1):
        pass
    assert together(target, caches, [TREE] * 2) is None
    assert graphs.nbytes == 0
    assert together(target, caches, [TREE] * 2) is None, "until the next limit"
    assert not any(map(graphs.holds, caches))
    graphs.limit(None)
    assert together(target, caches, [TREE] * 2) is not None
    graphs.limit(graphs.nbytes - 1)
    assert graphs.nbytes == 0
    assert caches[0].get_seq_length() == 40 + 3 * PAGE


def test_sizes_of_passes_over_rows() -> None:
    assert row_sizes(1) == NODES
    assert row_sizes(8) == (1, 4, 8, 16, 32, 64)
    assert row_sizes(9) == row_sizes(16) == (1, 4, 8, 16, 32)
    assert row_sizes(512) == (1,)
    assert row_sizes(513) == ()
