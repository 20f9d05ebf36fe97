"""Settings for all tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
