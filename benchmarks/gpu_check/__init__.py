"""One command that says in ten minutes how the project fares on a GPU: docs/gpu.md."""
