from __future__ import annotations

import itertools
import json

import pytest

from benchmarks.agent_run import run_agent
from benchmarks.agent_script import LENGTHS, agent_turns
from benchmarks.commands.agents import _options
from retrieval_draft.errors import InvalidInputError, RetrievalDraftError
from tests.support.servers import MODEL, serving, tiny_drafter, tiny_model, tiny_tokenizer


def test_the_script_is_the_same_every_time_and_each_turn_goes_on_from_the_last() -> None:
    sizes = []
    for length in LENGTHS:
        turns = agent_turns(length)
        assert turns == agent_turns(length)
        assert len(turns) == 20
        for before, after in itertools.pairwise(turns):
            assert after[: len(before)] == before
            assert [each["role"] for each in after[len(before) :]] == ["assistant", "user"]
            call = json.loads(after[len(before)]["content"])
            assert call["tool"] in ("read_file", "edit_file", "run")
        sizes.append(len(str(turns[-1])))
    assert sizes == sorted(sizes)
    with pytest.raises(InvalidInputError, match="no length 'x'"):
        agent_turns("x")


def test_a_run_counts_what_the_server_says() -> None:
    tokenizer = tiny_tokenizer()
    turns = [[{"role": "user", "content": "ab cd " * count}] for count in (3, 6)]
    with serving(tiny_drafter(tiny_model(tokenizer), tokenizer), tokenizer) as running:
        first, again = (run_agent(running.port, MODEL, turns, 8, True) for _ in range(2))
        stranger = run_agent(running.port, MODEL, turns, 8, False)
        with pytest.raises(RetrievalDraftError, match="404"):
            run_agent(running.port, "other", turns, 8, True)
    assert first.texts == again.texts == stranger.texts
    assert [len(each) for each in first.tokens] == first.counts
    found = first.summary()
    assert found["tokens"] == sum(first.counts) > 0
    assert found["last_prompt_tokens"] > first.prompt_tokens[0] > 0
    assert all(0 < begin <= whole for begin, whole in zip(first.first_seconds, first.seconds, strict=True))
    assert found["tokens_per_step"] >= 1


def test_servers_have_names() -> None:
    assert (_options("drafts"), _options("plain")) == ([], ["--method", "none"])
    for name in ("other", "drafts-cold", "transformers-uncached"):
        with pytest.raises(InvalidInputError):
            _options(name)
