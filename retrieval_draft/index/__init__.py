"""Lookup structures for token sequences, with numpy and numba and without torch."""
