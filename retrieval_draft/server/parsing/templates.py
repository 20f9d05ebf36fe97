"""Parsing of replies by transformers, where a tokenizer has a template for that."""

from __future__ import annotations

import json
from typing import Any

from retrieval_draft.engine.compat import response_parser
from retrieval_draft.server.parsing.deltas import Delta, DeltaWriter
from retrieval_draft.server.parsing.reader import Tools

__all__ = ["TemplateReader"]

_BROKEN = (ValueError, KeyError, TypeError, RecursionError)
"""Errors of transformers' parser at a call that is none; the last at one of many brackets."""

_REASONING = ("reasoning_content", "reasoning", "thinking")


class TemplateReader:
    """Parses a reply by a `response_template`, one character at a time.

    Args:
        template: Of the tokenizer.
        prompt: Text before the reply, of which the template may have written the beginning.
        tools: The request's tools; None where calls are left as text.
        one_call: Whether calls after the first are dropped.
    """

    def __init__(self, template: Any, prompt: str, tools: Tools | None, one_call: bool = False) -> None:
        self.out = DeltaWriter(one_call)
        self._template, self._tools = template, tools
        self._declared = [
            {"function": {"name": name, "parameters": {"properties": dict(properties)}}}
            for name, properties in (tools or {}).items()
        ]
        self._parser = self._made(prompt)
        self._unsent, self._region = "", ""
        for event in self._parser.initial_events:
            self._region = event["field"] if event["type"] != "region_close" else ""

    def _made(self, prompt: str) -> Any:
        return response_parser(self._template, prompt, self._declared)

    @property
    def reasons(self) -> bool:
        """True while the text is reasoning."""
        return self._region in _REASONING

    def feed(self, text: str) -> list[Delta]:
        """Parses more text."""
        for char in text:
            self._unsent += char
            try:
                events = self._parser.feed(char)
            except _BROKEN:
                # A call that is none; the parser ends with it, and another continues.
                self.out.content(self._unsent)
                self._unsent, self._region = "", ""
                self._parser = self._made("")
                continue
            self._tell(events)
        return self.out.take()

    def finish(self) -> list[Delta]:
        """Parses the end."""
        try:
            self._tell(self._parser.finalize()[1])
        except _BROKEN:
            self.out.content(self._unsent)
        return self.out.end()

    def _tell(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            field, kind = event["field"], event["type"]
            self._region = field if kind != "region_close" else ""
            if field == "tool_calls" and kind == "region_close":
                self._call(event["value"])
            elif kind == "region_close" and field in _REASONING:
                self._unsent = ""
            elif kind == "region_chunk" and field != "tool_calls":
                put = self.out.reasoning if field in _REASONING else self.out.content
                put(event["text"])
                self._unsent = ""

    def _call(self, value: Any) -> None:
        calls = value if isinstance(value, list) else [value]
        functions = [each.get("function", each) if isinstance(each, dict) else {} for each in calls]
        names = [each.get("name") if isinstance(each, dict) else None for each in functions]
        if self._tools is None or not all(isinstance(name, str) and name for name in names):
            self.out.content(self._unsent)
        else:
            for function in functions:
                arguments = function.get("arguments", {})
                self.out.name(function["name"])
                self.out.arguments(
                    arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
                )
        self._unsent = ""
