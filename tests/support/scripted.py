"""A tiny model that writes given replies, by a processor that leaves it no choice; drafts stay on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import openai
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LogitsProcessor, PreTrainedTokenizerFast

from retrieval_draft.serving import ContinuousDrafter
from tests.support.servers import Running, serving, tiny_drafter, tiny_model

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }}"
    "{% for key, value in call.function.arguments.items() %} {{ key }}={{ value }}{% endfor %}</tool_call>"
    "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% if think %}<think>{% endif %}{% endif %}"
)


def byte_tokenizer(template: str = TEMPLATE, specials: Sequence[str] = ("<|turn|>",)) -> Any:
    """A token for each byte, so that any text can be said."""
    vocabulary = {"<eos>": 0}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials)})
    tokenizer.chat_template = template
    return tokenizer


class Scripted(LogitsProcessor):
    """Forces the tokens after a prompt."""

    def __init__(self, begin: int, ids: Sequence[int]) -> None:
        self._begin, self._ids = begin, list(ids)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        position = input_ids.shape[1] - self._begin
        token = self._ids[position] if position < len(self._ids) else 0
        forced = torch.full_like(scores, float("-inf"))
        forced[:, token] = 0.0
        return forced


@contextmanager
def scripted(tokenizer: Any, scripts: Sequence[str]) -> Iterator[None]:
    """Replies to a prompt with ``say 1`` in it are the script of that number."""
    plain = ContinuousDrafter.prepare

    def prepare(self: Any, input_ids: Any, **options: Any) -> Any:
        prompt = tokenizer.decode(input_ids[0])
        if "say " in prompt:
            number = int(prompt.rsplit("say ", 1)[1].split("<", 1)[0].split()[0])
            ids = tokenizer(scripts[number], add_special_tokens=False)["input_ids"]
            given = options.pop("logits_processor", [])
            options["logits_processor"] = [*given, Scripted(input_ids.shape[1], ids)]
        return plain(self, input_ids, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContinuousDrafter, "prepare", prepare)
        yield


@contextmanager
def scripted_server(scripts: Sequence[str]) -> Iterator[Running]:
    """A server whose replies are the scripts, with calls of tools in the form of Hermes."""
    tokenizer = byte_tokenizer()
    drafter = tiny_drafter(tiny_model(tokenizer, eos_token_id=0, max_position_embeddings=2048), tokenizer)
    with scripted(tokenizer, scripts), serving(drafter, tokenizer, tool_parser="hermes") as running:
        yield running


def openai_client(running: Running) -> openai.OpenAI:
    """The official client of a server without keys."""
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
