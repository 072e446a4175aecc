"""AdamW with a linear warm-up, a constant rate and a clipped gradient, as MDLM trains."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """Step to rate: linear from 0 over `warmup_steps`, then constant."""
    if not config.warmup_steps:  # optax would stay at 0
        return optax.constant_schedule(config.learning_rate)
    return optax.warmup_constant_schedule(0.0, config.learning_rate, config.warmup_steps)


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """The optimizer of the config section `optimizer`."""
    return optax.chain(
        optax.masked(optax.clip_by_global_norm(config.clip_norm), _no_pointers),
        optax.masked(optax.clip_by_global_norm(config.clip_norm), _pointers),
        optax.adamw(
            learning_rate(config),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        ),
        optax.masked(optax.scale(config.head_multiplier), _order_heads),
    )


def _order_heads(params: Any) -> Any:
    """True for the parameters that only the order has."""
    return jax.tree.map_with_path(lambda path, _: path[0].key.endswith("_head"), params)


def _pointers(params: Any) -> Any:
    """True for the parameters of pointers: their gradient, noisy as it is, is clipped by itself."""
    return {
        name: jax.tree.map(lambda _: "distance" in part, part)  # noqa: B023, used at once
        for name, part in params.items()
    }


def _no_pointers(params: Any) -> Any:
    return jax.tree.map(lambda pointer: not pointer, _pointers(params))


def ema_decay(limit: float, step: jax.Array) -> jax.Array:
    """MDLM's warm decay (models/ema.py): min(limit, (1 + n) / (10 + n)) at the n-th update."""
    count = step.astype(jnp.float32) + 1
    return jnp.minimum(limit, (1 + count) / (10 + count))


def update_ema(ema: Any, params: Any, decay: jax.Array) -> Any:
    """decay * ema + (1 - decay) * params, leaf by leaf."""
    return jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), ema, params)
