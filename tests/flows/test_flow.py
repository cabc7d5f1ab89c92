"""The whole flow with real Prefect and MLflow servers, on the quantised embedded model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.flow_project import MODEL, FlowProject
from support.resumed_run import Resumed

from qwen3ft.jobs.folders import RunDir


@pytest.fixture(scope="module", autouse=True)
def connected(project: FlowProject) -> Iterator[None]:
    """Tests query the Prefect server of the project."""
    with project.connected():
        yield


@pytest.fixture(scope="module")
def run_flow(project: FlowProject) -> Callable[..., tuple[Any, RunDir]]:
    """Runs the flow in this process; gives its final state and its folder."""
    return project.run


def task_states(state: Any) -> dict[str, str]:
    """First word of each task run's name: state name, of a finished flow run."""
    return {name.partition(" (")[0]: kind for name, kind in task_names(state).items()}


def task_names(state: Any) -> dict[str, str]:
    """Name of each task run of a finished flow run: state name."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    with get_client(sync_client=True) as client:
        wanted = FlowRunFilterId(any_=[state.state_details.flow_run_id])
        runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=wanted))
    return {run.name: run.state_name for run in runs}


def mlflow_runs(project: FlowProject, run: RunDir) -> tuple[Any, list[Any]]:
    """The parent run of a run folder, and its children."""
    from mlflow import MlflowClient

    from qwen3ft.tracking.cursor import parent_run_id

    client = MlflowClient(project.tracking_uri)
    parent = client.get_run(parent_run_id(run))
    query = f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
    return parent, client.search_runs([parent.info.experiment_id], query)


def test_a_run_goes_from_rows_to_a_registered_adapter(finished: Any, project: FlowProject) -> None:
    """Every stage is a task run; card, adapter, registry and MLflow agree with each other."""
    state, run = finished
    assert state.is_completed(), state.message
    names = {"environment", "resolve-model", "model", "lora", "data", "plan", "train-1", "save"}
    assert names | {"preflight", "register", "champion", "inference", "promote"} <= set(
        task_states(state)
    )
    card = json.loads((run.path / "card.json").read_text())
    assert card["held_out_loss_after"] < card["held_out_loss_before"]
    assert Path(card["adapter_path"], "adapter_model.safetensors").is_file()
    assert set(card["seconds_by_stage"]) >= {"model", "data", "train", "save", "inference"}
    assert (run.path / "card.md").read_text().startswith("# embedded")
    parent, children = mlflow_runs(project, run)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["version"] == "1"
    assert parent.data.tags["prefect.flow_run_id"] == run.path.name
    assert parent.data.metrics["memory/peak_gb"] == round(card["peak_memory_gb"], 4)
    assert [child.data.metrics["train/loss"] > 0 for child in children] == [True]
    assert children[0].data.params["micro_batch_size"] == "16"


def test_the_card_of_a_run_tells_its_story_on_disk_and_in_mlflow(
    finished: Any, project: FlowProject, tmp_path: Path
) -> None:
    """Data, plan, curves and answers of this run; the same files in both places; few keys."""
    from mlflow import MlflowClient

    from qwen3ft.records.run_card import RunCard
    from qwen3ft.tracking.run_metrics import METRICS, TAGS

    _, run = finished
    card = RunCard.model_validate_json((run.path / "card.json").read_text())
    assert card.data is not None
    assert card.data.new_rows == sum(file.new_rows for file in card.data.files) > 0
    assert len(card.data.examples) == 5
    assert card.plan is not None
    assert [len(curve.training) for curve in card.loss] == [6]
    assert [len(curve.held_out) for curve in card.loss] == [4]
    assert card.memory[0].predicted_gb == pytest.approx(card.plan.predicted_gb)
    assert len(card.answers) == 20
    assert {answer.model for one in card.answers for answer in one.answers} == {"base", "candidate"}
    assert card.run_id == run.path.name
    parent, _ = mlflow_runs(project, run)
    client = MlflowClient(project.tracking_uri)
    fetched = Path(client.download_artifacts(parent.info.run_id, "card", str(tmp_path)))
    for name in ("card.html", "card.md"):
        assert (fetched / name).read_bytes() == (run.path / name).read_bytes()
    assert RunCard.model_validate_json((fetched / "card.json").read_text()) == card
    ours = {key for key in parent.data.metrics if not key.startswith("system/")}
    assert ours <= set(METRICS)
    assert set(METRICS) - ours <= {
        *(f"{score}/champion" for score in ("exact_match", "token_f1", "answer_loss")),
        *("ability_loss/champion", "memory/preflight_gb"),
        *("judge/win_share", "judge/rows", "seconds/judge"),
    }
    tags = {key for key in parent.data.tags if not key.startswith(("mlflow.", "qwen3ft."))}
    assert tags == set(TAGS) - {"failure", "changed_settings"}
    assert re.fullmatch(rf"{card.outcome}: embedded [-0-9]+ [:0-9]+", parent.info.run_name)
    assert parent.data.tags["data_digest"] == card.data.digest


def test_lists_in_prefect_say_what_became_of_a_run(finished: Any, project: FlowProject) -> None:
    """Verdict and model are in its name, state and tags; the card is the first of its artifacts."""
    from deployments.prefect_api import send
    from qwen3ft.records.run_card import RunCard
    from tasks.artifacts import RUN_CARD

    state, run = finished
    card = RunCard.model_validate_json((run.path / "card.json").read_text())
    layout = project.stack.layout()
    found = send(layout, f"flow_runs/{run.path.name}", method="GET")
    assert (found["state_type"], found["state_name"]) == ("COMPLETED", card.state_name)
    assert card.outcome.capitalize() == card.state_name == state.name
    assert re.fullmatch(rf"{card.outcome}: embedded [-0-9]+ [:0-9]+", found["name"])
    assert found["tags"][:2] == [card.outcome, "embedded"]
    mine = {"flow_runs": {"id": {"any_": [run.path.name]}}, "sort": "ID_DESC"}  # as its page sorts
    artifacts = [one for one in send(layout, "artifacts/filter", mine) if one["key"]]
    assert all(one["description"] for one in artifacts)
    [_, name] = found["name"].split(": ", 1)
    start = re.sub("[^a-z0-9]+", "-", name)
    assert artifacts[0]["key"] == f"{RUN_CARD}-{start}-{run.path.name[:8]}"
    assert artifacts[0]["description"].startswith(f"**embedded**, {card.outcome}")
    [bar] = [one for one in artifacts if one["type"] == "progress"]
    said = r"Attempt 1: completed at step 6 of 6, loss \d\.\d{3}, held-out loss \d\.\d{3}"
    assert re.fullmatch(said, bar["description"])
    keys = {"artifacts": {"key": {"like_": RUN_CARD}}, "sort": "ID_DESC"}
    newest_first = [one["created"] for one in send(layout, "artifacts/latest/filter", keys)]
    assert newest_first == sorted(newest_first, reverse=True)


def test_mlflow_opens_with_verdicts_curves_and_scores(finished: Any, project: FlowProject) -> None:
    """The page that is printed is the table of runs; the run has curves and a picture of scores."""
    from mlflow import MlflowClient

    _, run = finished
    parent, _ = mlflow_runs(project, run)
    page = project.stack.status().mlflow_page
    assert page is not None
    table = f"#/experiments/{parent.info.experiment_id}/runs?"
    assert page.startswith(f"{project.tracking_uri}/{table}")
    assert page.endswith("&workflowType=machine_learning")
    client = MlflowClient(project.tracking_uri)
    for key in ("train/loss", "train/tokens_per_second"):
        steps = [point.step for point in client.get_metric_history(parent.info.run_id, key)]
        assert steps == [1, 2, 3, 4, 5, 6]
    assert len(client.get_metric_history(parent.info.run_id, "memory/process_gb")) > 1
    scores = f"![scores](get-artifact?path=figures%2Fscores.png&run_uuid={parent.info.run_id})"
    assert scores in parent.data.tags["mlflow.note.content"]
    figures = [one.path for one in client.list_artifacts(parent.info.run_id, "figures")]
    assert "figures/scores.png" in figures
    version = client.get_model_version(MODEL, "1")
    assert version.description == version.tags["verdict"]


@pytest.mark.parametrize(
    ("settings", "stages"), [({"when_unchanged": "skip"}, 0), ({"new_data": "mix"}, 6)]
)
def test_a_run_with_nothing_new_since_the_champion_ends_before_training(
    run_flow: Any, project: FlowProject, champion: str, settings: dict[str, str], stages: int
) -> None:
    """The same request ends before any stage; other settings without an unseen row, after data."""
    state, run = run_flow(**settings)
    assert state.is_completed(), state.message
    assert (state.name, state.message) == ("Nothing new", f"nothing new since {MODEL} v{champion}")
    assert len(task_states(state)) == stages
    assert not (run.path / "jobs").exists() or stages
    parent, children = mlflow_runs(project, run)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["verdict"] == "nothing new"
    assert parent.data.tags["verdict_sentence"] == state.message
    assert children == []


def test_a_night_without_anything_new_is_done_once(run_flow: Any, champion: str) -> None:
    """That holds for any `when_unchanged`; a second start names the run that found nothing."""
    state, run = run_flow(nightly=True)
    assert (state.name, state.message) == ("Nothing new", f"nothing new since {MODEL} v{champion}")
    state, _ = run_flow(nightly=True)
    assert state.is_completed()
    assert (state.name, state.message) == ("Already done", f"already done by run {run.path.name}")
    assert task_states(state) == {}


@pytest.mark.slow
def test_a_night_that_failed_is_taken_up_from_its_checkpoint_and_then_done(run_flow: Any) -> None:
    """Three starts of one night: failed, continued to its end, and nothing left to do."""
    night = {"nightly": True, "seed": 61, "max_attempts": 1}
    state, run = run_flow("kill@step=5", **night)
    assert state.is_failed()
    state, _ = run_flow(**night)
    assert state.is_completed(), state.message
    attempts = json.loads((run.path / "card.json").read_text())["attempts"]
    assert [attempt["resumed_from_step"] for attempt in attempts] == [None, 4]
    state, _ = run_flow(**night)
    assert (state.name, state.message) == ("Already done", f"already done by run {run.path.name}")


@pytest.mark.slow
def test_a_run_completes_with_workers_that_share_no_imports(
    run_flow: Any, project: FlowProject, cold_workers: None
) -> None:
    """Each stage's worker is started as the product does: all that it needs, it imports itself."""
    state, run = run_flow(seed=71, preflight="on", cache_dir=str(project.root / "cold"))
    assert state.is_completed(), state.message
    started = {folder.name for folder in (run.path / "jobs").iterdir()}
    assert started >= {"quantize", "data", "preflight-1", "inference"}
    assert run.attempt(1).outcome.is_file()


