"""Numba and LLVM kernels of the CPU layers."""
