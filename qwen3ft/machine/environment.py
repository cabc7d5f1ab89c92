"""The Python environment of a project folder: made with uv, validated, reported.

`python3 -m qwen3ft.machine.environment` makes `.venv` with the pinned lock and the project itself,
on a machine that has only Python and pip. So importing this module needs the standard library
alone. A second call takes a fraction of a second if nothing changed. It installs no GPU driver.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3ft.disk.locks import try_lock
from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.machine.installing import CHECKOUT, install_command
from qwen3ft.text.commands import shell_line
from qwen3ft.units import GIB, size_text

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from qwen3ft.records.machine import EnvironmentReport

OLDEST_PYTHON, FIRST_UNTRIED_PYTHON = (3, 11), (3, 14)
MINIMUM_FREE_DISK_BYTES = 2 * GIB
SETUP_COMMAND = "python3 -m qwen3ft.machine.environment"
UV_NAMES_OF_PIP_SETTINGS = {
    "PIP_FIND_LINKS": "UV_FIND_LINKS",
    "PIP_INDEX_URL": "UV_DEFAULT_INDEX",
    "PIP_CERT": "SSL_CERT_FILE",
}
"""uv does not read pip's settings; through these it works on a machine that is set up for pip."""

_IMPORTED_FIRST = (
    "from qwen3ft.worker.bootstrap import import_libraries; import_libraries('train')",
    "import deployments.prefect_server, flows.cli, flows.finetune, mlflow.server.fastapi_app",
)
"""Imports of workers, and those of the servers and the flow."""


