"""Promises of RetrievalDrafter to its users: arguments, return types, streams, stops, errors."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    TextIteratorStreamer,
)

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.errors import (
    InvalidInputError,
    NonFiniteLogitsError,
)
from retrieval_draft.generation.streaming import shown_streamer
from tests.support.drafters import drafter_with, near_ties, prompt_ids, reply_of
from tests.support.models import CACHE, make
from tests.support.sources import BrokenSource, OracleSource

MODEL = make("llama")
PROMPT = prompt_ids()
STOCK = MODEL.generate(PROMPT, max_new_tokens=60, do_sample=False)
REPLY = reply_of(STOCK, PROMPT)


def oracle(**options: Any) -> RetrievalDrafter:
    return drafter_with(MODEL, OracleSource(REPLY, wrong=0.1), **options)


class Recorder:
    def __init__(self) -> None:
        self.put_values: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.put_values.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def test_streamer_sees_prompt_then_each_token_once_and_in_order_then_the_end() -> None:
    streamer = Recorder()
    oracle().generate(PROMPT, max_new_tokens=60, do_sample=False, streamer=streamer)
    assert streamer.put_values == [PROMPT[0].tolist(), *[[token] for token in REPLY]]
    assert streamer.ended == 1


def test_streamer_ends_when_generation_fails() -> None:
    class Failing(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            raise RuntimeError("on purpose")

    streamer = Recorder()
    with pytest.raises(RuntimeError, match="on purpose"):
        oracle().generate(PROMPT, max_new_tokens=9, streamer=streamer, stopping_criteria=[Failing()])
    assert streamer.ended == 1


def test_iterator_streamer_in_a_thread_does_not_hang() -> None:
    class Words:
        def decode(self, ids: Any, **kwargs: Any) -> str:
            return "".join(f"{token} " for token in ids)

    streamer = TextIteratorStreamer(Words(), skip_prompt=True, timeout=60)
    options = {"max_new_tokens": 20, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=oracle().generate, args=(PROMPT,), kwargs=options)
    thread.start()
    assert "".join(streamer).split() == [str(token) for token in REPLY[:20]]
    thread.join()


def test_transformers_still_drops_the_streamer_of_custom_loops() -> None:
    streamer, given = Recorder(), {}

    def loop(model: Any, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        given.update(options)
        return input_ids

    MODEL.generate(PROMPT, max_new_tokens=5, streamer=streamer, custom_generate=loop)
    assert "streamer" not in given, "transformers passes it on now: custom_generate need not look for it"
    assert streamer.put_values == [PROMPT[0].tolist()]


@pytest.mark.parametrize("way", ["method", "drafter", "wrapped"])
def test_custom_generate_streams_what_transformers_drops(way: str) -> None:
    streamer, drafter = Recorder(), oracle()
    loop: Any = {
        "method": drafter.custom_generate,
        "drafter": drafter,
        "wrapped": lambda *given, **options: drafter(*given, **options),
    }[way]
    out = MODEL.generate(PROMPT, max_new_tokens=60, do_sample=False, streamer=streamer, custom_generate=loop)
    assert torch.equal(out, STOCK)
    assert streamer.put_values == [PROMPT[0].tolist(), *([token] for token in REPLY)]
    assert streamer.ended == 1


def test_without_a_streamer_none_is_found() -> None:
    assert shown_streamer() is None
    out = MODEL.generate(PROMPT, max_new_tokens=60, do_sample=False, custom_generate=oracle())
    assert torch.equal(out, STOCK)


def test_a_drafter_may_take_the_place_of_generate() -> None:
    model, streamer = make("llama"), Recorder()
    stock = model.generate(PROMPT, max_new_tokens=30, do_sample=False)
    with RetrievalDrafter.for_model(model, config=DraftConfig(nodes=8)) as drafter:
        model.generate = drafter.generate
        out = model.generate(PROMPT, max_new_tokens=30, do_sample=False, streamer=streamer)
        assert drafter.last_stats is not None
        del model.generate
    assert torch.equal(out, stock)
    assert len(streamer.put_values) == 31
    assert streamer.ended == 1


def test_custom_generate_with_draft_streamer() -> None:
    streamer = Recorder()
    out = MODEL.generate(
        PROMPT, max_new_tokens=60, do_sample=False, custom_generate=oracle().custom_generate,
        draft_streamer=streamer,
    )  # fmt: skip
    assert torch.equal(out, STOCK)
    assert streamer.put_values[1:] == [[token] for token in REPLY]


@pytest.mark.parametrize("at", [0, 1, 7, 23])
def test_draft_that_runs_past_eos(at: int) -> None:
    eos = [96, REPLY[at]]
    stock = MODEL.generate(PROMPT, max_new_tokens=60, do_sample=False, eos_token_id=eos)
    streamer, drafter = Recorder(), oracle(nodes=32)
    ours = drafter.generate(PROMPT, max_new_tokens=60, do_sample=False, eos_token_id=eos, streamer=streamer)
    assert torch.equal(ours, stock)
    assert len(streamer.put_values) - 1 == drafter.last_stats.tokens == stock.shape[1] - PROMPT.shape[1]


@pytest.mark.parametrize("new", [1, 2, 3, 7])
def test_draft_that_runs_past_max_new_tokens(new: int) -> None:
    drafter = oracle(nodes=32)
    ours = drafter.generate(PROMPT, max_new_tokens=new, do_sample=False)
    assert torch.equal(ours, STOCK[:, : PROMPT.shape[1] + new])


def test_text_up_to_the_last_position_of_learned_positions() -> None:
    model = make("gpt2")
    prompt = prompt_ids(500)
    stock = model.generate(prompt, max_length=512, do_sample=False)
    drafter = drafter_with(model, OracleSource(reply_of(stock, prompt)), nodes=32)
    assert near_ties(model, drafter.generate(prompt, max_length=512, do_sample=False), stock) == 0


def test_stopping_criterion_inside_an_accepted_path_sees_every_prefix_once() -> None:
    class AfterToken(StoppingCriteria):
        def __init__(self) -> None:
            self.lengths: list[int] = []

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            self.lengths.append(input_ids.shape[1])
            assert input_ids[0].tolist() == STOCK[0, : input_ids.shape[1]].tolist()
            return torch.tensor([input_ids.shape[1] >= PROMPT.shape[1] + 11])

    stop = AfterToken()
    drafter = oracle(nodes=32)
    ours = drafter.generate(PROMPT, max_new_tokens=60, do_sample=False, stopping_criteria=[stop])
    assert torch.equal(ours, STOCK[:, : PROMPT.shape[1] + 11])
    assert stop.lengths == list(range(PROMPT.shape[1] + 1, PROMPT.shape[1] + 12))
    assert drafter.stats.steps < 10


def test_returned_dictionary_and_cache_can_be_used_further() -> None:
    options = {
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "output_scores": True,
    }
    ours = oracle().generate(PROMPT, max_new_tokens=20, **options)
    stock = MODEL.generate(PROMPT, max_new_tokens=20, **options)
    assert type(ours) is type(stock)
    assert torch.equal(ours.sequences, stock.sequences)
    for mine, theirs in ((ours.logits, stock.logits), (ours.scores, stock.scores)):
        assert len(mine) == len(theirs) == 20
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert ours[CACHE].get_seq_length() == ours.sequences.shape[1] - 1
    more = MODEL.generate(ours.sequences, **{CACHE: ours[CACHE]}, max_new_tokens=40, do_sample=False)
    assert torch.equal(more, STOCK)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 3},
        {"min_new_tokens": 20, "eos_token_id": [REPLY[3], REPLY[5]]},
        {"bad_words_ids": [[REPLY[2]], [REPLY[6], REPLY[7]]]},
    ],
)
def test_processors_run_on_each_nodes_own_prefix(options: dict[str, Any]) -> None:
    stock = MODEL.generate(PROMPT, max_new_tokens=50, do_sample=False, **options)
    assert not torch.equal(stock, STOCK)
    drafter = drafter_with(MODEL, OracleSource(reply_of(stock, PROMPT)), nodes=16)
    assert torch.equal(drafter.generate(PROMPT, max_new_tokens=50, do_sample=False, **options), stock)
    assert drafter.stats.tokens_per_step > 1.2


def test_stateful_processor_is_called_once_for_each_token() -> None:
    class Counter(LogitsProcessor):
        def __init__(self) -> None:
            self.lengths: list[int] = []

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.lengths.append(input_ids.shape[1])
            scores[:, 5] = -float("inf")
            return scores

    counter = Counter()
    oracle(nodes=32).generate(
        PROMPT, max_new_tokens=20, do_sample=False, logits_processor=LogitsProcessorList([counter])
    )
    assert counter.lengths == list(range(PROMPT.shape[1], PROMPT.shape[1] + 20))


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"top_p": 0.8, "top_k": 0}, {"top_k": 5, "temperature": 1.3}]
)
def test_seeded_sampling_equals_the_same_seed_undrafted(options: dict[str, Any]) -> None:
    options = {"max_new_tokens": 50, "do_sample": True, **options}
    plain = RetrievalDrafter.for_model(MODEL, method="none").generate(PROMPT, seed=7, **options)
    drafter = drafter_with(MODEL, OracleSource(reply_of(plain, PROMPT)), nodes=16)
    assert torch.equal(drafter.generate(PROMPT, seed=7, **options), plain)
    assert drafter.stats.tokens_per_step > 1.2
    assert not torch.equal(drafter.generate(PROMPT, seed=8, **options), plain)


def test_torch_seed_governs_sampling_without_a_seed() -> None:
    drafter = oracle()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(drafter.generate(PROMPT, max_new_tokens=30, do_sample=True))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_left_padding_is_left_out_of_the_computation_and_kept_in_the_output() -> None:
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), PROMPT], 1)
    mask = torch.ones_like(padded)
    mask[:, :4] = 0
    ours = oracle().generate(padded, attention_mask=mask, max_new_tokens=60, do_sample=False)
    assert torch.equal(ours, torch.cat([padded[:, :4], STOCK], 1))


def test_rows_of_a_batch_are_right_padded() -> None:
    eos = REPLY[6]
    other = prompt_ids(17, seed=5)
    rows = torch.cat([PROMPT, torch.cat([torch.zeros(1, 6, dtype=torch.long), other], 1)])
    mask = torch.ones_like(rows)
    mask[1, :6] = 0
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": eos, "pad_token_id": 0}
    stock = MODEL.generate(rows, attention_mask=mask, **options)
    ours = drafter_with(MODEL, OracleSource(REPLY, [])).generate(rows, attention_mask=mask, **options)
    assert torch.equal(ours, stock)


def test_nan_logits_are_reported_with_their_position() -> None:
    class Poison(torch.nn.Module):
        def __init__(self, head: torch.nn.Module) -> None:
            super().__init__()
            self.head, self.weight, self.calls = head, head.weight, 0

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.head(hidden) * (float("nan") if self.calls > 3 else 1.0)

    model = make("llama")
    drafter = drafter_with(model, nodes=8)
    model.lm_head = Poison(model.lm_head)
    with pytest.raises(NonFiniteLogitsError, match="position 26"):
        drafter.generate(PROMPT, max_new_tokens=30, do_sample=False)


@pytest.mark.parametrize("call", ["open", "propose", "observe", "learn", "close"])
def test_broken_source_costs_drafts_not_the_generation(call: str, caplog: pytest.LogCaptureFixture) -> None:
    drafter = drafter_with(MODEL, BrokenSource(call, after=0 if call == "close" else 2))
    for _ in range(2):
        assert torch.equal(drafter.generate(PROMPT, max_new_tokens=60, do_sample=False), STOCK)
    assert drafter.stats.source_failures == 2
    assert sum("broken" in record.message for record in caplog.records) == 1


def test_stats_count_and_reset() -> None:
    drafter = oracle()
    drafter.generate(PROMPT, max_new_tokens=60, do_sample=False)
    stats = drafter.stats
    assert stats.tokens == 60
    assert stats.steps + stats.accepted == 59
    assert stats.drafted == 8 * stats.steps - sum((8 - n) * c for n, c in stats.nodes.items())
    assert stats.accepted_by_source["test"] == stats.accepted_by_level["request"] == stats.accepted
    assert stats.as_dict()["tokens_per_step"] == stats.tokens_per_step
    drafter.reset_stats()
    assert drafter.stats.tokens == 0
    assert drafter.last_stats is None


def test_sources_learn_all_prompt_positions() -> None:
    source = OracleSource(REPLY)
    drafter_with(MODEL, source, prefill_logits=True).generate(PROMPT, max_new_tokens=3, do_sample=False)
    learned = source.sessions[0].learned[0]
    assert learned.contexts.shape == (23, 4)
    assert learned.contexts[0].tolist() == [-1, -1, -1, int(PROMPT[0, 0])]
    assert learned.contexts[-1].tolist() == PROMPT[0, -4:].tolist()
    with torch.no_grad():
        probs = MODEL(PROMPT).logits[0].softmax(-1).topk(8)
    torch.testing.assert_close(torch.from_numpy(learned.top_probs), probs.values, atol=1e-4, rtol=1e-3)
    assert source.sessions[0].closed


def test_generation_config_object() -> None:
    config = GenerationConfig(max_new_tokens=12, do_sample=False)
    assert torch.equal(oracle().generate(PROMPT, generation_config=config), STOCK[:, : PROMPT.shape[1] + 12])


def test_zero_draft_steps_between_drafted_ones() -> None:
    source = OracleSource(REPLY)
    drafter = drafter_with(MODEL, source)
    opened, turns = source.open, iter(range(1000))

    def sometimes(*args: Any) -> Any:
        session = opened(*args)
        whole = session.propose
        session.propose = lambda budget: whole(budget if next(turns) % 3 else 0)
        return session

    source.open = sometimes
    assert torch.equal(drafter.generate(PROMPT, max_new_tokens=60, do_sample=False), STOCK)
    assert drafter.stats.nodes[0] > 3


def test_defaults_of_the_configuration_work() -> None:
    drafter = RetrievalDrafter.for_model(MODEL, config=DraftConfig())
    drafter.warm_up()
    assert torch.equal(drafter.generate(PROMPT, max_new_tokens=60, do_sample=False, prediction=REPLY), STOCK)


@pytest.mark.parametrize("most", [0, 1, 3, None])
def test_drafts_are_capped_or_switched_off_and_the_text_stays(most: int | None) -> None:
    drafter = oracle(nodes=8)
    for draft in (
        lambda: drafter.generate(PROMPT, max_new_tokens=60, do_sample=False, max_draft_tokens=most),
        lambda: MODEL.generate(
            PROMPT, max_new_tokens=60, do_sample=False, custom_generate=drafter, draft_max_tokens=most
        ),
    ):
        assert reply_of(draft(), PROMPT) == REPLY
        assert max(drafter.last_stats.nodes) == (8 if most is None else most)


@pytest.mark.parametrize("most", [-1, 1.5, True, "2"])
def test_a_cap_that_is_no_number_of_tokens_is_refused(most: Any) -> None:
    with pytest.raises(InvalidInputError, match="max_draft_tokens"):
        oracle().generate(PROMPT, max_new_tokens=2, do_sample=False, max_draft_tokens=most)
