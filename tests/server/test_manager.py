"""Engines of the server: each is closed in the end, and none replaces another before its turn."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
from support.finished_run import attach_lora, make_outcome, make_plan, write_checkpoint
from support.served import engines_in_threads
from support.small_adapter import write_small_adapter
from support.trained_adapter import Trained

from qwen3ft.config import TrainingConfig
from qwen3ft.errors import FinetuneError, ModelUnavailableError
from qwen3ft.model.manager import ModelManager
from qwen3ft.model.save_adapter import save_adapter
from qwen3ft.model.shapes import count_adapter_parameters
from qwen3ft.records.serving import ServeRequest
from qwen3ft.server.engines import Engine
from qwen3ft.server.front import Front
from qwen3ft.server.manager import Manager
from qwen3ft.server.served import Served
from qwen3ft.server.sources import Source

pytestmark = pytest.mark.slow

NOBODY = cast(Any, None)
"""No client asks."""

LARGE_RANK = 16


def save_of_rank(trained: Trained, rank: int, folder: Path) -> Path:
    """Save an adapter of another rank, which has learnt nothing."""
    model, _ = ModelManager(trained.config).load_model_with_quantization(trained.snapshot.path)
    checkpoint = write_checkpoint(attach_lora(model, rank), folder / f"rank-{rank}")
    plan = make_plan(trained.snapshot, run_id=f"rank-{rank}")
    weights = count_adapter_parameters(trained.snapshot.shape, rank)
    changes = {"r": rank, "alpha": 2 * rank, "trainable_parameters": weights}
    adapter = plan.adapter.model_copy(update=changes)
    plan = plan.model_copy(update={"adapter": adapter})
    return Path(save_adapter(make_outcome(checkpoint), plan, trained.config).path)


def make_engine(config: TrainingConfig, folder: Path, **changes: Any) -> Engine:
    config = config.model_copy(update=changes)
    request = ServeRequest(
        engine="own", config=config, adapter=str(folder), device="cpu", socket="", slots=2
    )
    return Engine(request)


def is_closed(engine: Engine) -> bool:
    """Return True if nothing of it is left: neither its thread nor its files."""
    thread = engine._thread
    return not (thread and thread.is_alive()) and not engine._job.path.exists()


def test_a_new_engine_in_trouble_is_closed_and_the_old_one_stays(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made for an adapter too large for the first; at last one takes over."""
    engines_in_threads(monkeypatch)
    config = trained.config.model_copy(update={"runs_dir": str(tmp_path)})
    small, large = trained.adapter, save_of_rank(trained, LARGE_RANK, tmp_path)
    first = Source("v1", "1", small)
    makers: list[Callable[[Path], Engine]] = [
        lambda folder: make_engine(config, folder, max_memory_gb=0.5),  # does not start
        lambda _: make_engine(config, small),  # has no room for the adapter
        lambda folder: make_engine(config, folder),  # its version will be refused
    ]

    async def check() -> None:
        front, made = Front(Served("model"), 4), list[Engine]()

        def make(folder: Path) -> Engine:
            made.append(makers[len(made) - 1](folder) if made else make_engine(config, folder))
            return made[-1]

        manager = Manager(front, config, make, probe_rows=0)
        await manager.use(first, NOBODY)
        for number in (2, 3, 4):
            manager.probe_rows = 5 * (number == 4)  # no answers were kept
            with pytest.raises(FinetuneError):
                await manager.use(Source(f"v{number}", str(number), large), NOBODY)
            await asyncio.gather(*manager._leaving)
            assert len(made) == number
            assert is_closed(made[-1])
            assert manager.engine is made[0]
            assert not is_closed(made[0])
        manager.probe_rows = 0
        makers.append(lambda folder: make_engine(config, folder))
        await manager.use(Source("v5", "5", large), NOBODY)
        await asyncio.gather(*manager._leaving)
        assert manager.engine is made[-1]
        assert is_closed(made[0])
        await manager.close()
        assert is_closed(made[-1])

    asyncio.run(check())


def test_an_adapter_that_no_engine_could_load_starts_none(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its base is gone; another engine would take memory, and end in the same error."""
    engines_in_threads(monkeypatch)
    write_small_adapter(tmp_path)

    async def check() -> None:
        made = list[Engine]()

        def make(folder: Path) -> Engine:
            made.append(make_engine(trained.config, folder))
            return made[-1]

        manager = Manager(Front(Served("model"), 4), trained.config, make, probe_rows=0)
        await manager.use(Source("v1", "1", trained.adapter), NOBODY)
        with pytest.raises(ModelUnavailableError):
            await manager.use(Source("v2", "2", tmp_path), NOBODY)
        assert len(made) == 1
        await manager.close()

    asyncio.run(check())


def test_an_engine_that_still_loads_is_closed_at_the_end(trained: Trained) -> None:
    """Ctrl-C does not wait until the first one is there; its worker ends soon after."""

    def workers() -> list[psutil.Process]:
        found = psutil.Process().children(recursive=True)
        return [process for process in found if process.name() == "qwen3ft-serve"]

    async def check() -> None:
        front = Front(Served("model"), 4)
        make = lambda folder: make_engine(trained.config, folder)  # noqa: E731
        manager = Manager(front, trained.config, make, probe_rows=0)
        using = asyncio.create_task(manager.use(Source("v1", "1", trained.adapter), NOBODY))
        while not workers():
            await asyncio.sleep(0.1)
        [engine] = manager._engines
        using.cancel()
        await asyncio.wait([using])
        started = time.monotonic()
        await manager.close()
        assert time.monotonic() - started < 5
        assert not engine._job.path.exists()
        assert engine._thread is not None
        await asyncio.to_thread(engine._thread.join, 120)
        assert not workers()

    asyncio.run(check())
