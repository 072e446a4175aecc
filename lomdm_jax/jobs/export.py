"""A checkpoint as files for PyTorch and the package transformers."""

import pathlib

import jax
import numpy as np

from lomdm_jax.config import saved_config
from lomdm_jax.distributed import multihost
from lomdm_jax.interop import exporting
from lomdm_jax.interop.exporting import Exported
from lomdm_jax.interop.files import whole
from lomdm_jax.trained import Trained
from lomdm_jax.training.checkpoint import Checkpoints


def export(model: Trained) -> pathlib.Path:
    """Write the EMA parameters that `checkpoint.restore` names, with the tokenizer and all that it
    takes to use them, to `export.folder`; its path. An earlier export there is replaced.

    Raises:
      UserError: the folder holds something else, or cannot be written.
    """
    chosen = model.config.export.folder
    folder = pathlib.Path(chosen) if chosen else model.workdir / "export"
    exporting.check_folder(folder)
    exported = _exported(model)
    if multihost.leads():
        with whole(folder) as place:
            exporting.write(place, exported)
        print(f"exported step {exported.step:,} to {folder}", flush=True)
    return folder


def _exported(model: Trained) -> Exported:
    """With the config of the run itself, whatever was set for this job."""
    keep = model.config.checkpoint.keep
    checkpoints = Checkpoints(model.workdir / "checkpoints", keep, create=False)
    step = checkpoints.find(str(model.config.checkpoint.restore))
    facts, newest = checkpoints.facts(step), checkpoints.latest() == step
    checkpoints.close()
    params = jax.tree.map(np.asarray, model.jit(lambda params: params)(model.params))
    evaluation = exporting.evaluation_of(model.workdir)
    if evaluation is not None and not newest:
        print(f"{exporting.EVALUATION} may be of another step than {step}: left out", flush=True)
        evaluation = None
    config = saved_config(model.workdir)
    return Exported(config, model.tokenizer, params, step, facts, evaluation)
