"""Trained models behind the page."""

import math
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from lomdm_jax import __version__
from lomdm_jax.config import default_config, validate
from lomdm_jax.errors import UserError
from lomdm_jax.generation import (
    KEPT,
    Given,
    Program,
    compiled,
    facts_of,
    given_of,
    stream,
    written,
)
from lomdm_jax.sampling.best import SCORES
from lomdm_jax.sampling.driver import Samples
from lomdm_jax.serving.protocol import MAX_SEED, Events, Request
from lomdm_jax.trained import Trained, names_of

LOOKS = 48  # partial results per generation, about: smooth to the eye, and cheap
SAMPLERS = (*SCORES, "ancestral")


class Models:
    """A `Backend` of trained models."""

    def __init__(self, models: Sequence[Trained]) -> None:
        self._models = dict(zip(names([m.workdir for m in models]), models, strict=True))
        self._programs = dict[tuple[str, int, str], Program]()

    def runs(self) -> list[dict[str, Any]]:
        return [_facts(name, model) for name, model in self._models.items()]

    def stream(self, request: Request) -> Events:
        name = request.run or next(iter(self._models))
        if name not in self._models:
            known = ", ".join(map(repr, self._models))
            raise UserError(f"run is {name!r}, but there are only {known}: choose one of them.")
        model = self._models[name]
        settings = settings_of(model.config, request)
        return self._events(name, model, settings, given_of(model, settings))

    def _events(self, name: str, model: Trained, settings: ConfigDict, given: Given) -> Events:
        known_T, pieces = given.given_BT[0], model.tokenizer.pieces(given.tokens_BT[0].tolist())
        rows = model.even(settings.count)
        key = (name, rows, facts_of(settings))
        yield {
            "event": "start",
            "compiling": key not in self._programs,
            "count": settings.count,
            "given": [p if known else None for p, known in zip(pieces, known_T, strict=True)],
        }
        with jax.set_mesh(model.mesh):
            program = self._program(key, model, settings)
            padded = Given(*(np.resize(a, (rows, a.shape[1])) for a in given))
            looks = stream(program, padded, settings.seed, every=_every(settings, known_T))
            yield from _told(name, model, settings, looks)

    def _program(self, key: tuple[str, int, str], model: Trained, settings: ConfigDict) -> Program:
        """Compiled now, or kept from before; the one that was used least recently is dropped."""
        program = self._programs.pop(key, None) or compiled(model, settings, key[1])
        self._programs[key] = program
        if len(self._programs) > KEPT:
            del self._programs[next(iter(self._programs))]
        return program


def names(folders: Sequence[pathlib.Path]) -> list[str]:
    """The folders' own names; whole paths where two have the same.

    Raises:
      UserError: a folder is named twice.
    """
    whole = [folder.resolve() for folder in folders]
    if len(set(whole)) < len(whole):
        raise UserError(
            f"config.serve.runs names a folder twice: of {', '.join(map(str, folders))} leave out "
            "what is double; the run itself is always there."
        )
    return names_of(folders)


def settings_of(config: ConfigDict, request: Request) -> ConfigDict:
    """The section `sample` that a request asks for: the defaults of lomdm_jax/config.py, the
    sampler of the run's `config`, and what the request says.

    Raises:
      UserError: this run cannot do that.
    """
    changed = ConfigDict(config.to_dict())
    changed.sample = default_config().sample
    changed.sample.sampler = config.sample.sampler
    changed.sample.seed = int(np.random.default_rng().integers(MAX_SEED))
    changed.sample.update(request.model_dump(exclude={"run"}, exclude_none=True))
    window = config.data.length
    if changed.sample.length > window:
        raise UserError(f"length is {changed.sample.length}, but a page shows {window} at most.")
    validate(changed)
    return changed.sample


def _facts(name: str, model: Trained) -> dict[str, Any]:
    """What the page tells of a run; see `Backend.runs`."""
    config = model.config
    return {
        "name": name,
        "order": config.order.name,
        "layout": model.generator.one_pass,
        "length": config.data.length,
        "samplers": {sampler: _why_not(config, sampler) for sampler in SAMPLERS},
        "defaults": _facts_of(config.sample),
    }


