"""Registration of the deployment `qwen3-finetune/default` of `deployments/prefect.yaml`.

The settings that runs start from are those of the project's qwen3ft.yaml. Without that file, as in
a clone, they depend only on whether this machine has a CUDA GPU. The deployment is registered again
only if something that it is made of changed; its version is a digest of that.
The servers must be up (see `deployments.stack`).
"""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from deployments import services
from deployments.automations import definitions, register_automations
from deployments.prefect_api import read_deployment, send
from deployments.services import DEPLOYMENT
from deployments.stack import Say, Stack
from qwen3ft.config import TrainingConfig, parse_config, read_settings_file
from qwen3ft.disk.files import sha256_json
from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.machine.environment import EnvironmentManager
from qwen3ft.machine.gpu_choice import choose_gpus
from qwen3ft.machine.gpus import visible_gpus
from qwen3ft.records.base import Record

PROJECT_FILE = Path("qwen3ft.yaml")
"""Settings that runs of a project start from; `qwen3ft init` writes it."""
PREFECT_FILE = Path("deployments/prefect.yaml")
GPU_CONFIG = Path("deployments/configs/default.yaml")
CPU_CONFIG = Path("deployments/configs/embedded.yaml")
NIGHTLY = "nightly"
"""Name of the schedule of nightly runs."""
FLOW_FILES = (Path("flows/finetune.py"), Path("flows/join.py"))
_PACKAGES = Path(__file__).parents[1]  # of a clone, or `qwen3ft` of a wheel
NO_GPU_LINE = (
    f"No CUDA GPU found: the deployment uses the embedded tiny Qwen3 ({CPU_CONFIG}), "
    "not Qwen/Qwen3-4B-Thinking-2507."
)


class Defaults(Record):
    """Settings that runs of the deployment start from, and the version that they make."""

    config_path: str
    config: dict[str, Any]
    notice: str | None
    version: str
    concurrent_runs: int
    """Runs that have GPUs of their own side by side; the next one waits."""


def choose_defaults(root: Path) -> Defaults:
    """Choose the settings: the project's own, else the real model's with a GPU, the embedded one's.

    Raises:
        ConfigError: the chosen file is missing or invalid.
    """
    notice = None
    if (root / PROJECT_FILE).exists():
        path = PROJECT_FILE
    elif visible_gpus(os.environ):
        path = GPU_CONFIG
    else:
        path, notice = CPU_CONFIG, NO_GPU_LINE
    settings = parse_config(read_settings_file(project_file(root, path)))
    # with the model, which no resumed run may change: so a request to resume one, which lacks it,
    # is never taken for the form with all that the deployment has
    config = {
        "model_name": settings.model_name,
        **settings.model_dump(mode="json", exclude_unset=True),
    }
    files = [_text(project_file(root, file)) for file in (PREFECT_FILE, *FLOW_FILES)]
    runs = concurrent_runs(settings)
    return Defaults(
        config_path=str(path),
        config=config,
        notice=notice,
        version=sha256_json(
            [config, TrainingConfig.model_json_schema(), files, definitions(""), runs]
        )[:12],
        concurrent_runs=runs,
    )


def concurrent_runs(config: TrainingConfig) -> int:
    """Return the number of runs with these settings that have GPUs of their own at once."""
    try:
        choice = choose_gpus(config, gpus) if (gpus := visible_gpus(os.environ)) else None
    except EnvironmentNotReadyError:  # every run says so; what needs no GPU goes on
        return 1
    return len(choice.gpus) // choice.count if choice and choice.count else 1


def project_file(root: Path, file: Path) -> Path:
    """Return a file of the project if it has its own, as a clone does; else the one shipped."""
    own = root / file
    return own if own.exists() else shipped_file(file)


def shipped_file(file: Path) -> Path:
    """Return a file of the deployment as it came with this code."""
    return _PACKAGES / file


def defaults_step() -> dict[str, Any]:
    """Build step of prefect.yaml; `prefect deploy` calls it in the project folder."""
    return choose_defaults(Path.cwd()).model_dump(mode="json")


