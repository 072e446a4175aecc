"""Ancestral sampling: each masked position is revealed with probability 1 - m(s)/m(t)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lomdm_jax.orders.schedule import Schedule, unmask_probability
from lomdm_jax.sampling.driver import Now


class Ancestral(NamedTuple):
    """steps: network calls. even: whether steps are even in progress or in t.

    The literature's grid is linear in t; with small exponents most positions then wait for the
    last step and are revealed at once. With even progress, s is solved for in each row so that
    the expected number of reveals is (masked positions) / (calls left).
    """

    steps: int
    even: bool

    @property
    def max_calls(self) -> int:
        return self.steps

    def __call__(self, now: Now) -> tuple[jax.Array, jax.Array]:
        left = self.steps - now.call
        if self.even:
            log_s_B = even_progress(now.schedule, now.masked_BL, now.log_t_B, left)
        else:
            log_s_B = jnp.broadcast_to(jnp.log((left - 1) / self.steps), now.log_t_B.shape)
        log_s_B = jnp.where(left == 1, -jnp.inf, log_s_B)
        probability_BL = unmask_probability(now.schedule, now.log_t_B, log_s_B)
        shape = now.masked_BL.shape[1:]
        uniform_BL = jax.vmap(lambda key: jax.random.uniform(key, shape))(now.keys_B)
        return uniform_BL < probability_BL, log_s_B


def even_progress(
    schedule: Schedule, masked_BL: jax.Array, log_t_B: jax.Array, left: jax.Array
) -> jax.Array:
    """log s, float32 [B], at which sum over masked of 1 - m(s)/m(t) is (masked) / left.

    Bisection on the logarithm of log(t/s). Its range, e^-15 to e^9, holds any step of a power
    schedule with exponents down to 0.01, and 40 halvings exhaust float32.
    """
    target_B = jnp.sum(masked_BL, axis=-1) / left

    def halve(_: int, interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = interval
        middle_B = (low_B + high_B) / 2
        probability_BL = unmask_probability(schedule, log_t_B, log_t_B - jnp.exp(middle_B))
        short_B = jnp.sum(probability_BL, axis=-1, where=masked_BL) < target_B
        return jnp.where(short_B, middle_B, low_B), jnp.where(short_B, high_B, middle_B)

    start = (jnp.full_like(log_t_B, -15.0), jnp.full_like(log_t_B, 9.0))
    low_B, high_B = jax.lax.fori_loop(0, 40, halve, start)
    return log_t_B - jnp.exp((low_B + high_B) / 2)
