"""Draft sources by name, made from configuration and datastores."""

from __future__ import annotations

from pkgutil import resolve_name

from retrieval_draft.config import SOURCES, DraftConfig
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.source import DraftSource

__all__ = ["make_source", "make_sources"]


def make_source(name: str, config: DraftConfig, stores: DraftStores) -> DraftSource | None:
    """Makes a source of the table; None where it has no data to draft from.

    Args:
        name: A name of `SOURCES`.
        config: The drafting configuration.
        stores: Data to draft from besides the requests.

    Raises:
        InvalidInputError: The made source has another name or level than the table.
    """
    spec = SOURCES[name]
    assert spec.make is not None, "draft models have no name to choose"
    source: DraftSource | None = resolve_name(spec.make)(config, stores)
    if source is not None and (source.name, source.level) != (spec.name, spec.level):
        raise InvalidInputError(
            f"{spec.make} makes a source {source.name!r} of level {source.level!r}; the table of sources has "
            f"{spec.name!r} of level {spec.level!r}.",
            "Give both the same name and level: statistics and calibration know a source by them.",
        )
    return source


def make_sources(config: DraftConfig, stores: DraftStores) -> list[DraftSource]:
    """Makes the sources that `config` names, in its order; none for plain decoding.

    Args:
        config: The drafting configuration.
        stores: Data to draft from besides the requests.

    Raises:
        InvalidInputError: As `make_source` does.
    """
    if config.method == "none":
        return []
    made = (make_source(name, config, stores) for name in config.sources)
    return [source for source in made if source is not None]
