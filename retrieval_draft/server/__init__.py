"""The HTTP services: an OpenAI-compatible server, and drafts for engines that keep their own model."""
