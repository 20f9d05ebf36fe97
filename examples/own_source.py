"""A draft source of one's own: it proposes what followed the last token the last time.

python examples/own_source.py [MODEL]

A source lives as long as the drafter, its session as long as a request; the protocols are `DraftSource` and
`SourceSession` in retrieval_draft/index/source.py.
"""

import sys

import numpy as np

from retrieval_draft import Proposal, RetrievalDrafter
from retrieval_draft.models.loading import load_model


class LastSeen:
    """The source: nothing to keep between requests."""

    name, level, nbytes = "last-seen", "request", 0

    def open(self, prompt, references=()):
        return LastSeenSession(prompt)

    def flush(self): ...
    def close(self): ...


class LastSeenSession:
    def __init__(self, prompt):
        self.text, self.after = [], {}  # the position behind each token, where it was last seen
        self.observe(prompt)

    def observe(self, tokens):
        for token in tokens.tolist():
            if self.text:
                self.after[self.text[-1]] = len(self.text)
            self.text.append(token)

    def propose(self, budget):
        start = self.after.get(self.text[-1], len(self.text)) if self.text else 0
        chain = self.text[start : start + budget]
        size = len(chain)
        probs, matched = np.full(size, 0.5, np.float32), np.ones(size, np.int32)
        parents = np.arange(-1, size - 1, dtype=np.int32)  # a chain: -1 is the last accepted token
        return Proposal(np.array(chain, np.int32), parents, probs, matched, LastSeen.name, LastSeen.level)

    def learn(self, logits): ...
    def close(self): ...


model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else "gemma3-270m")
inputs = tokenizer("red, green, blue, red, green, blue, red,", return_tensors="pt").to(model.device)
with RetrievalDrafter.for_model(model, tokenizer, draft_model=LastSeen()) as drafter:
    output = drafter.generate(**inputs, max_new_tokens=64, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))
    print("accepted drafts by source:", dict(drafter.last_stats.accepted_by_source))
