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
    """

    step: jax.Array
    params: Any
    ema: Any
    opt_state: optax.OptState


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; run it under jit, so that nothing aliases anything."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
    )
