"""Drawing masked sequences: from a schedule at a time, or from a race with n positions left.

Every draw is a pure function of one key per example, so it does not depend on how a global batch
is cut into micro-batches or spread over devices.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lomdm_jax.orders import race
from lomdm_jax.orders.schedule import Schedule, Weights, log_mask_probability


class Corruption(NamedTuple):
    """K masked versions of each sequence.

    mask_KBL: bool, True where the token is hidden.
    log_q_KB: float32, nats: log-probability of the draw, for the score-function gradient.
    """

    mask_KBL: jax.Array
    log_q_KB: jax.Array


def stratified_uniforms(
    key: jax.Array, index_B: jax.Array | np.ndarray, total: int | jax.Array
) -> jax.Array:
    """One uniform in [0, 1) per example, float32 [B], stratified over the whole global batch.

    u_b = (u + b / total) mod 1 with one shared u, so the `total` examples of a batch fall one in
    each of `total` equal cells, however the batch is split (Kingma et al., arXiv 2107.00630).

    Args:
      key: one PRNG key, the same for every part of the batch.
      index_B: index of each example in the global batch, int32.
      total: size of the global batch.
    """
    return jnp.mod(jax.random.uniform(key) + index_B / total, 1.0)


def scattered(total: int) -> np.ndarray:
    """The examples of a batch in an order in which neighbours lie far apart, int [total].

    With it as the indices of `stratified_uniforms`, the share of a batch that a device has is as
    good a mixture of few and many masks as the whole, and all devices have as much to score.
    """
    near_golden = range(round(total * (math.sqrt(5) - 1) / 2), total + 1)
    stride = next((s for s in near_golden if math.gcd(s, total) == 1), 1)
    return np.arange(total) * stride % total


def corrupt_at(
    keys_B: jax.Array, schedule: Schedule, log_t_B: jax.Array, targets_BL: jax.Array, samples: int
) -> Corruption:
    """Mask each target independently with probability m_i(t), `samples` times per sequence."""
    mask_KBL = corrupt_each(keys_B, schedule.log_mask(log_t_B), targets_BL, samples)
    return Corruption(mask_KBL, log_mask_probability(schedule, log_t_B, mask_KBL, targets_BL))


def corrupt_each(
    keys_B: jax.Array, log_m_BL: jax.Array, targets_BL: jax.Array, samples: int
) -> jax.Array:
    """`samples` masks, bool [K, B, L]: each target independently, with log-probability log_m."""
    shape = (samples, targets_BL.shape[-1])
    uniform_KBL = jax.vmap(lambda key: jax.random.uniform(key, shape), out_axes=1)(keys_B)
    # log(0) = -inf compares as it should: such a position is masked whenever m > 0.
    return (jnp.log(uniform_KBL) < log_m_BL) & targets_BL


def corrupt_race(
    keys_B: jax.Array, weights: Weights, masked_B: jax.Array, targets_BL: jax.Array, samples: int
) -> Corruption:
    """Draw a reveal order by the race with these weights and mask its last `masked_B` targets.

    log_q is the log-probability of the ordered reveals before them.
    """
    keys_KB = jax.vmap(lambda key: jax.random.split(key, samples), out_axes=1)(keys_B)
    rank_KBL = jax.vmap(lambda keys_B: race.row_ranks(keys_B, weights, targets_BL))(keys_KB)
    mask_KBL = rank_KBL >= (targets_BL.shape[-1] - masked_B)[:, None]
    log_q_KB = race.prefix_log_probability(weights, rank_KBL, targets_BL, mask_KBL)
    return Corruption(mask_KBL, log_q_KB)


def group_uniforms(uniform_B: jax.Array, group_BL: jax.Array) -> jax.Array:
    """One uniform in [0, 1) per group, float32 [B, L]: group g has (u + g / groups) mod 1, so that
    draws are stratified over the groups of a row as well."""
    count_B1 = jnp.max(group_BL, axis=-1, keepdims=True) + 1
    return jnp.mod(uniform_B[:, None] + group_BL / count_B1, 1.0)


def corrupt_groups(
    keys_B: jax.Array,
    group_BL: jax.Array,
    uniform_BL: jax.Array,
    targets_BL: jax.Array,
    samples: int,
) -> tuple[jax.Array, jax.Array]:
    """Mask some of the targets of every group at once, at random inside it.

    Args:
      keys_B: one PRNG key per row.
      group_BL: int32 group of each position.
      uniform_BL: float32 in [0, 1), equal within a group; see `group_uniforms`. Of n targets,
        floor(u n) + 1 are masked.
      targets_BL: bool.
      samples: K.

    Returns:
      mask_KBL, bool; and weight_KBL, float32: over the number n of masked targets in the group,
      the group's number of targets. The sum of weight times cross-entropy over masked positions
      is the bound of the groups, as each is the chain rule's next factor.
    """

    def row(key: jax.Array, group_L: jax.Array, targets_L: jax.Array) -> tuple[jax.Array, ...]:
        keys_K = jax.random.split(key, samples)
        return jax.vmap(race.group_places, in_axes=(0, None, None))(keys_K, group_L, targets_L)

    place_KBL, size_KBL = jax.vmap(row, out_axes=1)(keys_B, group_BL, targets_BL)
    masked_KBL = jnp.minimum(jnp.floor(uniform_BL * size_KBL) + 1, size_KBL)
    mask_KBL = targets_BL & (place_KBL >= size_KBL - masked_KBL)
    return mask_KBL, size_KBL / masked_KBL
