"""What a run carries from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from lomdm_jax.orders.learned import TRIALS


class TrainState(struct.PyTreeNode):
    """Plain arrays only, so that it can be donated, sharded and saved as it is.

    step: int32 scalar, updates made so far.
    params, ema: float32 parameters and their exponential moving average, plain dicts.
    opt_state: state of the optimizer.
    noise_range: float32 [2], where in [0, 1) the masked share of a block is drawn; all of it until
      `objective.clip_noise` finds a better one.
    trials: float32 [4], nats per token that training text has cost under each of
      `orders.learned.TRIALS`, summed over the steps so far.
    running_loss: float32 [3], what the loss has been in good steps; see `guard.judge`.
    """

    step: jax.Array
    params: Any
    ema: Any
    opt_state: optax.OptState
    noise_range: jax.Array
    trials: jax.Array
    running_loss: jax.Array


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; run it under jit, so that nothing aliases anything."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        noise_range=jnp.array([0.0, 1.0], jnp.float32),
        trials=jnp.zeros(len(TRIALS)),
        running_loss=jnp.zeros(3),
    )
