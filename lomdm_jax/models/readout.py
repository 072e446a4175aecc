"""What a pass of the network says of the token at each position: its logits, or what a token costs.

Logits of a whole batch, float32 [B, L, V], are the largest array of a step by far. `Readout.costs`
never holds them: it computes the cross-entropies of the positions that are asked for and of no
others, some positions at a time, and computes their logits again for the gradient.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lomdm_jax.models.placement import BATCH, WITHIN, constrain, parts_of_batch

# Logits that a device has in memory at once, 512 MiB of float32; and into how many parts positions
# are cut, so that those that are not asked for are left out, of how many positions at least.
LOGITS, PARTS, LEAST = 2**27, 16, 256
# GPUs multiply matrices of such multiples in half precision: others would be copied for each part.
ALIGNED = 16
# The scope of what is computed again for a gradient, by the name that jax.checkpoint gives it.
RECOMPUTED = "rematted_computation"


class Logits(NamedTuple):
    """logits: float32 [..., B, L, V], -inf for what cannot be drawn."""

    logits: jax.Array

    def costs(self, tokens_BL: jax.Array, where_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cross-entropy (nats) and confidence; see `Readout.costs`."""
        normaliser_BL, picked_BL, largest_BL = _facts(self.logits, tokens_BL)
        confidence_BL = jax.lax.stop_gradient(jnp.exp(largest_BL - normaliser_BL))
        nll_BL = normaliser_BL - picked_BL
        return jnp.where(where_BL, nll_BL, 0.0), jnp.where(where_BL, confidence_BL, 0.0)

    def arranged(self, arrange: Callable[[jax.Array], jax.Array], share: float) -> "Logits":
        """See `Readout.arranged`."""
        return Logits(arrange(self.logits))


class Readout(NamedTuple):
    """The last layer, and what it is given.

    hidden: [..., B, L, width], in the compute dtype.
    kernel: float32 [width, V].
    bias: float32 [V], -inf for what cannot be drawn.
    share: of the positions, how many `costs` is expected to be asked for, in (0, 1]. The results
      do not depend on it.
    """

    hidden: jax.Array
    kernel: jax.Array
    bias: jax.Array
    share: float = 1.0

    @property
    def logits(self) -> jax.Array:
        """float32 [..., B, L, V]."""
        logits = _logits(self.hidden, self.kernel, self.bias)
        nothing = (None,) * (logits.ndim - 3)
        return constrain(logits, *nothing, BATCH, None, WITHIN)

    def costs(self, tokens_BL: jax.Array, where_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cross-entropy (nats) of tokens and confidence, the largest probability, float32
        [..., B, L]; 0 where they are not asked for. The confidence has no gradient.

        tokens_BL: int32 [..., B, L]; where_BL: bool [..., B, L].
        """
        groups = parts_of_batch(tokens_BL.shape[-2])
        hidden, tokens, where = (
            _grouped(a, tokens_BL.ndim - 2, groups) for a in (self.hidden, tokens_BL, where_BL)
        )
        size, parts = _parts(where.shape[1], len(self.bias))
        expected = max(math.floor(self.share * parts), 1)
        found = _costs(size, parts, expected, hidden, self.kernel, self.bias, tokens, where)
        nll_BL, confidence_BL = (
            jnp.where(where_BL, _ungrouped(a, tokens_BL.shape), 0.0) for a in found
        )
        return nll_BL, jax.lax.stop_gradient(confidence_BL)

    def arranged(self, arrange: Callable[[jax.Array], jax.Array], share: float) -> "Readout":
        """With other axes before the last two, and this share."""
        return self._replace(hidden=arrange(self.hidden), share=share)


def _logits(hidden: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Products in the dtype of `hidden`; sums in float32, as a bound must not be rounded."""
    kernel = kernel.astype(hidden.dtype)
    return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32) + bias


