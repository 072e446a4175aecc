"""What a text costs a model, token by token, given what stands before and after it."""

import csv
import io
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lomdm_jax.data.pipeline import Batch
from lomdm_jax.evaluation.order_charts import GREY, INK
from lomdm_jax.evaluation.order_text import (
    COLUMNS,
    MARGIN,
    MONO,
    WIDTH,
    SampleTrace,
    axes_at,
    blank,
    laid_out,
)
from lomdm_jax.evaluation.trajectories import Trajectory, importance_bound

# Lightness falls evenly, and black text reads well on all of it; safe for colour blindness.
PALETTE = matplotlib.colormaps["YlOrBr"].resampled(256)
DARKEST = 0.6  # of the palette
BOUNDS = ("nelbo", "nelbo_order", "importance")


class Nats(NamedTuple):
    """A bound on -log p of the whole text given the rest, nats, and the error of its draws."""

    nats: float
    error: float


class Token(NamedTuple):
    """A token that is scored; means over the orders that were drawn.

    piece, row, position: what it is and where it stands; nats: its surprisal when it was revealed;
    order_nats: what the choice of its position cost; rank: how many tokens of the text were
    revealed before it; entropy: nats, of the token's distribution.
    """

    row: int
    position: int
    piece: str
    nats: float
    order_nats: float
    rank: float
    entropy: float


class TextScore(NamedTuple):
    """nelbo: the paper's bound; nelbo_order: without the clock, the mean over `orders` orders;
    importance: what those give together, the tightest. bytes: 0 if the tokenizer loses text."""

    nelbo: Nats
    nelbo_order: Nats
    importance: Nats
    orders: int
    bytes: int
    tokens: list[Token]


def laid(
    before: Sequence[int], text: Sequence[int], after: Sequence[int], length: int, pad_id: int
) -> Batch:
    """Rows of `length` positions that hold the text, cut into pieces if there is more than fits
    between what stands before and after each; pads fill up the last row.

    Returns:
      `tokens` int32, `counted`, `absent` (the pads) bool and `segments` int32, each [P, L].
    """
    room = length - len(before) - len(after)
    rows = []
    for start in range(0, len(text), room):
        piece = text[start : start + room]
        ids = [*before, *piece, *after]
        kinds = [0] * len(before) + [1] * len(piece) + [0] * len(after)
        pads = length - len(ids)
        rows.append(([*ids, *[pad_id] * pads], [*kinds, *[2] * pads]))
    tokens_PL, kind_PL = (np.array(a, np.int32) for a in zip(*rows, strict=True))
    absent_PL = kind_PL == 2
    counted_PL, segments_PL = kind_PL == 1, absent_PL.astype(np.int32)
    return {
        "tokens": tokens_PL,
        "counted": counted_PL,
        "absent": absent_PL,
        "segments": segments_PL,
    }


def out_of_reach(rows: Batch, group_L: np.ndarray) -> np.ndarray:
    """What is given but revealed after something that is scored, bool [P, L], in a fixed order
    with groups: a model that follows it does not see that."""
    first_P1 = np.where(rows["counted"], group_L, len(group_L)).min(axis=-1, keepdims=True)
    return ~rows["counted"] & ~rows["absent"] & (group_L > first_P1)


def summarise(
    found: Trajectory,
    rows: Batch,
    pieces: Callable[[list[int]], list[str]],
    byte_lengths: np.ndarray | None,
) -> TextScore:
    """The score of the rows of `laid`.

    Args:
      found: K trajectories of each row, arrays [P, K, L].
      rows: see `laid`.
      pieces: from token ids to their texts.
      byte_lengths: UTF-8 bytes of each token id; None where ids do not tell.
    """
    cost_PK, clock_PK = (a.sum(-1, dtype=np.float64) for a in (found.cost_BL, found.clock_BL))
    together_P, error_P = importance_bound(-cost_PK.T)
    scored = rows["tokens"][rows["counted"]]
    return TextScore(
        nelbo=_mean(cost_PK + clock_PK),
        nelbo_order=_mean(cost_PK),
        importance=Nats(float(together_P.sum()), float(np.sqrt((error_P**2).sum()))),
        orders=cost_PK.shape[1],
        bytes=0 if byte_lengths is None else int(byte_lengths[scored].sum()),
        tokens=_tokens(found, rows, pieces),
    )


def _mean(nats_PK: np.ndarray) -> Nats:
    """Over the draws, summed over the rows; the error is nan for one draw."""
    count = nats_PK.shape[1]
    variance = nats_PK.var(axis=1, ddof=1).sum() if count > 1 else math.nan
    return Nats(float(nats_PK.mean(axis=1).sum()), math.sqrt(variance / count))


def _tokens(
    found: Trajectory, rows: Batch, pieces: Callable[[list[int]], list[str]]
) -> list[Token]:
    """The rows of the table; arrays of `found` are [P, K, L]."""
    counted_PL = rows["counted"]
    given_P11 = (~counted_PL).sum(axis=-1)[:, None, None]
    columns = (
        found.nll_BL,
        found.log_q_BL - found.log_p_BL,
        found.rank_BL - given_P11,
        found.entropy_BL,
    )
    means = np.stack([a.mean(axis=1, dtype=np.float64)[counted_PL] for a in columns], axis=-1)
    texts = pieces(rows["tokens"][counted_PL].tolist())
    return [
        Token(int(row), int(position), piece, *(float(mean) for mean in all_means))
        for row, position, piece, all_means in zip(
            *np.nonzero(counted_PL), texts, means, strict=True
        )
    ]


