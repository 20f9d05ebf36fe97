"""Generates a text, and prints how many forward passes it took.

python examples/plain.py [MODEL]
"""

import sys

from retrieval_draft import RetrievalDrafter
from retrieval_draft.models.loading import load_model

model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else "gemma3-270m")
inputs = tokenizer("1, 2, 3, 4, 5, 6, 7, 8, 9, 10,", return_tensors="pt").to(model.device)

with RetrievalDrafter.for_model(model, tokenizer) as drafter:
    output = drafter.generate(**inputs, max_new_tokens=64, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))

    stats = drafter.last_stats
    print(f"\n{stats.tokens} tokens, {stats.tokens_per_step:.2f} tokens per step")
    print("accepted drafts by source:", dict(stats.accepted_by_source))

# The drafts changed the speed only.
plain = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print("equal to model.generate:", output.equal(plain))
