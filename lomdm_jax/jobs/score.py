"""The likelihood of one text, perhaps given what stands before and after it, token by token."""

import pathlib

import numpy as np

from lomdm_jax.data.pipeline import Batch
from lomdm_jax.distributed import multihost
from lomdm_jax.errors import UserError, one_line
from lomdm_jax.evaluation import text_score
from lomdm_jax.evaluation.trajectories import calls, make_trajectories
from lomdm_jax.trained import Trained


def score(model: Trained) -> text_score.TextScore:
    """Score `score.text` given `score.prefix` and `score.suffix`; write score.json, .csv and .png.

    Raises:
      UserError: there is no text, or two, or one that does not fit; the order of the model cannot
        see what is given; the model needs a time.
    """
    config = model.config.score
    text = _text(model)
    rows = _rows(model, text)
    _check_order(model, rows)
    size = _batch_size(model, len(rows["tokens"]) * config.orders)
    _say(model, rows)
    found = text_score.score(
        model.jit(make_trajectories(model.generator)),
        model.params,
        rows,
        key=model.key(model.config.eval.seed),
        orders=config.orders,
        size=size,
        place=model.place,
        pieces=model.tokenizer.pieces,
        byte_lengths=model.tokenizer.byte_lengths,
    )
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


def _rows(model: Trained, text: str) -> Batch:
    """The rows to score; see `text_score.laid`."""
    config, length, tokenizer = model.config.score, model.config.data.length, model.tokenizer
    before, ids, after = (tokenizer.encode(t) for t in (config.prefix, text, config.suffix))
    if not ids:
        key = "text" if config.text else "file"
        raise UserError(f"config.score.{key} is {config[key]!r}, in which there is no token.")
    alone = not (before or after)
    if model.config.objective.ignore_first and not before:
        before = [tokenizer.eos_id]  # the first position is never generated; eos precedes a text
    if not alone and len(before) + len(ids) + len(after) > length:
        raise UserError(
            f"config.score.prefix ({len(before)} tokens), the text ({len(ids)}) and "
            f"config.score.suffix ({len(after)}) do not fit in config.data.length = {length}: "
            "shorten them; only a text alone is scored in pieces."
        )
    return text_score.laid(before, ids, after, length, tokenizer.pad_id)


def _check_order(model: Trained, rows: Batch) -> None:
    config, generator = model.config, model.generator
    if config.model.time_conditioning:
        raise UserError(
            "config.model.time_conditioning is True: the network is told a time, which a reveal "
            "order has not. Score with a model that was trained without."
        )
    groups = generator.order.groups if generator.one_pass == "groups" else None
    if groups is None:
        return
    unseen = text_score.out_of_reach(rows, groups(config.data.length)).sum()
    if unseen:
        raise UserError(
            f"config.score.prefix is {config.score.prefix!r} and config.score.suffix "
            f"{config.score.suffix!r}, but order.name = {config.order.name!r} reveals {unseen} of "
            "their tokens after some of the text, whose likelihood given those it cannot tell: "
            "give only what it reveals before, or score with an order without groups, or a run "
            "with model.layout = 'ranked'."
        )


def _batch_size(model: Trained, rows: int) -> int:
    """Rows at a time: what there are, at most `eval.batch_size`, and a whole number per device."""
    parts = model.mesh.shape["data"] * model.mesh.shape["fsdp"]
    return -(-min(rows, model.config.eval.batch_size) // parts) * parts


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
