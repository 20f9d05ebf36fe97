"""LangChain's ChatOpenAI, litellm and ``transformers chat`` against a real server.

./scripts/test_clients.sh installs the first two, into an environment of their own.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pydantic
import pytest

from tests.support.scripted import scripted_server
from tests.support.servers import MODEL, Running

pytestmark = pytest.mark.heavy

CALL = '<tool_call>\n{"name": "look", "arguments": {"path": "a/b.py"}}\n</tool_call>'
SCRIPTS = [
    "The sea is wide. 🎈",
    CALL,
    "<think>\nHm.\n</think>\n\nDone.",
    '{"path": "c.py", "line": 3}',
    f"{CALL}\n{CALL}",
]


class Place(pydantic.BaseModel):
    """A line of a file."""

    path: str
    line: int


def look(path: str) -> str:
    """Reads a file."""
    return f"the text of {path}"


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with scripted_server(SCRIPTS) as made:
        yield made


@pytest.fixture(scope="module")
def chat(running: Running) -> Any:
    langchain = pytest.importorskip("langchain_openai")
    return langchain.ChatOpenAI(
        base_url=f"{running.url}/v1",
        api_key="none",
        model=MODEL,
        temperature=0,
        max_tokens=400,
        max_retries=0,
    )


def test_langchain_asks_and_streams(chat: Any) -> None:
    told = chat.invoke("say 0")
    assert told.content == SCRIPTS[0]
    assert told.response_metadata["finish_reason"] == "stop"
    assert told.usage_metadata["input_tokens"] > 0
    pieces = list(chat.stream("say 0"))
    assert len(pieces) > 3
    assert "".join(piece.content for piece in pieces) == SCRIPTS[0]
    assert [each.content for each in chat.batch(["say 0", "say 2"])] == [SCRIPTS[0], "Done."]
    assert asyncio.run(chat.ainvoke("say 0")).content == SCRIPTS[0]


def test_langchain_calls_tools_and_sends_their_results(chat: Any) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool

    agent = chat.bind_tools([tool(look)])
    asked = [HumanMessage("say 1")]
    told = agent.invoke(asked)
    (call,) = told.tool_calls
    assert (call["name"], call["args"]) == ("look", {"path": "a/b.py"})
    whole = None
    for piece in agent.stream("say 4"):
        whole = piece if whole is None else whole + piece
    assert [each["args"] for each in whole.tool_calls] == [{"path": "a/b.py"}] * 2
    result = ToolMessage(look(**call["args"]), tool_call_id=call["id"])
    assert agent.invoke([*asked, told, result, HumanMessage("say 0")]).content == SCRIPTS[0]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_gets_objects(chat: Any, method: str) -> None:
    pytest.importorskip("llguidance")
    if method == "json_schema":
        assert chat.with_structured_output(Place).invoke("say 3") == Place(path="c.py", line=3)
        return
    from langchain_core.tools import tool

    # One named function, whose call a grammar forces.
    forced = chat.bind_tools([tool(look)], tool_choice="look").invoke("say 1")
    assert forced.tool_calls[0]["args"] == {"path": "a/b.py"}


def test_langchain_uses_responses(running: Running) -> None:
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(
        base_url=f"{running.url}/v1", api_key="none", model=MODEL, use_responses_api=True, max_retries=0
    )
    assert model.invoke("say 0").text == SCRIPTS[0]
    assert "".join(piece.text for piece in model.stream("say 0")) == SCRIPTS[0]


def test_litellm(running: Running) -> None:
    litellm = pytest.importorskip("litellm")
    given: dict[str, Any] = {
        "api_base": f"{running.url}/v1", "api_key": "none", "max_tokens": 400, "temperature": 0,
    }  # fmt: skip

    def asked(number: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"say {number}"}]

    for kind in ("hosted_vllm", "openai"):
        given["model"] = f"{kind}/{MODEL}"
        told = litellm.completion(messages=asked(0), **given)
        assert told.choices[0].message.content == SCRIPTS[0]
        pieces = litellm.completion(messages=asked(0), stream=True, **given)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == SCRIPTS[0]
        tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
        (call,) = litellm.completion(messages=asked(1), tools=[tool], **given).choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == {"path": "a/b.py"}
        reasoned = litellm.completion(messages=asked(2), **given).choices[0].message
        assert (reasoned.content, reasoned.reasoning_content) == ("Done.", "Hm.")
    pytest.importorskip("llguidance")
    told = litellm.completion(messages=asked(3), response_format=Place, **given)
    assert Place.model_validate_json(told.choices[0].message.content) == Place(path="c.py", line=3)
    with pytest.raises(litellm.BadRequestError, match="suffix"):
        litellm.completion(messages=asked(0), extra_body={"suffix": "a"}, **given)


def test_transformers_chat(running: Running) -> None:
    program = "from transformers.cli.transformers import main; main()"
    command = [
        sys.executable,
        "-c",
        program,
        "chat",
        MODEL,
        f"{running.url}/v1",
        "do_sample=False",
        "max_new_tokens=400",
    ]
    typed = "say 0\nsay 2\n!exit\n"
    online = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
    }  # offline its client reaches no server at all, not even this one
    done = subprocess.run(
        command, input=typed, capture_output=True, text=True, timeout=120, check=False, env=online
    )
    assert done.returncode == 0, done.stderr
    assert "was already loaded" in done.stdout
    assert SCRIPTS[0] in done.stdout
    assert "Done." in done.stdout
