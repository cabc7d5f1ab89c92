"""The embedded model: a tiny but true Qwen3 with its own question-answer data, for offline runs.

What it is: a `Qwen3ForCausalLM` of well under a million weights, a byte-level BPE tokenizer and a
Qwen3-shaped chat template (`MODEL_DIR`), next to question-answer files in English and Chinese about
an invented shop (`DATA_DIR`). Everything was written for this project and can be rebuilt from a
seed with `python -m qwen3ft.embedded.build`.

What it can do: before fine-tuning it knows the wording of a product catalogue, the kind of answer
each attribute takes, and how to rewrite dates in seven styles. Fine-tuning adds the attributes of
products it never saw (test questions ask a known fact in a wording not trained for that fact), and
one new date style, ISO (test questions bring unseen dates).

What it cannot do: anything else. It was pretrained for exactly this domain, so fine-tuning teaches
facts and one format, not language. It is not robust to wording absent from both trainings: the
split `novel` measures that and is reported on its own, never as part of the test score.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
DATA_DIR = Path(__file__).parent / "data"

__all__ = ["DATA_DIR", "MODEL_DIR"]
