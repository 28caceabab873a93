"""Engines: vLLM in this process, a server that speaks OpenAI's protocol, and transformers."""
