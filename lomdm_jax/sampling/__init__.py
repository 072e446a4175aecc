"""Samplers by name."""

from ml_collections import ConfigDict

from lomdm_jax.sampling.ancestral import Ancestral
from lomdm_jax.sampling.driver import Chooser
from lomdm_jax.sampling.race import Race


def make_chooser(config: ConfigDict, length: int) -> Chooser:
    """The sampler of the config section `sample`, for sequences of `length` tokens."""
    if config.sampler == "race":
        return Race(config.reveal, length)
    return Ancestral(config.steps, config.grid == "even")
