"""The base model: quantised to 4 bits once, kept on disk, loaded from there by every worker.

bitsandbytes quantises to NF4 with double quantisation, as in QLoRA (Dettmers et al. 2023,
arXiv:2305.14314). All attempts and nights load the same bytes. Loading uses safetensors only, no
network and no code from the model's folder.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3ft.chat.templates import END_TOKEN, template_error
from qwen3ft.chat.tokenizer import declared_end, load_tokenizer
from qwen3ft.disk.files import require_disk, sha256_file, sha256_json
from qwen3ft.disk.manifests import build_folder, find_damage, read_manifest_facts
from qwen3ft.errors import QuantizationError
from qwen3ft.logs import get_logger
from qwen3ft.model.hub import fetch_model, resolve_model
from qwen3ft.model.source_folder import check_model_folder, read_settings
from qwen3ft.records.model import ModelShape, ModelSnapshot, ModelSource
from qwen3ft.records.requests import QuantizeRequest

if TYPE_CHECKING:
    import torch
    from transformers import (
        BitsAndBytesConfig,
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

    from qwen3ft.config import TrainingConfig

logger = get_logger("model")

LAYOUT_VERSION = 1
"""Increment when snapshots of older versions must not be reused."""


def snapshot_target(config: TrainingConfig, source: ModelSource, device: str) -> Path:
    """Return the folder for the quantised form of `source`; it need not exist."""
    digest = sha256_json(
        {
            "layout": LAYOUT_VERSION,
            "source": source.model_dump(exclude={"local_path"}),
            "quantization": config.quantization,
            "device": device,
        }
    )
    slug = "".join(c if c.isalnum() or c in "-." else "-" for c in config.model_name).strip("-.")
    return Path(config.cache_dir).resolve() / "models" / f"{slug[-60:]}-{digest[:16]}"


def read_snapshot(target: Path) -> ModelSnapshot | None:
    """Return the snapshot at `target` if every file matches its manifest, else None.

    A snapshot of an older version that declares another end than the trained one does not count.
    """
    if find_damage(target) is not None or declared_end(target) != END_TOKEN:
        return None
    return _describe(target, read_manifest_facts(target))


class ModelManager:
    """The model that `config` names: fetch, quantise and load it."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config

    def configure_quantization(
        self, setting: str = "nf4-double", compute_dtype: str | None = None
    ) -> BitsAndBytesConfig:
        """Return bitsandbytes' configuration for one of `config.quantization`.

        Args:
            setting: 'nf4-double' (block constants quantised too), 'nf4' or 'fp4'.
            compute_dtype: dtype of matrix products; by default the best of this device.
        """
        import torch
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=setting.partition("-")[0],
            bnb_4bit_use_double_quant=setting.endswith("-double"),
            bnb_4bit_compute_dtype=getattr(torch, compute_dtype or best_compute_dtype()),
        )

    def load_model_with_quantization(
        self, model_name: str
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load a 4-bit model, frozen and in eval mode, and its tokenizer.

        Args:
            model_name: Folder of a snapshot, or any value of `config.model_name`, which is then
                resolved, downloaded and quantised in memory.

        Raises:
            ModelNotFoundError, ModelAccessError, ModelUnavailableError, DownloadError: as in
                `qwen3ft.model.hub`.
            QuantizationError: bitsandbytes cannot quantise the model here.
            TokenizerError: the tokenizer cannot be used.
        """
        folder = Path(model_name)
        if not (folder / "config.json").is_file():
            folder = fetch_model(
                resolve_model(self.config.model_copy(update={"model_name": model_name}))
            )
        stored = read_manifest_facts(folder)
        dtype = stored.get("compute_dtype") or best_compute_dtype()
        settings: dict[str, Any] = {}
        if not stored:
            quantization = self.configure_quantization(self.config.quantization[0], dtype)
            settings = {"quantization_config": quantization, "config": _plain_config(folder)}
        return _load(folder, dtype, settings), load_tokenizer(folder)

    def load_merged(
        self, folder: Path, budget_bytes: int | None = None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load an unquantised bfloat16 model, frozen and in eval mode, and its tokenizer.

        Args:
            folder: Folder that `qwen3ft.serving.merge` wrote.
            budget_bytes: Limit for its weights on a GPU; the rest is offloaded to host memory,
                which is slow.
        """
        settings: dict[str, Any] = {}
        if budget_bytes is not None:
            import psutil

            host_bytes = psutil.virtual_memory().available // 2
            settings = {"device_map": "auto", "max_memory": {0: budget_bytes, "cpu": host_bytes}}
        return _load(folder, "bfloat16", settings), load_tokenizer(folder)

    def prepare_for_training(
        self, model: PreTrainedModel, *, gradient_checkpointing: bool = True
    ) -> PreTrainedModel:
        """Freeze the base model, and set up the recomputation of activations.

        Args:
            model: The 4-bit base model.
            gradient_checkpointing: Recompute the activations of each block in the backward pass.
        """
        # Unlike in PEFT's `prepare_model_for_kbit_training`, nothing is upcast to fp32: norms
        # compute in fp32 anyway, and an fp32 embedding of the 4B model would cost 0.8 GB.
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.config.use_cache = False
        if gradient_checkpointing:
            # The name before transformers 5.23.
            old_name = model.gradient_checkpointing_enable
            enable = getattr(model, "activation_checkpointing_enable", old_name)
            enable({"use_reentrant": False})
            # Checkpointed blocks need one input that requires a gradient; embeddings are frozen.
            model.enable_input_require_grads()
        return model

    def quantize(self, request: QuantizeRequest) -> ModelSnapshot:
        """Quantise into `request.target` with the first of the configured settings that works.

        Raises:
            QuantizationError: none of them works; lists each with its reason.
            ConfigError, TokenizerError: the model or its tokenizer is refused.
            EnvironmentNotReadyError: too little free disk.
        """
        source_path, target = Path(request.source_path), Path(request.target)
        shape = check_model_folder(source_path)
        tokenizer = load_tokenizer(source_path)
        _require_embeddings(tokenizer, shape)
        require_disk(
            target,
            shape.linear_parameters + 4 * shape.embedding_parameters,
            "The quantised model",
            "The disk is too full.",
        )
        dtype = best_compute_dtype()
        problems: dict[str, str] = {}
        for setting in self.config.quantization:
            quantized = self._try_setting(source_path, setting, dtype, problems)
            if quantized is None:
                continue
            _declare_end(quantized, tokenizer.eos_token_id)
            degraded = (f"quantization {setting}",) if problems else ()
            facts = {
                "source": request.source.model_dump(),
                "quantization": setting,
                "compute_dtype": dtype,
                "shape": shape.model_dump(),
                "degraded": list(degraded),
            }

            def fill(folder: Path, model: Any = quantized, tokenizer: Any = tokenizer) -> None:
                model.save_pretrained(folder, max_shard_size="2GB")
                tokenizer.save_pretrained(folder)

            build_folder(target, fill, facts)
            return _describe(target, facts)
        raise QuantizationError(
            f"{request.source.model_name} could not be quantised: "
            + "; ".join(f"{setting}: {problem}" for setting, problem in problems.items()),
            why="bitsandbytes does not support these settings on this machine.",
            next_command="qwen3ft doctor",
            problems=problems,
        )

    def _try_setting(
        self, source_path: Path, setting: str, dtype: str, problems: dict[str, str]
    ) -> PreTrainedModel | None:
        """Return the model quantised by `setting`, or None with the reason in `problems`."""
        import torch

        try:
            config = self.configure_quantization(setting, dtype)
            settings = {"quantization_config": config, "config": _plain_config(source_path)}
            return _load(source_path, dtype, settings)
        except torch.OutOfMemoryError:
            raise
        except (
            RuntimeError,
            ValueError,
            NotImplementedError,
            ImportError,
            AssertionError,
        ) as error:
            problems[setting] = f"{type(error).__name__}: {str(error)[:200]}"
            logger.warning("quantisation %s failed: %s", setting, problems[setting])
            gc.collect()
            return None


def _require_embeddings(tokenizer: PreTrainedTokenizerBase, shape: ModelShape) -> None:
    """Raise TokenizerError if a token has no row in the model's embedding."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= shape.vocab_size:
        raise template_error(
            f"The tokenizer has a token with id {largest:,}, and the model {shape.vocab_size:,} "
            "embeddings.",
            "The tokenizer belongs to another model, or tokens were added to it alone.",
        )


def _declare_end(model: PreTrainedModel, end: int) -> None:
    """Name the trained end token in the model's settings, beside its own."""
    model.config.eos_token_id = end
    if model.generation_config is not None:
        model.generation_config.eos_token_id = with_end(model.generation_config.eos_token_id, end)


def with_end(named: int | list[int] | None, end: int) -> list[int]:
    """Return the end tokens of generation: the trained one first, then those named already."""
    others = [] if named is None else [named] if isinstance(named, int) else named
    return [end, *(token for token in others if token != end)]


def best_compute_dtype() -> str:
    """Return 'bfloat16' on GPUs that have it (Ampere and newer), else 'float32'."""
    import torch

    # float16 would need loss scaling. On a CPU, bfloat16 was slower than float32: 80 against 57 ms
    # a step on the embedded model.

    if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    return "float32"


def keep_trainable_after_eval(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking the 4-bit weights of `model` for inference."""
    from bitsandbytes.nn import Linear4bit

    # On CPUs with AVX512_BF16, bitsandbytes 0.50 repacks a `Linear4bit` in place at the first
    # forward pass in eval mode. The kernel for that layout has no backward, and training afterwards
    # silently lacks most of its gradients (tests/evaluation/test_inference.py).

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _plain_config(folder: Path) -> PretrainedConfig:
    """Return the settings of a model from elsewhere that are known, for transformers."""
    from transformers import Qwen3Config

    return Qwen3Config.from_dict(read_settings(folder))


def _load(folder: Path, dtype: str, settings: dict[str, Any]) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    import qwen3ft.model.lean_bitsandbytes  # noqa: F401  before transformers imports it

    os.environ["HF_HUB_OFFLINE"] = "1"  # all files are on disk by now
    place: Any = {"": 0} if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        attn_implementation="sdpa",
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        **{"device_map": place, **settings},
    )
    keep_trainable_after_eval(model)
    return model.eval()


def _describe(target: Path, facts: dict[str, Any]) -> ModelSnapshot:
    template = target / "chat_template.jinja"
    return ModelSnapshot(
        **facts,
        path=str(target),
        manifest_sha256=sha256_file(target / "manifest.json"),
        size_bytes=sum(path.stat().st_size for path in target.rglob("*") if path.is_file()),
        chat_template_sha256=sha256_file(template) if template.exists() else "",
    )
