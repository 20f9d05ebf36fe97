"""Attention of tree passes."""
