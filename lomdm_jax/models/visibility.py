"""Who sees whom in attention, and where each token stands: one attention, many views."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp

from lomdm_jax.models import attention

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
        rows = (self.positions[None], self.segment)
        mixed = attention.attend(
            query,
            key,
            value,
            is_causal=self.is_causal,
            segment=self.segment,
            in_parts=lambda: _in_parts(query, key, value, rows, self._sees),
        )
        return mixed, memory

    def _sees(self, rows: tuple[jax.Array, jax.Array | None]) -> jax.Array:
        """Whom the rows of these positions and segments see, bool [B or 1, R or 1, L or 1]."""
        position, segment = rows
        sees = jnp.ones((1, 1, 1), bool)
        if self.segment is not None and segment is not None:
            sees = segment[..., None] == self.segment[:, None]
        return sees & (position[..., None] >= self.positions) if self.is_causal else sees


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

    Of several parts neither the scores nor the mask are ever whole in memory: each is recomputed
    for its gradient.
    """

    def part(inputs: tuple[jax.Array, Rows]) -> jax.Array:
        some, rows = inputs
        mask = sees(rows)[:, None]
        return jax.nn.dot_product_attention(some, key, value, mask=mask)

    length = query.shape[1]
    if length <= ROWS:
        return part((query, rows))
    mixed = jax.lax.map(jax.checkpoint(part), jax.tree.map(_cut, (query, rows)))
    return mixed.swapaxes(0, 1).reshape(query.shape[0], -1, *query.shape[2:])[:, :length]


def _cut(a: jax.Array) -> jax.Array:
    """Axis 1 in parts of ROWS, which come first; the last row fills what is missing."""
    missing = -a.shape[1] % ROWS
    a = jnp.pad(a, [(0, 0), (0, missing)] + [(0, 0)] * (a.ndim - 2), mode="edge")
    return a.reshape(a.shape[0], -1, ROWS, *a.shape[2:]).swapaxes(0, 1)


class Cached(NamedTuple):
    """A few new tokens that see some of what a memory holds: for generation.

    Contents are written into their slots first, so that they see each other and themselves there.
    Queries are not, and see, besides the memory, either each other or themselves only.

    positions: int32 [B, Q].
    low, high: int32 [B, Q]; a token sees the slots that hold a rank in [low, high).
    held: int32 [S], the rank that each slot holds, once the contents are written.
    slots: int32 [B, Q], where the contents go, beyond the end for nowhere; None for queries.
    together: whether queries see each other.
    """

    positions: jax.Array
    low: jax.Array
    high: jax.Array
    held: jax.Array
    slots: jax.Array | None = None
    together: bool = False

    def attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, memory: Any
    ) -> tuple[jax.Array, Any]:
        if self.slots is not None:
            rows, slots = jnp.arange(len(key))[:, None], self.slots
            pairs = zip(memory, (key, value), strict=True)
            memory = Memory(*(old.at[rows, slots].set(new, mode="drop") for old, new in pairs))
            span = (self.low, self.high)
            return _in_parts(query, memory.key, memory.value, span, self._sees), memory
        new = key.shape[1]
        others = jnp.ones((new, new), bool) if self.together else jnp.eye(new, dtype=bool)
        others = jnp.broadcast_to(others, (*self.low.shape, new))
        mask = jnp.concatenate([self._sees((self.low, self.high)), others], axis=-1)[:, None]
        key, value = (jnp.concatenate(a, 1) for a in zip(memory, (key, value), strict=True))
        return jax.nn.dot_product_attention(query, key, value, mask=mask), memory

    def _sees(self, span: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Which slots rows with these bounds see, bool [B, R, S]."""
        low, high = (a[..., None] for a in span)
        return (self.held >= low) & (self.held < high)
