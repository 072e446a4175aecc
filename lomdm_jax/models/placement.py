"""Where arrays inside a network lie, by the names of mesh axes; without a mesh, nowhere special."""

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
