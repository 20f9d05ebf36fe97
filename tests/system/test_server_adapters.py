"""Several adapters served at once: each says what it says alone, and drafts from its own texts."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from retrieval_draft import RetrievalDrafter
from retrieval_draft.models.adapters import with_adapter
from tests.support.adapters import save_adapter
from tests.support.servers import MODEL, Running, serving, tiny_drafter, tiny_model, tiny_tokenizer, tokens_of

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
PROMPT = "ab cd ef ab cd gh ab"
KEYS = {"key-of-one": "one", "key-of-two": "two"}


def ask(running: Running, model: str | None, key: str = "key-of-one", **fields: Any) -> httpx.Response:
    body = {
        "prompt": PROMPT, "max_tokens": 24, "ignore_eos": True, "return_token_ids": True, "temperature": 0,
        "metrics": True, **fields,
    }  # fmt: skip
    return httpx.post(
        f"{running.url}/v1/completions",
        json=body if model is None else {"model": model, **body},
        headers={"Authorization": f"Bearer {key}"},
        timeout=60,
    )


class Setting:
    """A server with two adapters, and the three models offline."""

    def __init__(self, running: Running, models: dict[str, Any], tokenizer: Any) -> None:
        self.running, self._tokenizer = running, tokenizer
        self.offline = {name: RetrievalDrafter.for_model(model) for name, model in models.items()}

    def expected(self, name: str, prompt: str = PROMPT, **options: Any) -> list[list[int]]:
        ids = torch.tensor([self._tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        options = {"do_sample": False, "max_new_tokens": 24, **options}
        return self.offline[name].generate(ids, **options)[:, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def setting(tmp_path_factory: Any) -> Iterator[Setting]:
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    folder = tmp_path_factory.mktemp("adapters")
    adapters = {name: save_adapter(model, folder / name, seed) for seed, name in enumerate(("a", "b"), 1)}
    drafter = tiny_drafter(model, tokenizer, history_folder=str(folder / "history"))
    models = {MODEL: model, **{name: with_adapter(model, path) for name, path in adapters.items()}}
    with serving(drafter, tokenizer, adapters=adapters, keys=KEYS) as running:
        yield Setting(running, models, tokenizer)


def test_each_name_has_its_own_answers_alone_and_at_once(setting: Setting) -> None:
    wanted = {name: setting.expected(name) for name in (MODEL, "a", "b")}
    assert len({str(each) for each in wanted.values()}) == 3
    for name, expected in wanted.items():
        answer = ask(setting.running, name)
        assert (tokens_of(answer), answer.json()["model"]) == (expected, name)
    sampled = {
        name: setting.expected(name, do_sample=True, temperature=0.9, top_k=0, seed=3, num_return_sequences=2)
        for name in wanted
    }
    with ThreadPoolExecutor(12) as pool:
        greedy = [(name, pool.submit(ask, setting.running, name)) for name in [*wanted] * 3]
        seeded = [
            (name, pool.submit(ask, setting.running, name, temperature=0.9, seed=3, n=2)) for name in sampled
        ]
        assert all(tokens_of(each.result()) == wanted[name] for name, each in greedy)
        assert all(tokens_of(each.result()) == sampled[name] for name, each in seeded)
    assert setting.running.wait_idle()


def test_without_a_name_it_is_the_model_and_others_are_unknown(setting: Setting) -> None:
    assert tokens_of(ask(setting.running, None)) == setting.expected(MODEL)
    answer = ask(setting.running, "c")
    assert answer.status_code == 404
    assert "'tiny', 'a', 'b'" in answer.json()["error"]["message"]


def test_the_list_of_models_has_them_with_their_parent(setting: Setting) -> None:
    headers = {"Authorization": "Bearer key-of-one"}
    listed = httpx.get(f"{setting.running.url}/v1/models", headers=headers).json()["data"]
    assert [(each["id"], each.get("parent")) for each in listed] == [
        ("tiny", None),
        ("a", "tiny"),
        ("b", "tiny"),
    ]
    for name, status in (("a", 200), ("c", 404)):
        assert httpx.get(f"{setting.running.url}/v1/models/{name}", headers=headers).status_code == status


def test_drafts_are_kept_apart_by_adapter_and_tenant(setting: Setting) -> None:
    loaded = setting.running.service.loaded
    prompt = "gh ef gh cd gh ab"
    for name in (MODEL, "a", "b"):
        for key in KEYS:
            tokens_of(ask(setting.running, name, key, prompt=prompt))
    every = [
        drafter for each in (loaded.tenants, *loaded.adapters.values()) for drafter in each.made.values()
    ]
    assert len(every) >= 6
    for kind in ("draft_engine", "context", "last_stats"):
        made = [getattr(drafter, kind) for drafter in every]
        assert kind == "last_stats" or len({id(each) for each in made}) == len(every)
    folders = [drafter.config.history_folder for drafter in every]
    assert len(set(folders)) == len(every)
    assert {id(drafter.target) for drafter in loaded.adapters["a"].made.values()} != {
        id(drafter.target) for drafter in loaded.adapters["b"].made.values()
    }
    assert (
        "one/a"
        in httpx.get(f"{setting.running.url}/metrics", headers={"Authorization": "Bearer key-of-one"}).text
    )


def test_namespaces_of_the_store_are_apart(tmp_path: Path) -> None:
    from retrieval_draft.server.adapters import _key

    pairs = [
        (first, second) for first in ("a", "a-b", "a.b", "a/b", "") for second in ("a", "b", "b.c", "a.b")
    ]
    keys = {_key(*pair) for pair in pairs}
    assert len(keys) == len(pairs)
    assert all(len(key) <= 64 and set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for key in keys)
