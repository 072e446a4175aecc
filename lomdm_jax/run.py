"""What every job and every measurement starts from: a config with its data, model and devices."""

import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lomdm_jax.data import pipeline
from lomdm_jax.data.prepare import Prepared, prepare
from lomdm_jax.distributed import mesh as meshes
from lomdm_jax.generator import Generator, make_generator
from lomdm_jax.objectives import Objective, make_objective
from lomdm_jax.objectives.nelbo import targets_of


class Run(NamedTuple):
    """What every job starts from."""

    config: ConfigDict
    workdir: pathlib.Path
    prepared: Prepared
    mixture: pipeline.Mixture
    generator: Generator
    mesh: Mesh

    def place(self, tree: Any) -> Any:
        """Split arrays over the devices along their first axis."""
        return jax.device_put(tree, meshes.over_batch(self.mesh))

    def replicate(self, tree: Any) -> Any:
        """A copy of each array on every device."""
        return jax.device_put(tree, meshes.replicated(self.mesh))


def start(config: ConfigDict, workdir: pathlib.Path) -> Run:
    """Check the machine, prepare the data and shape the model."""
    mesh = meshes.make_mesh(config.mesh.data)
    meshes.check_divides(mesh, "eval.batch_size", config.eval.batch_size)
    meshes.check_divides(mesh, "sample.count", config.sample.count)
    rows = config.train.batch_size // config.train.micro_batches
    meshes.check_divides(mesh, "train.batch_size / train.micro_batches", rows)
    prepared = prepare(config.data)
    mixture = pipeline.open_mixture(config.data.mixture)
    tokenizer = prepared.tokenizer
    generator = make_generator(config, tokenizer.rows, tokenizer.mask_id)
    return Run(config, workdir, prepared, mixture, generator, mesh)


def objective_for(run: Run, name: str, samples: int, **training: float) -> Objective:
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
