"""The dashboard: one page that shows the running engine."""
