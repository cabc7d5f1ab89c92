"""The automation that takes up a crashed run, as the server would render it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from prefect.utilities.schema_tools.hydration import HydrationContext, HydrationError, hydrate

from deployments.automations import definitions, resumption_parameters


def rendered(run: SimpleNamespace) -> dict[str, Any]:
    """Return the parameters of the run that the automation would start."""
    [action] = definitions("d")[1]["actions"]
    context = HydrationContext(
        raise_on_error=True, render_jinja=True, jinja_context={"flow_run": run}
    )
    found: dict[str, Any] = hydrate(action["parameters"], context)
    return found


@pytest.mark.parametrize(
    ("parameters", "tags"),
    [
        ({"config": {"seed": 5}}, []),
        ({"config": {}, "continue_run": "first", "resumed": 1, "nightly": True}, []),
        ({"config": {}}, ["auto-scheduled"]),
    ],
)
def test_a_run_that_has_begun_is_taken_up_as_the_sweeper_would(
    parameters: dict[str, Any], tags: list[str]
) -> None:
    """With its settings, under its first id, and counted."""
    run = SimpleNamespace(id="r1", parameters=parameters, tags=tags, start_time="2026-11-29")
    expected = resumption_parameters({"id": "r1", "parameters": parameters, "tags": tags})
    assert rendered(run) == expected


@pytest.mark.parametrize("parameters", [{"config": {}, "confg": {}}, {"config": {}}])
def test_a_run_that_never_began_is_not_taken_up(parameters: dict[str, Any]) -> None:
    """One that was refused has never been running; rendering fails, so nothing is started."""
    run = SimpleNamespace(id="r1", parameters=parameters, tags=[], start_time=None)
    with pytest.raises(HydrationError):
        rendered(run)
