"""What `import lomdm_jax` offers to Python; docs/python.md has examples.

A model is a `Trained`, and none of these functions changes it. Settings have the names that
lomdm_jax/config.py has. Whatever a caller can mend is a `UserError` that names the argument.
"""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from lomdm_jax import generation, reading, trained
from lomdm_jax.config import default_config, leaf, override, saved_config, validate
from lomdm_jax.errors import UserError
from lomdm_jax.evaluation.reveal_ranks import TextOrder
from lomdm_jax.evaluation.text_score import TextScore
from lomdm_jax.generation import Completion
from lomdm_jax.trained import Trained

# Arguments by the keys of the config that they set.
_LOADED = {"checkpoint.restore": "checkpoint"}
_READ = {f"score.{name}": name for name in ("text", "file", "prefix", "suffix", "orders")}
_READ["eval.seed"] = "seed"
_SAMPLED = {f"sample.{name}": name for name in default_config().sample}


def load(
    folder: str | os.PathLike[str], checkpoint: str | int | None = None, **settings: Any
) -> Trained:
    """The model of a run's folder, with its EMA parameters on the devices.

    Args:
      folder: what `--workdir` was in training. Nothing else is needed, the training text neither.
      checkpoint: "latest", "best" (by nelbo_order) or a step; None for what the run's config says,
        "latest" unless it was changed.
      settings: other values for the run's config, by "section.name", for as long as the model is
        used: load(folder, **{"mesh.data": 1, "sample.top_p": 0.9}).

    Raises:
      UserError: the folder holds no run, no such checkpoint or a damaged one; there is no such
        setting, or not with such a value.
    """
    folder = pathlib.Path(folder).expanduser()
    if not (folder / "config.json").exists():
        raise UserError(
            f"folder is {str(folder)!r}, which holds no run (no config.json): give the one that "
            "--workdir named in training."
        )
    if checkpoint is not None:
        settings["checkpoint.restore"] = str(checkpoint)
    with _as_arguments(_LOADED, others=""):
        return trained.load(folder, _changed(saved_config(folder), settings))


def score(
    model: Trained,
    text: str,
    prefix: str = "",
    suffix: str = "",
    *,
    orders: int | None = None,
    seed: int | None = None,
) -> TextScore:
    """What a text costs the model, in all and token by token: bounds on -log p(text), nats.

    Args:
      model: of `load`.
      text: scored in pieces of `model.config.data.length` tokens if it is longer.
      prefix, suffix: given, not scored: the likelihood is that of the text between. They must fit
        into the model's length together with it.
      orders: how many orders of the text are drawn; None for what the model's config says. More
        make the errors smaller and `importance` tighter.
      seed: of the draws; None for what the model's config says.

    Returns:
      `nelbo`, `nelbo_order` and `importance`, each with `nats` and the standard `error` of the
      draws (nan for one order); `tokens`, in the order of the text; `bytes` of UTF-8.

    Raises:
      UserError: there is no text, or it does not fit; the order of the model cannot see what is
        given; the model needs a time.
    """
    with _as_arguments(_READ):
        asked = _to_read(model, text, prefix, suffix, orders, seed)
        return reading.score(asked, reading.rows_of(asked, text))


def order_of(
    model: Trained,
    text: str,
    prefix: str = "",
    suffix: str = "",
    *,
    orders: int | None = None,
    seed: int | None = None,
) -> TextOrder:
    """When each token of a text is revealed, from 0, first, to 1, last.

    Args:
      model, prefix, suffix, orders, seed: see `score`.
      text: at most `model.config.data.length` tokens.

    Returns:
      `tokens`, in the order of the text: each with its `piece` and its rank by two orders,
      `forward`, which knows the text, and `reverse`, the model's own: mean, standard error of the
      draws, and the probability with which it came next when it came. `effective`: how many of the
      `orders` the reverse ranks are worth.

    Raises:
      UserError: as `score`, and if the text is longer than the model's length.
    """
    with _as_arguments(_READ):
        asked = _to_read(model, text, prefix, suffix, orders, seed)
        return reading.order(asked, reading.rows_of(asked, text))


def sample(
    model: Trained, prompt: str = "", count: int = 1, seed: int | None = None, **settings: Any
) -> list[Completion]:
    """Text from the model, and the order in which it was generated.

    The first call with other settings, or another number of rows, compiles, which takes seconds.

    Args:
      model: of `load`.
      prompt: text that every sample starts with. [[N]] in it stands for a blank of N tokens.
      count: samples. What is drawn for one does not depend on how many there are.
      seed: of the draws; None for what the model's config says: the same text each time.
      settings: of the section `sample` of lomdm_jax/config.py: suffix, sampler, reveal, steps,
        temperature, top_p, length, stop_at_eos and more; those left out are the model's own.

    Raises:
      UserError: there is no such setting, or not with such a value; this model cannot do that; the
        prompt does not fit.
    """
    values = {"prompts": "", "prompt": prompt, "count": count, **settings}
    values |= {} if seed is None else {"seed": seed}
    with _as_arguments(_SAMPLED | {f"sample.{name}": name for name in settings}):
        asked = _with(model, {f"sample.{name}": value for name, value in values.items()})
        with jax.set_mesh(model.mesh):
            return generation.completions(generation.generate(asked, asked.config.sample))


def _to_read(
    model: Trained, text: str, prefix: str, suffix: str, orders: int | None, seed: int | None
) -> Trained:
    """The model with what is asked in its config."""
    texts = {"text": text, "file": "", "prefix": prefix, "suffix": suffix}
    values: dict[str, Any] = {f"score.{name}": value for name, value in texts.items()}
    numbers = {"score.orders": orders, "eval.seed": seed}
    return _with(model, values | {key: n for key, n in numbers.items() if n is not None})


def _with(model: Trained, values: Mapping[str, Any]) -> Trained:
    return model._replace(config=_changed(model.config, values))


def _changed(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """A copy of the config with these values by "section.name", checked."""
    config = config.copy_and_resolve_references()
    for key, value in values.items():
        override(config, key, str(value))
        if isinstance(leaf(config, key), str) and not isinstance(value, str):
            raise UserError(f"config.{key} is {value!r}, but it must be a str.")
    validate(config)
    return config


@contextlib.contextmanager
def _as_arguments(names: Mapping[str, str], others: str = "model.config.") -> Iterator[None]:
    """Errors name keys of the config as the caller knows them: by their arguments, if they have
    any; the others by this prefix."""
    keys = "|".join(map(re.escape, sorted(names, reverse=True)))  # a longer one before its start
    try:
        yield
    except UserError as error:
        text = re.sub(rf"(--)?\b(config\.)?({keys})\b", lambda m: names[m[3]], str(error))
        raise UserError(re.sub(r"(--)?(?<![\w./])config\.(?=\w)", others, text)) from None
