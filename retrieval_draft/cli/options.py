"""Options of commands from the fields of dataclasses, and ``--json`` and ``--out`` of those that report.

A command takes settings as one parameter each::

    @command
    def serve(settings: Annotated[ServerSettings, Fields("max_batch", grace_seconds="--grace")]) -> Report:

and has the options ``--max-batch``, ``--grace`` and ``--json``. Name, type, default, limits and help of an
option are the field's.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json as json_module
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo, ParameterInfo

from retrieval_draft._settings import Range, field_docs, field_metadata
from retrieval_draft.cli.output import print_json, print_table
from retrieval_draft.errors import InvalidInputError

__all__ = [
    "DIFFERENT",
    "Fields",
    "Json",
    "Out",
    "Report",
    "Table",
    "command",
    "measurement",
    "save",
]

DIFFERENT = 3
"""Exit code: verification found a difference."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Out = Annotated[
    Path | None, typer.Option("--out", help="Write the JSON object to a file as well.", show_default=False)
]


class Table(NamedTuple):
    """A table to print: see `print_table`."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """The outcome of a command.

    Attributes:
        result: The object of ``--json``.
        parts: Tables and lines of text, printed without it.
        different: Whether verification found a difference; the exit code tells.
        saved: The object of ``--out`` where that is another than `result`.
    """

    result: Mapping[str, Any]
    parts: Sequence[Table | str] = ()
    different: bool = False
    saved: Mapping[str, Any] | None = None

    def print(self, json: bool) -> None:
        """Prints the object, or the parts."""
        if json:
            print_json(self.result)
            return
        for part in self.parts:
            if isinstance(part, Table):
                print_table(*part)
            else:
                print(part)


class Fields:
    """Marks a command's parameter as a dataclass, and names its fields that are options of the command.

    Args:
        names: Fields with an option of their own name, or ``...`` for all fields.
        without: Fields that have no option where all others have one.
        defaults: Values that this command has in place of the dataclass's defaults, of fields without an
            option too.
        declared: Fields with another name, as ``"--grace"``, or with a `typer.Option`; what that leaves open
            is the field's.
    """

    def __init__(
        self,
        *names: str | types.EllipsisType,
        without: Sequence[str] = (),
        defaults: Mapping[str, Any] | None = None,
        **declared: str | OptionInfo,
    ) -> None:
        self._names, self._without, self._declared = names, without, declared
        self.defaults = defaults or {}

    def __contains__(self, name: str) -> bool:
        named = ... in self._names or name in self._names or name in self._declared
        return named and name not in self._without

    def parameters(self, kind: type) -> Iterator[tuple[str, inspect.Parameter]]:
        """The fields of a dataclass that have an option, and its parameter for typer."""
        for field in dataclasses.fields(kind):
            if field.name not in self:
                continue
            base, metadata = field_metadata(kind)[field.name]
            declared = self._declared.get(field.name)
            option = next((each for each in (declared, *metadata) if isinstance(each, ParameterInfo)), None)
            option = typer.Option() if option is None else copy.copy(option)
            flag = declared if isinstance(declared, str) else option.default
            name = field.name
            if isinstance(flag, str):
                option.default, name = flag, flag.split("/")[0].lstrip("-").replace("-", "_")
            option.help = option.help or field_docs(kind)[field.name]
            if isinstance(option, OptionInfo) and _is_list(base) and "repeatable" not in option.help:
                option.help += " Repeatable."
            ranges = [each for each in metadata if isinstance(each, Range)]
            if ranges and option.min is None:
                option.min = ranges[0].low
            value = self.defaults.get(field.name, _default(field))
            yield (
                field.name,
                _parameter(name, Annotated[_typed(base), option], value or None if _is_list(base) else value),
            )


def command(function: Callable[..., Any]) -> Callable[..., None]:
    """A command for typer: its dataclasses become options. One that returns a `Report` has ``--json``."""
    return _expanded(function, ("json",) if _hints(function)["return"] is Report else ())


def measurement(function: Callable[..., Report]) -> Callable[..., None]:
    """The same for a measurement, which has ``--out`` as well."""
    return _expanded(function, ("out", "json"))


def save(result: Mapping[str, Any], out: Path | None) -> None:
    """Writes a result to the user's file, if there is one.

    Raises:
        InvalidInputError: It cannot be written.
    """
    if out is None:
        return
    part = out.with_name(out.name + ".part")
    try:
        part.write_text(json_module.dumps(result, indent=2) + "\n", encoding="utf-8")
        part.replace(out)
    except OSError as error:
        raise InvalidInputError(f"Cannot write {out}: {error}.") from error


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(function, include_extras=True)


def _expanded(function: Callable[..., Any], added: Sequence[str]) -> Callable[..., None]:
    """A function with the options of its dataclasses, and those in `added` of its report."""
    hints = _hints(function)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[type, Mapping[str, Any], dict[str, str]]] = {}
    for each in inspect.signature(function).parameters.values():
        hint = hints[each.name]
        fields = next((part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Fields)), None)
        if fields is None:
            parameters.append(_parameter(each.name, hint, each.default))
            continue
        options = dict(fields.parameters(hint.__origin__))
        parameters += options.values()
        names = {field: option.name for field, option in options.items()}
        groups[each.name] = hint.__origin__, fields.defaults, names
    reporting = {"out": _parameter("out", Out, None), "json": _parameter("json", Json, False)}
    parameters += [reporting[name] for name in added if name not in hints]

    def run(**given: Any) -> None:
        asked = {name: given[name] if name in hints else given.pop(name) for name in added}
        for name, (kind, defaults, names) in groups.items():
            values = {field: _value(kind, field, given.pop(option)) for field, option in names.items()}
            given[name] = kind(**{**defaults, **values})
        found = function(**given)
        if added:
            save(found.result if found.saved is None else found.saved, asked.get("out"))
            found.print(asked["json"])
            if found.different:
                raise typer.Exit(DIFFERENT)

    run.__name__, run.__doc__, run.__module__ = function.__name__, function.__doc__, function.__module__
    # typer reads a command's signature, and the types of its parameters from their annotations.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty


def _members(base: Any) -> list[Any]:
    """The types of a union without None, without their own arguments."""
    united = get_args(base) if get_origin(base) in (Union, types.UnionType) else (base,)
    return [get_origin(each) or each for each in united if each is not type(None)]


def _is_list(base: Any) -> bool:
    return not {list, tuple, Mapping}.isdisjoint(_members(base))


def _typed(base: Any) -> Any:
    """A field's type as typer knows it: words for choices, mixed types and entries of mappings."""
    members = _members(base)
    if Mapping in members:
        return list[str] | None
    if tuple in members:
        return types.GenericAlias(list, get_args(base)[:1]) | None
    if str in members or Literal in members:
        return str | None if type(None) in get_args(base) else str
    return base


def _value(kind: type, field: str, given: Any) -> Any:
    """A field's value from its option's."""
    members = _members(field_metadata(kind)[field][0])
    if tuple in members:
        return tuple(given or ())
    return _numbers(given or ()) if Mapping in members else given


def _numbers(words: Sequence[str]) -> dict[str, float]:
    """Numbers by name, from words.

    Raises:
        InvalidInputError: A word is not of the form NAME=NUMBER.
    """
    found = {}
    for word in words:
        name, _, number = word.partition("=")
        try:
            found[name] = float(number)
        except ValueError as error:
            raise InvalidInputError(f"{word!r} is not of the form NAME=NUMBER.") from error
    return found
