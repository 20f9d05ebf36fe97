"""Drafts in a real vLLM: output equal to vLLM's own, through concurrency, aborts and preemption."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from retrieval_draft.errors import UnsupportedEngineError
from retrieval_draft.integrations.vllm.interface import check_interface
from retrieval_draft.models.packaged import packaged_folder
from tests.integrations.vllm.engines import (
    SPECULATIVE,
    core_of,
    engine,
    proposer_of,
    same_or_tie,
    several_engines,
)

pytestmark = pytest.mark.timeout(3600)

ROOT = Path(__file__).resolve().parents[3]
NEW = 24
BLOCKS = 50
"""Of 16 tokens. Gemma's layers take four for each 16 of text: four prompts of 30 tokens fit, replies of 64 to
them do not."""


@pytest.fixture(scope="module")
def model() -> str:
    return str(packaged_folder("gemma3-270m"))


@pytest.fixture(scope="module")
def plain(model: str) -> Any:
    return engine(model)


@pytest.fixture(scope="module")
def drafting(model: str) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        # Drafts at every step, whatever the machine: more to go wrong.
        patch.setenv("RETRIEVAL_DRAFT_COSTS", "ignored")
        made = engine(model, SPECULATIVE)
    watch_texts(proposer_of(made))
    return made


@pytest.fixture(scope="module")
def prompts(plain: Any) -> list[list[int]]:
    tokenizer = plain.get_tokenizer()
    lines = (ROOT / "tests/data/prompts_4.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    texts = [record["prompt"] if "prompt" in record else record["turns"][0] for record in records]
    texts.append("red, green, blue, red, green, blue, red, green,")
    return [tokenizer.encode(text)[:150] for text in texts]


@pytest.fixture(scope="module")
def references(plain: Any, prompts: list[list[int]]) -> list[list[int]]:
    return run(plain, prompts)


def watch_texts(proposer: Any) -> None:
    """Lets every call check that each row is drafted for by the session that has exactly its text."""
    rows = proposer.rows
    ask = rows._chains_of

    def asked(slots: Any, ends: Any, sampled: Any) -> Any:
        drafts = ask(slots, ends, sampled)
        for slot in slots.tolist():
            known = rows._chains.text(int(rows.tracker.sessions[slot])).tolist()
            assert known + rows._held.get(slot, []) == rows.tracker.text(slot).tolist()
        return drafts

    rows._chains_of = asked


def run(llm: Any, prompts: list[list[int]], **sampling: Any) -> list[list[int]]:
    from vllm import SamplingParams

    options = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True, **sampling}
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts], SamplingParams(**options), use_tqdm=False
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_the_installed_version_calls_as_expected(drafting: Any) -> None:
    config = core_of(drafting).vllm_config
    check_interface(config)
    with pytest.raises(UnsupportedEngineError):
        check_interface(config, runner=object)


def test_one_after_the_other(
    plain: Any, drafting: Any, prompts: list[list[int]], references: list[list[int]]
) -> None:
    rows = proposer_of(drafting).rows
    for ids, reference in zip(prompts, references, strict=True):
        before = rows.drafted
        [reply] = run(drafting, [ids])
        assert same_or_tie(plain, ids, reference, reply)
        assert rows.drafted > before
    assert proposer_of(drafting).failures == 0


def test_several_at_once(
    plain: Any, drafting: Any, prompts: list[list[int]], references: list[list[int]]
) -> None:
    """Five requests in four rows: the last one comes when another leaves."""
    replies = run(drafting, prompts)
    for ids, reference, reply in zip(prompts, references, replies, strict=True):
        assert same_or_tie(plain, ids, reference, reply)
    assert proposer_of(drafting).failures == 0


def test_sampled_text(drafting: Any, prompts: list[list[int]]) -> None:
    """vLLM samples what it accepts; with drafts its seeds do not repeat a text, whoever drafts."""
    rows = proposer_of(drafting).rows
    before = rows.drafted
    replies = run(drafting, prompts[-2:], temperature=0.7, seed=5)
    assert [len(reply) for reply in replies] == [NEW, NEW]
    assert rows.drafted > before
    assert proposer_of(drafting).failures == 0


def test_an_abort_in_the_middle(
    plain: Any, drafting: Any, prompts: list[list[int]], references: list[list[int]]
) -> None:
    from vllm import SamplingParams

    loop = drafting.llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    names = [
        loop.add_request(str(number), {"prompt_token_ids": ids}, sampling)
        for number, ids in enumerate(prompts[:3])
    ]
    names = [name if isinstance(name, str) else str(number) for number, name in enumerate(names)]
    replies: dict[str, list[int]] = {}
    for step in range(1000):
        if step == 4:
            loop.abort_request(names[:1])  # its row goes to the last request
            loop.add_request("late", {"prompt_token_ids": prompts[4]}, sampling)
        for output in loop.step():
            if output.finished:
                replies[output.request_id] = list(output.outputs[0].token_ids)
        if not loop.has_unfinished_requests():
            break
    for name, number in (("1", 1), ("2", 2), ("late", 4)):
        assert same_or_tie(plain, prompts[number], references[number], replies[name])
    assert proposer_of(drafting).failures == 0


def test_preemption(model: str, plain: Any, prompts: list[list[int]], references: list[list[int]]) -> None:
    """A cache too small for all: requests are preempted, and come back in other rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETRIEVAL_DRAFT_COSTS", "ignored")
        small = engine(model, SPECULATIVE, max_model_len=192, block_size=16, num_gpu_blocks_override=BLOCKS)
    proposer = proposer_of(small)
    watch_texts(proposer)
    scheduler = core_of(small).scheduler
    preempted: list[str] = []
    preempt = scheduler._preempt_request

    def watched(request: Any, *rest: Any, **named: Any) -> Any:
        preempted.append(request.request_id)
        return preempt(request, *rest, **named)

    scheduler._preempt_request = watched
    short = [ids[:30] for ids in prompts]
    references = run(plain, short, max_tokens=64)
    replies = run(small, short, max_tokens=64)
    assert preempted
    assert proposer.failures == 0
    assert proposer.rows.drafted
    for ids, reference, reply in zip(short, references, replies, strict=True):
        assert same_or_tie(plain, ids, reference, reply)


def test_the_example_of_the_documentation_runs(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/vllm.md").read_text()
    example = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert example is not None
    with several_engines():
        exec(textwrap.dedent(example[1]), {"MODEL": model})  # noqa: S102
    assert "red" in capsys.readouterr().out
