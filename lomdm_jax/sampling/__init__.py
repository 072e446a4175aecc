"""Samplers by name."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lomdm_jax.generator import Generator
from lomdm_jax.orders.race import invert, row_ranks
from lomdm_jax.sampling import driver, recall
from lomdm_jax.sampling.ancestral import Ancestral
from lomdm_jax.sampling.driver import Chooser, Samples
from lomdm_jax.sampling.race import Race

Sampler = Callable[[Any, jax.Array, jax.Array, jax.Array], Samples]


def make_sampler(config: ConfigDict, generator: Generator) -> Sampler:
    """(params, key, tokens int32 [B, L], given bool [B, L]) -> Samples, to be jitted: the sampler
    of the config section `sample`."""

    def sample(params: Any, key: jax.Array, tokens_BL: jax.Array, given_BL: jax.Array) -> Samples:
        chooser = make_chooser(config, tokens_BL.shape[-1])
        reverse, mask_id = generator.reverse(params), generator.mask_id
        return driver.generate(key, reverse, chooser, tokens_BL, given_BL, mask_id=mask_id)

    def sample_ranked(
        params: Any, key: jax.Array, tokens_BL: jax.Array, given_BL: jax.Array
    ) -> Samples:
        length = tokens_BL.shape[-1]
        key, given_key = jax.random.split(key)
        if config.given == "text":
            drawn_BL = jnp.broadcast_to(jnp.arange(length), tokens_BL.shape)
        else:
            z_BL = jnp.where(given_BL, tokens_BL, generator.mask_id)
            weights = generator.forward(params, z_BL).weights().after(given_BL)
            rows_B = jnp.arange(len(tokens_BL))
            keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(given_key, rows_B)
            drawn_BL = row_ranks(keys_B, weights, jnp.ones_like(given_BL))
        rank_BL = invert(invert(jnp.where(given_BL, drawn_BL, length)))
        return recall.generate(
            key,
            generator.recaller(params, length),
            tokens_BL,
            jnp.where(given_BL, rank_BL, length).astype(jnp.int32),
            mask_id=generator.mask_id,
            reveal=config.reveal,
            dependence=config.dependence,
        )

    return sample_ranked if generator.one_pass == "order" else sample


def make_chooser(config: ConfigDict, length: int) -> Chooser:
    """Which positions a call of the network reveals, in sequences of `length` tokens."""
    if config.sampler == "race":
        return Race(config.reveal, length)
    return Ancestral(config.steps, config.grid == "even")
