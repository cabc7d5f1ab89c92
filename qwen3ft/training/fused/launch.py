"""Launching Triton kernels with little time on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


class Fixed:
    """Tensors that are the same at each launch, with their addresses and kinds."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self.tensors = tuple(tensors)
        self.addresses = tuple(None if one is None else one.data_ptr() for one in tensors)
        self.kinds = tuple(_kind(tensor) for tensor in tensors)


_compiled: dict[tuple[Any, ...], Any] = {}
_nothing = Fixed(())


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[float, ...],
    constants: tuple[Any, ...],
    fixed: Fixed = _nothing,
    **options: Any,
) -> None:
    """Run `kernel`, with its arguments in the order of these.

    Args:
        kernel: A `triton.jit` function.
        grid: Number of programs in each dimension.
        tensors: Tensors that change from launch to launch; the first is not None.
        numbers: Numbers that change; all are in the kernel's `do_not_specialize`.
        constants: Its `tl.constexpr` arguments.
        fixed: Its first arguments.
        options: Triton's options; they must follow from the constants.
    """
    assert tensors[0] is not None
    # Triton itself would look up the compiled kernel at each launch, which takes longer than the
    # launch. Its choice depends on the constants, and on the type and alignment of each tensor.
    key = (kernel, constants, fixed.kinds, tensors[0].get_device(), *map(_kind, tensors))
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[grid](*fixed.addresses, *tensors, *numbers, *constants)
        return
    compiled = kernel[grid](*fixed.tensors, *tensors, *numbers, *constants, **options)
    if compiled is not None:  # None in Triton's interpreter
        _compiled[key] = compiled


def _kind(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16 == 0)
