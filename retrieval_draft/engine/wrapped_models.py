"""Models with something around them: torch.compile, PEFT, accelerate, quantisation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin

from retrieval_draft.errors import InvalidInputError, UnsupportedModelError

__all__ = [
    "check_decoder",
    "check_generates",
    "check_layers",
    "decoder_layers",
    "device_of",
    "is_compiled",
    "refuse_activated_adapter",
    "uncompiled",
    "unwrap",
]


def unwrap(model: Any) -> Any:
    """The model of transformers inside the wrappers of torch.compile and PEFT; their ``generate`` is its own.

    Adapters that live in the model's layers, such as LoRA, stay.

    Raises:
        InvalidInputError: It is no model of transformers.
        UnsupportedModelError: An adapter that puts tokens of its own before the prompt.
    """
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise InvalidInputError(
            f"The model is inside a {type(model).__name__}.", "Pass the model itself: model.module."
        )
    if not isinstance(model, nn.Module):
        raise InvalidInputError(
            f"model is a {type(model).__name__}: {str(model)[:40]!r}; it must be a model of transformers.",
            "Load one with AutoModelForCausalLM.from_pretrained(name).",
        )
    given: Any = model
    while True:
        inner = getattr(given, "_orig_mod", None)
        if inner is None and hasattr(given, "peft_config") and hasattr(given, "get_base_model"):
            if getattr(given.active_peft_config, "is_prompt_learning", False):
                kind = type(given.active_peft_config).__name__
                raise UnsupportedModelError(
                    f"The adapter ({kind}) puts virtual tokens before the prompt, which is not supported.",
                    "Adapters in the layers, such as LoRA, work; use model.generate for this one.",
                )
            inner = given.get_base_model()
        if inner is None:
            return given
        given = inner


def check_generates(model: Any) -> None:
    """Refuses a model without text to generate.

    Raises:
        UnsupportedModelError: It has no output head, or is no model of transformers.
    """
    if not isinstance(model, GenerationMixin):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot generate: it has no output head, or is no model of transformers.",
            "Load one with AutoModelForCausalLM.from_pretrained(name).",
        )


def check_decoder(model: Any) -> None:
    """Refuses encoder-decoder models.

    Raises:
        UnsupportedModelError: As above.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder model.",
            "Only decoder-only models are drafted for.",
        )


def is_compiled(model: nn.Module) -> bool:
    """True if torch.compile has been applied to a model or a part of it."""
    return any(_compiled_itself(module) for module in model.modules())


def _compiled_itself(module: nn.Module) -> bool:
    return (
        getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        or "_orig_mod" in module._modules
    )


@contextmanager
def uncompiled(compiled: bool) -> Iterator[None]:
    """Makes compiled models run uncompiled inside the context.

    Each step's tree has another size, and the cache state of its own: compiled code would be compiled again
    for seconds, until torch stops compiling. Other threads are affected in speed only.

    Args:
        compiled: False does nothing.
    """
    if compiled:
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def device_of(module: nn.Module) -> torch.device:
    """Device on which a layer computes: that of its weights, or the one to which accelerate moves them."""
    weight: Any = module.weight
    device: torch.device = weight.device
    if device.type != "meta":
        return device
    hook = getattr(module, "_hf_hook", None)
    for each in (hook, *getattr(hook, "hooks", ())):
        wanted = getattr(each, "execution_device", None)
        if wanted is not None:
            return torch.device(f"cuda:{wanted}" if isinstance(wanted, int) else wanted)
    raise UnsupportedModelError(
        f"The weights of {type(module).__name__} are on the meta device: the model holds no numbers.",
        "Load the checkpoint before making a drafter.",
    )


def check_layers(model: nn.Module) -> None:
    """Refuses layers that give a token another result beside other tokens.

    Raises:
        UnsupportedModelError: Names the layer.
    """
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.ao.nn.quantized.dynamic"):
            raise UnsupportedModelError(
                f"The layer {name} is of torch's dynamic quantisation: it rounds by the largest number of a "
                "whole pass, so that a token's result depends on the tokens beside it.",
                "Quantise the weights alone, with torchao, optimum-quanto or bitsandbytes.",
            )


def refuse_activated_adapter(name: str, module: nn.Module) -> None:
    """Refuses a layer whose adapters act on a part of the text, or of the batch, that its caller names.

    Args:
        name: Of the layer.
        module: The layer.

    Raises:
        UnsupportedModelError: Names the adapter, or the adapters.
    """
    # Looked up on the class first: most layers have no adapters, and a failed lookup on a module is slow.
    layer: Any = module
    if not hasattr(type(module), "disable_adapters") or layer.disable_adapters:
        return
    variants = getattr(layer, "lora_variant", None) or {}
    for adapter in getattr(layer, "active_adapters", ()):
        kind = type(variants[adapter]).__name__ if adapter in variants else ""
        if "alora" in kind.lower():
            raise UnsupportedModelError(
                f"The adapter {adapter!r} at {name} is an activated LoRA: it acts from a position in "
                "the text that only PEFT's own generate works out.",
                "Use the generate of the PEFT model for it, or set_adapter another one.",
            )
    for hook in layer._forward_pre_hooks.values():
        names = (getattr(hook, "keywords", None) or {}).get("adapter_names") or ()
        if len(names) > 1:
            raise UnsupportedModelError(
                f"adapter_names gives {len(names)} rows adapters of their own, which is not supported.",
                "Generate with the rows of each adapter apart, after model.set_adapter(name).",
            )


def decoder_layers(model: Any) -> list[Any]:
    """The model's decoder layers, in order.

    Raises:
        InvalidInputError: They are not found.
    """
    count = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return list(module)
    raise InvalidInputError(
        f"No list of {count} layers is found in {type(model).__name__}.",
        "Self-drafting needs one; pass a draft model instead.",
    )
