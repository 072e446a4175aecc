"""The backbone: MDLM's DiT (kuleshov-group/mdlm, models/dit.py), layer for layer.

Rotary positions, adaptive layer norm conditioned on the noise level, scale-only layer norm in
float32, tanh-GELU, gates and output projection that start at zero. Parameters carry MDLM's names,
with a Linear's `weight` [out, in] stored as `kernel` [in, out] and a norm's `weight` as `scale`.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lomdm_jax.models.placement import BATCH, SEQUENCE, TENSOR, WITHIN, constrain
from lomdm_jax.models.readout import Readout
from lomdm_jax.models.visibility import Memory, View

# What a block keeps for its gradient; the rest is computed again.
REMAT: dict[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # products with parameters
    "full": jax.checkpoint_policies.nothing_saveable,  # its input only
}

# torch.nn.Linear's default: uniform within 1 / sqrt(fan_in).
_torch_linear = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_zeros = nnx.initializers.zeros


def linear(
    in_features: int,
    out_features: int,
    *,
    rngs: nnx.Rngs,
    dtype: jnp.dtype,
    use_bias: bool = True,
    zero: bool = False,
) -> nnx.Linear:
    """A Linear that starts as PyTorch's does, or at zero."""
    bound = 1 / math.sqrt(in_features)

    def bias(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nnx.Linear(
        in_features,
        out_features,
        use_bias=use_bias,
        kernel_init=_zeros if zero else _torch_linear,
        bias_init=_zeros if zero else bias,
        dtype=dtype,
        rngs=rngs,
    )


def layer_norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=1e-5, use_bias=False, dtype=jnp.float32, rngs=rngs)