def deploy(stack: Stack, say: Say = lambda _: None, *, force: bool = False) -> bool:
    """Register the deployment, unless exactly this version is registered already.

    Args:
        stack: A stack that is up.
        say: Receives a line for each thing that the user should know.
        force: Register it even then.

    Returns:
        True if it was registered now.

    Raises:
        EnvironmentNotReadyError: the server does not answer, or `prefect deploy` failed.
        ConfigError: the settings for this machine are invalid.
    """
    defaults = choose_defaults(stack.root)
    if defaults.notice:
        say(defaults.notice)
    registered = read_deployment(stack.layout())
    if not force and registered is not None and _is_current(stack, registered, defaults):
        return False
    try:
        _run_prefect_deploy(stack)
    except BaseException:  # whatever ends this now, the next one would find schedules reset
        with suppress(EnvironmentNotReadyError):  # what ended this says more
            _restore_schedules(stack, registered, say)
        raise
    _restore_schedules(stack, registered, say)
    _finish_registration(stack, defaults.concurrent_runs)
    register_automations(stack.layout(), _registered_id(stack))
    say(f"Registered {DEPLOYMENT} with {defaults.config_path}.")
    return True


def _run_prefect_deploy(stack: Stack) -> None:
    python = EnvironmentManager(stack.root).get_python_executable()
    file = project_file(stack.root, PREFECT_FILE)
    options = ["--no-prompt", "deploy", "--prefect-file", str(file), "--all"]
    done = subprocess.run(
        [python, "-m", "prefect", *options],
        cwd=stack.root,
        env=services.environment(stack.layout()),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0 or read_deployment(stack.layout()) is None:
        raise EnvironmentNotReadyError(
            f"prefect deploy ended with exit code {done.returncode}.",
            why=services.last_words(done.stdout),
            next_command="qwen3ft status",
        )


def _is_current(stack: Stack, registered: dict[str, Any], defaults: Defaults) -> bool:
    is_strict = registered["parameter_openapi_schema"].get("additionalProperties") is False
    if registered["version"] != defaults.version or not is_strict:
        return False
    join = read_deployment(stack.layout(), services.JOIN_DEPLOYMENT)
    return join is not None and join["version"] == defaults.version


def _finish_registration(stack: Stack, runs: int) -> None:
    """Set what prefect.yaml cannot: the number of runs at once, which depends on the machine.

    And let the server refuse a run with a parameter that the flow does not have.
    """
    # Prefect's own schema of a flow lets every further name pass, and the run then crashes.
    found = read_deployment(stack.layout())
    assert found is not None  # `prefect deploy` has just put it there
    schema = {**found["parameter_openapi_schema"], "additionalProperties": False}
    change = {"parameter_openapi_schema": schema, "concurrency_limit": runs}
    send(stack.layout(), f"deployments/{found['id']}", change, method="PATCH")


def _registered_id(stack: Stack) -> str:
    found = read_deployment(stack.layout())
    assert found is not None  # `prefect deploy` has just put it there
    return str(found["id"])


def _restore_schedules(stack: Stack, before: dict[str, Any] | None, say: Say) -> None:
    """Set schedules as they were; registering resets them to what the file says."""
    try:
        _set_schedules(stack, before)
    except EnvironmentNotReadyError:  # the next one would take the file's for the user's
        say("The schedules could not be set back: look at qwen3ft schedule.")
        raise


def _set_schedules(stack: Stack, before: dict[str, Any] | None) -> None:
    if before is None or (after := read_deployment(stack.layout())) is None:
        return
    chosen = {schedule["slug"]: schedule for schedule in before["schedules"]}
    for schedule in after["schedules"]:
        kept = chosen.get(schedule["slug"], schedule)
        wanted = {name: kept[name] for name in ("active", "schedule")}
        if any(schedule[name] != value for name, value in wanted.items()):
            address = f"deployments/{after['id']}/schedules/{schedule['id']}"
            send(stack.layout(), address, wanted, method="PATCH")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
