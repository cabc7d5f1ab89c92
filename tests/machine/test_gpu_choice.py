"""The setting `gpus` against machines of many kinds; NVML's answers are given."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from deployments import deploy, services
from flows.run_context import hold_devices
from qwen3ft.config import TrainingConfig, parse_config
from qwen3ft.errors import ConfigError, EnvironmentNotReadyError
from qwen3ft.jobs.folders import RunDir
from qwen3ft.machine import gpu_holds as gpu_holds_module
from qwen3ft.machine.gpu_choice import VISIBLE, choose_gpus, only_visible, rank_count
from qwen3ft.machine.gpu_holds import gpu_holds
from qwen3ft.machine.gpu_lock import FOLDER_VARIABLE, Holder, holders
from qwen3ft.records.machine import GpuInfo
from qwen3ft.units import GIB


def gpu(index: int, name: str = "H200", total_gb: int = 141, free_gb: int = 140) -> GpuInfo:
    return GpuInfo(
        index=index,
        name=name,
        uuid=f"GPU-{index}",
        total_bytes=total_gb * GIB,
        free_bytes=free_gb * GIB,
        driver_version="580",
    )


FOUR = tuple(map(gpu, range(4)))
MIXED = (gpu(0, "A100", 80), gpu(1), gpu(2))


@pytest.mark.parametrize(
    ("given", "kept"),
    [(2, "2"), ("auto", "auto"), ([0, 1], "0,1"), ([3], "3,"), ("GPU-1a,2", "GPU-1a,2")],
)
def test_a_number_a_list_and_auto_are_taken(given: Any, kept: str) -> None:
    """As YAML, a command line and Python give them."""
    assert parse_config({"gpus": given}).gpus == kept


@pytest.mark.parametrize("given", [0, -1, "two", "1 2", True, "", "0,,1", [], "all"])
def test_what_is_no_choice_of_gpus_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match="gpus"):
        parse_config({"gpus": given})


@pytest.mark.parametrize(
    ("setting", "gpus", "indexes", "count"),
    [
        ("1", FOUR, [0, 1, 2, 3], 1),
        ("3", FOUR, [0, 1, 2, 3], 3),
        ("auto", FOUR, [0, 1, 2, 3], None),
        ("3,1", FOUR, [3, 1], 2),
        ("GPU-2", FOUR, [2], 1),
        ("2,", FOUR, [2], 1),
        ("1", MIXED, [0], 1),  # the kind that it took when it took the first
        ("2", MIXED, [1, 2], 2),
        ("auto", MIXED, [0], None),
        ("1", (gpu(0, free_gb=3), gpu(1)), [1, 0], 1),  # another program fills the first
    ],
)
def test_a_run_may_take_gpus_of_one_kind(
    setting: str, gpus: Any, indexes: list[int], count: int | None
) -> None:
    choice = choose_gpus(TrainingConfig(gpus=setting), gpus)
    assert [each.index for each in choice.gpus] == indexes
    assert choice.count == count


@pytest.mark.parametrize(
    ("setting", "gpus", "message", "command"),
    [
        ("5", FOUR, r"gpus is 5, and this machine has 4 x H200 \(141 GB\)", "gpus=4"),
        ("3", MIXED, "not 3 of one kind", "gpus=2"),
        ("0,1", MIXED, "different GPUs", "gpus=2"),
        ("7,1", FOUR, "gpus names 7", "gpus=4"),
        ("1,GPU-1", FOUR, "one GPU twice", "gpus=4"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(
    setting: str, gpus: Any, message: str, command: str
) -> None:
    """Before anything is trained; the command names the most that would do."""
    with pytest.raises(EnvironmentNotReadyError, match=message) as refused:
        choose_gpus(TrainingConfig(gpus=setting), gpus)
    assert refused.value.next_command == f"qwen3ft run --set {command}"
    assert refused.value.why


def test_without_a_gpu_only_the_embedded_model_has_several_ranks(environment: Any) -> None:
    assert rank_count(TrainingConfig(gpus="auto"), environment) == 1
    assert rank_count(TrainingConfig(gpus="3", model_name="embedded"), environment) == 3
    with pytest.raises(EnvironmentNotReadyError, match="hosts is 2, and no GPU is visible"):
        rank_count(TrainingConfig(hosts=2), environment)
    with pytest.raises(EnvironmentNotReadyError, match="no GPU is visible"):
        rank_count(TrainingConfig(gpus="3"), environment)


@pytest.fixture
def take(environment: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function with which a run of a machine with GPUs takes some of them."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "locks"))
    monkeypatch.delenv(VISIBLE, raising=False)

    def hold(run: str, setting: str = "1", gpus: Any = FOUR[:2]) -> Any:
        config = TrainingConfig(gpus=setting, when_gpu_is_busy="refuse")
        machine = environment.model_copy(update={"gpus": gpus})
        return hold_devices(config, machine, RunDir(tmp_path / run))

    return hold


def test_two_runs_are_side_by_side_and_a_third_is_not(take: Any, tmp_path: Path) -> None:
    """Each sees its own GPU alone; the third hears who has which, and finds one when it is free."""
    with take("first") as one:
        assert [each.index for each in one.gpus] == [0]
        assert os.environ[VISIBLE] == "GPU-0"
        with take("second") as other:
            assert [each.index for each in other.gpus] == [1]
            assert os.environ[VISIBLE] == "GPU-1"
            held = {uuid: holder.run_id for uuid, holder in holders(["GPU-0", "GPU-1"]).items()}
            assert held == {"GPU-0": "first", "GPU-1": "second"}
            with pytest.raises(EnvironmentNotReadyError) as busy, take("third"):
                pass
            for words in ("Run first (pid ", "holds the GPU GPU-0", "holds the GPU GPU-1"):
                assert words in busy.value.what
        with take("third") as third:
            assert [each.index for each in third.gpus] == [1]
    assert VISIBLE not in os.environ
    assert holders(["GPU-0", "GPU-1"]) == {}


def test_a_run_takes_all_it_wants_or_none(take: Any) -> None:
    """Beside a run with one of four: not four, but three, or all that are free."""
    with take("first", gpus=FOUR):
        with pytest.raises(EnvironmentNotReadyError, match="holds the GPU GPU-0"):
            take("four", "4", FOUR).__enter__()
        assert list(holders([each.uuid for each in FOUR])) == ["GPU-0"]
        with take("auto", "auto", FOUR) as rest:
            assert [each.index for each in rest.gpus] == [1, 2, 3]


def test_a_run_that_has_every_gpu_leaves_the_environment_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VISIBLE, "0")
    with only_visible(["GPU-0"], FOUR[:1]):
        assert os.environ[VISIBLE] == "0"
    with only_visible(["GPU-1"], FOUR):
        assert os.environ[VISIBLE] == "GPU-1"
    assert os.environ[VISIBLE] == "0"


CONTEND = """
    import os, sys, random
    from pathlib import Path
    from qwen3ft.machine.gpu_lock import hold_gpus
    folder, processes, times = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    gpus = ["GPU-0", "GPU-1", "GPU-2"]
    def contend(number):
        chance = random.Random(number)
        for _ in range(times):
            count = chance.choice([1, 1, 2, None])
            wanted = chance.sample(gpus, 3)
            with hold_gpus(
                wanted, "run", count=count, when_busy="wait", wait_seconds=240, folder=folder
            ) as held:
                assert len(held) == count if count else held
                for gpu in held:  # fails for a second run on it
                    os.close(os.open(folder / f"{gpu}.inside", os.O_CREAT | os.O_EXCL))
                for gpu in held:
                    os.unlink(folder / f"{gpu}.inside")
    children = []
    for number in range(processes):
        if (child := os.fork()) == 0:
            contend(number)
            os._exit(0)
        children.append(child)
    print(sum(os.waitpid(child, 0)[1] != 0 for child in children))
