"""A check of the project on a GPU in ten minutes, by one command: docs/gpu.md."""
