"""Generation on a CUDA device: dtypes, head sizes, grouped heads, batches, sampling, stop strings, streamers.

Greedy text in float32 is that of `model.generate`, near ties aside. In half precision a token is right when
it lies within two units in the last place of the best one in a teacher-forced pass, and how often replies
part is set beside a control: `model.generate` against itself with one more row in its batch.

Without a device a part of the same runs on the CPU, so that nothing here can fail for another reason than
the card.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.gpu_check.half_precision import too_many
from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.bench.decoders import cudnn_attention
from retrieval_draft.bench.ties import Ties, compare, count_ties
from retrieval_draft.engine.sampling.noise import GumbelNoise
from tests.support.drafters import drafter_with, reply_of
from tests.support.models import CONFIGS, make
from tests.support.sources import OracleSource
from tests.support.tiny import TEXT, byte_tokenizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCABULARY = 97
NEW = 24
LAYERS = 2

cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
HALVES = [torch.bfloat16, torch.float16]
Record = Callable[[str, object], None]


@dataclass(frozen=True)
class Shape:
    """A model of the grid."""

    name: str
    dtype: torch.dtype
    head_dim: int = 64
    kv_heads: int = 2
    attention: str = "sdpa"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}-{dtype}-{self.head_dim}x{self.kv_heads}-{self.attention}"


@cache
def model_of(shape: Shape) -> Any:
    options: dict[str, Any] = {"num_hidden_layers": LAYERS}
    if shape.name == "gpt2":
        options = {}
    elif shape.name != "gpt-neox":
        options |= {"head_dim": shape.head_dim, "num_key_value_heads": shape.kv_heads}
    if shape.name in ("gemma3", "qwen3-windowed"):
        options["layer_types"] = ["sliding_attention", "full_attention"]
    if shape.name == "gemma3":
        options["query_pre_attn_scalar"] = shape.head_dim
    model = make(shape.name, attention=shape.attention, **options)
    return model.to(device=DEVICE, dtype=shape.dtype)


@pytest.fixture(autouse=True)
def without_cudnn() -> Iterator[None]:
    """cuDNN's attention plans anew for every length, which takes tens of milliseconds: few tests want it."""
    with cudnn_attention(False):
        yield


def prompts(rows: int = 1, length: int = 23, vocabulary: int = VOCABULARY) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, vocabulary, (rows, length), generator=generator).to(DEVICE)


def stock_replies(model: Any, prompt: torch.Tensor, new: int = NEW) -> list[list[int]]:
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False)
    return [row[prompt.shape[1] :].tolist() for row in out]


@cache
def control_of(shape: Shape) -> tuple[list[int], Ties, int]:
    """The reply of `model.generate`, its own ties alone and beside another row, and whether the two part."""
    model, both = model_of(shape), prompts(2)
    alone, beside = stock_replies(model, both[:1])[0], stock_replies(model, both)[0]
    ties = count_ties(model, both[0].tolist(), alone)
    ties.add(count_ties(model, both[0].tolist(), beside))
    return alone, ties, compare(alone, beside) is not None


def check(shape: Shape, reply: list[int], stock: list[int], prompt: torch.Tensor, record: Record) -> None:
    """Fails unless `reply` is stock's, or parts from it for near ties alone."""
    model, ids = model_of(shape), prompt.tolist()
    _, control, parts = control_of(shape)
    ties = count_ties(model, ids, reply)
    record("parted", int(compare(stock, reply) is not None))
    record("control_parted", int(parts))
    for name, value in ties.as_dict().items():
        if name != "worst":
            record(name, value)
    assert len(reply) == len(stock)
    if shape.dtype == torch.float32:
        assert ties.worse == 0, f"{ties} at {compare(stock, reply)}"
    else:
        assert not too_many(ties, control), f"{ties}, stock {control}"