def report(found: TextScore) -> str:
    """A line for people on each bound."""
    return "\n".join(_line(name, getattr(found, name), found) for name in BOUNDS)


def _line(name: str, bound: Nats, found: TextScore) -> str:
    each = {k: v for k, v in per_token(bound, found).items() if not math.isnan(v)}
    bits = f"   {each['bits_per_byte']:.4f} bits/byte" if "bits_per_byte" in each else ""
    return (
        f"{name:<12} {bound.nats:.3f} ± {bound.error:.3f} nats   {each['nats_per_token']:.4f} "
        f"nats/token   perplexity {each['perplexity']:.2f}{bits}"
    )


def per_token(bound: Nats, found: TextScore) -> dict[str, float]:
    """The bound in other units; bits_per_byte is nan if the tokenizer loses text."""
    mean = bound.nats / len(found.tokens)
    bits = bound.nats / math.log(2) / found.bytes if found.bytes else math.nan
    return {"nats_per_token": mean, "perplexity": math.exp(mean), "bits_per_byte": bits}


def write(
    folder: pathlib.Path, found: TextScore, texts: dict[str, str], order: str
) -> tuple[pathlib.Path, ...]:
    """Write score.json, score.csv and score.png into `folder`; their paths.

    texts: `text`, `prefix` and `suffix`, as they were asked for.
    """
    facts: dict[str, Any] = dict(texts) | {"order": order, "orders": found.orders}
    for name in BOUNDS:
        bound = getattr(found, name)
        facts[name] = {"nats": bound.nats, "draw_error": bound.error, **per_token(bound, found)}
        facts[name] = {k: None if math.isnan(v) else v for k, v in facts[name].items()}
    facts["tokens"] = [token._asdict() for token in found.tokens]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerows([Token._fields, *found.tokens])
    paths = tuple(folder / f"score.{kind}" for kind in ("json", "csv", "png"))
    paths[0].write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    paths[1].write_text(table.getvalue(), encoding="utf-8")
    drawn = picture(found, order, before=texts["prefix"], after=texts["suffix"])
    drawn.savefig(paths[2], dpi=150, facecolor="white")
    return paths


def picture(found: TextScore, order: str, *, before: str = "", after: str = "") -> Figure:
    """The first lines of the text, each token coloured by what it cost; what is given is outlined.

    before, after: the prefix and the suffix.
    """
    shown = [(before, math.nan), *((t.piece, t.nats) for t in found.tokens), (after, math.nan)]
    shown = [(piece, nats) for piece, nats in shown if piece or not math.isnan(nats)]
    block = laid_out(SampleTrace([piece for piece, _ in shown], np.ones(len(shown), np.int32)))
    scale = Normalize(0, max(1e-6, *(token.nats for token in found.tokens)))
    figure, page = blank(block.inches + 1.2)
    mean = found.nelbo_order.nats / len(found.tokens)
    title = f"{order}: {len(found.tokens)} tokens, nelbo_order {mean:.2f} nats per token"
    page.text(MARGIN, 0.35, title, size=11, color=INK, parse_math=False)
    note = "coloured by surprisal when revealed" + (", given: outlined" if before or after else "")
    page.text(MARGIN, 0.58, note, size=9, color=GREY)
    axes = axes_at(figure, 0.8, block.inches)
    axes.set(xlim=(0, COLUMNS / block.size), ylim=(block.lines, 0))
    axes.axis("off")
    for position, row, column, text in block.cells:
        if row >= block.lines:
            rest = f"the remaining {len(shown) - position} are in score.csv"
            axes.text(COLUMNS / block.size, row, rest, size=9, color=GREY, ha="right", va="top")
            break
        nats = shown[position][1]
        given = math.isnan(nats)
        face, edge = ("white", GREY) if given else (PALETTE(DARKEST * scale(nats)), "none")
        box = Rectangle((column + 0.06, row + 0.08), len(text) - 0.12, 0.84, clip_on=False)
        box.set(facecolor=face, edgecolor=edge)
        axes.add_patch(box)
        axes.text(column, row + 0.68, text, size=block.size, family=MONO, parse_math=False)
    _draw_scale(figure, scale)
    return figure


def _draw_scale(figure: Figure, scale: Normalize) -> None:
    tall = figure.get_figheight()
    axes = figure.add_axes((1 - (MARGIN + 2.5) / WIDTH, 1 - 0.38 / tall, 2.5 / WIDTH, 0.12 / tall))
    shown = matplotlib.colors.ListedColormap(PALETTE(np.linspace(0, DARKEST, 256)))
    figure.colorbar(ScalarMappable(scale, shown), axes, orientation="horizontal")
    axes.tick_params(labelsize=8, color=GREY, labelcolor=INK)
    axes.set_xlabel("nats", size=8, color=INK, labelpad=1)
