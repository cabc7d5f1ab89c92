"""Recording of the places in the code at which errors of the project are made.

As a plugin of pytest (`-p support.made_errors`) it appends them to the file that `RECORD_VARIABLE`
names, with the test that made them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from support.commands import PRODUCT, ROOT, Site, error_sites

from qwen3ft.errors import FinetuneError

RECORD_VARIABLE = "QWEN3FT_MADE_ERRORS"


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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Record what a test makes, if this module was loaded as a plugin."""

    def append(site: Site, error: FinetuneError) -> None:
        line = {"place": str(site), "test": item.nodeid, **error.to_dict()}
        with Path(os.environ[RECORD_VARIABLE]).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    with recording(append):
        return (yield)
