"""The registered model of a task whose champion was registered under a name without its data.

Before, the name was derived from the base model alone. Such a model goes on being the task's if its
champion was trained on the same paths; a champion of other data is not compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen3ft.config import registered_model_name
from qwen3ft.logs import get_logger, mask_secrets

if TYPE_CHECKING:
    from qwen3ft.config import TrainingConfig
    from qwen3ft.registry.registry import Registry

logger = get_logger("registry")


def with_task_name(config: TrainingConfig, registry: Registry) -> TrainingConfig:
    """Return `config`, with the name of the older registered model that is its task's, if any.

    Raises:
        TrackingUnavailableError: MLflow cannot be reached.
    """
    older = registered_model_name(config.model_name)
    if config.name is not None or config.registered_name == older:
        return config
    if registry.champion(config.registered_name) is not None:
        return config
    champion = registry.champion(older)
    if champion is None:
        return config
    paths = mask_secrets(str(list(config.data_paths)))  # as MLflow was given them
    if registry.settings_of(champion).get("data_paths") == paths:
        return config.model_copy(update={"name": older})
    logger.info(
        "%s v%s was trained on other data, so it is not compared; if it is the same task: --set "
        "name=%s",
        *(older, champion.version, older),
    )
    return config
