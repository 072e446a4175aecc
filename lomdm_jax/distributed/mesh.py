"""The devices a run uses, as one mesh, and which of them holds what of an array.

The axes: "data", copies of the model that share each batch; "fsdp", devices that share a batch and
the parameters, optimizer state and EMA as well; "tensor", devices that share the work on each
position; "sequence", devices that share the positions of each sequence. The first two split the
batch. How parameters are split is in `partition`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lomdm_jax.errors import UserError
from lomdm_jax.models.placement import BATCH, WITHIN

AXES = (*BATCH, *WITHIN)


def make_mesh(
    data: int,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with these axes, over the first devices; `data` may be -1, for all that are left.

    devices: None for those that are present.

    Raises:
      UserError: if there are fewer devices, processes that would have none, or devices that are not
        joined by a torus.
    """
    devices = jax.devices() if devices is None else list(devices)
    others = (fsdp, tensor, sequence)
    sizes = (data if data != -1 else len(devices) // math.prod(others), *others)
    count = math.prod(sizes)
    asked = f"{' x '.join(AXES)} = {' x '.join(map(str, (data, *others)))}"
    if not 0 < count <= len(devices):
        raise UserError(
            f"config.mesh asks for {asked} devices, but there are {len(devices)} "
            f"{devices[0].platform} device(s): use that many at most, or config.mesh.data=-1 for "
            "all that the others leave."
        )
    if count < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"config.mesh asks for {asked}, which is {count} of the {len(devices)} devices of "
            f"{jax.process_count()} processes: with several processes use all of them."
        )
    return Mesh(_grid(devices[:count], sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _grid(devices: Sequence[jax.Device], sizes: tuple[int, ...]) -> np.ndarray:
    """The devices in the shape `sizes`, neighbours of a TPU's torus next to each other; of GPUs and
    CPUs one machine after the other."""
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) > 1 and devices[0].platform == "tpu":
        raise UserError(
            "The devices are of several TPU slices, and a run is on one: start the program on the "
            "hosts of one slice only."
        )
    try:
        # Unlike jax.make_mesh also where an axis of the mesh is a part of one of the torus, and for
        # GPUs of several machines, to which JAX gives a slice_index each.
        return create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    except AssertionError as error:
        raise UserError(
            f"config.mesh asks for {len(devices)} of the TPU's devices, which do not form a "
            "rectangle: use 1, 2, 4 and so on, or all of them with config.mesh.data=-1."
        ) from error


def described(shape: Mapping[str, int]) -> str:
    """The axes with more than one device, and how many, for people; shape: devices by axis."""
    return " x ".join(f"{axis} {size}" for axis, size in shape.items() if size > 1) or "one device"


def over_batch(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose first axis is the global batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays of which every device holds a copy."""
    return NamedSharding(mesh, PartitionSpec())


def place(sharding: NamedSharding, tree: Any) -> Any:
    """Host arrays, the same on every process, as arrays on the devices."""

    def put(a: np.ndarray) -> jax.Array:
        a = np.asarray(a)
        return jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])

    return jax.tree.map(put, tree)


def run_everywhere(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """jax.jit with results that every process can read."""
    return jax.jit(function, out_shardings=replicated(mesh))


def make_key(mesh: Mesh, seed: int) -> jax.Array:
    """A PRNG key on every device."""
    return run_everywhere(mesh, lambda: jax.random.key(seed))()


def own_rows(mesh: Mesh, total: int) -> np.ndarray:
    """Which rows of a global batch of `total` the devices of this process hold, in order."""
    held = over_batch(mesh).addressable_devices_indices_map((total,)).values()
    return np.unique(np.concatenate([np.arange(total)[index] for index in held if index]))


def place_rows(mesh: Mesh, tree: Any, rows: np.ndarray, total: int) -> Any:
    """Host arrays with the rows `rows` of a global batch of `total`, as arrays on the devices."""

    def put(a: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            return a[np.searchsorted(rows, np.arange(total)[index[0]])]

        return jax.make_array_from_callback((total, *a.shape[1:]), over_batch(mesh), part)

    return jax.tree.map(put, tree)


def check_divides(mesh: Mesh, key: str, rows: int) -> None:
    """Raise UserError unless `rows` (the value of config `key`) splits evenly over the mesh."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise UserError(
            f"config.{key} gives {rows} sequences at a time, which does not split evenly over "
            f"{parts} devices (config.mesh: data x fsdp): use a multiple of {parts}, or fewer of "
            "them; more devices than sequences may share each by config.mesh.sequence or tensor."
        )
