"""The name by which servers know a fine-tuned model."""

from __future__ import annotations

import re
from typing import Any


def served_name(provenance: dict[str, Any]) -> str:
    """Return a short name for the model, which no other run's has."""
    model = provenance["base"]["model_name"].rstrip("/").rpartition("/")[2]
    slug = re.sub(r"[^a-z0-9.]+", "-", model.lower()).strip("-.")
    return f"{slug}-{provenance['run_id'][:8]}".lstrip("-")