def drafted_equals_stock(shape: Shape, nodes: int, record: Record) -> None:
    model, prompt = model_of(shape), prompts()
    stock = control_of(shape)[0]
    drafter = drafter_with(model, OracleSource(stock), nodes=nodes)
    out = drafter.generate(prompt, max_new_tokens=NEW, do_sample=False)
    assert drafter.stats.accepted > 0
    graphs = drafter.target.graphs
    assert (graphs is not None) == (DEVICE.type == "cuda")
    # Experts in float32 are chosen by torch operations that wait for the host, in the middle of a pass.
    if graphs is not None and (shape.name, shape.dtype) != ("mixtral", torch.float32):
        assert graphs.reason is None
        assert graphs.by_tree == (shape.dtype in HALVES and importlib.util.find_spec("triton") is not None)
    check(shape, list(reply_of(out, prompt)), stock, prompt[0], record)


def rows_equal_stock(shape: Shape, rows: int, record: Record) -> None:
    """Rows of a batch are what each is alone."""
    model, prompt = model_of(shape), prompts(rows)
    stock = [stock_replies(model, prompt[row : row + 1])[0] for row in range(rows)]
    drafter = drafter_with(model, OracleSource(*stock), nodes=8)
    out = drafter.generate(prompt, max_new_tokens=NEW, do_sample=False)
    assert drafter.stats.accepted > 0
    for row in range(rows):
        check(shape, out[row, prompt.shape[1] :].tolist(), stock[row], prompt[row], record)


def drafts_do_not_change_samples(shape: Shape, record: Record) -> None:
    model, prompt = model_of(shape), prompts()
    options = {"max_new_tokens": NEW, "do_sample": True, "top_k": 0, "seed": 1}
    plain = RetrievalDrafter.for_model(model, method="none")
    expected = list(reply_of(plain.generate(prompt, **options), prompt))
    drafter = drafter_with(model, OracleSource(expected), nodes=16)
    reply = list(reply_of(drafter.generate(prompt, **options), prompt))
    assert drafter.stats.accepted > 0
    noise = GumbelNoise(1, VOCABULARY, DEVICE)
    ids = prompt[0].tolist()
    ties, control = count_ties(model, ids, reply, noise), count_ties(model, ids, expected, noise)
    record("sampled_parted", int(reply != expected))
    if shape.dtype == torch.float32:
        assert ties.worse == 0, f"{ties} at {compare(expected, reply)}"
    else:
        assert not too_many(ties, control), f"{ties}, undrafted {control}"


class Streamed:
    """A streamer that keeps everything."""

    def __init__(self) -> None:
        self.put_tokens: list[int] = []
        self.ended = 0

    def put(self, tokens: torch.Tensor) -> None:
        self.put_tokens += tokens.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


def streamer_sees_every_token(shape: Shape) -> None:
    model, prompt, streamer = model_of(shape), prompts(), Streamed()
    drafter = drafter_with(model, OracleSource(control_of(shape)[0]), nodes=8)
    out = drafter.generate(prompt, max_new_tokens=NEW, do_sample=False, streamer=streamer)
    assert streamer.put_tokens == out[0].tolist()
    assert streamer.ended == 1


def stop_string_ends_as_stock(dtype: torch.dtype) -> None:
    tokenizer = byte_tokenizer()
    model = make("llama", vocab_size=len(tokenizer)).to(device=DEVICE, dtype=dtype)
    prompt = torch.tensor([tokenizer(TEXT)["input_ids"]], device=DEVICE)
    reply = stock_replies(model, prompt)[0]
    letter = next(text for token in reply[4:] if (text := tokenizer.decode([token])).isascii())
    options = {"max_new_tokens": NEW, "do_sample": False, "stop_strings": [letter]}
    stock = model.generate(prompt, attention_mask=torch.ones_like(prompt), tokenizer=tokenizer, **options)
    drafter = RetrievalDrafter.for_model(model, tokenizer, config=DraftConfig(nodes=8))
    out = drafter.generate(prompt, prediction=reply, **options)
    assert stock.shape[1] < prompt.shape[1] + NEW
    if dtype == torch.float32 or torch.equal(out, stock):
        assert torch.equal(out, stock)
    else:
        assert count_ties(model, prompt[0].tolist(), list(reply_of(out, prompt))).worse == 0


