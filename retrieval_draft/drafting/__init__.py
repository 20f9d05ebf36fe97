"""Proposals of all sources to one draft tree or chain; no torch."""
