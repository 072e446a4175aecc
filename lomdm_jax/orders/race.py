"""Plackett-Luce orders as exponential races.

A schedule with constant rates e_i (`schedule.Power`) reveals position i at an Exp(e_i) time, so
the next position is i with probability e_i over the sum of what is left, at every step. The
logarithm of an exponential time is minus a Gumbel variable, which is how the race is run here.
"""

import jax
import jax.numpy as jnp


def race_ranks(key: jax.Array, log_w_BL: jax.Array, targets_BL: jax.Array) -> jax.Array:
    """Draw one order per row; positions that are not targets come before all others.

    Args:
      key: one PRNG key.
      log_w_BL: log weights in nats, float32 [..., L].
      targets_BL: which positions take part, bool [..., L].

    Returns:
      rank of each position, int32 [..., L]: 0 is revealed first, L - 1 last.
    """
    # Full-precision Gumbel noise: the default float32 draw cuts the tail of the race.
    gumbel = jax.random.gumbel(key, log_w_BL.shape, log_w_BL.dtype, mode="high")
    score = jnp.where(targets_BL, log_w_BL + gumbel, jnp.inf)
    return invert(jnp.argsort(-score, axis=-1))


def invert(order: jax.Array) -> jax.Array:
    """The inverse of a permutation along the last axis: order to ranks, and ranks to order."""
    return jnp.argsort(order, axis=-1).astype(jnp.int32)


def prefix_log_probability(
    log_w: jax.Array, rank: jax.Array, targets: jax.Array, masked: jax.Array
) -> jax.Array:
    """log-probability (nats) of the ordered reveals made so far, [...].

    The sum over revealed targets of log w_i minus the log-sum of the weights not revealed before
    it. With nothing masked it is the log-probability of the whole order.

    Args:
      log_w: log weights, float32 [..., L].
      rank: reveal rank of each position, int32 [..., L]; see `race_ranks`.
      targets: which positions took part, bool [..., L].
      masked: targets that are still hidden, bool [..., L].
    """
    order = invert(rank)
    log_w, targets, masked = (
        jnp.take_along_axis(jnp.broadcast_to(a, rank.shape), order, axis=-1)
        for a in (log_w, targets, masked)
    )
    # A large finite value, not -inf: the gradient of cumlogsumexp at -inf is nan.
    left = jax.lax.cumlogsumexp(jnp.where(targets, log_w, -1e9), axis=rank.ndim - 1, reverse=True)
    return jnp.sum(jnp.where(targets & ~masked, log_w - left, 0.0), axis=-1)


def expected_ranks(log_w_BL: jax.Array) -> jax.Array:
    """Mean reveal rank of each position, float32 [..., L]: sum over j of P(j before i).

    In a race of two, j comes before i with probability w_j / (w_i + w_j); ranks are sums of such
    events, so no sampling is needed. Costs L^2 per row.
    """
    before = jax.nn.sigmoid(log_w_BL[..., None, :] - log_w_BL[..., :, None])
    return jnp.sum(before, axis=-1) - 0.5  # the diagonal compares i with itself
