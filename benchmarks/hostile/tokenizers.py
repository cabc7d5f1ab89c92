"""Hostile tokenizers and chat templates, at their first use."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from support.hostile_tokenizers import (
    BROKEN_TEMPLATES,
    CHANGED_TOKENIZERS,
    RUNAWAY_TEMPLATES,
    TRIGGERS,
    UNREADABLE_TOKENIZERS,
    change_tokenizer,
    runs_away_on,
    with_template,
)

from benchmarks.hostile.case import Case

FOLDER = "model"


def use_first(inside: Path) -> str:
    """Try the tokenizer in a worker, before anything else of a run."""
    from qwen3ft.config import TrainingConfig
    from qwen3ft.model.tokenizer_trial import try_tokenizer

    config = TrainingConfig(model_name="x/y", cache_dir=str(inside / "cache"))
    try_tokenizer(config, inside / FOLDER)
    return ""


def _build(inside: Path, harm: Callable[[Path], object]) -> None:
    from qwen3ft.embedded import MODEL_DIR

    shutil.copytree(MODEL_DIR, inside / FOLDER)
    harm(inside / FOLDER)


def _case(name: str, kind: str, harm: Callable[[Path], object]) -> Case:
    return Case(f"{kind}: {name}", kind, partial(_build, harm=harm), use_first)


def _written(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)


def _changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    change_tokenizer(folder, change)


CASES = (
    *(
        _case(name, "template", partial(with_template, text=text))
        for name, text in {**RUNAWAY_TEMPLATES, **BROKEN_TEMPLATES}.items()
    ),
    *(
        _case(
            f"runs away on {trigger}",
            "template",
            partial(with_template, text=runs_away_on(trigger)),
        )
        for trigger in TRIGGERS
    ),
    *(
        _case(name, "tokenizer", partial(_written, text=text))
        for name, text in UNREADABLE_TOKENIZERS.items()
    ),
    *(
        _case(name, "tokenizer", partial(_changed, change=change))
        for name, change in CHANGED_TOKENIZERS.items()
    ),
)
