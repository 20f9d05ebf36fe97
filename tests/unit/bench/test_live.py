import gzip
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from retrieval_draft.bench import live as live_module
from retrieval_draft.bench.agreement import compare_outputs
from retrieval_draft.bench.decoders import LOOKUP_TOKENS, Run
from retrieval_draft.bench.forward_passes import ForwardPasses
from retrieval_draft.bench.live import live
from retrieval_draft.bench.prompts import STAND_IN, Prompt, random_prompts, read_prompts, spread
from retrieval_draft.bench.replay import read_traces
from retrieval_draft.errors import InvalidInputError, UnknownMethodError
from tests.support.models import make
from tests.support.tiny import TEXT, byte_tokenizer

PROMPTS = [
    Prompt("a", "first", TEXT),
    Prompt("b", "second", "1 2 3 4 1 2 3 4 1 2"),
    Prompt("c", "first", "x"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return make("llama", vocab_size=len(tokenizer))


@pytest.fixture(scope="module")
def result(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl.gz"
    methods = ["stock", "stock-pld", "none", "calibrated"]
    found = live(model, tokenizer, PROMPTS, max_new_tokens=24, methods=methods, nodes=8, record=path)
    return {**found, "trace": path}


def test_every_method_yields_the_text_of_stock(result: dict[str, Any]) -> None:
    for entry in result["methods"].values():
        assert entry["equal_to_stock"] + entry["near_ties"] == len(PROMPTS)
        assert entry["different"] == 0


def test_plain_decoding_has_one_token_per_step(result: dict[str, Any]) -> None:
    assert result["methods"]["stock"]["tokens_per_step"] == 1.0
    assert result["methods"]["none"]["tokens_per_step"] == 1.0
    assert result["methods"]["stock"]["nodes_per_step"] == 0.0
    assert result["methods"]["none"]["nodes_per_step"] == 0.0


def test_steps_of_prompt_lookup_are_counted_as_its_forward_passes(
    result: dict[str, Any], model: Any, tokenizer: Any
) -> None:
    steps = fed = 0
    for prompt in PROMPTS:
        with ForwardPasses(model) as count:
            ids = torch.tensor([prompt.encode(tokenizer)])
            model.generate(ids, max_new_tokens=24, do_sample=False, prompt_lookup_num_tokens=LOOKUP_TOKENS)
        steps, fed = steps + count.passes - 1, fed + count.fed
    entry = result["methods"]["stock-pld"]
    assert (entry["tokens"], entry["steps"]) == (24 * len(PROMPTS), steps)
    assert entry["tokens_per_step"] == 23 * len(PROMPTS) / steps
    assert entry["nodes_per_step"] == (fed - steps) / steps


def test_accepted_drafts_save_steps(result: dict[str, Any]) -> None:
    entry = result["methods"]["calibrated"]
    assert entry["tokens"] == 24 * len(PROMPTS)
    assert 0 < entry["steps"] < 23 * len(PROMPTS), "one token a step is what plain decoding has"
    assert entry["tokens_per_step"] == 23 * len(PROMPTS) / entry["steps"]
    assert 0 < entry["nodes_per_step"] <= 8


def test_result_has_the_fields_of_the_design(result: dict[str, Any]) -> None:
    assert {"methods", "by_task", "model", "device", "dtype"} <= result.keys()
    assert result["device"] == "cpu"
    assert result["dtype"] == "float32"
    for entry in result["methods"].values():
        assert {"tokens_per_second", "tokens_per_step", "equal_to_stock", "ratio_to_stock"} <= entry.keys()
        assert {"median", "p10", "p90"} == entry["ratio_to_stock"].keys()
    assert result["methods"]["stock"]["ratio_to_stock"]["median"] == 1.0
    assert set(result["by_task"]) == {"first", "second"}
    assert {"git", "versions", "argv", "threads"} <= result["provenance"].keys()
    json.dumps({name: value for name, value in result.items() if name != "trace"})


def test_recorded_trace_holds_stock_replies_and_their_best_tokens(
    result: dict[str, Any], model: Any, tokenizer: Any
) -> None:
    traces = list(read_traces([result["trace"]]))
    assert [trace.task for trace in traces] == ["first", "second", "first"]
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    stock = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    assert traces[0].output.tolist() == stock.tolist()
    assert traces[0].top_tokens is not None
    assert traces[0].top_tokens.shape == (24, 8)
    assert traces[0].top_tokens[:, 0].tolist() == stock.tolist()
    with gzip.open(result["trace"], "rt") as lines:
        assert json.loads(next(lines)).keys() == {"id", "task", "turn", "prompt", "output", "top"}


def test_steps_of_prompt_lookup_are_forward_passes(model: Any, tokenizer: Any) -> None:
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with ForwardPasses(model) as plain:
        model.generate(ids, max_new_tokens=10, do_sample=False)
    assert plain.passes == 10
    assert plain.fed == 9


def test_methods_take_turns_to_begin(monkeypatch: pytest.MonkeyPatch, model: Any, tokenizer: Any) -> None:
    called: list[str] = []

    class Fake:
        def __init__(self, name: str, *rest: Any) -> None:
            self.name = name

        def generate(self, ids: Any, max_new_tokens: int) -> Run:
            called.append(self.name)
            return Run([1, 2], 0.5, 1, 0)

    monkeypatch.setattr(live_module, "make_contestant", Fake)
    found = live(model, tokenizer, PROMPTS, max_new_tokens=2, methods=["stock", "a", "b"])
    warm_up = ["stock", "a", "b"]
    assert called == [*warm_up, "stock", "a", "b", "a", "b", "stock", "b", "stock", "a"]
    assert found["methods"]["a"]["tokens_per_second"] == 4.0


def test_unknown_method_lists_the_known(model: Any, tokenizer: Any) -> None:
    with pytest.raises(UnknownMethodError, match="stock-pld"):
        live(model, tokenizer, PROMPTS, max_new_tokens=4, methods=["magic"])


def test_recording_needs_stock(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="stock"):
        live(model, tokenizer, PROMPTS, max_new_tokens=4, methods=["none"], record=tmp_path / "t.gz")


def test_without_stock_there_is_nothing_to_compare_with(model: Any, tokenizer: Any) -> None:
    entry = live(model, tokenizer, PROMPTS[:1], max_new_tokens=4, methods=["none"])["methods"]["none"]
    assert entry["ratio_to_stock"] is None
    assert entry["equal_to_stock"] is None


class TwoLogits(torch.nn.Module):
    """Says the same at every position."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(len(logits), 1)
        self.logits = torch.tensor(logits)

    def get_input_embeddings(self) -> Any:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        class Out:
            logits = self.logits.expand(*input_ids.shape, -1)

        return Out()


def test_equal_replies_are_equal() -> None:
    assert compare_outputs(None, [0], [1, 2], [1, 2]) == "equal"


def test_a_near_tie_excuses_a_difference() -> None:
    assert compare_outputs(TwoLogits(1.0, 0.99995, 0.0), [0], [0, 0, 0], [0, 1, 0]) == "tie"


def test_a_clear_difference_is_not_excused() -> None:
    assert compare_outputs(TwoLogits(1.0, 0.999, 0.0), [0], [0, 0, 0], [0, 1, 0]) == "different"


def test_a_tie_does_not_excuse_what_follows() -> None:
    assert compare_outputs(TwoLogits(1.0, 0.99995, 0.0), [0], [0, 0, 0], [0, 1, 2]) == "different"


def test_a_reply_that_ends_too_soon_differs() -> None:
    assert compare_outputs(TwoLogits(1.0, 1.0), [0], [0, 0, 0], [0, 0]) == "different"


def test_prompts_are_read_with_turns_and_tasks(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"prompt": "one"}\n\n{"id": 7, "task": "chat", "turns": ["two", "three"]}\n')
    assert read_prompts([path]) == [Prompt("1", "mixed", "one"), Prompt("7", "chat", "two")]


def speed_bench(question: str, category: str, *turns: str) -> dict[str, Any]:
    """A row as SPEED-Bench publishes it."""
    return {
        "question_id": question, "category": category, "sub_category": None, "turns": list(turns),
        "source": "made by hand", "src_id": "1", "difficulty": None, "multiturn": len(turns) > 1,
    }  # fmt: skip


def test_prompts_of_spec_bench_are_read_by_category(tmp_path: Path) -> None:
    path = tmp_path / "question.jsonl"
    lines = [
        {"question_id": 81, "category": "writing", "turns": ["one", "more"], "reference": ["a", "b"]},
        {"question_id": 161, "category": "translation", "turns": ["two"]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert read_prompts([path]) == [Prompt("81", "writing", "one"), Prompt("161", "translation", "two")]


def test_prompts_of_speed_bench_are_read_from_parquet_and_as_prepared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arrow = pytest.importorskip("pyarrow")
    rows = [
        speed_bench("a1", "coding", "one", "more"),
        speed_bench("a2", "roleplay", f"{STAND_IN}\n\nA role."),
        speed_bench("a3", "math", "two\u2028three"),
    ]
    table, lines = tmp_path / "test-00000-of-00001.parquet", tmp_path / "qualitative.jsonl"
    importlib.import_module("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows), table)
    prepared = [
        {**row, "messages": [{"role": "user", "content": turn} for turn in row.pop("turns")]} for row in rows
    ]
    lines.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in prepared), encoding="utf-8")
    found = [Prompt("a1", "coding", "one"), Prompt("a3", "math", "two\u2028three")]
    for path in (table, lines):
        caplog.clear()
        assert read_prompts([path]) == found
        assert f"{path}: 1 of 3 prompts are stand-ins" in caplog.text
    lines.write_text(json.dumps(speed_bench("a2", "roleplay", STAND_IN)))
    with pytest.raises(InvalidInputError, match="all of its 1 prompts"):
        read_prompts([lines])
    table.write_bytes(b"PAR1torn")
    with pytest.raises(InvalidInputError, match="Cannot read the prompts"):
        read_prompts([table])


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "{}",
        '{"turns": []}',
        '{"prompt": 3}',
        "[]",
        "3",
        '"prompt"',
        '{"messages": [{"role": "system", "content": "x"}]}',
    ],
)
def test_broken_prompt_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(InvalidInputError, match="line 2"):
        read_prompts([path])


def test_prompts_are_taken_in_turn_from_every_task() -> None:
    many = [Prompt(str(number), "many", "x") for number in range(20)]
    few = [Prompt(f"f{number}", "few", "x") for number in range(2)]
    taken = spread([*many, *few], 6)
    assert [prompt.task for prompt in taken] == ["many", "few", "many", "few", "many", "many"]
    assert spread([*many, *few], 6) == taken
    assert spread([*many, *few], 6, seed=1) != taken
    assert {prompt.task for prompt in spread([*many, *few], None, ["few"])} == {"few"}
    with pytest.raises(InvalidInputError, match="many, few"):
        spread([*many, *few], 6, ["none such"])


def test_random_prompts_avoid_special_tokens() -> None:
    prompts = random_prompts(3, 50, 10, avoid=[0, 9])
    assert [len(prompt.ids) for prompt in prompts] == [50, 50, 50]
    assert {token for prompt in prompts for token in prompt.ids} == set(range(1, 9))
    assert prompts[0].ids != prompts[1].ids
