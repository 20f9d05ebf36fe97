"""What clients send: OpenAI's requests, checked."""
