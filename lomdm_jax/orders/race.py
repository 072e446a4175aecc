"""Plackett-Luce orders as exponential races, group after group.

A schedule with constant rates e_i (`schedule.Power`) reveals position i at an Exp(e_i) time, so
the next position is i with probability e_i over the sum of what is left, at every step. The
logarithm of an exponential time is minus a Gumbel variable, which is how the race is run here.
Orders with groups (`schedule.Windows`) run one race per group. Weights that follow the neighbours
or the last reveal (`schedule.Walk`) change with every reveal, so those are drawn one after another.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lomdm_jax.orders.schedule import Weights


def race_ranks(
    key: jax.Array,
    weights: Weights,
    targets_BL: jax.Array,
    reveals: int | None = None,
    last_B: jax.Array | None = None,
) -> jax.Array:
    """Draw one order per row; what is no target comes before all others, as it stands in the text.

    Args:
      key: one PRNG key.
      weights: of the schedule, [..., L].
      targets_BL: which positions take part, bool [..., L].
      reveals: how many are of interest, None for all. Where they are drawn one after another, the
        drawing stops there, and all later positions have rank L.
      last_B: the position revealed last, int32 [...], -1 for none; None for the last in the text
        of those that are not targets. Matters to weights with `moves` only.

    Returns:
      rank of each position, int32 [..., L]: 0 is revealed first, L - 1 last.
    """
    if weights.stepwise:
        return _walk(key, weights, targets_BL, reveals, last_B)
    # Full-precision Gumbel noise: the default float32 draw cuts the tail of the race.
    gumbel = jax.random.gumbel(key, weights.log_w.shape, weights.log_w.dtype, mode="high")
    group = jnp.where(targets_BL, weights.group, -1)
    log_w = jnp.where(targets_BL, weights.log_w + gumbel, 0.0)
    return invert(jnp.lexsort((-log_w, group), axis=-1))


def row_ranks(
    keys_B: jax.Array,
    weights: Weights,
    targets_BL: jax.Array,
    reveals: int | None = None,
    last_B: jax.Array | None = None,
) -> jax.Array:
    """`race_ranks` of every row, int32 [B, L], each from a key of its own."""
    near = weights.neighbours
    axes: Any = jax.tree.map(lambda _: 0, weights)
    if near is not None and near.ndim == 2:  # one table for all rows
        axes = axes._replace(neighbours=None)
    in_axes = (0, axes, 0, None, None if last_B is None else 0)
    return jax.vmap(race_ranks, in_axes)(keys_B, weights, targets_BL, reveals, last_B)


def _walk(
    key: jax.Array,
    weights: Weights,
    targets_BL: jax.Array,
    reveals: int | None,
    last_B: jax.Array | None,
) -> jax.Array:
    """`race_ranks` one reveal after another."""
    length, given_BL = targets_BL.shape[-1], ~targets_BL
    before = jnp.sum(given_BL, axis=-1)
    if last_B is None:
        last_B = jnp.max(jnp.where(given_BL, jnp.arange(length), -1), axis=-1)

    def reveal(carry: tuple[jax.Array, jax.Array], step: jax.Array):
        rank_BL, last_B = carry
        masked_BL = rank_BL == length
        share_BL, _ = next_log_shares(weights, masked_BL, last_B)
        next_B = jax.random.categorical(jax.random.fold_in(key, step), share_BL, mode="high")
        chosen_BL = masked_BL & (jnp.arange(length) == next_B[..., None])
        last_B = jnp.where(chosen_BL.any(-1), next_B, last_B).astype(jnp.int32)
        return (jnp.where(chosen_BL, (before + step)[..., None], rank_BL), last_B), None

    start_BL = jnp.where(given_BL, jnp.cumsum(given_BL, axis=-1) - 1, length).astype(jnp.int32)
    steps = jnp.arange(length if reveals is None else min(reveals, length))
    return jax.lax.scan(reveal, (start_BL, last_B.astype(jnp.int32)), steps)[0][0]


def invert(order: jax.Array) -> jax.Array:
    """The inverse of a permutation along the last axis: order to ranks, and ranks to order."""
    return jnp.argsort(order, axis=-1).astype(jnp.int32)


def next_log_shares(
    weights: Weights, masked: jax.Array, last: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """log-probability that each position comes next, and the log-sum of the weights.

    Args:
      weights: of the schedule, [..., L].
      masked: positions still hidden, bool [..., L].
      last: the position revealed last; see `Weights.at`.

    Returns:
      float32 [..., L], -inf for positions that cannot come next (0 everywhere if nothing is
      masked), and float32 [...], the log-sum over those that can.
    """
    return log_shares(weights.at(masked, last).log_w, can_come_next(weights, masked))


def can_come_next(weights: Weights, masked: jax.Array) -> jax.Array:
    """The masked positions of the lowest group that is left, bool [..., L]."""
    lowest = jnp.min(jnp.where(masked, weights.group, jnp.iinfo(jnp.int32).max), -1, keepdims=True)
    return masked & (weights.group == lowest)


def log_shares(log_rate: jax.Array, active: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log of each active rate over their sum, [..., L], -inf elsewhere; and the log-sum [...].

    Rows without an active position give zeros, so that their gradient is zero and not nan.
    """
    some = active.any(axis=-1, keepdims=True)
    log_rate = jnp.where(active, log_rate, jnp.where(some, -jnp.inf, 0.0))
    log_sum = jax.nn.logsumexp(log_rate, axis=-1, keepdims=True)
    return jnp.where(some, log_rate - log_sum, 0.0), jnp.where(some, log_sum, 0.0)[..., 0]


