"""Text that a trained model reads: in which orders, and what it costs."""

import functools

import jax
import numpy as np
from jax.sharding import Mesh

from lomdm_jax.data.pipeline import Batch
from lomdm_jax.distributed import mesh as meshes
from lomdm_jax.errors import UserError
from lomdm_jax.evaluation import reveal_ranks, text_score
from lomdm_jax.evaluation.likelihood import over_batches
from lomdm_jax.evaluation.order_texts import batches
from lomdm_jax.evaluation.trajectories import Maker, Trajectory, make_trajectories
from lomdm_jax.generator import Generator
from lomdm_jax.trained import Trained

KEPT = 32  # compiled programs, each for one model


def read(model: Trained, rows: Batch, seed: int) -> Trajectory:
    """A trajectory of each of N rows, arrays [N, L] on the host; a model compiles once for all
    rows of one shape.

    rows: `tokens` int32 [N, L], `counted` bool [N, L] and perhaps more; see `make_trajectories`.
    """
    size = model.even(min(len(rows["tokens"]), model.config.eval.batch_size))
    with jax.set_mesh(model.mesh):
        found = over_batches(
            _maker(model.mesh, model.generator),
            model.params,
            batches(rows, size),
            key=model.key(seed),
            place=model.place,
        )
        return jax.tree.map(lambda *parts: np.concatenate(parts), *(each for _, each in found))


@functools.lru_cache(KEPT)
def _maker(mesh: Mesh, generator: Generator) -> Maker:
    return meshes.run_everywhere(mesh, make_trajectories(generator))


def rows_of(model: Trained, text: str) -> Batch:
    """The rows of a text between what the config section `score` gives before and after it; see
    `text_score.laid`.

    Raises:
      UserError: there is no token, or it does not fit; the order of the model cannot see what is
        given; the model needs a time.
    """
    config, length, tokenizer = model.config.score, model.config.data.length, model.tokenizer
    before, ids, after = (tokenizer.encode(t) for t in (config.prefix, text, config.suffix))
    if not ids:
        key = "file" if config.file else "text"
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
    rows = text_score.laid(before, ids, after, length, tokenizer.pad_id)
    _check_order(model, rows)
    return rows


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


def score(model: Trained, rows: Batch) -> text_score.TextScore:
    """What the rows of `rows_of` cost, by `score.orders` orders of each."""
    tokenizer = model.tokenizer
    found = _orders_of(model, rows)
    return text_score.summarise(found, rows, tokenizer.pieces, tokenizer.byte_lengths)


def order(model: Trained, rows: Batch) -> reveal_ranks.TextOrder:
    """When each token of the one row of `rows_of` is revealed, by `score.orders` orders.

    Raises:
      UserError: the text has several rows.
    """
    if len(rows["tokens"]) > 1:
        raise UserError(
            f"config.score.text has {rows['counted'].sum():,} tokens, but there is no order of "
            f"more than config.data.length = {model.config.data.length}: shorten it."
        )
    return reveal_ranks.summarise(_orders_of(model, rows), rows, model.tokenizer.pieces)


def _orders_of(model: Trained, rows: Batch) -> Trajectory:
    """`score.orders` trajectories of each row, arrays [P, K, L]."""
    count, orders = len(rows["tokens"]), model.config.score.orders
    repeated = {name: np.repeat(a, orders, axis=0) for name, a in rows.items()}
    found = read(model, repeated, model.config.eval.seed)
    return jax.tree.map(lambda a: a.reshape(count, orders, -1), found)
