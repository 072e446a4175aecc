"""A run's folder from what PyTorch holds: an export, or a checkpoint of an MDLM or a BD3-LM."""

import pathlib

import jax
from ml_collections import ConfigDict

from lomdm_jax.errors import UserError
from lomdm_jax.interop import importing


def import_(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Write the folder of a run, `workdir`, with the model that `import.source` holds: all jobs
    after training work with it, and `train.start_from`.

    config: of an MDLM or BD3-LM, the settings that its checkpoint does not give; an export has all.

    Raises:
      UserError: there is no source, it is damaged, unsafe or another model, or the folder is not
        empty.
    """
    source = config["import"].source
    if not source:
        raise UserError(
            "config.import.source is empty: give the folder of an export, or a folder or file of "
            "an MDLM or a BD3-LM."
        )
    if jax.process_count() > 1:
        raise UserError(f"--job import runs in one process, not {jax.process_count()}.")
    importing.check_workdir(workdir)
    path = pathlib.Path(source).expanduser()
    importing.write(workdir, importing.read(path, config), path)
    print(f"imported {path} to {workdir}", flush=True)
