"""The environment manager makes, refuses and reports, with a real uv and real venvs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.machine.environment import EnvironmentManager, uv_settings
from qwen3ft.machine.gpus import visible_gpus

ROOT = Path(__file__).parents[2]

BUILD_BACKEND = """
import zipfile

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    name, info = "tiny-1.0-py3-none-any.whl", "tiny-1.0.dist-info"
    metadata = ["Metadata-Version: 2.1", "Name: tiny", "Version: 1.0", ""]
    tags = ["Wheel-Version: 1.0", "Root-Is-Purelib: true", "Tag: py3-none-any", ""]
    with zipfile.ZipFile(f"{wheel_directory}/{name}", "w") as wheel:
        wheel.writestr("tiny.py", "")
        wheel.writestr(f"{info}/METADATA", chr(10).join(metadata))
        wheel.writestr(f"{info}/WHEEL", chr(10).join(tags))
        wheel.writestr(f"{info}/RECORD", "")
    return name

def build_wheel(*arguments, **options):
    raise SystemExit("only editable installs are expected")
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project without dependencies, and uv on PATH: making its environment needs no network."""
    places = [ROOT / ".qwen3ft" / "tools" / "bin", Path(sys.executable).parent]
    monkeypatch.setenv("PATH", os.pathsep.join([os.environ["PATH"], *map(str, places)]))
    if shutil.which("uv") is None:
        pytest.skip("uv is installed by `make`, which did not make this environment")
    monkeypatch.setattr("qwen3ft.machine.environment._IMPORTED_FIRST", ("import tiny",))
    (tmp_path / "requirements.lock").touch()
    (tmp_path / "backend.py").write_text(BUILD_BACKEND)
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "tiny"\nversion = "1.0"\n'
    )
    return tmp_path


def test_it_needs_nothing_but_the_standard_library() -> None:
    """A machine with only Python can import it: no installed package is touched."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import qwen3ft.machine.environment"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)


def test_an_environment_is_made_once_and_again_where_it_has_to_be(project: Path) -> None:
    """A second call finds nothing to do; a changed lock is installed, a broken venv is replaced."""
    manager = EnvironmentManager(project)
    assert manager.get_python_executable() == sys.executable
    assert manager.prepare() is True
    python = project / ".venv" / "bin" / "python"
    assert manager.get_python_executable() == str(python)
    subprocess.run([str(python), "-c", "import tiny"], check=True)
    assert manager.prepare() is False
    (project / "requirements.lock").write_text("# changed\n")
    assert manager.install_dependencies() is True
    python.unlink()
    assert manager.setup_uv_environment() is True
    assert manager.setup_uv_environment() is False


def test_an_installation_that_cannot_be_imported_is_not_taken_for_installed(project: Path) -> None:
    """The next `make ready` installs and imports again, and so reports it again."""
    broken = BUILD_BACKEND.replace('"tiny.py", ""', '"tiny.py", "import gone"')
    (project / "backend.py").write_text(broken)
    manager = EnvironmentManager(project)
    for _ in range(2):
        with pytest.raises(EnvironmentNotReadyError, match="Importing what was installed"):
            manager.prepare()
    (project / "backend.py").write_text(BUILD_BACKEND)
    assert manager.prepare() is True
    assert manager.prepare() is False
    lock = (project / "requirements.lock").read_text()
    (project / "requirements.lock").write_text("# with packages that cannot be imported\n")
    (project / "backend.py").write_text(broken)
    with pytest.raises(EnvironmentNotReadyError, match="Importing what was installed"):
        manager.prepare()
    (project / "requirements.lock").write_text(lock)
    (project / "backend.py").write_text(BUILD_BACKEND)
    assert manager.prepare() is True  # the packages are those of the other lock


def test_an_import_that_was_killed_is_made_again(project: Path) -> None:
    """What was not imported to the end does not count as installed."""
    package = project / "deployments"  # a child imports it in place of ours, and kills its parent
    package.mkdir()
    (package / "__init__.py").write_text("import os; os.kill(os.getppid(), 9)")
    command = [sys.executable, "-m", "qwen3ft.machine.environment"]
    assert subprocess.run(command, cwd=project).returncode == -signal.SIGKILL
    assert EnvironmentManager(project).prepare() is True