def test_a_run_that_is_in_progress_is_not_taken_up_beside_it(
    run_flow: Any, project: FlowProject
) -> None:
    """Two processes in one run's folder would mix their files."""
    from qwen3ft.disk.locks import try_lock
    from qwen3ft.jobs.folders import write_record

    run = RunDir(project.root / "runs" / "at-work")
    run.path.mkdir(parents=True)
    write_record(run.config, project.config())
    with try_lock(run.lock) as mine:
        assert mine
        state, _ = run_flow(continue_run=run.path.name)
    shutil.rmtree(run.path)
    assert state.is_failed()
    assert "in progress in another process" in state.message


@pytest.mark.parametrize("run_id", ["no-such-run", "qwen3-finetune"])
def test_an_id_that_is_no_run_starts_none(run_flow: Any, run_id: str) -> None:
    """Neither a training with the defaults nor a folder comes of it."""
    state, run = run_flow(continue_run=run_id)
    assert state.is_failed()
    assert f"There is no run {run_id}" in state.message
    assert not run.path.exists()


def test_a_completed_run_is_not_run_again(run_flow: Any, finished: Any) -> None:
    """Its record stays as it is, byte for byte."""
    _, run = finished
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    state, _ = run_flow(continue_run=run.path.name)
    assert state.name == "Already done"
    assert f"run {run.path.name} is already completed" in state.message
    after = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert after == before


