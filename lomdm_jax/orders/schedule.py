"""What a generation order is: for every position, the probability that it is masked at time t.

Time runs from 0 (clean) to 1 (all masked). A schedule is written in log space, as log m_i of
log t, because both ends then stay exact: with a small exponent a position is revealed at a time
such as t = 1e-50, which float32 cannot hold but whose logarithm it can.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from lomdm_jax.errors import UserError


class Weights(NamedTuple):
    """The order of a schedule without its clock.

    Going from all masked to clean, the next position is i with probability w_i over the sum of
    the weights, both among the masked positions of the lowest group that is left.

    log_w: float32 [..., L].
    group: int32 [..., L].
    neighbours: float32 [..., 2, 2], added to the log-weight of a position by whether its left and
      its right neighbour are revealed; None for weights that do not look at them.
    moves: float32 [..., L, 2 W + 1], added to the log-weight of position i after the reveal of j:
      moves[..., j, W + d], where d is i - j, at most W either way. None for weights that do not
      look at what was revealed last.
    """

    log_w: jax.Array
    group: jax.Array
    neighbours: jax.Array | None = None
    moves: jax.Array | None = None

    @property
    def stepwise(self) -> bool:
        """Whether the weights change with every reveal."""
        return self.neighbours is not None or self.moves is not None

    def at(self, masked: jax.Array, last: jax.Array | None = None) -> "Weights":
        """The weights in the state where `masked`, bool [..., L], is hidden.

        What lies beyond the edges counts as revealed, so that a walk in either direction begins
        at an end of the text.

        last: position that was revealed last, int32 [...], -1 for none; needed for `moves` only.
        """
        log_w = self.log_w
        if self.neighbours is not None:
            log_w = log_w + _of_neighbours(self.neighbours, masked)
        if self.moves is not None:
            assert last is not None
            log_w = log_w + _of_move(self.moves, last)
        return Weights(log_w, self.group)

    def after(self, first: jax.Array) -> "Weights":
        """The same order, but with the positions `first`, bool [..., L], before all others."""
        later = jnp.max(self.group, axis=-1, keepdims=True) + 1
        return self._replace(group=self.group + jnp.where(first, 0, later))

    def flattened(self, temperature: float) -> "Weights":
        """Every log-weight divided by the temperature: 1 for the same order, more for a flatter."""
        if temperature == 1:
            return self
        return jax.tree.map(lambda a: a / temperature, self)._replace(group=self.group)


def _of_neighbours(table: jax.Array, masked: jax.Array) -> jax.Array:
    around = [(0, 0)] * (masked.ndim - 1) + [(1, 1)]
    revealed = jnp.pad(~masked, around, constant_values=True)
    left, right = revealed[..., :-2], revealed[..., 2:]
    (neither, only_right), (only_left, both) = (
        [table[..., i, j, None] for j in range(2)] for i in range(2)
    )
    return jnp.where(left, jnp.where(right, both, only_left), jnp.where(right, only_right, neither))


def _of_move(moves: jax.Array, last: jax.Array) -> jax.Array:
    length, window = moves.shape[-2], moves.shape[-1] // 2
    last = last[..., None]
    row = jnp.take_along_axis(moves, jnp.maximum(last, 0)[..., None], axis=-2)[..., 0, :]
    distance = jnp.clip(jnp.arange(length) - last, -window, window) + window
    return jnp.where(last >= 0, jnp.take_along_axis(row, distance, axis=-1), 0.0)


class Schedule(Protocol):
    """log m_i(t), its velocity, and the order they imply.

    The first two take log t of shape [...] (float32, <= 0) and return [..., L] in float32, where
    the leading axes broadcast against those of the schedule's own parameters.
    """

    def log_mask(self, log_t: jax.Array) -> jax.Array:
        """log of the probability that position i is masked at t, in nats, <= 0."""
        ...

    def log_velocity(self, log_t: jax.Array) -> jax.Array:
        """log A_i(t), where A_i(t) = d/dt log m_i(t) is the rate of the objective (arXiv
        2602.02112) per unit time; -inf where nothing is revealed."""
        ...

    def weights(self) -> Weights:
        """Which position comes next; the same at all times."""
        ...

    def at(self, masked: jax.Array) -> "Schedule":
        """The schedule in the state where `masked`, bool [..., L], is hidden."""
        ...

    def flattened(self, temperature: float) -> "Schedule":
        """The schedule in a given state with its log-weights divided by the temperature, and the
        clock as it was: the mean rate stays. 1 for the same order, more for a flatter one."""
        ...


class Power(NamedTuple):
    """m_i(t) = t^e_i: masked diffusion (e = 1), polynomial (e = c) and learned exponents alike.

    With u = -log t the rates are constant, so the order is an exponential race with weights e_i.
    """

    log_exponents: jax.Array  # [..., L] float32

    def log_mask(self, log_t: jax.Array) -> jax.Array:
        return jnp.exp(self.log_exponents) * log_t[..., None]

    def log_velocity(self, log_t: jax.Array) -> jax.Array:
        return self.log_exponents - log_t[..., None]

    def weights(self) -> Weights:
        return Weights(self.log_exponents, jnp.zeros(self.log_exponents.shape, jnp.int32))

    def at(self, masked: jax.Array) -> "Power":
        return self

    def flattened(self, temperature: float) -> "Power":
        log_e = self.log_exponents
        change = [
            sign * jax.nn.logsumexp(a, -1, keepdims=True)
            for sign, a in ((1, log_e), (-1, log_e / temperature))
        ]
        return self if temperature == 1 else Power(log_e / temperature + sum(change))


class Walk(NamedTuple):
    """Rates that follow what is revealed already: a race that walks through the text.

    In log-time u = -log t a masked position is revealed at the rate of `Weights.at`, which jumps
    whenever a neighbour is revealed. So there is no m_i(t) of one position alone, and the orders
    are drawn one reveal after another; in a given state it is a `Power`.

    log_exponents: float32 [..., L], of a position with masked neighbours.
    neighbours, moves: see `Weights`; with moves the state alone does not give the rates.
    """

    log_exponents: jax.Array
    neighbours: jax.Array
    moves: jax.Array | None = None

    def log_mask(self, log_t: jax.Array) -> jax.Array:
        raise _no_time()

    def log_velocity(self, log_t: jax.Array) -> jax.Array:
        raise _no_time()

    def weights(self) -> Weights:
        group = jnp.zeros(self.log_exponents.shape, jnp.int32)
        return Weights(self.log_exponents, group, self.neighbours, self.moves)

    def at(self, masked: jax.Array) -> Power:
        return Power(self.weights().at(masked).log_w)

    def flattened(self, temperature: float) -> "Walk":
        return jax.tree.map(lambda a: a / temperature, self)


def _no_time() -> UserError:
    return UserError(
        "An order that follows its neighbours has rates that depend on the state, so no position "
        'has a mask probability of its own: use the time-free objective, "order".'
    )


class Cosine(NamedTuple):
    """m(t) = sin(pi t / 2) at every position, MD4's cosine schedule (google-deepmind/md4)."""

    zeros: jax.Array  # [..., L], gives the shape

    def log_mask(self, log_t: jax.Array) -> jax.Array:
        # Below t = 1e-4 the sine is its argument to rounding, also where t itself underflows.
        sine = jnp.log(jnp.sin(jnp.pi / 2 * jnp.exp(jnp.maximum(log_t, -9.0))))
        return self.zeros + jnp.where(log_t > -9.0, sine, jnp.log(jnp.pi / 2) + log_t)[..., None]

    def log_velocity(self, log_t: jax.Array) -> jax.Array:
        angle = jnp.pi / 2 * jnp.exp(jnp.maximum(log_t, -9.0))
        slope = jnp.log(jnp.pi / 2 * jnp.maximum(jnp.cos(angle), 0.0) / jnp.sin(angle))
        return self.zeros + jnp.where(log_t > -9.0, slope, -log_t)[..., None]

    def weights(self) -> Weights:
        return Weights(self.zeros, jnp.zeros(self.zeros.shape, jnp.int32))

    def at(self, masked: jax.Array) -> "Cosine":
        return self

    def flattened(self, temperature: float) -> "Cosine":
        return self


