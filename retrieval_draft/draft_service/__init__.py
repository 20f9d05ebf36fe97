"""Drafts over HTTP for engines that keep their own model. `client` imports neither torch nor numpy."""
