"""The mesh, and the table of what is split over it."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lomdm_jax import orders
from lomdm_jax.config import default_config
from lomdm_jax.distributed import mesh as meshes
from lomdm_jax.distributed import partition
from lomdm_jax.errors import UserError
from lomdm_jax.generator import init_params
from lomdm_jax.models.placement import BATCH, constrain
from lomdm_jax.training.optimizer import make_optimizer
from lomdm_jax.training.state import init_state

ORDERS = [name.replace("<size>", "4").replace("<seed>", "0") for name in orders.NAMES]


def state(order="lomdm", vocabulary=65):
    config = default_config()
    config.order.name = order
    config.model.update(width=16, layers=1, heads=2, cond_dim=8)
    config.data.length = 8
    optimizer = make_optimizer(config.optimizer)
    make = lambda key: init_state(init_params(config, vocabulary, key), optimizer)  # noqa: E731
    return jax.eval_shape(make, jax.random.key(0))


@pytest.mark.parametrize("order", ORDERS)
def test_the_table_knows_every_array_of_every_order(order):
    mesh, tree = meshes.make_mesh(1, 2, 2, 2), state(order)
    placed = partition.shardings(mesh, tree)
    assert jax.tree.structure(placed) == jax.tree.structure(tree)
    assert sum(row.arrays for row in partition.table(mesh, tree)) == len(jax.tree.leaves(tree))
    # What follows a parameter lies where it does.
    assert placed.params == placed.ema
    kernel = lambda tree: tree["backbone"]["blocks"][0]["mlp"]["0"]["kernel"]  # noqa: E731
    assert kernel(placed.params).spec == P(partition.SHARED, "tensor")


def test_an_array_without_a_rule_is_an_error():
    tree = {"backbone": {"novelty": jax.ShapeDtypeStruct((4,), jnp.float32)}}
    with pytest.raises(KeyError, match="no rule for backbone/novelty"):
        partition.shardings(meshes.make_mesh(1), tree)


@pytest.mark.parametrize(
    ("width", "vocabulary", "spec"),
    [
        (16, 64, P(partition.SHARED, "tensor")),
        (16, 65, P(("tensor", *partition.SHARED))),  # the vocabulary does not divide
        (12, 65, P(partition.SHARED)),
        (5, 65, P()),
    ],
)
def test_the_first_split_that_divides_is_taken(width, vocabulary, spec):
    kernel = jax.ShapeDtypeStruct((width, vocabulary), jnp.float32)
    tree = {"output_layer": {"linear": {"kernel": kernel}}}
    (sharding,) = jax.tree.leaves(partition.shardings(meshes.make_mesh(1, 2, 2, 2), tree))
    assert sharding.spec == spec


def test_the_report_says_what_a_device_holds():
    mesh, tree = meshes.make_mesh(1, 4, 2), state()
    text = partition.report(mesh, tree)
    held = sum(row.held for row in partition.table(mesh, tree))
    whole = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))
    assert whole / 8 < held < whole / 3
    assert "mesh: fsdp 4 x tensor 2;" in text and f"{held / 2**20:,.1f} per device" in text
    assert len(partition.report(meshes.make_mesh(1), tree).splitlines()) == 1


def test_meshes_that_cannot_be_are_refused():
    for sizes in ((16, 1, 1), (-1, 16, 1), (3, 3, 1)):
        with pytest.raises(UserError, match=r"config.mesh.*8 cpu device"):
            meshes.make_mesh(*sizes)
    shape = dict(meshes.make_mesh(-1, 2, 2).shape)
    assert shape == {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}
    with pytest.raises(UserError, match=r"config.some.key gives 5.*over 2 devices"):
        meshes.check_divides(meshes.make_mesh(1, 2, 2, 2), "some.key", 5)


def torus(*sides):
    """What a mesh looks at of the chips of a TPU v5p slice."""
    kind = dict(
        platform="tpu", device_kind="TPU v5", core_on_chip=0, process_index=0, slice_index=0
    )
    return [SimpleNamespace(coords=coords, **kind) for coords in np.ndindex(*sides)]


def test_any_split_of_a_torus_keeps_neighbours_together():
    """Also one by 4, which no axis of the torus has."""
    grid = meshes._grid(torus(8, 8, 8), (128, 1, 4, 1))
    coordinates = np.array([[chip.coords for chip in row] for row in grid[:, 0, :, 0]])
    assert (np.abs(np.diff(coordinates, axis=1)).sum(-1) == 1).all()
    assert len({tuple(each) for each in coordinates.reshape(-1, 3)}) == 512


def test_devices_that_no_torus_joins_are_refused():
    chips = torus(2, 2, 1)
    with pytest.raises(UserError, match="3 of the TPU's devices, which do not form a rectangle"):
        meshes._grid(chips[:3], (3, 1, 1, 1))
    chips[1].slice_index = 1
    with pytest.raises(UserError, match="of several TPU slices"):
        meshes._grid(chips[:2], (2, 1, 1, 1))


def test_gpus_of_several_machines_are_one_mesh():
    """JAX tells machines apart as slices; the last axes stay within one."""
    kind = dict(platform="gpu", device_kind="NVIDIA H200")
    gpus = [SimpleNamespace(id=i, slice_index=i // 8, **kind) for i in range(16)]
    grid = meshes._grid([*gpus[8:], *gpus[:8]], (2, 2, 4, 1))
    assert [{gpu.slice_index for gpu in row.flat} for row in grid] == [{0}, {1}]


def test_rows_lie_where_the_mesh_puts_them():
    """Also if devices come in an order that scatters the rows of a process."""
    devices = [jax.devices()[i] for i in (0, 5, 2, 7, 4, 1, 6, 3)]
    mesh = meshes.make_mesh(4, 1, 2, devices=devices)
    rows = meshes.own_rows(mesh, 8)
    np.testing.assert_array_equal(rows, np.arange(8))  # one process has all
    batch = {"tokens": np.arange(16).reshape(8, 2)}
    placed = meshes.place_rows(mesh, batch, rows, 8)["tokens"]
    assert placed.sharding.spec == P(BATCH)
    np.testing.assert_array_equal(placed, batch["tokens"])


def test_nothing_is_pinned_without_a_mesh():
    a = jnp.ones((8, 4))
    assert constrain(a, BATCH, None) is a
    with jax.set_mesh(meshes.make_mesh(4, 2)):
        pinned = jax.jit(lambda a: constrain(a, BATCH, None))(a)
    assert pinned.sharding.spec == P(BATCH) or pinned.sharding.spec == P(BATCH, None)
