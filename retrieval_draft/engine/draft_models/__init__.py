"""Draft sources that run a model."""
