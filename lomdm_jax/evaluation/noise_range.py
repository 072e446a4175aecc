"""The range of noise to train blocks on: the one in which the training loss varies least.

BD3-LM's clipped schedules (arXiv 2503.09573, section 5; `_clipped_schedule_search` in diffusion.py
of kuleshov-group/bd3lms). Its bound is at its noisiest where few or almost all tokens are masked.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lomdm_jax.generator import Generator, apart
from lomdm_jax.objectives.corruption import stratified_uniforms
from lomdm_jax.objectives.nelbo import Batch, batch_of, group_costs

# Sequences that a search reads. It runs the network once on each for every candidate; BD3-LM
# reads up to 100 batches.
SEQUENCES = 512

Spread = Callable[[Any, dict[str, jax.Array], jax.Array], jax.Array]


def candidates() -> np.ndarray:
    """The ranges [low, high) that are compared, float32 [64, 2].

    The full one first, so that it wins a tie; then those of width 0.5, 0.55, ..., 0.9, from every
    multiple of 0.05, which is BD3-LM's clip_search_delta. BD3-LM's own widths are 0.5, 0.6, ...,
    0.9 (scripts/train), a subset.
    """
    twentieths = [(start, start + width) for width in range(10, 19) for start in range(21 - width)]
    return np.array([(0, 20), *twentieths], np.float32) / 20


def make_spread(generator: Generator) -> Spread:
    """(params, batch, key) -> for each of `candidates`, float32 [64]: the sum over blocks of the
    squared deviation of the block's training loss (nats) from the batch's mean; to be jitted.

    batch holds `tokens` int32 [B, L], `counted` bool [B, L] and perhaps more, see `training.step`;
    blocks without a counted token are left out. Every candidate gets the same random numbers.
    """

    def spread(params: Any, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        model = apart(generator, batch.get("segments"))
        rows, reverse = _rows(batch, key), model.reverse(params)
        group_BL = model.forward(params, rows.tokens_BL).weights().group

        def deviation(range_2: jax.Array) -> jax.Array:
            ranged = rows._replace(noise_range_B2=range_2[None])
            cost_KBL, *_ = group_costs(
                ranged, group_BL, reverse, mask_id=generator.mask_id, samples=1
            )
            return _squared_deviations(cost_KBL[0], batch["counted"], group_BL[0])

        return jax.lax.map(deviation, jnp.asarray(candidates()))

    return spread


def _rows(batch: dict[str, jax.Array], key: jax.Array) -> Batch:
    """The rows with randomness as in training: stratified over those with a counted token."""
    time_key, row_key = jax.random.split(key)
    keys_B = jax.random.split(row_key, len(batch["tokens"]))
    real = jnp.maximum(jnp.sum(batch["counted"].any(axis=-1)), 1)
    uniform_B = stratified_uniforms(time_key, jnp.arange(len(keys_B)), real)
    return batch_of(batch, keys_B, uniform_B)


def _squared_deviations(cost_BL: jax.Array, counted_BL: jax.Array, group_L: jax.Array) -> jax.Array:
    """Of the sums over each group of each row with a counted token, from their mean; a scalar."""
    loss_GB, counted_GB = (
        jax.ops.segment_sum(jnp.float32(a.T), group_L, len(group_L)) for a in (cost_BL, counted_BL)
    )
    mean = jnp.mean(loss_GB, where=counted_GB > 0)
    return jnp.sum((loss_GB - mean) ** 2, where=counted_GB > 0)


def search(
    spread: Spread,
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    key: jax.Array,
    place: Callable[[Any], Any] = jax.device_put,
) -> np.ndarray:
    """The candidate whose training loss per block has the least variance, float32 [2].

    Args:
      spread: a jitted `make_spread`.
      params: parameters, usually the EMA's.
      batches: dicts as of `make_spread`.
      key: PRNG key of the draws.
      place: puts host arrays on the devices.
    """
    found = [
        jax.device_get(spread(params, place(batch), jax.random.fold_in(key, number)))
        for number, batch in enumerate(batches)
    ]
    return candidates()[np.argmin(np.sum(found, axis=0, dtype=np.float64))]
