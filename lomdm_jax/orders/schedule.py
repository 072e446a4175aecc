"""What a generation order is: for every position, the probability that it is masked at time t.

Time runs from 0 (clean) to 1 (all masked). A schedule is written in log space, as log m_i of
log t, because both ends then stay exact: with a small exponent a position is revealed at a time
such as t = 1e-50, which float32 cannot hold but whose logarithm it can.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp


class Schedule(Protocol):
    """log m_i(t) and its time derivative; everything else in the library follows from the two.

    Both take log t of shape [...] (float32, <= 0) and return [..., L] in float32, where the
    leading axes broadcast against those of the schedule's own parameters.
    """

    def log_mask(self, log_t: jax.Array) -> jax.Array:
        """log of the probability that position i is masked at t, in nats, <= 0."""
        ...

    def velocity(self, log_t: jax.Array) -> jax.Array:
        """A_i(t) = d/dt log m_i(t), the rate of the objective (arXiv 2602.02112), per unit time."""
        ...


class Power(NamedTuple):
    """m_i(t) = t^e_i: masked diffusion (e = 1), polynomial (e = c) and learned exponents alike.

    With u = -log t the rates are constant, so the order is an exponential race with weights e_i.
    """

    exponents: jax.Array  # [..., L] float32, > 0

    def log_mask(self, log_t: jax.Array) -> jax.Array:
        return self.exponents * log_t[..., None]

    def velocity(self, log_t: jax.Array) -> jax.Array:
        return self.exponents * jnp.exp(-log_t)[..., None]


def unmask_probability(schedule: Schedule, log_t: jax.Array, log_s: jax.Array) -> jax.Array:
    """Probability [..., L] that a position masked at t is revealed by s < t: 1 - m(s)/m(t)."""
    return -jnp.expm1(schedule.log_mask(log_s) - schedule.log_mask(log_t))


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
