from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer

from retrieval_draft._settings import Range
from retrieval_draft.cli.options import Fields, Report, Table, command, measurement, save
from retrieval_draft.config import DraftConfig
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.store.config import StoreConfig
from retrieval_draft.server.settings import ServerSettings


@dataclass(frozen=True)
class Sizes:
    """Sizes.

    Attributes:
        rows: Rows at most.
        form: "flat" or None.
        weights: Of rows.
        names: Of columns.
    """

    rows: Annotated[int, Range(1, 64)] = 8
    form: Literal["flat"] | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    names: tuple[str, ...] = ()


def options(function: Any) -> dict[str, Any]:
    """The options of a command by their first name, as click has them."""
    app = typer.Typer(add_completion=False)
    app.command()(function)
    return {each.opts[0]: each for each in typer.main.get_command(app).params}


def run(function: Any, *words: str) -> int:
    app = typer.Typer(add_completion=False)
    app.command()(function)
    return app(list(words), standalone_mode=False) or 0


def test_fields_are_options() -> None:
    seen: list[Sizes] = []

    @command
    def show(sizes: Annotated[Sizes, Fields(..., rows="--most", weights="--weight")], last: int = 1) -> None:
        seen.append(sizes)

    found = options(show)
    assert set(found) == {"--most", "--form", "--weight", "--names", "--last"}
    assert (found["--most"].default, found["--most"].help) == (8, "Rows at most.")
    assert found["--names"].help == "Of columns. Repeatable."
    run(show, "--most", "3", "--weight", "a=2", "--weight", "b=0.5", "--names", "x", "--form", "flat")
    run(show)
    assert seen == [Sizes(3, "flat", {"a": 2.0, "b": 0.5}, ("x",)), Sizes()]


def test_a_command_has_other_defaults_and_leaves_fields_out() -> None:
    seen: list[Sizes] = []

    @command
    def show(sizes: Annotated[Sizes, Fields("form", defaults={"rows": 2, "form": "flat"})]) -> None:
        seen.append(sizes)

    assert list(options(show)) == ["--form"]
    run(show)
    assert seen == [Sizes(2, "flat")]


def test_bad_values_are_refused() -> None:
    @command
    def show(sizes: Annotated[Sizes, Fields(...)]) -> None: ...

    with pytest.raises(InvalidInputError, match="'a' is not of the form NAME=NUMBER"):
        run(show, "--weights", "a")
    with pytest.raises(Exception, match=r"greater than or equal to 1|range x>=1"):
        run(show, "--rows", "0")


def test_a_report_is_printed_saved_and_ends_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @measurement
    def measure(different: bool = False) -> Report:
        table = Table("", ("what", "value"), [("a", "1")])
        return Report({"a": 1}, [table, "a line"], different, saved={"a": 1, "commit": "c"})

    assert list(options(measure)) == ["--different", "--out", "--json"]
    out = tmp_path / "out.json"
    assert run(measure, "--json", "--out", str(out)) == 0
    assert json.loads(capsys.readouterr().out) == {"a": 1}
    assert json.loads(out.read_text()) == {"a": 1, "commit": "c"}
    assert run(measure, "--different") == 3
    printed = capsys.readouterr().out
    assert "what" in printed
    assert printed.endswith("a line\n")


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"Cannot write .*absent"):
        save({}, tmp_path / "absent" / "out.json")


@pytest.mark.parametrize("kind", [DraftConfig, StoreConfig, ServerSettings])
def test_every_field_of_the_settings_can_be_an_option(kind: type) -> None:
    unlike = {"sources", "prefill_logits", "key", "media"}
    found = dict(Fields(..., without=tuple(unlike)).parameters(kind))
    assert all(each.annotation.__metadata__[0].help for each in found.values())