def _facts(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """log of the sum of exponentials, the token's logit, and the largest."""
    picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    largest = jnp.max(jax.lax.stop_gradient(logits), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1), picked, largest


def _parts(positions: int, vocab_size: int) -> tuple[int, int]:
    """Positions of a part, and how many parts there are."""
    size = max(min(LOGITS // vocab_size, -(-positions // PARTS)), LEAST)
    size = min(size, positions)
    return size, -(-positions // size)


def _grouped(a: jax.Array, axis: int, groups: int) -> jax.Array:
    """[..., B, L, ...] as [groups, positions, ...]: what a device has stays there."""
    a = jnp.moveaxis(a, axis, 0)
    return a.reshape(groups, -1, *a.shape[axis + 2 :])


def _ungrouped(a: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """From [groups, positions] to [..., B, L]."""
    *before, rows, length = shape
    return jnp.moveaxis(a.reshape(rows, *before, length), 0, -2)


class _Arranged(NamedTuple):
    """Positions in parts, those that are asked for first.

    hidden: [parts, groups, size, width]; tokens: [parts, groups, size].
    order, place: which position stands where, and where each went, [groups, positions]; None if
      all parts are one.
    needed: how many parts hold what is asked for, int32 scalar.
    """

    hidden: jax.Array
    tokens: jax.Array
    order: jax.Array | None
    place: jax.Array | None
    needed: Any


def _arranged(
    size: int, parts: int, hidden: jax.Array, tokens: jax.Array, where: jax.Array
) -> _Arranged:
    if parts == 1:
        return _Arranged(hidden[None], tokens[None], None, None, 1)
    asked, count = jnp.cumsum(where, axis=1), jnp.sum(where, axis=1, keepdims=True)
    place = jnp.where(where, asked, count + jnp.cumsum(~where, axis=1)) - 1
    order = jnp.argsort(~where, axis=1, stable=True)
    hidden, tokens = (_cut(_moved(a, order), size) for a in (hidden, tokens))
    return _Arranged(hidden, tokens, order, place, -(-jnp.max(count) // size))


def _moved(a: jax.Array, order: jax.Array | None) -> jax.Array:
    """[groups, positions, ...] in this order of the positions."""
    if order is None:
        return a
    return jnp.take_along_axis(a, order.reshape(*order.shape, *[1] * (a.ndim - 2)), axis=1)


def _cut(a: jax.Array, size: int) -> jax.Array:
    """From [groups, positions, ...] to [parts, groups, size, ...]."""
    a = jnp.pad(a, [(0, 0), (0, -a.shape[1] % size)] + [(0, 0)] * (a.ndim - 2))
    return a.reshape(len(a), -1, size, *a.shape[2:]).swapaxes(0, 1)


def _back(a: jax.Array, place: jax.Array | None) -> jax.Array:
    """From [parts, groups, size, ...] to where the positions were, [groups, positions, ...]."""
    return _moved(a.swapaxes(0, 1).reshape(a.shape[1], -1, *a.shape[3:]), place)


def _each(
    needed: Any, parts: int, expected: int, body: Callable[[Any, Any], Any], start: Any
) -> Any:
    """The parts that are expected to be needed, then those that turn out to be."""
    done = jax.lax.fori_loop(0, expected, body, start)
    return done if expected == parts else jax.lax.fori_loop(expected, needed, body, done)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _costs(size: int, parts: int, expected: int, *inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and confidence [groups, positions] of hidden states [groups, positions, width],
    kernel, bias, tokens and where [groups, positions]; anything where they are not asked for."""
    return _forward(size, parts, expected, *inputs)[0]


def _forward(
    size: int,
    parts: int,
    expected: int,
    hidden: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    tokens: jax.Array,
    where: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    arranged = _arranged(size, parts, hidden, tokens, where)
    kernel, aligned = _everywhere(kernel, hidden.dtype), _aligned(bias)

    def part(index: Any, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        logits = _part_logits(arranged.hidden[index], kernel, aligned)
        facts = _facts(logits, arranged.tokens[index])
        return tuple(a.at[index].set(new) for a, new in zip(found, facts, strict=True))

    nothing = jnp.zeros(arranged.tokens.shape, jnp.float32)
    start = (nothing, nothing, nothing - jnp.inf)
    normaliser, picked, largest = _each(arranged.needed, parts, expected, part, start)
    both = (normaliser - picked, jnp.exp(largest - normaliser))
    cost, confidence = (_back(a, arranged.place) for a in both)
    return (cost, confidence), (arranged, kernel, bias, normaliser)


def _everywhere(kernel: jax.Array, dtype: Any) -> jax.Array:
    """Gathered over the devices that split a batch once, and not for every part; with columns of
    zeros up to a multiple of ALIGNED."""
    columns = ((0, 0), (0, -kernel.shape[1] % ALIGNED))
    return constrain(jnp.pad(kernel.astype(dtype), columns), None, WITHIN)


def _aligned(bias: jax.Array) -> jax.Array:
    """-inf for the columns that `_everywhere` adds."""
    return jnp.pad(bias, (0, -len(bias) % ALIGNED), constant_values=-jnp.inf)


def _part_logits(hidden: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    batch = BATCH if len(hidden) > 1 else None
    return constrain(_logits(hidden, kernel, bias), batch, None, WITHIN)


def _backward(size: int, parts: int, expected: int, kept: Any, given: Any) -> tuple[Any, ...]:
    """Sums in float32; each device's own over all parts before they are added up."""
    arranged, kernel, bias, normaliser = kept
    cost, aligned = _cut(_moved(given[0], arranged.order), size), _aligned(bias)

    def part(index: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        d_hidden, d_kernel, d_bias = sums
        inputs = arranged.hidden[index]
        with jax.named_scope(RECOMPUTED):
            logits = _part_logits(inputs, kernel, aligned)
        excess = jnp.exp(logits - normaliser[index][..., None])
        is_token = jnp.arange(logits.shape[-1]) == arranged.tokens[index][..., None]
        excess = (excess - is_token) * cost[index][..., None]
        rough = excess.astype(kernel.dtype)
        back = jnp.einsum("gnv,dv->gnd", rough, kernel, preferred_element_type=jnp.float32)
        product = jnp.einsum("gnd,gnv->gdv", inputs, rough, preferred_element_type=jnp.float32)
        d_hidden = d_hidden.at[index].set(back.astype(d_hidden.dtype))
        d_kernel = constrain(d_kernel + product, batch, None, WITHIN)
        return d_hidden, d_kernel, d_bias + jnp.sum(excess, axis=1)

    groups = arranged.hidden.shape[1]
    batch = BATCH if groups > 1 else None
    own = (jnp.zeros((groups, *a.shape), jnp.float32) for a in (kernel, aligned))
    start = (jnp.zeros_like(arranged.hidden), *own)
    d_hidden, d_kernel, d_bias = _each(arranged.needed, parts, expected, part, start)
    d_kernel, d_bias = (jnp.sum(a[..., : len(bias)], axis=0) for a in (d_kernel, d_bias))
    return _back(d_hidden, arranged.place), d_kernel, d_bias, None, None


_costs.defvjp(_forward, _backward)
