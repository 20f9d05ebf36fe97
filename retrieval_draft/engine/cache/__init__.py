"""Key-value caches that keep an accepted path."""
