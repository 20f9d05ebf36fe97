"""Chains: recurrent states, masks of the model's own and chosen keys, against model.generate."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.engine import probe
from retrieval_draft.engine.chain_target import ChainTarget
from retrieval_draft.engine.probe import find_target
from retrieval_draft.errors import UnsupportedModelError
from retrieval_draft.server.scheduler.channel import Tokens
from retrieval_draft.server.scheduler.engine import ServingEngine
from retrieval_draft.server.settings import ServerSettings
from tests.support.batches import padded, ragged
from tests.support.chain_models import KNOWN, make_family
from tests.support.drafters import drafter_with, near_ties, prompt_ids, reply_of
from tests.support.jobs import ended, job_of
from tests.support.models import CACHE, VOCABULARY
from tests.support.sources import OracleSource, PlantedSource

CHAINS = tuple(name for name in KNOWN if name not in ("mamba", "doge", "diffllama"))
EDGES = tuple(name for name in ("qwen3_next", "falcon_h1", "lfm2", "llama4_text", "bloom") if name in CHAINS)
NEW = 40
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 0, "repetition_penalty": 1.1, "pad_token_id": 0}


@functools.cache
def built(name: str) -> tuple[Any, ChainTarget]:
    """A model and its target as the probe finds it."""
    model = make_family(name)
    target = find_target(model)
    assert isinstance(target, ChainTarget), target.verification
    return model, target


@functools.cache
def stock(name: str, length: int = 23, new: int = NEW) -> torch.Tensor:
    """Greedy text of the model's own generate."""
    text: torch.Tensor = built(name)[0].generate(prompt_ids(length), max_new_tokens=new, do_sample=False)
    return text


def drafter_of(name: str, *sources: Any, **options: Any) -> RetrievalDrafter:
    model, target = built(name)
    return drafter_with(model, *sources, target=target, **options)


class Passes:
    """Counts the passes of a model, and their tokens."""

    def __init__(self, model: Any) -> None:
        self.sizes: list[int] = []
        self._handle = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, options: dict[str, Any]) -> None:
        self.sizes.append(int(options["input_ids"].shape[1]))

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()


@pytest.mark.parametrize("name", CHAINS)
def test_near_right_drafts_save_passes_and_none_is_for_repair(name: str) -> None:
    model, _ = built(name)
    prompt, text = prompt_ids(), stock(name)
    drafter = drafter_of(name, PlantedSource(reply_of(text, prompt), wrong=0.2, seed=3))
    with Passes(model) as passes:
        ours = drafter.generate(prompt, max_new_tokens=NEW, do_sample=False)
    assert near_ties(model, ours, text) == 0
    assert len(passes.sizes) == 1 + drafter.stats.steps, "each pass but the prompt's yields a token"
    assert drafter.stats.steps <= 0.35 * NEW
    assert 0 < drafter.stats.accepted < drafter.stats.drafted


@pytest.mark.parametrize("name", CHAINS)
def test_a_seed_gives_the_same_text_with_and_without_drafts(name: str) -> None:
    model, _ = built(name)
    prompt = prompt_ids()
    plain = RetrievalDrafter.for_model(model, method="none")
    options = {**SAMPLED, "max_new_tokens": NEW, "seed": 1}
    wanted = plain.generate(prompt, **options)
    drafter = drafter_of(name, PlantedSource(reply_of(wanted, prompt), wrong=0.2))
    assert torch.equal(drafter.generate(prompt, **options), wanted)
    assert drafter.stats.accepted > NEW // 2


@pytest.mark.parametrize("name", CHAINS)
def test_rows_that_accept_differently_are_as_alone(name: str) -> None:
    model, _ = built(name)
    prompts = ragged((23, 5, 40, 17))
    alone = [model.generate(prompt, max_new_tokens=20, do_sample=False) for prompt in prompts]
    replies = [reply_of(text, prompt) for text, prompt in zip(alone, prompts, strict=True)]
    ids, mask = padded(prompts)
    drafter = drafter_of(name, PlantedSource(*replies, wrong=0.3, seed=5), nodes=6)
    together = drafter.generate(ids, mask, max_new_tokens=20, do_sample=False, pad_token_id=0)
    for row, text in enumerate(alone):
        ours = together[row : row + 1, ids.shape[1] - prompts[row].shape[1] :]
        assert near_ties(model, ours, text) == 0
    assert drafter.stats.accepted > 0


