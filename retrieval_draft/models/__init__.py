"""Models and tokenizers by name or folder."""
