"""Numba kernels of vLLM's rows."""
