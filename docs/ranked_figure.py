"""Draws docs/ranked.png: who sees whom on the ranked layout, and generation with its cache.

python docs/ranked_figure.py

Both halves are computed by `lomdm_jax.models.visibility`: attention that cannot tell keys apart
(zero queries and keys) spreads evenly over what is seen, and one-hot values show where it went.
"""

import pathlib
import sys

import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.patches import Patch, Rectangle

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from lomdm_jax.models.visibility import Cached, Memory, ranked  # noqa: E402

TOKENS = ["she", "fed", "the", "old", "cat"]
RANK = np.array([2, 1, 3, 4, 0])  # "cat" is revealed first, then "fed", "she", "the", "old"
LENGTH = len(TOKENS)
# Okabe and Ito's palette, told apart by the colour-blind; light where text stands on it.
ITSELF, BY_QUERY, BY_CONTENT, NOTHING = "#E69F00", "#0072B2", "#8FC7E8", "#F4F4F4"
WRITTEN, EDGE, QUIET = "#D6EAF6", "#FFFFFF", "#666666"
TOP = -1.9  # where the headings stand, in cells above the first row


def heads(rows: int, width: int, one_hot: int = -1) -> jnp.ndarray:
    """[1, rows, 1, width]: zeros, or ones in the columns from `one_hot` on, one for each row."""
    values = np.zeros((1, rows, 1, width), np.float32)
    if one_hot >= 0:
        values[0, np.arange(rows), 0, one_hot + np.arange(rows)] = 1
    return jnp.asarray(values)


def who_sees_whom() -> np.ndarray:
    """bool [2 L, 2 L], queries before contents both ways."""
    both = 2 * LENGTH
    blind, values = heads(both, both), heads(both, both, one_hot=0)
    mixed, _ = ranked(jnp.asarray(RANK)[None]).attend(blind, blind, values)
    return np.asarray(mixed[0, :, 0]) > 0


def slots_seen(rank: int) -> np.ndarray:
    """Which slots of the cache the query of this rank sees, bool [L]."""
    width = LENGTH + 1  # the last column is the query's own
    view = Cached(*jnp.zeros((2, 1, 1), jnp.int32), jnp.full((1, 1), rank), jnp.arange(LENGTH))
    memory = Memory(heads(LENGTH, width), heads(LENGTH, width, one_hot=0))
    blind, value = heads(1, width), heads(1, width, one_hot=LENGTH)
    return np.asarray(view.attend(blind, blind, value, memory)[0])[0, 0, 0, :LENGTH] > 0


def cell(ax, x, y, fill, text="", width=1.0, **style) -> None:
    ax.add_patch(Rectangle((x, y), width, 1, facecolor=fill, edgecolor=EDGE, linewidth=2))
    ax.text(x + width / 2, y + 0.52, text, ha="center", va="center", **style)


def legend(ax, title: str, handles: list[Patch], x: float) -> None:
    ax.legend(
        handles=handles,
        title=title,
        alignment="left",
        loc="upper left",
        bbox_to_anchor=(x, 0.0),
        frameon=False,
    )


