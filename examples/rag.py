"""Answers a question from documents: the prompt holds the best passage, drafts come from all of them.

python examples/rag.py [MODEL]
"""

import re
import sys

from retrieval_draft import RetrievalDrafter
from retrieval_draft.models.loading import load_model

DOCUMENTS = [
    "The library is open from nine in the morning until nine in the evening, and on Sundays from two until "
    "six. Books may be kept for four weeks. Who brings a book back late pays ten cents a day.",
    "The reading room has forty seats. Seats by the window can be reserved for a day. Food is not allowed; "
    "water in closed bottles is.",
    "A library card is free for everybody who lives in the town. It is valid for a year and is renewed at "
    "the desk, with a letter that shows the address.",
]
QUESTION = "How long may books be kept, and what does it cost to bring a book back late?"


def words(text: str) -> set[str]:
    """Its words, in small letters."""
    return set(re.findall(r"\w+", text.lower()))


model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else "gemma3-270m")
best = max(DOCUMENTS, key=lambda document: len(words(document) & words(QUESTION)))
prompt = f"Text: {best}\n\nQuestion: {QUESTION}\nAnswer, in the words of the text:"
inputs = tokenizer(prompt, return_tensors="pt").to(model.device)

with RetrievalDrafter.for_model(model, tokenizer) as drafter:
    # Text in `documents` is looked up and never read by the model: it may be long, or wrong.
    output = drafter.generate(**inputs, documents=DOCUMENTS, max_new_tokens=64, do_sample=False)
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    print(f"\n{drafter.last_stats.tokens_per_step:.2f} tokens per step")
