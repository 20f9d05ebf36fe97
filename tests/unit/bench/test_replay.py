from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from retrieval_draft.bench.replay import replay
from retrieval_draft.errors import InvalidInputError

DATA = Path(__file__).parents[2] / "data" / "vicuna7b_specbench_12.jsonl.gz"


def write(path: Path, *records: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_a_copied_passage_is_accepted_whole(tmp_path: Path) -> None:
    passage = list(range(100, 120))
    trace = write(tmp_path / "t.jsonl", {"task": "copy", "prompt": [1, *passage, 2], "output": passage})
    result = replay([trace], nodes=30)
    # The first token comes from the prefill, the second is not drafted for sure, the rest is one match.
    assert result["steps"] <= 2
    assert result["tokens"] == 20
    assert result["by_task"] == {"copy": result["tokens_per_step"]}


def test_no_drafts_means_one_token_a_step(tmp_path: Path) -> None:
    trace = write(tmp_path / "t.jsonl", {"task": "a", "prompt": [1, 2, 3], "output": [1, 2, 3, 1]})
    result = replay([trace], nodes=16, method="none")
    assert result["steps"] == 3
    assert result["nodes_per_step"] == 0


def test_history_is_kept_or_not(tmp_path: Path) -> None:
    record = {"task": "a", "prompt": [1], "output": [5, 6, 7, 8, 9, 10, 11, 12]}
    trace = write(tmp_path / "t.jsonl", record, record)
    kept = replay([trace], nodes=16, sources=["adjacency"], history=True)
    fresh = replay([trace], nodes=16, sources=["adjacency"], history=False)
    assert fresh["steps"] == 14
    assert kept["steps"] < fresh["steps"]


def test_recorded_alternatives_teach_the_adjacency_matrix(tmp_path: Path) -> None:
    top = [[[6, 9]] + [[0, 1]] * 3, [[0.6, 0.4]] + [[0.5, 0.5]] * 3]
    record = {"task": "a", "prompt": [5], "output": [6, 5, 9, 5], "top": top}
    plain = {key: value for key, value in record.items() if key != "top"}
    with_top = replay([write(tmp_path / "a.jsonl", record)], nodes=8, sources=["adjacency"])
    without = replay([write(tmp_path / "b.jsonl", plain)], nodes=8, sources=["adjacency"])
    assert with_top["steps"] < without["steps"]  # 9 after 5 was the second choice the first time


def test_real_outputs_of_a_7b_model() -> None:
    """Twelve requests of a greedy run on Spec-Bench: a floor, the whole file is the bench's business."""
    result = replay([DATA], nodes=60, history=False)
    prompt_lookup = 1.6
    assert result["tokens_per_step"] > prompt_lookup
    assert set(result["by_task"]) == {
        "mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag",
    }  # fmt: skip
    assert replay([DATA], nodes=16, history=False)["tokens_per_step"] < result["tokens_per_step"]


@pytest.mark.parametrize("line", ["{", "[1]", '{"prompt": [1]}', '{"prompt": ["a"], "output": [1]}'])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"prompt": [1], "output": [2, 3]}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(InvalidInputError, match=r"broken.jsonl, line 2 is not a trace"):
        replay([path], nodes=4)


def test_missing_torn_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="Cannot read the trace"):
        replay([tmp_path / "none.jsonl"], nodes=4)
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(gzip.compress(b'{"prompt": [1], "output": [2]}\n' * 1000)[:-20])
    with pytest.raises(InvalidInputError, match="Cannot read the trace"):
        replay([torn], nodes=4)
    with pytest.raises(InvalidInputError, match="Nothing to replay"):
        replay([write(tmp_path / "empty.jsonl")], nodes=4)


def test_learning_late_costs_a_step_where_the_next_one_needs_it(tmp_path: Path) -> None:
    trace = write(tmp_path / "t.jsonl", {"prompt": [1, 2], "output": [5, 6] * 12})
    now, late = (
        replay([trace], nodes=8, sources=["adjacency"], late=late)["steps"] for late in (False, True)
    )
    assert now < late <= now + 2


def test_sources_of_the_last_predictions_get_them_in_time_when_learning_is_late(tmp_path: Path) -> None:
    tokens = list(range(5, 25))
    top = [[[token, token + 1] for token in tokens], [[0.6, 0.3]] * len(tokens)]
    trace = write(tmp_path / "t.jsonl", {"prompt": [1, 2], "output": tokens, "top": top})
    now, late = (
        replay([trace], nodes=8, sources=["runners-up"], late=late)["steps"] for late in (False, True)
    )
    assert now == late < len(tokens) - 1


def test_the_last_step_is_learned_when_learning_is_late(tmp_path: Path) -> None:
    record = {"task": "a", "prompt": [1], "output": [5, 6, 7, 8, 9, 10, 11, 12]}
    trace = write(tmp_path / "t.jsonl", record, record)
    found = [replay([trace], nodes=16, sources=["adjacency"], late=late) for late in (False, True)]
    assert found[0]["steps"] == found[1]["steps"]


def test_references_are_drafted_from(tmp_path: Path) -> None:
    passage = list(range(100, 120))
    record = {"task": "quote", "prompt": [1, 2], "output": passage}
    alone = replay([write(tmp_path / "a.jsonl", record)], nodes=30)
    helped = replay([write(tmp_path / "b.jsonl", record | {"references": [[7, 8], passage]})], nodes=30)
    assert helped["steps"] <= 2 < alone["steps"]


def test_turns_of_a_conversation_are_counted_apart(tmp_path: Path) -> None:
    reply = [5, 6, 7, 8, 9, 10, 11, 12]
    first = {"task": "a", "prompt": [1], "output": reply}
    second = {"task": "a", "turn": 1, "prompt": [1, *reply, 2], "output": reply}
    found = replay([write(tmp_path / "t.jsonl", first, second)], nodes=16, history=False)
    assert set(found["by_turn"]) == {0, 1}
    assert found["by_turn"][0] < found["by_turn"][1]


def test_a_sampled_trace_is_drafted_with_its_noise(tmp_path: Path) -> None:
    record = {"task": "a", "prompt": [1, 2, 3, 1], "output": [2, 3, 1, 2, 3, 1, 2]}
    noise = {"seed": 3, "sample": 0, "vocabulary": 16}
    sampled = replay([write(tmp_path / "t.jsonl", record | {"noise": noise})], nodes=4)
    assert sampled["tokens"] == 7
    with pytest.raises(InvalidInputError, match="line 1"):
        replay([write(tmp_path / "u.jsonl", record | {"references": [["x"]]})], nodes=4)


def test_prompts_become_references(tmp_path: Path) -> None:
    passage = list(range(100, 120))
    trace = write(tmp_path / "t.jsonl", {"task": "copy", "prompt": [*passage, 1, 2], "output": passage})
    whole, given, without, shorter = (
        replay([trace], nodes=30, **options)["steps"]
        for options in (
            {},
            {"prompt_tokens": 2},
            {"prompt_tokens": 2, "references": False},
            {"prompt_tokens": 40},
        )
    )
    assert whole == given == shorter <= 2 < without
    assert replay([trace], nodes=30, prompt_tokens=0)["steps"] <= 2