def shape_params(*shapes: Shape) -> list[Any]:
    """Shapes for a device, and some of them on a CPU."""
    return [
        *(pytest.param(shape, marks=cuda, id=str(shape)) for shape in shapes),
        *(pytest.param(shape, id=f"rehearsal-{shape}") for shape in REHEARSED),
    ]


DTYPES = (torch.bfloat16, torch.float32, torch.float16)
REHEARSED = [Shape("llama", torch.float32), Shape("gemma3", torch.bfloat16)]
TELLING = [
    Shape("llama", torch.bfloat16, 128, 4),
    Shape("llama", torch.float32, 64, 1),
    Shape("llama", torch.float16, 64, 2),
]
SOME = [*(Shape("llama", dtype) for dtype in DTYPES), Shape("gemma3", torch.bfloat16)]
FAMILIES = [
    Shape(name, dtype, 64, 4 if name in ("gpt-neox", "gpt2") else 2, attention)
    for dtype, attention in ((torch.bfloat16, "sdpa"), (torch.float32, "sdpa"), (torch.float32, "eager"))
    for name in CONFIGS
]
SHAPES = [
    shape
    for dtype in DTYPES
    for size in (64, 128, 256)
    for heads in (1, 4)
    if (shape := Shape("llama", dtype, size, heads)) not in TELLING
]


# The most telling first: on a card that is lent for a while the rest may not come to run.
@pytest.mark.parametrize("shape", shape_params(*TELLING))
def test_greedy_equals_stock(shape: Shape, record_property: Record) -> None:
    for nodes in (1, 8, 60) if DEVICE.type == "cuda" else (8,):
        drafted_equals_stock(shape, nodes, record_property)


@pytest.mark.parametrize("shape", shape_params(*SOME))
def test_rows_of_a_batch_equal_stock(shape: Shape, record_property: Record) -> None:
    rows_equal_stock(shape, 5 if DEVICE.type == "cuda" else 2, record_property)


@pytest.mark.parametrize("shape", shape_params(*SOME))
def test_seeded_sampling_equals_undrafted(shape: Shape, record_property: Record) -> None:
    drafts_do_not_change_samples(shape, record_property)


@pytest.mark.parametrize(
    "dtype",
    [
        *(pytest.param(dtype, marks=cuda, id=str(dtype)[6:]) for dtype in DTYPES),
        pytest.param(torch.float32, id="rehearsal-float32"),
    ],
)
def test_stop_string_ends_as_stock(dtype: torch.dtype) -> None:
    stop_string_ends_as_stock(dtype)


@pytest.mark.parametrize("shape", shape_params(*SOME[:2]))
def test_streamer_sees_every_token_once(shape: Shape) -> None:
    streamer_sees_every_token(shape)


def test_probe_is_made_of_passes_without_a_wait_between(record_property: Record) -> None:
    """Passes follow each other without a read: the inputs of one must not be those of the next."""
    model = make("llama").to(DEVICE)
    for _ in range(3):
        RetrievalDrafter.for_model(model)


@pytest.mark.parametrize("shape", [pytest.param(shape, marks=cuda, id=str(shape)) for shape in FAMILIES])
def test_greedy_of_a_family_equals_stock(shape: Shape, record_property: Record) -> None:
    drafted_equals_stock(shape, 8, record_property)


@pytest.mark.parametrize("shape", [pytest.param(shape, marks=cuda, id=str(shape)) for shape in TELLING])
def test_greedy_with_cudnn_equals_stock(shape: Shape, record_property: Record) -> None:
    with cudnn_attention(True):
        drafted_equals_stock(shape, 8, record_property)


@pytest.mark.parametrize("shape", [pytest.param(shape, marks=cuda, id=str(shape)) for shape in SHAPES])
def test_greedy_of_a_shape_equals_stock(shape: Shape, record_property: Record) -> None:
    for nodes in (8, 60):
        drafted_equals_stock(shape, nodes, record_property)
