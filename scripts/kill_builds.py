"""Kills index builds, additions and merges at random moments; every folder must open and verify afterwards.

python scripts/kill_builds.py [KILLS] [SEED]

Each folder must hold what it held before the command, or all that the command was to bring; run again, the
command must end with exactly the documents of a run that nobody killed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np

from retrieval_draft.index.build.encoder import Encoder
from retrieval_draft.index.segments.index_folder import IndexFolder
from tests.support.tiny import byte_tokenizer

DOCUMENTS = 400
_COMMAND = (sys.executable, "-m", "retrieval_draft.cli", "index")


def main(kills: int = 200, seed: int = 0) -> int:
    chance = random.Random(seed)
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        byte_tokenizer().save_pretrained(folder / "tokenizer")
        tokenizer = str(folder / "tokenizer" / "tokenizer.json")
        encoder = Encoder.from_file(Path(tokenizer))
        texts = [f"{number} " + "word " * chance.randrange(1, 200) for number in range(3 * DOCUMENTS)]
        files = []
        for part in range(3):
            files.append(folder / f"{part}.jsonl")
            mine = texts[part * DOCUMENTS : (part + 1) * DOCUMENTS]
            files[-1].write_text("".join(json.dumps({"text": text}) + "\n" for text in mine))
        first, second, third = (str(file) for file in files)
        small = ["--segment-tokens", "20000", "--workers", "1"]
        pristine = folder / "pristine"
        _run("build", first, "--tokenizer", tokenizer, "--out", str(pristine), *small)
        other = folder / "other"
        _run("build", third, "--tokenizer", tokenizer, "--out", str(other), *small)

        def whole(number: int) -> list[str]:
            return texts[number * DOCUMENTS : (number + 1) * DOCUMENTS]

        commands = {
            "build": (["build", first, "--tokenizer", tokenizer, *small], [], whole(0)),
            "add": (["add", second, *small], whole(0), whole(0) + whole(1)),
            "merge": (["merge", str(other), *small], whole(0), whole(0) + whole(2)),
        }
        longest = dict.fromkeys(commands, 4.0)
        done = 0
        while done < kills:
            name = chance.choice(list(commands))
            words, before, after = commands[name]
            target = folder / "target"
            shutil.rmtree(target, ignore_errors=True)
            if name != "build":
                shutil.copytree(pristine, target)
            words = [*words, "--out", str(target)] if name != "merge" else ["merge", str(target), *words[1:]]
            begin = time.monotonic()
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            process = subprocess.Popen([*_COMMAND, *words], **quiet)
            wait = chance.uniform(0.2, longest[name])
            try:
                process.wait(wait)
                longest[name] = max(0.4, 0.9 * (time.monotonic() - begin))
                outcomes[f"{name}: too late"] += 1
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                done += 1
                found = _holds(target, encoder) if (target / "manifest.json").exists() else []
                if _same(found, before):
                    outcomes[f"{name}: as before"] += 1
                elif _same(found, after):
                    outcomes[f"{name}: as after"] += 1
                else:
                    print(f"{name}, killed after {wait:.2f} s: {len(found)} documents", file=sys.stderr)
                    return 1
                if not _same(found, after):
                    _run(*words)
                    if not _same(_holds(target, encoder), after):
                        print(f"{name}, run again: other documents", file=sys.stderr)
                        return 1
            if done and done % 20 == 0:
                print(f"{done} kills: {dict(outcomes)}", flush=True)
    print(f"{kills} kills, every folder opened and verified: {dict(sorted(outcomes.items()))}")
    return 0


def _run(*words: str) -> None:
    subprocess.run([*_COMMAND, *words], check=True, stdout=subprocess.DEVNULL)


def _holds(path: Path, encoder: Encoder) -> list[str]:
    """Opens, verifies, and reads the documents back; pieces of one that was cut are put together."""
    index = IndexFolder.open(path)
    wrong = index.verify()
    if wrong:
        raise SystemExit("\n".join(wrong))
    pieces = []
    for segment in index.segments():
        joined = segment.texts(encoder.vocabulary)
        for begin, end in pairwise([*segment.documents.tolist(), len(joined)]):
            pieces.append(encoder.decode(np.asarray(joined[begin : end - 1], np.int32)))
    return pieces


def _same(found: list[str], expected: list[str]) -> bool:
    return "".join(found) == "".join(expected)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).parents[1]))
    sys.exit(main(*(int(word) for word in sys.argv[1:])))
