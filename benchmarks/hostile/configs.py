"""Hostile settings, in files and in `--set`."""

from __future__ import annotations

from pathlib import Path

from benchmarks.hostile.case import Case


def read_config(inside: Path) -> str:
    """Read `config.yaml` as a run's settings; a config that is read was accepted."""
    from qwen3ft.config import load_config

    load_config(inside / "config.yaml")
    return ""


def _alias_bomb(inside: Path) -> None:
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    text = "\n".join(["a0: &a0 [1, 2, 3]", *levels, "model_name: *a9"])
    (inside / "config.yaml").write_text(text)


CASES = (Case("yaml-alias-bomb", "config", _alias_bomb, read_config),)
