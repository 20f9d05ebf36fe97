"""Immutable suffix-sorted runs of tokens."""
