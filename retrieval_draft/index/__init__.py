"""Looks tokens up. numpy and numba, never torch."""
