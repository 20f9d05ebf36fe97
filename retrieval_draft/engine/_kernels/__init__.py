"""numba functions of the engine. Import where a kernel is about to run: it costs numba's import."""
