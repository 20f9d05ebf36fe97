"""A server with a trained head: the replies of one without, and states that tenants and salts keep apart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import pytest
import torch

from retrieval_draft import DraftConfig, RetrievalDrafter
from tests.support.heads import write_head
from tests.support.servers import MODEL, Running, serving, tiny_model, tiny_tokenizer, tokens_and_known

ask = partial(tokens_and_known, max_tokens=12)
KEYS = {"one": "first", "two": "second"}
PROMPTS = [[(seed * 7 + at * at) % 17 for at in range(40 + seed)] for seed in range(4)]


@pytest.fixture(scope="module", params=["speculators eagle", "dflash"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    tokenizer = tiny_tokenizer()
    mask = {"dflash_config": {"mask_token_id": len(tokenizer) - 1, "target_layer_ids": [0, 2]}}
    changes = mask if request.param == "dflash" else {}
    config = DraftConfig(nodes=8, sources=(), prefix_cache_bytes=1 << 22, cpu_kernels=False)
    drafter = RetrievalDrafter.for_model(
        tiny_model(tokenizer),
        tokenizer,
        draft_model=write_head(tmp_path_factory.mktemp("head"), request.param, **changes),
        config=config,
    )
    with serving(drafter, tokenizer, keys=KEYS, max_batch=4, prefill_chunk=16) as made:
        yield made


def streamed(running: Running, prompt: list[int]) -> str:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 12, "temperature": 0, "stream": True}
    text = ""
    with httpx.stream(
        "POST",
        f"{running.url}/v1/completions",
        json={**body, "ignore_eos": True},
        headers={"Authorization": "Bearer one"},
        timeout=60,
    ) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
    return text


def test_replies_are_those_without_a_head(running: Running) -> None:
    model = running.service.loaded.drafter.target.model
    stock = [
        model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]
    with ThreadPoolExecutor(4) as pool:  # a batch of four
        assert [reply for reply, _ in pool.map(lambda prompt: ask(running, prompt), PROMPTS)] == stock
    assert running.wait_idle()
    for prompt, reply in zip(PROMPTS, stock, strict=True):
        again, known = ask(running, prompt)  # from the prefix cache
        assert (again, known) == (reply, len(prompt) - 1)
        seeded = {"temperature": 1.0, "seed": 3}
        plain = ask(running, prompt, **seeded, speculative={"enabled": False})[0]
        assert ask(running, prompt, **seeded)[0] == plain
    assert streamed(running, PROMPTS[0]) == running.service.loaded.tokenizer.decode(stock[0])
    stats = running.service.loaded.tenants["first"].stats
    assert stats.source_failures == 0
    assert stats.drafted > stats.steps / 2


def test_states_stay_with_their_tenant_and_salt(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = running.service.loaded.drafter.context.models
    found: list[bool] = []
    find = source.find_state

    def seen(session: Any, rows: int) -> Any:
        state = find(session, rows)
        found.append(state is not None)
        return state

    monkeypatch.setattr(source, "find_state", seen)
    prompt = [at * at % 13 for at in range(50)]
    known = [("one", {}), ("one", {"cache_salt": "a"}), ("two", {}), ("two", {"cache_salt": "a"})]
    for key, fields in known:
        assert ask(running, prompt, key, **fields)[1] == 0
        assert running.wait_idle()
    assert found == [], "each is read from its beginning"
    for key, fields in known:
        assert ask(running, prompt, key, **fields)[1] == len(prompt) - 1
        assert running.wait_idle()
    assert found == [True] * len(known)
    keys = [key for key, text, _ in source._kept if text[: len(prompt)].tolist() == prompt]
    assert len(set(keys)) == len(known)