@pytest.mark.parametrize("name", EDGES)
def test_own_sources_by_cost_leave_the_text_as_it_is(name: str) -> None:
    model, _ = built(name)
    drafter = RetrievalDrafter.for_model(model)
    assert drafter.verification.way == "chain"
    prompt, text = prompt_ids(), stock(name)
    for _ in range(2):  # the second time with what the first has taught
        assert near_ties(model, drafter.generate(prompt, max_new_tokens=NEW, do_sample=False), text) == 0
    assert drafter.stats.source_failures == 0


@pytest.mark.parametrize("wrong", [0.0, 1.0], ids=["all-accepted", "none-accepted"])
@pytest.mark.parametrize("name", EDGES)
def test_wholly_right_and_wholly_wrong_chains(name: str, wrong: float) -> None:
    model, _ = built(name)
    prompt, text = prompt_ids(), stock(name)
    drafter = drafter_of(name, PlantedSource(reply_of(text, prompt), wrong=wrong))
    with Passes(model) as passes:
        ours = drafter.generate(prompt, max_new_tokens=NEW, do_sample=False)
    assert near_ties(model, ours, text) == 0
    assert len(passes.sizes) == 1 + drafter.stats.steps
    assert max(passes.sizes[1:]) < 100, "what is repeated is bounded"
    assert drafter.stats.accepted == (drafter.stats.drafted if wrong == 0.0 else 0)


