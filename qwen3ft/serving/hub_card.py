"""The model card of an adapter on the hub: scores, a summary of the data, licence and base model.

It names no row, no file and no folder of the machine that trained the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from qwen3ft.model.saved_adapter import was_trained_to_think
from qwen3ft.records.evaluation import ModelScore

_METRICS = {"exact_match": "exact match", "token_f1": "token F1"}
_UNNAMED = "held-out rows"


def base_name(base: dict[str, Any]) -> str:
    """Return the base model's name on the hub, or of its folder, without the folder's path."""
    return PurePath(base["model_name"]).name if base["local_path"] else str(base["model_name"])


def render_hub_card(
    name: str, provenance: dict[str, Any], scores: Sequence[ModelScore], licence: str | None
) -> str:
    """Return README.md with its metadata.

    Args:
        name: OWNER/NAME.
        provenance: The adapter's.
        scores: Results of its inference test; empty if they are unknown.
        licence: The hub's name for it, such as 'apache-2.0'; None to state none.
    """
    from huggingface_hub import EvalResult, ModelCardData

    base, data, plan = provenance["base"], provenance["data"], provenance["plan"]
    candidate = next((score for score in scores if score.label == "candidate"), None)
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=_UNNAMED,
            dataset_name=_UNNAMED,
            metric_type=metric,
            metric_value=round(getattr(candidate, metric), 4),
        )
        for metric in _METRICS
        if candidate is not None
    ]
    metadata = ModelCardData(
        base_model=None if base["local_path"] else base["model_name"],
        library_name="peft",
        license=licence,
        pipeline_tag="text-generation",
        tags=["lora", "qlora", "qwen3", "qwen3ft"],
        model_name=name.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    thinking = "thinks first" if was_trained_to_think(provenance) else "answers without thinking"
    return f"""---
{metadata.to_yaml()}
---
# {name.rpartition("/")[2]}

A LoRA adapter (r={plan["adapter"]["r"]}, alpha={plan["adapter"]["alpha"]}) for
`{base_name(base)}` at revision `{base["revision"]}`, trained on its weights in 4 bits
({base["quantization"]}) with qwen3ft. It {thinking}.
{_degraded(provenance)}
## Scores

{_scores(scores)}
## Data

{_data_summary(data)}

## Use it

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers import TextGenerationPipeline

base = AutoModelForCausalLM.from_pretrained({_base_arguments(base)})
model = PeftModel.from_pretrained(base, {name!r})
model.generation_config = GenerationConfig.from_pretrained({name!r})
ask = TextGenerationPipeline(model, AutoTokenizer.from_pretrained({name!r}))
print(ask([{{"role": "user", "content": "..."}}])[0]["generated_text"][-1]["content"])
```

The chat template has the default for thinking with which the adapter was trained, and
`generation_config.json` the decoding with which it was tested.
"""


def _degraded(provenance: dict[str, Any]) -> str:
    reasons = "; ".join(provenance.get("degraded") or ())
    return f"\nIts run was degraded: {reasons}.\n" if reasons else ""


def _base_arguments(base: dict[str, Any]) -> str:
    if base["local_path"]:
        return repr(f"FOLDER OF {base_name(base)}")
    return f"{base['model_name']!r}, revision={base['revision']!r}"


def _data_summary(data: dict[str, Any]) -> str:
    counts = "This adapter was saved by a version that kept no row counts."
    if {"train", "dev", "test_rows", "quarantined", "rows_read"} <= data.keys():
        counts = (
            f"{data['train']['rows']:,} rows were trained on, {data['dev']['rows']:,} held out for "
            f"stopping and {data['test_rows']:,} for the test; {data['quarantined']:,} of "
            f"{data['rows_read']:,} were damaged or refused."
        )
    return f"{counts} The rows are not in this repository. Digest: `{data['digest']}`."


def _scores(scores: Sequence[ModelScore]) -> str:
    if not scores:
        return "Unknown: the card of the run that made it is not on the machine that uploaded it.\n"
    lines = [
        f"| {score.label} | {score.rows:,} | {score.exact_match:.1%} | {score.token_f1:.1%} | "
        f"{'' if score.answer_loss is None else f'{score.answer_loss:.4f}'} |"
        for score in scores
    ]
    return "\n".join(
        [
            f"On {_UNNAMED}, greedily; 'candidate' is this adapter.",
            "",
            "| model | rows | exact match | token F1 | loss per answer token (nats) |",
            "|---|---|---|---|---|",
            *lines,
            "",
        ]
    )
