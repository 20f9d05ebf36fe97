"""OpenAI's API: requests, replies, routes."""
