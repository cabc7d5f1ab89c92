"""Automations with which the Prefect server looks after runs whose process is gone.

A run without a heartbeat for `SILENT_SECONDS` is marked as Crashed: its worker, which would report
the end at once, was killed with it. A crashed run is continued once from its last checkpoint by a
new run with the same parameters, the id of the crashed run, and `resumed` counted up, which makes
the flow refuse a second time (see `flows.resume`). A run that never began is not taken up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deployments.prefect_api import send
from deployments.services import HEARTBEAT_SECONDS, Layout
from qwen3ft.records.run_card import COMPLETED_STATES

ZOMBIE_AUTOMATION = "qwen3ft: crash flow runs without heartbeats"
RESUME_AUTOMATION = "qwen3ft: take up a crashed run once"

SILENT_SECONDS = 3 * HEARTBEAT_SECONDS
"""Time without a heartbeat: a busy machine may lose two; a crash must be noticed in two minutes."""

PROCESS_LOST = "ProcessLost"
"""Name of the crashed state of a run that `deployments.orphans` has ended, and continued if that
makes sense."""

_ENDS = (
    *("Completed", "Failed", "Cancelled", "Crashed", PROCESS_LOST),
    *COMPLETED_STATES,  # an event has the name of the state, not its type
)
# A run that never began, as with parameters that the flow refuses, has no start time: calling None
# is an error, and the server starts nothing.
_CONTINUED = (
    "{% if not flow_run.start_time %}{{ none() }}{% endif %}"
    "{{ flow_run.parameters.get('continue_run') or flow_run.id }}"
)
_NIGHTLY = (
    "{{ (flow_run.parameters.get('nightly') or 'auto-scheduled' in flow_run.tags) | tojson }}"
)
_RESUMED = "{{ (flow_run.parameters.get('resumed') or 0) + 1 }}"


def definitions(deployment_id: str) -> list[dict[str, Any]]:
    """Return the automations of a deployment, as the server's API takes them."""
    return [_zombies(deployment_id), _resumption(deployment_id)]


def register_automations(layout: Layout, deployment_id: str) -> None:
    """Register the automations, in place of those with the same names."""
    names = {"name": {"any_": [ZOMBIE_AUTOMATION, RESUME_AUTOMATION]}}
    before = send(layout, "automations/filter", {"automations": names})
    # add before removing: whatever interrupts this, a crash is noticed (and, as the flow checks
    # `resumed`, continued only once)
    for automation in definitions(deployment_id):
        send(layout, "automations/", automation)
    for found in before:
        send(layout, f"automations/{found['id']}", method="DELETE")


def resumption_parameters(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a run that continues `run`, as the automation's templates do."""
    given = run["parameters"]
    return {
        "config": given["config"],
        "nightly": bool(given.get("nightly")) or "auto-scheduled" in run["tags"],
        "continue_run": given.get("continue_run") or run["id"],
        "resumed": (given.get("resumed") or 0) + 1,
    }


def _zombies(deployment_id: str) -> dict[str, Any]:
    trigger = {
        "type": "event",
        "posture": "Proactive",
        "match": {"prefect.resource.id": "prefect.flow-run.*"},
        "match_related": _of(deployment_id),
        "for_each": ["prefect.resource.id"],
        "after": ["prefect.flow-run.heartbeat"],
        "expect": [f"prefect.flow-run.{event}" for event in ("heartbeat", *_ENDS)],
        "threshold": 1,
        "within": SILENT_SECONDS,
    }
    action = {
        "type": "change-flow-run-state",
        "state": "CRASHED",
        "message": f"No heartbeat for {SILENT_SECONDS} s: its process was killed.",
    }
    return {"name": ZOMBIE_AUTOMATION, "trigger": trigger, "actions": [action]}


def _resumption(deployment_id: str) -> dict[str, Any]:
    trigger = {
        "type": "event",
        "posture": "Reactive",
        "match": {"prefect.resource.id": "prefect.flow-run.*"},
        "match_related": _of(deployment_id),
        "for_each": ["prefect.resource.id"],
        "expect": ["prefect.flow-run.Crashed"],
        "threshold": 1,
        "within": 0,
    }
    action = {
        "type": "run-deployment",
        "source": "selected",
        "deployment_id": deployment_id,
        "parameters": {
            "config": _json("{{ flow_run.parameters['config'] | tojson }}"),
            "nightly": _json(_NIGHTLY),
            "continue_run": _text(_CONTINUED),
            "resumed": _json(_RESUMED),
        },
    }
    return {"name": RESUME_AUTOMATION, "trigger": trigger, "actions": [action]}


def _of(deployment_id: str) -> dict[str, str]:
    return {
        "prefect.resource.id": f"prefect.deployment.{deployment_id}",
        "prefect.resource.role": "deployment",
    }


def _text(template: str) -> dict[str, Any]:
    return {"__prefect_kind": "jinja", "template": template}


def _json(template: str) -> dict[str, Any]:
    return {"__prefect_kind": "json", "value": _text(template)}
