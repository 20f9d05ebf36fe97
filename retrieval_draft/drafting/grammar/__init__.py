"""Grammars that a reply follows: what they allow and what they force, and trees of drafts under them."""
