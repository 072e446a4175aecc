"""A small LoMDM on the docstrings of Python's standard library, on a CPU, in two minutes.

python -m lomdm_jax.main --config configs/quickstart.py            (or quickstart.py:mdm)
"""

from ml_collections import ConfigDict

from lomdm_jax.config import default_config


def get_config(order: str = "lomdm") -> ConfigDict:
    """order: the generation order, "lomdm" or "mdm"."""
    config = default_config()
    config.order.name = order
    config.objective.name = "order"  # the time-free objective: less noise in a short run
    config.data.length = 64

    config.model.width = 128
    config.model.layers = 4
    config.model.heads = 4
    config.model.cond_dim = 32
    config.model.dropout = 0.0  # less than one epoch

    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50

    config.train.steps = 600
    config.train.batch_size = 32
    config.train.log_every = 50
    config.train.eval_every = 300

    config.eval.batch_size = 64
    config.eval.sequences = 256
    config.eval.draws = 4

    config.sample.count = 32

    config.checkpoint.every = 300
    return config
