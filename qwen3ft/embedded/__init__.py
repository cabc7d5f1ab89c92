"""The embedded model: a tiny but real Qwen3 with its own question-answer data, for offline runs.

`MODEL_DIR` holds a `Qwen3ForCausalLM` of well under a million weights, a byte-level BPE tokenizer
and a chat template like Qwen3's; `DATA_DIR` holds questions and answers in English and Chinese
about an invented shop. All of it was written for this project and can be rebuilt from a seed with
`python -m qwen3ft.embedded.build`.

Before fine-tuning the model knows the wording of a product catalogue, the kind of answer for each
attribute, and how to rewrite dates in seven styles. Fine-tuning adds the attributes of new products
(tested in wordings not trained for that fact) and one date style, ISO (tested on unseen dates). It
cannot do anything else, and is not robust to wordings absent from both trainings. The split `novel`
measures that; it is reported separately and is not part of the test score.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
DATA_DIR = Path(__file__).parent / "data"

__all__ = ["DATA_DIR", "MODEL_DIR"]
