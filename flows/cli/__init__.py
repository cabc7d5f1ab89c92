"""The command `qwen3ft`: everything the project does, by hand."""

from flows.cli.app import app, main

__all__ = ["app", "main"]
