"""What accelerators can do, as their makers state it: the ceilings that a step is measured by."""

from typing import NamedTuple

import jax
from jax.sharding import Mesh

GIB = 2**30


class Chip(NamedTuple):
    """What one JAX device of a kind can do.

    name: as people say it.
    memory: bytes that a program may use.
    flops: bfloat16 operations per second of dense matrix products.
    bandwidth: bytes per second between the device and its memory.
    links: bytes per second that a device can send to others, one direction, over all its links
      together. A sum over one axis of a torus uses only the links of that axis, and devices that
      such links do not join (GPUs of different machines, TPU slices) are much slower.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    links: float


def _tpu(name: str, gib: float, tflops: float, gb: float, links: float, devices: int = 1) -> Chip:
    """gib: what the compiler says that a device has, in "exceeds available HBM (15.75G)"; it is
    less than the chip's. The others are of a chip, which is so many devices."""
    share = 1e9 / devices
    return Chip(name, int(gib * GIB), 1e3 * tflops * share, gb * share, links * share)


def _gpu(name: str, gib: float, tflops: float, gb: float, links: float) -> Chip:
    return Chip(name, int(gib * GIB), tflops * 1e12, gb * 1e9, links * 1e9)


# By jax.Device.device_kind.
#
# TPU: https://docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x ("Peak compute per chip",
# "HBM bandwidth per chip"). Links are half of "Bidirectional inter-chip interconnect bandwidth per
# chip": 400 GB/s (v5e), 1200 (v5p), 800 (v6e). The page of v4 has none: six links of 50 GB/s
# (https://arxiv.org/abs/2304.01433, table 4). TPU7x: 7.37 TB/s and 1.2 TB/s in both directions are
# the announcement's, https://blog.google/products/google-cloud/ironwood-tpu-age-of-inference.
#
# GPU: the data sheets of https://www.nvidia.com/en-us/data-center/ (a100, h100, h200, l4, tesla-t4,
# v100), without sparsity. NVLink is stated for both directions: half of it; without NVLink half of
# PCIe's. Of their memory a process gets what JAX preallocates, three quarters unless
# XLA_PYTHON_CLIENT_MEM_FRACTION says more; `memory` is all of it.
CHIPS: dict[str, Chip] = {
    "TPU v4": _tpu("TPU v4", 30.75, 275, 1200, 300),
    "TPU v5 lite": _tpu("TPU v5e", 15.75, 197, 819, 200),
    "TPU v5": _tpu("TPU v5p", 95.74, 459, 2765, 600),
    "TPU v6 lite": _tpu("TPU v6e", 31.25, 918, 1638, 400),
    # A device is one of a chip's two halves.
    "TPU7x": _tpu("TPU7x, half a chip", 94.75, 2307, 7370, 600, devices=2),
    "NVIDIA A100-SXM4-40GB": _gpu("A100 SXM 40 GB", 40, 312, 1555, 300),
    "NVIDIA A100-SXM4-80GB": _gpu("A100 SXM 80 GB", 80, 312, 2039, 300),
    "NVIDIA A100-PCIE-40GB": _gpu("A100 PCIe 40 GB", 40, 312, 1555, 32),
    "NVIDIA A100 80GB PCIe": _gpu("A100 PCIe 80 GB", 80, 312, 1935, 32),
    "NVIDIA H100 80GB HBM3": _gpu("H100 SXM", 80, 989.4, 3350, 450),
    "NVIDIA H200": _gpu("H200 SXM", 141e9 / GIB, 989.4, 4800, 450),
    "NVIDIA L4": _gpu("L4", 24, 121, 300, 32),
    # No bfloat16 units: products run in float32. (In float16 they would reach 65 and 125 TFLOP/s.)
    "Tesla T4": _gpu("T4", 16, 8.1, 320, 16),
    "Tesla V100-SXM2-16GB": _gpu("V100 SXM 16 GB", 16, 15.7, 900, 150),
    "Tesla V100-SXM2-32GB": _gpu("V100 SXM 32 GB", 32, 15.7, 900, 150),
}


def chip_of(device: jax.Device) -> Chip | None:
    """What a device can do; None for a kind that the table does not have, as CPUs."""
    return CHIPS.get(device.device_kind)


def peak(mesh: Mesh) -> float | None:
    """FLOP/s of all devices of a mesh at best, None if that is not known."""
    chip = chip_of(mesh.devices.flat[0])
    return chip.flops * mesh.size if chip else None
