"""numba functions over flat arrays. Import them lazily: they import numba."""
