"""Where arrays inside a network lie, by the names of mesh axes; without a mesh, nowhere special."""

import math
from typing import Any

import jax
from jax.sharding import PartitionSpec

BATCH = ("data", "fsdp")  # the axes that split a batch
SEQUENCE = "sequence"  # the axis that splits the positions of a sequence
TENSOR = "tensor"  # the axis that splits heads, hidden units and the vocabulary
# The axes that split what needs all positions at once: heads in attention, and the vocabulary.
WITHIN = (TENSOR, SEQUENCE)


def constrain(a: jax.Array, *axes: Any) -> jax.Array:
    """The same array, split over these mesh axes: one entry per dimension, None for whole.

    The mesh is that of `jax.set_mesh`. A dimension need not divide evenly.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return a
    return jax.lax.with_sharding_constraint(a, PartitionSpec(*axes))


def splits() -> tuple[int, int]:
    """Over how many devices the mesh of `jax.set_mesh` splits a batch, and over how many heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1, 1
    rows, heads = (math.prod(mesh.shape[axis] for axis in axes) for axes in (BATCH, WITHIN))
    return rows, heads


def parts_of_batch(rows: int) -> int:
    """Over how many devices the mesh splits a batch of `rows`; 1 if it does not divide evenly."""
    parts, _ = splits()
    return parts if rows % parts == 0 else 1
