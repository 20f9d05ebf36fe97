"""A tiny model that writes given replies, by a processor that leaves it no choice; drafts stay on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LogitsProcessor, PreTrainedTokenizerFast

from retrieval_draft.serving import ContinuousDrafter

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