def test_the_plan_is_on_both_pages_of_the_run(finished: Any, project: FlowProject) -> None:
    """The same table as markdown, JSON and picture; its peak is the one that was predicted."""
    from mlflow import MlflowClient
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    _, run = finished
    parent, _ = mlflow_runs(project, run)
    client = MlflowClient(project.tracking_uri)
    names = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert {"plan.md", "plan.json", "plan.png"} <= names
    with get_client(sync_client=True) as prefect:
        wanted = ArtifactFilter(key=ArtifactFilterKey(any_=["plan"]))
        shown = [str(item.data) for item in prefect.read_artifacts(artifact_filter=wanted)]
        listed = {item.key for item in prefect.read_artifacts(limit=200)}
    assert {"data", "plan", "attempts"} <= listed
    plan = json.loads(run.attempt(1).request.read_text())
    peak_gb = sum(part["bytes"] for part in plan["predicted"]) / 2**30
    assert any(f"**{peak_gb:.3f}**" in markdown for markdown in shown)


class Untracked(NamedTuple):
    """A run during which MLflow refuses connections, and whose memory runs out once."""

    state: Any
    run: RunDir
    outstanding: int
    """Entries of the journal that MLflow lacked at its end; afterwards all were sent."""


@pytest.fixture(scope="module")
def untracked(run_flow: Any, finished: Any, project: FlowProject) -> Untracked:
    """Run the flow without MLflow, and then send what it lacks."""
    import tasks.promote
    from flows import reporting
    from flows import run_context as around
    from qwen3ft.tracking.cursor import outstanding
    from qwen3ft.tracking.sender import Sender

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(around, "CLOSE_SECONDS", 1.0)
        patch.setattr(tasks.promote, "OUTAGE_SECONDS", 0.5)
        for module in (around, reporting, tasks.promote):
            patch.setattr(module, "default_tracking_uri", lambda: "http://127.0.0.1:9")
        state, run = run_flow("oom@step=4", preflight="on")
    lacked = outstanding(run)
    Sender(run, project.tracking_uri).send_all()
    return Untracked(state, run, lacked)


