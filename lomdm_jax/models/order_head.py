"""What an order is learned with: LoMDM's order head (arXiv 2602.02112), GenMD4's rates, and
pointers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lomdm_jax.models.transformer import Block, Sizes, layer_norm, linear
from lomdm_jax.models.visibility import View


class OrderHead(nnx.Module):
    """Transformer blocks (one in the paper), then an MLP to a scalar that starts at zero, which is
    a random order.

    Args:
      sizes: of the backbone; `layers` and `dropout` are not used.
      layers: how many blocks, 0 to read the order off the hidden states of the backbone.
    """

    def __init__(self, sizes: Sizes, layers: int, *, rngs: nnx.Rngs):
        width, dtype = sizes.width, sizes.dtype
        # No dropout: the forward head's output defines q.
        plain = sizes._replace(dropout=0.0)
        self.blocks = nnx.List(Block(plain, rngs=rngs) for _ in range(layers))
        self.norm = layer_norm(width, rngs)
        self.mlp = nnx.Dict(
            {
                "0": linear(width, width, rngs=rngs, dtype=dtype),
                "2": linear(width, 1, zero=True, rngs=rngs, dtype=dtype),
            }
        )

    def __call__(self, x_BLD: jax.Array, cond_BD: jax.Array, view: View) -> jax.Array:
        """Scores, float32 [B, L]."""
        for block in self.blocks:
            x_BLD, _ = block(x_BLD, cond_BD, view)
        h_BLD = self.norm(x_BLD)
        h_BLD = jax.nn.gelu(self.mlp["0"](h_BLD), approximate=True)
        return self.mlp["2"](h_BLD)[..., 0].astype(jnp.float32)


class WalkHead(nnx.Module):
    """What revealed neighbours add to a log-weight, float32 [2 (left), 2 (right)]; none at first.

    Both heads of an order share it, so by itself it costs nothing in the order term.
    """

    def __init__(self):
        self.table = nnx.Param(jnp.zeros((2, 2), jnp.float32))


class Pointed(NamedTuple):
    """What a pointer says of each row, float32: log_w [B, L], neighbours [B, 2, 2] and
    moves [B, L, 2 W + 1]; see `orders.schedule.Weights`. Zeros are a uniformly random order."""

    log_w: jax.Array
    neighbours: jax.Array
    moves: jax.Array


class Pointer(nnx.Module):
    """Which position comes next, from the one that was revealed last.

    The sum of a table over positions, one over whether the neighbours are revealed, one over the
    distance from the last position, and a term over that distance read off its hidden state. All
    start at zero. The tables are a handful of numbers shared by every step of every sequence.

    Args:
      sizes: of the backbone.
      length: positions of a sequence.
      layers: blocks on top of what is read, 0 for none.
    """

    WINDOW = 16  # distances are told apart up to here
    # Under Adam a table then moves this many times as fast as a weight: 0.1 nats per step at a
    # rate of 3e-3. Steps of a weight's size would take thousands to say anything.
    RATE = 30.0

    def __init__(self, sizes: Sizes, length: int, layers: int, *, rngs: nnx.Rngs):
        distances = 2 * self.WINDOW + 1
        self.position, self.distance, self.neighbours = (
            nnx.Param(jnp.zeros(shape, jnp.float32)) for shape in ((length,), (distances,), (2, 2))
        )
        plain = sizes._replace(dropout=0.0)
        self.blocks = nnx.List(Block(plain, rngs=rngs) for _ in range(layers))
        self.norm = layer_norm(sizes.width, rngs)
        self.content = linear(sizes.width, distances, zero=True, rngs=rngs, dtype=sizes.dtype)

    def __call__(self, x_BLD: jax.Array, cond_BD: jax.Array, view: View) -> Pointed:
        """From hidden states of the contents, [B, L, width], each as it is when revealed."""
        for block in self.blocks:
            x_BLD, _ = block(x_BLD, cond_BD, view)
        return self.tables(len(x_BLD))._replace(moves=self.moves(x_BLD))

    def tables(self, rows: int) -> Pointed:
        """What it says as long as no content is read, for `rows` rows."""
        moves = jnp.broadcast_to(self.distance[...], (self.position.shape[0], len(self.distance)))
        tables = Pointed(self.position[...], self.neighbours[...], moves)
        return jax.tree.map(lambda a: jnp.broadcast_to(self.RATE * a, (rows, *a.shape)), tables)

    def moves(self, x_BLD: jax.Array) -> jax.Array:
        """float32 [B, L, 2 W + 1], a row for each content."""
        content_BLM = self.content(self.norm(x_BLD)).astype(jnp.float32)
        return content_BLM + self.RATE * self.distance[...]


class TokenHead(nnx.Module):
    """One log-rate per vocabulary entry (GenMD4, google-deepmind/md4), all equal at the start."""

    def __init__(self, vocab_size: int):
        self.log_rate = nnx.Param(jnp.zeros(vocab_size, jnp.float32))

    def forward(self, x_BL: jax.Array) -> jax.Array:
        """log-rates of the tokens x, float32 [B, L]."""
        return jnp.take(self.log_rate[...], x_BL, axis=0)

    def reverse(self, logits_BLV: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits of the token that comes next, and log-rates [B, L], from token logits.

        A position that would hold v is revealed at rate w_v, so it is revealed at the rate
        sum p_v w_v, and then holds v with probability proportional to p_v w_v.

        logits_BLV: float32, -inf at the mask token.
        """
        weighted_BLV = jax.nn.log_softmax(logits_BLV) + self.log_rate[...]
        return weighted_BLV, jax.nn.logsumexp(weighted_BLV, axis=-1)
