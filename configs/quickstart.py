"""A small LoMDM on the docstrings of Python's standard library, on a CPU, in two minutes.

python -m lomdm_jax.main --config configs/quickstart.py            (or quickstart.py:mdm)

Expect nelbo_order near 5.0 nats per token (perplexity near 150) where the unigram entropy is 5.94,
and an order that is still close to random: a minute is enough to learn words, not yet an order.
"""

from ml_collections import ConfigDict

from lomdm_jax.config import default_config


def get_config(order: str = "lomdm") -> ConfigDict:
    """order: the generation order, one of lomdm_jax.orders.NAMES."""
    config = default_config()
    config.order.name = order
    config.objective.name = "order"  # the time-free objective: less noise in a short run
    if order in ("walk", "lomdm-order"):  # benchmarks/README.md says why
        config.objective.temperature = 2.0
        config.objective.uniform_share = 0.5
        config.train.random_steps = 400  # half of them
    if order == "lomdm-ranked":
        config.train.random_steps = 100  # an eighth of them
        config.objective.mask_samples = 4
        config.model.head_layers = 0
    config.data.length = 32  # short sequences leave the unigram plateau soonest

    config.model.width = 64  # on two cores, more steps beat more width
    config.model.layers = 2
    config.model.heads = 4
    config.model.cond_dim = 32
    config.model.dropout = 0.0  # a few epochs at most

    config.optimizer.learning_rate = 3e-3  # higher rates saturate the order heads
    config.optimizer.warmup_steps = 50
    config.optimizer.b2 = 0.98  # 1 / (1 - b2) must be short against the run

    config.train.steps = 800
    config.train.batch_size = 32
    config.train.log_every = 50
    config.train.eval_every = 400
    config.checkpoint.every = 400

    config.eval.draws = 4
    config.sample.count = 64
    return config
