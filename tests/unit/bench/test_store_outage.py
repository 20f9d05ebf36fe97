"""Tests of the bench that decodes with and without a store."""

from pathlib import Path

import pytest

from retrieval_draft.bench.store_outage import measure_outages
from tests.tiny import save_tiny


@pytest.mark.slow
def test_a_dead_store_is_noticed_and_changes_no_text(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    found = measure_outages(
        str(folder), [[3, 4, 5], [5, 4, 3]], tmp_path, max_new_tokens=4, states=("none", "dead")
    )
    assert found["none"]["state"] == "none"
    assert found["dead"]["state"] != "none"
    assert all(each["same_text"] and each["replies"] == 1 and each["ratio"] > 0 for each in found.values())
