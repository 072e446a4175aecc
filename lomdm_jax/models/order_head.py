"""From hidden states to one score per position: the order head g of LoMDM (arXiv 2602.02112)."""

import jax
import jax.numpy as jnp
from flax import nnx

from lomdm_jax.models.transformer import Block, Sizes, layer_norm, linear
from lomdm_jax.models.visibility import View


class OrderHead(nnx.Module):
    """One transformer block, then an MLP to a scalar that starts at zero (a random order)."""

    def __init__(self, sizes: Sizes, *, rngs: nnx.Rngs):
        width, dtype = sizes.width, sizes.dtype
        # No dropout: the forward head's output defines q.
        self.block = Block(sizes._replace(dropout=0.0), rngs=rngs)
        self.norm = layer_norm(width, rngs)
        self.mlp = nnx.Dict(
            {
                "0": linear(width, width, rngs=rngs, dtype=dtype),
                "2": linear(width, 1, zero=True, rngs=rngs, dtype=dtype),
            }
        )

    def __call__(self, x_BLD: jax.Array, cond_BD: jax.Array, view: View) -> jax.Array:
        """Scores, float32 [B, L]."""
        h_BLD = self.norm(self.block(x_BLD, cond_BD, view))
        h_BLD = jax.nn.gelu(self.mlp["0"](h_BLD), approximate=True)
        return self.mlp["2"](h_BLD)[..., 0].astype(jnp.float32)
