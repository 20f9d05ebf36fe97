"""Setting of the check: device, models with random weights, and sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

__all__ = ["Setting", "synchronize"]

_REPLAYED = Path(__file__).resolve().parents[2] / "tests" / "data" / "vicuna7b_specbench_12.jsonl.gz"

_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
}
_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
}
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 32000,
}
_SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "initializer_range": 0.1,
}
"""Shape with widely spread logits and repetitive text: near ties are rare in float32, and drafts are
accepted."""


@dataclass
class Setting:
    """Device, models and recorded replies, which all parts share.

    Attributes:
        device: Device of the models.
        tiny: Whether this is a rehearsal: tiny models, short contexts, few repeats.
        fault: Name of the deliberate fault, or None.
        parts: Names of the parts to run.
        decoders: Decoders made so far, by model and name, each with its initial state.
    """

    device: torch.device
    tiny: bool
    fault: str | None
    parts: tuple[str, ...] = ()
    decoders: dict[tuple[str, str], Any] = field(default_factory=dict)
    _models: dict[tuple[str, torch.dtype], Any] = field(default_factory=dict)
    _compiled: Any = None

    @classmethod
    def of(cls, options: Any) -> Setting:
        """The setting of the command line.

        Raises:
            RuntimeError: There is no such device.
        """
        if options.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch sees no CUDA device; --device cpu --tiny rehearses without one")
        device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call, unused-ignore]
        transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call, unused-ignore]
        return cls(device, options.tiny, options.fault, tuple(getattr(options, "parts", ())))

    @property
    def cuda(self) -> bool:
        """True if the device is a CUDA card."""
        return self.device.type == "cuda"

    @property
    def geometries(self) -> dict[str, dict[str, Any]]:
        """Models by name: the shapes of Llama 3.2 1B and Llama 3 8B, or two tiny ones."""
        if self.tiny:
            return {
                "tiny-1b": {**_TINY, "num_hidden_layers": 1},
                "tiny-8b": {**_TINY, "num_hidden_layers": 2},
            }
        return {"1b": _1B, "8b": _8B}

    @property
    def trace(self) -> Path:
        """Recorded replies of a 7B model."""
        return _REPLAYED

    def model(self, name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
        """A Llama with random weights made on the device; "small" is one with repetitive text."""
        key = name, dtype
        if key not in self._models:
            shape = _SMALL if name == "small" else self.geometries[name]
            self._models[key] = _make(shape, dtype, self.device)
        return self._models[key]

    def compiled(self) -> Any:
        """The process with a compiled model; the first call starts its compilation."""
        from benchmarks.gpu_check.compiled import CompiledStock

        if self._compiled is None:
            small, large = self.geometries
            case = {"model": large if self.tiny else small, "decoder": "stock-compiled"}
            self._compiled = CompiledStock(case, self.device.type, self.tiny)
        return self._compiled

    def is_sound(self) -> bool:
        """True if the device still works, which after a CUDA error it does not."""
        if not self.cuda:
            return True
        try:
            torch.cuda.synchronize()
            torch.ones(1, device=self.device).add_(1).item()
        except Exception:
            return False
        return True


def _make(shape: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    config = transformers.LlamaConfig(
        **{"initializer_range": 0.02, **shape},
        max_position_embeddings=32768,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(before)
    model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    # No reply ends before its limit.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = None
    return model


def synchronize(device: torch.device) -> None:
    """Waits for a CUDA device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