class EnvironmentManager:
    """The environment of one project folder: make it, check it, describe it.

    Args:
        root: Project folder with pyproject.toml and requirements.lock; .venv is made in it.
        requirements: Required packages as PEP 508 strings; by default the project's own.
    """

    def __init__(self, root: Path | None = None, requirements: Sequence[str] | None = None) -> None:
        self.root = (root or Path.cwd()).resolve()
        self.venv = self.root / ".venv"
        self._lock = self.root / "requirements.lock"
        self._stamp = self.venv / "qwen3ft-installed"
        self._requirements = requirements

    # --- making it ---

    def get_python_executable(self) -> str:
        """Return the interpreter for workers: that of a clone's `.venv`, else this process's."""
        python = self.venv / "bin" / "python"
        # a `.venv` without a lock beside it is the user's, who may have installed qwen3ft elsewhere
        return str(python) if self._lock.exists() and python.exists() else sys.executable

    def setup_uv_environment(self) -> bool:
        """Make `.venv` with uv unless a working one exists.

        Returns:
            True if it had to be made.

        Raises:
            EnvironmentNotReadyError: this Python is too old or too new, or uv failed.
        """
        _refuse_wrong_python()
        if _runs(self.venv / "bin" / "python"):
            return False
        command = [self._uv(), "venv", "--quiet", "--python", sys.executable]
        if self.venv.exists():
            _say(f"{self.venv} does not work; making it again.")
            command.append("--clear")
        self._run([*command, str(self.venv)], "Making .venv")
        return True

    def install_dependencies(self) -> bool:
        """Install the pinned packages and the project itself, unless exactly these are installed.

        Returns:
            True if something was installed.

        Raises:
            EnvironmentNotReadyError: requirements.lock is missing, uv failed, or something that was
                installed cannot be imported.
        """
        if not self._lock.exists():
            raise EnvironmentNotReadyError(
                f"{self._lock} is missing.",
                why="It pins the packages to install; this may not be the project folder.",
                next_command=shell_line("ls", self.root),
            )
        wanted = self._fingerprint()
        if self._stamp.exists() and self._stamp.read_text(encoding="utf-8") == wanted:
            return False
        self._stamp.unlink(missing_ok=True)
        _say("Installing the packages pinned in requirements.lock into .venv ...")
        install = [self._uv(), "pip", "install", "--python", self.get_python_executable()]
        # Not `pip sync`: it would remove torch's CUDA packages, which a lock file for machines with
        # and without a GPU cannot list.
        self._run([*install, "-r", str(self._lock)], "Installing requirements.lock")
        project = ["--no-deps", "--no-build-isolation", "--quiet", "-e", str(self.root)]
        self._run([*install, *project], "Installing the project itself")
        self.keep_bytecode()
        # last: whatever ends this earlier, the next call does it all again
        self._stamp.write_text(wanted, encoding="utf-8")
        return True

    def install_more(self, arguments: Sequence[str]) -> None:
        """Install what no lock names, by arguments of `uv pip install`.

        Raises:
            EnvironmentNotReadyError: uv failed.
        """
        install = [self._uv(), "pip", "install", "--quiet", "--python"]
        self._run([*install, self.get_python_executable(), *arguments], "Installing more")

    def prepare(self) -> bool:
        """Run `setup_uv_environment` and `install_dependencies`, one process at a time.

        Returns:
            True if anything had to be done.

        Raises:
            EnvironmentNotReadyError: as they do.
        """
        state = self.root / ".qwen3ft"
        state.mkdir(exist_ok=True)
        with try_lock(state / "environment.lock", wait_seconds=math.inf):
            made = self.setup_uv_environment()
            return self.install_dependencies() or made

    def keep_bytecode(self) -> None:
        """Import once what runs and servers import.

        Otherwise the servers, the flow and its worker, which start together, all compile it.

        Raises:
            EnvironmentNotReadyError: something that was installed cannot be imported.
        """
        _say("Importing them once, to keep their bytecode ...")
        python = self.get_python_executable()
        # Prefect makes this folder, by default in the user's home
        home = str(self.root / ".qwen3ft" / "prefect")

        def run(code: str) -> None:
            purpose = "Importing what was installed"
            self._run([python, "-c", code], purpose, PREFECT_HOME=home, PYTHONDONTWRITEBYTECODE="")

        with ThreadPoolExecutor() as pool:
            list(pool.map(run, _IMPORTED_FIRST))

    def _uv(self) -> str:
        """Return the path of uv: on PATH or in the project's own tools, else installed there."""
        tools = self.root / ".qwen3ft" / "tools"
        uv = shutil.which("uv") or shutil.which("uv", path=str(tools / "bin"))
        if uv is None:
            if importlib.util.find_spec("pip") is None:
                raise EnvironmentNotReadyError(
                    f"There is neither uv on PATH nor pip in {sys.executable}.",
                    why="Installing packages needs one of the two.",
                    next_command="python3 -m ensurepip --user",
                )
            _say("Fetching uv with pip ...")
            # `--target` needs no venv module, and works where pip refuses to touch the system.
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tools), "uv"]
            self._run(pip, "Fetching uv with pip")
            uv = str(tools / "bin" / "uv")
        return uv

    def _run(self, command: Sequence[str], purpose: str, **variables: str) -> None:
        environment = uv_settings(os.environ) | variables
        done = subprocess.run(
            command, cwd=self.root, env=environment, stderr=subprocess.PIPE, text=True
        )
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines()[-12:]
            raise EnvironmentNotReadyError(
                f"{purpose} failed with exit code {done.returncode}.",
                why="\n".join(lines) or "The command printed no reason.",
                next_command=shell_line(*command),
                exit_code=done.returncode,
            )

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(str(self.root).encode())
        for name in ("requirements.lock", "pyproject.toml"):
            digest.update((self.root / name).read_bytes())
        return digest.hexdigest()

    # --- checking it ---

    def validate_environment(self) -> bool:
        """Return True if runs can start here.

        Raises:
            EnvironmentNotReadyError: it lists everything missing, too old or too small at once.
        """
        _refuse_wrong_python()
        lacking = self._lacking()
        problems = list(lacking.values())
        next_command = SETUP_COMMAND if self._lock.exists() else install_command(list(lacking))
        free_bytes = shutil.disk_usage(self.root).free
        if free_bytes < MINIMUM_FREE_DISK_BYTES:
            if not problems:
                next_command = "qwen3ft clean --dry-run"
            problems.append(
                f"{size_text(free_bytes, 1)} of free disk in {self.root}, "
                f"{size_text(MINIMUM_FREE_DISK_BYTES, 0)} needed"
            )
        if problems:
            raise EnvironmentNotReadyError(
                f"{len(problems)} thing(s) missing: " + "; ".join(problems),
                why="Runs need all of them.",
                next_command=next_command,
                problems=problems,
            )
        return True

    def _lacking(self) -> dict[str, str]:
        """Return what to install, and what is wrong without it."""
        if importlib.util.find_spec("packaging") is None:
            return {str(CHECKOUT): "the project's packages (not even 'packaging' is installed)"}
        if self._requirements is None and _installed_version("qwen3ft") is None:
            return {str(CHECKOUT): "qwen3ft is not installed"}
        lacking = {}
        for requirement in self._required():
            version = _installed_version(requirement.name)
            if version is None:
                lacking[str(requirement)] = f"{requirement} is not installed"
            elif not requirement.specifier.contains(version, prereleases=True):
                lacking[str(requirement)] = f"{requirement} is needed, {version} is installed"
        return lacking

    def _required(self) -> list[Requirement]:
        """Return the requirements that apply here: no extras, no other platforms."""
        from packaging.requirements import Requirement

        texts = self._requirements
        if texts is None:
            texts = (metadata.requires("qwen3ft") or ()) if _installed_version("qwen3ft") else ()
        requirements = [Requirement(text) for text in texts]
        return [
            requirement
            for requirement in requirements
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        ]

    # --- describing it ---

    def report(self) -> EnvironmentReport:
        """Return versions, devices, and free memory and disk now."""
        import psutil

        from qwen3ft.machine.gpus import visible_gpus
        from qwen3ft.records.machine import EnvironmentReport

        names = [item.name for item in self._required()] + ["triton"]  # installed by torch for CUDA
        versions = {name: _installed_version(name) for name in names}
        memory = psutil.virtual_memory()
        return EnvironmentReport(
            python_version=platform.python_version(),
            python_executable=self.get_python_executable(),
            platform=platform.platform(),
            versions={name: version for name, version in versions.items() if version},
            cpu_count=os.cpu_count() or 1,
            host_total_bytes=memory.total,
            host_free_bytes=memory.available,
            disk_free_bytes=shutil.disk_usage(self.root).free,
            gpus=visible_gpus(os.environ),
        )


