"""Databases of Prefect and MLflow with their tables, which take the servers seconds to make.

They are made once per version, by the programs themselves, and kept with pytest's cache. Servers
that begin with an empty folder are started by the slow tests.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

from deployments import services
from deployments.services import Layout
from qwen3ft.disk.locks import try_lock

KEPT = Path(__file__).parents[2] / ".pytest_cache" / "databases"
MAKE_SECONDS = 240.0


def place_databases(root: Path) -> None:
    """Give the stack of a new project folder databases that need no migration."""
    targets = {
        "prefect": Layout(root, 0, 0).prefect_home / "prefect.db",
        "mlflow": root / "mlruns" / "mlflow.db",
    }
    with ThreadPoolExecutor() as pool:  # where they have to be made, both at once
        for made, target in zip(pool.map(migrated, targets), targets.values(), strict=True):
            target.parent.mkdir(parents=True)
            shutil.copy(made, target)


def migrated(name: str) -> Path:
    """Return the database of "prefect" or "mlflow" to copy; another process may be making it."""
    path = KEPT / f"{name}-{version(name)}.db"
    KEPT.mkdir(parents=True, exist_ok=True)
    with try_lock(KEPT / f"{name}.lock", MAKE_SECONDS) as held:
        assert held, f"{path} is still being made"
        if not path.exists():
            fresh = KEPT / f"{name}-new.db"
            fresh.unlink(missing_ok=True)
            _migrate(name, fresh)
            with closing(sqlite3.connect(fresh)) as database:  # what is still in its log
                database.execute("pragma wal_checkpoint(truncate)")
            fresh.replace(path)
    return path


def _migrate(name: str, path: Path) -> None:
    environment = services.environment(Layout(KEPT, 0, 0), os.environ)
    if name == "prefect":
        environment |= {
            "PREFECT_HOME": str(KEPT / "prefect-home"),
            "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{path}",
        }
        command = ["prefect", "server", "database", "upgrade", "-y"]
    else:
        command = ["mlflow", "db", "upgrade", f"sqlite:///{path}"]
    subprocess.run(
        [sys.executable, "-m", *command], env=environment, check=True, stdout=subprocess.DEVNULL
    )
