"""The `qwen3ft` command, the settings that runs start from, and the targets of make and CI."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from deployments.deploy import CPU_CONFIG, GPU_CONFIG, NO_GPU_LINE, PREFECT_FILE
from deployments.secret import make_secret
from deployments.stack import Stack
from flows.cli import main
from flows.cli.follow import StateChange
from flows.cli.output import open_console
from flows.cli.project import requested_settings, use_local_services
from flows.cli.servers import env_command
from flows.cli.tails import LockTail, MetricsTail, tails_from_now
from flows.cli.views.common import format_seconds, show_card
from flows.cli.views.run import RunView, plain_message
from qwen3ft.config import TrainingConfig, load_config
from qwen3ft.disk.files import append_json_line, write_json_atomic
from qwen3ft.errors import ConfigError, EnvironmentNotReadyError
from qwen3ft.jobs.folders import RunDir
from qwen3ft.records.run_card import RunCard
from qwen3ft.records.training import MemoryStatus, TrainingMetrics
from qwen3ft.text.commands import runnable
from tasks import policies

ROOT = Path(__file__).parents[2]


def qwen3ft(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "qwen3ft", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("address", "secret"),
    [
        ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING"),
        ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_PASSWORD"),
    ],
)
def test_the_secret_of_the_stack_goes_to_no_other_server(
    tmp_path: Path, address: str, secret: str
) -> None:
    """A shell that exports the address of another server means that one, with its own password."""
    for name in (address, secret):
        os.environ.pop(name, None)
    make_secret(tmp_path)
    os.environ[address] = "https://elsewhere.example"
    use_local_services(Stack(tmp_path))
    assert os.environ[address] == "https://elsewhere.example"
    assert secret not in os.environ


def test_the_address_of_a_server_that_is_down_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stack that was killed leaves its address behind, in prefect.toml."""
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        os.environ.pop(name, None)
    use_local_services(Stack(tmp_path))
    assert os.environ["PREFECT_API_URL"] == ""
    assert os.environ["MLFLOW_TRACKING_URI"].startswith("sqlite:///")


def test_the_servers_are_used_from_elsewhere_with_what_env_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first `up` there is nothing to print."""
    (tmp_path / "deployments").mkdir()
    (tmp_path / PREFECT_FILE).touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EnvironmentNotReadyError, match="no servers to use yet"):
        env_command()
    secret = make_secret(tmp_path)
    env_command()
    done = subprocess.run(
        ["sh", "-c", f"{capsys.readouterr().out}\nenv"], capture_output=True, text=True, check=True
    )
    shell = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    assert shell["MLFLOW_TRACKING_PASSWORD"] == secret
    assert shell["PREFECT_API_AUTH_STRING"] == f"{shell['MLFLOW_TRACKING_USERNAME']}:{secret}"


@pytest.fixture
def in_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process, which has torch already: exit code, output, errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(sys, "argv", ["qwen3ft", *arguments])
        try:
            status = main()
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Make a project folder with nothing but what the commands look for."""
    shutil.copytree(ROOT / "deployments", tmp_path / "deployments")
    return tmp_path


# --- the command ---


