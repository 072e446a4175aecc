"""Where arrays inside a network lie, by the names of mesh axes; without a mesh, nowhere special."""

import math
from typing import Any

import jax
from jax.sharding import PartitionSpec

BATCH = ("data", "fsdp")  # the axes that split a batch
TENSOR = "tensor"  # the axis that splits heads, hidden units and the vocabulary


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
    return math.prod(mesh.shape[axis] for axis in BATCH), mesh.shape[TENSOR]


def parts_of_batch(rows: int) -> int:
    """Over how many devices the mesh splits a batch of `rows`; 1 if it does not divide evenly."""
    parts, _ = splits()
    return parts if rows % parts == 0 else 1
