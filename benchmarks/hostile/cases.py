"""All hostile cases, by the modules that make them."""

from __future__ import annotations

import importlib

from benchmarks.hostile.case import Case

MODULES = ("data_files", "configs", "ids")
"""Modules of this package with a tuple `CASES`."""

PROBES = "probes"
"""Module with cases that test the campaign, and are no part of it."""


def all_cases() -> list[Case]:
    """Return every case, in the order of `MODULES`; their names are unique."""
    cases = [case for module in MODULES for case in _cases(module)]
    assert len({case.name for case in cases}) == len(cases)
    return cases


def case_named(name: str) -> Case:
    """Return the case of that name, or the probe."""
    return next(case for case in (*all_cases(), *_cases(PROBES)) if case.name == name)


def _cases(module: str) -> tuple[Case, ...]:
    cases: tuple[Case, ...] = importlib.import_module(f"benchmarks.hostile.{module}").CASES
    return cases
