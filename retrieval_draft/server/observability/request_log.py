"""One log line for each choice that ends: result and timings, without any text."""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import queue
import sys
from typing import Any

from retrieval_draft.server.scheduler.events import RequestEnd, RequestStart, StepReport

__all__ = ["JsonFormatter", "RequestLog", "start_logging"]

_log = logging.getLogger("retrieval_draft.server.requests")


class RequestLog:
    """An `EngineListener` that writes the log."""

    def queue_changed(self, waiting: int, running: int) -> None:
        """Does nothing: not logged."""

    def request_started(self, start: RequestStart) -> None:
        """Does nothing: not logged."""

    def step(self, report: StepReport) -> None:
        """Does nothing: not logged."""

    def request_ended(self, end: RequestEnd) -> None:
        """Writes one line."""
        fields = {
            "request_id": end.request_id,
            **({} if end.client_id is None else {"client_id": end.client_id}),
            "index": end.index,
            "tenant": end.tenant,
            "reason": end.reason,
            "prompt_tokens": end.prompt_tokens,
            "completion_tokens": end.completion_tokens,
            "first_token_seconds": round(end.first_token_seconds, 4),
            "seconds": round(end.seconds, 4),
            "tokens_per_step": round(end.stats.tokens_per_step, 3),
        }
        _log.info(
            "%s", " ".join(f"{name}={value}" for name, value in fields.items()), extra={"fields": fields}
        )


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Formats the record, its fields beside the message."""
        fields: dict[str, Any] = getattr(record, "fields", {})
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            **(fields or {"message": record.getMessage()}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def start_logging(style: str, level: int) -> logging.handlers.QueueListener:
    """Sends all logs to stderr through a bounded queue, so that no thread of the server waits for a pipe.

    Args:
        style: "text" or "json".
        level: Of our own loggers.

    Returns:
        The listener, started; to be stopped at the end.
    """
    lines: queue.Queue[Any] = queue.Queue(10_000)
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if style == "json" else text)
    listener = logging.handlers.QueueListener(lines, handler)
    root = logging.getLogger()
    root.handlers = [_Dropping(lines)]
    root.setLevel(logging.WARNING)
    logging.getLogger("retrieval_draft").setLevel(level)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    listener.start()
    return listener


class _Dropping(logging.handlers.QueueHandler):
    """Drops lines when stderr is not read fast enough."""

    def enqueue(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(queue.Full):
            self.queue.put_nowait(record)

    def prepare(self, record: logging.LogRecord) -> Any:
        # The formatter runs on the other thread, in this process: records need no flattening.
        return record
