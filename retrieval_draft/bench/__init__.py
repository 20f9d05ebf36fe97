"""Measurements behind every number of the README."""
