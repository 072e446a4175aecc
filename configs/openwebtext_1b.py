"""A network of a billion parameters on OpenWebText, for a slice of 64 chips or so.

python -m lomdm_jax.main --config configs/openwebtext_1b.py
python -m lomdm_jax.main --config configs/openwebtext_1b.py --job compile --topology v5p:4x4x4

Untried: no paper trains an order at this size. The rate is lower than that of the small network and
the rest of the recipe the same. docs/scaling.md says on what it fits and how fast it should be.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config(order: str = "lomdm") -> ConfigDict:
    """order: the generation order, one of lomdm_jax.orders.NAMES."""
    small = runpy.run_path(str(pathlib.Path(__file__).with_name("openwebtext.py")))
    config = small["get_config"](order)
    config.model.width = 2048
    config.model.layers = 14  # and two more blocks in the order heads
    config.model.heads = 16
    config.model.remat = "full"
    config.optimizer.learning_rate = 1e-4
    config.train.micro_batches = 1
    config.mesh.fsdp = 16  # parameters, average and optimizer state: 16 bytes per parameter
    return config
