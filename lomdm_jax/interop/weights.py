"""Tensors in safetensors files: read, and held against what is expected of them."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import safetensors.numpy

from lomdm_jax.errors import UserError, one_line

Tensors = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]


def read(file: pathlib.Path) -> Tensors:
    """All tensors of a safetensors file, by name.

    Raises:
      UserError: there is no such file, or it is cut short or otherwise damaged.
    """
    try:
        return safetensors.numpy.load_file(file)
    except Exception as error:  # what a damaged file gives is as various as the damage
        raise UserError(
            f"{file} cannot be read ({one_line(error)}): it is missing, cut short or no "
            "safetensors file. Copy it again."
        ) from error


def check(
    tensors: Mapping[str, np.ndarray],
    wanted: Shapes,
    file: pathlib.Path,
    dtypes: Sequence[str] = ("float32",),
) -> None:
    """Make sure that these are the tensors of a model: every name, shape and type.

    wanted: the shape of each tensor that the model has.

    Raises:
      UserError: names the first tensor that is missing, strange, or of another shape or type.
    """
    for name in wanted:
        if name not in tensors:
            strange = next((other for other in tensors if other not in wanted), None)
            beside = f", but {strange}, which it has not" if strange else ""
            raise UserError(
                f"{file} has no tensor {name} {wanted[name]}, which this model has{beside}: the "
                "file belongs to another model, or was changed."
            )
    for name, a in tensors.items():
        if name not in wanted:
            raise UserError(
                f"{file} has a tensor {name} {a.shape}, which this model has not: the file belongs "
                "to another model, or was changed."
            )
        if a.shape != wanted[name]:
            raise UserError(
                f"{file}: the tensor {name} has the shape {a.shape}, but this model needs "
                f"{wanted[name]}: the file belongs to another model, or was changed."
            )
        if a.dtype.name not in dtypes:
            raise UserError(
                f"{file}: the tensor {name} is of type {a.dtype.name}, but {' or '.join(dtypes)} "
                "is needed: convert it."
            )
