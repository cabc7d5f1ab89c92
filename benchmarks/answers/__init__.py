"""Answers per second: qwen3ft's decoder and its peers on the same model, adapters and prompts."""
