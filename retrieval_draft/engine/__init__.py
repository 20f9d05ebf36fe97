"""Turns proposals into accepted tokens. The only half that knows torch."""
