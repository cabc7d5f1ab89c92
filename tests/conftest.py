"""What tests share: the embedded model quantised once, and a plan for it."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from qwen3ft.disk.locks import try_lock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="qwen3ft-prefect-")  # results and settings
_MADE_BY = os.getpid()
# Two threads on two cores that others use too are slower than one, and bits depend on the number.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@atexit.register
def _remove_prefect_home() -> None:
    if os.getpid() == _MADE_BY:  # warm workers are forks of this process
        shutil.rmtree(os.environ["PREFECT_HOME"], ignore_errors=True)


gc.disable()  # while the modules of the tests are imported: there is no garbage among them

# How long one example takes says how busy the machine is, and nothing of the property.
EXAMPLES = int(os.environ.get("QWEN3FT_EXAMPLES", "25"))  # `make test-slow` asks for more
# Chance looks for what nobody thought of in the slow tests; a default run says what a change did.
settings.register_profile(
    "qwen3ft",
    deadline=None,
    max_examples=EXAMPLES,
    derandomize="QWEN3FT_EXAMPLES" not in os.environ,
)
settings.load_profile("qwen3ft")

BROWSER = "tests/flows/test_browser.py"
_WITH_FLOW = (BROWSER, "tests/flows/test_attacks.py", "tests/flows/test_secrets.py")
_WITH_TRAINED = (
    *("tests/serving/test_ask.py", "tests/serving/test_gguf.py", "tests/serving/test_engines.py"),
    *("tests/serving/test_hub_push.py", "tests/serving/test_mlflow_model.py"),
    *("tests/evaluation/test_inference.py", "tests/evaluation/test_decoded.py"),
    *("tests/evaluation/test_dealt_answers.py", "tests/preflight/test_answers_measured.py"),
    *("tests/server/test_server.py", "tests/server/test_following.py"),
)
TOGETHER = {
    **dict.fromkeys(_WITH_FLOW, "tests/flows/test_flow.py"),
    **dict.fromkeys(_WITH_TRAINED, "tests/serving/test_export.py"),
}
"""Files that share what is made once for a session and takes long."""

SLOWEST_SHOWN = 12
OTHERS_MAKE_IT_SECONDS = 240.0
"""Wait for another process that is making what both need."""

LONGEST = (
    *("test_flow.py", "test_browser.py", "test_attacks.py", "test_secrets.py", "test_stack.py"),
    *("test_interruptions.py", "test_following.py", "test_server.py", "test_export.py"),
    *("test_ask.py", "test_inference.py"),
    *("test_mirror.py", "test_worker.py", "test_cli.py", "test_training.py", "test_moves.py"),
    *("test_sender.py", "test_bombs.py", "test_formats.py", "test_temporary_server.py"),
    *("test_job_processes.py", "test_preflight.py", "test_what_if.py", "test_model.py"),
    *("test_tokenizer_trial.py", "test_helped.py", "test_data.py", "test_nightly.py"),
    *("test_next_commands.py", "test_fused_step.py", "test_safety.py", "test_wheel.py"),
)
"""Files that take longest begin first, or one process is left alone with one of them at the end."""


def pytest_sessionstart() -> None:
    """Begin, in a process of pytest-xdist, with what its workers import too."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        from support.warm_workers import fork_early

        fork_early()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, all others in their order."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))


