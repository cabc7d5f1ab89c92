"""A few rows of the embedded model, and trainers composed for plans over them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qwen3ft.data.pipeline import DataPipeline
from qwen3ft.embedded import DATA_DIR
from qwen3ft.jobs.folders import JobDir
from qwen3ft.jobs.heartbeat import StopRequest
from qwen3ft.machine.memory import MemoryOptimizer
from qwen3ft.model.adapter import LoRAAdapter, plan_adapter
from qwen3ft.model.manager import ModelManager
from qwen3ft.planning.plan import build_plan

ROWS = {"train": 48, "dev": 12, "test": 4}
"""Rows of each split: an epoch is 3 steps of 16."""

Compose = Callable[..., tuple[Any, Any]]


@pytest.fixture(scope="session")
def plan_in(
    make_config: Any, environment: Any, snapshot: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """Return a function that plans the first attempt of a run in a folder."""
    folder = tmp_path_factory.mktemp("few-rows")
    for split, rows in ROWS.items():
        lines = (DATA_DIR / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{split}.jsonl").write_text("".join(lines[:rows]), encoding="utf-8")
    paths = {
        name: (str(folder / f"{split}.jsonl"),)
        for name, split in (("data_paths", "train"), ("dev_paths", "dev"), ("test_paths", "test"))
    }
    manifest = DataPipeline(make_config(**paths)).prepare(snapshot, folder / "data")
    assert manifest.train.rows == ROWS["train"]

    def make(folder: Path, run: str = "run", dropout: float = 0.0, **changes: Any) -> Any:
        config = make_config(lora_dropout=dropout)
        adapter = plan_adapter(config, snapshot.shape)
        plan = build_plan(config, environment, snapshot, adapter, manifest)
        plan = plan.for_run(run, str(folder / run), attempt=1, resume_from=None)
        return plan.with_settings(**changes)

    return make


@pytest.fixture
def make_plan(plan_in: Any, tmp_path: Path) -> Callable[..., Any]:
    """Return a function that plans a run in the test's folder."""
    return partial(plan_in, tmp_path)


@pytest.fixture(scope="session")
def compose_for(make_config: Any) -> Compose:
    """Return a function that composes engine and trainer for a plan, as the worker does."""
    from datasets import DatasetDict
    from transformers import set_seed

    from qwen3ft.data.token_table import load_split
    from qwen3ft.training.engine import TrainingEngine

    def compose(plan: Any, ranks: Any = None) -> tuple[Any, Any]:
        set_seed(plan.seed)
        manager = ModelManager(make_config())
        model, tokenizer = manager.load_model_with_quantization(plan.model.path)
        model = manager.prepare_for_training(
            model, gradient_checkpointing=plan.memory.gradient_checkpointing
        )
        adapted = LoRAAdapter(plan.adapter).apply_lora(model)
        splits = {name: load_split(Path(plan.dataset.path), name) for name in ("train", "dev")}
        job = JobDir(Path(plan.run_dir) / "attempts" / f"{plan.attempt:02d}")
        if ranks is not None and ranks.rank > 0:
            job = job.rank(ranks.rank)
        job.create(plan)
        engine = TrainingEngine(
            plan,
            job,
            collator=DataPipeline(make_config()).create_data_collator(tokenizer),
            memory=MemoryOptimizer(plan.max_memory_gb, plan.device),
            stop=StopRequest(),
            ranks=ranks,
        )
        trainer = engine.create_trainer(adapted, DatasetDict(splits), engine.create_training_args())
        return engine, trainer

    return compose


@pytest.fixture
def compose(compose_for: Compose, make_plan: Any) -> Compose:
    """Return a function that composes engine and trainer for a run with some settings."""
    return lambda run="run", **changes: compose_for(make_plan(run, **changes))
