"""Hostile artifacts, opened as qwen3ft does; tests/support makes those that tests have too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tests"))
