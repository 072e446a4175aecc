"""Samplers by name."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lomdm_jax.generator import Generator
from lomdm_jax.orders.race import invert, row_ranks
from lomdm_jax.sampling.ancestral import Ancestral
from lomdm_jax.sampling.best import Best
from lomdm_jax.sampling.blocks import InBlocks
from lomdm_jax.sampling.choice import Chooser
from lomdm_jax.sampling.contexts import Blocks, Causal, Context, Recall, Whole
from lomdm_jax.sampling.driver import Sampler
from lomdm_jax.sampling.recall import InAnyOrder
from lomdm_jax.sampling.tokens import Filter


def make_sampler(config: ConfigDict, generator: Generator, eos_id: int, window: int) -> Sampler:
    """The sampler of a config section `sample`, which `config.validate` has checked.

    eos_id: the token that ends a text, for `stop_at_eos`.
    window: tokens per sequence in training, `data.length`.
    """
    filtered = Filter(config.temperature, config.top_k, config.top_p)
    common: dict[str, Any] = {
        "filter": filtered,
        "mask_id": generator.mask_id,
        "order_temperature": config.order_temperature,
        "eos_id": eos_id if config.stop_at_eos else None,
    }
    if generator.one_pass == "order":
        return InAnyOrder(
            model=lambda params: Recall(generator.schedule, generator.module(params), window),
            given_ranks=functools.partial(_given_ranks, generator, config.given),
            reveal=config.reveal,
            dependence=config.dependence,
            **common,
        ).sampler()
    context = functools.partial(_context, config, generator, window)
    chooser, sees_time = make_chooser(config), generator.time_conditioning
    return InBlocks(context, chooser, sees_time=sees_time, **common).sampler()


def make_chooser(config: ConfigDict) -> Chooser:
    """Which positions a step reveals."""
    if config.sampler == "ancestral":
        return Ancestral(config.steps, config.grid, config.remask)
    return Best(config.sampler, config.reveal, config.threshold, config.dependence)


def length_of(config: ConfigDict, window: int) -> int:
    """Tokens per sequence of a config section `sample`."""
    return config.length or window


def _context(config: ConfigDict, generator: Generator, window: int, params: Any) -> Context:
    length = length_of(config, window)
    if generator.one_pass == "state":
        seen = min(length, window)
        return Whole(generator, params, length, seen, config.block or length)
    module = generator.module(params)
    assert module.groups is not None
    group = np.asarray(module.groups)
    size = int(np.bincount(group)[0])
    if size > 1:
        return Blocks(module, length, window, size)
    left_to_right = (group == np.arange(len(group))).all()
    return Causal(module, np.arange(length) if left_to_right else np.argsort(group), window)


def _given_ranks(
    generator: Generator,
    how: str,
    params: Any,
    keys_B: jax.Array,
    tokens_BT: jax.Array,
    given_BT: jax.Array,
) -> jax.Array:
    """When each given position is read, int32 [B, T], T for the others; how: `sample.given`."""
    length = tokens_BT.shape[-1]
    if how == "text":
        drawn_BT = jnp.broadcast_to(jnp.arange(length), tokens_BT.shape)
    else:
        z_BT = jnp.where(given_BT, tokens_BT, generator.mask_id)
        weights = generator.forward(params, z_BT).weights().after(given_BT)
        drawn_BT = row_ranks(keys_B, weights, jnp.ones_like(given_BT))
    rank_BT = invert(invert(jnp.where(given_BT, drawn_BT, length)))
    return jnp.where(given_BT, rank_BT, length).astype(jnp.int32)
