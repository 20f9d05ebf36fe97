"""The table of sources: names, levels and slots agree with the sources that it makes."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from retrieval_draft.config import DRAFT_MODEL, SOURCES, DraftConfig, SourceSpec
from retrieval_draft.drafting._kernels import fusion
from retrieval_draft.drafting.sources import make_source, make_sources
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.draft_stores import DraftStores

LEVELS = ("request", "history", "shared", "corpus", "model")


def test_the_table_goes_from_near_to_far_and_gives_each_source_a_slot_of_its_own() -> None:
    specs = [*SOURCES.values(), DRAFT_MODEL]
    assert list(SOURCES) == [spec.name for spec in SOURCES.values()]
    order = [LEVELS.index(spec.level) for spec in specs]
    assert order == sorted(order)
    slots = [spec.slot for spec in specs]
    assert len(set(slots)) == len(slots)
    assert min(slots) == 0
    # The last slot is shared by those for whom there is none.
    assert max(slots) < fusion.SOURCES - 1


def test_all_are_drafted_from_by_default() -> None:
    assert DraftConfig().sources == tuple(SOURCES)
    assert "model" not in DraftConfig().sources


def test_sources_are_made_in_the_configured_order_where_there_is_something_to_draft_from() -> None:
    config = DraftConfig(
        sources=("history", "shared", "automaton", "corpus", "phrases", "adjacency", "siblings")
    )
    made = make_sources(config, DraftStores(vocabulary=16))
    assert [source.name for source in made] == ["history", "automaton", "adjacency", "siblings"]
    assert [source.level for source in made] == [SOURCES[source.name].level for source in made]
    for source in made:
        source.close()
    assert make_sources(DraftConfig(method="none"), DraftStores(vocabulary=16)) == []


@pytest.mark.parametrize(("name", "level"), [("other", "request"), ("mine", "history")])
def test_a_source_that_calls_itself_otherwise_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, level: str
) -> None:
    source = types.SimpleNamespace(name=name, level=level)
    module: Any = types.ModuleType("a_source_of_a_test")
    module.make_source = lambda config, stores: source
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(SOURCES, "mine", SourceSpec("mine", "request", 8, "a_source_of_a_test:make_source"))
    with pytest.raises(InvalidInputError, match="same name and level"):
        make_source("mine", DraftConfig(), DraftStores(vocabulary=16))
