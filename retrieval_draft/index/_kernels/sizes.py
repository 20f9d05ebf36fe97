"""Sizes that files and kernels agree on; importing this costs nothing."""

from __future__ import annotations

STRIDE = 128
"""Suffixes for one sampled key."""
