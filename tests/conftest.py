"""Settings for all tests."""

import logging
import os
from collections.abc import Iterator

import pytest
import torch
from transformers.utils import logging as transformers_logging

from benchmarks.__main__ import main as run_benchmark
from retrieval_draft.cli import main
from retrieval_draft.engine.cpu import linear_choice
from retrieval_draft.engine.graph import graph_passes
from tests.support.commands import Command
from tests.support.tiny import save_tiny


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--graphs",
        choices=("off", "tape"),
        default="off",
        help="verify trees by captured passes on the CPU too",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--graphs") == "tape":
        graph_passes.AUTO["cpu"] = "tape"


os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tiny models: threads cost more than they save.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def kernel_choices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Measurements of linear kernels stay out of the user's cache folder."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_choice, "cache_home", lambda: folder)
        yield


class _Deprecations(logging.Handler):
    """Keeps what transformers logs of names that will be gone."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        # Pipelines of transformers 5.0 pass a configuration and options, drafter or not.
        if "deprecat" in record.getMessage() and "Passing `generation_config`" not in record.getMessage():
            self.found.append(record.getMessage())


@pytest.fixture(autouse=True)
def no_deprecations() -> Iterator[None]:
    """Fails a test in which a call, ours above all, uses what transformers is about to remove."""
    handler, logger = _Deprecations(), transformers_logging.get_logger()
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert not handler.found


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs ``retrieval-draft WORDS``, or ``python -m WORDS`` where the first word is benchmarks."""
    monkeypatch.delenv("RETRIEVAL_DRAFT_REDIS_URL", raising=False)

    def run(*words: str) -> tuple[int, str, str]:
        benchmark = words[:1] == ("benchmarks",)
        with pytest.raises(SystemExit) as done:
            run_benchmark(list(words[1:])) if benchmark else main(words)
        out, err = capsys.readouterr()
        return int(done.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny model and its tokenizer."""
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log of the package, from "info" on."""
    caplog.set_level(logging.INFO, "retrieval_draft")
    return caplog
