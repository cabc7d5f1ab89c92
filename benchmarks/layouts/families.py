"""Tokenizers with the chat templates of the three families, and one of a base model without any.

The vocabulary is the embedded model's. The templates of Qwen3 and Qwen3-Instruct-2507 are the
published files, which the package trl carries; that of Qwen3-Thinking-2507 is Qwen3's without the
switch for thinking, and with a generation prompt that opens the think block.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from qwen3ft.chat.tokenizer import configure_tokenizer
from qwen3ft.embedded import MODEL_DIR

_SWITCH = r"""
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}"""
_PROMPT = r"{{- '<|im_start|>assistant\n' }}"
_OPEN_PROMPT = r"{{- '<|im_start|>assistant\n<think>\n' }}"


def published(name: str) -> str:
    """Read a template that trl ships, without importing trl."""
    spec = find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "chat_templates" / name).read_text(encoding="utf-8")


def families() -> dict[str, tuple[Any, Any]]:
    """Return, by family, the product's tokenizer and that of the reference.

    A base model's has no template: the product adds one, and the reference has Qwen3's.
    """
    qwen3 = published("qwen3.jinja")
    assert qwen3.count(_PROMPT + _SWITCH) == 1
    templates = {
        "Qwen3": qwen3,
        "Instruct-2507": published("qwen3_instruct_2507.jinja"),
        "Thinking-2507": qwen3.replace(_PROMPT + _SWITCH, _OPEN_PROMPT),
        "Base": None,
    }
    made = {}
    for name, template in templates.items():
        ours, theirs = (AutoTokenizer.from_pretrained(MODEL_DIR) for _ in range(2))
        ours.chat_template, theirs.chat_template = template, template or qwen3
        configure_tokenizer(ours)
        made[name] = (ours, theirs)
    return made
