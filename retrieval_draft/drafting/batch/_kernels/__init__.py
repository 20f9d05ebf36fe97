"""numba functions that draft for a whole batch. Import only where a kernel is about to run."""
