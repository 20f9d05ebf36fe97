"""One draw a node from keyed noise."""
