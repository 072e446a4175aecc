"""What every job and every measurement starts from: a config with its data, model and devices."""

import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lomdm_jax.data import pipeline
from lomdm_jax.data.prepare import Prepared, prepare
from lomdm_jax.data.tokenizers import make_tokenizer
from lomdm_jax.distributed import mesh as meshes
from lomdm_jax.distributed import multihost
from lomdm_jax.generator import Generator, make_generator
from lomdm_jax.objectives import Objective, make_objective
from lomdm_jax.objectives.nelbo import targets_of
from lomdm_jax.trained import Trained

Shapes = dict[str, jax.ShapeDtypeStruct]


class Plan(NamedTuple):
    """What a training step depends on: all but the data itself.

    batch: the shapes of a training batch, over all processes.
    rows: of the token table, the mask token included.
    """

    config: ConfigDict
    generator: Generator
    mesh: Mesh
    batch: Shapes
    rows: int


class Run(NamedTuple):
    """What every job starts from."""

    config: ConfigDict
    workdir: pathlib.Path
    prepared: Prepared
    mixture: pipeline.Mixture
    generator: Generator
    mesh: Mesh

    @property
    def batch(self) -> Shapes:
        """See `Plan`."""
        return pipeline.shapes(self.prepared, self.config.train.batch_size, self.prepared.length)

    @property
    def rows(self) -> int:
        """See `Plan`."""
        return self.prepared.tokenizer.rows

    def place(self, tree: Any) -> Any:
        """Host arrays, the same on every process, split over the devices along their first axis."""
        return meshes.place(meshes.over_batch(self.mesh), tree)

    def place_rows(self, batch: pipeline.Batch) -> Any:
        """The rows of a training batch that this process has, joined to those of the others."""
        total = self.config.train.batch_size
        return meshes.place_rows(self.mesh, batch, meshes.own_rows(self.mesh, total), total)

    def replicate(self, tree: Any) -> Any:
        """A copy of each host array on every device."""
        return meshes.place(meshes.replicated(self.mesh), tree)

    def key(self, seed: int) -> jax.Array:
        """A PRNG key on every device."""
        return meshes.make_key(self.mesh, seed)

    def jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """jax.jit with results that every process can read."""
        return meshes.run_everywhere(self.mesh, function)

    def trained(self, params: Any) -> Trained:
        """The model of this run with these parameters."""
        tokenizer = self.prepared.tokenizer
        return Trained(self.config, self.workdir, tokenizer, self.generator, self.mesh, params)


def start(config: ConfigDict, workdir: pathlib.Path) -> Run:
    """Check the machine, prepare the data and shape the model."""
    mesh = checked_mesh(config)
    prepared = multihost.in_turn(lambda: prepare(config.data))
    mixture = pipeline.open_mixture(config.data.mixture)
    tokenizer = prepared.tokenizer
    generator = make_generator(config, tokenizer.rows, tokenizer.mask_id)
    return Run(config, workdir, prepared, mixture, generator, mesh)


def plan(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Plan:
    """Shape the model for a training step, without data; devices: None for those present.

    Raises:
      UserError: neither `data.vocab_size` nor the tokenizer says how many ids there are.
    """
    mesh = checked_mesh(config, devices)
    if config.data.vocab_size:
        rows, mask_id = config.data.vocab_size + 1, config.data.vocab_size
    else:
        tokenizer = make_tokenizer(config.data.tokenizer, 0, lambda: ())
        rows, mask_id = tokenizer.rows, tokenizer.mask_id
    generator = make_generator(config, rows, mask_id)
    batch = pipeline.shapes(config.data, config.train.batch_size, config.data.length)
    return Plan(config, generator, mesh, batch, rows)


def checked_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of the config, whose batches it can split; devices: None for those present."""
    mesh = meshes.make_mesh(**config.mesh, devices=devices)
    meshes.check_divides(mesh, "eval.batch_size", config.eval.batch_size)
    rows = config.train.batch_size // config.train.micro_batches
    meshes.check_divides(mesh, "train.batch_size / train.micro_batches", rows)
    return mesh


def objective_for(run: Run | Plan, name: str, samples: int, **training: float) -> Objective:
    """The estimator called `name` with `samples` draws, for this run's mask token and layout;
    training: see `make_objective`, what makes the estimate another than the bound."""
    return make_objective(
        name,
        mask_id=run.generator.mask_id,
        samples=samples,
        eps=run.config.objective.eps,
        reconstruction_share=run.config.objective.reconstruction_share,
        one_pass=run.generator.one_pass,
        **training,
    )


def valid_batches(run: Run, limit: int) -> Iterator[pipeline.Batch]:
    """The validation set, its first `limit` sequences (0 for all); what is counted is scored."""
    ignore_first = run.config.objective.ignore_first
    for batch in pipeline.valid_batches(run.prepared, run.config.eval.batch_size, limit):
        yield batch | {"counted": targets_of(batch["counted"], ignore_first)}
