"""Settings for all tests."""

import os
from collections.abc import Iterator

import pytest
import torch

from retrieval_draft.engine import linear_choice

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tiny models: threads cost more than they save.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def kernel_choices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests measure of linear kernels stays out of the user's cache folder."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_choice, "cache_home", lambda: folder)
        yield


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)