"""


@pytest.mark.parametrize("times", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_runs_that_contend_are_never_two_on_a_gpu_nor_stuck(tmp_path: Path, times: int) -> None:
    """Twenty runs at once, some of which want two of three GPUs; 1,000 starts in all if slow."""
    command = [sys.executable, "-c", textwrap.dedent(CONTEND), str(tmp_path), "20", str(times)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0"], done.stderr


@pytest.mark.parametrize(
    ("setting", "gpus", "runs"),
    [
        ("1", FOUR, 4),
        ("2", FOUR, 2),
        ("3", FOUR, 1),
        ("auto", FOUR, 1),
        ("1", (), 1),
        ("1", MIXED, 1),
        ("9", FOUR, 1),
    ],
)
def test_the_deployment_has_as_many_runs_at_once_as_gpus_allow(
    setting: str, gpus: Any, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One where a run cannot have what it asks for: the run says so, not everything else."""
    monkeypatch.setattr(deploy, "visible_gpus", lambda environment: gpus)
    assert deploy.concurrent_runs(TrainingConfig(gpus=setting)) == runs


def test_status_shows_who_holds_which_gpu(take: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By NVML's list, which is given here, and the lock files."""
    monkeypatch.setattr(gpu_holds_module, "visible_gpus", lambda: FOUR[:2])
    with take("tonight"):
        first, second = gpu_holds()
    assert first.held_by is not None
    assert first.held_by.startswith("run tonight (pid ")
    assert (second.index, second.held_by) == (1, None)


def test_a_look_at_a_free_gpu_does_not_lock_it(take: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that starts at that moment would find it held."""
    locked: list[int] = []
    with take("first"):
        pass
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, _: locked.append(descriptor))
    assert holders(["GPU-0", "GPU-1"]) == {}
    assert locked == []


def test_status_shows_no_gpu_where_lock_files_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the folder cannot be made or a file cannot be opened: runs say so."""
    monkeypatch.setattr(gpu_holds_module, "visible_gpus", lambda: FOUR[:1])
    (tmp_path / "note").write_text(
        Holder(pid=1, host="h", run_id="r", since=datetime.now(UTC)).model_dump_json()
    )
    (tmp_path / "GPU-0.lock").symlink_to("note")
    for folder in (tmp_path, tmp_path / "note" / "below"):
        monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
        assert gpu_holds() == ()


def test_the_stack_comes_up_beside_a_driver_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker takes one run, which says so."""

    def no_answer() -> None:
        raise EnvironmentNotReadyError("no answer", why="-", next_command="nvidia-smi")

    monkeypatch.setattr(services, "visible_gpus", no_answer)
    command = services.command("worker", services.Layout(tmp_path, 1, 2), sys.executable)
    assert command[command.index("--limit") + 1] == "1"


@pytest.mark.parametrize("gpus", ["auto", "0,1"])
def test_each_of_several_hosts_gives_a_number_of_gpus(gpus: str) -> None:
    """What is free or an index here says nothing of another host."""
    assert parse_config({"hosts": 2, "gpus": "4"}).hosts == 2
    with pytest.raises(ConfigError, match="with 2 hosts gpus is the number of GPUs"):
        parse_config({"hosts": 2, "gpus": gpus})
