"""Drafting methods by name: this project's own and those of published systems, one file each."""
