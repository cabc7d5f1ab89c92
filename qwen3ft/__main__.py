"""`python -m qwen3ft`, which is what systemd units start."""

import sys

from qwen3ft.entry_points import run_command_line

sys.exit(run_command_line())
