"""The race: positions are drawn without replacement by their weights, independently of time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lomdm_jax.orders.race import race_ranks
from lomdm_jax.orders.schedule import Schedule


class Race(NamedTuple):
    """reveal: positions per network call; 1 is exact, without a time grid or any other error.

    length: positions of the sequence.
    """

    reveal: int
    length: int

    @property
    def max_calls(self) -> int:
        return -(-self.length // self.reveal)

    def __call__(
        self,
        keys_B: jax.Array,
        schedule: Schedule,
        masked_BL: jax.Array,
        call: jax.Array,
        log_t_B: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        rank_BL = jax.vmap(race_ranks)(keys_B, schedule.weights(), masked_BL)
        done_B = jnp.sum(~masked_BL, axis=-1, keepdims=True)
        return rank_BL < done_B + self.reveal, log_t_B
