"""The settings that `qwen3ft init` writes, for a machine with and without a GPU."""

from __future__ import annotations

import pytest
import yaml

from flows.cli.init import project_settings
from qwen3ft.config import TrainingConfig, parse_config


@pytest.mark.parametrize("has_gpu", [True, False])
def test_a_new_project_trains_on_its_data_folder(has_gpu: bool) -> None:
    """Everything else is as shipped for such a machine."""
    text = project_settings(has_gpu=has_gpu)
    config = parse_config(yaml.safe_load(text))
    assert config.data_paths == ("data",)
    assert config.is_embedded is not has_gpu
    if has_gpu:
        assert config == TrainingConfig(data_paths=("data",))
    assert text.splitlines()[0].endswith("Written by `qwen3ft init`.")
