"""Which positions a step reveals: the one thing in which the samplers of a block differ."""

from typing import NamedTuple, Protocol

import jax

from lomdm_jax.orders.schedule import Schedule


class Now(NamedTuple):
    """What a chooser may look at, of the K positions of a block.

    keys_B: one PRNG key per row.
    open_BK: bool, positions that are hidden and may be revealed.
    shown_BK: bool, positions that were revealed before; what is given is neither.
    schedule: the reverse schedule in this state, parameters [B, K].
    log_share_BK: float32, log-probability that a position comes next, by the order.
    score_BK: what the chooser's own `score` gave.
    entropy_BK: float32, nats, of the tokens that may be drawn.
    log_t_B: float32, log of the time of each row.
    step: int32 scalar, steps made in this block.
    """

    keys_B: jax.Array
    open_BK: jax.Array
    shown_BK: jax.Array
    schedule: Schedule
    log_share_BK: jax.Array
    score_BK: jax.Array
    entropy_BK: jax.Array
    log_t_B: jax.Array
    step: jax.Array


class Choice(NamedTuple):
    """What a step does.

    reveal_BK: bool, positions whose tokens are revealed.
    log_t_B: float32, log of the time after the step.
    hide_BK: bool, positions that are masked again; None for none.
    """

    reveal_BK: jax.Array
    log_t_B: jax.Array
    hide_BK: jax.Array | None = None


class Chooser(Protocol):
    """A way to choose.

    least_steps: steps that a block lasts even if all of it is revealed.
    """

    @property
    def least_steps(self) -> int: ...

    def score(self, log_p_BKV: jax.Array, log_share_BK: jax.Array) -> jax.Array:
        """What it wants to know of each position when the network is called, float32 [B, K].

        log_p_BKV: log-probabilities of the tokens, without temperature.
        """
        ...

    def __call__(self, now: Now) -> Choice: ...