def pytest_collection_finish() -> None:
    """From here on there is garbage; it is not looked for in what was imported."""
    gc.freeze()
    gc.enable()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile`, which gives a file to one process, for files of `TOGETHER` as well."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            scope = super()._split_scope(nodeid)
            return TOGETHER.get(scope, scope)

    return Scheduling(config, log)


@pytest.hookimpl(trylast=True)  # a fixture of the last test still needs them for its own end
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Stop the servers of the session's project after the last file that uses them."""
    used = getattr(item, "funcargs", {}).get("project")
    if hasattr(used, "stack") and (nextitem is None or _group(nextitem) != _group(item)):
        used.stack.down()


def _group(item: pytest.Item) -> str:
    file = item.nodeid.partition("::")[0]
    return TOGETHER.get(file, file)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how many tests ran, which took longest, and where the pages that were seen are."""
    stats = terminalreporter.stats
    ran = [report for outcome in ("passed", "failed") for report in stats.get(outcome, ())]
    seconds: Counter[str] = Counter()
    for report in [*ran, *stats.get("", ())]:  # set-up and tear-down are reported under ""
        if hasattr(report, "duration"):
            seconds[report.nodeid] += report.duration
    write = terminalreporter.write_line
    write(f"{len(ran):,} tests ran. The slowest, in seconds with their set-up:")
    for name, duration in seconds.most_common(SLOWEST_SHOWN):
        write(f"  {duration:5.1f}  {name}")
    if any(report.nodeid.startswith(BROWSER) for report in ran):
        write("Screenshots of both UIs: test-output/browser/*.png")
    elif any(report.nodeid.startswith(BROWSER) for report in stats.get("skipped", ())):
        write("NOT TESTED, as there is no Chromium: both UIs")


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Put back the variables that a command of the test set for its process."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the test run for all processes of pytest-xdist: one makes a thing, all use it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    shared = folder / "shared"
    shared.mkdir(exist_ok=True)
    return shared


@pytest.fixture(scope="session", autouse=True)
def warm_workers() -> Iterator[None]:
    """Fork the workers that this process starts from one that has imported their libraries."""
    from support.warm_workers import forking_workers

    with forking_workers():
        yield


@pytest.fixture
def cold_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start workers as the product does, each with imports of its own."""
    from support import warm_workers

    monkeypatch.setattr(warm_workers, "is_on", False)


@pytest.fixture(scope="session")
def cache_dir(shared_folder: Path) -> Path:
    """Quantised models and tokenised rows, shared by the whole session."""
    return shared_folder / "cache"


@pytest.fixture(scope="session")
def make_config(cache_dir: Path) -> Callable[..., Any]:
    """A config of the embedded model, small enough for a test."""
    from qwen3ft.config import TrainingConfig

    def make(**changes: Any) -> TrainingConfig:
        values: dict[str, Any] = {
            "model_name": "embedded",
            "cache_dir": str(cache_dir),
            "max_memory_gb": 4.0,
            "batch_size": 16,
            "gradient_accumulation_steps": 1,
            "learning_rate": 4e-3,
            "lora_r": 8,
            "lora_alpha": 16,
            "max_sequence_length": 128,
            "num_epochs": 1,
            "max_new_tokens": 24,
            "max_rows": 96,
            "inference_rows": 24,
        }
        return TrainingConfig(**{**values, **changes})

    return make


@pytest.fixture(scope="session")
def snapshot(make_config: Callable[..., Any], shared_folder: Path) -> Any:
    """The embedded model, quantised once."""
    from qwen3ft.model.hub import resolve_model
    from qwen3ft.model.manager import ModelManager, read_snapshot, snapshot_target
    from qwen3ft.records.requests import QuantizeRequest

    config = make_config()
    source = resolve_model(config)
    target = snapshot_target(config, source, "cpu")
    request = QuantizeRequest(
        config=config,
        source=source,
        source_path=source.local_path or "",
        target=str(target),
        device="cpu",
    )
    with try_lock(shared_folder / "snapshot.lock", OTHERS_MAKE_IT_SECONDS):
        return read_snapshot(target) or ModelManager(config).quantize(request)


@pytest.fixture(scope="session")
def manifest(make_config: Callable[..., Any], snapshot: Any) -> Any:
    """The bundled rows, tokenised in this process."""
    from qwen3ft.data.pipeline import DataPipeline, dataset_target
    from qwen3ft.data.sources import resolved

    config = make_config()
    target = dataset_target(resolved(config), snapshot)
    return DataPipeline(config).prepare(snapshot, target)


@pytest.fixture(scope="session")
def migrated_database() -> Path:
    """An MLflow database with its tables, which take seconds to make: to be copied."""
    from support.databases import migrated

    return migrated("mlflow")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An adapter that knows 16 rows by heart, and the model it stands on: a `Trained`."""
    from support.trained_adapter import train_adapter

    return train_adapter(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def project(
    tmp_path_factory: pytest.TempPathFactory, make_config: Callable[..., Any], snapshot: Any
) -> Iterator[Any]:
    """A project with servers of its own: a `FlowProject`."""
    from support.flow_project import FlowProject

    from deployments import services

    made = FlowProject(tmp_path_factory.mktemp("flow"), make_config)
    with pytest.MonkeyPatch.context() as patch:
        try:
            made.stack.up()
            for name, value in services.access(made.stack.layout()).items():
                patch.setenv(name, value)  # for clients of its MLflow in this process
            yield made
        finally:
            made.stack.down()


@pytest.fixture(scope="session")
def finished(project: Any) -> Any:
    """One undisturbed run of the flow: its state and its folder."""
    return project.run()


@pytest.fixture(scope="session")
def champion(project: Any, finished: Any) -> str:
    """The version in use: that of the undisturbed run."""
    from support.flow_project import promote_first

    return promote_first(project)


@pytest.fixture(scope="session")
def deployment(project: Any, champion: str) -> Any:
    """Register the deployment, with the settings of the undisturbed run; return it."""
    return project.deploy()


@pytest.fixture(scope="session")
def resumed(
    project: Any, champion: str, snapshot: Any, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """A run that failed and was continued, on inputs full of keys: a `Resumed`."""
    from support.resumed_run import fail_and_resume

    return fail_and_resume(project, snapshot, tmp_path_factory.mktemp("resumed"))


@pytest.fixture(scope="session")
def environment() -> Any:
    """A CPU machine with plenty of memory, so that plans do not depend on where tests run."""
    from qwen3ft.records.machine import EnvironmentReport

    return EnvironmentReport(
        python_version="3.11.7",
        python_executable="python",
        platform="Linux",
        versions={},
        cpu_count=2,
        host_total_bytes=24 * 2**30,
        host_free_bytes=20 * 2**30,
        disk_free_bytes=50 * 2**30,
    )


@pytest.fixture
def make_plan(
    tmp_path: Path,
    make_config: Callable[..., Any],
    environment: Any,
    snapshot: Any,
    manifest: Any,
) -> Callable[..., Any]:
    """A plan for the embedded model as attempt 1 of a run in the test's folder."""
    from qwen3ft.model.adapter import plan_adapter
    from qwen3ft.planning.plan import build_plan

    def make(run: str = "run", **changes: Any) -> Any:
        config = make_config()
        adapter = plan_adapter(config, snapshot.shape)
        plan = build_plan(config, environment, snapshot, adapter, manifest)
        plan = plan.for_run(run, str(tmp_path / run), attempt=1, resume_from=None)
        return plan.with_settings(**changes)

    return make