def test_help_imports_nothing_heavy() -> None:
    """Help is immediate because it loads only what parses the command line."""
    heavy = {"torch", "transformers", "prefect", "mlflow", "pydantic", "psutil"}
    code = (
        "import sys\nfrom flows.cli import main\nsys.argv = ['qwen3ft', '--help']\n"
        f"try: main()\nexcept SystemExit: sys.exit(str({heavy!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "set()"
    for verb in ("run", "train", "plan", "doctor", "up", "down", "status", "deploy", "chat"):
        assert verb in done.stdout


def test_help_takes_half_a_second_of_a_processor() -> None:
    """The best of three, as a busy machine makes any one of them slower."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = qwen3ft("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) <= 0.5


def test_the_command_keeps_the_conventions_of_commands(project: Path) -> None:
    """A version, -h everywhere, completion of what was typed, and a status for programs."""
    assert qwen3ft("--version").stdout == f"qwen3ft {version('qwen3ft')}\n"
    assert "--max-loss-drift" in qwen3ft("export", "-h").stdout
    assert "--show-completion" in qwen3ft("--help").stdout
    words = {"_QWEN3FT_COMPLETE": "complete_bash", "COMP_WORDS": "qwen3ft sta", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "qwen3ft"],
        cwd=ROOT,
        env={**os.environ, **words},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "status\n"
    assert qwen3ft("status", folder=project).returncode == 1


def test_a_printed_command_names_the_program_as_the_shell_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name if this installation is on PATH, else by its path; other commands stay."""
    program = tmp_path / ".venv" / "bin" / "qwen3ft"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin")
    assert runnable("qwen3ft run --resume 1") == "qwen3ft run --resume 1"
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setenv("PWD", str(tmp_path))
    assert runnable("qwen3ft run --resume 1") == ".venv/bin/qwen3ft run --resume 1"
    monkeypatch.setenv("PWD", "/")
    assert runnable("qwen3ft up") == str(program)[1:] + " up"
    monkeypatch.setenv("PWD", str(tmp_path / "elsewhere"))
    assert runnable("qwen3ft up") == f"{program} up"
    assert runnable("ls -l qwen3ft") == "ls -l qwen3ft"
    assert runnable("prefect version") == "prefect version"


def test_doctor_tells_programs_about_this_machine() -> None:
    """Its JSON is one object with the report of the machine and of the servers."""
    done = qwen3ft("doctor", "--json")
    found = json.loads(done.stdout)
    assert found["ready"] is True, found["problems"]
    assert done.returncode == 0
    assert found["environment"]["gpus"] == []
    assert {service["name"] for service in found["stack"]["services"]} == {
        "prefect",
        "mlflow",
        "worker",
    }


def test_status_of_a_fresh_folder_is_down(project: Path) -> None:
    """Looking starts nothing and leaves nothing behind."""
    found = json.loads(qwen3ft("status", "--json", folder=project).stdout)
    assert found["up"] is False
    assert found["deployment_registered"] is False
    assert sorted(path.name for path in project.iterdir()) == ["deployments"]


def test_commands_work_below_the_project_folder(project: Path) -> None:
    """As with git, any folder inside the project will do."""
    done = qwen3ft("status", "--json", folder=project / "deployments" / "configs")
    assert Path(json.loads(done.stdout)["root"]) == project.resolve()


def test_errors_are_what_why_next_without_a_traceback(project: Path) -> None:
    """Every invalid setting is named, and nothing is started."""
    done = qwen3ft("run", "--set", "lora_r=0", "--set", "batch_size=x", folder=project)
    assert done.returncode == 1
    assert done.stderr.startswith("What:  2 invalid setting(s)")
    assert "lora_r" in done.stderr
    assert "batch_size" in done.stderr
    assert "qwen3ft settings batch_size" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (project / ".qwen3ft").exists()


def test_debug_shows_the_traceback(project: Path) -> None:
    """--debug may stand anywhere."""
    done = qwen3ft("run", "--set", "lora_r=0", "--debug", folder=project)
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_an_error_is_json_where_json_was_asked_for(tmp_path: Path) -> None:
    """A program finds the error's kind and next command on standard output."""
    done = qwen3ft("status", "--json", folder=tmp_path)
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == "EnvironmentNotReadyError"
    assert error["next_command"]
    assert done.returncode == 1


@pytest.mark.parametrize("folder", ["/proc/x", "/dev/null/x", "x" * 300])
def test_a_folder_that_cannot_be_made_is_explained(
    in_process: Callable[..., tuple[int, str, str]], folder: str
) -> None:
    """No traceback: what cannot be used, why, and a command."""
    status, shown, _ = in_process("data", "check", "--json", "--set", f"cache_dir={folder}")
    assert status == 1
    error = json.loads(shown)["error"]
    assert error["kind"] in ("EnvironmentNotReadyError", "ConfigError")
    assert error["why"]
    assert error["next_command"]


def test_wrong_usage_is_exit_code_two(project: Path) -> None:
    """Exit code 2 means wrong usage, as with other command line tools."""
    assert qwen3ft("run", "--no-such-option", folder=project).returncode == 2
    assert qwen3ft("plan", "--set", "lora_r", folder=project).returncode == 2


# --- the settings that runs start from ---


def test_default_config_is_the_specification() -> None:
    """Every setting is in the file with a comment, and but for the sample with its default."""
    text = (ROOT / GPU_CONFIG).read_text(encoding="utf-8")
    assert load_config(ROOT / GPU_CONFIG) == TrainingConfig(data_paths=("embedded:train",))
    assert set(yaml.safe_load(text)) == set(TrainingConfig.model_fields)
    settings = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all("  # " in line for line in settings)


def test_embedded_config_uses_the_shipped_model() -> None:
    """Without a GPU nothing is downloaded."""
    assert load_config(ROOT / CPU_CONFIG).is_embedded


def test_without_a_gpu_the_embedded_model_is_used_and_the_user_notified(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fallback is never silent, and settings given by hand override it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    values, notice = requested_settings(project, None, ["lora_r=8", "learning_rate=1e-3"])
    assert notice == NO_GPU_LINE
    assert (values["model_name"], values["lora_r"]) == ("embedded", "8")


def test_a_model_named_by_hand_starts_from_the_defaults(project: Path) -> None:
    """The settings of the embedded model would ruin any other."""
    values, notice = requested_settings(
        project, None, ["model_name=Qwen/Qwen3-0.6B", "data_paths=a,b"]
    )
    assert values == {"model_name": "Qwen/Qwen3-0.6B", "data_paths": ["a", "b"]}
    assert notice is None


# --- following and showing ---


def _metrics(step: int, loss: float | None = 1.0) -> dict[str, object]:
    memory = MemoryStatus(
        allocated_gb=1.5, cached_gb=2.0, total_gb=13.0, available_gb=11.0, is_safe=True
    )
    metrics = TrainingMetrics(
        epoch=0.1,
        step=step,
        loss=loss,
        learning_rate=1e-3,
        memory_usage=memory,
        timestamp=datetime(2026, 11, 26, tzinfo=UTC) + timedelta(seconds=3 * step),
    )
    return metrics.model_dump(mode="json")


def test_the_tail_follows_attempt_after_attempt(tmp_path: Path) -> None:
    """Only new, complete lines are returned, and a new attempt is read from its beginning."""
    run = RunDir(tmp_path)
    tail = MetricsTail(run)
    assert tail.newest() is None
    first = run.attempt(1)
    first.path.mkdir(parents=True)
    write_json_atomic(first.request, {"total_steps": 40})
    append_json_line(first.metrics, _metrics(1))
    append_json_line(first.metrics, _metrics(2))
    append_json_line(first.metrics, _metrics(2, loss=None))  # an evaluation
    progress = tail.newest()
    assert progress is not None
    assert (progress.attempt, progress.metrics.step, progress.total_steps) == (1, 2, 40)
    assert progress.seconds_left == pytest.approx(38 * 3.0)
    with first.metrics.open("a") as stream:
        stream.write('{"half a li')
    assert tail.newest() is None
    second = run.attempt(2)
    second.path.mkdir(parents=True)
    append_json_line(second.metrics, _metrics(3))
    progress = tail.newest()
    assert progress is not None
    assert (progress.attempt, progress.metrics.step, progress.total_steps) == (2, 3, None)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_has_epoch_and_time_left(tmp_path: Path, terminal: bool) -> None:
    """One line that is redrawn on a terminal; elsewhere one, and no second one within 10 s."""
    tail = MetricsTail(RunDir(tmp_path))
    job = RunDir(tmp_path).attempt(1)
    job.path.mkdir(parents=True)
    write_json_atomic(job.request, {"total_steps": 40, "num_epochs": 8})
    stream = io.StringIO()
    console = open_console(file=stream, force_terminal=terminal, width=80, no_color=True)
    with RunView(console) as view:
        for step in (1, 2, 3):
            append_json_line(job.metrics, _metrics(step))
            progress = tail.newest()
            assert progress is not None
            view.progress(progress)
    shown = stream.getvalue()
    last = "step 3/40  epoch 0.1/8  loss 1.000  at most 1 min 51 s left"
    assert (last if terminal else "step 1/40  epoch 0.1/8  loss 1.000  1.50 GB") in shown
    assert terminal or len(shown.splitlines()) == 1


def test_a_run_that_waits_for_the_gpu_says_for_which_run(tmp_path: Path) -> None:
    """The line of its log is shown to whoever follows it, once."""
    run, wait = RunDir(tmp_path), "run 1 (pid 2 on host, since then) holds the GPU 3; waiting"
    append_json_line(run.log, {"logger": "qwen3ft.plan", "message": "a plan"})
    append_json_line(run.log, {"logger": "qwen3ft.lock", "message": wait})
    tail = LockTail(run)
    assert [remark.text for remark in tail.remarks()] == [wait]
    assert list(tail.remarks()) == []


def test_a_run_that_is_resumed_shows_only_what_is_new(tmp_path: Path) -> None:
    """Not the last attempt's progress, nor whom it waited for days ago."""
    run = RunDir(tmp_path)
    run.attempt(1).path.mkdir(parents=True)
    append_json_line(run.attempt(1).metrics, _metrics(7))
    append_json_line(run.log, {"logger": "qwen3ft.lock", "message": "waits for run 0"})
    metrics, waits = tails_from_now(run)
    assert metrics.newest() is None
    assert list(waits.remarks()) == []
    run.attempt(2).path.mkdir(parents=True)
    append_json_line(run.attempt(2).metrics, _metrics(8))
    append_json_line(run.log, {"logger": "qwen3ft.lock", "message": "waits for run 1"})
    progress = metrics.newest()
    assert progress is not None
    assert (progress.attempt, progress.metrics.step) == (2, 8)
    assert [remark.text for remark in waits.remarks()] == ["waits for run 1"]


@pytest.mark.parametrize("terminal", [True, False])
def test_the_card_shows_scores_memory_time_and_links(terminal: bool) -> None:
    """All of it is shown both on a terminal and in a file."""
    card = RunCard(
        title="embedded: promoted",
        trained_on="1,024 rows",
        base_score=0.02,
        tuned_score=0.81,
        held_out_loss_before=2.1,
        held_out_loss_after=0.3,
        peak_memory_gb=0.9,
        budget_gb=13.0,
        seconds_by_stage={"model": 4.0, "train": 61.0},
        attempts=(),
        verdict="promoted: [no] champion yet",
        adapter_path="qwen3-finetuned/a",
        prefect_url="http://127.0.0.1:4200/runs/flow-run/1",
        mlflow_url="http://127.0.0.1:5000/#/experiments/1/runs/2",
        notes=("An honest remark.",),
    )
    stream = io.StringIO()
    console = open_console(file=stream, force_terminal=terminal, width=120, no_color=True)
    show_card(console, card)
    shown = stream.getvalue()
    for fact in (
        *("1,024 rows", "2.0% -> 81.0%", "0.90 GB of 13 GB", "train 1 min 1 s", "[no] champion"),
        *(str(card.prefect_url), str(card.mlflow_url), card.adapter_path, card.notes[0]),
    ):
        assert fact in shown


def test_state_changes_are_plain_lines_without_a_terminal() -> None:
    """A log file shows each state once, with the time that it took."""
    stream = io.StringIO()
    with RunView(Console(file=stream, width=120)) as view:
        view.change(StateChange("train-1", "Running", "RUNNING"))
        view.change(StateChange("train-1", "Completed", "COMPLETED", seconds=31.2))
        view.change(StateChange("model", "Cached", "COMPLETED", seconds=0.0))
        view.change(StateChange("train-2", "Failed", "FAILED", message="out of\nmemory", seconds=1))
    lines = [line.split() for line in stream.getvalue().splitlines()]
    assert lines == [
        ["train-1", "Running"],
        ["train-1", "Completed", "31", "s"],
        ["model", "Cached"],
        ["train-2", "Failed", "1.0", "s", "out", "of"],
    ]


@pytest.mark.parametrize(
    "said",
    [
        "Flow run encountered an exception: SaveError: the disk is full.",
        "Task run encountered an exception SaveError: the disk is full.",
        "SaveError: the disk is full.",
        "the disk is full.",
    ],
)
def test_a_failure_is_shown_without_the_words_of_prefect(said: str) -> None:
    """What is left is what the error says."""
    assert plain_message(said) == "the disk is full."


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.44, "0.4 s"), (31.2, "31 s"), (725, "12 min 5 s"), (12_000, "3 h 20 min")],
)
def test_times_are_written_for_people(seconds: float, text: str) -> None:
    """A time has two units at most."""
    assert format_seconds(seconds) == text


