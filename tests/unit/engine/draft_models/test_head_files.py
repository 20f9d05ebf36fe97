"""Heads from checkpoints: every layout is read and drafts exactly, all else is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.engine.draft_models.head_files import LAYOUTS, load_head
from retrieval_draft.errors import InvalidInputError, ModelFileError
from tests.support import heads
from tests.support.drafters import near_ties, prompt_ids
from tests.support.heads import write_head
from tests.support.models import make

NEW = 24


def drafter_of(model: Any, name: str, **options: Any) -> RetrievalDrafter:
    config = DraftConfig(**{"nodes": 12, "sources": (), "cpu_kernels": False, **options})
    return RetrievalDrafter.for_model(model, draft_model=name, config=config)


def test_every_layout_is_tried() -> None:
    assert heads.LAYOUTS.keys() == LAYOUTS.keys()


@pytest.mark.parametrize(("layout", "target"), heads.cases(["llama", "gemma3"]))
def test_greedy_text_is_that_of_generate(layout: str, target: str, tmp_path: Path) -> None:
    model = make(target)
    drafter = drafter_of(model, write_head(tmp_path, layout), prefix_cache_bytes=1 << 22)
    prompts = torch.cat([prompt_ids(seed=seed) for seed in range(4)])
    stock = model.generate(prompts, max_new_tokens=NEW, do_sample=False)
    for _ in range(2):  # the second time from the prefix cache
        ours = drafter.generate(prompts, max_new_tokens=NEW, do_sample=False)
        assert sum(near_ties(model, ours[row : row + 1], stock[row : row + 1]) for row in range(4)) == 0
    alone = drafter.generate(prompts[1:2], max_new_tokens=NEW, do_sample=False)
    assert torch.equal(alone[0], stock[1])
    assert drafter.stats.cached_tokens > 0
    assert drafter.stats.source_failures == 0
    assert drafter.stats.drafted > drafter.stats.steps
    if not layout.endswith("_assistant"):  # whose random guesses are never right here
        assert drafter.stats.accepted > 0


@pytest.mark.parametrize(("layout", "target"), heads.cases(["llama", "gemma3"]))
def test_seeded_text_is_that_of_the_seed_undrafted(layout: str, target: str, tmp_path: Path) -> None:
    model = make(target)
    drafter = drafter_of(model, write_head(tmp_path, layout))
    plain = RetrievalDrafter.for_model(model, method="none", config=DraftConfig("none", cpu_kernels=False))
    options = {"max_new_tokens": 6, "do_sample": True, "temperature": 0.8, "top_k": 0}
    for seed in range(24):
        texts = [each.generate(prompt_ids(), seed=seed, **options) for each in (drafter, plain)]
        assert torch.equal(*texts)
    assert drafter.stats.source_failures == 0
    assert drafter.stats.drafted


@pytest.mark.parametrize(("layout", "target"), heads.cases(["llama"]))
def test_half_precision_rounds_weights_and_no_position(layout: str, target: str, tmp_path: Path) -> None:
    model = make(target)
    name = write_head(tmp_path, layout)
    head, given = load_head(name, model), load_head(name, model)
    head.bind(model.to(torch.bfloat16))
    held = head.state_dict()
    assert {each.dtype for each in held.values() if each.is_floating_point()} == {torch.bfloat16}
    known = dict(given.named_buffers())
    for buffer, each in head.named_buffers():
        if buffer not in held:  # such as the frequencies of rotary factors
            assert torch.equal(each, known[buffer])


@pytest.mark.parametrize("graphs", ["off", "tape"])
def test_captured_passes_give_the_states_of_all_layers(graphs: str, tmp_path: Path) -> None:
    model = make("llama")
    drafter = drafter_of(model, write_head(tmp_path, "eagle3"), graphs=graphs)
    out = drafter.generate(prompt_ids(), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out, model.generate(prompt_ids(), max_new_tokens=NEW, do_sample=False))
    reference = drafter_of(model, str(tmp_path), graphs="off")
    reference.generate(prompt_ids(), max_new_tokens=NEW, do_sample=False)
    assert drafter.stats.accepted == reference.stats.accepted > 0


def test_a_model_of_its_own_is_a_draft_model(tmp_path: Path) -> None:
    model = make("llama")
    small = make("llama", num_hidden_layers=2, seed=2)
    small.save_pretrained(tmp_path)
    assert load_head(str(tmp_path), model) is None


@pytest.mark.parametrize(("layout", "target"), heads.cases(["llama"]))
def test_a_head_of_another_model_is_refused(layout: str, target: str, tmp_path: Path) -> None:
    name = write_head(tmp_path, layout)
    with pytest.raises(ModelFileError) as raised:
        drafter_of(make(target, hidden_size=40, head_dim=10), name)
    assert name in str(raised.value)


def torn(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["fc.weight"]
    save_file(weights, folder / "model.safetensors")


def with_one_more(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "other.weight": torch.ones(2)}, folder / "model.safetensors")


def with_foreign_ids(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "d2t": weights["d2t"] + 1000}, folder / "model.safetensors")


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def without_a_key(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["transformer_layer_config"]["hidden_size"], config["draft_vocab_size"]
    config["transformer_layer_config"]["model_type"] = "mamba"
    (folder / "config.json").write_text(json.dumps(config))


def no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def of_another_kind(folder: Path) -> None:
    (folder / "config.json").write_text('{"speculators_model_type": "peagle"}')


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (torn, "cannot be read"),
        (without_a_weight, "'fc.weight'; expected is one of shape [32, 96]"),
        (with_one_more, "'other.weight'; expected is no weight"),
        (with_foreign_ids, "beyond the 97 of the target"),
        (without_weights, "has no weights"),
        (without_a_key, "config.json"),
        (no_json, "config.json"),
        (of_another_kind, "'speculators peagle', which is not supported"),
    ],
)
def test_a_corrupt_checkpoint_is_refused_with_its_name(spoil: Any, expected: str, tmp_path: Path) -> None:
    name = write_head(tmp_path, "speculators eagle3")
    spoil(tmp_path)
    with pytest.raises(ModelFileError) as raised:
        drafter_of(make("llama"), name)
    assert name in str(raised.value)
    assert expected in str(raised.value)


@pytest.mark.parametrize(
    ("layout", "key", "value"),
    [
        ("eagle", "num_attention_heads", 0),
        ("eagle", "intermediate_size", -4),
        ("eagle", "intermediate_size", "x"),
        ("eagle", "architectures", 5),
        ("eagle3", "draft_vocab_size", 10**12),
        ("speculators eagle3", "eagle_aux_hidden_state_layer_ids", [-1, 0, 1]),
        ("medusa", "medusa_num_heads", 3000),
        ("medusa", "medusa_num_heads", True),
        ("mlp_speculator", "n_predict", 0),
        ("mlp_speculator", "inner_dim", 10**12),
        ("hydra", "hydra_num_heads", 10**9),
        ("recurrent_drafting_drafter", "vocab_size", 10**6),
        ("recurrent_drafting_drafter", "num_draft_layers", 10**9),
        ("dflash", "block_size", 10**6),
        ("gemma4_assistant", "backbone_hidden_size", 10**12),
    ],
)
def test_a_number_that_makes_no_sense_is_refused(layout: str, key: str, value: Any, tmp_path: Path) -> None:
    """Before anything of its size is made."""
    name = write_head(tmp_path, layout, **{key: value})
    if key == "architectures":
        assert load_head(name, make("llama")) is not None
        return
    with pytest.raises(ModelFileError, match=key if key[0] != "e" else "layers") as raised:
        load_head(name, make("llama"))
    assert name in str(raised.value)


def test_captured_passes_are_kept_from_request_to_request(tmp_path: Path) -> None:
    """Hooks that watch for a head come and go; the model is the same."""
    model = make("llama")
    drafter = drafter_of(model, write_head(tmp_path, "eagle3"), graphs="tape")
    for seed in range(20):
        drafter.generate(prompt_ids(seed=seed), max_new_tokens=NEW, do_sample=False)
    graphs = drafter.target.graphs
    assert graphs is not None
    captures = graphs.captures
    for seed in range(20):
        drafter.generate(prompt_ids(seed=seed), max_new_tokens=NEW, do_sample=False)
    assert graphs.reason is None
    assert graphs.captures == captures > 0


def test_a_layer_that_the_target_has_not_is_refused(tmp_path: Path) -> None:
    name = write_head(tmp_path, "speculators eagle3", eagle_aux_hidden_state_layer_ids=[2, 9, 30])
    with pytest.raises(InvalidInputError, match=r"layer 9; the model has layers 0\.\.2"):
        drafter_of(make("llama"), name)
