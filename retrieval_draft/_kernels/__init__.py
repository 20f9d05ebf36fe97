"""Numba building blocks that index, drafting and engine share."""
