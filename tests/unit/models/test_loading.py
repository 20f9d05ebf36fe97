import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from retrieval_draft._files import cache_home
from retrieval_draft.errors import InvalidInputError, ModelFileError
from retrieval_draft.models.folder_manifest import MANIFEST, verify_folder, write_manifest
from retrieval_draft.models.loading import load_model, load_processor, rounded_copy
from retrieval_draft.models.packaged import NAMES
from tests.support.sounds import RATE, sound_model, sound_processor
from tests.support.tiny import save_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture
def guarded(copy: Path) -> Path:
    write_manifest(copy, source={"package": "tiny"})
    return copy


def test_local_folder_loads_model_and_tokenizer(tiny: Path) -> None:
    model, tokenizer = load_model(str(tiny), device="cpu")
    assert model.dtype == torch.float32
    assert not model.training
    assert tokenizer.decode(tokenizer("the cat")["input_ids"]) == "the cat"


def test_a_model_that_hears_is_loaded_with_its_processor(tmp_path: Path) -> None:
    sound_model().save_pretrained(tmp_path)
    sound_processor().save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), device="cpu")
    assert type(model).__name__ == "Qwen2AudioForConditionalGeneration"
    assert load_processor(str(tmp_path)).feature_extractor.sampling_rate == RATE


def test_dtype_by_name(tiny: Path) -> None:
    assert load_model(str(tiny), dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16
    with pytest.raises(InvalidInputError, match="float32"):
        load_model(str(tiny), dtype="int7")


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weights_are_rounded_and_the_head_with_them(tiny: Path, weights: str) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    plain, (model, _) = (
        load_model(str(tiny), device="cpu")[0],
        load_model(str(tiny), device="cpu", weights=weights),
    )
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert linear
    assert all(isinstance(module, quanto.QLinear) and module.frozen for module in linear)
    assert isinstance(model.lm_head, quanto.QLinear)
    embeddings = model.get_input_embeddings().weight, plain.get_input_embeddings().weight
    assert type(embeddings[0]) is torch.nn.Parameter
    assert torch.equal(*embeddings)
    assert not model.training


def test_a_rounded_copy_shares_embeddings_and_head(tiny: Path) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    model, _ = load_model(str(tiny), device="cpu")
    copy = rounded_copy(model, "int8")
    linear = [module for module in copy.modules() if isinstance(module, torch.nn.Linear)]
    assert [isinstance(module, quanto.QLinear) for module in linear].count(False) == 1
    assert type(copy.get_output_embeddings()) is torch.nn.Linear
    for of in ("get_input_embeddings", "get_output_embeddings"):
        assert getattr(copy, of)().weight is getattr(model, of)().weight
    assert not any(isinstance(module, quanto.QLinear) for module in model.modules())
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        ours, whole = copy(ids).logits, model(ids).logits
    assert not torch.equal(ours, whole)
    assert torch.allclose(ours, whole, atol=0.1 * float(whole.abs().max()))


def test_weights_that_there_are_not(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInputError, match=r"'int3'.*int8, int4"):
        load_model(str(tiny), weights="int3")
    with pytest.raises(InvalidInputError, match="not spread over devices"):
        load_model(str(tiny), weights="int8", device="auto")
    monkeypatch.setattr("retrieval_draft.models.loading.find_spec", lambda name: None)
    with pytest.raises(ModelFileError, match=r"not installed.*retrieval_draft\[quanto\]"):
        load_model(str(tiny), weights="int8")


def test_absent_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="absent"):
        load_model(str(tmp_path / "absent"))


def test_folder_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"config\.json is missing"):
        load_model(str(tmp_path))


def test_absent_hub_name_says_that_the_hub_is_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelFileError, match="HF_HUB_OFFLINE") as caught:
        load_model("nobody/no-such-model")
    assert "nobody/no-such-model" in caught.value.message
    assert NAMES in caught.value.hint


def test_an_unknown_name_is_told_at_once_and_names_what_was_tried(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from retrieval_draft.models.loading import load_model\n"
        "begin = time.perf_counter()\n"
        "try:\n"
        "    load_model('nobody/no-such-model')\n"
        "except OSError as error:\n"
        "    print(time.perf_counter() - begin, 'torch' in sys.modules, error, sep='|')\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("HF_HUB_CACHE", None)
    for offline in ("1", "0"):
        # Nobody listens on this port: the hub is not reached.
        more = {"HF_HUB_OFFLINE": offline, "HF_ENDPOINT": "http://127.0.0.1:9"}
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True, text=True, check=True, cwd=tmp_path, env={**environment, **more},
        )  # fmt: skip
        seconds, imported, message = done.stdout.split("|")
        assert float(seconds) < 5  # of retries there would be 50; one second is what a free machine needs
        assert imported == "False"
        assert f"no folder of that name in {tmp_path}" in message
        assert f"nothing in the hub's cache {tmp_path / 'hub'}" in message
        assert ("HF_HUB_OFFLINE is set" if offline == "1" else "http://127.0.0.1:9 is not reached") in message


@pytest.mark.parametrize(
    "name", ["no body/none", "a//b", "-x", "~nobody-of-that-name/x", "a\0b", "", "smollm2"]
)
def test_names_that_no_hub_has(name: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        load_model(name)
    assert NAMES in caught.value.hint


def test_torn_weights_are_reported(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelFileError, match="torn"):
        load_model(str(copy))


def test_missing_weights_are_not_made_up(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFileError, match=r"lacks 1 weights.*layers\.1\.mlp\.up_proj"):
        load_model(str(copy))


def test_untouched_folder_passes(guarded: Path) -> None:
    verify_folder(guarded, repair="")


def test_altered_file_is_found_with_both_checksums(guarded: Path) -> None:
    weights = guarded / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ModelFileError, match=r"model\.safetensors was altered: found .* expected .* Do this"):
        verify_folder(guarded, repair="Do this.")


def test_short_file_is_torn(guarded: Path) -> None:
    (guarded / "config.json").write_text("{")
    with pytest.raises(ModelFileError, match=r"config\.json is torn: found 1 bytes, expected \d+"):
        verify_folder(guarded, repair="")


def test_missing_file_is_named(guarded: Path) -> None:
    (guarded / "tokenizer.json").unlink()
    with pytest.raises(ModelFileError, match=r"tokenizer\.json is missing"):
        verify_folder(guarded, repair="")


@pytest.mark.parametrize(
    ("text", "found"),
    [("", "torn"), ("{", "torn"), ("[]", "format version None"), ('{"format_version": 1}', "no list")],
)
def test_broken_manifest_is_told_apart(guarded: Path, text: str, found: str) -> None:
    (guarded / MANIFEST).write_text(text)
    with pytest.raises(ModelFileError, match=found):
        verify_folder(guarded, repair="")


def test_folder_of_a_later_format_is_refused(guarded: Path) -> None:
    manifest = json.loads((guarded / MANIFEST).read_text())
    (guarded / MANIFEST).write_text(json.dumps(manifest | {"format_version": 2}))
    with pytest.raises(ModelFileError, match="found format version 2, expected 1"):
        verify_folder(guarded, repair="")


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RETRIEVAL_DRAFT_HOME", str(tmp_path / "mine"))
    assert cache_home() == tmp_path / "mine"
    monkeypatch.delenv("RETRIEVAL_DRAFT_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_home() == tmp_path / "retrieval_draft"


def test_a_user_without_a_home_has_a_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RETRIEVAL_DRAFT_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 987_654)  # of whom the system knows nothing
    assert cache_home().is_dir()
    assert cache_home() == cache_home()
