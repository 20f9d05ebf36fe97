"""A chat on the terminal that drafts from all its earlier turns, and from earlier chats.

python examples/chat.py [MODEL]        # an empty line or the end of input ends it

Each turn passes only the new text through the model: the cache of the last turn goes back in.
"""

import sys

from transformers import TextStreamer

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.models.loading import load_model

model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else "gemma3-270m")


def as_inputs(turns: list[dict[str, str]]) -> dict:
    """The whole conversation as token ids, by the model's chat template where it has one."""
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, return_tensors="pt", add_special_tokens=False).to(model.device)
    text = "".join(f"{turn['role']}: {turn['content']}\n" for turn in turns)
    return tokenizer(text + "assistant:", return_tensors="pt").to(model.device)


turns: list[dict[str, str]] = []
cache = None
config = DraftConfig(history_folder="chat-history")  # what was said is drafted from after a restart too
streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
with RetrievalDrafter.for_model(model, tokenizer, config=config) as drafter:
    print("> ", end="", flush=True)
    for line in sys.stdin:
        if not line.strip():
            break
        turns.append({"role": "user", "content": line.strip()})
        inputs = as_inputs(turns)
        out = drafter.generate(
            **inputs,
            max_new_tokens=128,
            stop_strings=None if tokenizer.chat_template else ["\n"],  # a turn is a line then
            cache=cache,
            streamer=streamer,
            return_dict_in_generate=True,
        )
        cache = out.cache if "cache" in out else out.past_key_values  # its name before transformers 5.24
        reply = out.sequences[0, inputs["input_ids"].shape[1] :]
        text = tokenizer.decode(reply, skip_special_tokens=True).strip()
        turns.append({"role": "assistant", "content": text})
        print(f"[{drafter.last_stats.tokens_per_step:.2f} tokens per step]\n> ", end="", flush=True)
