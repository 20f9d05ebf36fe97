"""The parser of a model's replies, by name or as its chat template shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from retrieval_draft.engine.compat import can_parse_responses
from retrieval_draft.server.parsing.deltas import ReplyParser
from retrieval_draft.server.parsing.families import (
    DeepSeekReader,
    GemmaReader,
    HarmonyReader,
    LlamaReader,
    MistralReader,
    QwenReader,
)
from retrieval_draft.server.parsing.reader import Reader, Tags, Tools
from retrieval_draft.server.parsing.templates import TemplateReader

__all__ = ["REASONING_PARSERS", "TOOL_PARSERS", "ReplyParsing", "reply_parsing"]

TOOL_PARSERS: dict[str, type[Reader]] = {
    "hermes": QwenReader,
    "qwen": QwenReader,
    "llama3": LlamaReader,
    "mistral": MistralReader,
    "gemma": GemmaReader,
    "deepseek": DeepSeekReader,
    "gpt-oss": HarmonyReader,
}
"""Forms of calls by name."""

_THINK = Tags("<think>", "</think>")
REASONING_PARSERS: dict[str, Tags | None] = {
    "qwen": _THINK,
    "deepseek": _THINK,
    "mistral": Tags("[THINK]", "[/THINK]", anywhere=True),
    "gemma": Tags("<|channel>thought\n", "<channel|>", anywhere=True),
    "gpt-oss": None,  # it has no tags but headers, which its reader knows
}
"""Marks around reasoning by name."""

_TOOLS_SHOWN = (
    ("<|tool_call>", "gemma"),
    ("<start_function_call>", "gemma"),
    ("[TOOL_CALLS]", "mistral"),
    ("<｜tool▁call", "deepseek"),
    ("<|channel|>", "gpt-oss"),
    ("<tool_call>", "qwen"),
    ("<|python_tag|>", "llama3"),
    ('"name": function name, "parameters"', "llama3"),
)
_REASONING_SHOWN = (
    ("<|channel>", "gemma"),
    ("[THINK]", "mistral"),
    ("<|channel|>", "gpt-oss"),
    ("<think>", "qwen"),
)


@dataclass(frozen=True, slots=True)
class ReplyParsing:
    """Choice of the parsers of one model.

    Attributes:
        tool_parser: Name of the form of calls; None for none.
        reasoning_parser: Name of the marks around reasoning; None for none.
        template: The tokenizer's `response_template`, which does both; None where names do.
    """

    tool_parser: str | None = None
    reasoning_parser: str | None = None
    template: Any = None

    @property
    def has_tools(self) -> bool:
        """True if calls of tools can be parsed."""
        return self.template is not None or self.tool_parser is not None

    @property
    def parses(self) -> bool:
        """True if replies without tools are parsed too."""
        return self.template is not None or self.reasoning_parser is not None

    def parser(self, prompt: str, tools: Tools | None, one_call: bool = False) -> Callable[[], ReplyParser]:
        """Makes parsers of replies to a prompt.

        Args:
            prompt: As text, special tokens included.
            tools: The request's tools; None where calls are left as text.
            one_call: Whether calls after the first are dropped.
        """
        if self.template is not None:
            return lambda: TemplateReader(self.template, prompt, tools, one_call)
        kind, tags, begun = self._kind, self.tags, self.begun(prompt)
        return lambda: kind(tools, tags, begun, one_call)

    def marks(self, has_tools: bool) -> frozenset[str] | None:
        """Special tokens that are to stay in the text; None for all."""
        if self.template is not None:
            return None
        kind, tags = self._kind, self.tags
        found = {tags.begin.split("thought")[0], tags.end} if tags is not None else set()
        if has_tools or kind is HarmonyReader:
            found |= {*kind.opens, *kind.closes, *kind.inner}
        return frozenset(found)

    @property
    def _kind(self) -> type[Reader]:
        if self.reasoning_parser == "gpt-oss":
            return HarmonyReader
        return Reader if self.tool_parser is None else TOOL_PARSERS[self.tool_parser]

    @property
    def tags(self) -> Tags | None:
        """Marks around reasoning; None for none, or where it has none."""
        return None if self.reasoning_parser is None else REASONING_PARSERS[self.reasoning_parser]

    def begun(self, prompt: str) -> bool:
        """True if a prompt ends within reasoning."""
        return self.tags is not None and prompt.rstrip().endswith(self.tags.begin.rstrip())


def reply_parsing(
    tokenizer: Any, chat_template: str | None, tool_parser: str = "auto", reasoning_parser: str = "auto"
) -> ReplyParsing:
    """Chooses the parsers of a model's replies.

    Args:
        tokenizer: The model's.
        chat_template: Replaces the tokenizer's own.
        tool_parser: A name, "none", or "auto": transformers' own parsing where the tokenizer has a
            `response_template`, else the family whose marks the chat template has.
        reasoning_parser: The same.
    """
    template = getattr(tokenizer, "response_template", None)
    if template is not None and (tool_parser, reasoning_parser) == ("auto", "auto") and can_parse_responses():
        return ReplyParsing(template=template)
    source = chat_template or _source(tokenizer)
    return ReplyParsing(
        _chosen(tool_parser, source, _TOOLS_SHOWN), _chosen(reasoning_parser, source, _REASONING_SHOWN)
    )


def _chosen(name: str, source: str, shown: tuple[tuple[str, str], ...]) -> str | None:
    if name == "auto":
        return next((family for mark, family in shown if mark in source), None)
    return None if name == "none" else name


def _source(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        return "\n".join(map(str, template.values()))
    return template if isinstance(template, str) else ""
