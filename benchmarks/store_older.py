"""A server of another version of the package: run as source, with names that all versions have."""

import json
import sys
import time
from importlib.metadata import PackageNotFoundError, version

import numpy as np

import retrieval_draft
from retrieval_draft.index.shared import SharedSource
from retrieval_draft.index.store.config import StoreConfig
from retrieval_draft.index.store.store import SharedStore

config = json.loads(sys.argv[1])
count, vocabulary = config["texts"], config["vocabulary"]
texts = [
    np.random.default_rng((7, n)).integers(0, vocabulary, 200).astype(np.int32) for n in range(2 * count)
]
end = time.monotonic() + config["seconds"]
with SharedStore(StoreConfig(config["url"], share="all"), config["fingerprint"], vocabulary) as store:
    for text in texts[count:]:
        store._outbox.put(text[:0], text)
    source = SharedSource(store)
    drafted = 0
    while time.monotonic() < end and drafted < count:
        time.sleep(0.05)
        drafted = sum(
            source.open(text[:40]).propose(8).tokens[:4].tolist() == text[40:44].tolist()
            for text in texts[:count]
        )
    time.sleep(1.0)  # entries with what was learned come after the texts
    status = store.status()
    try:
        number = version("retrieval_draft")
    except PackageNotFoundError:
        number = "unknown"
    shown = {name: status[name] for name in ("state", "sent", "ingested", "dropped")}
    print(
        json.dumps({**shown, "drafted": drafted, "version": number, "file": retrieval_draft.__file__}),
        flush=True,
    )
    sys.stdin.read()  # until the other side has read too
