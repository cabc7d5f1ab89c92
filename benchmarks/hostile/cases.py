"""All hostile cases, by the modules that make them."""

from __future__ import annotations

import importlib

from benchmarks.hostile.case import Case

MODULES = ("data_files", "configs", "ids")
"""Modules of this package with a tuple `CASES`."""


def all_cases() -> list[Case]:
    """Return every case, in the order of `MODULES`; their names are unique."""
    modules = [importlib.import_module(f"benchmarks.hostile.{name}") for name in MODULES]
    cases = [case for module in modules for case in module.CASES]
    assert len({case.name for case in cases}) == len(cases)
    return cases


def case_named(name: str) -> Case:
    """Return the case of that name."""
    return next(case for case in all_cases() if case.name == name)
