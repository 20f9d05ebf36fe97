"""Requests that join a running batch and leave it say what `generate` says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retrieval_draft.config import DraftConfig
from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.drafting.stats import DraftStats
from tests.support.chain_models import KNOWN, make_family
from tests.support.drafters import prompt_ids
from tests.support.image_models import image_prompt, make_image_model
from tests.support.models import make

OPTIONS: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": 20}


def drafter(model: Any) -> RetrievalDrafter:
    return RetrievalDrafter.for_model(
        model, method="prompt_lookup", config=DraftConfig(method="prompt_lookup", nodes=4)
    )


@pytest.fixture(scope="module", params=["llama", *(name for name in ("lfm2",) if name in KNOWN)])
def model(request: Any) -> Any:
    """A model that verifies trees, and one that verifies chains."""
    return make("llama") if request.param == "llama" else make_family(request.param)


def joined(batch: Any, continuous: Any, prompt: torch.Tensor, **options: Any) -> list[Any]:
    """Rows of one prompt, which have joined."""
    prepared = continuous.prepare(prompt, **{**OPTIONS, **options})
    stats = [DraftStats() for _ in prepared.requests]
    rows: list[Any] = []
    for request, drafting, each in zip(
        prepared.requests, continuous.open(prepared, stats), stats, strict=True
    ):
        rows.append(batch.join(request, drafting, each, rows[0] if rows else None))
    return rows


def expected(model: Any, prompt: torch.Tensor, **options: Any) -> list[list[int]]:
    out = drafter(model).generate(prompt, **{**OPTIONS, **options})
    return out[:, prompt.shape[1] :].tolist()


def test_rows_that_come_and_go_say_what_they_say_alone(model: Any) -> None:
    prompts = [prompt_ids(11 + 3 * number, seed=number) for number in range(4)]
    mine = drafter(model)
    rows: list[Any] = []
    with mine.continuous.running() as batch:
        for number, prompt in enumerate(prompts):
            rows += joined(batch, mine.continuous, prompt, seed=number, num_return_sequences=1 + number % 2)
            for _ in range(3):
                batch.step()
                batch.leave()
        while batch.rows:
            batch.step()
            batch.leave()
    replies = [row.text.reply.tolist() for row in rows]
    wanted: list[list[int]] = []
    for number, prompt in enumerate(prompts):
        wanted += expected(model, prompt, seed=number, num_return_sequences=1 + number % 2)
    assert replies == wanted


def test_a_row_that_is_taken_out_leaves_the_others_as_they_are(model: Any) -> None:
    mine = drafter(model)
    with mine.continuous.running() as batch:
        (first,) = joined(batch, mine.continuous, prompt_ids(9), seed=1)
        (second,) = joined(batch, mine.continuous, prompt_ids(12), seed=2)
        batch.step()
        batch.remove(first)
        assert first.drafting is None
        while batch.rows:
            batch.step()
            batch.leave()
    assert [second.text.reply.tolist()] == expected(model, prompt_ids(12), seed=2)


def test_other_rows_step_between_the_passes_of_a_prompt(model: Any) -> None:
    mine = drafter(model)
    long = prompt_ids(40, seed=3)
    with mine.continuous.running() as batch:
        (first,) = joined(batch, mine.continuous, prompt_ids(9), seed=1)
        prepared = mine.continuous.prepare(long, **OPTIONS, seed=2)
        (request,) = prepared.requests
        request.prefill_chunk = 8
        (drafting,) = mine.continuous.open(prepared, [DraftStats()])
        second = batch.row(request, drafting, DraftStats())
        passes = 0
        for _ in batch.joining(second):
            passes += 1
            batch.step()
            assert batch.rows == [first]
        assert passes == 4  # and a fifth that ends it
        while batch.rows:
            batch.leave()
            if batch.rows:
                batch.step()
    assert [first.text.reply.tolist()] == expected(model, prompt_ids(9), seed=1)
    assert [second.text.reply.tolist()] == expected(model, long, seed=2)


class Raises:
    """Makes a model raise in the passes that hold a token, or in one pass."""

    def __init__(self, model: Any) -> None:
        self.once, self.token = False, -1
        self.handle = model.register_forward_pre_hook(self._hook, with_kwargs=True)

    def _hook(self, module: Any, args: Any, kwargs: Any) -> None:
        once, self.once = self.once, False
        if once or (kwargs["input_ids"] == self.token).any():
            raise RuntimeError("broken")


def test_a_pass_that_raises_fails_only_rows_that_raise_alone() -> None:
    model = make("llama")
    wanted = expected(model, prompt_ids(12), seed=2, bad_words_ids=[[7]])
    mine = drafter(model)
    failed: list[Any] = []
    fault = Raises(model)
    with mine.continuous.running(lambda row, error: failed.append((row, str(error)))) as batch:
        bad = joined(batch, mine.continuous, prompt_ids(9), seed=1, sequence_bias={(7,): 100.0})
        good = joined(batch, mine.continuous, prompt_ids(12), seed=2, bad_words_ids=[[7]])
        fault.once = True
        batch.step()
        assert failed == []
        fault.token = 7
        while batch.rows:
            batch.step()
            batch.leave()
    assert failed == [(bad[0], "broken")]
    assert good[0].text.reply.tolist() == wanted[0]


def test_without_one_to_tell_errors_come_out() -> None:
    model = make("llama")
    mine = drafter(model)
    fault = Raises(model)
    with mine.continuous.running() as batch:
        joined(batch, mine.continuous, prompt_ids(9), seed=1)
        fault.once = True
        with pytest.raises(RuntimeError, match="broken"):
            batch.step()
    fault.handle.remove()
    assert mine.generate(prompt_ids(9), **OPTIONS, seed=1).shape[1] == 29


def test_prompts_can_be_read_run_by_run(model: Any) -> None:
    mine, prompt, runs = drafter(model), prompt_ids(21), []
    prepared = mine.continuous.prepare(prompt, **OPTIONS, seed=0)
    prepared.requests[0].read_prompt = lambda logits: runs.append(logits.clone())
    prepared.requests[0].prefill_chunk = 8
    with mine.continuous.running() as batch:
        batch.join(prepared.requests[0], None, DraftStats())
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(runs), model(prompt).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "idefics3"])
def test_prompts_with_images_join_in_another_order_than_they_were_prepared_in(name: str) -> None:
    """Some models keep offsets of positions from the preparation of a prompt to its pass."""
    model = make_image_model(name)
    prompts = [image_prompt(name, model, (20 + seed,), images=1 + seed, seed=seed) for seed in range(2)]
    options = {"max_new_tokens": 12, "do_sample": False}
    wanted = [drafter(model).generate(**prompt, **options)[0].tolist() for prompt in prompts]
    mine = drafter(model)
    prepared = [mine.continuous.prepare(**prompt, **options) for prompt in prompts]
    mine.continuous.prepare(prompts[0]["input_ids"][:, :5], **options)
    rows: list[Any] = []
    with mine.continuous.running() as batch:
        for each in reversed(prepared):
            assert each.begin is not None
            each.begin()
            (drafting,) = mine.continuous.open(each, [DraftStats()])
            rows.append(batch.join(each.requests[0], drafting, DraftStats()))
            batch.step()
        while batch.rows:
            batch.step()
            batch.leave()
    assert [row.text.tokens.tolist() for row in reversed(rows)] == wanted
