"""Makes docs/dashboard.png: a server of Gemma 3 270M at work, as Chromium shows it.

PYTHONPATH=. python scripts/dashboard_screenshot.py [FILE] [--model gemma3-270m]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.support.browser import browser

PROMPTS = Path("tests/data/prompts_4.jsonl")
CODE = '''def read_users(path):
    """Reads users from a JSON file."""
    with open(path, encoding="utf-8") as lines:
        return [User(**json.loads(line)) for line in lines]


def read_groups(path):
    """Reads groups from a JSON file."""
'''
LARGEST = 250_000


def post(url: str, body: dict[str, Any]) -> None:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)  # noqa: S310 - our own
    with urllib.request.urlopen(request, timeout=600) as response:  # noqa: S310
        response.read()


def wait_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    while True:
        if process.poll() is not None:
            raise SystemExit("The server ended.")
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)  # noqa: S310
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=Path("docs/dashboard.png"))
    parser.add_argument("--model", default="gemma3-270m")
    options = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as store:
        words = [sys.executable, "-m", "retrieval_draft.cli", "serve", "--model", options.model]
        process = subprocess.Popen([*words, "--port", str(port), "--store", f"embedded://{store}"])
        try:
            wait_ready(url, process)
            picture(url, options.file)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    size = options.file.stat().st_size
    print(f"{options.file}: {size:,} bytes")
    if size > LARGEST:
        raise SystemExit(f"It may have {LARGEST:,} at most.")


def picture(url: str, file: Path) -> None:
    """Asks as a few clients would, and the page too; then takes the picture."""
    lines = [json.loads(line) for line in PROMPTS.read_text("utf-8").splitlines()]
    prompts = [line.get("prompt") or line["turns"][0] for line in lines]
    sampled = {"max_tokens": 90, "temperature": 0.8, "seed": 1}
    threads = [
        threading.Thread(target=post, args=(url, {"prompt": prompt, **sampled}))
        for prompt in (*prompts, CODE)
    ]
    with browser() as page:
        page.resize(1280, 900)
        page.open(url)
        page.wait("document.getElementById('status').textContent === 'ok'")
        for thread in threads:
            thread.start()
            time.sleep(2.0)
        for thread in threads:
            thread.join()
        page.run(f"document.getElementById('prompt').value = {json.dumps(CODE)}")
        page.run("document.getElementById('prompt').rows = 9")
        page.run("document.getElementById('max-tokens').value = 110")
        page.run("document.getElementById('temperature').value = 0.8")
        # In the middle, where the tree is one of the page's own, with more than one branch.
        wanted = (
            "document.getElementById('reply').textContent.length > 200",
            "document.querySelectorAll('#tree g.accepted').length > 2",
            "document.querySelectorAll('#tree g:not(.accepted):not(.bonus)').length > 3",
        )
        good, over = " && ".join(wanted), "!document.getElementById('run').disabled"
        for _ in range(8):
            page.run("document.getElementById('run').click()")
            page.wait(f"({good}) || ({over})", 300)
            if page.run(good):
                break
        height = page.run("document.documentElement.scrollHeight")
        page.resize(1280, int(height))
        page.screenshot(file)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
