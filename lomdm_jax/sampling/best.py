"""So many positions per step: those that a race draws, or those with the highest score."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lomdm_jax.orders.race import invert
from lomdm_jax.sampling.choice import Choice, Now
from lomdm_jax.sampling.tokens import entropy, independent

SCORES = ("race", "velocity", "confidence", "margin", "entropy")


class Best(NamedTuple):
    """Positions one after another by their score, `reveal` of them per step at most.

    by: "race" draws them without replacement with the order's own weights; with one per step it is
      exact, without a time grid or any other error. The others draw nothing, and ties go to the
      left: "velocity" takes what is likeliest to come next; "confidence" the largest token
      probability; "margin" the largest lead of the likeliest token over the second; "entropy" the
      least entropy of the token.
    reveal: positions per step.
    threshold: beyond the first, only positions whose velocity share, confidence or margin is at
      least this, or whose entropy is at most this (nats); 0 for no bound.
    dependence: see `tokens.independent`.
    """

    by: str
    reveal: int = 1
    threshold: float = 0.0
    dependence: float = np.inf

    @property
    def least_steps(self) -> int:
        return 0

    def score(self, log_p_BKV: jax.Array, log_share_BK: jax.Array) -> jax.Array:
        if self.by == "confidence":
            return jnp.exp(jnp.max(log_p_BKV, axis=-1))
        if self.by == "margin":
            first_BK, second_BK = jnp.moveaxis(jnp.exp(jax.lax.top_k(log_p_BKV, 2)[0]), -1, 0)
            return first_BK - second_BK
        if self.by == "entropy":
            return -entropy(log_p_BKV)
        return jnp.exp(log_share_BK)

    def __call__(self, now: Now) -> Choice:
        score_BK = now.score_BK
        if self.by == "race":
            # Full-precision Gumbel noise: the default float32 draw cuts the tail of the race.
            shape = score_BK.shape[1:]
            noise = jax.vmap(lambda key: jax.random.gumbel(key, shape, mode="high"))(now.keys_B)
            score_BK = now.log_share_BK + noise
        # A step never crosses from one group of an order to the next.
        able_BK = now.open_BK & ~jnp.isneginf(now.log_share_BK)
        order_BK = jnp.argsort(jnp.where(able_BK, -score_BK, jnp.inf), axis=-1)
        rank_BK = invert(order_BK)
        reveal_BK = rank_BK < self.reveal
        if self.threshold:
            bound = -self.threshold if self.by == "entropy" else self.threshold
            reveal_BK &= (score_BK >= bound) | (rank_BK == 0)
        if self.dependence < np.inf:
            entropy_BK = jnp.take_along_axis(now.entropy_BK, order_BK, axis=-1)
            apart_BK = independent(entropy_BK, self.dependence)
            reveal_BK &= jnp.take_along_axis(apart_BK, rank_BK, axis=-1)
        return Choice(reveal_BK & able_BK, now.log_t_B)
