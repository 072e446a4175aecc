"""The race: positions are drawn without replacement by their weights, independently of time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lomdm_jax.orders.race import can_come_next, row_ranks
from lomdm_jax.sampling.driver import Now


class Race(NamedTuple):
    """reveal: positions per network call; 1 is exact, without a time grid or any other error.

    A call never crosses from one group of the order to the next: a network whose attention
    follows the order knows the groups before only when they are complete.

    length: positions of the sequence.
    """

    reveal: int
    length: int

    @property
    def max_calls(self) -> int:
        return self.length  # each call reveals one position at least

    def __call__(self, now: Now) -> tuple[jax.Array, jax.Array]:
        weights = now.schedule.weights()
        rank_BL = row_ranks(now.keys_B, weights, now.masked_BL, self.reveal)
        done_B1 = jnp.sum(~now.masked_BL, axis=-1, keepdims=True)
        first_BL = rank_BL < done_B1 + self.reveal
        return first_BL & can_come_next(weights, now.masked_BL), now.log_t_B
