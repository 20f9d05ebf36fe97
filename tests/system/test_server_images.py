"""Images in chat messages: the reply is that of `generate` with the same processor."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.server.media.settings import MediaSettings
from tests.support.image_models import make_image_model
from tests.support.image_processors import data_url, image_bytes, image_processor
from tests.support.servers import (
    MODEL,
    Running,
    serving,
    tiny_drafter,
    tiny_model,
    tiny_tokenizer,
    tokens_of,
)

NEW = 16


def message(*parts: str, role: str = "user") -> dict[str, Any]:
    """A message of texts and images, which are told apart by their beginning."""
    return {
        "role": role,
        "content": [
            {"type": "image_url", "image_url": {"url": part}}
            if part.startswith(("data:", "file:", "http"))
            else {"type": "text", "text": part}
            for part in parts
        ],
    }


def ask(running: Running, *messages: dict[str, Any], **fields: Any) -> httpx.Response:
    body = {
        "model": MODEL, "messages": list(messages), "max_tokens": NEW, "ignore_eos": True,
        "return_token_ids": True, "temperature": 0, **fields,
    }  # fmt: skip
    return httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60)


class Setting:
    """A server of a tiny model with its processor, and the same offline."""

    def __init__(self, running: Running, drafter: RetrievalDrafter, processor: Any) -> None:
        self.running, self.drafter, self.processor = running, drafter, processor

    def offline(self, conversation: list[Any], images: list[bytes], **options: Any) -> list[list[int]]:
        """Tokens of replies, by ``apply_chat_template``, processor and `generate`."""
        text = self.processor.apply_chat_template(conversation, add_generation_prompt=True)
        opened = [Image.open(io.BytesIO(content)).convert("RGB") for content in images]
        inputs = self.processor(text=[text], images=[opened], return_tensors="pt", add_special_tokens=False)
        options = {"do_sample": False, "max_new_tokens": NEW, **options}
        out = self.drafter.generate(**inputs, **options)
        return out[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module", params=["llava", "gemma3"])
def setting(request: Any, tmp_path_factory: Any) -> Iterator[Setting]:
    processor = image_processor(request.param)
    folder = tmp_path_factory.mktemp("images")
    (folder / "a.png").write_bytes(image_bytes(1))

    def drafter() -> RetrievalDrafter:
        config = DraftConfig(nodes=8, adjacency_rows=1024)
        return RetrievalDrafter.for_model(make_image_model(request.param), processor.tokenizer, config=config)

    media = MediaSettings(folder, max_images=3, max_pixels=10_000, max_bytes=20_000)
    with serving(drafter(), processor.tokenizer, processor=processor, media=media) as running:
        yield Setting(running, drafter(), processor)


def parts(*kinds: str) -> list[dict[str, str]]:
    """Content as the processors' templates have it."""
    return [{"type": "image"} if kind == "image" else {"type": "text", "text": kind} for kind in kinds]


def test_replies_are_those_of_generate(setting: Setting) -> None:
    first, second = image_bytes(1), image_bytes(2, 40, 10, "JPEG")
    conversation = [
        {"role": "user", "content": parts("ab cd", "image", "ab")},
        {"role": "assistant", "content": parts("cd")},
        {"role": "user", "content": parts("image", "ef")},
    ]
    sent = (
        message("ab cd", data_url(first), "ab"),
        {"role": "assistant", "content": "cd"},
        message(data_url(second, "image/jpeg"), "ef"),
    )
    (wanted,) = setting.offline(conversation, [first, second])
    assert tokens_of(ask(setting.running, *sent)) == [wanted]
    assert tokens_of(ask(setting.running, *sent)) == [wanted], "now with drafts from the history"
    (other,) = setting.offline(conversation, [first, image_bytes(3)])
    assert other != wanted, "the images matter"


def test_samples_and_company_change_nothing(setting: Setting) -> None:
    options = {"temperature": 0.9, "seed": 7, "top_k": 40}
    images = [image_bytes(seed) for seed in range(4)]
    conversation = [{"role": "user", "content": parts("image", "ab")}]
    wanted = [
        setting.offline(
            conversation, [each], do_sample=True, temperature=0.9, top_k=40, seed=7, num_return_sequences=2
        )
        for each in images
    ]
    text = {"role": "user", "content": "ab cd ab"}
    alone = tokens_of(ask(setting.running, text))
    with ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(ask, setting.running, message(data_url(each), "ab"), n=2, **options)
            for each in images
        ]
        texts = [pool.submit(ask, setting.running, text) for _ in range(3)]
        assert [tokens_of(each.result()) for each in asked] == wanted
        assert all(tokens_of(each.result()) == alone for each in texts)


def test_files_of_the_folder_may_be_named(setting: Setting) -> None:
    folder = setting.running.service.settings.media.folder
    inline = tokens_of(ask(setting.running, message("ab", data_url(image_bytes(1)))))
    assert tokens_of(ask(setting.running, message("ab", f"file://{folder}/a.png"))) == inline


