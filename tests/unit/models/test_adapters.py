"""Models with adapters over the weights of one: each as PEFT has it, and the model without as before."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.errors import InvalidInputError, ModelFileError
from retrieval_draft.models.adapters import check_adapter, read_adapters, with_adapter
from tests.support.adapters import save_adapter
from tests.support.drafters import prompt_ids
from tests.support.models import make

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def test_an_adapter_over_shared_weights_is_that_of_peft(tmp_path: Path) -> None:
    model, prompt, options = make("llama"), prompt_ids(20), {"max_new_tokens": 16, "do_sample": False}
    bare = model.generate(prompt, **options)
    folders = [save_adapter(model, tmp_path / str(seed), seed) for seed in (1, 2)]
    adapted = [with_adapter(model, folder) for folder in folders]
    weights = {id(each) for each in model.parameters()}
    for each, folder in zip(adapted, folders, strict=True):
        wanted = peft.PeftModel.from_pretrained(make("llama"), str(folder)).eval()
        expected = wanted.generate(input_ids=prompt, **options)
        assert torch.equal(each.generate(input_ids=prompt, **options), expected)
        assert torch.equal(RetrievalDrafter.for_model(each).generate(prompt, **options), expected)
        assert not torch.equal(expected, bare)
        own = [name for name, each in each.named_parameters() if id(each) not in weights]
        assert own
        assert all("lora" in name for name in own)
    assert torch.equal(model.generate(prompt, **options), bare)
    assert not any("lora" in name for name, _ in model.named_modules())


def test_adapters_of_other_models_and_folders_without_one(tmp_path: Path) -> None:
    folder = save_adapter(make("llama"), tmp_path / "a", 1)
    with pytest.raises(ModelFileError, match="does not fit GPTNeoX"):
        with_adapter(make("gpt-neox"), folder)
    with pytest.raises(ModelFileError, match="does not fit LlamaForCausalLM"):
        with_adapter(make("llama", hidden_size=48), folder)
    with pytest.raises(ModelFileError, match=r"adapter_config\.json is missing"):
        check_adapter(tmp_path)


def test_names_and_folders() -> None:
    assert read_adapters(["a=x", "b/c=y=z"], "m") == {"a": Path("x"), "b/c": Path("y=z")}
    for bad in (["a"], ["a="], ["=x"], ["a b=x"], ["m=x"], ["a=x", "a=y"]):
        with pytest.raises(InvalidInputError):
            read_adapters(bad, "m")