@pytest.mark.parametrize("name", EDGES)
def test_steps_without_drafts_between_those_with_some(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = built(name)
    prompt, text = prompt_ids(), stock(name)
    source = PlantedSource(reply_of(text, prompt), wrong=0.3, seed=1)
    calls: list[int] = []
    drafter = drafter_of(name, source)
    opened = source.open

    def every_other(*given: Any) -> Any:
        session = opened(*given)
        whole = session.propose

        def propose(budget: int) -> Any:
            calls.append(budget)
            return whole(budget if len(calls) % 2 else 0)

        monkeypatch.setattr(session, "propose", propose)
        return session

    monkeypatch.setattr(source, "open", every_other)
    ours = drafter.generate(prompt, max_new_tokens=NEW, do_sample=False)
    assert near_ties(model, ours, text) == 0
    assert drafter.stats.nodes[0] > 0 < drafter.stats.accepted


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("name", EDGES)
def test_prompts_shorter_than_the_convolution(name: str, length: int) -> None:
    model, _ = built(name)
    prompt, text = prompt_ids(length), stock(name, length, 30)
    drafter = drafter_of(name, PlantedSource(reply_of(text, prompt), wrong=0.2))
    assert near_ties(model, drafter.generate(prompt, max_new_tokens=30, do_sample=False), text) == 0
    assert drafter.stats.accepted > 0


@pytest.mark.parametrize("name", EDGES)
def test_a_stop_inside_a_chain_and_what_is_said_next(name: str) -> None:
    model, target = built(name)
    prompt, text = prompt_ids(), stock(name)
    reply = reply_of(text, prompt)
    end = reply[10]
    cut = model.generate(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=end, pad_token_id=0)
    drafter = drafter_of(name, PlantedSource(reply, wrong=0.0))
    options = {"do_sample": False, "eos_token_id": end, "pad_token_id": 0, "return_dict_in_generate": True}
    out = drafter.generate(prompt, max_new_tokens=NEW, **options)
    assert torch.equal(out.sequences, cut)
    # The cache goes on with another turn, and with one that was edited.
    for further in (
        torch.cat([out.sequences, prompt_ids(7, seed=9)], 1),
        torch.cat([prompt[:, :15], prompt_ids(9, seed=8)], 1),
    ):
        wanted = model.generate(further, max_new_tokens=20, do_sample=False)
        again = drafter_of(name, PlantedSource(reply_of(wanted, further), wrong=0.2))
        ours = again.generate(further, max_new_tokens=20, do_sample=False, cache=out[CACHE])
        assert near_ties(model, ours, wanted) == 0
    assert target.verification.way == "chain"


@pytest.mark.parametrize("name", EDGES)
def test_a_dynamic_cache_goes_in_and_comes_back(name: str) -> None:
    model, _ = built(name)
    prompt = prompt_ids()
    mine = DynamicCache(config=model.config)
    for turn in range(2):
        wanted = model.generate(prompt, max_new_tokens=12, do_sample=False)
        drafter = drafter_of(name, PlantedSource(reply_of(wanted, prompt), wrong=0.2, seed=turn))
        ours = drafter.generate(prompt, max_new_tokens=12, do_sample=False, past_key_values=mine)
        assert near_ties(model, ours, wanted) == 0
        # The same cache serves the model's own generate.
        further = torch.cat([wanted, prompt_ids(5, seed=turn)], 1)
        expected = model.generate(further, max_new_tokens=8, do_sample=False)
        stocks = model.generate(further, max_new_tokens=8, do_sample=False, **{CACHE: mine})
        assert near_ties(model, stocks, expected) == 0
        prompt = torch.cat([expected, prompt_ids(4, seed=turn + 20)], 1)


@pytest.mark.parametrize("name", EDGES)
def test_a_prompt_in_parts(name: str) -> None:
    model, _ = built(name)
    prompt, text = prompt_ids(), stock(name)
    drafter = drafter_of(name, PlantedSource(reply_of(text, prompt), wrong=0.2))
    ours = drafter.generate(prompt, max_new_tokens=NEW, do_sample=False, prefill_chunk_size=5)
    assert near_ties(model, ours, text) == 0


@pytest.mark.parametrize("name", EDGES)
def test_siblings_fork_the_state(name: str) -> None:
    model, _ = built(name)
    prompt = prompt_ids()
    options = {**SAMPLED, "max_new_tokens": 24, "num_return_sequences": 3, "seed": 4}
    wanted = RetrievalDrafter.for_model(model, method="none").generate(prompt, **options)
    replies = [reply_of(wanted[row : row + 1], prompt) for row in range(3)]
    with Passes(model) as passes:
        drafter = drafter_of(name, PlantedSource(*replies, wrong=0.3))
        assert torch.equal(drafter.generate(prompt, **options), wanted)
    assert sum(size == prompt.shape[1] for size in passes.sizes) == 1, "one pass over the prompt for all"


@pytest.mark.parametrize("name", EDGES[:1])
def test_half_precision_agrees_with_undrafted_text(name: str) -> None:
    model = make_family(name).to(torch.bfloat16)
    target = find_target(model)
    assert target.verification.way == "chain"
    prompt = prompt_ids()
    wanted = model.generate(prompt, max_new_tokens=30, do_sample=False)
    drafter = drafter_with(model, PlantedSource(reply_of(wanted, prompt), wrong=0.2), target=target)
    ours = drafter.generate(prompt, max_new_tokens=30, do_sample=False)
    same = int((ours == wanted).long().cumprod(1).sum()) - prompt.shape[1]
    assert same >= 5, "rounding may part the texts, a lost state would at once"


@pytest.mark.parametrize("name", EDGES[:2])
def test_the_server_batches_rows_with_states_of_their_own(name: str) -> None:
    model, _ = built(name)
    drafter = RetrievalDrafter.for_model(
        model, method="prompt_lookup", config=DraftConfig(method="prompt_lookup", nodes=4)
    )
    # Prompts that repeat themselves, so that lookups draft; longer than one slice of the server.
    prompts = [torch.cat([part, part, part], 1) for part in ragged((30, 17, 5, 22))]
    wanted = [reply_of(model.generate(each, max_new_tokens=12, do_sample=False), each) for each in prompts]

    async def check() -> list[list[int]]:
        engine = ServingEngine(drafter, ServerSettings("m", prefill_chunk=16, max_batch=3))
        engine.start()
        try:
            jobs = [
                job_of(drafter, each, str(number), max_new_tokens=12) for number, each in enumerate(prompts)
            ]
            for job in jobs:
                engine.submit(job)
            told = [await ended(job) for job in jobs]
        finally:
            assert engine.stop(60)
        return [
            [token for each in events if isinstance(each, Tokens) for token in each.tokens] for events in told
        ]

    assert asyncio.run(asyncio.wait_for(check(), 120)) == wanted


@pytest.mark.skipif("deepseek_v32" not in KNOWN, reason="this transformers has no such model")
def test_no_drafts_where_a_text_may_reach_the_length_at_which_several_tokens_differ() -> None:
    model = make_family("deepseek_v32", index_topk=32)
    target = find_target(model)
    assert isinstance(target, ChainTarget)
    assert target.longest == 32
    assert "longer than 32 tokens" in target.verification.reason
    prompt = prompt_ids(12)
    text = model.generate(prompt, max_new_tokens=NEW, do_sample=False)
    drafter = drafter_with(model, PlantedSource(reply_of(text, prompt), wrong=0.2), target=target)
    assert torch.equal(drafter.generate(prompt, max_new_tokens=20, do_sample=False), text[:, :32])
    assert drafter.stats.accepted > 8
    with Passes(model) as passes:
        ours = drafter.generate(prompt, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(ours, text), "all passes are those of the model's own generate"
    assert passes.sizes == [12] + [1] * (NEW - 1)


@pytest.mark.skipif("deepseek_v32" not in KNOWN, reason="this transformers has no such model")
@pytest.mark.parametrize("seed", [0, 1])
def test_tokens_for_which_all_keys_are_equal_are_passed_as_the_last(seed: int) -> None:
    # The embedding of padding is zero unless it was trained, and a model may choose padding.
    model = make_family("deepseek_v32", seed=seed, index_topk=32, index_n_heads=32)
    prompt = prompt_ids(20)
    options: dict[str, Any] = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": 0}
    blank = int(model.generate(prompt, **options)[0, 45])
    model.get_input_embeddings().weight.data[blank] = 0
    text = model.generate(prompt, **options)
    target = find_target(model)
    assert isinstance(target, ChainTarget)
    assert (target.longest, target.blank) == (None, {blank})
    drafter = drafter_with(model, PlantedSource(reply_of(text, prompt), wrong=0.2), target=target)
    assert torch.equal(drafter.generate(prompt, **options), text)
    assert drafter.stats.steps <= 0.5 * 60
    longer = text[:, :50]
    assert blank in longer
    with Passes(model) as passes:
        ours = drafter.generate(longer, prefill_chunk_size=7, **options)
    assert passes.sizes[0] == 50
    assert torch.equal(ours, model.generate(longer, **options))


@pytest.mark.parametrize("name", [name for name in ("llama4_text", "bloom") if name in KNOWN])
def test_failure_near_the_end_alone_leaves_the_texts_within_a_chunk(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = ChainTarget(make_family(name, **({} if name == "bloom" else {"attention_chunk_size": 32})))
    target.max_positions = 512
    lengths = []

    def compare(target: ChainTarget, length: int) -> float:
        lengths.append(length)
        if length > 400:
            raise UnsupportedModelError(f"a text of {length} tokens differs")
        return 0.0

    monkeypatch.setattr(probe, "_compare_chain", compare)
    if name == "bloom":
        with pytest.raises(UnsupportedModelError, match="505"):
            probe.probe_chain(target)
    else:
        probe.probe_chain(target)
        assert (target.longest, lengths) == (32, [2, 8, 40, 505, 25])


@pytest.mark.skipif("doge" not in KNOWN, reason="this transformers has no such model")
@pytest.mark.parametrize("seed", [1, 3, 5, 6])
def test_equal_keys_among_the_best_are_chosen_as_alone(seed: int) -> None:
    # Doge's first layer weighs all keys of one token alike: rounding decides which of them are kept.
    model = make_family("doge", seed=seed, keep_window_size=24)
    target = find_target(model)
    prompt = prompt_ids(12, vocabulary=9, seed=seed)
    text = model.generate(prompt, max_new_tokens=60, do_sample=False)
    source = PlantedSource(reply_of(text, prompt), wrong=0.2)
    drafter = drafter_with(model, source, target=target, cpu_kernels=False)
    assert torch.equal(drafter.generate(prompt, max_new_tokens=60, do_sample=False), text)
    assert torch.equal(drafter.generate(prompt, max_new_tokens=12, do_sample=False), text[:, :24])
    assert drafter.stats.accepted > 0


def test_a_tree_of_guesses_becomes_its_best_path() -> None:
    name = EDGES[-1]
    model, _ = built(name)
    prompt, text = prompt_ids(), stock(name)
    drafter = drafter_of(name, OracleSource(reply_of(text, prompt), vocabulary=VOCABULARY))
    assert near_ties(model, drafter.generate(prompt, max_new_tokens=NEW, do_sample=False), text) == 0
    assert drafter.stats.accepted > 0
