"""A batch returns, row by row, what its prompts return alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, PrefixConstrainedLogitsProcessor

from retrieval_draft import DraftConfig, RetrievalDrafter
from tests.support.batches import padded, ragged
from tests.support.drafters import near_ties
from tests.support.models import CONFIGS, make
from tests.support.tiny import byte_tokenizer

NEW = 48


def drafter_of(model: Any, **options: Any) -> RetrievalDrafter:
    return RetrievalDrafter.for_model(model, config=DraftConfig(**options))


@pytest.mark.parametrize("nodes", [0, 6, None])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_rows_equal_model_generate(name: str, attention: str, nodes: int | None) -> None:
    model, prompts = make(name, attention=attention), ragged()
    ids, mask = padded(prompts)
    drafter = drafter_of(model, nodes=nodes)
    out = drafter.generate(ids, mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt, max_new_tokens=NEW, do_sample=False)
        mine = torch.cat([prompt, out[row : row + 1, ids.shape[1] :]], 1)
        assert near_ties(model, mine, alone) == 0
    assert drafter.stats.passes < drafter.stats.steps, "rows share passes"


def test_a_model_that_changes_its_values_behind_the_cache() -> None:
    model, prompts = make("diffllama"), ragged()
    ids, mask = padded(prompts)
    out = drafter_of(model, nodes=6).generate(ids, mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    for row, prompt in enumerate(prompts):
        mine = torch.cat([prompt, out[row : row + 1, ids.shape[1] :]], 1)
        assert near_ties(model, mine, model.generate(prompt, max_new_tokens=NEW, do_sample=False)) == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_seeded_rows_equal_the_same_prompts_alone(name: str) -> None:
    model, prompts = make(name), ragged()
    ids, mask = padded(prompts)
    options = {"max_new_tokens": NEW, "do_sample": True, "top_k": 0, "temperature": 0.8, "pad_token_id": 0}
    batch = drafter_of(model, nodes=6).generate(ids, mask, seed=11, **options)
    for row, prompt in enumerate(prompts):
        alone = RetrievalDrafter.for_model(model, method="none").generate(
            prompt, torch.ones_like(prompt), seed=11, **options
        )
        assert torch.equal(batch[row, ids.shape[1] :], alone[0, prompt.shape[1] :])


def test_seeds_of_their_own_for_each_prompt() -> None:
    model, prompts = make("llama"), ragged()[:3]
    ids, mask = padded(prompts)
    options = {"max_new_tokens": 20, "do_sample": True, "pad_token_id": 0}
    batch = drafter_of(model, nodes=6).generate(ids, mask, seed=[5, 6, 7], **options)
    for row, (prompt, seed) in enumerate(zip(prompts, (5, 6, 7), strict=True)):
        alone = drafter_of(model, nodes=0).generate(prompt, torch.ones_like(prompt), seed=seed, **options)
        assert torch.equal(batch[row, ids.shape[1] :], alone[0, prompt.shape[1] :])


def test_torch_seed_gives_a_batch_what_it_gives_its_prompts_one_after_the_other() -> None:
    model, prompts = make("llama"), ragged()[:3]
    ids, mask = padded(prompts)
    options = {"max_new_tokens": 20, "do_sample": True, "pad_token_id": 0}
    torch.manual_seed(4)
    batch = drafter_of(model, nodes=6).generate(ids, mask, **options)
    torch.manual_seed(4)
    for row, prompt in enumerate(prompts):
        alone = drafter_of(model, nodes=0).generate(prompt, torch.ones_like(prompt), **options)
        assert torch.equal(batch[row, ids.shape[1] :], alone[0, prompt.shape[1] :])


def test_rows_end_on_their_own_and_are_padded_on_the_right() -> None:
    model, prompts = make("qwen2"), ragged()
    ids, mask = padded(prompts)
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    eos = plain[torch.arange(8), ids.shape[1] + torch.arange(8) * 3].tolist()
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": eos, "pad_token_id": 3}
    stock = model.generate(ids, attention_mask=mask, **options)
    drafter = drafter_of(model, nodes=6)
    assert torch.equal(drafter.generate(ids, mask, **options), stock)
    assert drafter.stats.requests == 8


def test_samples_of_one_prompt_share_its_pass_and_differ() -> None:
    model, prompt = make("llama"), ragged()[2]
    drafter = drafter_of(model, nodes=6)
    passes = []
    handle = model.register_forward_hook(
        lambda module, args, kwargs, output: passes.append(kwargs["input_ids"].clone()), with_kwargs=True
    )
    out = drafter.generate(prompt, max_new_tokens=30, do_sample=True, num_return_sequences=5, seed=3)
    handle.remove()
    assert out.shape == (5, prompt.shape[1] + 30)
    assert len({tuple(row.tolist()) for row in out}) == 5
    assert sum(torch.equal(ids, prompt) for ids in passes) == 1, "the prompt is passed through once"
    alone = drafter.generate(prompt, max_new_tokens=30, do_sample=True, seed=3)
    assert torch.equal(out[:1], alone), "the first sample is the one that is drawn alone"
    again = RetrievalDrafter.for_model(model, method="none").generate(
        prompt, max_new_tokens=30, do_sample=True, num_return_sequences=5, seed=3
    )
    assert torch.equal(out, again)
    assert drafter.stats.drafted_by_source["siblings"] > 0


def test_equal_prompts_of_a_batch_draw_different_samples() -> None:
    model, prompt = make("llama"), ragged()[2]
    rows = prompt.repeat(3, 1)
    out = drafter_of(model, nodes=6).generate(rows, max_new_tokens=30, do_sample=True, seed=3)
    samples = drafter_of(model, nodes=0).generate(
        prompt, max_new_tokens=30, do_sample=True, num_return_sequences=3, seed=3
    )
    assert torch.equal(out, samples)


def test_samples_of_several_prompts_come_prompt_by_prompt() -> None:
    model, prompts = make("gemma3"), ragged()[:3]
    ids, mask = padded(prompts)
    options = {"max_new_tokens": 20, "do_sample": True, "num_return_sequences": 2, "pad_token_id": 0}
    out = drafter_of(model, nodes=6).generate(ids, mask, seed=8, **options)
    assert len(out) == 6
    for row, prompt in enumerate(prompts):
        alone = drafter_of(model, nodes=0).generate(prompt, torch.ones_like(prompt), seed=8, **options)
        assert torch.equal(out[2 * row : 2 * row + 2, ids.shape[1] :], alone[:, prompt.shape[1] :])


def test_best_of_returns_the_most_probable_samples_first() -> None:
    model, prompt = make("llama"), ragged()[1]
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 0.9, "top_k": 0, "seed": 2}
    drafter = drafter_of(model, nodes=6)
    every = drafter.generate(
        prompt, num_return_sequences=6, output_scores=True, return_dict_in_generate=True, **options
    )
    logs = torch.stack([scores.log_softmax(-1) for scores in every.scores], 1)
    sums = logs.gather(-1, every.sequences[:, prompt.shape[1] :, None])[..., 0].mean(1)
    order = sums.argsort(descending=True)
    best = drafter.generate(
        prompt, best_of=6, num_return_sequences=2, return_dict_in_generate=True, **options
    )
    assert torch.equal(best.sequences, every.sequences[order[:2]])
    assert [round(float(row.mean()), 3) for row in best.logprobs] == [
        round(float(sums[row]), 3) for row in order[:2]
    ]
    assert torch.equal(drafter.generate(prompt, best_of=6, **options), every.sequences[order[:1]])


def test_scores_and_logits_of_a_batch_have_the_shapes_of_model_generate() -> None:
    model, prompts = make("llama"), ragged()[:3]
    ids, mask = padded(prompts)
    options = {
        "max_new_tokens": 10,
        "do_sample": False,
        "pad_token_id": 0,
        "repetition_penalty": 1.3,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    ours = drafter_of(model, nodes=6).generate(ids, mask, **options)
    stock = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(ours.sequences, stock.sequences)
    for mine, theirs in ((ours.scores, stock.scores), (ours.logits, stock.logits)):
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


class Recorder:
    def __init__(self) -> None:
        self.put_shapes: list[tuple[int, ...]] = []
        self.columns: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.put_shapes.append(tuple(value.shape))
        if value.ndim == 1:
            self.columns.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("samples", [1, 3])
def test_a_streamer_gets_a_batch_position_by_position(samples: int) -> None:
    model, prompts = make("llama"), ragged()[:3] if samples == 1 else ragged()[:1]
    ids, mask = padded(prompts)
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False, pad_token_id=0)
    options: dict[str, Any] = {"max_new_tokens": 30, "pad_token_id": 0, "eos_token_id": int(plain[0, -20])}
    if samples > 1:
        options |= {"do_sample": True, "num_return_sequences": samples, "seed": 1}
    else:
        options["do_sample"] = False
    streamer = Recorder()
    out = drafter_of(model, nodes=6).generate(ids, mask, streamer=streamer, **options)
    assert streamer.put_shapes[0] == (3 if samples == 1 else 1, ids.shape[1]) or samples > 1
    assert torch.equal(torch.tensor(streamer.columns).T, out[:, ids.shape[1] :])
    assert streamer.ended == 1


def test_processors_know_their_row() -> None:
    model, prompts = make("llama"), ragged()[:3]
    ids, mask = padded(prompts)
    allowed = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    options: dict[str, Any] = {
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
        "prefix_allowed_tokens_fn": lambda row, text: allowed[row],
    }
    ours = drafter_of(model, nodes=6).generate(ids, mask, **options)
    assert torch.equal(ours, model.generate(ids, attention_mask=mask, **options))
    assert PrefixConstrainedLogitsProcessor is not None


def test_processors_know_the_prompt_of_a_sample() -> None:
    model, prompts = make("llama"), ragged()[:2]
    ids, mask = padded(prompts)
    allowed = [set(range(0, 97, 2)), set(range(1, 97, 2))]
    out = drafter_of(model, nodes=6).generate(
        ids, mask, max_new_tokens=12, do_sample=True, num_return_sequences=3, pad_token_id=0, seed=1,
        prefix_allowed_tokens_fn=lambda prompt, text: sorted(allowed[prompt]),
    )  # fmt: skip
    for row, reply in enumerate(out[:, ids.shape[1] :].tolist()):
        assert set(reply) <= allowed[row // 3]


def test_a_processor_that_keeps_state_keeps_it_row_by_row() -> None:
    class Rising(LogitsProcessor):
        """Bans the token that it was asked about last time."""

        def __init__(self) -> None:
            self.last: torch.Tensor | None = None

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if self.last is not None:
                scores = scores.scatter(1, self.last, -1e9)
            self.last = input_ids[:, -1:].clone()
            return scores

    model, prompts = make("llama"), ragged()[:3]
    ids, mask = padded(prompts)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    stock = model.generate(ids, attention_mask=mask, logits_processor=[Rising()], **options)
    ours = drafter_of(model, nodes=6).generate(ids, mask, logits_processor=[Rising()], **options)
    assert torch.equal(ours, stock)


def test_custom_generate_takes_batches_and_samples() -> None:
    model, prompts = make("llama"), ragged()[:2]
    ids, mask = padded(prompts)
    drafter = drafter_of(model, nodes=6)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=10, do_sample=True, num_return_sequences=2, pad_token_id=0,
        custom_generate=drafter.custom_generate, draft_seed=4,
    )  # fmt: skip
    same = drafter.generate(
        ids, mask, max_new_tokens=10, do_sample=True, num_return_sequences=2, pad_token_id=0, seed=4
    )
    assert torch.equal(out, same)


def test_stop_strings_and_max_time_end_rows_of_a_batch() -> None:
    tokenizer = byte_tokenizer()
    model = make("llama", vocab_size=len(tokenizer))
    texts = ["the cat sat", "on the mat and", "a dog"]
    ids, mask = padded([torch.tensor([tokenizer(text)["input_ids"]]) for text in texts])
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False, pad_token_id=0)
    ends = [tokenizer.decode(plain[row, ids.shape[1] + 4 + row :][:2]) for row in range(2)]
    # Without an eos id, model.generate goes on writing into rows that have ended.
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "eos_token_id": 3}
    assert 3 not in plain[:, ids.shape[1] :]
    stock = model.generate(ids, attention_mask=mask, stop_strings=ends, tokenizer=tokenizer, **options)
    drafter = RetrievalDrafter.for_model(model, tokenizer, config=DraftConfig(nodes=6))
    ours = drafter.generate(ids, mask, stop_strings=ends, **options)
    assert torch.equal(ours, stock)
    assert (ours[1, ids.shape[1] :] == 0).any(), "a row ended before the others"
    assert drafter.generate(ids, mask, max_time=1e-9, **options).shape[1] == ids.shape[1] + 1