def draw_attention(ax) -> None:
    sees, gap = who_sees_whom(), 0.35
    place = np.arange(2 * LENGTH) + gap * (np.arange(2 * LENGTH) >= LENGTH)
    for row, y in enumerate(place):
        for column, x in enumerate(place):
            seen_by = BY_CONTENT if row >= LENGTH else ITSELF if row == column else BY_QUERY
            cell(ax, x, y, seen_by if sees[row, column] else NOTHING)
    for index, at in enumerate(place + 0.5):
        i, rank = index % LENGTH, str(RANK[index % LENGTH])
        name, token = f"${'qc'[index // LENGTH]}_{i}$", TOKENS[i] if index >= LENGTH else "?"
        ax.text(-0.4, at, rank, ha="center", va="center", color=QUIET)
        ax.text(-0.85, at, token, ha="right", va="center")
        ax.text(-2.15, at, name, ha="right", va="center")
        ax.text(at, -0.4, rank, ha="center", va="center", color=QUIET)
        ax.text(at, -1.1, name, ha="center", va="center")
    ax.text(-0.75, -0.4, "rank", ha="right", va="center", color=QUIET)
    for start, name in ((0, "queries"), (LENGTH + gap, "contents")):
        middle = start + LENGTH / 2
        ax.text(-3.5, middle, name, ha="center", va="center", rotation=90, weight="bold")
        ax.text(middle, TOP, name, ha="center", va="bottom", weight="bold")
    colors = {
        "query: itself (queries of its rank)": ITSELF,
        "query: contents of lower rank": BY_QUERY,
        "content: contents up to its own rank": BY_CONTENT,
    }
    handles = [Patch(color=color, label=label) for label, color in colors.items()]
    legend(ax, "a row sees the coloured columns", handles, 0.2)
    ax.set_xlim(-3.9, place[-1] + 1.1)
    ax.set_ylim(place[-1] + 1, TOP - 0.6)


def draw_generation(ax) -> None:
    order, wide, step = np.argsort(RANK), 1.3, (2 * LENGTH - 0.65) / (LENGTH - 1)
    cache = (LENGTH + 1.2) * wide
    for start, name, unit in ((0.0, "text", "position"), (cache, "cache", "slot")):
        ax.text(start + LENGTH * wide / 2, TOP, name, ha="center", va="bottom", weight="bold")
        ax.text(start - 0.25, -0.4, unit, ha="right", va="center", color=QUIET)
        for k in range(LENGTH):
            ax.text(start + (k + 0.5) * wide, -0.4, str(k), ha="center", va="center", color=QUIET)
    for k, asked in enumerate(order):
        y, seen = k * step, slots_seen(k)
        ax.text(-0.25, y + 0.52, f"call {k + 1}", ha="right", va="center")
        for i, token in enumerate(TOKENS):
            known = RANK[i] < k
            fill = ITSELF if i == asked else WRITTEN if known else NOTHING
            cell(ax, i * wide, y, fill, "?" if i == asked else token if known else "", wide)
        for slot in range(LENGTH):
            fill, token = BY_QUERY if seen[slot] else NOTHING, TOKENS[order[slot]]
            color = "white" if seen[slot] else "black"
            text = token if slot <= k else ""
            cell(ax, cache + slot * wide, y, fill, text, wide, color=color)
        corner = (cache + k * wide + 0.07, y + 0.07)
        ax.add_patch(Rectangle(corner, wide - 0.14, 0.86, fill=False, linewidth=1.4))
    handles = [
        Patch(color=ITSELF, label="the position that is asked"),
        Patch(color=BY_QUERY, label="slots that its query sees"),
        Patch(facecolor=NOTHING, edgecolor="black", label="the slot that its token is written to"),
    ]
    legend(ax, "a call asks one query, then reads one content", handles, 0.12)
    ax.set_xlim(-2.2, cache + LENGTH * wide + 0.1)
    ax.set_ylim(2 * LENGTH + 0.35, TOP - 0.6)


def main() -> None:
    plt.rcParams.update({"font.size": 11.5, "font.family": "DejaVu Sans"})
    # In cells, so that both halves have the same scale.
    shape = {"width_ratios": [14.35, 16.86], "wspace": 0.06}
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 6.3), gridspec_kw=shape)
    for ax, draw, title in (
        (left, draw_attention, "One training pass: who sees whom"),
        (right, draw_generation, "Generation, one reveal per call"),
    ):
        draw(ax)
        ax.set_title(title, fontsize=13.5, pad=10)
        ax.set_aspect("equal", anchor="N")
        ax.axis("off")
    figure.savefig(ROOT / "docs" / "ranked.png", dpi=160, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    main()
