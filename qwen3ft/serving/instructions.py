"""What stands beside an export: how vLLM and Ollama are started with it.

Guarantees: the Ollama template of each known chat template is tested to render conversations as
that template does (`tests/serving/test_instructions.py`: by Go's own engine where there is one).
Where the chat template is none of them, no Modelfile is written. Neither server is started by any
test: their options are those of their documentation. Tools are not offered by the Ollama templates:
Ollama writes schemas in another spacing than the one trained.
"""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path
from typing import Any

from qwen3ft.chat.templates import END_TOKEN, KNOWN_TEMPLATES
from qwen3ft.records.requests import ParityReport

MODELFILE, SERVING = "Modelfile", "SERVING.md"

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's --max-lora-rank takes (vllm/config/lora.py)."""

_TURNS = """\
{{- $asked := -1 }}{{ $last := -1 }}
{{- range $at, $_ := .Messages }}{{ $last = $at -}}
{{ if eq .Role "user" }}{{ $asked = $at }}{{ end }}{{ end }}
{{- if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}
{{- range $at, $_ := .Messages }}
{{- if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
%s{{ .Content }}<|im_end|>
{{ end }}
{{- end }}<|im_start|>assistant
"""

_REASONING = """\
{{ if and (gt $at $asked) (or .Thinking (eq $at $last)) }}<think>
{{ .Thinking }}
</think>

{{ end }}"""

_EMPTY_BLOCK = "<think>\n\n</think>\n\n"
_THINK_IF_ASKED = "{{ if not .Think }}" + _EMPTY_BLOCK + "{{ end }}"
_THINK_UNLESS_REFUSED = "{{ if and .IsThinkSet (not .Think) }}" + _EMPTY_BLOCK + "{{ end }}"


def ollama_template(name: str, *, thinking: bool) -> str | None:
    """Ollama's form (Go) of the chat template `name` of `KNOWN_TEMPLATES`; None for any other.

    Args:
        name: Whose template it is.
        thinking: Whether the adapter was trained to think first; if not, thinking is off until it
            is asked for, as in training.
    """
    if name == "Qwen3-Instruct-2507":
        return _TURNS % ""
    if name == "Qwen3-Thinking-2507":
        return _TURNS % _REASONING + "<think>\n"
    if name in KNOWN_TEMPLATES.values():
        return _TURNS % _REASONING + (_THINK_UNLESS_REFUSED if thinking else _THINK_IF_ASKED)
    return None


def write_serving_files(folder: Path, card: dict[str, Any], report: ParityReport) -> None:
    """Write SERVING.md, and a Modelfile if there is a template for it, into the export `folder`.

    Args:
        folder: With `merged` and `adapter` in it.
        card: The adapter's run card.
        report: What comparing the forms gave.
    """
    stored = folder / "merged" / "chat_template.jinja"
    text = stored.read_bytes() if stored.is_file() else b""
    name = KNOWN_TEMPLATES.get(hashlib.sha256(text).hexdigest(), "")
    template = ollama_template(name, thinking=report.thinking)
    if template is not None:
        modelfile = _modelfile(template, card)
        (folder / MODELFILE).write_text(modelfile, encoding="utf-8")
    serving = _serving(card, report, name if template is not None else "")
    (folder / SERVING).write_text(serving, encoding="utf-8")


def _modelfile(template: str, card: dict[str, Any]) -> str:
    return f'''# ollama create NAME -f Modelfile      (in this folder)
FROM ./merged
TEMPLATE """{template}"""
PARAMETER stop "{END_TOKEN}"
# as it was tested: greedy, and no longer than that
PARAMETER temperature 0
PARAMETER num_predict {card["config"]["max_new_tokens"]}
'''


def vllm_lora_command(card: dict[str, Any], adapter: str) -> str:
    """The command that serves the base model with the adapter on it."""
    base = card["base"]
    rank = card["plan"]["adapter"]["r"]
    allowed = next((limit for limit in VLLM_RANKS if limit >= rank), rank)
    revision = [] if base["local_path"] else ["--revision", base["revision"]]
    words = [
        *("vllm", "serve", base["local_path"] or base["model_name"], *revision),
        *("--enable-lora", "--max-lora-rank", str(allowed)),
        *("--lora-modules", f"{card['run_id']}={adapter}"),
        *("--chat-template", f"{adapter}/chat_template.jinja"),
    ]
    return shlex.join(words)


def _serving(card: dict[str, Any], report: ParityReport, template_name: str) -> str:
    rows = "\n".join(
        f"| {score.form} | {score.exact_match:.1%} | {score.answer_loss:.4f} "
        f"| {score.loss_drift:+.4f} | {score.same_answers:.1%} | {score.lost_answers:.1%} |"
        for score in report.scores
    )
    degraded = "; ".join(card.get("degraded", ())) or "no"
    return f"""# Run {card["run_id"]}, merged into {card["base"]["model_name"]}

Compared on {report.rows} held-out rows, greedy, before this folder was made. Limits: answer loss
{report.max_loss_drift:+g} nats per token, {report.max_lost_answers:.1%} of the rows.
Degraded: {degraded}.

| form | exact match | answer loss | drift | same answers | lost answers |
|---|---|---|---|---|---|
{rows}

"adapter" is what was tested and promoted: the adapter on weights in 4 bits
({card["base"]["quantization"]}).

## vLLM

The adapter on the base model, which other adapters can share:

```
{vllm_lora_command(card, "./adapter")}
```

The merged model:

```
vllm serve ./merged --served-model-name {card["run_id"]}
```

{_ollama(template_name)}
"""


def _ollama(template_name: str) -> str:
    if not template_name:
        return """## Ollama

There is no Modelfile: the chat template in `merged` is none of those that an Ollama template was
tested against."""
    return f"""## Ollama

```
ollama create NAME -f Modelfile
```

Ollama takes no safetensors adapter for Qwen3, so the Modelfile starts from `merged`. Versions that
answer "unsupported architecture" need the file that llama.cpp's `convert_hf_to_gguf.py merged`
makes; put its name after FROM. The template renders as the chat template of {template_name} does:
system prompt, turns, reasoning, thinking on and off. Not covered: tools, system messages after the
first turn, and several messages of one role in a row, which Ollama joins.
"""
