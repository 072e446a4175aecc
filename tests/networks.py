"""Parameters of networks for tests, without a program that would have to be compiled."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def noisy(shapes, scale, seed=1):
    """Normal numbers for a dict of shapes: no gate is shut, no gradient zero. Kernels have twice
    the scale, over the root of their inputs; what scales a norm is around one."""
    rng = np.random.default_rng(seed)

    def fill(path, a):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        size = 2 * scale * a.shape[0] ** -0.5 if path[-1].key == "kernel" else scale
        return jnp.asarray(centre + size * rng.standard_normal(a.shape), a.dtype)

    return jax.tree.map_with_path(fill, shapes)


def shapes_of(make):
    """Structure and parameters' shapes, as a dict, of the module that `make` builds."""
    graphdef, shapes = nnx.split(nnx.eval_shape(make), nnx.Param)
    return graphdef, nnx.to_pure_dict(shapes)
