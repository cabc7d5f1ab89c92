"""Import bitsandbytes without loading torch's compiler."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

# At import, bitsandbytes 0.50 passes its fallbacks for devices without kernels to `torch.compile`,
# which loads Inductor and Dynamo. CPUs and CUDA devices have kernels, so none of them ever runs.
# Left uncompiled, a worker's imports take 11.4 instead of 13.7 s of CPU time (best of five each on
# a busy machine with two cores) and 40 MB less.


def _not_compiled(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
    return function


with patch.object(torch, "compile", _not_compiled):
    import bitsandbytes  # noqa: F401
