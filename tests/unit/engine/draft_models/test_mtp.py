"""Layers for multi-token prediction: what transformers' own loop drafts, and exact text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.engine.compat import mtp_classes
from retrieval_draft.engine.draft_models.expansion import ExpansionLimits, Growth
from retrieval_draft.engine.draft_models.mtp import MtpHead, _path, load_mtp
from retrieval_draft.errors import ModelFileError, UnsupportedEngineError, UnsupportedModelError
from tests.random_generate.architectures import ARCHITECTURES
from tests.support.chain_models import KNOWN, make_family
from tests.support.drafters import near_ties, prompt_ids
from tests.support.models import SHAPE, make

pytestmark = pytest.mark.skipif(mtp_classes() is None, reason="this transformers has no MtpModel")

CASES = [("deepseek-v3", 1), ("deepseek-v3", 3), ("glm4-moe", 1), ("glm4-moe", 2)]
NEW = 16
CONFIGS = {
    **ARCHITECTURES,
    "glm4-moe": lambda **options: transformers.Glm4MoeConfig(
        **{key: each for key, each in SHAPE.items() if each is not None},
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_shared_experts=1, n_group=1,
        topk_group=1, first_k_dense_replace=1, **options,
    ),
}  # fmt: skip


def written(folder: Path, name: str, layers: int, patch: pytest.MonkeyPatch) -> Any:
    """A tiny model with its layers for multi-token prediction, loaded from a checkpoint as published."""
    torch.manual_seed(5)
    config = CONFIGS[name](num_mtp_layers=layers)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    count = config.num_hidden_layers
    for key, each in transformers.modeling_layers.MtpModel(model, layers).state_dict().items():
        if not key.startswith("layers."):
            continue  # shared with the model
        _, at, part = key.split(".", 2)
        part = part.removeprefix("mtp_block.")
        if part == "post_norm.weight":
            part = "shared_head.norm.weight"
        random = float("norm" in part) + 0.3 * torch.randn_like(each)
        weights |= {f"model.layers.{count + int(at)}.{name}": one for name, one in _experts(part, random)}
    save_file({key: each.contiguous() for key, each in weights.items()}, folder / "model.safetensors", FORMAT)
    # Published models ignore the number of their own layers beyond the last, 61 of DeepSeek's.
    ignored = [rf"model\.layers\.{count + at}\." for at in range(layers)]
    patch.setattr(type(model), "_keys_to_ignore_on_load_unexpected", ignored)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def written_beside(folder: Path, name: str, files: str = "whole") -> Any:
    """A tiny Qwen3-Next or 3.5 with such layers in a module of its own, as its checkpoints are published."""
    model = make_family(name, num_hidden_layers=4, layer_types=GATED)
    model.save_pretrained(folder)
    weights = {}
    for key, own in model.state_dict().items():
        part = key.partition(".layers.3.")[2]  # the layer with full attention
        if not part:
            continue
        each = (0.1 if "norm" in key else 0.3) * torch.randn_like(own)
        weights |= {f"mtp.layers.0.{name}": one for name, one in _experts(part, each)}
    width = model.config.hidden_size
    weights |= {f"mtp.{part}.weight": 0.1 * torch.randn(width) for part in BESIDE_NORMS}
    weights["mtp.fc.weight"] = 0.3 * torch.randn(width, 2 * width)
    weights = {key: each.contiguous() for key, each in weights.items()}
    whole = load_file(folder / "model.safetensors")
    if files == "whole":
        save_file(whole | weights, folder / "model.safetensors", FORMAT)
    else:
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        save_file(weights, folder / "model-2.safetensors", FORMAT)
        named = dict.fromkeys(whole, "model-1.safetensors") | dict.fromkeys(weights, "model-2.safetensors")
        index = {"metadata": {"total_size": 0}, "weight_map": named}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


GATED = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
BESIDE_NORMS = ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding")
BESIDE = [name for name in ("qwen3_next", "qwen3_5_text") if name in KNOWN]
FORMAT = {"format": "pt"}


def _experts(part: str, weight: Tensor) -> list[tuple[str, Tensor]]:
    """A layer's weight, or each expert's of fused ones, by the published names."""
    if not part.startswith("mlp.experts."):
        return [(part, weight)]
    named = []
    for expert, one in enumerate(weight):
        parts = (
            {"down_proj": one} if part.endswith("down_proj") else dict(zip(FUSED, one.chunk(2), strict=True))
        )
        named += [(f"mlp.experts.{expert}.{name}.weight", each) for name, each in parts.items()]
    return named


FUSED = ("gate_proj", "up_proj")


def grown(head: MtpHead, state: Any, last: int, logits: Tensor, **limits: Any) -> Growth:
    growth = Growth(ExpansionLimits(**{"entropy_stop": None, **limits}), 60)
    growth.begin(last, logits)
    while growth.frontier:
        growth.add(head.expand([state], [growth])[0])
    return growth


@torch.no_grad()
@pytest.mark.parametrize(("name", "layers"), CASES)
def test_the_greedy_chain_is_that_of_transformers(
    name: str, layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = written(tmp_path, name, layers, monkeypatch)
    head = load_mtp(model)
    classes = mtp_classes()
    assert classes is not None
    tokens, hidden = torch.randint(0, 97, (11,)), torch.randn(10, 32)
    for rows in (1, 2, 10):
        ids = tokens[None, 1 : rows + 1]
        wanted, logits, _ = head.model(
            ids, hidden[None, :rows], None, torch.arange(1, rows + 1)[None], classes[1]()
        )
        states = []
        for parts in ([rows], [1, rows - 1] if rows > 1 else [1], [1] * rows):
            state, begin = head.state(), 0
            for size in parts:
                end = begin + size
                (guess,) = head.read([state], [tokens[begin + 1 : end + 1]], [hidden[begin:end]], [begin])
                begin = end
            states.append(state)
            torch.testing.assert_close(guess, logits[0, :1], atol=1e-4, rtol=1e-3)
            growth = grown(head, state, int(tokens[rows]), guess, top_k=1, depth=layers)
            assert growth.tokens[1:] == wanted[0].tolist()
            head.drop(state)
        half = states[0].copy(max(rows // 2, 1))
        if half.length < rows:
            begin = half.length
            (guess,) = head.read([half], [tokens[begin + 1 : rows + 1]], [hidden[begin:rows]], [begin])
            growth = grown(head, half, int(tokens[rows]), guess, top_k=1, depth=layers)
            assert growth.tokens[1:] == wanted[0].tolist()


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 3])
def test_a_read_that_fails_for_one_text_changes_none(
    layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = load_mtp(written(tmp_path, "deepseek-v3", layers, monkeypatch))
    texts, hidden = torch.randint(0, 97, (2, 9)), torch.randn(2, 8, 32)
    states = [head.state(), head.state()]
    head.read(states, list(texts[:, 1:5]), list(hidden[:, :4]), [0, 0])

    def read(more: slice) -> list[torch.Tensor]:
        return head.read(states[more], list(texts[more, 5:]), list(hidden[more, 4:]), [4, 4][more])

    passed, calls = head._passed, []

    def failing(*given: Any) -> torch.Tensor:
        calls.append(given)
        if len(calls) > layers:
            raise RuntimeError("no memory")
        return passed(*given)

    with monkeypatch.context() as patch:
        patch.setattr(head, "_passed", failing)
        with pytest.raises(RuntimeError, match="no memory"):
            read(slice(0, 2))
    assert [state.length for state in states] == [4, 4]
    fresh = [head.state(), head.state()]
    wanted = head.read(fresh, list(texts[:, 1:]), list(hidden), [0, 0])
    torch.testing.assert_close(torch.cat(read(slice(0, 2))), torch.cat(wanted), atol=1e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["deepseek-v3", "glm4-moe"])
def test_a_single_layer_reads_its_own_output_along_a_path(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = load_mtp(written(tmp_path, name, 1, monkeypatch))
    tokens, hidden = torch.randint(0, 97, (8,)), torch.randn(7, 32)
    state = head.state()
    (logits,) = head.read([state], [tokens[1:]], [hidden], [0])
    growth = grown(head, state, int(tokens[-1]), logits, top_k=2, depth=3)
    for node in growth.expanded[1:]:
        text, rows = tokens, hidden
        for step in _path(growth, node):
            other = head.state()
            head.read([other], [text[1:]], [rows], [0])
            rows = torch.cat((rows, other.outputs[0][-1:]))
            text = torch.cat((text, torch.tensor([step])))
        other = head.state()
        (wanted,) = head.read([other], [text[1:]], [rows], [0])
        reached = head._logits(state.paths[node][1][-1:])
        torch.testing.assert_close(reached, wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("name", "layers"), CASES)
def test_text_is_that_of_generate(
    name: str, layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = written(tmp_path, name, layers, monkeypatch)
    config = DraftConfig(nodes=8, sources=(), cpu_kernels=False, prefix_cache_bytes=1 << 22)
    drafter = RetrievalDrafter.for_model(model, draft_model="mtp", config=config)
    prompts = torch.cat([prompt_ids(seed=seed) for seed in range(4)])
    stock = model.generate(prompts, max_new_tokens=NEW, do_sample=False)
    for _ in range(2):  # the second time from the prefix cache
        ours = drafter.generate(prompts, max_new_tokens=NEW, do_sample=False)
        assert sum(near_ties(model, ours[row : row + 1], stock[row : row + 1]) for row in range(4)) == 0
    assert drafter.stats.cached_tokens > 0
    plain = RetrievalDrafter.for_model(model, config=DraftConfig("none", cpu_kernels=False))
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True, "temperature": 0.8, "top_k": 0}
    for seed in range(8):  # with three samples of each, 24 draws
        texts = [
            each.generate(prompts[:1], seed=seed, num_return_sequences=3, **options)
            for each in (drafter, plain)
        ]
        assert torch.equal(*texts)
    assert drafter.stats.source_failures == 0
    assert drafter.stats.drafted > drafter.stats.steps


def test_the_method_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = written(tmp_path, "glm4-moe", 2, monkeypatch)
    drafter = RetrievalDrafter.for_model(model, draft_model="mtp", method="mtp")
    out = drafter.generate(prompt_ids(), max_new_tokens=NEW, do_sample=False)
    assert near_ties(model, out, model.generate(prompt_ids(), max_new_tokens=NEW, do_sample=False)) == 0
    assert (drafter.stats.source_failures, max(drafter.stats.nodes)) == (0, 2)


@pytest.mark.parametrize("files", ["whole", "parts"])
@pytest.mark.parametrize("name", BESIDE)
def test_layers_in_a_module_of_their_own(name: str, files: str, tmp_path: Path) -> None:
    model = written_beside(tmp_path, name, files=files)
    drafter = RetrievalDrafter.for_model(
        model, draft_model="mtp", config=DraftConfig(nodes=4, sources=(), cpu_kernels=False)
    )
    assert getattr(model.config, "num_mtp_layers", None) is None, "the user's configuration is as before"
    head = drafter.context.models[0].head
    weights = load_file(tmp_path / ("model.safetensors" if files == "whole" else "model-2.safetensors"))
    layer = head.model.layers[0]
    for published, own in BESIDE_NAMES.items():
        torch.testing.assert_close(layer.get_parameter(own), weights[f"mtp.{published}"])
    prompts = torch.cat([prompt_ids(seed=seed) for seed in range(2)])
    stock = model.generate(prompts, max_new_tokens=NEW, do_sample=False)
    ours = drafter.generate(prompts, max_new_tokens=NEW, do_sample=False)
    assert sum(near_ties(model, ours[row : row + 1], stock[row : row + 1]) for row in range(2)) == 0
    plain = RetrievalDrafter.for_model(model, config=DraftConfig("none", cpu_kernels=False))
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "temperature": 0.8, "seed": 3}
    texts = [each.generate(prompts[:1], **options) for each in (drafter, plain)]
    assert torch.equal(*texts)
    assert drafter.stats.source_failures == 0
    assert drafter.stats.drafted > 20


BESIDE_NAMES = {
    "fc.weight": "eh_proj.weight",
    "pre_fc_norm_embedding.weight": "enorm.weight",
    "pre_fc_norm_hidden.weight": "hnorm.weight",
    "norm.weight": "post_norm.weight",
    "layers.0.self_attn.q_proj.weight": "mtp_block.self_attn.q_proj.weight",
    "layers.0.input_layernorm.weight": "mtp_block.input_layernorm.weight",
}
"""Published names, and those in transformers' layer."""


