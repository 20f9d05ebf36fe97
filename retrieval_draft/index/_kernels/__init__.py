"""numba functions over flat arrays. Import only where a kernel is about to run: it costs numba's import."""
