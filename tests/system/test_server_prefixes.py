"""Prompts that begin as earlier ones: the same answers, counted where clients and operators look."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

from tests.support.servers import Running, serving, tiny_drafter, tiny_model, tiny_tokenizer
from tests.support.servers import tokens_and_known as ask

KEYS = {"one": "first", "two": "second"}


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    tokenizer = tiny_tokenizer()
    drafter = tiny_drafter(tiny_model(tokenizer), tokenizer, prefix_cache_bytes=1 << 22)
    with serving(drafter, tokenizer, keys=KEYS, max_batch=4, prefill_chunk=32) as made:
        yield made


def words(count: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(17) for _ in range(count)]


def test_a_second_turn_costs_its_new_tokens(running: Running) -> None:
    prompt = words(70, 1)
    first, known = ask(running, prompt)
    assert known == 0
    assert running.wait_idle()
    text = [*prompt, *first, 5, 6]
    second, known = ask(running, text)
    assert known == 75, "all but the reply's last token, which was not passed, and what is new"
    assert running.wait_idle()
    alone, known = ask(running, text, key="two")
    assert (alone, known) == (second, 0), "another tenant's"
    assert running.wait_idle()
    assert ask(running, text)[1] == len(text) - 1
    seeded = {"temperature": 1.0, "seed": 3}
    assert ask(running, text, **seeded)[0] == ask(running, [*text], key="two", **seeded)[0]
    page = httpx.get(f"{running.url}/metrics", headers={"Authorization": "Bearer one"}).text
    counts = {
        line.split("{")[0].split(" ")[0]: float(line.split()[-1])
        for line in page.splitlines()
        if "prefix_cache" in line and not line.startswith("#")
    }
    assert counts["retrieval_draft:prefix_cache_hits_total"] >= 75 + len(text) - 1
    assert (
        counts["retrieval_draft:prefix_cache_queries_total"]
        > counts["retrieval_draft:prefix_cache_hits_total"]
    )
    assert counts["retrieval_draft:prefix_cache_bytes"] > 0


def test_many_at_once_say_what_each_says_alone(running: Running) -> None:
    shared = words(60, 2)
    prompts = [[*shared[: 20 + 5 * (number % 9)], *words(1 + number % 4, number)] for number in range(16)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda prompt: ask(running, prompt)[0], prompts))
    drafter = running.service.loaded.drafter
    model = drafter.target.model
    assert drafter.prefix_cache.failures == 0
    for prompt, reply in zip(prompts, together, strict=True):
        ids = torch.tensor([prompt])
        stock = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        assert stock[0, len(prompt) :].tolist() == reply


def test_a_salt_sets_texts_apart(running: Running) -> None:
    prompt = words(50, 3)
    plain, known = ask(running, prompt)
    assert (ask(running, prompt, cache_salt="a"), known) == ((plain, 0), 0)
    assert running.wait_idle()
    assert ask(running, prompt, cache_salt="a") == (plain, 49)
    assert ask(running, prompt, cache_salt="b") == (plain, 0)
    assert ask(running, prompt) == (plain, 49)
