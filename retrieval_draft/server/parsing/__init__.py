"""Parsing of replies: reasoning, content and calls of tools, while the text still arrives."""
