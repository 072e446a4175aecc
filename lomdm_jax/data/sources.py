"""Where documents come from, and how they part into training and validation."""

import ast
import hashlib
import os
import platform
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lomdm_jax.errors import UserError

# Not the library itself: other people's packages, test suites, and two bundled programs.
_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "idlelib",
        "lib2to3",
        "site-packages",
        "test",
        "tests",
    }
)
# Shorter docstrings ("Return the name.") are near copies of one another and teach little.
_SHORTEST_DOCSTRING = 40  # characters; a docstring must be longer
# A full standard library has thousands; fewer than this means its sources are not installed.
_FEWEST_DOCSTRINGS = 100


def stdlib_docstrings() -> list[str]:
    """Returns the docstrings of the running Python's standard library.

    Docstrings of modules, classes and functions, in a fixed order (files sorted by path), longer
    than 40 characters, exact duplicates dropped. About 6,000 documents, 1.6 MB; some seconds.

    Raises:
        UserError: the library's .py sources are not on this machine.
    """
    library = Path(sysconfig.get_path("stdlib"))
    found: dict[str, None] = {}  # a dict keeps the first of equal docstrings, in order
    for path in _python_files(library):
        found.update(dict.fromkeys(_docstrings(path)))
    if len(found) < _FEWEST_DOCSTRINGS:
        raise UserError(
            f"data.source 'stdlib' found only {len(found)} docstrings under {library}, fewer than "
            f"{_FEWEST_DOCSTRINGS}: this Python carries no .py sources of its standard library. "
            "Use a Python that has them (any from python.org, pyenv, uv or conda)."
        )
    return list(found)


def _python_files(library: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(library):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old files hold escapes that newer parsers warn about
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) > _SHORTEST_DOCSTRING and _is_unicode_text(text):
                yield text


def _is_unicode_text(text: str) -> bool:
    """Lone surrogates, writable as escapes in a Python string, have no UTF-8 form."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


SOURCES: dict[str, Callable[[], list[str]]] = {"stdlib": stdlib_docstrings}


def read_documents(source: str) -> list[str]:
    """Returns the documents of the named source (a key of SOURCES).

    Raises:
        UserError: no source has this name.
    """
    if source not in SOURCES:
        raise UserError(f"data.source is {source!r}; known sources: {', '.join(sorted(SOURCES))}.")
    return SOURCES[source]()


def corpus_version(source: str) -> str:
    """Returns what a source's documents depend on beyond its name; "" where nothing does."""
    return f"python {platform.python_version()}" if source == "stdlib" else ""


def split_documents(documents: Sequence[str], valid_share: float) -> tuple[list[str], list[str]]:
    """Parts documents into (train, valid), each in the given order.

    A document's side depends on the SHA-256 of its text alone, so it keeps its side whatever other
    documents come or go, and equal texts always fall together.

    Args:
        documents: the texts.
        valid_share: expected share of validation documents, strictly between 0 and 1.

    Raises:
        UserError: valid_share is out of range.
    """
    if not 0.0 < valid_share < 1.0:
        raise UserError(
            f"data.valid_share is {valid_share}; give a share strictly between 0 and 1, "
            "such as 0.05."
        )
    train: list[str] = []
    valid: list[str] = []
    for document in documents:
        (valid if _hash_share(document) < valid_share else train).append(document)
    return train, valid


def _hash_share(document: str) -> float:
    """Maps a text to a number in [0, 1), uniform over texts."""
    digest = hashlib.sha256(document.encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48  # 48 bits: exact in a float, never 1.0
