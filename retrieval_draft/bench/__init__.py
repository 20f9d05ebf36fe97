"""Measurements on a user's own model, traces and corpora."""
