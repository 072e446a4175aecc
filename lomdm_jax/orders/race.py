"""Plackett-Luce orders as exponential races, group after group.

A schedule with constant rates e_i (`schedule.Power`) reveals position i at an Exp(e_i) time, so
the next position is i with probability e_i over the sum of what is left, at every step. The
logarithm of an exponential time is minus a Gumbel variable, which is how the race is run here.
Orders with groups (`schedule.Windows`) run one race per group. Weights that follow the neighbours
(`schedule.Walk`) change with every reveal, so there the reveals are drawn one after another.
"""

import jax
import jax.numpy as jnp

from lomdm_jax.orders.schedule import Weights


def race_ranks(
    key: jax.Array, weights: Weights, targets_BL: jax.Array, reveals: int | None = None
) -> jax.Array:
    """Draw one order per row; positions that are not targets come before all others.

    Args:
      key: one PRNG key.
      weights: of the schedule, [..., L].
      targets_BL: which positions take part, bool [..., L].
      reveals: how many are of interest, None for all. Where they are drawn one after another, the
        drawing stops there, and all later positions have rank L.

    Returns:
      rank of each position, int32 [..., L]: 0 is revealed first, L - 1 last.
    """
    if weights.neighbours is not None:
        return _walk(key, weights, targets_BL, reveals)
    # Full-precision Gumbel noise: the default float32 draw cuts the tail of the race.
    gumbel = jax.random.gumbel(key, weights.log_w.shape, weights.log_w.dtype, mode="high")
    group = jnp.where(targets_BL, weights.group, -1)
    return invert(jnp.lexsort((-weights.log_w - gumbel, group), axis=-1))


def row_ranks(
    keys_B: jax.Array, weights: Weights, targets_BL: jax.Array, reveals: int | None = None
) -> jax.Array:
    """`race_ranks` of every row, int32 [B, L], each from a key of its own."""

    def draw(key: jax.Array, log_w_L: jax.Array, group_L: jax.Array, targets_L: jax.Array):
        return race_ranks(key, Weights(log_w_L, group_L, weights.neighbours), targets_L, reveals)

    return jax.vmap(draw)(keys_B, weights.log_w, weights.group, targets_BL)


def _walk(
    key: jax.Array, weights: Weights, targets_BL: jax.Array, reveals: int | None
) -> jax.Array:
    """`race_ranks` one reveal after another."""
    length = targets_BL.shape[-1]
    given_BL = ~targets_BL
    before = jnp.sum(given_BL, axis=-1)

    def reveal(rank_BL: jax.Array, step: jax.Array) -> tuple[jax.Array, None]:
        masked_BL = rank_BL == length
        share_BL, _ = next_log_shares(weights, masked_BL)
        next_B = jax.random.categorical(jax.random.fold_in(key, step), share_BL, mode="high")
        chosen_BL = masked_BL & (jnp.arange(length) == next_B[..., None])
        return jnp.where(chosen_BL, (before + step)[..., None], rank_BL), None

    start_BL = jnp.where(given_BL, jnp.cumsum(given_BL, axis=-1) - 1, length)
    steps = jnp.arange(length if reveals is None else min(reveals, length))
    return jax.lax.scan(reveal, start_BL.astype(jnp.int32), steps)[0]


def invert(order: jax.Array) -> jax.Array:
    """The inverse of a permutation along the last axis: order to ranks, and ranks to order."""
    return jnp.argsort(order, axis=-1).astype(jnp.int32)


def next_log_shares(weights: Weights, masked: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log-probability that each position comes next, and the log-sum of the weights.

    Args:
      weights: of the schedule, [..., L].
      masked: positions still hidden, bool [..., L].

    Returns:
      float32 [..., L], -inf for positions that cannot come next (0 everywhere if nothing is
      masked), and float32 [...], the log-sum over those that can.
    """
    return log_shares(weights.at(masked).log_w, can_come_next(weights, masked))


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

    The sum over revealed targets of log w_i minus the log-sum of the weights of its group that
    were not revealed before it. With nothing masked it is that of the whole order.

    Args:
      weights: of the schedule, [..., L].
      rank: reveal rank of each position, int32 [..., L]; see `race_ranks`.
      targets: which positions took part, bool [..., L].
      masked: targets that are still hidden, bool [..., L].
    """
    if weights.neighbours is not None:
        return _walk_log_probability(weights, rank, targets, masked)
    order = invert(rank)
    log_w, group, targets, masked = (
        jnp.take_along_axis(jnp.broadcast_to(a, rank.shape), order, axis=-1)
        for a in (weights.log_w, weights.group, targets, masked)
    )
    # A large finite value, not -inf: the gradient of logaddexp at -inf is nan.
    left = _sums_to_the_end_of_the_group(jnp.where(targets, log_w, -1e9), group)
    return jnp.sum(jnp.where(targets & ~masked, log_w - left, 0.0), axis=-1)


def _walk_log_probability(
    weights: Weights, rank: jax.Array, targets: jax.Array, masked: jax.Array
) -> jax.Array:
    """`prefix_log_probability` one reveal after another; a step is recomputed for the gradient."""

    @jax.checkpoint
    def add(total: jax.Array, step: jax.Array) -> tuple[jax.Array, None]:
        share, _ = next_log_shares(weights, targets & (rank >= step))
        made = targets & ~masked & (rank == step)
        return total + jnp.sum(jnp.where(made, share, 0.0), axis=-1), None

    return jax.lax.scan(add, jnp.zeros(rank.shape[:-1]), jnp.arange(rank.shape[-1]))[0]


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
