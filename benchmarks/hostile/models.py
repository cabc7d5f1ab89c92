"""Hostile model folders, as `model_name` takes them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from support.hostile_models import HARMED_MODELS, change_json

from benchmarks.hostile.case import Case

FOLDER = "model"


def resolve_folder(inside: Path) -> str:
    """Resolve the model, as the first stage of a run does."""
    from qwen3ft.config import TrainingConfig
    from qwen3ft.model.hub import resolve_model

    resolve_model(TrainingConfig(model_name=str(inside / FOLDER)))
    return ""


def _quantize(inside: Path) -> str:
    """Load the model and quantise it: nothing that lies beside it may be run."""
    from qwen3ft.config import TrainingConfig
    from qwen3ft.model.hub import resolve_model
    from qwen3ft.model.manager import ModelManager
    from qwen3ft.records.requests import QuantizeRequest

    config = TrainingConfig(model_name=str(inside / FOLDER), cache_dir=str(inside / "cache"))
    request = QuantizeRequest(
        config=config,
        source=resolve_model(config),
        source_path=str(inside / FOLDER),
        target=str(inside / "snapshot"),
        device="cpu",
    )
    ModelManager(config).quantize(request)
    return ""


def _build(inside: Path, harm: Callable[[Path], object]) -> None:
    from qwen3ft.embedded import MODEL_DIR

    # Below another folder, so that what harm puts beside the model stays inside.
    shutil.copytree(MODEL_DIR, inside / FOLDER)
    harm(inside / FOLDER)


def _pickle(folder: Path) -> None:
    canary = folder.parents[1] / "canary"
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode())


def _code(folder: Path) -> None:
    canary = folder.parents[1] / "canary"
    for name in ("modeling_qwen3.py", "configuration_qwen3.py", "__init__.py", "sitecustomize.py"):
        (folder / name).write_text(f"open({str(canary)!r}, 'w')")


def _other_files(folder: Path) -> None:
    change_json(folder / "config.json", transformers_weights="../x.safetensors", num_labels=10**9)


_NAMES = {
    "a zero byte": "a\0b",
    "5,000 characters": "x" * 5000,
    "a user that is not there": "~nobody-of-that-name/model",
    "a pipe": "/dev/stdin",
    "parents": "../../../../../../etc",
    "three parts": "a/b/c",
}


def _resolve(_: Path, name: str) -> str:
    from qwen3ft.config import parse_config
    from qwen3ft.model.hub import resolve_model

    resolve_model(parse_config({"model_name": name}))
    return ""


_IMPORTS = ("transformers", "qwen3ft.model.lean_bitsandbytes", "qwen3ft.model.manager")

CASES = (
    *(
        Case(f"model: {name}", "model", partial(_build, harm=harm), resolve_folder)
        for name, harm in HARMED_MODELS.items()
    ),
    *(
        Case(f"model: {name}", "model", partial(_build, harm=harm), _quantize, _IMPORTS, harmless)
        for name, harm, harmless in (
            ("pickles beside it", _pickle, "only safetensors are read"),
            ("code beside it", _code, "no code of a model is imported"),
            ("settings of other files", _other_files, "unknown settings are not passed on"),
        )
    ),
    *(
        Case(f"model name: {name}", "model", lambda _: None, partial(_resolve, name=text))
        for name, text in _NAMES.items()
    ),
)
