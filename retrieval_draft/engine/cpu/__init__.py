"""CPU layers for few tokens."""
