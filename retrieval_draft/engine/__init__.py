"""Verification of draft trees with the target model. `index` and `drafting` do without torch."""
