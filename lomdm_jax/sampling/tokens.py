"""From logits to tokens: which ones may be drawn, and a draw that keeps the tail."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Filter(NamedTuple):
    """What is drawn from instead of the model's own probabilities.

    temperature: logits are divided by it; 0 takes the likeliest token.
    top_k: the so many likeliest tokens; 0 for all.
    top_p: the likeliest tokens that together have this probability, after the temperature and
      among the `top_k`; the one that crosses it included. 1 for all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __call__(self, logits_BLV: jax.Array) -> jax.Array:
        """Logits, float32 [B, L, V], with -inf for what may not be drawn."""
        if self.temperature == 0:
            best_BL1 = jnp.argmax(logits_BLV, axis=-1, keepdims=True)
            return jnp.where(jnp.arange(logits_BLV.shape[-1]) == best_BL1, 0.0, -jnp.inf)
        logits_BLV = logits_BLV / self.temperature
        if 0 < self.top_k < logits_BLV.shape[-1]:
            least_BL1 = jax.lax.top_k(logits_BLV, self.top_k)[0][..., -1:]
            logits_BLV = jnp.where(logits_BLV >= least_BL1, logits_BLV, -jnp.inf)
        return _nucleus(logits_BLV, self.top_p) if self.top_p < 1 else logits_BLV


def _nucleus(logits_BLV: jax.Array, top_p: float) -> jax.Array:
    """Kept is what has less than `top_p` above it. The least such value is found by halving the
    range of all that float32 has: 32 sums, where a sort of the vocabulary takes far more."""
    share_BLV, rank_BLV = jax.nn.softmax(logits_BLV), _float_ranks(logits_BLV)

    def halve(_: jax.Array, span: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_BL1, high_BL1 = span
        middle_BL1 = low_BL1 + (high_BL1 - low_BL1) // 2
        above_BL1 = jnp.sum(share_BLV, axis=-1, where=rank_BLV > middle_BL1, keepdims=True)
        kept_BL1 = above_BL1 < top_p
        low_BL1 = jnp.where(kept_BL1, low_BL1, middle_BL1 + 1)
        return low_BL1, jnp.where(kept_BL1, middle_BL1, high_BL1)

    most_BL1 = jnp.max(rank_BLV, axis=-1, keepdims=True)
    least_BL1, _ = jax.lax.fori_loop(0, 32, halve, (jnp.zeros_like(most_BL1), most_BL1))
    return jnp.where(rank_BLV >= least_BL1, logits_BLV, -jnp.inf)


def _float_ranks(a: jax.Array) -> jax.Array:
    """Where each float32 stands among all float32, uint32."""
    bits = jax.lax.bitcast_convert_type(a.astype(jnp.float32) + 0.0, jnp.uint32)  # -0 is 0
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)


def draw_tokens(keys_B: jax.Array, logits_BLV: jax.Array) -> jax.Array:
    """One token per position, int32 [B, L], each row from its own key.

    A group of about sqrt(V) neighbours of the vocabulary is drawn by its sum, then a token of it:
    the same distribution from 2 sqrt(V) random numbers a position, where the noise for V of them
    takes longer than a small network. Gumbel noise from plain float32 uniforms is cut off near 16
    nats, which silently lowers the temperature; the high-precision draw keeps the tail.
    """
    size = math.isqrt(logits_BLV.shape[-1] - 1) + 1
    missing = -logits_BLV.shape[-1] % size
    padded_BLV = jnp.pad(logits_BLV, ((0, 0), (0, 0), (0, missing)), constant_values=-jnp.inf)
    logits_BLGS = padded_BLV.reshape(*logits_BLV.shape[:-1], -1, size)
    draw = jax.vmap(functools.partial(jax.random.categorical, mode="high"))
    keys_B2 = jax.vmap(jax.random.split)(keys_B)
    group_BL = draw(keys_B2[:, 0], jax.nn.logsumexp(logits_BLGS, axis=-1))
    group_BL11 = group_BL[..., None, None]
    logits_BLS = jnp.take_along_axis(logits_BLGS, group_BL11, axis=-2)[..., 0, :]
    return (group_BL * size + draw(keys_B2[:, 1], logits_BLS)).astype(jnp.int32)


def entropy(log_p: jax.Array) -> jax.Array:
    """Entropy in nats over the last axis of log-probabilities, float32 [...]."""
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1, where=log_p > -jnp.inf)


def independent(entropy_BQ: jax.Array, dependence: float) -> jax.Array:
    """Which of the first tokens may be drawn independently, bool [B, Q], the first always.

    The sum of their entropies less the largest bounds what is lost by it, their total correlation
    (nats); it must stay within `dependence`.
    """
    largest_BQ = jax.lax.cummax(entropy_BQ, axis=1)
    # The first adds exactly nothing: no rounding may keep it from being taken.
    lost_BQ = (jnp.cumsum(entropy_BQ, axis=-1) - largest_BQ).at[:, 0].set(0.0)
    return lost_BQ <= dependence
