"""One case in a process of its own: `python -m benchmarks.hostile.child build|open NAME INSIDE`.

Leaves `result.json` in the working folder. What a case prints goes to the standard streams, where
the campaign looks for control sequences.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path

from benchmarks.hostile.case import Case
from benchmarks.hostile.cases import case_named
from qwen3ft.errors import FinetuneError

RESULT, READY = "result.json", "ready"
ENDED_AS = ("refused", "unclassified", "accepted")


def open_case(case: Case, inside: Path) -> tuple[str, str]:
    """Return (how it ended, its reason) of opening `case`."""
    try:
        reason = case.open(inside)
    except FinetuneError as error:
        if error.what and error.why and error.next_command:
            return "refused", f"{type(error).__name__}: {error.what}"
        return "unclassified", f"{type(error).__name__} without why or next command: {error}"
    except BaseException:  # noqa: BLE001  and a SystemExit of a library
        return "unclassified", traceback.format_exc(limit=-3)
    if reason:
        return "refused", reason
    return "accepted", case.harmless


def main() -> None:
    """Build or open the case."""
    work, (_, action, name, folder) = Path.cwd(), sys.argv
    case, inside = case_named(name), Path(folder)
    os.chdir(inside)
    if action == "build":
        case.build(inside)
        return
    for module in case.imports:
        importlib.import_module(module)
    (work / READY).touch()
    ended_as, reason = open_case(case, inside)
    text = json.dumps({"ended_as": ended_as, "reason": reason[:2000]})
    (work / RESULT).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
