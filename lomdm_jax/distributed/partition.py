"""How a training state is split over a mesh: one table, by name; every array must be in it."""

import math
import re
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lomdm_jax.distributed.mesh import described

# What shares the state: the devices of "fsdp", and those that share the positions of a sequence.
SHARED = ("sequence", "fsdp")
# Patterns of the end of an array's name, and splits in order of preference: the first that divides
# the array evenly is taken (vocabularies seldom divide). Kernels are [in, out]. The first matrix of
# a pair is split over its outputs by "tensor", the second over its inputs, so that the pair needs
# one sum; SHARED takes the other dimension. The mean of EMA and Adam follow their parameter.
RULES: tuple[tuple[str, tuple[P, ...]], ...] = (
    # The table is gathered whole to be read.
    (r"vocab_embed/embedding", (P(None, ("tensor", *SHARED)), P(None, SHARED), P(SHARED))),
    # Heads are regrouped as they are used: see `transformer.Block`.
    (r"attn_qkv/kernel", (P(("tensor", *SHARED)), P(SHARED), P(None, SHARED))),
    (r"attn_out/kernel", (P("tensor", SHARED), P("tensor"))),
    (r"mlp/0/kernel", (P(SHARED, "tensor"), P(None, "tensor"))),
    (r"mlp/0/bias", (P("tensor"),)),
    (r"mlp/2/kernel", (P("tensor", SHARED), P("tensor"))),
    (r"linear/kernel", (P(SHARED, "tensor"), P(("tensor", *SHARED)), P(SHARED))),
    # Read by every device: the modulations of whole hidden states.
    (r"adaLN_modulation/kernel", (P(SHARED), P(None, SHARED))),
    # Small, and used whole.
    (r"norm\w*/scale|mlp/2/bias|linear/bias|adaLN_modulation/bias", ()),
    (r"content/(kernel|bias)|position|distance|neighbours|walk_head/table|log_rate", ()),
    (r"step|count|noise_range|trials|running_loss", ()),
)


class Placed(NamedTuple):
    """One rule at work. arrays: how many it was applied to; size: their bytes; held: the bytes of
    them that one device holds."""

    pattern: str
    spec: P
    arrays: int
    size: int
    held: int


def shardings(mesh: Mesh, tree: Any) -> Any:
    """The sharding of every array of a state, or of its parameters.

    tree: arrays or their shapes.

    Raises:
      KeyError: the table has no rule for an array.
    """
    return jax.tree.map_with_path(lambda path, a: _sharding(mesh, _name(path), a.shape), tree)


def table(mesh: Mesh, tree: Any) -> list[Placed]:
    """What `shardings` does, by rule, largest first."""
    found: dict[tuple[str, P], Placed] = {}
    for path, a in jax.tree_util.tree_flatten_with_path(tree)[0]:
        pattern, _ = _rule(_name(path))
        sharding = _sharding(mesh, _name(path), a.shape)
        none = Placed(pattern, sharding.spec, 0, 0, 0)
        old = found.get((pattern, sharding.spec), none)
        size = math.prod(a.shape) * a.dtype.itemsize
        found[pattern, sharding.spec] = old._replace(
            arrays=old.arrays + 1, size=old.size + size, held=old.held + held(a, sharding)
        )
    return sorted(found.values(), key=lambda placed: -placed.size)


def held(tree: Any, shardings: Any) -> int:
    """Bytes of arrays, or of what their shapes say, that one device holds."""

    def size(a: Any, sharding: Any) -> int:
        return math.prod(sharding.shard_shape(a.shape)) * a.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(size, tree, shardings)))


def report(mesh: Mesh, tree: Any) -> str:
    """`table` as lines for people."""
    rows = table(mesh, tree)
    total, kept = sum(row.size for row in rows), sum(row.held for row in rows)
    axes = described(mesh.shape)
    lines = [f"mesh: {axes}; state: {total / 2**20:,.1f} MiB, {kept / 2**20:,.1f} per device"]
    lines += (
        []
        if mesh.size == 1
        else [
            f"  {row.size / 2**20:10,.1f} MiB in {row.arrays:4d} arrays  {_split(row.spec):24} "
            f"{row.pattern}"
            for row in rows
        ]
    )
    return "\n".join(lines)


def _split(spec: P) -> str:
    return "whole" if not any(spec) else f"split by {tuple(spec)}"


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _rule(name: str) -> tuple[str, tuple[P, ...]]:
    for pattern, specs in RULES:
        if re.search(f"(^|/)({pattern})$", name):
            return pattern, specs
    raise KeyError(f"distributed/partition.py has no rule for {name}")


def _sharding(mesh: Mesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    for spec in _rule(name)[1]:
        parts = [_size(mesh, axes) for axes in spec]
        if all(size % part == 0 for size, part in zip(shape, parts, strict=False)):
            return NamedSharding(mesh, spec)
    return NamedSharding(mesh, P())


def _size(mesh: Mesh, axes: Any) -> int:
    names = axes if isinstance(axes, tuple) else (axes,)
    return math.prod(mesh.shape[name] for name in names if name)
