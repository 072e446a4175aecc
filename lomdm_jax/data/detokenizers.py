"""From the spaced-out text of old corpora back to text as people write it.

The rules behind the published perplexities, those of kuleshov-group/mdlm, dataloader.py: in its
order, which matters, and with its slips, for another text would give other numbers. Every function
takes the text of one document and returns the new one.
"""

import re
from collections.abc import Callable

# What is replaced, a string as it is or a pattern, and what takes its place.
_Rule = tuple[str | re.Pattern[str], str]


def _tightened(signs: str) -> list[_Rule]:
    """No space before these signs where they stand between two."""
    return [(f" {sign} ", f"{sign} ") for sign in signs]


_WIKITEXT: list[_Rule] = [
    ("s '", "s'"),
    # A slip: meant for an apostrophe before a digit, it wants slashes around them, and what it
    # writes is the pattern itself.
    (re.compile("/' [0-9]/"), "/'[0-9]/"),
    *[(f" @{sign}@ ", sign) for sign in "-,."],
    *_tightened(":;.!?,"),
    *[
        (re.compile(rf"\{start}\s*([^\{end}]*?)\s*\{end}"), rf"{start}\1{end}")
        for start, end in ("()", "[]", "{}", '""', "''")
    ],
    *[(" ".join("=" * count), "=" * count) for count in (4, 3, 2)],
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
]

_PTB: list[_Rule] = [
    (" 's", "'s"),
    ("s ' ", "s' "),
    (" n't", "n't"),
    (" \n ", "\n"),
    ("\\/", "/"),
    (re.compile(" N(?= )"), " 1"),  # also of two that share a space
    ("$ 1", "$1"),
    ("# 1", "#1"),
    ("<unk>", "?"),
]

_LM1B: list[_Rule] = [
    ("http : / / ", "http://"),
    ("https : / / ", "https://"),
    (re.compile(r" '(\w+)"), r"'\1"),
    (re.compile(r" (\w+) \. "), r" \1. "),
    (re.compile(r" (\w+) \.$"), r" \1."),
    (" ? ", "? "),
    (re.compile(r" \?$"), "?"),
    (" ! ", "! "),
    (re.compile(r" !$"), "!"),
    *_tightened(",:;"),
    (" / ", "/"),
    *[
        (re.compile(rf"\{start} ([^\{start}\{end}]+) \{end}"), rf"{start}\1{end}")
        for start, end in ('""', "''", "()", "[]")
    ],
    ("$ ", "$"),
    ("£ ", "£"),
]

_LAMBADA: list[_Rule] = [("“", '"'), ("”", '"')]


def _apply(rules: list[_Rule], text: str) -> str:
    for old, new in rules:
        text = text.replace(old, new) if isinstance(old, str) else old.sub(new, text)
    return text


def none(text: str) -> str:
    """The text as it is."""
    return text


def ptb(text: str) -> str:
    """Penn Treebank: joins 's and n't to their words, writes 1 for N, the sign of a number, and ?
    for an unknown word (kuleshov-group/mdlm, dataloader.py, lines 57-68)."""
    return _apply(_PTB, text)


def wikitext(text: str) -> str:
    """WikiText: takes the @ from hyphens and numbers, and the spaces from before punctuation, from
    inside brackets and quotes and from around line ends (kuleshov-group/mdlm, dataloader.py, lines
    24-54)."""
    return _apply(_WIKITEXT, text)


def lm1b(text: str) -> str:
    """One Billion Words: takes the spaces from before punctuation, also at the end, from inside
    brackets and quotes, and from addresses and prices (kuleshov-group/mdlm, dataloader.py, lines
    71-91)."""
    return _apply(_LM1B, text)


def lambada(text: str) -> str:
    """LAMBADA: makes curly double quotes straight, takes white space from both ends, and puts a
    line end in front (kuleshov-group/mdlm, dataloader.py, lines 94-97)."""
    return "\n" + _apply(_LAMBADA, text).strip()


def scientific_papers(text: str) -> str:
    """Papers of arXiv and PubMed: the rules of WikiText, then those of One Billion Words
    (kuleshov-group/mdlm, dataloader.py, lines 100-103)."""
    return lm1b(wikitext(text))


DETOKENIZERS: dict[str, Callable[[str], str]] = {
    "none": none,
    "ptb": ptb,
    "wikitext": wikitext,
    "lm1b": lm1b,
    "lambada": lambada,
    "scientific-papers": scientific_papers,
}