def prefix_log_probability(
    weights: Weights, rank: jax.Array, targets: jax.Array, masked: jax.Array
) -> jax.Array:
    """log-probability (nats) of the ordered reveals made so far, [...].

    Args:
      weights, rank, targets: as of `reveal_log_probabilities`.
      masked: targets that are still hidden, bool [..., L]; with none it is that of the whole order.
    """
    made = jnp.take_along_axis(jnp.broadcast_to(targets & ~masked, rank.shape), invert(rank), -1)
    each = reveal_log_probabilities(weights, rank, targets)
    return jnp.sum(jnp.where(made, each, 0.0), axis=-1)


def reveal_log_probabilities(weights: Weights, rank: jax.Array, targets: jax.Array) -> jax.Array:
    """log-probability (nats) of each reveal given those before it, [..., L], by rank.

    That of the target i is log w_i minus the log-sum of the weights of its group that were not
    revealed before it; 0 for what is not a target.

    Args:
      weights: of the schedule, [..., L].
      rank: reveal rank of each position, int32 [..., L]; see `race_ranks`.
      targets: which positions took part, bool [..., L].
    """
    if weights.stepwise:
        return _walk_log_probabilities(weights, rank, targets)
    order = invert(rank)
    log_w, group, targets = (
        jnp.take_along_axis(jnp.broadcast_to(a, rank.shape), order, axis=-1)
        for a in (weights.log_w, weights.group, targets)
    )
    # A large finite value, not -inf: the gradient of logaddexp at -inf is nan.
    left = _sums_to_the_end_of_the_group(jnp.where(targets, log_w, -1e9), group)
    return jnp.where(targets, log_w - left, 0.0)


def _walk_log_probabilities(weights: Weights, rank: jax.Array, targets: jax.Array) -> jax.Array:
    """`reveal_log_probabilities` one after another; a step is recomputed for the gradient."""
    order = invert(rank)

    @jax.checkpoint
    def reveal(last: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        share, _ = next_log_shares(weights, targets & (rank >= step), last)
        made = jnp.sum(jnp.where(targets & (rank == step), share, 0.0), axis=-1)
        return order[..., step], made

    nothing = jnp.full(rank.shape[:-1], -1, jnp.int32)
    each = jax.lax.scan(reveal, nothing, jnp.arange(rank.shape[-1]))[1]
    return jnp.moveaxis(each, 0, -1)


def _sums_to_the_end_of_the_group(log_w: jax.Array, group: jax.Array) -> jax.Array:
    """log-sum of w from each place to the last one of its group, along the last axis."""

    def join(
        later: tuple[jax.Array, jax.Array], sooner: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        total = jnp.where(sooner[1], sooner[0], jnp.logaddexp(later[0], sooner[0]))
        return total, later[1] | sooner[1]

    ends = _last_of_group(group)
    axis = log_w.ndim - 1
    return jax.lax.associative_scan(join, (log_w, ends), reverse=True, axis=axis)[0]


def _last_of_group(group: jax.Array) -> jax.Array:
    """Where a run of equal numbers ends along the last axis, bool [..., L]."""
    return jnp.concatenate(
        [group[..., 1:] != group[..., :-1], jnp.ones_like(group[..., :1], bool)], axis=-1
    )


def group_places(
    key: jax.Array, group_BL: jax.Array, targets_BL: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A random order inside each group: each target's place in it, and the group's targets.

    Args:
      key: one PRNG key.
      group_BL: int32 [..., L].
      targets_BL: which positions take part, bool [..., L].

    Returns:
      place, int32 [..., L], from 0, and size, int32 [..., L]; of no meaning for non-targets.
    """
    weights = Weights(jnp.zeros(group_BL.shape), group_BL)
    rank = race_ranks(key, weights, targets_BL)
    order, here = invert(rank), jnp.arange(rank.shape[-1])
    group = jnp.take_along_axis(jnp.where(targets_BL, group_BL, -1), order, axis=-1)
    ends, axis = _last_of_group(group), rank.ndim - 1
    starts = jnp.roll(
        ends, 1, axis=-1
    )  # the last place always ends a group, so the first starts one
    first = jax.lax.cummax(jnp.where(starts, here, 0), axis=axis)
    last = jax.lax.cummin(jnp.where(ends, here, here[-1]), axis=axis, reverse=True)
    place, size = (jnp.take_along_axis(a, rank, -1) for a in (here - first, last - first + 1))
    return place, size
