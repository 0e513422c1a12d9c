"""Serve models through vLLM: the decoders of this project inside a real engine, with its server, batching and paged cache."""
