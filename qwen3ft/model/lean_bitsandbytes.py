"""Importing this module imports bitsandbytes, and does not load torch's compiler for it.

At its import bitsandbytes (0.50) hands to `torch.compile` what it would compute with where it has
no kernels; CPUs and CUDA devices have them, so none of it runs, but torch loads Inductor and all of
Dynamo for it: a seventh of the time that a worker takes to start, and 40 MB. Here these functions
stay what they are, which is also what bitsandbytes itself falls back to.
"""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch


def _not_compiled(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
    return function


with patch.object(torch, "compile", _not_compiled):
    import bitsandbytes  # noqa: F401
