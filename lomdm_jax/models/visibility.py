"""Who sees whom in attention, and where each token stands: one attention, many views."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp

# Rows of queries whose scores and mask are in memory at once, where a mask depends on the data.
ROWS = 256
Rows = TypeVar("Rows")


class View(Protocol):
    """positions: int32 rotary positions, [Q] or [B, Q]."""

    @property
    def positions(self) -> jax.Array: ...

    def attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, memory: Any
    ) -> tuple[jax.Array, Any]:
        """Mix values [B, Q, H, D] of a layer, rotated queries and keys given; and what the layer
        remembers afterwards: a `Memory`, or None where a view has none."""
        ...


class Memory(NamedTuple):
    """Keys and values of what one layer has read, [B, S, H, D] each."""

    key: jax.Array
    value: jax.Array


class Plain(NamedTuple):
    """Everyone sees everyone; or, if causal, itself and what stands before it.

    segment: int32 [B, L]; nothing is seen of other segments. None for one segment.
    """

    positions: jax.Array
    is_causal: bool
    segment: jax.Array | None = None

    def attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, memory: Any = None
    ) -> tuple[jax.Array, Any]:
        if self.segment is None:
            mixed = jax.nn.dot_product_attention(query, key, value, is_causal=self.is_causal)
            return mixed, memory
        rows = (self.positions[None], self.segment)
        return _in_parts(query, key, value, rows, self._sees), memory

    def _sees(self, rows: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Whom the rows of these positions and segments see, bool [B, R, L]."""
        assert self.segment is not None
        position, segment = (a[..., None] for a in rows)
        here = segment == self.segment[:, None]
        return here & (position >= self.positions) if self.is_causal else here


def full(length: int, segment: jax.Array | None = None) -> Plain:
    """Everyone sees everyone of its segment."""
    return Plain(jnp.arange(length), False, segment)


def causal(length: int, segment: jax.Array | None = None) -> Plain:
    """Everyone sees itself and what stands before it in its segment."""
    return Plain(jnp.arange(length), True, segment)


class Ranked(NamedTuple):
    """Queries, then contents, [2 L]: the ranked layout. Every order is a vector of ranks.

    A query sees the contents of lower ranks and the queries of its own rank; a content sees the
    contents of its own and of lower ranks. So one pass gives every position its conditional on
    what is revealed before it, and a content never changes afterwards. Ranks of blocks are the
    training layout of BD3-LM (arXiv 2503.09573).

    rank: int32 [B or 1, L], 0 is revealed first; positions of equal rank are revealed together.
    segment: int32 [B or 1, L]; nothing is seen of other segments.
    """

    rank: jax.Array
    segment: jax.Array

    @property
    def positions(self) -> jax.Array:
        return jnp.tile(jnp.arange(self.rank.shape[-1]), 2)

    def attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, memory: Any = None
    ) -> tuple[jax.Array, Any]:
        length = self.rank.shape[-1]
        asked = _in_parts(query[:, :length], key, value, self, self._query_sees)
        content, key, value = (a[:, length:] for a in (query, key, value))
        known = _in_parts(content, key, value, self, self._content_sees)
        return jnp.concatenate([asked, known], axis=1), memory

    def _content_sees(self, rows: "Ranked") -> jax.Array:
        """Which contents the contents `rows` see, bool [B or 1, R, L]."""
        return (self.rank[:, None] <= rows.rank[..., None]) & self._here(rows)

    def _query_sees(self, rows: "Ranked") -> jax.Array:
        """Which queries and contents the queries `rows` see, bool [B or 1, R, 2 L]."""
        every, rank, here = self.rank[:, None], rows.rank[..., None], self._here(rows)
        return jnp.concatenate([(every == rank) & here, (every < rank) & here], axis=-1)

    def _here(self, rows: "Ranked") -> jax.Array:
        return rows.segment[..., None] == self.segment[:, None]


def ranked(rank: jax.Array, segment: jax.Array | None = None) -> Ranked:
    """The ranked layout of these ranks; see `Ranked`. None for one segment."""
    return Ranked(rank, jnp.zeros_like(rank) if segment is None else segment)


def _in_parts(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rows: Rows,
    sees: Callable[[Rows], jax.Array],
) -> jax.Array:
    """Attention [B, L, H, D] with the mask that `sees` makes of its rows, ROWS of them at a time.

    Neither the scores nor the mask are ever whole in memory: a part is recomputed for its gradient.
    """

    @jax.checkpoint
    def part(inputs: tuple[jax.Array, Rows]) -> jax.Array:
        some, rows = inputs
        mask = sees(rows)[:, None]
        return jax.nn.dot_product_attention(some, key, value, mask=mask)

    length = query.shape[1]
    if length <= ROWS:
        return part((query, rows))
    mixed = jax.lax.map(part, jax.tree.map(_cut, (query, rows)))
    return mixed.swapaxes(0, 1).reshape(query.shape[0], -1, *query.shape[2:])[:, :length]


def _cut(a: jax.Array) -> jax.Array:
    """Axis 1 in parts of ROWS, which come first; the last row fills what is missing."""
    missing = -a.shape[1] % ROWS
    a = jnp.pad(a, [(0, 0), (0, missing)] + [(0, 0)] * (a.ndim - 2), mode="edge")
    return a.reshape(a.shape[0], -1, ROWS, *a.shape[2:]).swapaxes(0, 1)


class Cached(NamedTuple):
    """A few new tokens that see what a memory holds, and, if they are queries, themselves.

    For generation in any order: slot s of the memory is the content of rank s, so a content
    that is written there sees the slots up to its own, and a query those before its rank.

    positions: int32 [B, Q].
    slots: int32 [B, Q], ranks of the new tokens.
    write: whether they are contents, to be remembered.
    """

    positions: jax.Array
    slots: jax.Array
    write: bool

    def attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, memory: Any
    ) -> tuple[jax.Array, Any]:
        if self.write:
            rows = jnp.arange(len(key))[:, None]
            pairs = zip(memory, (key, value), strict=True)
            memory = Memory(*(old.at[rows, self.slots].set(new, mode="drop") for old, new in pairs))
            mixed = _in_parts(query, memory.key, memory.value, self.slots, self._up_to(memory))
            return mixed, memory
        size, new = memory.key.shape[1], key.shape[1]
        before = jnp.arange(size) < self.slots[..., None]
        itself = jnp.broadcast_to(jnp.eye(new, dtype=bool), (*self.slots.shape, new))
        mask = jnp.concatenate([before, itself], axis=-1)[:, None]
        key, value = (jnp.concatenate(a, 1) for a in zip(memory, (key, value), strict=True))
        return jax.nn.dot_product_attention(query, key, value, mask=mask), memory

    def _up_to(self, memory: Memory) -> Callable[[jax.Array], jax.Array]:
        return lambda slots: jnp.arange(memory.key.shape[1]) <= slots[..., None]
