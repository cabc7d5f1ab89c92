"""Makes the model of a shape once: random weights, quantised to 4 bits by the product itself.

All contestants load the same 4-bit files. The 16-bit weights are deleted after quantisation.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.speed.cases import SHAPES, TINY

SHARED_MEMORY = Path("/dev/shm")


def prepare(shape: str, work: Path, seed: int) -> dict[str, Any]:
    """Return the snapshot of `shape` in `work`; make it if it is missing or damaged."""
    import torch

    from qwen3ft.config import TrainingConfig
    from qwen3ft.model.hub import resolve_model
    from qwen3ft.model.manager import ModelManager, read_snapshot
    from qwen3ft.records.requests import QuantizeRequest

    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = work / "models" / f"{shape}-{device}-{seed}"
    snapshot = read_snapshot(target) if target.exists() else None
    made = snapshot is None
    if snapshot is None:
        with tempfile.TemporaryDirectory(
            dir=_scratch_parent(shape, work), prefix="speed-"
        ) as scratch:
            folder = Path(scratch)
            if shape != TINY:
                make_random_model(folder, SHAPES[shape], seed)
            config = TrainingConfig(
                model_name="embedded" if shape == TINY else str(folder),
                quantization=("nf4-double",),
            )
            source = resolve_model(config)
            snapshot = ModelManager(config).quantize(
                QuantizeRequest(
                    config=config,
                    source=source,
                    source_path=source.local_path or str(folder),
                    target=str(target),
                    device="cuda" if device == "cuda" else "cpu",
                )
            )
    return {
        "snapshot": snapshot.model_dump(mode="json"),
        "made": made,
        "seconds": time.monotonic() - started,
    }


def make_random_model(folder: Path, sizes: dict[str, Any], seed: int) -> None:
    """Save random bf16 weights of these sizes in `folder`, with the embedded model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from qwen3ft.embedded import MODEL_DIR

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    config = Qwen3Config(
        **sizes,
        rope_parameters={"rope_type": "default", "rope_theta": 5_000_000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3ForCausalLM(config)
    torch.set_default_dtype(before)
    model.save_pretrained(folder, max_shard_size="4GB")
    tokenizer.save_pretrained(folder)
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _scratch_parent(shape: str, work: Path) -> Path:
    """Return the folder for 16-bit weights: /dev/shm if they fit three times, else `work`."""
    import psutil

    from qwen3ft.records.model import ModelShape

    needed = 0 if shape == TINY else 2 * ModelShape(**_fields(shape)).total_parameters
    if SHARED_MEMORY.is_dir():
        room = min(shutil.disk_usage(SHARED_MEMORY).free, psutil.virtual_memory().available)
        if room > 3 * needed:
            return SHARED_MEMORY
    work.mkdir(parents=True, exist_ok=True)
    return work


def _fields(shape: str) -> dict[str, Any]:
    return {key: value for key, value in SHAPES[shape].items() if key != "rms_norm_eps"}
