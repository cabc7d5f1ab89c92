"""Real MLflow databases and servers."""

from support.mlflow_server import database, hanging_server, run_dir

__all__ = ["database", "hanging_server", "run_dir"]
