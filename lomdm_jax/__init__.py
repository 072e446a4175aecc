"""Masked text diffusion in JAX with the generation order under control.

    import lomdm_jax
    model = lomdm_jax.load("runs/quickstart")
    print(lomdm_jax.sample(model, "Return the")[0].text)

docs/python.md has more. Importing this starts neither JAX nor a device; the first use of a name
does.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lomdm_jax.api import load, order_of, sample, score
    from lomdm_jax.errors import UserError
    from lomdm_jax.evaluation.reveal_ranks import TextOrder
    from lomdm_jax.evaluation.text_score import TextScore
    from lomdm_jax.generation import Completion
    from lomdm_jax.trained import Trained

__version__ = "0.1.0"
__all__ = [
    "Completion",
    "TextOrder",
    "TextScore",
    "Trained",
    "UserError",
    "load",
    "order_of",
    "sample",
    "score",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module("lomdm_jax.api")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
