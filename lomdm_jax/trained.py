"""A trained model: what every job after training needs, and no training data."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lomdm_jax.config import saved_config
from lomdm_jax.data.tokenizers import Tokenizer, load_tokenizer
from lomdm_jax.distributed import mesh as meshes
from lomdm_jax.distributed import partition
from lomdm_jax.errors import UserError, one_line
from lomdm_jax.generator import Generator, init_params, make_generator
from lomdm_jax.sampling.driver import row_keys
from lomdm_jax.training.checkpoint import Checkpoints, by_name, check_facts, model_facts


class Trained(NamedTuple):
    """A model with its parameters (usually the EMA's) on the devices of a mesh.

    workdir: the run's folder, where results go.
    """

    config: ConfigDict
    workdir: pathlib.Path
    tokenizer: Tokenizer
    generator: Generator
    mesh: Mesh
    params: Any

    def place(self, tree: Any) -> Any:
        """Host arrays, the same on every process, split over the devices along their first axis."""
        return meshes.place(meshes.over_batch(self.mesh), tree)

    def key(self, seed: int) -> jax.Array:
        """A PRNG key on every device."""
        return meshes.make_key(self.mesh, seed)

    def row_keys(self, seed: int, index_B: np.ndarray) -> jax.Array:
        """A PRNG key for each of these rows, split like `place`; it depends on nothing else."""
        keys = jax.jit(row_keys, out_shardings=meshes.over_batch(self.mesh))
        return keys(self.key(seed), self.place(index_B))

    def jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """jax.jit with results that every process can read."""
        return meshes.run_everywhere(self.mesh, function)

    def even(self, rows: int) -> int:
        """`rows`, or the next number of them that splits evenly over the devices."""
        parts: int = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return -(-rows // parts) * parts

    def __repr__(self) -> str:
        """One line: the fields would fill pages."""
        name, length = self.config.order.name, self.config.data.length
        count = sum(np.size(a) for a in jax.tree.leaves(self.params))
        return f"Trained({str(self.workdir)!r}: {name}, {length} tokens, {count:,} parameters)"


def load(folder: pathlib.Path, config: ConfigDict | None = None) -> Trained:
    """The model of a run's folder, with the EMA parameters that `checkpoint.restore` names.

    config: the run's own, perhaps with other settings of sampling and scoring; None for its own.

    Raises:
      UserError: the folder holds no run, no such checkpoint or a damaged one, or one of another
        model than the config's.
    """
    config = saved_config(folder) if config is None else config
    tokenizer = load_tokenizer(folder / "tokenizer")
    mesh = meshes.make_mesh(**config.mesh)
    generator = make_generator(config, tokenizer.rows, tokenizer.mask_id)
    params = _parameters(folder, config, tokenizer, mesh)
    return Trained(config, folder, tokenizer, generator, mesh, params)


def save(folder: pathlib.Path, config: ConfigDict, tokenizer: Tokenizer) -> None:
    """Write what `load` reads besides a checkpoint: the config to `config.json`, and the tokenizer
    into `tokenizer`."""
    (folder / "config.json").write_text(config.to_json(indent=2) + "\n")
    (folder / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(folder / "tokenizer")


def names_of(folders: Sequence[pathlib.Path]) -> list[str]:
    """The folders' own names; whole paths where two have the same."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _parameters(folder: pathlib.Path, config: ConfigDict, tokenizer: Tokenizer, mesh: Mesh) -> Any:
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep, create=False)
    step = checkpoints.find(str(config.checkpoint.restore))
    try:
        check_facts(checkpoints.facts(step), model_facts(config, tokenizer), resume=False)
        found = checkpoints.parameters(step, meshes.replicated(mesh))
    except UserError:
        raise
    except Exception as error:  # what a damaged file gives is as various as the files
        raise UserError(
            f"The checkpoint of step {step} in {checkpoints.folder} is damaged "
            f"({one_line(error)}). There: {checkpoints.steps()}; choose another with "
            "config.checkpoint.restore."
        ) from error
    checkpoints.close()
    print(f"parameters: EMA at step {step} of {checkpoints.folder}", flush=True)
    wanted = jax.eval_shape(lambda: init_params(config, tokenizer.rows, jax.random.key(0)))
    leaves = [found[name] for name in by_name(wanted)]
    params = jax.tree.unflatten(jax.tree.structure(wanted), leaves)
    return jax.device_put(params, partition.shardings(mesh, wanted))
