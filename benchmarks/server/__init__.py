"""Campaigns against `qwen3ft serve`: swaps, trials, load."""
