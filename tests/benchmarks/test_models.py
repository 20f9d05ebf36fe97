"""Trials of tiny models: a wrong text, a crash and a hang are noticed, and rounding is no difference."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from benchmarks.models.configs import tiny_config
from benchmarks.models.float64 import to_float64
from benchmarks.models.images import image_prompt
from benchmarks.models.isolated import Failed, isolated
from benchmarks.models.measure import OUTCOMES, failed, measure_models, merged, summary
from benchmarks.models.shapes import HEADS, VOCABULARY, WINDOW
from benchmarks.models.tiny import tiny_model
from benchmarks.models.trials import try_model
from retrieval_draft import RetrievalDrafter
from retrieval_draft.engine.graph.graph_passes import GraphPasses
from retrieval_draft.errors import InvalidInputError, UnsupportedModelError
from tests.support.commands import Command

ROOT = Path(__file__).parents[2]


@pytest.fixture
def llama() -> Any:
    return tiny_model("llama", "LlamaForCausalLM")


def patched(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    """Changes what every drafter generates: `change` gets the model and the output."""
    generate = RetrievalDrafter.generate

    def changed(self: Any, *given: Any, **options: Any) -> Any:
        return change(self.target.model, generate(self, *given, **options))

    monkeypatch.setattr(RetrievalDrafter, "generate", changed)


def flipped(out: torch.Tensor) -> torch.Tensor:
    out = out.clone()
    out[:, -7] = (out[:, -7] + 1) % VOCABULARY
    return out


def test_configurations_are_tiny_and_keep_every_kind_of_layer() -> None:
    config = tiny_config("gemma3_text")
    assert (config.vocab_size, config.num_attention_heads, config.sliding_window) == (
        VOCABULARY,
        HEADS,
        WINDOW,
    )
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert len(config.layer_types) == config.num_hidden_layers == 4
    assert config.eos_token_id is None
    assert config.pad_token_id == 0
    hybrid = tiny_config("qwen3_next")
    assert {"linear_attention", "full_attention"} <= set(hybrid.layer_types)
    assert tiny_config("llama", {"num_hidden_layers": 1}).num_hidden_layers == 1
    parts = tiny_config("gemma3", image_text=True)
    assert parts.text_config.hidden_size == 64
    assert parts.image_token_id in range(150, VOCABULARY)


def test_texts_of_tiny_models_vary(llama: Any) -> None:
    prompt = torch.arange(3, 40)[None]
    assert llama.generate(prompt, max_new_tokens=40, do_sample=False)[0, 37:].unique().numel() >= 12


def test_model_whose_texts_are_right_is_equal(llama: Any) -> None:
    result = try_model(llama, image_text=False)
    assert (result["outcome"], result["way"], result["error"]) == ("equal", "tree", "")
    assert list(result["trials"]) == ["greedy", "drafts", "seeded", "batch", "server"]
    assert all(trial["verdict"] == "equal" for trial in result["trials"].values())
    for name in ("drafts", "seeded", "server"):
        trial = result["trials"][name]
        assert trial["passes"] < 0.35 * trial["tokens"]
        assert 0 < trial["accepted"] < trial["drafted"]


def test_recurrent_states_need_no_pass_for_repair() -> None:
    model = tiny_model("nemotron_h", "NemotronHForCausalLM", seed=1)
    result = try_model(model, image_text=False, trials=["drafts"], seed=1)
    trial = result["trials"]["drafts"]
    assert (result["outcome"], result["way"]) == ("equal", "chain")
    assert trial["passes"] <= 0.35 * trial["tokens"]
    assert trial["calls"] == 1 + trial["passes"], "one for the prompt, and one for each pass over drafts"


def test_weights_and_prompts_differ_by_seed() -> None:
    prompt = torch.arange(3, 40)[None]
    texts = []
    for seed in (0, 0, 1):
        model = tiny_model("llama", "LlamaForCausalLM", seed=seed)
        texts.append(model.generate(prompt, max_new_tokens=8, do_sample=False))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_seeds_of_a_model_are_counted_together() -> None:
    def trial(verdict: str, note: str = "") -> dict[str, Any]:
        counts = {"tokens": 60, "passes": 15, "drafted": 200, "accepted": 45, "calls": 16}
        return {"drafts": {"verdict": verdict, "note": note, **counts}}

    found = merged(
        [
            entry("equal", "chain", trials=trial("equal")),
            entry(
                "differs", "chain", error="drafts: after 3 tokens", trials=trial("differs", "after 3 tokens")
            ),
            entry("crashed", error="not done after 5 s"),
            entry("equal", "tree", trials=trial("rounding", "after 9 tokens; equal in float64")),
        ]
    )
    assert (found["outcome"], found["seeds"]) == ("crashed", 4)
    assert found["error"] == "seed 1: drafts: after 3 tokens; seed 2: not done after 5 s"
    assert found["ways"] == {"chain": 2, None: 1, "tree": 1}
    drafts = found["trials"]["drafts"]
    assert (drafts["verdict"], drafts["tokens"], drafts["calls"]) == ("differs", 180, 48)
    assert drafts["verdicts"] == {"equal": 1, "differs": 1, "rounding": 1}
    assert drafts["note"] == "seed 1: after 3 tokens; seed 3: after 9 tokens; equal in float64"
    alone = merged([entry("equal", "tree", trials=trial("equal"))])
    assert (alone["error"], alone["trials"]["drafts"]["verdicts"]) == ("", {"equal": 1})


def test_server_that_says_something_else_differs(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import benchmarks.models.trials as trials

    served = trials.served

    def changed(*given: Any) -> list[list[int]]:
        first, *others = served(*given)
        return [[*first[:7], (first[7] + 1) % VOCABULARY, *first[8:]], *others]

    monkeypatch.setattr(trials, "served", changed)
    result = try_model(llama, image_text=False, trials=["server"])
    assert result["error"] == "server: row 0 after 7 tokens"


def test_what_a_model_converts_to_float32_becomes_float64(llama: Any) -> None:
    kinds: list[torch.dtype] = []

    def converted(module: Any, args: Any, options: Any) -> None:
        hidden = options["hidden_states"] if "hidden_states" in options else args[0]
        kinds.extend([hidden.float().dtype, hidden.to(torch.float32).dtype])

    llama.model.layers[0].register_forward_pre_hook(converted, with_kwargs=True)
    prompt = torch.arange(3, 40)[None]
    assert to_float64(llama, lambda: llama.generate(prompt, max_new_tokens=2, do_sample=False))
    assert set(kinds) == {torch.float64}
    assert torch.ones(1).double().float().dtype == torch.float32, "only in the model's passes"


def test_passes_in_two_threads_end_apart(llama: Any) -> None:
    prompt = torch.arange(3, 40)[None]
    assert to_float64(llama, lambda: llama.generate(prompt, max_new_tokens=2, do_sample=False))
    inside, release = threading.Event(), threading.Event()

    def waits(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert release.wait(60)

    llama.model.layers[0].register_forward_pre_hook(waits)
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        other = pool.submit(llama, prompt)
        assert inside.wait(60)
        assert llama(prompt).logits.dtype == torch.float64
        release.set()
        assert other.result(60).logits.dtype == torch.float64
        for kind in (pool.submit(_float32).result(60), _float32()):
            assert kind == torch.float32


def _float32() -> torch.dtype:
    return torch.ones(1).float().dtype


def test_model_that_fails_when_float32_is_replaced_computes_in_float64_otherwise(llama: Any) -> None:
    def fixed(module: Any, args: Any, options: Any) -> None:
        assert torch.ones(1, dtype=torch.float32).dtype == torch.float32

    llama.model.layers[0].register_forward_pre_hook(fixed, with_kwargs=True)
    prompt = torch.arange(3, 40)[None]
    assert to_float64(llama, lambda: llama.generate(prompt, max_new_tokens=2, do_sample=False))
    assert llama.dtype == torch.float64


@pytest.mark.parametrize("name", ["greedy", "drafts", "batch"])
def test_wrong_text_differs(llama: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    patched(monkeypatch, lambda model, out: flipped(out))
    result = try_model(llama, image_text=False, trials=[name])
    assert result["outcome"] == "differs"
    assert "after 53 tokens" in result["error"]


def test_text_that_drafts_change_differs_with_a_seed(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = RetrievalDrafter.generate

    def changed(self: Any, *given: Any, **options: Any) -> Any:
        out = generate(self, *given, **options)
        return flipped(out) if "documents" in options else out

    monkeypatch.setattr(RetrievalDrafter, "generate", changed)
    assert try_model(llama, image_text=False, trials=["seeded"])["outcome"] == "differs"


def test_difference_that_is_gone_in_float64_is_rounding(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, lambda model, out: flipped(out) if model.dtype == torch.float32 else out)
    result = try_model(llama, image_text=False, trials=["drafts"])
    assert result["outcome"] == "equal"
    assert result["trials"]["drafts"]["verdict"] == "rounding"
    assert summary({"llama": result})["rounding"] == ["llama"]


def test_replays_that_agree_in_float64_are_rounding(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = GraphPasses._compared

    def rounded(self: Any, *given: Any) -> Any:
        return compared(self, *given) if self._model.dtype == torch.float64 else False

    monkeypatch.setattr(GraphPasses, "_compared", rounded)
    result = try_model(llama, image_text=False, trials=["drafts"], graphs="tape")
    assert (result["outcome"], result["captured"]) == ("equal", "rounding")
    assert result["trials"]["drafts"]["verdict"] == "equal"
    assert summary({"llama": result})["captured"] == {"yes": 0, "rounding": 1, "no": 0}
    monkeypatch.setattr(GraphPasses, "_compared", lambda *_: False)
    result = try_model(tiny_model("llama", "LlamaForCausalLM"), False, ["drafts"], graphs="tape")
    assert "gave other logits" in result["captured"]


def test_errors_are_told_apart(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any, out: torch.Tensor) -> torch.Tensor:
        raise IndexError("beyond the end")

    with monkeypatch.context() as patch:
        patched(patch, broken)
        crashed = try_model(llama, image_text=False, trials=["drafts"])
    assert crashed["outcome"] == "crashed"
    assert "beyond the end" in crashed["error"]

    def refused(*given: Any, **options: Any) -> Any:
        raise UnsupportedModelError("no text")

    with monkeypatch.context() as patch:
        patch.setattr(RetrievalDrafter, "for_model", refused)
        assert try_model(llama, image_text=False)["outcome"] == "refused"
    with monkeypatch.context() as patch:
        patch.setattr(type(llama), "generate", broken)
        assert try_model(llama, image_text=False)["outcome"] == "stock_fails"


def test_images_are_found_by_trying() -> None:
    model = tiny_model("llava", "LlavaForConditionalGeneration", image_text=True)
    inputs = image_prompt(model)
    assert inputs is not None
    ids, _, given = inputs
    assert (
        int((ids == model.config.image_token_id).sum())
        == model.get_image_features(**given).pooler_output[0].shape[0]
    )
    assert image_prompt(tiny_model("llama", "LlamaForCausalLM")) is None
    other = image_prompt(model, 1)
    assert other is not None
    assert not torch.equal(other[0], ids)
    assert not torch.equal(other[2]["pixel_values"], given["pixel_values"])


def test_text_after_images_is_tried_greedily_and_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("images", "seeded-images")
    model = tiny_model("smolvlm", "SmolVLMForConditionalGeneration", image_text=True)
    result = try_model(model, True, names, seed=1)
    assert result["outcome"] == "equal"
    assert {name: trial["verdict"] for name, trial in result["trials"].items()} == dict.fromkeys(
        names, "equal"
    )
    assert all(trial["accepted"] > 0 for trial in result["trials"].values())
    patched(monkeypatch, lambda _, out: flipped(out))
    assert try_model(model, True, ("images",))["outcome"] == "differs"


def test_call_in_another_process_has_limits() -> None:
    assert isolated(math.comb, 5, 2, limit=60) == 10
    with pytest.raises(Failed, match=r"not done after 0\.5 s"):
        isolated(time.sleep, 60, limit=0.5)
    with pytest.raises(Failed, match="exit code 7"):
        isolated(os._exit, 7, limit=60)


def test_unknown_names_are_refused() -> None:
    for given in ({"names": ["lama"]}, {"trials": ["fast"]}, {"names": ["qwen3_vl"]}):
        with pytest.raises(InvalidInputError):
            measure_models(**given)


def entry(outcome: str, way: str | None = None, **more: Any) -> dict[str, Any]:
    names = {"family": "a", "mapping": "causal", "error": "", "reason": "", "trials": {}, "seeds": 1}
    return {**names, "outcome": outcome, "way": way, **more}


def test_models_are_counted_by_outcome() -> None:
    models = {outcome: entry(outcome, error="why") for outcome in OUTCOMES}
    models |= {"a": entry("equal", "chain"), "b": entry("plain", "plain")}
    result = summary(models)
    assert result["equal"] == ["equal", "a"]
    assert result["refused"] == {"refused": "why"}
    assert result["stock_fails"] == {"stock_fails": "why"}
    assert result["ways"] == {"tree": 0, "chain": 1, "plain": 1}
    assert failed(result)
    assert not failed(summary({"a": entry("equal", "tree"), "b": entry("refused", error="why")}))


@pytest.mark.slow
def test_command_prints_json_and_exits_by_the_result(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("llama", "musicgen", "--trials", "drafts", "--seeds", "2", "--json")
    code, out, _ = command("benchmarks", "models", *words)
    assert code == 0
    result = json.loads(out)
    assert result["equal"] == ["llama"]
    assert list(result["not_built"]) == ["musicgen"]
    assert result["models"]["llama"]["trials"]["drafts"]["verdicts"] == {"equal": 2}
    assert result["models"]["llama"]["trials"]["drafts"]["passes"] < 42
    assert command("benchmarks", "models", "lama")[0] == 1
    monkeypatch.setattr(
        "benchmarks.models.measure.measure_models", lambda *given, **options: summary({"a": entry("differs")})
    )
    code, out, _ = command("benchmarks", "models")
    assert code == 3
    assert "differs 1" in out


def test_page_has_one_row_for_each_family() -> None:
    spec = importlib.util.spec_from_file_location("models_page", ROOT / "scripts" / "models_page.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    models = {
        "a": entry("equal", "tree"),
        "a:wide": entry("equal", "chain", reason="its own windows"),
        "b": entry("plain", "plain", family="b", reason="state | from zero"),
        "c": entry("stock_fails", family="c", error="IndexError: none (a.py:3)"),
    }
    seen = entry(
        "equal",
        "tree",
        family="d",
        mapping="image-text",
        trials={"images": {"verdict": "rounding", "drafted": 5}},
    )
    unseen = entry("equal", "tree", family="e", mapping="image-text")
    versions = {"versions": {"transformers": "5.24.0"}}
    page = script.tables_of(
        {"models": each, "provenance": versions} for each in (models, {"d": seen, "e": unseen})
    )
    assert "| `a` | tree | `a:wide`: chain |" in page
    assert "| `b` | plain | state \\| from zero |" in page
    assert "| `c` | - | `model.generate` fails on the tiny model: IndexError: none |" in page
    assert "| `d` | tree | with images: drafted |" in page
    assert "| `e` | tree | not tried with images |" in page
    assert "transformers 5.24.0" in page
    again = script.tables_of([{"models": {"e": unseen}, "provenance": versions}], page)
    assert "| `a` | tree | `a:wide`: chain |" in again
    assert "| `d` |" not in again
    newer = {"versions": {"transformers": "5.25.0"}}
    with pytest.raises(SystemExit, match="another version"):
        script.tables_of([{"models": {"e": unseen}, "provenance": newer}], page)
    assert "4 models, variants included: 1 tree, 1 chain, 1 plain; 1 not measured." in page


@pytest.mark.parametrize(
    ("family", "kind", "way"),
    [
        # Positions of its own making in generate: neither trees nor chains, whose positions are given.
        ("kosmos-2.5", "Kosmos2_5ForConditionalGeneration", "plain"),
        # Keys chosen by position, where images take fewer positions than keys.
        ("hy_v4_vl", "HYV4VLForConditionalGeneration", "chain"),
    ],
)
def test_positions_that_are_not_those_of_keys(family: str, kind: str, way: str) -> None:
    if family not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        pytest.skip("this transformers does not have it")
    model = tiny_model(family, kind, image_text=True)
    result = try_model(model, image_text=True, trials=["greedy", "images"])
    assert (result["way"], result["error"]) == (way, "")
