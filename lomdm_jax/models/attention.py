"""Attention among the tokens of a row, by whatever does it best on the devices at hand.

Splash attention (TPU) and cuDNN's flash attention (NVIDIA) keep no score in memory, for the
gradient neither: arXiv 2205.14135.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec

from lomdm_jax.models.placement import BATCH, WITHIN, splits

Backend = Literal["cudnn", "splash", "xla", "parts"]

# Queries, and keys, that splash attention has on the chip at once. Of shorter rows there is less to
# save: compiled for a TPU v5e, a layer reads and writes a sixth of what it does with XLA at length
# 512, half at 256 and more at 128.
BLOCK = 512
# The longest rows whose scores may be whole in memory. Those of a token are then about as large as
# all else that a layer keeps of it for the gradient (4 bytes x 1024 a head, of 64); beyond, larger.
WHOLE = 1024


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    is_causal: bool,
    segment: jax.Array | None,
    in_parts: Callable[[], jax.Array],
) -> jax.Array:
    """Mix values [B, L, H, D] of one length: each sees all, or if causal itself and those before.

    The softmax is float32, the result of the dtype of the query.

    Args:
      segment: int32 [B, L]; nothing is seen of other segments. None for one segment.
      in_parts: attends as well, a few rows at a time: for what would take much memory otherwise.
    """
    backend = backend_of(platform(), query.dtype, query.shape, segment is not None, splits())
    if backend == "parts":
        return in_parts()
    if backend == "splash":
        return _splash(query, key, value, segment, is_causal)
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=is_causal, implementation=backend
    )


def backend_of(
    platform: str,
    dtype: jnp.dtype,
    shape: tuple[int, ...],
    has_segments: bool,
    splits: tuple[int, int] = (1, 1),
) -> Backend:
    """What attends.

    Args:
      platform: as of `platform`.
      shape: [B, L, H, D] of the queries, over all devices.
      splits: over how many devices the mesh splits rows and heads; kernels need equal shares.
    """
    rows, length, heads, size = shape
    equal = rows % splits[0] == 0 and heads % splits[1] == 0
    half = dtype in (jnp.bfloat16, jnp.float16)
    if platform == "cuda" and equal and not has_segments and half and size in range(8, 129, 8):
        return "cudnn"
    blocks = length % BLOCK == 0 and size <= 256 and dtype in (jnp.bfloat16, jnp.float32)
    if platform == "tpu" and equal and blocks:
        return "splash"
    return "parts" if has_segments or length > WHOLE else "xla"


def platform() -> str:
    """What a program is traced for: "tpu", "cpu", "cuda" for GPUs with cuDNN's flash attention, or
    "gpu" for others.

    It is that of the mesh of `jax.set_mesh`, whose devices need not be present.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = device.platform if device else jax.default_backend()
    return "cuda" if name == "gpu" and _has_flash() else name


def _has_flash() -> bool:
    """Whether the GPUs are NVIDIA's, of compute capability 8.0 (Ampere) or later; as those are that
    are compiled for without being here (`distributed.gpus`)."""
    try:
        device = jax.local_devices(backend="gpu")[0]
    except RuntimeError:
        return True
    if "cuda" not in device.client.platform_version:
        return False
    return int(device.compute_capability.partition(".")[0]) >= 8


def _splash(
    query: jax.Array, key: jax.Array, value: jax.Array, segment: jax.Array | None, is_causal: bool
) -> jax.Array:
    """Splash attention, of each device of the mesh on its rows and heads."""

    def own(query: jax.Array, key: jax.Array, value: jax.Array, segment: jax.Array | None):
        kernel = _splash_kernel(query.shape[1], query.shape[2], is_causal)
        ids = None if segment is None else splash_attention.SegmentIds(segment, segment)
        scaled = query * query.shape[-1] ** -0.5
        heads_first = (a.swapaxes(1, 2) for a in (scaled, key, value))
        return jax.vmap(kernel)(*heads_first, ids).swapaxes(1, 2)

    if jax.sharding.get_abstract_mesh().empty:
        return own(query, key, value, segment)
    heads = PartitionSpec(BATCH, None, WITHIN, None)
    specs = (heads, heads, heads, PartitionSpec(BATCH))
    spread = jax.shard_map(own, in_specs=specs, out_specs=heads, check_vma=False)
    return spread(query, key, value, segment)


def _splash_kernel(length: int, heads: int, is_causal: bool) -> Callable[..., jax.Array]:
    """Maps queries, keys and values [H, L, D], and `SegmentIds` or None, to mixed values."""
    kind = splash_attention.CausalMask if is_causal else splash_attention.FullMask
    # Gradients have kernels of their own: one for keys and values, one for queries. The kernel for
    # both would sum the latter in the dtype of the queries, and hold L / BLOCK copies of them.
    names = "q kv kv_compute q_dkv kv_dkv kv_dkv_compute q_dq kv_dq".split()
    sizes: dict[str, Any] = {f"block_{name}": BLOCK for name in names}
    return splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([kind((length, length))] * heads),
        block_sizes=splash_attention.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
    )
