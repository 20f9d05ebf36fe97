"""Numba kernels of fusion and chains."""