# --- the targets of make and CI ---


def printed_by_make(target: str, folder: Path) -> str:
    """Return the commands of a target in a folder that has only the Makefile."""
    shutil.copy(ROOT / "Makefile", folder)
    command = ["make", "-n", target, f"PYTHON={sys.executable}"]  # spares it looking for one
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


STOP_OR_MEND = ["down", "status", "clean", "lock"]


@pytest.mark.parametrize("target", ["run", "test", "check", "docs", "up", *STOP_OR_MEND])
def test_every_target_of_make_prepares_the_environment_first(tmp_path: Path, target: str) -> None:
    """A fresh clone needs no step before any of them."""
    assert "-m qwen3ft.machine.environment" in printed_by_make(target, tmp_path)


@pytest.mark.parametrize("target", STOP_OR_MEND)
def test_servers_are_stopped_and_pins_mended_though_packages_cannot_be_imported(
    tmp_path: Path, target: str
) -> None:
    """An environment whose programs run will do; one that was moved will not."""
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for start, is_made in (("#!/gone/python", True), ("#!/bin/sh", False)):
        for name in ("python", "qwen3ft"):
            (programs / name).write_text(f"{start}\necho 1\n")
            (programs / name).chmod(0o755)
        assert ("-m qwen3ft.machine.environment" in printed_by_make(target, tmp_path)) is is_made


