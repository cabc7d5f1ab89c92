"""A saved adapter as MLflow loads and serves it: questions in, answers out, in this process.

`mlflow.pyfunc.load_model` and `mlflow models serve` come here through `qwen3ft.entry_points`. The
folder is checked as everywhere else, and the 4-bit base model is the one on this machine; where
there is none, it is made from the base model that the adapter names.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from qwen3ft.config import TrainingConfig
from qwen3ft.errors import ModelUnavailableError
from qwen3ft.evaluation.generation import answer_questions
from qwen3ft.evaluation.inference import InferenceTester
from qwen3ft.jobs.folders import RunDir
from qwen3ft.logs import get_logger
from qwen3ft.machine.gpus import visible_gpus
from qwen3ft.model.hub import resolve_model
from qwen3ft.model.manager import snapshot_target
from qwen3ft.model.mlflow_files import ANSWER, QUESTION, THINKS
from qwen3ft.model.saved_adapter import (
    OpenedAdapter,
    find_base,
    open_adapter,
    was_trained_to_think,
)
from qwen3ft.model.stage import quantized_model
from qwen3ft.serving.prompting import with_settings_of_the_run

if TYPE_CHECKING:
    import pandas as pd

logger = get_logger("mlflow_model")

QUESTIONS_AT_A_TIME = 8


class MlflowModel:
    """An adapter on its 4-bit base, in memory until the object goes.

    Args:
        folder: A saved adapter, as MLflow fetched it.

    Raises:
        ModelNotFoundError, SaveError: the folder is no adapter, or is damaged.
        ModelUnavailableError: the base model is not the one that the adapter was trained on.
    """

    def __init__(self, folder: Path) -> None:
        opened = open_adapter(folder)
        base = opened.provenance["base"]
        here = TrainingConfig(
            model_name=base["local_path"] or base["model_name"],
            model_revision=None if base["local_path"] else base["revision"],
            quantization=(base["quantization"],),
        )
        config = with_settings_of_the_run(here, opened.provenance)
        tester = InferenceTester(config)
        loaded = tester.load_finetuned_model(str(folder), base=_base_of(opened, config))
        self._model, self._tokenizer = loaded
        self._config = config
        self._thinking = was_trained_to_think(opened.provenance)
        self._lock = Lock()  # MLflow's server calls from several threads

    def predict(
        self, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Answer each row's `question`, greedily, as in the run's test.

        Args:
            model_input: With a column `question`.
            params: `enable_thinking`; by default as trained.

        Returns:
            A frame with the same index and the column `answer`.
        """
        import pandas as pd

        questions = [str(question) for question in model_input[QUESTION]]
        with self._lock:
            given = answer_questions(
                self._model,
                self._tokenizer,
                questions,
                batch_size=QUESTIONS_AT_A_TIME,
                max_new_tokens=self._config.max_new_tokens,
                max_thinking_tokens=self._config.max_thinking_tokens,
                thinking=bool((params or {}).get(THINKS, self._thinking)),
                escape=self._config.special_tokens_in_text == "escape",
            )
        answers = [one.answer for one in given]
        return pd.DataFrame({ANSWER: answers}, index=model_input.index)


def _base_of(opened: OpenedAdapter, config: TrainingConfig) -> str:
    """Return the folder of the 4-bit base model, made if this machine has none.

    Raises:
        ModelUnavailableError: the base model is gone, or has changed.
    """
    try:
        return find_base(opened)
    except ModelUnavailableError as error:
        source = resolve_model(config)
        if source.revision != opened.provenance["base"]["revision"]:
            raise
        logger.info("%s It is made here, once.", error.what)
    device = "cuda" if visible_gpus() else "cpu"
    target = snapshot_target(config, source, device)
    with tempfile.TemporaryDirectory(prefix="qwen3ft-") as folder:
        return quantized_model(config, source, device, RunDir(Path(folder)), target).path
