"""A model and its adapter: shape, source, quantised snapshot, LoRA targets, saved folder."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qwen3ft.records.base import Record

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
PROJECTIONS = (*ATTENTION_PROJECTIONS, "gate_proj", "up_proj", "down_proj")
"""Linear layers of a Qwen3 block; all seven get an adapter."""


def projection_sizes(
    hidden: int, intermediate: int, query: int, key: int
) -> dict[str, tuple[int, int]]:
    """Return (output, input) features of each of the seven projections of one layer.

    Args:
        hidden: Features of the residual stream.
        intermediate: Features within the MLP.
        query: Features of all query heads.
        key: Features of all key heads, and of all value heads.
    """
    return {
        "q_proj": (query, hidden),
        "k_proj": (key, hidden),
        "v_proj": (key, hidden),
        "o_proj": (hidden, query),
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }


class ModelShape(Record):
    """Numbers of a Qwen3 config.json that sizes are computed from."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int

    @property
    def query_features(self) -> int:
        """Features of all query heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_features(self) -> int:
        """Features of all key heads, and of all value heads."""
        return self.num_key_value_heads * self.head_dim

    def projection_sizes(self) -> dict[str, tuple[int, int]]:
        """Return (output, input) features of each of the seven projections of one layer."""
        return projection_sizes(
            self.hidden_size, self.intermediate_size, self.query_features, self.key_features
        )

    @property
    def linear_parameters(self) -> int:
        """Weights of all projections of all layers (those that are quantised)."""
        per_layer = sum(out * inp for out, inp in self.projection_sizes().values())
        return per_layer * self.num_hidden_layers

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding and, if it is separate, the output head."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def total_parameters(self) -> int:
        """All weights, norms included."""
        per_layer = 2 * self.hidden_size + 2 * self.head_dim
        norms = per_layer * self.num_hidden_layers + self.hidden_size
        return self.linear_parameters + self.embedding_parameters + norms


class ModelSource(Record):
    """Pinned origin of a model; two requests with the same one get the same model."""

    model_name: str
    revision: str = Field(description="Hub commit, or sha256 over a local folder's files.")
    local_path: str | None = Field(None, description="The folder, for a local model.")


class ModelSnapshot(Record):
    """Quantised model on disk; the manifest in its folder lists every file."""

    source: ModelSource
    path: str = Field(description="Folder with the 4-bit safetensors, config and tokenizer.")
    manifest_sha256: str
    quantization: str = Field(description="The one of config.quantization that was used.")
    compute_dtype: Literal["bfloat16", "float32"]
    shape: ModelShape
    size_bytes: int
    chat_template_sha256: str
    degraded: tuple[str, ...] = ()


class AdapterSpec(Record):
    """Adapter to train, with parameters counted from the model's shape."""

    r: int
    alpha: int
    dropout: float
    target_modules: tuple[str, ...]
    trainable_parameters: int
    total_parameters: int


class SavedAdapter(Record):
    """Adapter on disk, read back and verified."""

    path: str
    sha256: str = Field(description="sha256 of adapter_model.safetensors.")
    size_bytes: int
    model_name: str
    degraded: tuple[str, ...] = ()
    mlflow_run_id: str | None = None
    registered_model: str | None = None
    version: str | None = Field(None, description="Registry version; None while tracking is down.")