def test_out_of_memory_is_answered_by_adjust_and_the_next_attempt_completes(
    untracked: Untracked, project: FlowProject
) -> None:
    """train-1 Failed, adjust-1, train-2 Completed, from the last checkpoint, same batch.

    Three stages are Cached: those of the run before had the same inputs.
    """
    state, run, _ = untracked
    assert state.is_completed(), state.message
    states = task_states(state)
    cached = {name for name, result in states.items() if result == "Cached"}
    assert cached == {"model", "lora", "data"}
    assert states["preflight"] == "Completed"
    assert (states["train-1"], states["adjust-1"], states["train-2"]) == (
        "Failed",
        "Completed",
        "Completed",
    )
    first, second = json.loads((run.path / "card.json").read_text())["attempts"]
    size = f"{second['micro_batch_size']} x {second['gradient_accumulation_steps']}"
    retry = f"train-2 (micro-batch {size} from step 2 after out of memory)"
    assert {retry, "adjust-1 (out of memory)"} <= set(task_names(state))
    batch = next(change for change in second["changes"] if change["name"] == "batch")
    assert (batch["before"], batch["after"]) == ("16 x 1", size)
    assert batch["why"].startswith("Memory ran out")
    assert first["outcome"] == "OutOfMemoryError"
    assert second["resumed_from_step"] == 2
    assert second["micro_batch_size"] < first["micro_batch_size"]
    products = {a["micro_batch_size"] * a["gradient_accumulation_steps"] for a in (first, second)}
    assert products == {16}
    parent, children = mlflow_runs(project, run)
    assert sorted(child.info.status for child in children) == ["FAILED", "FINISHED"]
    assert 0 < parent.data.metrics["memory/preflight_gb"] < 4
    assert parent.data.metrics["memory/predicted_gb"] > 0


@pytest.mark.slow
def test_giving_up_says_what_was_tried(run_flow: Any) -> None:
    """Every attempt diverges: the run ends Failed after two cuts of the rate, naming them."""
    fault = ",".join(f"nan@step=1:attempt={n}" for n in (1, 2, 3))
    state, run = run_flow(fault, seed=31, max_attempts=3)
    assert state.is_failed()
    assert "3" in state.message
    assert "attempt" in state.message.lower()
    assert task_states(state)["train-3"] == "Failed"
    assert len(run.attempts()) == 3


