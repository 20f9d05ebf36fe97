"""Passes of fixed shape: captured once, replayed with other trees, lengths and keys."""
