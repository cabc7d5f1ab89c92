"""The Modelfile of an export, whose template renders as the chat template does, in Go.

Each template is tested with Go's own engine; for chat templates other than the known ones there is
no Modelfile.
"""

from __future__ import annotations

from typing import Any

from qwen3ft.chat.templates import END_TOKEN, KNOWN_TEMPLATES
from qwen3ft.model.saved_adapter import most_answer_tokens, was_trained_to_think
from qwen3ft.serving.names import served_name

# Without tools: Ollama writes their schemas in another spacing than the one trained.
_TURNS = """\
{{- $asked := -1 }}{{ $last := -1 }}
{{- range $at, $_ := .Messages }}{{ $last = $at -}}
{{ if eq .Role "user" }}{{ $asked = $at }}{{ end }}{{ end }}
{{- if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}
{{- range $at, $m := .Messages }}
{{- if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
%s{{ .Content }}<|im_end|>
{{ end }}
{{- end }}<|im_start|>assistant
"""

_REASONING = """\
{{ if and (gt $at $asked) (or %(thinking)s (eq $at $last)) }}<think>
{{ %(thinking)s }}
</think>

{{ end }}"""

# Ollama turns thinking on, for requests that leave it open, where it finds the field .Thinking in
# the loop over messages (InferTags in thinking/template.go). A variable's field it does not see.
_THINKS, _THINKS_UNSEEN = {"thinking": ".Thinking"}, {"thinking": "$m.Thinking"}
_EMPTY_BLOCK = "<think>\n\n</think>\n\n"
_THINK_UNLESS_REFUSED = "{{ if and .IsThinkSet (not .Think) }}" + _EMPTY_BLOCK + "{{ end }}"


def ollama_template(name: str, *, thinking: bool) -> str | None:
    """Return the chat template `name` of `KNOWN_TEMPLATES` in Ollama's language (Go), else None.

    Args:
        name: Name of the chat template.
        thinking: True if the adapter was trained to think first. If not, Ollama does not think,
            and refuses a request that asks for it.
    """
    if name == "Qwen3-Instruct-2507":
        return _TURNS % ""
    if name == "Qwen3-Thinking-2507":
        return _TURNS % (_REASONING % _THINKS) + "<think>\n"
    if name in KNOWN_TEMPLATES.values():
        if thinking:
            return _TURNS % (_REASONING % _THINKS) + _THINK_UNLESS_REFUSED
        return _TURNS % (_REASONING % _THINKS_UNSEEN) + _EMPTY_BLOCK
    return None


def render_modelfile(template_name: str, provenance: dict[str, Any], weights: str) -> str | None:
    """Return the Modelfile for the GGUF file `weights`; None if the chat template is unknown."""
    template = ollama_template(template_name, thinking=was_trained_to_think(provenance))
    if template is None:
        return None
    return f'''# ollama create {served_name(provenance)} -f Modelfile      (in this folder)
FROM ./{weights}
TEMPLATE """{template}"""
PARAMETER stop "{END_TOKEN}"
# as in the test: greedy, and at most this many tokens
PARAMETER temperature 0
PARAMETER num_predict {most_answer_tokens(provenance)}
'''


def describe_ollama(provenance: dict[str, Any], template_name: str, *, has_gguf: bool) -> str:
    """Return the part of SERVING.md on Ollama.

    Args:
        provenance: The adapter's `provenance.json`.
        template_name: Name of the chat template in `KNOWN_TEMPLATES`, or ''.
        has_gguf: True if the export has GGUF files.
    """
    if not has_gguf:
        return """## Ollama

Ollama reads GGUF: `qwen3ft export DIR --format gguf` writes it, and a Modelfile.
"""
    if not template_name:
        return """## Ollama

There is no Modelfile, because the chat template in `merged` is not one of those that have a tested
Ollama template.
"""
    name = served_name(provenance)
    refuses = (
        ""
        if was_trained_to_think(provenance) or template_name == "Qwen3-Thinking-2507"
        else " A request that sets `think` to true is refused: the adapter was not trained to."
    )
    return f"""## Ollama

```
ollama create {name} -f Modelfile
ollama run {name}
```

The Modelfile's template renders like the chat template of {template_name}: system prompt, turns and
reasoning.{refuses} Ollama itself has not been run with it. Not covered: tools, system
messages after the first turn, and several messages of one role in a row, which Ollama joins.
"""
