"""Launching Triton kernels with little time on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from torch import Tensor


class Fixed:
    """Tensors that are the same at each launch, with their addresses and kinds."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self.tensors = tuple(tensors)
        self.addresses = tuple(None if one is None else one.data_ptr() for one in tensors)
        pairs = zip(tensors, self.addresses, strict=True)
        self.kinds = tuple(_kind(*pair) for pair in pairs)


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
    device = tensors[0].get_device()
    addresses = [None if one is None else one.data_ptr() for one in tensors]
    # Triton itself would look up the compiled kernel at each launch, which takes longer than the
    # launch. Its choice depends on the constants, and on the type and alignment of each tensor.
    kinds = [_kind(*pair) for pair in zip(tensors, addresses, strict=True)]
    key = (kernel, constants, fixed.kinds, device, *kinds)
    compiled = _compiled.get(key)
    if compiled is not None:
        # What `compiled[grid]` does, without asking for the device, for hooks of profilers and for
        # each tensor's address: a step launches 800 kernels, and several ranks wait for the host.
        stream, metadata = _stream_of_device()(device), compiled.packed_metadata
        compiled.run(
            *(*grid, stream, compiled.function, metadata, None, None, None),
            *(*fixed.addresses, *addresses, *numbers, *constants),
        )
        return
    compiled = kernel[grid](*fixed.tensors, *tensors, *numbers, *constants, **options)
    if compiled is not None:  # None in Triton's interpreter
        _compiled[key] = compiled


@cache
def _stream_of_device() -> Callable[[int], int]:
    """Return Triton's function from a device's number to the handle of its current stream."""
    from triton.runtime import driver

    found: Callable[[int], int] = driver.active.get_current_stream
    return found


def _kind(tensor: Tensor | None, address: int | None) -> Any:
    return None if tensor is None or address is None else (tensor.dtype, not address % 16)
