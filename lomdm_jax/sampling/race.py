"""The race: positions are drawn without replacement by their weights, independently of time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lomdm_jax.orders.race import race_ranks
from lomdm_jax.sampling.driver import Now


class Race(NamedTuple):
    """reveal: positions per network call; 1 is exact, without a time grid or any other error.

    length: positions of the sequence.
    """

    reveal: int
    length: int

    @property
    def max_calls(self) -> int:
        return -(-self.length // self.reveal)

    def __call__(self, now: Now) -> tuple[jax.Array, jax.Array]:
        rank_BL = jax.vmap(race_ranks)(now.keys_B, now.schedule.weights(), now.masked_BL)
        done_B1 = jnp.sum(~now.masked_BL, axis=-1, keepdims=True)
        return rank_BL < done_B1 + self.reveal, now.log_t_B
