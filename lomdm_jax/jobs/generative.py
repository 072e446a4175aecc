"""Samples of several samplers, at several numbers of network calls, under a judge."""

import itertools
import pathlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from lomdm_jax.config import override, validate
from lomdm_jax.distributed import mesh as meshes
from lomdm_jax.distributed import multihost
from lomdm_jax.errors import UserError, one_line
from lomdm_jax.evaluation import generative as table
from lomdm_jax.evaluation.generative import Row, Texts
from lomdm_jax.evaluation.judges import Judge, Judged, make_judge
from lomdm_jax.generation import Generated, generate
from lomdm_jax.orders import make_order
from lomdm_jax.trained import Trained


class Point(NamedTuple):
    """One row of the table to be: a sampler as it was asked for, the network calls to aim at, and
    the settings that come nearest, a section like `sample`."""

    sampler: str
    calls: int
    settings: ConfigDict


def generative(model: Trained) -> None:
    """Judge `generative.samples` texts of every sampler at every number of calls, and the reference
    if there is one; write generative.md, .csv, .json and .png, anew after every row."""
    config = model.config.generative
    points = plan(model.config)
    for point in points:
        at_a_time = min(point.settings.batch_size, config.samples)
        meshes.check_divides(model.mesh, "sample.batch_size", at_a_time)
    reference = read_reference(model) if config.reference else None
    judge = make_judge(config.judge, model.config.mesh)
    print(f"judge: {judge.protocol}", flush=True)
    facts = {
        "judge": config.judge,
        "protocol": judge.protocol,
        "reference": config.reference,
        "sample": model.config.sample.to_dict(),
    }
    rows: list[Row] = []
    for row in _rows(model, judge, points, reference):
        rows.append(row)
        print(table.report(row), flush=True)
        if multihost.leads():
            paths = table.write(model.workdir, facts, rows)
    print(table.markdown(judge.protocol, rows), flush=True)
    if multihost.leads():
        for path in paths:
            print(f"wrote {path}", flush=True)


def _rows(
    model: Trained, judge: Judge, points: list[Point], reference: Texts | None
) -> Iterator[Row]:
    """The reference's row, if there is one, and that of every point, as they come."""
    standard = judge(reference.texts) if reference else None
    if reference and standard:
        yield reference_row(reference, standard)
    started = time.perf_counter()
    for number, point in enumerate(points, start=1):
        print(f"{number}/{len(points)} {point.sampler} at {point.calls} calls", flush=True)
        yield sample_row(point, generate(model, point.settings), judge, standard)
        left = (time.perf_counter() - started) / 60 * (len(points) - number) / number
        print(f"{left:.0f} min left", flush=True)


def plan(config: ConfigDict) -> list[Point]:
    """What to draw, sampler by sampler; of settings that are the same, those asked for first.

    Raises:
      UserError: a sampler or its changes, or the calls cannot be used, or the samples would
        complete a prompt.
    """
    for key in ("prompt", "suffix", "prompts"):
        if config.sample[key]:
            raise UserError(
                f"config.sample.{key} is {config.sample[key]!r}, but --job generative judges texts "
                "that are generated as a whole: leave it empty."
            )
    samplers = [*filter(None, map(str.strip, config.generative.samplers.split(",")))]
    if not samplers:
        raise UserError(
            "config.generative.samplers is empty: give one sampler or several with commas between, "
            "such as race,ancestral@grid=linear."
        )
    points: dict[tuple[str, str], Point] = {}
    for sampler, calls in itertools.product(samplers, _calls(config.generative.calls)):
        settings = _settings(config, sampler, calls)
        points.setdefault((sampler, settings.to_json()), Point(sampler, calls, settings))
    return [*points.values()]


def _calls(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(
            f"config.generative.calls is {text!r}, but it must be whole numbers above zero with "
            "commas between, such as 8,16,32."
        )
    return [*map(int, parts)]


def _settings(config: ConfigDict, sampler: str, calls: int) -> ConfigDict:
    """The section `sample` for "NAME@KEY=VALUE@KEY=VALUE" with the network calls that come nearest
    to `calls` for a text, checked as the command line is."""
    changed = ConfigDict(config.to_dict())
    name, *changes = sampler.split("@")
    changed.sample.count = config.generative.samples
    try:
        for key, _, value in (change.partition("=") for change in [f"sampler={name}", *changes]):
            override(changed, f"sample.{key}", value)
        _aim(changed, calls)
        validate(changed)
    except UserError as error:
        raise UserError(
            f"config.generative.samplers has {sampler!r}, which cannot be drawn in {calls} calls "
            f"(config.generative.calls): {error}"
        ) from error
    return changed.sample


def _aim(config: ConfigDict, calls: int) -> None:
    """Set `sample.steps` or `sample.reveal` for so many network calls over all blocks of a text."""
    length = config.sample.length or config.data.length
    size = _block(config) or length
    steps = -(-calls // max(length // size, 1))
    if config.sample.sampler == "ancestral":
        config.sample.steps = steps
    else:
        config.sample.reveal = -(-size // steps)


def _block(config: ConfigDict) -> int:
    """Positions that must be complete before the next ones are begun; 0 for no such blocks."""
    order = make_order(**config.order)
    if order.groups is None or order.one_pass(config.model.layout) != "groups":
        return config.sample.block
    return int((order.groups(config.data.length) == 0).sum())


def read_reference(model: Trained) -> Texts:
    """The first texts of `generative.reference`, a text in each line, as many as are generated,
    each cut to the tokens of a sample.

    Raises:
      UserError: the file cannot be read, or holds no text.
    """
    config = model.config.generative
    try:
        lines = pathlib.Path(config.reference).expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(
            f"config.generative.reference is {config.reference!r}, which cannot be read "
            f'({one_line(error)}): give a text file, UTF-8, with a text in each line, or "".'
        ) from error
    texts = [line.strip() for line in lines if line.strip()][: config.samples]
    if not texts:
        raise UserError(
            f"config.generative.reference is {config.reference!r}, which holds no text: give a "
            'file with a text in each line, or "".'
        )
    length = model.config.sample.length or model.config.data.length
    tokens = [np.array(model.tokenizer.encode(text)[:length]) for text in texts]
    return Texts([model.tokenizer.decode(row.tolist()) for row in tokens], tokens)


def reference_row(reference: Texts, judged: Judged) -> Row:
    """The row of real text."""
    sampling = (
        "asked_calls nfe tokens_per_second temperature top_p top_k gumbel rejection seed".split()
    )
    nothing: dict[str, Any] = dict.fromkeys(sampling)
    found = table.measure(reference, judged)
    return Row(sampler=table.REFERENCE, mauve="is the reference", **nothing, **found)


def sample_row(point: Point, found: Generated, judge: Judge, reference: Judged | None) -> Row:
    """The row of what was generated for a point."""
    samples = found.samples
    rows = zip(samples.tokens_BT, samples.length_B, strict=True)
    texts = Texts(found.texts, [tokens_T[:length] for tokens_T, length in rows])
    judged = judge(texts.texts)
    return Row(
        sampler=point.sampler,
        asked_calls=point.calls,
        nfe=float(np.mean(samples.calls_B)),
        **table.measure(texts, judged),
        mauve=table.mauve(judged, reference),
        tokens_per_second=found.tokens_per_second,
        temperature=point.settings.temperature,
        top_p=point.settings.top_p,
        top_k=point.settings.top_k,
        gumbel=table.GUMBEL,
        rejection=table.REJECTION,
        seed=point.settings.seed,
    )