def rotary(x_BLHD: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotate halves by position [L] or [B, L] (base 10000, full head dimension), in float32."""
    half = x_BLHD.shape[-1] // 2
    frequency_D = 10000.0 ** (-jnp.arange(half) / half)
    angle_L1D = positions[..., None, None] * frequency_D
    cos, sin = jnp.cos(angle_L1D), jnp.sin(angle_L1D)
    first, second = jnp.split(x_BLHD.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BLHD.dtype)


def dropout(x_BLD: jax.Array, keys_B: jax.Array | None, rate: float, salt: int) -> jax.Array:
    """Dropout with one key per row, so that it does not depend on how a batch is split."""
    if keys_B is None or rate == 0:
        return x_BLD
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, salt)
    draw = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x_BLD.shape[1:]))
    return jnp.where(draw(keys_B), x_BLD / (1 - rate), 0).astype(x_BLD.dtype)


def _modulate(x_BLD: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array) -> jax.Array:
    return x_BLD * (1 + scale_BD[:, None]) + shift_BD[:, None]


class Sizes(NamedTuple):
    """The shape of a network.

    vocab_size: rows of the token table, the mask token included.
    width: hidden size, a multiple of 2 * heads.
    layers, heads, cond_dim: numbers of blocks and heads, size of the conditioning vector.
    dropout: rate inside the blocks, used only when keys are passed.
    dtype: compute dtype; parameters are float32.
    remat: what blocks keep for the gradient, one of REMAT; "none" recomputes nothing.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    cond_dim: int
    dropout: float
    dtype: jnp.dtype
    remat: str = "none"


class TimestepEmbedder(nnx.Module):
    """Noise level sigma [B] to a conditioning vector [B, cond_dim]."""

    FREQUENCIES = 256  # MDLM's frequency_embedding_size

    def __init__(self, cond_dim: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.mlp = nnx.Dict(
            {
                "0": linear(self.FREQUENCIES, cond_dim, rngs=rngs, dtype=dtype),
                "2": linear(cond_dim, cond_dim, rngs=rngs, dtype=dtype),
            }
        )

    def __call__(self, sigma_B: jax.Array) -> jax.Array:
        half = self.FREQUENCIES // 2
        frequency_D = jnp.exp(-math.log(10000.0) * jnp.arange(half) / half)
        angle_BD = sigma_B[:, None] * frequency_D
        embedded_BD = jnp.concatenate([jnp.cos(angle_BD), jnp.sin(angle_BD)], axis=-1)
        return self.mlp["2"](jax.nn.silu(self.mlp["0"](embedded_BD)))


class Block(nnx.Module):
    """Attention and MLP, each behind an adaptive layer norm and a gate that starts at zero."""

    def __init__(self, sizes: Sizes, *, rngs: nnx.Rngs):
        width, cond_dim, dtype = sizes.width, sizes.cond_dim, sizes.dtype
        self.heads, self.dropout, self.remat = sizes.heads, sizes.dropout, sizes.remat
        self.norm1 = layer_norm(width, rngs)
        self.attn_qkv = linear(width, 3 * width, use_bias=False, rngs=rngs, dtype=dtype)
        self.attn_out = linear(width, width, use_bias=False, rngs=rngs, dtype=dtype)
        self.norm2 = layer_norm(width, rngs)
        self.mlp = nnx.Dict(
            {
                "0": linear(width, 4 * width, rngs=rngs, dtype=dtype),
                "2": linear(4 * width, width, rngs=rngs, dtype=dtype),
            }
        )
        self.adaLN_modulation = linear(cond_dim, 6 * width, zero=True, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        x_BLD: jax.Array,
        cond_BD: jax.Array,
        view: View,
        dropout_keys_B: jax.Array | None = None,
        salt: int = 0,
        memory: Any = None,
    ) -> tuple[jax.Array, Any]:
        if self.remat == "none":
            return self._mix(x_BLD, cond_BD, view, dropout_keys_B, salt, memory)
        mix = jax.checkpoint(
            lambda x, cond, keys: self._mix(x, cond, view, keys, salt, memory),
            policy=REMAT[self.remat],
        )
        return mix(x_BLD, cond_BD, dropout_keys_B)

    def _mix(
        self,
        x_BLD: jax.Array,
        cond_BD: jax.Array,
        view: View,
        dropout_keys_B: jax.Array | None,
        salt: int,
        memory: Any,
    ) -> tuple[jax.Array, Any]:
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(
            self.adaLN_modulation(cond_BD), 6, axis=-1
        )
        h_BLD, memory = self._attend(_modulate(self.norm1(x_BLD), shift1, scale1), view, memory)
        x_BLD = x_BLD + gate1[:, None] * dropout(h_BLD, dropout_keys_B, self.dropout, 2 * salt)
        h_BLD = self.mlp["0"](_modulate(self.norm2(x_BLD), shift2, scale2))
        h_BLD = constrain(h_BLD, BATCH, SEQUENCE, TENSOR)
        h_BLD = self.mlp["2"](jax.nn.gelu(h_BLD, approximate=True))
        h_BLD = dropout(h_BLD, dropout_keys_B, self.dropout, 2 * salt + 1)
        return constrain(x_BLD + gate2[:, None] * h_BLD, BATCH, SEQUENCE, None), memory

    def _attend(self, x_BLD: jax.Array, view: View, memory: Any) -> tuple[jax.Array, Any]:
        batch, length, width = x_BLD.shape
        query, key, value = self._heads(x_BLD)
        query, key = (rotary(a, view.positions) for a in (query, key))
        mixed_BLHD, memory = view.attend(query, key, value, memory)
        mixed_BLHD = constrain(mixed_BLHD, BATCH, SEQUENCE, TENSOR, None)
        return self.attn_out(mixed_BLHD.reshape(batch, length, width)), memory

    def _heads(self, x_BLD: jax.Array) -> Sequence[jax.Array]:
        """Queries, keys and values, [B, L, H, D / H] each."""
        # It is the kernel that is regrouped over the devices, which is smaller than its product.
        kernel = self.attn_qkv.kernel[...].astype(self.attn_qkv.dtype)
        kernel = kernel.reshape(len(kernel), 3, self.heads, -1)
        kernel = constrain(kernel, None, None, TENSOR, None)
        qkv = jnp.einsum("bld,dnhe->blnhe", x_BLD.astype(kernel.dtype), kernel)
        qkv = constrain(qkv, BATCH, SEQUENCE, None, TENSOR, None)
        # From a share of the positions, with all heads, to all positions of a share of the heads.
        return [constrain(qkv[:, :, n], BATCH, None, WITHIN, None) for n in range(3)]


class Embedding(nnx.Module):
    """Token table [vocabulary, width], uniform within 1 / sqrt(width) (kaiming, a = sqrt 5)."""

    def __init__(self, vocab_size: int, width: int, *, rngs: nnx.Rngs):
        bound = 1 / math.sqrt(width)
        self.embedding = nnx.Param(
            jax.random.uniform(rngs.params(), (vocab_size, width), jnp.float32, -bound, bound)
        )

    def __call__(self, tokens_BL: jax.Array) -> jax.Array:
        table = constrain(self.embedding[...], None, None)
        return constrain(jnp.take(table, tokens_BL, axis=0), BATCH, SEQUENCE, None)


class OutputLayer(nnx.Module):
    """Hidden states to tokens of the vocabulary, the mask token included."""

    def __init__(self, sizes: Sizes, *, rngs: nnx.Rngs):
        width, cond_dim, dtype = sizes.width, sizes.cond_dim, sizes.dtype
        self.dtype = dtype
        self.norm_final = layer_norm(width, rngs)
        self.linear = linear(width, sizes.vocab_size, zero=True, rngs=rngs, dtype=dtype)
        self.adaLN_modulation = linear(cond_dim, 2 * width, zero=True, rngs=rngs, dtype=dtype)

    def __call__(self, x_BLD: jax.Array, cond_BD: jax.Array) -> Readout:
        shift, scale = jnp.split(self.adaLN_modulation(cond_BD), 2, axis=-1)
        h_BLD = _modulate(self.norm_final(x_BLD), shift, scale).astype(self.dtype)
        h_BLD = constrain(h_BLD, BATCH, None, None)
        assert self.linear.bias is not None
        return Readout(h_BLD, self.linear.kernel[...], self.linear.bias[...])


class Transformer(nnx.Module):
    """Tokens [B, L] to hidden states [B, L, width]; `output_layer` reads tokens off those."""

    def __init__(self, sizes: Sizes, *, rngs: nnx.Rngs):
        width, cond_dim, dtype = sizes.width, sizes.cond_dim, sizes.dtype
        self.sizes = sizes
        self.vocab_embed = Embedding(sizes.vocab_size, width, rngs=rngs)
        self.sigma_map = TimestepEmbedder(cond_dim, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(Block(sizes, rngs=rngs) for _ in range(sizes.layers))
        self.output_layer = OutputLayer(sizes, rngs=rngs)

    def condition(self, sigma_B: jax.Array) -> jax.Array:
        """Conditioning vector [B, cond_dim] of the noise level sigma [B]."""
        return jax.nn.silu(self.sigma_map(sigma_B))

    def hidden(
        self,
        tokens_BL: jax.Array,
        cond_BD: jax.Array,
        view: View,
        dropout_keys_B: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states [B, L, width]; the residual stream is float32, as in MDLM."""
        nothing = [None] * len(self.blocks)
        return self.recall(tokens_BL, cond_BD, view, nothing, dropout_keys_B)[0]

    def memories(self, rows: int, slots: int) -> list[Memory]:
        """Of every block, with nothing in them."""
        size = self.sizes
        shape = (rows, slots, size.heads, size.width // size.heads)
        return [Memory(*(jnp.zeros(shape, size.dtype) for _ in "kv")) for _ in self.blocks]

    def recall(
        self,
        tokens_BL: jax.Array,
        cond_BD: jax.Array,
        view: View,
        memories: Sequence[Any],
        dropout_keys_B: jax.Array | None = None,
    ) -> tuple[jax.Array, list[Any]]:
        """Hidden states, and what each block remembers afterwards; see `visibility.Cached`."""
        x_BLD, after = self.vocab_embed(tokens_BL), []
        for index, (block, memory) in enumerate(zip(self.blocks, memories, strict=True)):
            x_BLD, memory = block(x_BLD, cond_BD, view, dropout_keys_B, index, memory)
            after.append(memory)
        return x_BLD, after
