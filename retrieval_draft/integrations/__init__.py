"""Plug-ins for engines that keep their own model: vLLM and llama.cpp."""