@pytest.mark.slow  # imports everything without bytecode
def test_bytecode_is_kept_of_what_is_imported_and_the_home_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of workers, servers and the flow, even where the environment asks for no bytecode."""
    kept, home = tmp_path / "kept", tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(kept))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("PREFECT_HOME")
    EnvironmentManager(ROOT).keep_bytecode()
    folders = {path.parent.name for path in kept.rglob("__init__.*.pyc")}
    assert folders >= {"torch", "peft", "prefect", "mlflow", "uvicorn"}
    assert list(home.iterdir()) == []


def test_a_failed_install_gives_the_reason_and_the_command(project: Path) -> None:
    """Uv's own message reaches the user, and a failed lock does not count as installed."""
    (project / "requirements.lock").write_text("this is no requirement ==\n")
    manager = EnvironmentManager(project)
    manager.setup_uv_environment()
    with pytest.raises(EnvironmentNotReadyError, match=r"Installing requirements\.lock") as caught:
        manager.install_dependencies()
    assert "this is no requirement" in caught.value.why
    assert "uv pip install" in caught.value.next_command
    with pytest.raises(EnvironmentNotReadyError):
        manager.install_dependencies()


def test_a_missing_lock_is_reported(tmp_path: Path) -> None:
    """Outside a project folder nothing is installed."""
    with pytest.raises(EnvironmentNotReadyError, match=r"requirements\.lock is missing"):
        EnvironmentManager(tmp_path).install_dependencies()


def test_this_environment_is_valid() -> None:
    """Everything that the project requires is installed where its tests run."""
    assert EnvironmentManager(ROOT).validate_environment() is True


def test_everything_missing_is_named_at_once(tmp_path: Path) -> None:
    """A missing and an outdated package are one error; other platforms' are ignored."""
    requirements = ["no-such-package>=1", "rich<3", "pydantic>=2", "gone; python_version < '3'"]
    with pytest.raises(EnvironmentNotReadyError, match="2 thing") as caught:
        EnvironmentManager(tmp_path, requirements).validate_environment()
    first, second = caught.value.facts["problems"]
    assert first == "no-such-package>=1 is not installed"
    assert second.startswith("rich<3 is needed, ")


def test_the_report_measures_this_machine() -> None:
    """Amounts are those of this machine, and versions those of installed packages."""
    report = EnvironmentManager(ROOT).report()
    assert report.python_version == ".".join(map(str, sys.version_info[:3]))
    assert 0 < report.host_free_bytes <= report.host_total_bytes
    assert report.disk_free_bytes == pytest.approx(shutil.disk_usage(ROOT).free, rel=0.2)
    assert {"torch", "prefect", "mlflow"} <= set(report.versions)
    assert report.device == ("cuda" if report.gpus else "cpu")


@pytest.mark.parametrize("value", ["", "-1", " ", "no-such-device"])
def test_hidden_devices_are_no_devices(value: str) -> None:
    """As in CUDA, the list ends at the first entry that names nothing."""
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": value}) == ()


@pytest.mark.gpu
@pytest.mark.skipif(not visible_gpus({}), reason="needs a CUDA device")
def test_visible_devices_are_those_chosen() -> None:
    """An index, a UUID and a shortened UUID name the same device."""
    first = visible_gpus({})[0]
    for name in ("0", first.uuid, first.uuid[:12]):
        [found] = visible_gpus({"CUDA_VISIBLE_DEVICES": name})
        assert found.uuid == first.uuid
    assert 0 < first.free_bytes <= first.total_bytes


def test_a_machine_set_up_for_pip_is_set_up_for_uv() -> None:
    """Settings of pip are passed on, and those of uv itself take precedence."""
    settings = uv_settings({"PIP_FIND_LINKS": "/wheels /more", "PIP_CERT": "/ca.pem"})
    assert settings["UV_FIND_LINKS"] == "/wheels,/more"
    assert settings["SSL_CERT_FILE"] == "/ca.pem"
    assert uv_settings({"PIP_FIND_LINKS": "/a", "UV_FIND_LINKS": "/b"})["UV_FIND_LINKS"] == "/b"
