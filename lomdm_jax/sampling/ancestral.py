"""Ancestral sampling: each masked position is revealed with probability 1 - m(s)/m(t)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lomdm_jax.orders.schedule import Schedule, unmask_probability
from lomdm_jax.sampling.choice import Choice, Now

GRIDS = ("even", "linear", "cosine")


class Ancestral(NamedTuple):
    """steps: of a block; what reveals nothing costs no network call.

    grid: "linear" in t, as in the literature; "cosine", t = cos(pi/2 n/steps), which reveals few at
      first (MaskGIT, arXiv 2202.04200); or "even" in progress. With small exponents a linear grid
      leaves most positions to the last step, which reveals them at once. With even progress, s is
      solved for in each row so that the expected number of reveals is (masked positions) / (steps
      left).
    remask: the share of the greatest chance at which what was revealed is masked again, so that
      later steps can mend it (ReMDM, arXiv 2503.00307, section 4, the rescaled schedule).
    """

    steps: int
    grid: str = "even"
    remask: float = 0.0

    @property
    def least_steps(self) -> int:
        return self.steps if self.remask else 0

    def score(self, log_p_BKV: jax.Array, log_share_BK: jax.Array) -> jax.Array:
        return log_share_BK

    def __call__(self, now: Now) -> Choice:
        log_s_B = self._next_time(now)
        reveal_BK = unmask_probability(now.schedule, now.log_t_B, log_s_B)
        shape = now.open_BK.shape[1:]
        uniform_BK = jax.vmap(lambda key: jax.random.uniform(key, shape))(now.keys_B)
        if not self.remask:
            return Choice((uniform_BK < reveal_BK) & now.open_BK, log_s_B)
        hide_BK, reveal_BK = _remasking(now.schedule, now.log_t_B, log_s_B, self.remask)
        hide_BK = (uniform_BK < hide_BK) & now.shown_BK
        return Choice((uniform_BK < reveal_BK) & now.open_BK, log_s_B, hide_BK)

    def _next_time(self, now: Now) -> jax.Array:
        left, share = self.steps - now.step, (now.step + 1) / self.steps
        if self.grid == "even":
            log_s_B = even_progress(now.schedule, now.open_BK, now.log_t_B, left)
        else:
            s = 1 - share if self.grid == "linear" else jnp.cos(jnp.pi / 2 * share)
            log_s_B = jnp.broadcast_to(jnp.log(s), now.log_t_B.shape)
        return jnp.where(left <= 1, -jnp.inf, log_s_B)


def _remasking(
    schedule: Schedule, log_t_B: jax.Array, log_s_B: jax.Array, share: float
) -> tuple[jax.Array, jax.Array]:
    """The probabilities [B, K] that a revealed position is masked and a masked one revealed.

    With masking at the rate sigma = share * min(1, m(s) / (1 - m(t))), a position is masked at s
    with probability m(s) as without it: (1 - m(t)) sigma + m(t) (1 - reveal) = m(s).
    """
    m_t, m_s = (jnp.exp(schedule.log_mask(log)) for log in (log_t_B, log_s_B))
    hide = share * jnp.minimum(1.0, m_s / jnp.maximum(1 - m_t, 1e-30))
    reveal = (m_t - m_s + (1 - m_t) * hide) / jnp.maximum(m_t, 1e-30)
    return hide, jnp.where(jnp.isneginf(log_s_B)[:, None], 1.0, reveal)


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
