"""GPUs by name, with the figures that speed estimates rest on.

The figures are those of NVIDIA's data sheets and architecture papers: dense bf16 products that
accumulate in fp32, no sparsity; memory as the driver shows it. Only GPUs marked as measured were
ever trained on by this project. Not covered: slices (MIG), power limits, and GPUs without bfloat16.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwen3ft.errors import ConfigError


@dataclass(frozen=True)
class GpuSpec:
    """One kind of GPU."""

    name: str
    memory_gb: float
    """Memory that the driver shows, in units of 2**30 bytes."""
    bf16_tflops: float
    """Peak of dense products in bf16, in 1e12 operations a second."""
    bandwidth_gbps: float
    """Bandwidth of its memory, in 1e9 bytes a second."""
    capability: str
    """CUDA compute capability."""
    bus_gbps: float
    """Rate that a transfer to the host reaches, one way, in 1e9 bytes a second."""
    measured: bool = False
    """True if this project measured speed on it."""
    nvlink_gbps: float = 0.0
    """Rate to another GPU over NVLink, one way, in 1e9 bytes a second; 0 without NVLink."""

    @property
    def link_gbps(self) -> float:
        """Rate at which a transfer to another GPU is assumed to run, in 1e9 bytes a second."""
        return NVLINK_SHARE * self.nvlink_gbps or self.bus_gbps


PCIE_3, PCIE_4, PCIE_5 = 11.0, 22.0, 50.0
"""Rate of a pinned transfer over 16 lanes, in 1e9 bytes a second."""

NVLINK_SHARE = 0.75
"""Share of NVLink's rate on the data sheet that a collective is assumed to reach."""

GPU_SPECS = (
    GpuSpec("H200", 139.80, 989, 4800, "9.0", PCIE_5, measured=True, nvlink_gbps=450),
    GpuSpec("H100", 79.65, 989, 3350, "9.0", PCIE_5, measured=True, nvlink_gbps=450),
    GpuSpec("H100 PCIe", 79.65, 756, 2039, "9.0", PCIE_5),
    GpuSpec("B200", 179.0, 2250, 7700, "10.0", PCIE_5, nvlink_gbps=900),
    GpuSpec("A100 80GB", 80.0, 312, 2039, "8.0", PCIE_4),
    GpuSpec("A100 40GB", 40.0, 312, 1555, "8.0", PCIE_4),
    GpuSpec("L40S", 44.99, 362, 864, "8.9", PCIE_4),
    GpuSpec("L4", 22.49, 121, 300, "8.9", PCIE_4),
    GpuSpec("A10", 22.49, 125, 600, "8.6", PCIE_4),
    GpuSpec("RTX 6000 Ada", 47.99, 364, 960, "8.9", PCIE_4),
    GpuSpec("RTX A6000", 47.99, 155, 768, "8.6", PCIE_4),
    GpuSpec("RTX 5090", 31.84, 209.5, 1792, "12.0", PCIE_5),
    GpuSpec("RTX 4090", 23.99, 165.2, 1008, "8.9", PCIE_4),
    GpuSpec("RTX 4080", 15.99, 97.5, 717, "8.9", PCIE_4),
    GpuSpec("RTX 4060 Ti 16GB", 15.99, 44.1, 288, "8.9", PCIE_4 / 2),  # 8 lanes
    GpuSpec("RTX 3090", 24.0, 71, 936, "8.6", PCIE_4),
    GpuSpec("RTX 3060", 12.0, 25.6, 360, "8.6", PCIE_4),
)
"""A name that exists in several forms means the SXM module."""

_NOISE = re.compile(r"nvidia|geforce|tesla|graphics|generation|sxm\d?|hbm\w*|nvl|[\s_-]+|rtx")
# Drivers say "NVIDIA H100 80GB HBM3" and "NVIDIA A100 80GB PCIe", with the size in the name.
_UNCLEAR = {"a100": "A100 80GB", "h10080gb": "H100", "a10080gbpcie": "A100 80GB"}


def find_gpu_spec(text: str) -> GpuSpec | None:
    """Return the GPU that a person or a driver calls `text`; None if it is unknown."""
    wanted = _NOISE.sub("", text.lower())
    wanted = _NOISE.sub("", _UNCLEAR.get(wanted, text).lower())
    return next((gpu for gpu in GPU_SPECS if _NOISE.sub("", gpu.name.lower()) == wanted), None)


def require_gpu_spec(text: str) -> GpuSpec:
    """Return the GPU that a person or a driver calls `text`.

    Raises:
        ConfigError: It is unknown; the known ones are listed.
    """
    if (gpu := find_gpu_spec(text)) is None:
        raise ConfigError(
            f"No GPU {text!r} is known.",
            why="Known are " + ", ".join(gpu.name for gpu in GPU_SPECS) + ".",
            next_command=f'qwen3ft plan --gpu "{GPU_SPECS[0].name}"',
        )
    return gpu
