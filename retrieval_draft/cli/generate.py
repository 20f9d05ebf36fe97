"""``retrieval-draft generate``: text from a prompt, streamed."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrieval_draft.cli._samples import print_samples
from retrieval_draft.cli._store_options import Share, Snapshots, Store, Tenant
from retrieval_draft.cli._store_options import config as store_config
from retrieval_draft.cli.common import (
    Chat,
    CpuKernels,
    Device,
    Dtype,
    Exact,
    Index,
    Json,
    Model,
    Nodes,
    Weights,
    text_of,
    text_of_stdin,
)
from retrieval_draft.cli.output import paint, print_json, print_table, wants_color
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.models.chat import chat_inputs

if TYPE_CHECKING:
    from retrieval_draft.drafter import RetrievalDrafter
    from retrieval_draft.drafting.grammar.grammar import Grammar

__all__ = ["generate", "print_piece"]


def generate(
    prompt: Annotated[
        str, typer.Argument(help="The prompt, or - to read it from stdin.", show_default=False)
    ],
    model: Model,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 256,
    method: Annotated[str, typer.Option(help="Drafting method: calibrated, a published one, or none.")] = (
        "calibrated"
    ),
    nodes: Nodes = None,
    index: Index = None,
    phrases: Annotated[
        Path | None,
        typer.Option(help="A file of fixed texts to draft from: one a line, or between lines of ---."),
    ] = None,
    history: Annotated[
        Path | None, typer.Option(help="A folder in which prompts and replies are kept to draft from.")
    ] = None,
    store: Store = None,
    tenant: Tenant = "default",
    share: Share = "reply",
    snapshots: Snapshots = None,
    draft_model: Annotated[
        str | None,
        typer.Option(
            help='A smaller model or a trained head to draft with; "self": this one with layers skipped; '
            '"int8": its copy with rounded weights; "mtp": its layers for multi-token prediction.'
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")] = 1.0,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Most probable tokens to sample from; 0 for all.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Texts to sample, together.")] = 1,
    best_of: Annotated[
        int | None, typer.Option(min=1, help="Of so many samples print the most probable --samples.")
    ] = None,
    json_schema: Annotated[
        Path | None,
        typer.Option(help="A file with a JSON schema that the text follows.", show_default=False),
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="A regular expression that the text matches.", show_default=False)
    ] = None,
    max_draft_tokens: Annotated[
        int | None, typer.Option(min=0, help="Draft tokens of a step at most; 0 drafts nothing.")
    ] = None,
    chat: Chat = False,
    dtype: Dtype = "float32",
    weights: Weights = None,
    device: Device = None,
    cpu_kernels: CpuKernels = True,
    exact: Exact = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print drafting counts on stderr.")] = False,
    show_drafts: Annotated[
        bool,
        typer.Option("--show-drafts", help="Show accepted drafts in colour; in [ ] where there is none."),
    ] = False,
    json: Json = False,
) -> None:
    """Generate text, streamed to stdout."""
    text = text_of_stdin() if prompt == "-" else text_of(prompt)
    if not text:
        raise InvalidInputError("The prompt is empty.", "Give some text, or - and text on stdin.")
    from retrieval_draft.config import DraftConfig
    from retrieval_draft.models.loading import check_name, check_weights, load_model

    config = DraftConfig(
        method=method,
        nodes=nodes,
        cpu_kernels=cpu_kernels,
        exact=exact,  # type: ignore[arg-type]  # the config checks it
        history_folder=None if history is None else str(history),
    )
    shared = store_config(store, tenant, share, snapshots)
    grammar = _grammar(json_schema, regex)
    check_name(model)
    check_weights(weights)
    # These import torch, which takes seconds.
    from retrieval_draft.bench.forward_passes import ForwardPasses
    from retrieval_draft.cli._draft_streamer import DraftStreamer
    from retrieval_draft.drafter import RetrievalDrafter

    loaded, tokenizer = load_model(model, dtype=dtype, device=device, weights=weights)
    drafter = RetrievalDrafter.for_model(
        loaded, tokenizer, method=method, config=config, corpora=index or (), phrases=phrases,
        store=shared, draft_model=draft_model,
    )  # fmt: skip
    drafter.warm_up()
    inputs = _encode(tokenizer, text, chat).to(loaded.get_input_embeddings().weight.device)
    sampling: dict[str, Any] = {
        "do_sample": temperature > 0, "grammar": grammar, "max_draft_tokens": max_draft_tokens
    }  # fmt: skip
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_p": top_p, "seed": seed}
        sampling |= {} if top_k is None else {"top_k": top_k}
    elif samples > 1 or best_of is not None:
        raise InvalidInputError("Greedy decoding has one text.", "Set --temperature to sample several.")
    if samples > 1 or best_of is not None:
        sampling |= {"num_return_sequences": samples, "best_of": best_of, "max_new_tokens": max_new_tokens}
        print_samples(drafter, tokenizer, inputs, sampling, json)
        drafter.close()
        if stats and drafter.last_stats is not None:
            _print_stats(drafter, drafter.last_stats.seconds)
        return
    streamer = DraftStreamer(tokenizer, None if json else lambda piece, drafted: print_piece(
        piece, drafted and show_drafts
    ))  # fmt: skip
    begin = time.perf_counter()
    with ForwardPasses(loaded, before=streamer.step):
        drafter.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)
    seconds = time.perf_counter() - begin
    drafter.close()
    done = drafter.last_stats
    assert done is not None
    if json:
        print_json(
            {
                "text": streamer.text,
                "tokens": streamer.tokens,
                "from_draft": streamer.drafted,
                "tokens_per_second": len(streamer.tokens) / seconds,
                "tokens_per_step": done.tokens_per_step,
                "seconds": seconds,
                "stats": done.as_dict(),
                "verification": asdict(drafter.verification),
                "model": model,
                "method": method,
                "device": str(inputs["input_ids"].device),
                "dtype": str(loaded.dtype).removeprefix("torch."),
            }
        )
    else:
        print()
    if stats:
        _print_stats(drafter, seconds)


def _grammar(json_schema: Path | None, regex: str | None) -> Grammar | None:
    from retrieval_draft.drafting.grammar.grammar import Grammar

    if json_schema is not None and regex is not None:
        raise InvalidInputError("A text follows one grammar.", "Pass --json-schema or --regex, not both.")
    if regex is not None:
        return Grammar.regex(regex)
    if json_schema is None:
        return None
    try:
        return Grammar.json_schema(json_schema.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"Cannot read the schema {json_schema}: {error}.") from error


def _encode(tokenizer: Any, text: str, chat: bool) -> Any:
    """The prompt as model inputs, in the chat template on request."""
    if chat:
        return chat_inputs(tokenizer, [{"role": "user", "content": text}], return_tensors="pt")
    return tokenizer(text, return_tensors="pt", return_token_type_ids=False)


def print_piece(piece: str, drafted: bool) -> None:
    """Prints generated text at once, accepted drafts in colour or in brackets."""
    if drafted:
        piece = paint(piece) if wants_color(sys.stdout) else f"[{piece}]"
    print(piece, end="", flush=True)


def _print_stats(drafter: RetrievalDrafter, seconds: float) -> None:
    stats = drafter.last_stats
    assert stats is not None
    parts = ("prefill", "draft", "forward", "accept", "commit", "learn")
    rows = [
        ("verification", drafter.verification.way),
        ("prompt tokens", f"{stats.prompt_tokens}"),
        ("new tokens", f"{stats.tokens}"),
        ("steps", f"{stats.steps}"),
        ("tokens per step", f"{stats.tokens_per_step:.2f}"),
        ("draft nodes per step", f"{stats.drafted / max(stats.steps, 1):.1f}"),
        ("accepted drafts", f"{stats.accepted}"),
        *((f"  by {name}", f"{count}") for name, count in sorted(stats.accepted_by_source.items())),
        *(
            (f"  level {name}: accepted of drafted", f"{stats.accepted_by_level[name]} of {count}")
            for name, count in sorted(stats.drafted_by_level.items())
        ),
        ("seconds", f"{seconds:.2f}"),
        *((f"  {part}", f"{getattr(stats, part + '_seconds'):.3f}") for part in parts),
        ("tokens a second", f"{stats.tokens / seconds:.1f}"),
    ]
    print_table("", ("drafting", ""), rows, sys.stderr)
    print(f"{drafter.verification.way}: {drafter.verification.reason}", file=sys.stderr)
