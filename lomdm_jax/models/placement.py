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


def parts_of_batch(rows: int) -> int:
    """Over how many devices the mesh splits a batch of `rows`; 1 if it does not divide evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH)
    return parts if rows % parts == 0 else 1