@torch.no_grad()
@pytest.mark.parametrize("name", BESIDE)
def test_the_greedy_chain_of_such_a_layer_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    head = load_mtp(written_beside(tmp_path, name))
    classes = mtp_classes()
    assert classes is not None
    tokens, hidden = torch.randint(0, 97, (11,)), torch.randn(10, head.model.config.hidden_size)
    wanted, logits, _ = head.model(
        tokens[None, 1:], hidden[None], None, torch.arange(1, 11)[None], classes[1]()
    )
    state = head.state()
    (guess,) = head.read([state], [tokens[1:]], [hidden], [0])
    torch.testing.assert_close(guess, logits[0, :1], atol=1e-4, rtol=1e-3)
    growth = grown(head, state, int(tokens[10]), guess, top_k=1, depth=1)
    assert growth.tokens[1:] == wanted[0].tolist()


def test_a_checkpoint_without_such_layers_is_refused(tmp_path: Path) -> None:
    make_family("qwen3_next").save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="its checkpoint has none"):
        load_mtp(model)


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.eh_proj.weight"]
    save_file(weights, folder / "model.safetensors", FORMAT)


def of_another_size(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.eh_proj.weight"] = torch.ones(32, 60)
    save_file(weights, folder / "model.safetensors", FORMAT)


def torn(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("spoil", [without_a_weight, of_another_size, torn])
def test_a_corrupt_checkpoint_is_refused_with_its_name(
    spoil: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = written(tmp_path, "deepseek-v3", 1, monkeypatch)
    spoil(tmp_path)
    with pytest.raises(ModelFileError) as raised:
        RetrievalDrafter.for_model(model, draft_model="mtp")
    assert str(tmp_path) in str(raised.value)


def test_what_has_no_such_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedModelError, match="num_mtp_layers is None"):
        RetrievalDrafter.for_model(make("llama"), draft_model="mtp")
    model = make("llama")
    model.config.num_mtp_layers, model.config.mtp_layer_types = 1, ["linear_attention"]
    with pytest.raises(UnsupportedModelError, match="are linear_attention"):
        load_mtp(model)
    monkeypatch.setattr("retrieval_draft.engine.draft_models.mtp.mtp_classes", lambda: None)
    with pytest.raises(UnsupportedEngineError, match="no MtpModel"):
        load_mtp(model)
