"""Options that several commands share. Imports only what parses the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="Settings (YAML).", resolve_path=True),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one setting; may be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
ResumeOption = Annotated[
    str | None, typer.Option("--resume", metavar="RUN_ID", help="Take up an earlier run.")
]
