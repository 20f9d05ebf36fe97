from typing import Any

import pytest

from retrieval_draft.errors import InvalidInputError
from retrieval_draft.models.chat import chat_inputs
from tests.support.tiny import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [{"role": "user", "content": "the cat"}]


@pytest.fixture
def tokenizer() -> Any:
    return byte_tokenizer()


def test_ids_are_those_of_the_template_up_to_the_start_of_the_reply(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    inputs = chat_inputs(tokenizer, MESSAGES)
    assert tokenizer.decode(inputs["input_ids"]) == "<user>the cat<assistant>"
    assert chat_inputs(tokenizer, MESSAGES, return_tensors="pt")["input_ids"].tolist() == [
        inputs["input_ids"]
    ]


def test_a_conversation_is_taken_whole(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    turns = [*MESSAGES, {"role": "assistant", "content": "sat"}, {"role": "user", "content": "on"}]
    inputs = chat_inputs(tokenizer, turns)
    assert tokenizer.decode(inputs["input_ids"]) == "<user>the cat<assistant>sat<user>on<assistant>"


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        (None, "has none"),
        ("{{ raise_exception('Speak first.') }}", "Speak first"),
        ("{% for m in %}", "does not accept"),
        ({"tool_use": TEMPLATE}, "default"),  # templates by name, without one for plain chats
    ],
)
def test_a_template_that_is_missing_or_refuses_is_an_error_with_a_hint(
    tokenizer: Any, template: Any, fault: str
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(InvalidInputError, match=fault) as caught:
        chat_inputs(tokenizer, MESSAGES)
    assert "--chat" in caught.value.hint