def test_a_failed_run_is_continued_from_its_last_checkpoint(
    resumed: Resumed, project: FlowProject
) -> None:
    """With one attempt allowed the run fails; continued by its id, it resumes and completes.

    Its answers are judged, while another run may have the machine. Before all that, a damaged
    snapshot of the model is noticed, and made anew.
    """
    failed, run = resumed.failed_card, resumed.run
    assert resumed.failed.is_failed()
    assert task_states(resumed.failed)["model"] == "Completed"
    assert resumed.snapshot_after_failure is not None
    assert (failed["outcome"], failed["failure"]["kind"]) == ("failed", "WorkerCrashedError")
    assert f"qwen3ft run --resume {run.path.name}" in resumed.failed_page
    assert resumed.ended.is_completed(), resumed.ended.message
    states = task_states(resumed.ended)
    assert states["judge"] == "Completed"
    cached = {name for name, result in states.items() if result == "Cached"}
    assert cached == {"model", "lora", "data"}  # the plan has the new setting
    assert "seed is 41 and was asked to be 42" in resumed.refused.message
    assert "keep_checkpoints: 2 -&gt; 3" in (run.path / "card.html").read_text()
    parent, children = mlflow_runs(project, run)
    assert parent.data.tags["changed_settings"] == "keep_checkpoints: 2 -> 3"
    assert parent.data.params["seed"] == "41"
    kept = [child.data.params["keep_checkpoints"] for child in children]
    assert sorted(kept) == ["2", "3"]
    assert json.loads(run.config.read_text())["keep_checkpoints"] == 3
    assert json.loads(run.attempt(2).request.read_text())["keep_checkpoints"] == 3
    assert resumed.run_of_second_start.path == run.path
    card = json.loads((run.path / "card.json").read_text())
    assert [attempt["resumed_from_step"] for attempt in card["attempts"]] == [None, 4]
    outcomes = [attempt["outcome"] for attempt in card["attempts"]]
    assert outcomes == ["WorkerCrashedError", "completed"]
    assert sum(card["judge"][end] for end in ("wins", "losses", "ties")) == 4


def test_a_run_without_tracking_completes_and_is_sent_later(
    untracked: Untracked, project: FlowProject
) -> None:
    """MLflow refuses connections throughout: training is not touched, nothing is lost."""
    from qwen3ft.tracking.cursor import outstanding

    state, run, lacked = untracked
    assert state.is_completed(), state.message
    assert "deferred" in state.message
    assert lacked > 0
    assert outstanding(run) == 0
    parent, children = mlflow_runs(project, run)
    assert parent.info.status == "FINISHED"
    assert len(children) == 2


def test_a_run_on_a_machine_that_another_run_holds_is_refused_before_it_does_anything(
    run_flow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the holder; on a CPU this needs `lock_cpu`."""
    from qwen3ft.machine import gpu_lock

    monkeypatch.setenv(gpu_lock.FOLDER_VARIABLE, str(tmp_path))
    with gpu_lock.hold_gpu(gpu_lock.CPU, "the-other", when_busy="refuse", wait_seconds=0):
        state, _ = run_flow(lock_cpu=True, when_gpu_is_busy="refuse")
    assert state.is_failed()
    assert "Run the-other (pid " in state.message
    assert set(task_states(state)) == {"environment"}


@pytest.mark.slow
def test_a_run_on_two_ranks_loses_one_and_ends_on_both(run_flow: Any) -> None:
    """With the setting `gpus` alone; the card says who failed, and metrics are those of a step."""
    state, run = run_flow("kill@step=4:rank=1", gpus="2")
    assert state.is_completed(), state.message
    plans = [json.loads(job.request.read_text()) for job in run.attempts()]
    assert [plan["places"] for plan in plans] == [[0, 1], [0, 1]]
    card = json.loads((run.path / "card.json").read_text())
    first, second = card["attempts"]
    assert (first["outcome"], second["outcome"]) == ("WorkerCrashedError", "completed")
    assert first["detail"].startswith("Rank 1 of 2: The worker was killed by SIGKILL")
    assert card["held_out_loss_after"] < card["held_out_loss_before"]
    outcome = json.loads(run.attempt(2).outcome.read_text())
    assert len(outcome["rank_peaks_gb"]) == 2
    assert card["peak_memory_gb"] == pytest.approx(max(outcome["rank_peaks_gb"]), rel=0.2)