def test_ci_runs_what_developers_run() -> None:
    """CI checks what anybody can check by hand."""
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert {"make check", "make docs", "make test"} <= set(
        script.read_text(encoding="utf-8").splitlines()
    )


def test_the_lock_is_for_every_kind_of_machine() -> None:
    """It names neither a special build of torch nor CUDA packages; it can build the project."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    names = {line.partition("==")[0] for line in lines}
    assert not any("+cpu" in line or "://" in line for line in lines)
    assert {name for name in names if name.startswith(("nvidia", "triton", "cuda"))} == {
        "nvidia-ml-py"
    }
    assert {"torch", "hatchling", "editables"} <= names


def test_prefect_logs_our_errors_without_a_traceback_and_others_with_one(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that explains itself needs no traceback; any other keeps it."""
    monkeypatch.delenv(policies.DEBUG_VARIABLE, raising=False)
    policies.hide_known_tracebacks()
    logger = logging.getLogger("prefect.task_runs")
    for error in (ConfigError("no such setting"), ValueError("a defect")):
        try:
            raise error
        except (ConfigError, ValueError):
            logger.exception("Task run failed with exception: %r", error)
    known, unknown = caplog.records[-2:]
    assert known.exc_info is None
    assert known.getMessage() == "ended by ConfigError"
    assert unknown.exc_info is not None


