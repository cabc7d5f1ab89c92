"""The LoRA adapter of a model: all seven projections of every block, on a frozen 4-bit base.

Low-rank adaptation: Hu et al. 2021, arXiv:2106.09685; on a 4-bit base: Dettmers et al. 2023,
arXiv:2305.14314. Embeddings, norms and the output head have no adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen3ft.errors import ConfigError
from qwen3ft.model.shapes import plan_adapter
from qwen3ft.records.model import AdapterSpec

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

__all__ = ["LoRAAdapter", "plan_adapter"]


class LoRAAdapter:
    """The adapter of `spec`, to attach to a model."""

    def __init__(self, spec: AdapterSpec) -> None:
        self.spec = spec

    def create_lora_config(self) -> LoraConfig:
        """Return PEFT's configuration; B starts at zero, so training starts from the base model."""
        from peft import LoraConfig

        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.spec.r,
            lora_alpha=self.spec.alpha,
            lora_dropout=self.spec.dropout,
            bias="none",
            target_modules=list(self.spec.target_modules),
        )

    def apply_lora(self, model: PreTrainedModel) -> PeftModel:
        """Attach a new adapter; afterwards only its parameters (fp32) require gradients.

        Raises:
            ConfigError: the adapter does not have the planned number of parameters.
        """
        from peft import get_peft_model

        adapted = get_peft_model(model, self.create_lora_config())
        trainable = self.get_trainable_params_info(adapted)["trainable"]
        if trainable != self.spec.trainable_parameters:
            raise ConfigError(
                f"The adapter has {trainable:,} parameters instead of the "
                f"{self.spec.trainable_parameters:,} planned.",
                why="The model's layers do not match its config.json.",
                next_command="qwen3ft doctor",
            )
        return adapted

    def get_trainable_params_info(self, model: PeftModel) -> dict[str, int]:
        """Return {'trainable': parameters of the adapter, 'total': with the model's}."""
        # PEFT counts the two parameters in each byte of a 4-bit weight.
        trainable, total = model.get_nb_trainable_parameters()
        return {"trainable": trainable, "total": total}