class Windows(NamedTuple):
    """Groups of positions revealed one group after another, at random within each.

    With G groups, group k is revealed while t falls from 1 - k/G to 1 - (k+1)/G: left to right
    (one position per group), blocks, or any permutation. The bound is then the chain rule.

    group: int32 [..., L], 0 is revealed first.
    groups: G, a float32 scalar.
    """

    group: jax.Array
    groups: jax.Array

    def _masked_share(self, log_t: jax.Array) -> jax.Array:
        """Share of the group's window that is still ahead, outside [0, 1] when it is not on."""
        return self.groups * jnp.exp(log_t)[..., None] - (self.groups - 1 - self.group)

    def log_mask(self, log_t: jax.Array) -> jax.Array:
        return jnp.log(jnp.clip(self._masked_share(log_t), 0, 1))

    def log_velocity(self, log_t: jax.Array) -> jax.Array:
        share = self._masked_share(log_t)
        inside = (share > 0) & (share <= 1)
        rate = jnp.log(self.groups) - jnp.log(jnp.where(inside, share, 1.0))
        return jnp.where(inside, rate, -jnp.inf)

    def weights(self) -> Weights:
        return Weights(jnp.zeros(self.group.shape, jnp.float32), self.group)

    def at(self, masked: jax.Array) -> "Windows":
        return self

    def flattened(self, temperature: float) -> "Windows":
        return self


def unmask_probability(schedule: Schedule, log_t: jax.Array, log_s: jax.Array) -> jax.Array:
    """Probability [..., L] that a position masked at t is revealed by s < t: 1 - m(s)/m(t)."""
    log_m_s = schedule.log_mask(log_s)
    kept = log_m_s - schedule.log_mask(log_t)
    return jnp.where(jnp.isneginf(log_m_s), 1.0, -jnp.expm1(kept))


def log_mask_probability(
    schedule: Schedule, log_t: jax.Array, mask: jax.Array, targets: jax.Array
) -> jax.Array:
    """log q(z_t | x) in nats, [...]: the score function of the masks drawn at t.

    Args:
      schedule: the forward schedule, parameters [..., L].
      log_t: log of the time, [...], float32.
      mask: which positions are masked, bool [..., L].
      targets: which positions are subject to masking at all, bool [..., L].
    """
    log_m = schedule.log_mask(log_t)
    # At t = 1, log m = 0 and log(1 - m) has an infinite slope: keep it out where it is not used.
    log_kept = jnp.log(-jnp.expm1(jnp.where(targets & ~mask, log_m, -1.0)))
    return jnp.sum(jnp.where(targets, jnp.where(mask, log_m, log_kept), 0.0), axis=-1)
