"""Tests of the commands that install what is missing."""

from __future__ import annotations

import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.machine import installing
from qwen3ft.machine.environment import EnvironmentManager
from qwen3ft.machine.installing import extra_command, install_command


def test_an_extra_is_installed_by_what_it_consists_of() -> None:
    """The project itself is on no index, and the command must work as printed."""
    words = shlex.split(extra_command("sheets"))
    requirement = Requirement(words[-1])
    assert (requirement.name, str(requirement.specifier)) == ("python-calamine", ">=0.6")


def test_the_installer_of_this_environment_is_there() -> None:
    """The command's program runs, and its packages go to this interpreter."""
    words = shlex.split(install_command(["python-calamine>=0.6"]))
    assert sys.executable in words
    done = subprocess.run([*words[: words.index("install") + 1], "--help"], capture_output=True)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("has_pip", "uv", "wanted"),
    [
        (True, "/bin/uv", "{python} -m pip install 'a>=1'"),
        (False, "/bin/uv", "/bin/uv pip install --python {python} 'a>=1'"),
        (False, None, "{python} -m ensurepip && {python} -m pip install 'a>=1'"),
    ],
)
def test_what_the_environment_has_installs(
    has_pip: bool, uv: str | None, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pip; uv where there is no pip, as in a clone's .venv; or pip is installed first."""
    monkeypatch.setattr(installing.importlib.util, "find_spec", lambda _: has_pip or None)
    monkeypatch.setattr(installing.shutil, "which", lambda _, path="": uv)
    assert install_command(["a>=1"]) == wanted.format(python=shlex.quote(sys.executable))


def test_a_clone_that_is_only_on_the_path_is_named_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing knows its requirements then."""

    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert shlex.split(extra_command("gguf"))[-1] == f"{installing.CHECKOUT}[gguf]"
    assert (installing.CHECKOUT / "pyproject.toml").is_file()


def test_outside_a_clone_what_is_missing_is_installed_by_name(tmp_path: Path) -> None:
    """Not by installing the project again."""
    manager = EnvironmentManager(tmp_path, ["no-such-package>=1", "rich<3"])
    with pytest.raises(EnvironmentNotReadyError) as caught:
        manager.validate_environment()
    assert caught.value.next_command == install_command(["no-such-package>=1", "rich<3"])
