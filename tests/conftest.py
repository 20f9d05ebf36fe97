"""Settings for all tests."""

import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tiny models: threads cost more than they save.
torch.set_num_threads(1)
