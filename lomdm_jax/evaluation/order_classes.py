"""Kinds of tokens: by what they show, and by how often they occur in the texts at hand."""

from collections.abc import Callable

import numpy as np

KINDS = ("word start", "inside a word", "number", "punctuation", "white space", "end of text")
# Each holds about a fifth of all tokens, not of the vocabulary, so that all are equally well known.
BANDS = ("rarest fifth", "rare fifth", "middle fifth", "frequent fifth", "most frequent fifth")
# A token is of one kind and in one band; "capitalised" cuts across both.
CLASSES = (*KINDS, "capitalised", *BANDS)


def classes(
    tokens_NL: np.ndarray, counted_NL: np.ndarray, pieces: Callable[[list[int]], list[str]]
) -> dict[str, np.ndarray]:
    """Which counted tokens belong to each of CLASSES, bool [N, L].

    tokens_NL: int ids. counted_NL: bool; frequencies are those of the counted tokens. pieces: from
    token ids to their texts.
    """
    ids_V, place_NL = np.unique(tokens_NL, return_inverse=True)
    place_NL = place_NL.reshape(tokens_NL.shape)
    shown = pieces(ids_V.tolist())
    kind_V = np.array([token_kind(piece) for piece in shown])
    band_V = bands(np.bincount(place_NL[counted_NL], minlength=len(ids_V)))
    members = {name: kind_V == name for name in KINDS}
    members["capitalised"] = np.array([piece.lstrip()[:1].isupper() for piece in shown])
    members |= {name: band_V == number for number, name in enumerate(BANDS)}
    return {name: member_V[place_NL] & counted_NL for name, member_V in members.items()}


def token_kind(piece: str) -> str:
    """One of KINDS, by the first character that is not white space."""
    text = piece.lstrip()
    if piece == "⏎":  # how tokenizers show the end of a text
        return "end of text"
    if not text:
        return "white space"
    if text[0].isalpha():
        return "inside a word" if text == piece else "word start"
    return "number" if text[0].isdigit() else "punctuation"


def bands(count_V: np.ndarray) -> np.ndarray:
    """The band of each id, int [V], 0 the rarest, from how often it occurs, int [V].

    Ids that occur equally often share a band: the one that holds the middle of all their tokens,
    these being sorted by frequency.
    """
    _, which_V = np.unique(count_V, return_inverse=True)
    tokens = np.bincount(which_V, weights=count_V)
    middle = (np.cumsum(tokens) - tokens / 2) / max(tokens.sum(), 1)
    return np.minimum(len(BANDS) * middle, len(BANDS) - 1).astype(int)[which_V]
