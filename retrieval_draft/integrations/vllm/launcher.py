"""Launch of vLLM's own OpenAI server with this project's drafts."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from retrieval_draft._settings import check_range
from retrieval_draft.drafting.batch.chain_batch import MAX_CHAIN
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.store.config import StoreConfig
from retrieval_draft.integrations.vllm.options import PREFIX, VllmOptions
from retrieval_draft.models.packaged import PACKAGED, packaged_folder

__all__ = ["PROPOSER", "launch", "server_command"]

PROPOSER = "retrieval_draft.integrations.vllm.RetrievalProposer"
"""Dotted path of the proposer, for vLLM to load."""


def server_command(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: str | None = None,
    num_speculative_tokens: int = 24,
    served_model_name: str | None = None,
    api_key: str | None = None,
    corpora: Sequence[Path | str] = (),
    phrases: Path | str | None = None,
    store: StoreConfig | str | None = None,
    history_folder: Path | str | None = None,
    config_file: Path | str | None = None,
    arguments: Sequence[str] = (),
) -> tuple[list[str], dict[str, str]]:
    """The command that serves a model with drafts, and its environment.

    Args:
        model: A folder, a hub name, or a name of `PACKAGED`.
        host: Address to listen on.
        port: Port to listen on.
        dtype: A dtype of vLLM; None for vLLM's default.
        num_speculative_tokens: Limit of a draft's length.
        served_model_name: The model's name in requests; None for `model`.
        api_key: Key that clients must send. It goes into the environment, not the command line.
        corpora: Indexes, as `VllmOptions.index`. Values that are None or empty, here and below, are left to
            the environment.
        phrases: A file of fixed texts.
        store: Store that servers share. The limits of a `StoreConfig` are not passed on.
        history_folder: Folder of earlier requests' texts.
        config_file: TOML or JSON with all options of `VllmOptions`.
        arguments: Passed to vLLM unchanged, after those above.

    Raises:
        InvalidInputError: vLLM is not installed, or an option cannot be used.
    """
    if importlib.util.find_spec("vllm") is None:
        raise InvalidInputError(
            "vLLM is not installed in this environment.",
            "Install it beside retrieval_draft, see docs/vllm.md, or serve without --engine vllm.",
        )
    check_range("num_speculative_tokens", num_speculative_tokens, 1, MAX_CHAIN)
    speculative = {
        "method": "custom_class",
        "model": PROPOSER,
        "num_speculative_tokens": num_speculative_tokens,
    }
    command = [sys.executable, "-m", *_server(str(packaged_folder(model)) if model in PACKAGED else model)]
    command += ["--served-model-name", served_model_name or model]
    command += ["--host", host, "--port", str(port), "--speculative-config", json.dumps(speculative)]
    if dtype is not None:
        command += ["--dtype", dtype]
    environment = dict(os.environ)
    values: dict[str, Any] = {
        "INDEX": os.pathsep.join(str(corpus) for corpus in corpora),
        "PHRASES": phrases,
        "STORE": store if isinstance(store, str) else None,
        "HISTORY_FOLDER": history_folder,
        "CONFIG": config_file,
    }
    if isinstance(store, StoreConfig):
        values.update(STORE=store.url, TENANT=store.tenant, SHARE=store.share, SNAPSHOTS=store.snapshots)
        values["STORE_KEY"] = store.key.decode() if isinstance(store.key, bytes) else store.key
    if api_key:
        environment["VLLM_API_KEY"] = api_key
    environment.update({PREFIX + name: str(value) for name, value in values.items() if value})
    VllmOptions.read(environment)
    return [*command, *arguments], environment


def launch(
    model: str,
    *,
    execute: Callable[[str, list[str], dict[str, str]], NoReturn] = os.execve,
    **options: Any,
) -> NoReturn:
    """Replaces this process with vLLM's server.

    Args:
        model: As for `server_command`.
        execute: Replaces the process.
        **options: As for `server_command`.

    Raises:
        InvalidInputError: vLLM is not installed, or an option cannot be used.
    """
    command, environment = server_command(model, **options)
    execute(command[0], command, environment)


def _server(model: str) -> list[str]:
    """VLLM's server as a module, and the argument that names the model.

    ``vllm serve`` asks for the version of the package ``vllm``, and so fails where vLLM was installed under
    another name, as its CPU build is (0.32.0). The module is older, and may be removed.
    """
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return ["vllm.entrypoints.openai.api_server", "--model", model]
    return ["vllm.entrypoints.cli.main", "serve", model]