def test_bad_images_are_refused_and_say_why(setting: Setting) -> None:
    running = setting.running
    good = data_url(image_bytes(1))
    refused = {
        "torn, or none of": data_url(image_bytes(1)[:-400]),
        "is no base64": "data:image/png;base64,@@@",
        "not of the form": "data:image/png,abc",
        "pixels; 10000 are allowed": data_url(image_bytes(1, 101, 100, "JPEG")),
        "more than 20000 bytes": data_url(image_bytes(1, 90, 100)),
        "fetches no images": "http://example.com/a.png",
        "not below the folder": "file:///etc/passwd",
    }
    for why, url in refused.items():
        response = ask(running, message("ab", url))
        assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
        assert why in response.json()["error"]["message"]
    for why, parts_ in {
        "4 images; 3 are allowed": [good] * 4,
        "processor refuses": [good, "<image><begin>"],
    }.items():
        response = ask(running, message(*parts_))
        assert response.status_code == 400
        assert why in response.json()["error"]["message"]
    for part in (
        {"type": "image_url"},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "image_url", "image_url": 3},
    ):
        response = ask(running, {"role": "user", "content": [part]})
        assert response.status_code == 400
    assert running.wait_idle()
    assert tokens_of(ask(running, message("ab", good)))


def test_a_prompt_that_cannot_be_verified_fails_alone(setting: Setting, caplog: Any) -> None:
    caplog.set_level(logging.CRITICAL, "retrieval_draft.server")
    target = setting.running.service.loaded.drafter.target
    before = dict(target.media_ways)
    target.media_ways.update(dict.fromkeys(before, "a test says so"))
    try:
        response = ask(setting.running, message("ab", data_url(image_bytes(1))))
        assert response.status_code == 400
        assert "a test says so" in response.json()["error"]["message"]
    finally:
        target.media_ways.update(before)
    assert tokens_of(ask(setting.running, message("ab", data_url(image_bytes(1)))))


def test_a_model_of_text_refuses_images_by_name(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    with serving(tiny_drafter(tiny_model(tokenizer), tokenizer), tokenizer) as running:
        response = ask(running, message("ab", data_url(image_bytes(1))))
        assert response.status_code == 400
        assert "image_url: this model reads no images" in response.json()["error"]["message"]
        assert torch.is_grad_enabled()


def test_a_request_that_the_template_refuses_decides_nothing_for_others() -> None:
    processor = image_processor("llava")
    processor.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    drafter = RetrievalDrafter.for_model(make_image_model("llava"), processor.tokenizer)
    with serving(drafter, processor.tokenizer, processor=processor) as running:
        sent = {"role": "user", "content": "ab cd"}
        refused = ask(running, sent, chat_template_kwargs={"unknown": 1})
        answer = ask(running, sent)
    assert "chat_template_kwargs" in refused.json()["error"]["message"]
    assert answer.json()["usage"]["prompt_tokens"] == len(processor.tokenizer("ab cd")["input_ids"])


def test_a_processor_may_have_templates_by_name() -> None:
    processor = image_processor("llava")
    plain = processor.chat_template
    tools = "{% for tool in tools %}<tool_call>{{ tool['function']['name'] }} {% endfor %}"
    processor.chat_template = {"default": plain, "tool_use": tools + plain}
    processor.tokenizer.chat_template = None
    drafter = RetrievalDrafter.for_model(make_image_model("llava"), processor.tokenizer)
    with serving(drafter, processor.tokenizer, processor=processor) as running:
        assert running.service.loaded.parsing.tool_parser == "qwen"
        sent = message("ab", data_url(image_bytes(1)))
        alone = ask(running, sent).json()["usage"]["prompt_tokens"]
        tool = {"type": "function", "function": {"name": "abc"}}
        more = ask(running, sent, tools=[tool]).json()["usage"]["prompt_tokens"]
    marked = processor.tokenizer("<tool_call>abc ", add_special_tokens=False)["input_ids"]
    assert more == alone + len(marked)


def test_tokens_of_a_conversation_with_images_are_those_of_its_prompt(setting: Setting) -> None:
    sent = message("ab", data_url(image_bytes(1)))
    usage = ask(setting.running, sent).json()["usage"]
    answer = httpx.post(f"{setting.running.url}/tokenize", json={"messages": [sent]})
    assert answer.json()["count"] == usage["prompt_tokens"]


def test_a_message_with_images_is_echoed_as_its_text(setting: Setting) -> None:
    sent = message("ab", data_url(image_bytes(1)), "cd", role="assistant")
    fields = {"continue_final_message": True}
    (plain,) = ask(setting.running, message("ef"), sent, **fields).json()["choices"]
    (echoed,) = ask(setting.running, message("ef"), sent, **fields, echo=True).json()["choices"]
    assert echoed["message"]["content"] == "abcd" + plain["message"]["content"]
