"""The likelihood of one text, perhaps given what stands before and after it, token by token."""

import pathlib

import numpy as np

from lomdm_jax import reading
from lomdm_jax.data.pipeline import Batch
from lomdm_jax.distributed import multihost
from lomdm_jax.errors import UserError, one_line
from lomdm_jax.evaluation import text_score
from lomdm_jax.evaluation.trajectories import calls
from lomdm_jax.trained import Trained


def score(model: Trained) -> text_score.TextScore:
    """Score `score.text` given `score.prefix` and `score.suffix`; write score.json, .csv and .png.

    Raises:
      UserError: there is no text, or two, or one that does not fit; the order of the model cannot
        see what is given; the model needs a time.
    """
    config = model.config.score
    text = _text(model)
    rows = reading.rows_of(model, text)
    _say(model, rows)
    found = reading.score(model, rows)
    print(text_score.report(found), flush=True)
    if multihost.leads():
        texts = {"text": text, "prefix": config.prefix, "suffix": config.suffix}
        for path in text_score.write(model.workdir, found, texts, model.config.order.name):
            print(f"wrote {path}", flush=True)
    return found


def _text(model: Trained) -> str:
    config = model.config.score
    if bool(config.text) == bool(config.file):
        both = "both are set" if config.text else "both are empty"
        raise UserError(
            f"config.score.text is {config.text!r} and config.score.file {config.file!r}, but "
            f"{both}: give the text to score in one of them."
        )
    if config.text:
        return str(config.text)
    try:
        return pathlib.Path(config.file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"config.score.file is {config.file!r}, which cannot be read ({one_line(error)}): give "
            "a UTF-8 text file."
        ) from error


def _say(model: Trained, rows: Batch) -> None:
    """What is scored and what it takes, for people."""
    counted_PL, orders = rows["counted"], model.config.score.orders
    given = int((~counted_PL & ~rows["absent"]).sum())
    pieces, length = counted_PL.shape
    most = int(np.max(counted_PL.sum(axis=-1)))
    passes = orders * pieces * calls(model.generator, length, most)
    print(
        f"{counted_PL.sum():,} tokens given {given:,}, in {orders} orders: at most {passes:,} "
        "passes of the network"
    )
    if pieces > 1:
        print(
            f"longer than config.data.length = {length}: scored in {pieces} pieces, each without "
            "what came before it"
        )
