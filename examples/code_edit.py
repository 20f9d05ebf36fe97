"""Edits a file: the old content is the prediction, since most of it will come again.

python examples/code_edit.py [MODEL]
"""

import sys

from retrieval_draft import RetrievalDrafter
from retrieval_draft.models.loading import load_model

OLD = '''\
class Stack:
    """Values that are taken back in the opposite order."""

    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        return self.items.pop()

    def is_empty(self):
        return not self.items
'''
PROMPT = f"```python\n{OLD}```\n\nThe same class, renamed to Pile:\n\n```python\nclass Pile:\n"

model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else "gemma3-270m")
inputs = tokenizer(PROMPT, return_tensors="pt").to(model.device)
options = {"max_new_tokens": 96, "do_sample": False, "stop_strings": ["```"]}

with RetrievalDrafter.for_model(model, tokenizer) as drafter:
    output = drafter.generate(**inputs, prediction=OLD.replace("Stack", "Pile"), **options)
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    print(f"\n{drafter.last_stats.tokens_per_step:.2f} tokens per step")

    # A wrong prediction costs a little time and changes no token.
    same = drafter.generate(**inputs, prediction="something else entirely", **options)
    print("equal with a wrong prediction:", same.equal(output))
