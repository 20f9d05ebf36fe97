"""Prompts to measure with: read from files, spread evenly over tasks, or made of random ids."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.build._content import needed
from retrieval_draft.models.chat import chat_inputs

__all__ = ["Prompt", "random_prompts", "read_prompts", "spread"]

_log = logging.getLogger("retrieval_draft")

STAND_IN = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"
"""Text that SPEED-Bench publishes for prompts that it may not pass on."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt.

    Attributes:
        id: Its name in the file.
        task: Kind of request.
        text: The prompt itself, or None when `ids` are given.
        ids: Token ids, for prompts that are no text.
    """

    id: str
    task: str
    text: str | None = None
    ids: tuple[int, ...] = ()

    def encode(self, tokenizer: Any, chat: bool = False) -> list[int]:
        """The prompt's token ids.

        Args:
            tokenizer: The model's.
            chat: Whether the text is put into the chat template, as the message of a user.

        Raises:
            InvalidInputError: The template is missing or refuses the text, or the prompt is no text.
        """
        if self.text is None:
            if chat:
                raise InvalidInputError(
                    f"The prompt {self.id!r} is token ids; a chat template takes text.", "Leave --chat out."
                )
            return list(self.ids)
        message = {"role": "user", "content": self.text}
        return list((chat_inputs(tokenizer, [message]) if chat else tokenizer(self.text))["input_ids"])


def read_prompts(paths: Sequence[Path]) -> list[Prompt]:
    """Reads prompts from JSON lines or Parquet files, in any of the public layouts.

    The text is ``prompt``, or the first of ``turns`` (Spec-Bench, SPEED-Bench), or the first message of a
    user in ``messages`` (SPEED-Bench, prepared). The task is ``task`` or ``category``, else the file's name;
    the id ``id`` or ``question_id``. SPEED-Bench publishes a stand-in for texts that others own: such prompts
    are left out, with a warning that counts them.

    Raises:
        InvalidInputError: A line is no prompt, or no prompt is left; names file and line.
    """
    return [prompt for path in paths for prompt in _read(path)]


def _read(path: Path) -> list[Prompt]:
    found, missing = [], 0
    for number, record in _records(path):
        try:
            text = _text(record)
        except (KeyError, TypeError, IndexError) as error:
            raise _refused(path, number, error) from error
        if not isinstance(text, str):
            raise _refused(path, number, text)
        if STAND_IN in text:
            missing += 1
            continue
        name, task = (_first(record, names) for names in (("id", "question_id"), ("task", "category")))
        found.append(Prompt(str(number if name is None else name), str(task or path.stem), text))
    hint = "Complete the file with SPEED-Bench's own script, prepare.py."
    if missing and not found:
        raise InvalidInputError(f"{path} has stand-ins for all of its {missing} prompts.", hint)
    if missing:
        _log.warning(
            "%s: %d of %d prompts are stand-ins, left out. %s", path, missing, missing + len(found), hint
        )
    return found


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """Objects of a file, each with its line or row, from 1 on."""
    if path.suffix == ".parquet":
        arrow, tables = needed("pyarrow", "parquet files"), needed("pyarrow.parquet", "parquet files")
        try:
            rows = tables.read_table(path).to_pylist()
        except (OSError, arrow.ArrowException) as error:
            raise InvalidInputError(f"Cannot read the prompts {path}: {error}.") from error
        yield from enumerate(rows, 1)
        return
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"Cannot read the prompts {path}: {error}.") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise _refused(path, number, error) from error


def _text(record: Any) -> Any:
    if "prompt" in record:
        return record["prompt"]
    if "turns" in record:
        return record["turns"][0]
    return next((each["content"] for each in record["messages"] if each["role"] == "user"), None)


def _first(record: Any, names: Sequence[str]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _refused(path: Path, number: int, found: object) -> InvalidInputError:
    return InvalidInputError(
        f"{path}, line {number} is no prompt: {found!r}.",
        'Each line is {"prompt": text}, {"turns": [text, ...]} or {"messages": [{"role": "user", "content": '
        'text}, ...]}, optionally with a "task" or "category".',
    )


def spread(
    prompts: Sequence[Prompt], limit: int | None, tasks: Sequence[str] = (), seed: int = 0
) -> list[Prompt]:
    """Takes `limit` prompts in turn from every task, in an order drawn with `seed`.

    Args:
        prompts: All prompts.
        limit: Number of prompts to take, or None for all.
        tasks: Only these, or all when empty.
        seed: Draws the order of the prompts within each task.

    Raises:
        InvalidInputError: No prompt is left, or a task does not exist.
    """
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.task, []).append(prompt)
    unknown = [task for task in tasks if task not in groups]
    if unknown:
        raise InvalidInputError(f"No prompt of task {unknown[0]!r}.", f"Tasks here: {', '.join(groups)}.")
    chosen = [groups[task] for task in groups if not tasks or task in tasks]
    draw = random.Random(seed)
    for group in chosen:
        draw.shuffle(group)
    most = max(map(len, chosen), default=0)
    taken = [group[turn] for turn in range(most) for group in chosen if turn < len(group)][:limit]
    if not taken:
        raise InvalidInputError("No prompts to run.", "Name files with --prompts, or use --random-ids.")
    return taken


def random_prompts(
    count: int, length: int, vocabulary: int, avoid: Sequence[int] = (), seed: int = 0
) -> list[Prompt]:
    """Prompts of random ids, without repetition to draft from.

    Args:
        count: Number of prompts.
        length: Ids in each.
        vocabulary: Ids are drawn below this.
        avoid: Special tokens.
        seed: Draws the ids.
    """
    draw = random.Random(seed)
    allowed = sorted(set(range(vocabulary)) - set(avoid))
    return [
        Prompt(f"random-{number}", "random", ids=tuple(draw.choices(allowed, k=length)))
        for number in range(count)
    ]
