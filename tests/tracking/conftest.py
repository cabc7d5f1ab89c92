"""Real MLflow databases and servers."""

from support.mlflow_server import database, hanging_server, run_dir, server

__all__ = ["database", "hanging_server", "run_dir", "server"]
