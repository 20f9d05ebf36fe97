"""Drafters where transformers users meet them: pipelines; compiled, quantised, dispatched, adapted models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.engine.cpu.linear import CpuLinear
from retrieval_draft.engine.wrapped_models import is_compiled
from retrieval_draft.errors import UnsupportedGenerationError, UnsupportedModelError
from tests.support.drafters import near_ties, prompt_ids
from tests.support.models import make
from tests.support.tiny import TEXT, byte_tokenizer

CONFIG = DraftConfig(nodes=8)
OPTIONS: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
PROMPT = prompt_ids()


def wide() -> Any:
    """Widths that quantisers can group."""
    return make("llama", hidden_size=64, intermediate_size=128, head_dim=16)


def check(model: Any, plain_layers: int | None = None) -> RetrievalDrafter:
    """Generates as `model.generate` does, through `generate` and `custom_generate`, and takes drafts."""
    stock = model.generate(PROMPT, **OPTIONS)
    drafter = RetrievalDrafter.for_model(model, config=CONFIG)
    assert near_ties(drafter.target.model, drafter.generate(PROMPT, **OPTIONS), stock) == 0
    assert drafter.last_stats is not None
    assert drafter.last_stats.accepted > 0
    out = model.generate(input_ids=PROMPT, custom_generate=drafter, **OPTIONS)
    assert torch.equal(out, stock)
    if plain_layers is not None:
        assert len(drafter.kernels.linear._layers()) == plain_layers
    return drafter


# Pipelines


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = byte_tokenizer()
    made.pad_token, made.padding_side = "</s>", "left"
    made.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return made


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return make("llama", vocab_size=len(tokenizer), max_position_embeddings=1024)


@pytest.fixture(scope="module")
def pipe(model: Any, tokenizer: Any) -> Any:
    return transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def drafter(model: Any, tokenizer: Any) -> RetrievalDrafter:
    return RetrievalDrafter.for_model(model, tokenizer, config=CONFIG)


CHATS = [
    [{"role": "user", "content": TEXT}],
    [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat on the mat"},
        {"role": "user", "content": "and the dog"},
    ],
]


TEXTS = {"text": TEXT, "texts": [TEXT, "the log"], "chat": CHATS[0], "chats": CHATS}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("way", ["drafter", "method"])
def test_pipelines(pipe: Any, drafter: RetrievalDrafter, text: Any, batch_size: int, way: str) -> None:
    options = {"max_new_tokens": 24, "do_sample": False, "batch_size": batch_size}
    stock = pipe(text, **options)
    before = drafter.stats.requests
    loop = drafter if way == "drafter" else drafter.custom_generate
    assert pipe(text, custom_generate=loop, **options) == stock
    assert drafter.stats.requests > before


def test_a_pipeline_streams(pipe: Any, drafter: RetrievalDrafter, tokenizer: Any) -> None:
    class Pieces(transformers.TextStreamer):
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True)
            self.pieces: list[str] = []
            self.ended = False

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.pieces.append(text)
            self.ended |= stream_end

    streamed = {}
    for loop in (None, drafter):
        streamer = Pieces()
        pipe(TEXT, max_new_tokens=24, do_sample=False, streamer=streamer, custom_generate=loop)
        assert streamer.ended
        streamed[loop] = streamer.pieces
    assert streamed[None] == streamed[drafter]
    assert len(streamed[drafter]) > 2


def test_a_pipeline_may_have_its_generate_replaced(model: Any, pipe: Any, drafter: RetrievalDrafter) -> None:
    options = {"max_new_tokens": 24, "do_sample": False}
    stock = [pipe(text, **options) for text in TEXTS.values()]
    before = drafter.stats.requests
    try:
        model.generate = drafter.generate
        assert [pipe(text, **options) for text in TEXTS.values()] == stock
    finally:
        del model.generate
    assert drafter.stats.requests > before


def test_pipelines_sample_by_seed_and_quote_documents(pipe: Any, drafter: RetrievalDrafter) -> None:
    options = {"max_new_tokens": 24, "do_sample": True, "custom_generate": drafter, "draft_seed": 5}
    one = pipe(TEXT, **options)
    assert pipe(TEXT, **options) == one
    reply = one[0]["generated_text"][len(TEXT) :]
    assert pipe(TEXT, draft_documents=[reply], draft_prediction=reply, **options) == one


# torch.compile


def _compiled_model(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def _compiled_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def _compiled_forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def _compiled_layers(model: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "compiled", [_compiled_model, _compiled_in_place, _compiled_forward, _compiled_layers]
)
def test_compiled_models_run_as_written_while_drafting(compiled: Any) -> None:
    model = make("llama")
    stock = model.generate(PROMPT, **OPTIONS)
    model = compiled(model)
    torch._dynamo.reset()
    compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    drafter = RetrievalDrafter.for_model(model, config=CONFIG)
    assert torch.equal(drafter.generate(PROMPT, **OPTIONS), stock)
    assert torch.equal(model.generate(input_ids=PROMPT, custom_generate=drafter, **OPTIONS), stock)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compilations
    assert is_compiled(drafter.target.model) == (compiled is not _compiled_model)


def test_a_compiled_model_is_compiled_for_others_afterwards() -> None:
    model = _compiled_in_place(make("llama"))
    RetrievalDrafter.for_model(model, config=CONFIG).generate(PROMPT, **OPTIONS)
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.no_grad():
        model(PROMPT)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before


# Quantisation


ALL_LAYERS = 3 * 7 + 1
"""Linear layers of a tiny Llama, the head among them."""


@pytest.mark.parametrize(
    ("weights", "layers"), [("qint8", ALL_LAYERS), ("qint4", ALL_LAYERS - 1), ("qfloat8", 0)]
)
def test_quanto_weights(weights: str, layers: int) -> None:
    """The vocabulary is odd: two rows of four bits do not share its bytes."""
    quanto = pytest.importorskip("optimum.quanto")
    model = wide()
    quanto.quantize(model, weights=getattr(quanto, weights))
    quanto.freeze(model)
    check(model, plain_layers=layers)


def test_quanto_weights_and_inputs() -> None:
    quanto = pytest.importorskip("optimum.quanto")
    model = wide()
    quanto.quantize(model, weights=quanto.qint8, activations=quanto.qint8, exclude="lm_head")
    quanto.freeze(model)
    assert len(CpuLinear(model)._layers()) == 1  # the head, which is plain


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "IntxWeightOnlyConfig"])
def test_torchao_weights(name: str) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = wide()
    options = {"weight_dtype": torch.int4} if name.startswith("Intx") else {}
    torchao.quantize_(model, getattr(torchao, name)(**options))
    check(model, plain_layers=ALL_LAYERS)


def test_bitsandbytes_weights() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = wide()
    for parent in list(model.model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is torch.nn.Linear:
                shape = layer.in_features, layer.out_features
                made = bnb.nn.Linear4bit(*shape, bias=False, quant_type="nf4", compute_dtype=torch.float32)
                made.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
                setattr(parent, name, made.to("cpu"))
    check(model, plain_layers=1)  # the head


def test_layers_that_round_by_the_whole_pass_are_refused() -> None:
    with pytest.warns(DeprecationWarning, match="quantiz"):
        model = torch.ao.quantization.quantize_dynamic(wide(), {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(UnsupportedModelError, match=r"q_proj is of torch's dynamic quantisation"):
        RetrievalDrafter.for_model(model, strict=True)
    assert RetrievalDrafter.for_model(model).verification.way == "plain"


# accelerate and PEFT


def test_dispatched_model() -> None:
    accelerate = pytest.importorskip("accelerate")
    check(accelerate.dispatch_model(wide(), {"": "cpu"}, force_hooks=True), plain_layers=0)


def test_model_offloaded_to_memory() -> None:
    accelerate = pytest.importorskip("accelerate")
    drafter = check(accelerate.cpu_offload(wide(), execution_device=torch.device("cpu")), plain_layers=0)
    assert drafter.target.device.type == "cpu"


def test_model_offloaded_to_disk(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    check(
        accelerate.disk_offload(wide(), str(tmp_path), execution_device=torch.device("cpu")), plain_layers=0
    )


def test_a_model_without_numbers_is_refused() -> None:
    with torch.device("meta"):
        model = make("llama")
    with pytest.raises(UnsupportedModelError, match="meta device"):
        RetrievalDrafter.for_model(model)


_PEFT = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
"""peft asks for what newer versions of transformers call otherwise."""


@_PEFT
def test_lora_and_its_absence() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    base = wide()
    bare = base.generate(PROMPT, **OPTIONS)
    options = peft.LoraConfig(
        target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(base, options).eval()
    drafter = check(adapted)
    assert not torch.equal(drafter.generate(PROMPT, **OPTIONS), bare)
    with adapted.disable_adapter():
        assert torch.equal(drafter.generate(PROMPT, **OPTIONS), bare)
    adapted.merge_and_unload()
    check(base)


@_PEFT
def test_adapters_that_come_later_act() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    base = wide()
    drafter = RetrievalDrafter.for_model(base)
    bare = drafter.generate(PROMPT, **OPTIONS)
    options = peft.LoraConfig(
        target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(base, options).eval()
    found = drafter.generate(PROMPT, **OPTIONS)
    assert torch.equal(found, adapted.generate(input_ids=PROMPT, **OPTIONS))
    assert not torch.equal(found, bare)


@_PEFT
def test_an_activated_lora_is_refused_while_it_is_active() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    base = wide()
    options = {"target_modules": ["q_proj", "v_proj"], "r": 4, "init_lora_weights": False}
    usual = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    activated = peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[int(PROMPT[0, 3])], **options)
    adapted = peft.get_peft_model(base, usual, adapter_name="usual").eval()
    drafter = check(adapted)
    adapted.add_adapter("activated", activated)
    adapted.eval()
    check(adapted)
    adapted.set_adapter("activated")
    for call in (
        lambda: drafter.generate(PROMPT, **OPTIONS),
        lambda: RetrievalDrafter.for_model(adapted),
    ):
        with pytest.raises(UnsupportedModelError, match=r"'activated'.*activated LoRA"):
            call()
    adapted.set_adapter("usual")
    check(adapted)


@_PEFT
def test_adapters_of_single_rows_are_refused_by_name() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    options = peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(wide(), options).eval()
    drafter = RetrievalDrafter.for_model(adapted)
    rows, names = torch.cat([PROMPT, PROMPT.roll(3, 1)]), ["default", "__base__"]
    with pytest.raises(UnsupportedGenerationError, match="adapter_names"):
        drafter.generate(rows, adapter_names=names, **OPTIONS)
    with pytest.raises(UnsupportedModelError, match="adapter_names"):
        adapted.generate(input_ids=rows, adapter_names=names, custom_generate=drafter, **OPTIONS)
    # peft leaves its hooks in a model whose call has failed.
    adapted = peft.get_peft_model(wide(), options).eval()
    drafter = RetrievalDrafter.for_model(adapted)
    alone = adapted.generate(input_ids=PROMPT, adapter_names=["__base__"], **OPTIONS)
    ours = adapted.generate(input_ids=PROMPT, adapter_names=["__base__"], custom_generate=drafter, **OPTIONS)
    assert torch.equal(ours, alone)


@_PEFT
def test_prompt_tuning_is_refused() -> None:
    peft = pytest.importorskip("peft")
    options = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    with pytest.raises(UnsupportedModelError, match=r"PromptTuningConfig.*LoRA"):
        RetrievalDrafter.for_model(peft.get_peft_model(wide(), options))