def test_data_check_shows_what_would_be_trained_on_and_whether_a_run_would_start(
    tmp_path: Path, in_process: Callable[..., tuple[int, str, str]]
) -> None:
    """The exit code is 0, with all counts, for usable rows; 1, with the reason, for others."""
    good = tmp_path / "qa.jsonl"
    rows = [{"问题": f"第 {n} 题?", "答案": f"{n} 号"} for n in range(60)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    good.write_text("\n".join([*lines, "{oops"]), encoding="utf-8")
    cache = f"cache_dir={tmp_path / 'cache'}"
    status, output, errors = in_process("data", "check", str(good), "--set", cache, "--json")
    assert status == 0, errors
    found = json.loads(output)
    assert (found["would_start"], found["rows_read"], found["quarantined"]) == (True, 61, 1)
    assert found["columns"] == {"question": "问题", "answer": "答案"}
    _, screen, _ = in_process("data", "check", str(good), "--set", cache)
    assert "broken_json" in screen
    assert "question = 问题" in screen
    assert "号<|im_end|>«" in screen
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{oops\n" * 10)
    status, output, _ = in_process("data", "check", str(bad), "--set", cache, "--json")
    assert status == 1
    assert json.loads(output)["error"]["kind"] == "DataLoadingError"


def test_a_screen_of_mixed_files_shows_each_thing_once(
    tmp_path: Path, in_process: Callable[..., tuple[int, str, str]]
) -> None:
    """All sets of columns, the longest row of a line once, no bar of no rows; the path is first."""
    rows = [
        {"question": f"What {n}?", "answer": "word " * (150 if n < 3 else 2)} for n in range(60)
    ]
    (tmp_path / "one.json").write_text(json.dumps(rows))
    others = [{"prompt": f"Which {n}?", "response": "It."} for n in range(20)]
    (tmp_path / "two.jsonl").write_text("\n".join(json.dumps(row) for row in others))
    cache = f"cache_dir={tmp_path / 'cache'}"
    _, screen, errors = in_process("data", "check", str(tmp_path), "--set", cache)
    assert errors.startswith(f"Looking at {tmp_path}")
    assert "question = question, answer = answer" in screen
    assert "and in 20 rows" in screen
    assert "question = prompt, answer = response" in screen
    assert len(re.findall(r"one\.json:1\b", screen)) == 1
    assert re.search(r"longest 2 .*two\.jsonl:", screen)
    assert re.search(r"up to \d+ +█", screen)
    assert not re.search(r"up to \d+ +0\b", screen)


def test_a_previewed_row_is_its_text_by_tokens(
    tmp_path: Path, in_process: Callable[..., tuple[int, str, str]]
) -> None:
    """Tokens are in order, trained ones marked; a character of several tokens stays whole."""
    data = tmp_path / "qa.jsonl"
    rows = [{"question": f"What {n}? 😀", "answer": "Nothing 饕餮."} for n in range(60)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    cache = f"cache_dir={tmp_path / 'cache'}"
    arguments = ("data", "preview", str(data), "--set", cache, "--row")
    status, output, errors = in_process(*arguments, "2", "--json")
    assert status == 0, errors
    shown = json.loads(output)["shown"]
    assert "😀" in "".join(token["text"] for token in shown)
    trained = "".join(token["text"] for token in shown if token["trained"])
    assert trained == "Nothing 饕餮.<|im_end|>"
    status, _, errors = in_process(*arguments, "1000")
    assert status == 1
    assert "no training row 1000" in errors
