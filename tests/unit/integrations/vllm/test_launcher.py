"""The command that starts vLLM's server."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import json
import sys
from typing import Any

import pytest

from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.store.config import StoreConfig
from retrieval_draft.integrations.vllm.launcher import PROPOSER, launch, server_command


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM can be found."""
    find = importlib.util.find_spec

    def found(name: str, *rest: Any) -> Any:
        return importlib.machinery.ModuleSpec("vllm", None) if name == "vllm" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.32.0")


def test_without_vllm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(InvalidInputError, match="vLLM is not installed"):
        launch("folder")


@pytest.mark.usefixtures("installed")
def test_the_command_and_its_environment() -> None:
    seen: list[Any] = []

    def execute(path: str, command: list[str], environment: dict[str, str]) -> Any:
        seen.extend((path, command, environment))

    launch(
        "some/model",
        port=9000,
        dtype="float32",
        num_speculative_tokens=12,
        served_model_name="mine",
        api_key="secret",
        corpora=["/a", "/b"],
        store=StoreConfig("redis://localhost:1", tenant="team", share="all", key=b"signed"),
        arguments=["--max-model-len", "512"],
        execute=execute,
    )
    path, command, environment = seen
    assert path == command[0] == sys.executable
    assert command[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", "some/model"]
    assert command[-2:] == ["--max-model-len", "512"]
    speculative = json.loads(command[command.index("--speculative-config") + 1])
    assert speculative == {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": 12}
    assert command[command.index("--served-model-name") + 1] == "mine"
    names = ("STORE", "TENANT", "SHARE", "STORE_KEY")
    assert [environment["RETRIEVAL_DRAFT_" + name] for name in names] == [
        "redis://localhost:1",
        "team",
        "all",
        "signed",
    ]
    assert environment["VLLM_API_KEY"] == "secret"
    assert "secret" not in " ".join(command)
    assert environment["RETRIEVAL_DRAFT_INDEX"].endswith("/b")
    assert "RETRIEVAL_DRAFT_PHRASES" not in environment


@pytest.mark.usefixtures("installed")
def test_under_another_package_name_the_server_is_started_without_its_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    command, _ = server_command("some/model")
    assert command[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", "some/model"]


@pytest.mark.usefixtures("installed")
def test_what_cannot_be_used_is_said_before_anything_starts() -> None:
    with pytest.raises(InvalidInputError, match="num_speculative_tokens is 257"):
        server_command("m", num_speculative_tokens=257)
    with pytest.raises(InvalidInputError, match="cannot be read"):
        server_command("m", config_file="/nowhere.json")


def test_the_name_that_vllm_loads_is_there() -> None:
    module, name = PROPOSER.rsplit(".", 1)
    assert hasattr(importlib.import_module(module), name)
