"""Hostile adapters, named by their folder as `qwen3ft chat`, `promote` and `export` take them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from support.hostile_adapters import HARMED_ADAPTERS

from benchmarks.hostile.case import Case

FOLDER = "night-0"


def open_folder(inside: Path) -> str:
    """Find and verify the adapter; one that is returned would be loaded."""
    from qwen3ft.config import TrainingConfig
    from qwen3ft.registry.lookup import find_adapter
    from qwen3ft.registry.registry import Registry

    find_adapter(TrainingConfig(), Registry("sqlite:///none.db"), str(inside / FOLDER))
    return ""


def _build(inside: Path, harm: Callable[[Path], object]) -> None:
    from support.small_adapter import write_small_adapter

    write_small_adapter(inside / FOLDER)
    harm(inside / FOLDER)


def _pickle(folder: Path) -> None:
    canary = folder.parents[1] / "canary"
    payload = f"cposix\nsystem\n(S'touch {canary}'\ntR."
    (folder / "adapter_model.bin").write_bytes(payload.encode())


def _promote(inside: Path) -> str:
    """Promote by hand: the version's adapter is fetched from MLflow and checked."""
    from support.registered import MODEL, add_version, stored_adapter

    from qwen3ft.disk.files import sha256_file
    from qwen3ft.registry.registry import Registry

    uri = f"sqlite:///{inside / 'mlruns' / 'mlflow.db'}"
    (inside / "mlruns").mkdir()
    version = add_version(uri, inside, FOLDER)
    stored = stored_adapter(inside, FOLDER)
    HARMED_ADAPTERS["weights: NaN"][0](stored)
    registry = Registry(uri)
    found = registry.version(MODEL, version)
    assert found is not None
    digest = sha256_file(stored / "adapter_model.safetensors")
    registry.check(found.model_copy(update={"tags": {**found.tags, "adapter_sha256": digest}}))
    return ""


CASES = (
    *(
        Case(f"adapter: {name}", "adapter", partial(_build, harm=harm), open_folder)
        for name, (harm, _) in HARMED_ADAPTERS.items()
    ),
    Case(
        "adapter: a pickle beside it",
        "adapter",
        partial(_build, harm=_pickle),
        open_folder,
        harmless="only the files of the manifest are read",
    ),
    Case(
        "adapter: NaN, promoted by hand",
        "adapter",
        lambda _: None,
        _promote,
        imports=("mlflow", "support.registered"),
    ),
)
