"""Recording of the places in the code at which errors of the project are made."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from support.commands import PRODUCT, ROOT, Site, error_sites

from qwen3ft.errors import FinetuneError

_ERRORS = ROOT / "qwen3ft" / "errors.py"


@contextmanager
def recording(record: Callable[[Site, FinetuneError], None]) -> Iterator[None]:
    """Call `record` with every error that is made while the body runs, and where it is made."""
    make = FinetuneError.__init__

    def remember(error: FinetuneError, *arguments: Any, **facts: Any) -> None:
        make(error, *arguments, **facts)
        if (site := _site_of(sys._getframe(1))) is not None:
            record(site, error)

    FinetuneError.__init__ = remember  # type: ignore[method-assign]
    try:
        yield
    finally:
        FinetuneError.__init__ = make  # type: ignore[method-assign]


def _site_of(frame: FrameType | None) -> Site | None:
    """Return the site of the innermost call in the product; None of an error made by a test."""
    if frame is None:
        return None
    path = Path(frame.f_code.co_filename)
    if not path.is_relative_to(ROOT) or path.relative_to(ROOT).parts[0] not in PRODUCT:
        return None
    name, line = str(path.relative_to(ROOT)), frame.f_lineno
    return next(
        (
            site
            for site in error_sites()
            if site.path == name and site.first_line <= line <= site.last_line
        ),
        None,
    )
