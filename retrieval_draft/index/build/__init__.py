"""Building corpus indexes: reading, tokenising, sorting, joining."""
