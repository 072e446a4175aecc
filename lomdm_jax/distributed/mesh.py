"""The devices a run uses, as one mesh."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lomdm_jax.errors import UserError


def make_mesh(data: int) -> Mesh:
    """A mesh with the one axis "data", over the first `data` devices (-1: all).

    Raises:
      UserError: if there are fewer devices.
    """
    devices = jax.devices()
    count = len(devices) if data == -1 else data
    if count > len(devices):
        raise UserError(
            f"config.mesh.data is {data}, but this machine has {len(devices)} "
            f"{devices[0].platform} device(s): use that many at most, or -1 for all."
        )
    return jax.make_mesh((count,), ("data",), (AxisType.Auto,), devices=devices[:count])


def over_batch(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose first axis is the global batch."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays of which every device holds a copy."""
    return NamedSharding(mesh, PartitionSpec())


def check_divides(mesh: Mesh, key: str, rows: int) -> None:
    """Raise UserError unless `rows` (the value of config `key`) splits evenly over the mesh."""
    if rows % mesh.size:
        raise UserError(
            f"config.{key} gives {rows} sequences at a time, which does not split evenly over "
            f"{mesh.size} devices: use a multiple of {mesh.size}, or lower config.mesh.data."
        )
