"""The setting `gpus`: which GPUs a run may take, and how many of them.

The GPUs of one training are of one kind, since its ranks wait for the slowest. A run on a CPU is
the embedded model's; there the setting is a number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from qwen3ft.config import AUTO_GPUS, TrainingConfig
from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.records.machine import EnvironmentReport, GpuInfo
from qwen3ft.units import GIB, size_text

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class GpuChoice:
    """GPUs that a run may take, in the order of preference."""

    gpus: tuple[GpuInfo, ...]
    count: int | None
    """Number to take; None for all that are free, one at least."""


def choose_gpus(config: TrainingConfig, gpus: Sequence[GpuInfo]) -> GpuChoice:
    """Return the GPUs that the setting `gpus` allows, those with the budget free first.

    Raises:
        EnvironmentNotReadyError: there are fewer of one kind than asked for, or not those named.
    """
    wanted = config.gpus
    if wanted == AUTO_GPUS:
        return GpuChoice(_by_room(config, _kinds(gpus)[0]), None)
    if wanted.isdecimal():
        return GpuChoice(_by_room(config, _enough(int(wanted), gpus)), int(wanted))
    named = tuple(_find(name, gpus) for name in wanted.split(",") if name)
    if len({gpu.uuid for gpu in named}) < len(named):
        raise _refusal(f"gpus names one GPU twice: {wanted}", "A rank needs its own.", gpus)
    if len(kinds := _kinds(named)) > 1:
        raise _refusal(
            f"gpus names different GPUs: {_text([kind[0] for kind in kinds])}.",
            "The ranks of a training wait for the slowest, and share one plan.",
            gpus,
        )
    return GpuChoice(named, len(named))


def rank_count(config: TrainingConfig, environment: EnvironmentReport) -> int:
    """Return the number of ranks of a run on each of its hosts, if all GPUs there are free.

    Raises:
        EnvironmentNotReadyError: the machine does not have what the setting `gpus` asks for.
    """
    if environment.gpus:
        choice = choose_gpus(config, environment.gpus)
        return choice.count or len(choice.gpus)
    if config.gpus in (AUTO_GPUS, "1") and config.hosts == 1:
        return 1
    if config.gpus.isdecimal() and config.is_embedded:
        return int(config.gpus)  # to see every stage of it on any machine
    raise _refusal(
        f"gpus is {config.gpus}, hosts is {config.hosts}, and no GPU is visible.",
        "Without a GPU only the embedded model is trained in several processes.",
        (),
    )


@contextmanager
def only_visible(held: Sequence[str], gpus: Sequence[GpuInfo]) -> Iterator[None]:
    """Let this process and those it starts see the GPUs `held` alone; `gpus` are all they saw."""
    before = os.environ.get(VISIBLE)
    if list(held) == [gpu.uuid for gpu in gpus]:
        yield
        return
    os.environ[VISIBLE] = ",".join(held)
    try:
        yield
    finally:
        os.environ.pop(VISIBLE)
        if before is not None:
            os.environ[VISIBLE] = before


def _kinds(gpus: Sequence[GpuInfo]) -> list[list[GpuInfo]]:
    """Group GPUs by what they are; the first GPU's kind comes first."""
    kinds: dict[tuple[str, int], list[GpuInfo]] = {}
    for gpu in gpus:
        kinds.setdefault((gpu.name, gpu.total_bytes), []).append(gpu)
    return list(kinds.values())


def _enough(count: int, gpus: Sequence[GpuInfo]) -> list[GpuInfo]:
    """Return the first kind of which there are `count`."""
    kinds = _kinds(gpus)
    if count > len(gpus):
        why = "It has no more, or CUDA_VISIBLE_DEVICES hides some."
        raise _refusal(f"gpus is {count}, and this machine has {_text(gpus)}.", why, gpus)
    found = next((kind for kind in kinds if len(kind) >= count), None)
    if found is None:
        raise _refusal(
            f"gpus is {count}, and this machine has {_text(gpus)}: not {count} of one kind.",
            "The ranks of a training wait for the slowest, and share one plan.",
            gpus,
        )
    return found


def _find(name: str, gpus: Sequence[GpuInfo]) -> GpuInfo:
    found = [gpu for gpu in gpus if name in (str(gpu.index), gpu.uuid)]
    if not found:
        raise _refusal(
            f"gpus names {name}, and this machine has {_text(gpus)}.",
            "A GPU is named by its index in nvidia-smi or by its UUID.",
            gpus,
        )
    return found[0]


def _by_room(config: TrainingConfig, gpus: Sequence[GpuInfo]) -> tuple[GpuInfo, ...]:
    # Another program may fill the first GPU while the next one idles.
    budget_bytes = config.max_memory_gb * GIB
    return tuple(sorted(gpus, key=lambda gpu: gpu.free_bytes < budget_bytes))


def _text(gpus: Sequence[GpuInfo]) -> str:
    counts = {gpu.name: [other.name for other in gpus].count(gpu.name) for gpu in gpus}
    sizes = {gpu.name: size_text(gpu.total_bytes, 0) for gpu in gpus}
    return ", ".join(f"{count} x {name} ({sizes[name]})" for name, count in counts.items())


def _refusal(what: str, why: str, gpus: Sequence[GpuInfo]) -> EnvironmentNotReadyError:
    most = max(map(len, _kinds(gpus)), default=1)
    return EnvironmentNotReadyError(
        what,
        why=why,
        next_command=f"qwen3ft run --set gpus={most}",
        gpus=[gpu.uuid for gpu in gpus],
    )
