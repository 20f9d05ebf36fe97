"""Tools of a conversation: the fields with which a client offers them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta, Raw, Struct
from msgspec.json import Decoder

from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.json_body import decode_field, is_absent
from retrieval_draft.server.parsing.reader import Tools

__all__ = ["TOOLS_SCHEMA", "TOOL_CHOICE_SCHEMA", "Tool", "ToolUse", "tool_use", "used_tools"]

_MAX_TOOLS = 1024
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}
TOOLS_SCHEMA = {"type": "array", "items": {"$ref": "#/components/schemas/Tool"}}
TOOL_CHOICE_SCHEMA = {"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}]}


class ToolFunction(Struct):
    """A function that the model may call."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$(?!\n)")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct, forbid_unknown_fields=True):
    """A tool; only functions are supported."""

    function: ToolFunction
    type: Literal["function"] = "function"


class _Named(Struct):
    name: str


class _Choice(Struct, forbid_unknown_fields=True, tag="function"):
    """One function that is to be called."""

    function: _Named


class _AllowedTool(Struct, forbid_unknown_fields=True):
    function: _Named
    type: Literal["function"] = "function"


class _AllowedTools(Struct, forbid_unknown_fields=True):
    mode: Literal["auto", "required"]
    tools: list[_AllowedTool]


class _Allowed(Struct, forbid_unknown_fields=True, tag="allowed_tools"):
    """A part of the tools, of which some or none are called, or at least one."""

    allowed_tools: _AllowedTools


_TOOLS = Decoder(list[Tool])
_CHOICE = Decoder(Literal["none", "auto", "required"] | _Choice | _Allowed)


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Tools that a reply may call.

    Attributes:
        functions: The tools.
        choice: "auto", "required", or "function" where only the one tool that is left is to be called.
        one_call: Whether there is one call at most.
    """

    functions: Sequence[ToolFunction]
    choice: Literal["auto", "required", "function"] = "auto"
    one_call: bool = False

    @property
    def shown(self) -> list[dict[str, Any]]:
        """The tools for a chat template."""
        return [{"type": "function", "function": _shown(each)} for each in self.functions]

    @property
    def schemas(self) -> Tools:
        """Schemas of the parameters by name, of each tool by name."""
        return {each.name: _properties(each.parameters) for each in self.functions}


def tool_use(tools: Raw, choice: Raw, parallel: bool | None) -> ToolUse | None:
    """Reads the fields of a chat; None where nothing is to be called.

    Args:
        tools: The field ``tools``.
        choice: The field ``tool_choice``.
        parallel: The field ``parallel_tool_calls``.

    Raises:
        ApiError: Names the field.
    """
    if not is_absent(tools, b"[]") and bytes(tools).count(b'"function"') > 4 * _MAX_TOOLS:
        raise ApiError(400, f"tools has more than {_MAX_TOOLS} entries.", "tools")
    given = [] if is_absent(tools, b"[]") else decode_field(tools, _TOOLS, "tools")
    chosen = "auto" if is_absent(choice) else decode_field(choice, _CHOICE, "tool_choice")
    return used_tools([tool.function for tool in given], chosen, parallel)


def used_tools(functions: Sequence[ToolFunction], chosen: Any, parallel: bool | None) -> ToolUse | None:
    """The tools that a reply may call, of those that a request has.

    Args:
        functions: The request's.
        chosen: "none", "auto", "required", or an object with one function's name or those of several.
        parallel: Whether several calls are wanted; None for yes.

    Raises:
        ApiError: Names the field.
    """
    names = [function.name for function in functions]
    if len(names) > _MAX_TOOLS:
        raise ApiError(400, f"tools has {len(names)} entries; {_MAX_TOOLS} are allowed.", "tools")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ApiError(400, f"tools has {twice!r} twice.", "tools")
    if chosen == "none" or (chosen == "auto" and not functions):
        return None
    if not functions:
        raise ApiError(400, "tool_choice asks for a call, and there are no tools.", "tool_choice")
    if isinstance(chosen, str):
        return ToolUse(functions, "auto" if chosen == "auto" else "required", parallel is False)
    if isinstance(chosen, _Allowed):
        allowed = chosen.allowed_tools
        left = _named(functions, [tool.function.name for tool in allowed.tools])
        return ToolUse(left, allowed.mode, parallel is False)
    return ToolUse(_named(functions, [chosen.function.name]), "function", True)


def _named(functions: Sequence[ToolFunction], names: Sequence[str]) -> list[ToolFunction]:
    """The functions with some names, in the order of the request's tools."""
    if not names:
        raise ApiError(400, "tool_choice allows no tools; name one, or send none.", "tool_choice")
    known = {function.name for function in functions}
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise ApiError(400, f"tool_choice names {unknown[:64]!r}; no tool has that name.", "tool_choice")
    wanted = set(names)
    return [function for function in functions if function.name in wanted]


def _shown(function: ToolFunction) -> dict[str, Any]:
    described = {} if function.description is None else {"description": function.description}
    return {"name": function.name, **described, "parameters": function.parameters or dict(_NO_PARAMETERS)}


def _properties(parameters: Mapping[str, Any] | None) -> Mapping[str, Any]:
    found = (parameters or {}).get("properties")
    return found if isinstance(found, dict) else {}
