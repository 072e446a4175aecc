"""The loop that every sampler shares: call the network, choose positions, draw their tokens."""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from lomdm_jax.objectives.nelbo import Reverse, remove_mask
from lomdm_jax.orders.schedule import Schedule


class Samples(NamedTuple):
    """What a sampler returns.

    tokens_BL: int32 token ids.
    revealed_BL: int32, the network call (1, 2, ...) that revealed each position; 0 if given.
    calls: int32 scalar, network calls made for the batch (NFE).
    """

    tokens_BL: jax.Array
    revealed_BL: jax.Array
    calls: jax.Array


class Now(NamedTuple):
    """What a sampler may look at when it chooses.

    keys_B: one PRNG key per row.
    schedule: the reverse schedule at this state, parameters [B, L].
    masked_BL: bool, positions still hidden.
    call: int32 scalar, 0 at the first network call.
    log_t_B: float32, log of the time of each row.
    """

    keys_B: jax.Array
    schedule: Schedule
    masked_BL: jax.Array
    call: jax.Array
    log_t_B: jax.Array


class Chooser(Protocol):
    """Which positions to reveal now; the one thing in which samplers differ.

    max_calls: the number of calls after which nothing is left to reveal, whatever is drawn.
    """

    @property
    def max_calls(self) -> int: ...

    def __call__(self, now: Now) -> tuple[jax.Array, jax.Array]:
        """Positions to reveal, bool [B, L], and log t of the next call, float32 [B]."""
        ...


class _Carry(NamedTuple):
    tokens_BL: jax.Array
    revealed_BL: jax.Array
    log_t_B: jax.Array
    call: jax.Array


def generate(
    key: jax.Array,
    reverse: Reverse,
    chooser: Chooser,
    tokens_BL: jax.Array,
    given_BL: jax.Array,
    *,
    mask_id: int,
) -> Samples:
    """Fill every position that is not given.

    Each row draws from keys of its own, so rows do not influence one another.

    Args:
      key: one PRNG key.
      reverse: the model; see `objectives.nelbo.Reverse`.
      chooser: the sampler.
      tokens_BL: ids of the given positions (prompt, infill), int32; others are ignored.
      given_BL: which positions are given, bool.
      mask_id: id of the mask token.
    """
    rows = tokens_BL.shape[0]
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(rows))

    def unfinished(carry: _Carry) -> jax.Array:
        return jnp.any(carry.tokens_BL == mask_id) & (carry.call < chooser.max_calls)

    def step(carry: _Carry) -> _Carry:
        call_keys_B2 = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, carry.call)))(
            keys_B
        )
        logits_KBLV, schedule = reverse(carry.tokens_BL[None], carry.log_t_B)
        masked_BL = carry.tokens_BL == mask_id
        schedule = jax.tree.map(lambda a: a[0], schedule.at(masked_BL[None]))
        now = Now(call_keys_B2[:, 0], schedule, masked_BL, carry.call, carry.log_t_B)
        chosen_BL, log_t_B = chooser(now)
        reveal_BL = chosen_BL & masked_BL
        drawn_BL = draw_tokens(call_keys_B2[:, 1], remove_mask(logits_KBLV[0], mask_id))
        tokens_BL = jnp.where(reveal_BL, drawn_BL, carry.tokens_BL)
        revealed_BL = jnp.where(reveal_BL, carry.call + 1, carry.revealed_BL)
        return _Carry(tokens_BL, revealed_BL, log_t_B, carry.call + 1)

    start = _Carry(
        tokens_BL=jnp.where(given_BL, tokens_BL, mask_id).astype(jnp.int32),
        revealed_BL=jnp.zeros_like(tokens_BL, jnp.int32),
        log_t_B=jnp.zeros(rows),
        call=jnp.zeros((), jnp.int32),
    )
    end = jax.lax.while_loop(unfinished, step, start)
    return Samples(end.tokens_BL, end.revealed_BL, end.call)


def draw_tokens(keys_B: jax.Array, logits_BLV: jax.Array) -> jax.Array:
    """One token per position, int32 [B, L], each row from its own key.

    Gumbel noise from plain float32 uniforms is cut off near 16 nats, which silently lowers the
    temperature; the high-precision draw keeps the tail.
    """

    def row(key: jax.Array, logits_LV: jax.Array) -> jax.Array:
        return jax.random.categorical(key, logits_LV, mode="high").astype(jnp.int32)

    return jax.vmap(row)(keys_B, logits_BLV)
