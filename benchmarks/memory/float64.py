"""The embedded model in float64: what a gradient is, without the rounding of fp32.

For comparisons alone. Frozen 4-bit weights are dequantised once, and everything that transformers
and this project would round to fp32 on the way (norms, the loss) stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def in_float64(model: Any) -> Iterator[None]:
    """Within it `model`, on the CPU and on the plain path, computes in float64; it stays so."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            weight = dequantize_4bit(module.weight.data, state).reshape(state.shape).double()
            module.forward = _product(weight)
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                parameter.data = parameter.data.double()
    to_float, to = torch.Tensor.float, torch.Tensor.to

    def keep_or_float(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        return tensor if tensor.dtype == torch.float64 else to_float(tensor, *arguments, **options)

    def keep_or_to(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if tensor.dtype == torch.float64 and arguments[:1] == (torch.float32,):
            return tensor
        result: torch.Tensor = to(tensor, *arguments, **options)
        return result

    torch.Tensor.float, torch.Tensor.to = keep_or_float, keep_or_to  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.float, torch.Tensor.to = to_float, to  # type: ignore[method-assign]


def _product(weight: torch.Tensor) -> Any:
    return lambda x: torch.nn.functional.linear(x, weight)
