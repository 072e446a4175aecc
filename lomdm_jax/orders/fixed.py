"""Orders that are given, not learned. Scores only give the shape, [..., L]."""

import jax
import jax.numpy as jnp
import numpy as np

from lomdm_jax.errors import UserError
from lomdm_jax.orders.schedule import Cosine, Power, Windows


def polynomial(scores_BL: jax.Array, exponent: float) -> Power:
    """m(t) = t^exponent at every position; exponent 1 is the linear schedule of MDLM.

    The order is uniformly random for every exponent.

    Raises:
      UserError: unless the exponent is positive.
    """
    if exponent <= 0:
        raise UserError(
            f"order.exponent is {exponent}, but m(t) = t^exponent is a schedule only for a "
            "positive exponent: use 1.0 for the linear schedule."
        )
    return Power(jnp.full(scores_BL.shape, exponent, jnp.float32))


def cosine(scores_BL: jax.Array) -> Cosine:
    """MD4's cosine schedule; the order is uniformly random."""
    return Cosine(jnp.zeros(scores_BL.shape, jnp.float32))


def windows(scores_BL: jax.Array, group_L: np.ndarray) -> Windows:
    """Positions revealed group after group: group_L int [L], numbers 0 .. G - 1, 0 first."""
    count = int(group_L.max()) + 1
    group = jnp.broadcast_to(jnp.asarray(group_L, jnp.int32), scores_BL.shape)
    return Windows(group, jnp.full((*scores_BL.shape[:-1], 1), count, jnp.float32))


def left_to_right(scores_BL: jax.Array) -> Windows:
    """One position after another: autoregression."""
    return windows(scores_BL, np.arange(scores_BL.shape[-1]))


def right_to_left(scores_BL: jax.Array) -> Windows:
    """One position after another, the last one first."""
    return windows(scores_BL, np.arange(scores_BL.shape[-1])[::-1])


def blocks(scores_BL: jax.Array, size: int) -> Windows:
    """Blocks of `size` positions from left to right, at random within each (BD3-LM).

    Raises:
      UserError: unless `size` divides the length.
    """
    length = scores_BL.shape[-1]
    if size < 1 or length % size:
        raise UserError(
            f"order.name asks for blocks of {size} tokens, but that does not divide data.length = "
            f"{length}: choose a divisor of {length}."
        )
    return windows(scores_BL, np.arange(length) // size)


def permutation(scores_BL: jax.Array, seed: int) -> Windows:
    """One position after another in an order drawn once from `seed`."""
    return windows(scores_BL, np.random.default_rng(seed).permutation(scores_BL.shape[-1]))
