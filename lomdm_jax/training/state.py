"""What a run carries from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct


class TrainState(struct.PyTreeNode):
    """Plain arrays only, so that it can be donated, sharded and saved as it is.

    step: int32 scalar, updates made so far.
    params, ema: float32 parameters and their exponential moving average, plain dicts.
    opt_state: state of the optimizer.
    noise_range: float32 [2], where in [0, 1) the masked share of a block is drawn; all of it until
      `objective.clip_noise` finds a better one.
    """

    step: jax.Array
    params: Any
    ema: Any
    opt_state: optax.OptState
    noise_range: jax.Array


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; run it under jit, so that nothing aliases anything."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        noise_range=jnp.array([0.0, 1.0], jnp.float32),
    )
