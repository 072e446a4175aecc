"""MDLM's "small" network on OpenWebText, in the order of your choice; for a TPU slice or GPUs.

python -m lomdm_jax.main --config configs/openwebtext.py            (or openwebtext.py:mdm)
python -m lomdm_jax.main --config configs/openwebtext.py --job compile --topology v5e:4x4

The data and the budget are MDLM's (mdlm configs/, 512 sequences of 1,024 tokens for 1,000,000
steps, 524 billion tokens), which reports a perplexity of 23.0 there; the LoMDM paper reports 20.4.
Neither was reproduced with this file yet. docs/scaling.md says on what it fits and how fast it
should be.
"""

from ml_collections import ConfigDict

from lomdm_jax.config import default_config
from lomdm_jax.data.presets import apply


def get_config(order: str = "lomdm") -> ConfigDict:
    """order: the generation order, one of lomdm_jax.orders.NAMES."""
    config = default_config()
    apply(config, "openwebtext")
    config.data.vocab_size = 50_257  # GPT-2's; known here, so that a step compiles without data
    config.order.name = order
    config.model.dtype = "bfloat16"
    config.train.micro_batches = 4  # eight sequences at a time on each of 16 devices
    config.eval.batch_size = 512
    config.eval.draws = 1  # 100,000 documents leave little noise
    config.sample.count = 512
    return config
