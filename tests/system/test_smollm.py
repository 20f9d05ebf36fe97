"""Greedy chats on real weights, in the library and served: SmolLM2 135M Instruct, float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch

from retrieval_draft.config import DraftConfig
from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.models.chat import chat_inputs
from retrieval_draft.models.loading import load_model
from retrieval_draft.models.packaged import is_installed
from tests.support.drafters import near_ties
from tests.support.servers import MODEL, serving

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not is_installed("smollm2-135m"), reason="the package is not installed"),
]

LIST = "Apples, bread, cheese, dates, eggs, figs."
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": f"Repeat this list, one item a line:\n{LIST}"}],
    [
        {"role": "system", "content": "You write Python and nothing else."},
        {"role": "user", "content": "A function that returns the larger of two numbers."},
    ],
    [
        {"role": "user", "content": f"Remember my shopping list: {LIST}"},
        {"role": "assistant", "content": f"Your list: {LIST}"},
        {"role": "user", "content": "Say it again, twice."},
    ],
]
NEW_TOKENS = 48


@pytest.fixture(scope="module")
def smollm() -> tuple[Any, Any]:
    return load_model("smollm2-135m", device="cpu")


@pytest.fixture(scope="module")
def stock(smollm: tuple[Any, Any]) -> list[tuple[Any, torch.Tensor]]:
    """Each chat's inputs with what model.generate makes of them."""
    model, tokenizer = smollm
    inputs = [chat_inputs(tokenizer, chat, return_tensors="pt") for chat in CHATS]
    return [(each, model.generate(**each, max_new_tokens=NEW_TOKENS, do_sample=False)) for each in inputs]


@pytest.fixture(scope="module", params=["none", "calibrated"])
def drafter(request: pytest.FixtureRequest, smollm: tuple[Any, Any]) -> Iterator[RetrievalDrafter]:
    config = DraftConfig(method=request.param, nodes=12)  # at budgets by cost a busy machine may verify none
    with RetrievalDrafter.for_model(*smollm, config=config) as drafter:
        yield drafter


def test_greedy_equals_model_generate(
    drafter: RetrievalDrafter, smollm: tuple[Any, Any], stock: list[tuple[Any, torch.Tensor]]
) -> None:
    ties = 0
    for inputs, expected in stock:
        mine = drafter.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        ties += near_ties(smollm[0], mine, expected)
        print(drafter.config.method, drafter.last_stats.tokens, drafter.last_stats.tokens_per_step)
    print(f"near ties: {ties} of {len(stock)}")
    assert drafter.stats.tokens_per_step > (1.2 if drafter.config.method == "calibrated" else 0.99)


def test_served_chats_equal_model_generate(
    drafter: RetrievalDrafter, smollm: tuple[Any, Any], stock: list[tuple[Any, torch.Tensor]]
) -> None:
    model, tokenizer = smollm
    with serving(drafter, tokenizer) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        for chat, (inputs, expected) in zip(CHATS, stock, strict=True):
            answer = client.chat.completions.create(
                model=MODEL, messages=chat, max_tokens=NEW_TOKENS, temperature=0
            )
            length = inputs["input_ids"].shape[1]
            prompt, reply = expected[:, :length], expected[0, length:]
            text = answer.choices[0].message.content
            if text != tokenizer.decode(reply, skip_special_tokens=True):
                served = tokenizer(text, return_tensors="pt")["input_ids"]
                near_ties(model, torch.cat([prompt, served], 1), expected)
                continue
            assert answer.usage.prompt_tokens == length
            assert answer.usage.completion_tokens == len(reply)
            ended = reply[-1] == tokenizer.eos_token_id
            assert answer.choices[0].finish_reason == ("stop" if ended else "length")
