"""What every sampler is to those who run it, and what it returns."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Samples(NamedTuple):
    """What a sampler returns, and what there is of it on the way.

    tokens_BT: int32 token ids; the mask id where nothing is revealed yet.
    revealed_BT: int32, the step (1, 2, ...) of its row that revealed each position; 0 if given, or
      not revealed.
    share_BT: float32, by the order, the probability that the position came next when it came.
    log_p_BT: float32, nats, the log-probability that the model gave the token when it was drawn,
      whatever the temperature.
    calls_B: int32, network calls (NFE) that each row needed.
    calls: int32 scalar, those made for all rows together.
    length_B: int32, tokens that count, up to the end of text where sampling stops at one.
    """

    tokens_BT: jax.Array
    revealed_BT: jax.Array
    share_BT: jax.Array
    log_p_BT: jax.Array
    calls_B: jax.Array
    calls: jax.Array
    length_B: jax.Array


class Sampler(NamedTuple):
    """A sampler as a loop over a state, a pytree whose field `samples` holds what there is so far.

    Each row draws from keys of its own, so rows do not influence one another.

    start: (params, keys [B], tokens int32 [B, T], given bool [B, T]) -> state; ids of positions
      that are not given do not matter.
    step: (params, state) -> state.
    unfinished: state -> bool scalar.
    finish: state -> Samples.
    """

    start: Callable[[Any, jax.Array, jax.Array, jax.Array], Any]
    step: Callable[[Any, Any], Any]
    unfinished: Callable[[Any], jax.Array]
    finish: Callable[[Any], Samples]

    def advance(self, params: Any, state: Any, steps: int | jax.Array) -> Any:
        """The state after so many steps more, or at the end."""

        def unfinished(carry: tuple[Any, jax.Array]) -> jax.Array:
            return self.unfinished(carry[0]) & (carry[1] < steps)

        def step(carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            return self.step(params, carry[0]), carry[1] + 1

        return jax.lax.while_loop(unfinished, step, (state, jnp.zeros((), jnp.int32)))[0]

    def __call__(
        self, params: Any, keys_B: jax.Array, tokens_BT: jax.Array, given_BT: jax.Array
    ) -> Samples:
        """All in one program, to be jitted."""
        state = self.start(params, keys_B, tokens_BT, given_BT)
        return self.finish(self.advance(params, state, jnp.iinfo(jnp.int32).max))


def nothing_yet(tokens_BT: jax.Array, given_BT: jax.Array, mask_id: int) -> Samples:
    """What there is before anything is revealed."""
    zeros_BT, zeros_B = jnp.zeros(given_BT.shape), jnp.zeros(len(given_BT), jnp.int32)
    return Samples(
        tokens_BT=jnp.where(given_BT, tokens_BT, mask_id).astype(jnp.int32),
        revealed_BT=zeros_BT.astype(jnp.int32),
        share_BT=zeros_BT,
        log_p_BT=zeros_BT,
        calls_B=zeros_B,
        calls=jnp.zeros((), jnp.int32),
        length_B=zeros_B + given_BT.shape[-1],
    )


def after_end(
    tokens_BT: jax.Array, given_BT: jax.Array, *, mask_id: int, eos_id: int | None
) -> jax.Array:
    """The positions behind the first end of text that was generated, bool [B, T].

    An end counts once all before it is known. eos_id: None for no end.
    """
    if eos_id is None:
        return jnp.zeros_like(given_BT)
    known_BT = jnp.cumprod(tokens_BT != mask_id, axis=-1) > 0
    end_BT = known_BT & (tokens_BT == eos_id) & ~given_BT
    return jnp.cumsum(end_BT, axis=-1) - end_BT > 0


def cut(samples: Samples, given_BT: jax.Array, *, mask_id: int, eos_id: int | None) -> Samples:
    """The same with its length; what was not generated behind the end is filled with it."""
    if eos_id is None:
        return samples
    after_BT = after_end(samples.tokens_BT, given_BT, mask_id=mask_id, eos_id=eos_id)
    hidden_BT = after_BT & (samples.tokens_BT == mask_id)
    return samples._replace(
        tokens_BT=jnp.where(hidden_BT, eos_id, samples.tokens_BT),
        length_B=jnp.sum(~after_BT, axis=-1, dtype=jnp.int32),
    )


def row_keys(key: jax.Array, index_B: jax.Array) -> jax.Array:
    """One PRNG key per row, by its number among all."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index_B)


def folded(keys_B: jax.Array, *numbers: jax.Array) -> jax.Array:
    """The keys with numbers folded in."""
    for number in numbers:
        keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, number)
    return keys_B
