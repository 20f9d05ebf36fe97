"""Trains a small EAGLE or Medusa head for a model, on text that the model writes itself.

python examples/train_head.py [MODEL] --kind eagle --out my-head
retrieval-draft bench live --model MODEL --draft-model my-head --prompts tests/data/prompts_20.jsonl

Labels are the model's own predictions, so no other data is needed. Only the head's layer is trained; it reads
the model's embeddings and output head, and learns to rank the tokens that the texts use most.
"""

import argparse
import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig

from retrieval_draft import RetrievalDrafter
from retrieval_draft.bench.prompts import Prompt, read_prompts
from retrieval_draft.engine.draft_models.eagle import EagleHead
from retrieval_draft.engine.draft_models.vector_heads import MedusaHead
from retrieval_draft.models.loading import load_model

PROMPTS = ["Explain how a bicycle works.", "Write a short story about a lighthouse.", "List ten animals."]
LONGEST_PROMPT, RANKED, ROWS, TEXTS_A_STEP, HEADS = 512, 8, 384, 2, 3
NOISE, HELD_OUT = 0.1, 20


class Text(NamedTuple):
    """The model's results for a text of n tokens: its states, (n, d), and what it predicts in the reply.

    From token `begin`, the last of the prompt, on: `best` tokens and their `probs`, (n - begin, RANKED) each.
    """

    ids: Tensor
    hidden: Tensor
    begin: int
    best: Tensor
    probs: Tensor


