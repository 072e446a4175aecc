"""Orders that are given, not learned. Where scores are taken they only give the shape, [..., L]."""

import math
from collections.abc import Callable

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
    return Power(jnp.full(scores_BL.shape, math.log(exponent), jnp.float32))


def cosine(scores_BL: jax.Array) -> Cosine:
    """MD4's cosine schedule; the order is uniformly random."""
    return Cosine(jnp.zeros(scores_BL.shape, jnp.float32))


def windows(scores_BL: jax.Array, groups: Callable[[int], np.ndarray]) -> Windows:
    """Positions revealed group after group; groups: from the length to the group of each."""
    group_L = groups(scores_BL.shape[-1])
    group = jnp.broadcast_to(jnp.asarray(group_L, jnp.int32), scores_BL.shape)
    return Windows(group, jnp.full((*scores_BL.shape[:-1], 1), group_L.max() + 1, jnp.float32))


def left_to_right(length: int) -> np.ndarray:
    """One position after another: autoregression. Groups, int [L], 0 is revealed first."""
    return np.arange(length)


def right_to_left(length: int) -> np.ndarray:
    """One position after another, the last one first. Groups, int [L]."""
    return np.arange(length)[::-1]


def blocks(length: int, size: int) -> np.ndarray:
    """Blocks of `size` positions from left to right, at random within each (BD3-LM).

    Returns:
      groups, int [L].

    Raises:
      UserError: unless `size` divides the length.
    """
    if size < 1 or length % size:
        raise UserError(
            f"order.name asks for blocks of {size} tokens, but that does not divide data.length = "
            f"{length}: choose a divisor of {length}."
        )
    return np.arange(length) // size


def permutation(length: int, seed: int) -> np.ndarray:
    """One position after another in an order drawn once from `seed`. Groups, int [L]."""
    return np.random.default_rng(seed).permutation(length)
