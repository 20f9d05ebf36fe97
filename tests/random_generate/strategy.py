"""Strategies that draw cases. Earlier values are simpler, so that a failing case shrinks towards it."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from retrieval_draft.config import METHODS, SOURCES
from retrieval_draft.methods.registry import get_method
from tests.random_generate.architectures import ARCHITECTURES, EAGER_ONLY
from tests.random_generate.case import Call, Case
from tests.random_generate.processors import PROCESSORS

__all__ = ["cases"]

VOCABULARIES = (5, 13, 40, 97, 300)
LONGEST = 60
MAX_NEW = 40
DRAWN = tuple(name for name in METHODS if not get_method(name).needs_head)
NEED_MODEL = tuple(name for name in DRAWN if get_method(name).needs_model)

_Draw = st.DrawFn


def _maybe(draw: _Draw, percent: int) -> bool:
    return draw(st.integers(0, 99)) >= 100 - percent


@st.composite
def _prompts(draw: _Draw, tokens: st.SearchStrategy[int], rows: int) -> list[list[int]]:
    """Ragged, often with a pattern that comes again and again."""
    found: list[list[int]] = []
    for _ in range(rows):
        if found and _maybe(draw, 10):
            found.append(found[0])
            continue
        pattern = draw(st.lists(tokens, min_size=1, max_size=20))
        times = draw(st.integers(1, 6)) if _maybe(draw, 50) else 1
        found.append((pattern * times)[:LONGEST])
    return found


def _any_of(tokens: st.SearchStrategy[int], most: int) -> st.SearchStrategy[list[int]]:
    return st.lists(tokens, min_size=1, max_size=most, unique=True)


@st.composite
def _fragment(draw: _Draw, tokens: st.SearchStrategy[int], vocabulary: int, sampled: bool) -> dict[str, Any]:
    """One or two options of model.generate."""
    few = max(1, min(4, vocabulary // 3))
    numbers = {
        "repetition_penalty": st.sampled_from([0.7, 1.1, 1.5, 2.5]),
        "no_repeat_ngram_size": st.integers(1, 4),
        "encoder_repetition_penalty": st.sampled_from([0.7, 1.3]),
        "encoder_no_repeat_ngram_size": st.integers(1, 3),
        "bad_words_ids": st.lists(st.lists(tokens, min_size=1, max_size=3), min_size=1, max_size=3),
        "sequence_bias": st.lists(
            st.tuples(st.lists(tokens, min_size=1, max_size=3), st.sampled_from([-8.0, 2.0, 6.0])).map(list),
            min_size=1, max_size=3, unique_by=lambda pair: tuple(pair[0]),
        ),
        "suppress_tokens": _any_of(tokens, few),
        "begin_suppress_tokens": _any_of(tokens, few),
        "forced_bos_token_id": tokens,
        "forced_eos_token_id": tokens,
        "min_new_tokens": st.integers(0, 20),
        "min_length": st.integers(0, 50),
        "exponential_decay_length_penalty": st.tuples(
            st.integers(0, 8), st.sampled_from([1.05, 1.5])
        ).map(list),
        "renormalize_logits": st.just(True),
        "remove_invalid_values": st.just(True),
        "prefill_chunk_size": st.integers(1, 30),
        "use_cache": st.booleans(),
        "max_length": st.integers(1, 90),
        "watermarking_config": st.fixed_dictionaries({"bias": st.sampled_from([2.0, 5.0])}),
        "guidance_scale": st.sampled_from([1.5]),
    }  # fmt: skip
    if sampled:
        numbers |= {
            "temperature": st.sampled_from([0.3, 0.7, 1.5]),
            "top_k": st.integers(0, 8),
            "top_p": st.sampled_from([0.5, 0.9, 0.99]),
            "min_p": st.sampled_from([0.05, 0.3]),
            "typical_p": st.sampled_from([0.5, 0.9]),
            "epsilon_cutoff": st.sampled_from([0.01, 0.1]),
            "eta_cutoff": st.sampled_from([0.01, 0.1]),
        }
    name = draw(st.sampled_from(sorted(numbers)))
    if name == "guidance_scale" and not _maybe(draw, 30):
        name = "repetition_penalty"  # It is refused for batches.
    return {name: draw(numbers[name])}


@st.composite
def _options(
    draw: _Draw, tokens: st.SearchStrategy[int], vocabulary: int, route: str, may_return: bool
) -> dict[str, Any]:
    sampled = draw(st.booleans())
    options: dict[str, Any] = {"do_sample": sampled, "max_new_tokens": draw(st.integers(1, MAX_NEW))}
    if _maybe(draw, 1):
        options["max_new_tokens"] = 0
    if sampled:
        options["top_k"] = 0
    for _ in range(draw(st.integers(0, 3))):
        options |= draw(_fragment(tokens, vocabulary, sampled))
    if "prefill_chunk_size" in options:
        options.pop(
            "use_cache", None
        )  # model.generate refuses the two together, the drafter has a cache anyway
    if "max_length" in options:
        del options["max_new_tokens"]
    if "exponential_decay_length_penalty" in options or _maybe(draw, 50):
        options["eos_token_id"] = draw(tokens | _any_of(tokens, 3))
    # On its way to a loop of one's own, transformers loses the tokenizer.
    if _maybe(draw, 5) and vocabulary <= 97 and route != "custom":
        letters = st.text(st.sampled_from(_letters(vocabulary)), min_size=1, max_size=3)
        options["stop_strings"] = draw(st.lists(letters, min_size=1, max_size=2))
    if sampled and may_return and _maybe(draw, 30):
        options["num_return_sequences"] = draw(st.integers(2, 3))
    if _maybe(draw, 30):
        options["return_dict_in_generate"] = True
        for name in ("output_scores", "output_logits"):
            if _maybe(draw, 50):
                options[name] = True
    return options


def _letters(vocabulary: int) -> str:
    """Those of `letter_tokenizer` that are written as they are."""
    return "".join(chr(code) for code in range(33, min(127, 33 + vocabulary)))


@st.composite
def _calls(draw: _Draw, vocabulary: int, route: str, number: int) -> Call:
    tokens = st.integers(0, vocabulary - 1)
    rows = draw(st.integers(1, 4)) if _maybe(draw, 50) else 1
    follows = number > 0 and _maybe(draw, 70)
    options = draw(_options(tokens, vocabulary, route, number == 0))
    continuous = route == "continuous"
    call: dict[str, Any] = {}
    if continuous:
        for name in ("return_dict_in_generate", "output_scores", "output_logits", "max_length"):
            options.pop(name, None)
        options.setdefault("max_new_tokens", 20)
    else:
        call["streamer"] = _maybe(draw, 25)
        call["cache"] = "none"
        if follows and _maybe(draw, 70):
            call["cache"] = "returned"
        elif number == 0 or follows:
            call["cache"] = "dynamic" if _maybe(draw, 10) else "none"
    if _maybe(draw, 20):
        call["processor"] = draw(st.sampled_from(sorted(PROCESSORS)))
        if call["processor"] == "of-rows" and continuous:
            call["processor"] = "tiring"
    if call.get("processor") == "in-place":
        # model.generate keeps the logits that such a processor has changed, the drafter those of the model.
        options.pop("output_logits", None)
    if _maybe(draw, 15):
        call["criterion"] = draw(st.integers(2, 5))
    several = rows > 1 or follows or "num_return_sequences" in options
    if several and ("criterion" in call or "stop_strings" in options):
        # Without one, model.generate writes on behind the ends of rows.
        options.setdefault("eos_token_id", draw(tokens))
    if several or _maybe(draw, 50):
        options["pad_token_id"] = draw(tokens)
    if "guidance_scale" in options and several and not _maybe(draw, 10):
        del options["guidance_scale"]
    call["masked"] = not _maybe(draw, 5)
    if follows:
        call["cut"] = draw(st.integers(0, 40)) if _maybe(draw, 40) else 0
        call["changed"] = draw(st.integers(0, 60)) if _maybe(draw, 30) else None
    prompts = draw(_prompts(tokens, rows))
    call["hint"] = draw(st.sampled_from(["none", "right", "partly", "wrong"]))
    call["options_in"] = draw(
        st.sampled_from(["arguments", "config", "model"]) if _maybe(draw, 20) else st.just("arguments")
    )
    seed = st.integers(0, 99)
    call["seeds"] = draw(st.lists(seed, min_size=rows, max_size=rows)) if _maybe(draw, 20) else draw(seed)
    return Call(prompts=prompts, follows=follows, options=options, **call)


@st.composite
def cases(draw: _Draw) -> Case:
    """Any case."""
    # Hypothesis hardly draws again what its simplest case began with.
    draw(st.integers(0, 255))
    architecture = draw(st.sampled_from(list(ARCHITECTURES)))
    vocabulary = draw(st.sampled_from(VOCABULARIES))
    attention = "eager" if architecture in EAGER_ONLY or _maybe(draw, 30) else "sdpa"
    method, draft_model = "oracle", "none"
    if _maybe(draw, 60):
        method = "calibrated" if _maybe(draw, 50) else draw(st.sampled_from(DRAWN))
        if method in NEED_MODEL or _maybe(draw, 10):
            draft_model = "self" if method == "self" else draw(st.sampled_from(["tiny", "self"]))
    config: dict[str, Any] = {
        "nodes": draw(st.sampled_from([8, 1, 2, 3, 5, 16, 33, 60, 0])),
        "adjacency_rows": 1024,
    }
    if _maybe(draw, 10):
        config |= {"nodes": None, "max_nodes": draw(st.sampled_from([4, 30, 60]))}
    for name, values in (
        ("top_k", st.integers(1, 8)),
        ("adjacency_rows", st.sampled_from([16, 64])),
        ("prefill_logits", st.sampled_from([True, False, "auto"])),
        ("known_noise", st.just(False)),
        ("cpu_kernels", st.just(False)),
        ("history_prompts", st.just(False)),
        ("history_replies", st.just(False)),
        ("sources", st.lists(st.sampled_from(tuple(SOURCES)), min_size=1, unique=True)),
    ):
        if _maybe(draw, 10):
            config[name] = draw(values)
    route = "drafter"
    if _maybe(draw, 35):
        route = draw(st.sampled_from(["custom", "continuous"]))
    number = draw(st.integers(1, 3)) if _maybe(draw, 40) else 1
    calls = [draw(_calls(vocabulary, route, at)) for at in range(number)]
    for at in range(number - 1):
        if calls[at + 1].cache == "returned":
            calls[at].options["return_dict_in_generate"] = True
    return Case(
        architecture=architecture, attention=attention, vocabulary=vocabulary,
        weights=draw(st.integers(0, 3)), method=method, wrong=draw(st.sampled_from([0.2, 0.0, 0.6])),
        config=config, draft_model=draft_model, route=route, gap=draw(st.integers(0, 4)), calls=calls,
    )  # fmt: skip
