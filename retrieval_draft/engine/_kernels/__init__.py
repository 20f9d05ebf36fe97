"""numba functions of the engine. Import them lazily: they import numba."""
