"""Prompts to measure with: read from files, spread evenly over tasks, or made of random ids."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrieval_draft.errors import InvalidInputError
from retrieval_draft.models.chat import chat_inputs

__all__ = ["Prompt", "random_prompts", "read_prompts", "spread"]


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
    """Reads JSON lines with ``prompt``, or ``turns`` of which the first is taken, and optionally ``task``.

    Without a task the file's name is used.

    Raises:
        InvalidInputError: Names file and line.
    """
    return [prompt for path in paths for prompt in _read(path)]


def _read(path: Path) -> Iterator[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"Cannot read the prompts {path}: {error}.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            text = record["prompt"] if "prompt" in record else record["turns"][0]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            text = error
        if not isinstance(text, str):
            raise InvalidInputError(
                f"{path}, line {number} is no prompt: {text!r}.",
                'Each line is {"prompt": text} or {"turns": [text, ...]}, optionally with a "task".',
            )
        yield Prompt(str(record.get("id", number)), str(record.get("task") or path.stem), text)


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
