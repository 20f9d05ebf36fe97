"""Replies under grammars: the same with and without drafts, and as the grammar wants them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList

from retrieval_draft import DraftConfig, Grammar, RetrievalDrafter
from retrieval_draft.generation.grammars import grammar_processor
from tests.support.batches import padded
from tests.support.chain_models import make_family
from tests.support.grammars import SHAPES, follows, json_model, json_tokenizer

NAMES = list(SHAPES)
GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "top_k": 0}


def prompts(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(10, 390, (1, 5 + row % 9), generator=generator) for row in range(count)]


def text_of(reply: torch.Tensor) -> str | None:
    """The text of a finished reply; None for one that met its limit."""
    tokenizer = json_tokenizer()
    ids = reply.tolist()
    if tokenizer.eos_token_id not in ids:
        return None
    text: str = tokenizer.decode(ids[: ids.index(tokenizer.eos_token_id)])
    return text


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_two_hundred_requests_of_eight_shapes(options: dict[str, Any]) -> None:
    model, tokenizer = json_model(), json_tokenizer()
    plain = RetrievalDrafter.for_model(model, tokenizer, method="none")
    drafter = RetrievalDrafter.for_model(model, tokenizer, config=DraftConfig(nodes=16, adjacency_rows=1024))
    seen: Counter[str] = Counter()
    for batch in range(4):
        shapes = [NAMES[(batch + row) % len(NAMES)] for row in range(25)]
        ids, mask = padded(prompts(25))
        given = {
            "grammar": [SHAPES[shape] for shape in shapes],
            "max_new_tokens": 120,
            "pad_token_id": tokenizer.eos_token_id,
            **options,
        }
        if options["do_sample"]:
            given["seed"] = list(range(100 * batch, 100 * batch + 25))
        expected = plain.generate(ids, mask, **given)
        assert torch.equal(drafter.generate(ids, mask, **given), expected)
        for shape, row in zip(shapes, expected, strict=True):
            text = text_of(row[ids.shape[1] :])
            assert text is not None, shape
            assert follows(shape, text), (shape, text)
            seen[shape] += 1
    assert len(seen) == 8
    assert drafter.stats.accepted_by_source["grammar"] > 100
    assert plain.stats.steps > 1.5 * drafter.stats.steps


@pytest.mark.parametrize("shape", NAMES)
def test_greedy_equals_the_models_own_loop_with_the_same_processor(shape: str) -> None:
    model, tokenizer = json_model(), json_tokenizer()
    drafter = RetrievalDrafter.for_model(model, tokenizer, config=DraftConfig(nodes=8))
    (prompt,) = prompts(1)
    options = {"do_sample": False, "max_new_tokens": 80, "pad_token_id": 0}
    processor = grammar_processor(model, tokenizer, [SHAPES[shape]], model.generation_config.eos_token_id)
    processors = LogitsProcessorList([processor])
    stock = model.generate(prompt, logits_processor=processors, **options)
    again = model.generate(prompt, logits_processor=processors, **options)
    assert torch.equal(stock, again), "a processor starts afresh with another text"
    assert torch.equal(drafter.generate(prompt, grammar=SHAPES[shape], **options), stock)
    assert torch.equal(drafter.generate(prompt, logits_processor=processors, **options), stock)
    inside = model.generate(prompt, logits_processor=processors, custom_generate=drafter, **options)
    assert torch.equal(inside, stock)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"num_return_sequences": 3, **SAMPLED},
        {"best_of": 3, **SAMPLED},
        {"no_repeat_ngram_size": 9, **SAMPLED},
        {"output_scores": True, "return_dict_in_generate": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_options_keep_their_meaning(options: dict[str, Any]) -> None:
    model, tokenizer = json_model(), json_tokenizer()
    (prompt,) = prompts(1)
    given = {"grammar": SHAPES["nested"], "max_new_tokens": 80, "pad_token_id": 0, "seed": 4, **options}
    results = []
    for config in (DraftConfig(method="none"), DraftConfig(nodes=12)):
        drafter = RetrievalDrafter.for_model(model, tokenizer, config=config)
        results.append(drafter.generate(prompt, **given))
    if "output_scores" in options:
        one, two = results
        assert len(one.scores) == len(two.scores)
        for pair in zip(one.scores, two.scores, strict=True):
            torch.testing.assert_close(*pair)
        assert bool(torch.isinf(one.scores[0]).any())
        results = [one.sequences, two.sequences]
    assert torch.equal(*results)


def test_text_around_a_schema_with_special_tokens() -> None:
    model, tokenizer = json_model(), json_tokenizer()
    grammar = SHAPES["nested"].within("<call>\n", "\n<call>!")
    drafter = RetrievalDrafter.for_model(model, tokenizer, config=DraftConfig(nodes=8))
    (prompt,) = prompts(1)
    out = drafter.generate(prompt, grammar=grammar, max_new_tokens=100, pad_token_id=0, do_sample=False)
    reply = out[0, prompt.shape[1] :]
    call = tokenizer.convert_tokens_to_ids("<call>")
    assert reply[0] == call
    text = text_of(reply)
    assert text is not None
    begin, end = "<call>\n", "\n<call>!"
    assert text.startswith(begin)
    assert text.endswith(end)
    assert follows("nested", text[len(begin) : -len(end)])


def test_a_model_that_verifies_chains() -> None:
    tokenizer = json_tokenizer()
    model = make_family("lfm2", vocab_size=len(tokenizer))
    (prompt,) = prompts(1)
    given = {
        "grammar": SHAPES["arrays"],
        "max_new_tokens": 80,
        "pad_token_id": 0,
        "eos_token_id": 0,
        **GREEDY,
    }
    plain = RetrievalDrafter.for_model(model, tokenizer, method="none").generate(prompt, **given)
    drafter = RetrievalDrafter.for_model(model, tokenizer, config=DraftConfig(nodes=8))
    assert drafter.verification.way == "chain"
    assert torch.equal(drafter.generate(prompt, **given), plain)
    assert drafter.last_stats is not None
    assert drafter.last_stats.accepted_by_source["grammar"] > 0


def test_a_reply_that_meets_its_limit_leaves_no_harm() -> None:
    model, tokenizer = json_model(), json_tokenizer()
    drafter = RetrievalDrafter.for_model(model, tokenizer, config=DraftConfig(nodes=16))
    plain = RetrievalDrafter.for_model(model, tokenizer, method="none")
    (prompt,) = prompts(1)
    for limit in range(1, 30, 3):
        given = {"grammar": SHAPES["deep"], "max_new_tokens": limit, "pad_token_id": 0, **GREEDY}
        assert torch.equal(drafter.generate(prompt, **given), plain.generate(prompt, **given))
    assert isinstance(SHAPES["deep"], Grammar)
