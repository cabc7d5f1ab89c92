"""SERVING.md and the Modelfile of an export: how to serve it with vLLM and Ollama.

Each Ollama template is tested to render conversations like its chat template; for any other chat
template no Modelfile is written. No test starts either server: the options are those of their
documentation.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from qwen3ft.chat.templates import END_TOKEN, KNOWN_TEMPLATES, identify_text
from qwen3ft.model.saved_adapter import was_trained_to_think
from qwen3ft.records.requests import ParityReport

MODELFILE, SERVING = "Modelfile", "SERVING.md"

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for --max-lora-rank (vllm/config/lora.py)."""

# Without tools: Ollama writes their schemas in another spacing than the one trained.
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
    """Return the chat template `name` of `KNOWN_TEMPLATES` in Ollama's language (Go), else None.

    Args:
        name: Name of the chat template.
        thinking: True if the adapter was trained to think first; if not, thinking is off unless
            the user asks for it.
    """
    if name == "Qwen3-Instruct-2507":
        return _TURNS % ""
    if name == "Qwen3-Thinking-2507":
        return _TURNS % _REASONING + "<think>\n"
    if name in KNOWN_TEMPLATES.values():
        return _TURNS % _REASONING + (_THINK_UNLESS_REFUSED if thinking else _THINK_IF_ASKED)
    return None


def write_serving_files(folder: Path, provenance: dict[str, Any], report: ParityReport) -> None:
    """Write SERVING.md, and a Modelfile if the template is known, into the export `folder`.

    Args:
        folder: Contains `merged` and `adapter`.
        provenance: The adapter's `provenance.json`.
        report: Comparison of the forms.
    """
    stored = folder / "merged" / "chat_template.jinja"
    text = stored.read_text(encoding="utf-8") if stored.is_file() else ""
    name = identify_text(text).name
    template = ollama_template(name, thinking=report.thinking)
    if template is not None:
        modelfile = _modelfile(template, provenance)
        (folder / MODELFILE).write_text(modelfile, encoding="utf-8")
    serving = _serving(provenance, report, name if template is not None else "")
    (folder / SERVING).write_text(serving, encoding="utf-8")


def _modelfile(template: str, provenance: dict[str, Any]) -> str:
    return f'''# ollama create NAME -f Modelfile      (in this folder)
FROM ./merged
TEMPLATE """{template}"""
PARAMETER stop "{END_TOKEN}"
# as in the test: greedy, and at most this many tokens
PARAMETER temperature 0
PARAMETER num_predict {provenance["config"]["max_new_tokens"]}
'''


def vllm_lora_command(provenance: dict[str, Any], adapter: str) -> str:
    """Return the command that serves the base model with the adapter on it."""
    base = provenance["base"]
    rank = provenance["plan"]["adapter"]["r"]
    allowed = next((limit for limit in VLLM_RANKS if limit >= rank), rank)
    revision = [] if base["local_path"] else ["--revision", base["revision"]]
    words = [
        *("vllm", "serve", base["local_path"] or base["model_name"], *revision),
        *("--enable-lora", "--max-lora-rank", str(allowed)),
        *("--lora-modules", f"{provenance['run_id']}={adapter}"),
        *("--chat-template", f"{adapter}/chat_template.jinja"),
        *("--generation-config", adapter),
    ]
    return shlex.join(words)


def _serving(provenance: dict[str, Any], report: ParityReport, template_name: str) -> str:
    rows = "\n".join(
        f"| {score.form} | {score.exact_match:.1%} | {score.answer_loss:.4f} "
        f"| {score.loss_drift:+.4f} | {score.same_answers:.1%} | {score.lost_answers:.1%} |"
        for score in report.scores
    )
    degraded = "; ".join(provenance.get("degraded", ())) or "no"
    return f"""# Run {provenance["run_id"]}, merged into {provenance["base"]["model_name"]}

Compared on {report.rows} held-out rows with greedy decoding, before this folder was written.
Limits: answer loss {report.max_loss_drift:+g} nats per token, {report.max_lost_answers:.1%} lost
answers.
Degraded: {degraded}.

| form | exact match | answer loss | drift | same answers | lost answers |
|---|---|---|---|---|---|
{rows}

"adapter" is the form that was tested and promoted: the adapter on 4-bit weights
({provenance["base"]["quantization"]}). A lost answer is one that only the adapter gets right.

A request that sets nothing is prompted as the adapter was trained ({_prompting(provenance)}) and
decoded as in the test, greedily: the chat template and `generation_config.json` beside the weights
say so. A request may set `temperature`, or switch thinking by `chat_template_kwargs`:
`{{"enable_thinking": true}}`.

## vLLM

The adapter on the base model, which other adapters can share:

```
{vllm_lora_command(provenance, "./adapter")}
```

The merged model:

```
vllm serve ./merged --served-model-name {provenance["run_id"]}
```

{_ollama(template_name)}
"""


def _prompting(provenance: dict[str, Any]) -> str:
    return "thinking first" if was_trained_to_think(provenance) else "without thinking"


def _ollama(template_name: str) -> str:
    if not template_name:
        return """## Ollama

There is no Modelfile, because the chat template in `merged` is not one of those that have a tested
Ollama template."""
    return f"""## Ollama

```
ollama create NAME -f Modelfile
```

Ollama does not load safetensors adapters for Qwen3, so the Modelfile starts from `merged`. If your
version answers "unsupported architecture", convert the model with llama.cpp's
`convert_hf_to_gguf.py merged` and put the name of the resulting file after FROM. The template
renders like the chat template of {template_name}: system prompt, turns, reasoning, thinking on and
off. Not covered: tools, system messages after the first turn, and several messages of one role in a
row, which Ollama joins.
"""
