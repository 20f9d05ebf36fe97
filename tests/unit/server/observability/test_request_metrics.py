from __future__ import annotations

from collections import Counter

from retrieval_draft.drafting.stats import DraftStats
from retrieval_draft.server.observability.request_metrics import speculative_decoding


def test_the_keys_are_those_of_vllm() -> None:
    stats = DraftStats(requests=1, tokens=9, steps=4, drafted=12, accepted=4, nodes=Counter({4: 3, 0: 1}))
    stats.accepted_by_source["history"] = 4
    found = speculative_decoding(stats, {2: 2, 0: 1})
    assert found["mean_acceptance_length"] == 1 + 4 / 3
    assert found["draft_acceptance_rate"] == 4 / 12
    assert found["acceptance_histogram"] == [1, 0, 2]
    assert sum(found["acceptance_histogram"]) == found["num_spec_steps"] == 3
    assert (found["num_accepted_draft_tokens"], found["num_draft_tokens"], found["num_steps"]) == (4, 12, 4)
    assert found["tokens_per_step"] == 2.0
    assert found["accepted_by_source"] == {"history": 4}


def test_a_request_without_drafts() -> None:
    found = speculative_decoding(DraftStats(requests=1, tokens=3, steps=2, nodes=Counter({0: 2})), {})
    assert (found["mean_acceptance_length"], found["num_spec_steps"]) == (1.0, 0)
    assert found["acceptance_histogram"] == [0]
    assert "acceptance_histogram" not in speculative_decoding(DraftStats())