def uv_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` with pip's settings also under uv's names; uv's own take precedence."""
    settings = dict(environment)
    for pip_name, uv_name in UV_NAMES_OF_PIP_SETTINGS.items():
        if environment.get(pip_name):
            # pip separates find-links by spaces, uv by commas.
            value = environment[pip_name]
            links = ",".join(value.split()) if uv_name == "UV_FIND_LINKS" else value
            settings.setdefault(uv_name, links)
    return settings


def _installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _refuse_wrong_python() -> None:
    if not OLDEST_PYTHON <= sys.version_info < FIRST_UNTRIED_PYTHON:
        raise EnvironmentNotReadyError(
            f"This is Python {platform.python_version()} ({sys.executable}).",
            why="Python 3.11, 3.12 or 3.13 is needed: older lack features, newer are untested.",
            next_command=_command_for_another_python(),
        )


def _command_for_another_python() -> str:
    for name in ("python3.13", "python3.12", "python3.11"):
        if shutil.which(name):
            return f"make run PYTHON={name}"
    return "uv python install 3.12" if shutil.which("uv") else "ls -l /usr/bin"


def _runs(python: Path) -> bool:
    """Return True if a venv's interpreter works and has a supported version."""
    supported = f"{OLDEST_PYTHON} <= sys.version_info < {FIRST_UNTRIED_PYTHON}"
    check = f"import sys; sys.exit(not {supported})"
    return python.exists() and subprocess.run([python, "-c", check]).returncode == 0


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _set_up(more: Sequence[str]) -> int:
    """Set up the project in the working folder, and install `more`; return the exit code."""
    try:
        manager = EnvironmentManager()
        manager.prepare()
        if more:
            manager.install_more(more)
    except EnvironmentNotReadyError as error:
        _say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(_set_up(sys.argv[1:]))
