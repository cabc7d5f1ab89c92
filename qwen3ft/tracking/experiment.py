"""The experiment's name, and what its page in MLflow shows: a description, columns of the table."""

from __future__ import annotations

import json

EXPERIMENT_NAME = "qwen3-finetune"
"""MLflow experiment that holds all runs."""

TRAINING_VIEW = "workflowType=machine_learning"
"""Query of every page of MLflow; without it MLflow shows prompts and traces."""

COLUMNS = (
    "tags.`verdict`",
    *("metrics.`exact_match/candidate`", "metrics.`gain`"),
    *("metrics.`tokens_per_second`", "metrics.`memory/peak_gb`"),
)
"""Columns of the table of runs, besides name, time and duration."""

_VIEW = "nights"

_DESCRIPTION = (
    "One run for each start of the flow **qwen3-finetune**. Its name begins with the **verdict**: "
    "*promoted* was put into use, *kept* was not better and stays out, *degraded* fell short of "
    "what was asked, *deferred* waits for its comparison, *nothing new* had nothing to train on, "
    "*failed* has the reason on its page. `exact_match/candidate` is the share of held-out "
    "questions answered exactly, `gain` how much more that is than the adapter in use has, or the "
    "base model if none is. The run card is under Artifacts, card/card.html."
)

_WIDTHS_PIXELS = {
    "0": 73,  # the box that selects a run
    "attributes.`Run Name`": 300,
    "runDateAndNestInfo": 146,
    "duration": 75,
    **dict(zip(COLUMNS, (85, 150, 70, 130, 115), strict=True)),
}

_STATE = {
    "selectedColumns": COLUMNS,
    "columnOrder": list(_WIDTHS_PIXELS),  # widths of columns that it lacks are ignored
    "columnWidths": _WIDTHS_PIXELS,
}

PEOPLES_TAG = "mlflow.note.content"
"""Tag that is set once: people may have changed the description on its page."""

EXPERIMENT_TAGS = {
    PEOPLES_TAG: _DESCRIPTION,
    "mlflow.experimentKind": "custom_model_development",
    # MLflow keeps columns in each browser; a shared view is what others can be given
    f"mlflow.sharedViewState.{_VIEW}": json.dumps(_STATE),
}
"""Tags of the experiment, in the names that MLflow reads."""


def experiment_page(server_url: str, experiment_id: str | None) -> str:
    """Return the page with the table of runs, or of all experiments if it is not there yet."""
    if experiment_id is None:
        return f"{server_url}/#/experiments?{TRAINING_VIEW}"
    page = f"#/experiments/{experiment_id}/runs?viewStateShareKey={_VIEW}"
    return f"{server_url}/{page}&{TRAINING_VIEW}"
