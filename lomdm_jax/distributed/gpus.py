"""GPUs that need not be present, as XLA's compiler is told of them."""

from typing import NamedTuple

from lomdm_jax.distributed.chips import CHIPS


class Gpu(NamedTuple):
    """kind: as JAX says it, a key of CHIPS. capability: CUDA's compute capability. ahead: whether
    the compiler may use what later capabilities lack. cores: streaming multiprocessors. units: of
    float32 in a core. shared, block: KiB of a core, and of those what a block may take. cache: MiB
    of the second level. clock: GHz.
    """

    kind: str
    capability: int
    ahead: bool
    cores: int
    units: int
    shared: int
    block: int
    cache: int
    clock: float


# Figures: openxla/xla, xla/backends/gpu/target_config/specs, and the tuning guides of
# https://docs.nvidia.com/cuda/ (ampere-tuning-guide, hopper-tuning-guide).
GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 8, False, 108, 64, 164, 163, 40, 1.41),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 9, True, 132, 128, 228, 227, 50, 1.98),
    "h200": Gpu("NVIDIA H200", 9, True, 132, 128, 228, 227, 50, 1.98),
}

# What they share; versions are those that XLA is built with, or later. cuDNN 9.10 is the least for
# which the compiler makes its attention without a GPU.
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {block}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.units}
  l2_cache_size: {cache}
  clock_rate_ghz: {gpu.clock}
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {gpu.capability} feature_extension: {extension} }}
  name: "{gpu.kind}"
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{gpu.kind}"
"""


def target(gpu: Gpu) -> str:
    """A GpuTargetConfigProto of XLA (stream_executor/device_description.proto), as text."""
    chip = CHIPS[gpu.kind]
    return _TARGET.format(
        gpu=gpu,
        shared=1024 * gpu.shared,
        block=1024 * gpu.block,
        cache=2**20 * gpu.cache,
        bandwidth=int(chip.bandwidth),
        memory=chip.memory,
        extension="ACCELERATED_FEATURES" if gpu.ahead else "NONE",
    )
