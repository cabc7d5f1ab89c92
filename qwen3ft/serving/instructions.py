"""SERVING.md of an export: how to serve it with vLLM, transformers, llama.cpp and Ollama.

`python -m benchmarks.serving` runs the commands, except for Ollama.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from qwen3ft.chat.templates import identify_text
from qwen3ft.model.saved_adapter import most_answer_tokens, was_trained_to_think
from qwen3ft.records.requests import FormScore, GgufType, ParityReport
from qwen3ft.serving.gguf_files import LORA_GGUF, gguf_name
from qwen3ft.serving.names import served_name
from qwen3ft.serving.ollama import describe_ollama, render_modelfile

MODELFILE, SERVING = "Modelfile", "SERVING.md"

RUN_WITH = (
    "They were run with vLLM 0.32.0 (CPU), transformers 5.19.0 and the llama.cpp server of "
    "xllamacpp\n2026.10.11549, on the embedded model, on 2026-11-30."
)
"""Versions of benchmarks/results/serving-cpu.json."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for --max-lora-rank (vllm/config/lora.py)."""


def write_serving_files(
    folder: Path,
    provenance: dict[str, Any],
    report: ParityReport,
    gguf: GgufType | None = None,
) -> None:
    """Write SERVING.md, and with GGUF a Modelfile if the template is known, into an export.

    Args:
        folder: Contains `merged` and `adapter`.
        provenance: The adapter's `provenance.json`.
        report: Comparison of the forms.
        gguf: Type of the GGUF file, if there is one.
    """
    stored = folder / "merged" / "chat_template.jinja"
    text = stored.read_text(encoding="utf-8") if stored.is_file() else ""
    name = identify_text(text).name
    modelfile = None if gguf is None else render_modelfile(name, provenance, gguf_name(gguf))
    if modelfile is not None:
        (folder / MODELFILE).write_text(modelfile, encoding="utf-8")
    parts = [
        _comparison(provenance, report),
        _defaults(provenance),
        _vllm(provenance),
        _transformers(),
        _llama_cpp(provenance, gguf),
        describe_ollama(provenance, name, has_gguf=gguf is not None),
    ]
    (folder / SERVING).write_text("\n".join(parts), encoding="utf-8")


def vllm_merged_command(provenance: dict[str, Any]) -> str:
    """Return the command that serves the merged model."""
    name = served_name(provenance)
    parser = _reasoning_parser(provenance)
    return shlex.join(["vllm", "serve", "./merged", "--served-model-name", name, *parser])


def vllm_lora_command(provenance: dict[str, Any], adapter: str) -> str:
    """Return the command that serves the base model with the adapter on it."""
    base = provenance["base"]
    rank = provenance["plan"]["adapter"]["r"]
    allowed = next((limit for limit in VLLM_RANKS if limit >= rank), rank)
    revision = [] if base["local_path"] else ["--revision", base["revision"]]
    words = [
        *("vllm", "serve", base["local_path"] or base["model_name"], *revision),
        *("--enable-lora", "--max-lora-rank", str(allowed)),
        *("--lora-modules", f"{served_name(provenance)}={adapter}"),
        *("--chat-template", f"{adapter}/chat_template.jinja"),
        *("--generation-config", adapter),
        *_reasoning_parser(provenance),
    ]
    return shlex.join(words)


def llama_server_command(provenance: dict[str, Any], gguf: GgufType) -> str:
    """Return the command that serves the merged model's GGUF file."""
    words = ["llama-server", "-m", gguf_name(gguf), "--alias", served_name(provenance)]
    return shlex.join([*words, "-n", str(most_answer_tokens(provenance))])


def llama_server_lora_command(provenance: dict[str, Any]) -> str:
    """Return the command that serves a base model's GGUF file with the adapter's on it."""
    words = ["llama-server", "-m", "BASE.gguf", "--lora", LORA_GGUF]
    words += ["--alias", served_name(provenance)]
    words += ["--chat-template-file", "adapter/chat_template.jinja", "--temp", "0"]
    return shlex.join([*words, "-n", str(most_answer_tokens(provenance))])


def _reasoning_parser(provenance: dict[str, Any]) -> list[str]:
    return ["--reasoning-parser", "qwen3"] if was_trained_to_think(provenance) else []


def _comparison(provenance: dict[str, Any], report: ParityReport) -> str:
    rows = "\n".join(_form_row(score) for score in report.scores)
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
"""


def _form_row(score: FormScore) -> str:
    loss = drift = ""  # of GGUF: a llama.cpp server answers and gives no loss
    if score.answer_loss is not None and score.loss_drift is not None:
        loss, drift = f"{score.answer_loss:.4f}", f"{score.loss_drift:+.4f}"
    return (
        f"| {score.form} | {score.exact_match:.1%} | {loss} | {drift} "
        f"| {score.same_answers:.1%} | {score.lost_answers:.1%} |"
    )


def _defaults(provenance: dict[str, Any]) -> str:
    prompting = "thinking first" if was_trained_to_think(provenance) else "without thinking"
    return f"""A request that sets nothing is prompted as the adapter was trained ({prompting}) and
decoded as in the test, greedily: the chat template and `generation_config.json` beside the weights
say so, and GGUF files hold both. A request may set `temperature`, or switch thinking by
`chat_template_kwargs`: `{{"enable_thinking": true}}`.

The commands are for this folder. {RUN_WITH}

```
curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{served_name(provenance)}",
         "messages": [{{"role": "user", "content": "..."}}]}}'
```
"""


def _vllm(provenance: dict[str, Any]) -> str:
    return f"""## vLLM

The merged model:

```
{vllm_merged_command(provenance)}
```

The adapter on the base model, which other adapters can share:

```
{vllm_lora_command(provenance, "./adapter")}
```
"""


def _transformers() -> str:
    return """## transformers

```
transformers serve ./merged
```

It needs `pip install 'transformers[serving]' accelerate`. Requests name `./merged` as their model.
In Python, `pipeline("text-generation", "./merged")` answers alike; README.md in `adapter` loads the
adapter with PEFT.
"""


def _llama_cpp(provenance: dict[str, Any], gguf: GgufType | None) -> str:
    if gguf is None:
        return """## llama.cpp

This export has no GGUF files; `qwen3ft export DIR --format gguf` writes them.
"""
    return f"""## llama.cpp

It listens on port 8080. The merged model:

```
{llama_server_command(provenance, gguf)}
```

The adapter, if you have the base model as GGUF:

```
{llama_server_lora_command(provenance)}
```
"""