def _why_not(config: ConfigDict, sampler: str) -> str | None:
    """None if a run has this sampler."""
    try:
        settings_of(config, Request.model_validate({"sampler": sampler}))
    except UserError as error:
        return str(error)
    return None


def _every(settings: ConfigDict, known_T: np.ndarray) -> int:
    """Steps between two looks."""
    hidden = int((~known_T).sum())
    steps = settings.steps if settings.sampler == "ancestral" else hidden / settings.reveal
    return max(1, round(steps / LOOKS))


class _Seen(NamedTuple):
    """What the page knows: tokens and steps, int32 [B, T]."""

    tokens_BT: np.ndarray
    revealed_BT: np.ndarray


def _told(name: str, model: Trained, settings: ConfigDict, looks: Iterator[Samples]) -> Events:
    """The events "reveal" and "end" of partial results."""
    began, seen = time.perf_counter(), None
    for samples in looks:
        samples = jax.tree.map(lambda a: a[: settings.count] if np.ndim(a) else a, samples)
        seconds = time.perf_counter() - began
        yield {
            "event": "reveal",
            "seconds": round(seconds, 3),
            "calls": int(samples.calls),
            "changes": _changes(model, samples, seen),
        }
        seen = _Seen(samples.tokens_BT, samples.revealed_BT)
    yield {"event": "end", "trace": _trace(name, model, settings, samples, seconds)}


def _changes(model: Trained, samples: Samples, seen: _Seen | None) -> list[list[Any]]:
    """What is new since the page has seen this; see `protocol.EVENTS`."""
    shown_BT = samples.revealed_BT > 0
    changed_BT = shown_BT
    if seen is not None:
        changed_BT = (samples.tokens_BT != seen.tokens_BT) & (shown_BT | (seen.revealed_BT > 0))
    found = []
    for row, position in np.argwhere(changed_BT).tolist():
        at = (row, position)
        (piece,) = model.tokenizer.pieces([samples.tokens_BT[at].item()])
        share, log_p = (number(a[at].item()) for a in (samples.share_BT, samples.log_p_BT))
        shown = piece if shown_BT[at] else None
        found.append([row, position, shown, int(samples.revealed_BT[at]), share, log_p])
    return found


def _trace(
    name: str, model: Trained, settings: ConfigDict, samples: Samples, seconds: float
) -> dict[str, Any]:
    """All that is known of a generation."""
    tokens = int(written(samples).sum())
    return {
        "run": name,
        "order": model.config.order.name,
        "checkpoint": str(model.config.checkpoint.restore),
        "version": {"trace": 1, "lomdm_jax": __version__, "jax": jax.__version__},
        "settings": _facts_of(settings),
        "seconds": round(seconds, 3),
        "calls": int(samples.calls),
        "tokens": tokens,
        "tokens_per_second": number(tokens / seconds),
        "samples": [_sample(model, samples, row) for row in range(settings.count)],
    }


def _sample(model: Trained, samples: Samples, row: int) -> dict[str, Any]:
    tokens = samples.tokens_BT[row].tolist()
    length = int(samples.length_B[row])
    return {
        "text": model.tokenizer.decode(tokens[:length]),
        "tokens": tokens,
        "pieces": model.tokenizer.pieces(tokens),
        "revealed": samples.revealed_BT[row].tolist(),
        "share": [*map(number, samples.share_BT[row].tolist())],
        "log_p": [*map(number, samples.log_p_BT[row].tolist())],
        "calls": int(samples.calls_B[row]),
        "length": length,
    }


def number(value: float) -> float | None:
    """Six digits, or None for what JSON has no number for."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _facts_of(settings: ConfigDict) -> dict[str, Any]:
    """What a request can say of a section `sample`; None for what JSON has no number for."""
    values = {key: settings[key] for key in Request.model_fields if key in settings}
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
