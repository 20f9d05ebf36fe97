"""vLLM's configuration and runner, as far as a proposer sees them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class FakeRunner:
    """Calls proposers as vLLM 0.32.0 does. Its source is what the interface check reads."""

    def __init__(self, drafter: Any, batch: Any) -> None:
        self.drafter, self.input_batch = drafter, batch
        self.spec = SimpleNamespace(method="custom_class")

    def propose_draft_token_ids(self, sampled_token_ids: Any, slot_mappings: Any = None) -> Any:
        spec_config = self.spec
        if spec_config.method == "ngram":
            return self.drafter.propose(3, sampled_token_ids)
        elif spec_config.method == "custom_class":
            draft_token_ids = self.drafter.propose(
                sampled_token_ids,
                self.input_batch.num_tokens_no_spec,
                self.input_batch.token_ids_cpu,
                slot_mappings=slot_mappings,
            )
        return draft_token_ids


def vllm_config(
    *, drafts: int = 6, rows: int = 8, width: int = 256, vocabulary: int = 1000, eos: Any = 1, ranks: int = 1
) -> Any:
    """The fields that `RetrievalProposer` reads of ``VllmConfig``."""
    return SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=drafts, method="custom_class"),
        model_config=SimpleNamespace(
            max_model_len=width,
            tokenizer="nowhere",
            tokenizer_revision=None,
            trust_remote_code=False,
            hf_config=SimpleNamespace(eos_token_id=eos),
            get_vocab_size=lambda: vocabulary,
            try_get_generation_config=lambda: {"eos_token_id": [2, 3]},
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=rows),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks, distributed_executor_backend="mp"),
    )