def write(model: Any, tokenizer: Any, prompts: list[Prompt], tokens: int, batch: int, path: Path) -> None:
    """Writes replies to the prompts, greedy at first and then sampled, until they have so many tokens."""
    chat = bool(tokenizer.chat_template)
    encoded = sorted((prompt.encode(tokenizer, chat) for prompt in prompts), key=len)
    encoded = [ids for ids in encoded if 1 < len(ids) <= LONGEST_PROMPT]
    if not encoded:
        raise SystemExit(f"No prompt has 2 to {LONGEST_PROMPT} tokens.")
    count = turn = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with RetrievalDrafter.for_model(model, tokenizer) as drafter, path.open("w") as file:
        while count < tokens:
            for at in torch.randperm(-(-len(encoded) // batch)).tolist():
                rows = encoded[at * batch : (at + 1) * batch]
                width = max(map(len, rows))
                ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
                mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
                options = (
                    {"do_sample": True, "temperature": 0.8, "seed": turn} if turn else {"do_sample": False}
                )
                most = min(96, max(tokens - count, 2))
                out = drafter.generate(ids, attention_mask=mask, max_new_tokens=most, **options)
                for row, reply in zip(rows, out[:, width:].tolist(), strict=True):
                    ends = [at for at, token in enumerate(reply) if token == tokenizer.eos_token_id]
                    reply = reply[: ends[0] + 1] if ends else reply
                    file.write(json.dumps({"prompt": row, "output": reply}) + "\n")
                    count += len(reply)
                print(f"{count} of {tokens} tokens written", flush=True)
                if count >= tokens:
                    break
            turn += 1


def read(path: Path) -> list[dict[str, Any]]:
    """Texts as `write` writes them, or a trace."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        return [json.loads(line) for line in lines]


@torch.no_grad()
def looked_at(model: Any, prompt: list[int], output: list[int]) -> Text:
    """The model's states and predictions for a prompt's end and the reply to it."""
    prompt = prompt[-ROWS // 2 :]
    tokens = torch.tensor((prompt + output)[:ROWS])
    hidden = model.get_decoder()(tokens[None]).last_hidden_state[0]
    begin = len(prompt) - 1
    probs, best = model.get_output_embeddings()(hidden[begin:]).softmax(-1).topk(RANKED)
    return Text(tokens, hidden.float(), begin, best, probs.float())


def states_of(head: Any, kind: str, texts: list[Text], steps: int, noise: float) -> Iterator[list[Tensor]]:
    """The head's states at each level of a draft, for each text.

    Row i of level l guesses what the model predicts at token i + l + 1. A Medusa head reads the state at
    token i, an EAGLE head token i + l + 1 too, and from the second level on its own states for the model's.
    """
    vectors = [text.hidden[:-1] + noise * torch.randn_like(text.hidden[:-1]) for text in texts]
    for level in range(steps if kind == "eagle" else len(head.heads)):
        if kind == "eagle":
            states = head([text.ids[level + 1 :] for text in texts], vectors)
            vectors = [rows[:-1].detach() for rows in states]
        else:
            states = [head.heads[level][:-1](text.hidden[: -1 - level]) for text in texts]
        yield states


def judged(states: Tensor, text: Text, first: int, output: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of guesses, from token `first` on, with the model's predictions, and which are its best.

    In the reply alone: a prompt's tokens are not those that the model would have chosen.
    """
    begin = max(text.begin, first)
    best, probs = text.best[begin - text.begin :], text.probs[begin - text.begin :]
    logits = states[begin - first :] @ output.T
    at = columns[best]
    logs = logits.log_softmax(-1).gather(1, at.clamp(min=0))
    return -(logs * probs * (at >= 0)).sum(-1), logits.argmax(-1) == at[:, 0]


def made(kind: str, model: Any) -> tuple[Any, dict[str, Any]]:
    """A head of one layer, and its config.json."""
    config = model.config.get_text_config(decoder=True)
    output = model.get_output_embeddings().weight
    if kind == "medusa":
        head = MedusaHead(HEADS, 1, config.hidden_size, len(output))
        for layers in head.heads:
            nn.init.zeros_(layers[0].linear.weight)
            layers[-1].weight = nn.Parameter(output.detach().clone(), requires_grad=False)
        return head, {"medusa_num_heads": HEADS, "medusa_num_layers": 1}
    names = "hidden_size intermediate_size num_attention_heads num_key_value_heads rms_norm_eps vocab_size"
    shape = {name: getattr(config, name) for name in names.split()}
    shape |= {"num_hidden_layers": 1, "head_dim": getattr(config, "head_dim", None), "model_type": "llama"}
    head = EagleHead(LlamaConfig(**shape), True, False)
    nn.init.eye_(head.fc.weight[:, config.hidden_size :].data)
    for layer in head.decoder:  # which adds nothing at first
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    head.bind(model)
    return head, shape | {"architectures": ["LlamaForCausalLM"]}


def trained(
    head: Any, kind: str, model: Any, texts: list[Text], columns: int, epochs: int, steps: int
) -> None:
    """Trains the head on the texts but for some, on which it prints how often its guesses are right."""
    output = model.get_output_embeddings().weight.detach()
    best = torch.cat([text.best.reshape(-1) for text in texts])
    common = best.bincount(minlength=len(output)).argsort(descending=True, stable=True)[:columns]
    column_of = torch.full((len(output),), -1)
    column_of[common] = torch.arange(len(common))
    output = output[common]
    kept = texts[::HELD_OUT]
    texts = [text for at, text in enumerate(texts) if at % HELD_OUT] or texts
    weights = [weight for weight in head.parameters() if weight.requires_grad]
    total = epochs * -(-len(texts) // TEXTS_A_STEP)
    optimizer = torch.optim.AdamW(weights, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=total, pct_start=0.05)
    for epoch in range(epochs):
        begin, losses = time.perf_counter(), []
        for chosen in torch.randperm(len(texts)).split(TEXTS_A_STEP):
            packed = [texts[at] for at in chosen]
            parts = []
            for level, states in enumerate(states_of(head, kind, packed, steps, NOISE)):
                for text, rows in zip(packed, states, strict=True):
                    part = judged(rows, text, level + 1, output, column_of)[0].mean()
                    if kind == "eagle":
                        part = part + 0.5 * nn.functional.smooth_l1_loss(rows, text.hidden[level + 1 :])
                    parts.append(part)
            loss = torch.stack(parts).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        mean, seconds = sum(losses) / len(losses), time.perf_counter() - begin
        print(f"epoch {epoch + 1} of {epochs}: loss {mean:.3f}, {seconds:.0f} s; ", end="")
        print("right on other texts, by depth:", shares(head, kind, kept, output, column_of), flush=True)


@torch.no_grad()
def shares(head: Any, kind: str, texts: list[Text], output: Tensor, columns: Tensor) -> str:
    """Share of best guesses that are the model's own, by depth, where those before them are."""
    found = [
        torch.cat(
            [
                judged(rows, text, level + 1, output, columns)[1]
                for text, rows in zip(texts, states, strict=True)
            ]
        )
        for level, states in enumerate(states_of(head, kind, texts, HEADS, 0.0))
    ]
    return ", ".join(f"{hits.float().mean():.0%}" for hits in found)


def saved(head: Any, kind: str, config: dict[str, Any], folder: Path) -> None:
    """Writes the head in the layout in which heads of its kind are published."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().contiguous() for name, weight in head.state_dict().items()}
    old, new = ("decoder.", "layers.") if kind == "eagle" else ("heads.", "")
    weights = {name.replace(old, new, 1): weight.clone() for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1))


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", default="gemma3-270m")
parser.add_argument("--kind", choices=("eagle", "medusa"), default="eagle")
parser.add_argument("--out", type=Path, default=Path("trained-head"))
parser.add_argument(
    "--prompts", type=Path, nargs="*", help="JSON lines with prompts, as bench live reads them"
)
parser.add_argument("--texts", type=Path, nargs="*", help="texts that an earlier run wrote, or a trace")
parser.add_argument("--tokens", type=int, default=40_000, help="of replies to write")
parser.add_argument("--batch", type=int, default=8, help="replies written at a time")
parser.add_argument("--columns", type=int, default=8192, help="tokens that the head learns to rank")
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--steps", type=int, default=1, help="of an EAGLE head on its own states, in training")
parser.add_argument("--bf16", action="store_true", help="train in bfloat16, where the CPU is fast in it")
args = parser.parse_args()

torch.manual_seed(0)
model, tokenizer = load_model(args.model)
model.requires_grad_(False)
if not args.texts:
    given = read_prompts(args.prompts) if args.prompts else [Prompt(text, "prose", text) for text in PROMPTS]
    args.texts = [args.out / "texts.jsonl"]
    write(model, tokenizer, given, args.tokens, args.batch, args.texts[0])
replies = [reply for path in args.texts for reply in read(path)]
pairs = [(reply["prompt"], reply["output"]) for reply in replies if len(reply["output"]) > HEADS + 1]
head, config = made(args.kind, model)
with torch.autocast("cpu", torch.bfloat16, args.bf16, cache_enabled=False):  # weights change
    texts = [looked_at(model, *pair) for pair in pairs]
    print(f"{len(texts)} texts, {sum(len(text.best) for text in texts)} tokens of replies", flush=True)
    trained(head, args.kind, model, texts, args.columns, args.epochs, args.steps)
saved(head, args.kind, config, args.out)
print(f"{args.out} holds the head: --draft-model {args.out}")
