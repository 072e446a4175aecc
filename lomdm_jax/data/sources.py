"""Where documents come from, and how they part into training and validation."""

import ast
import gzip
import hashlib
import itertools
import json
import lzma
import os
import platform
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

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


_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}  # by last suffix


def read_documents(source: str) -> list[str]:
    """Returns the documents of a source, in order, without empty ones.

    Args:
        source: a key of SOURCES, or the path of a file: .txt, whose documents are separated by
            blank lines, or .jsonl, with a document in the field `text` of each line; UTF-8, also
            compressed as .gz or .xz.

    Raises:
        UserError: no source has this name, or the file cannot be read as what it claims to be.
    """
    check_source("data.source", source)
    if source in SOURCES:
        return SOURCES[source]()
    try:
        with _open(Path(source)) as file:
            documents = (
                _json_lines(source, file) if _kind(source) == ".jsonl" else _paragraphs(file)
            )
            found = [text for text in documents if text.strip()]
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(
            f"{source} cannot be read: {error}. It must be UTF-8 text, whole and compressed as its "
            "name says."
        ) from error
    if not found:
        raise UserError(f"{source} holds no documents; give a file with text in it.")
    return found


def check_source(key: str, source: str) -> None:
    """Raises the UserError of a `source` that is no name and no file of a known form."""
    if source in SOURCES:
        return
    if not Path(source).is_file() or _kind(source) not in (".txt", ".jsonl"):
        raise UserError(
            f"{key} is {source!r}; give a known source ({', '.join(sorted(SOURCES))}) or the path "
            "of a .txt or .jsonl file, which may be compressed as .gz or .xz."
        )


def _kind(source: str) -> str:
    """The suffix of a file's name, without that of its compression."""
    suffixes = [suffix for suffix in Path(source).suffixes if suffix not in _OPENERS]
    return suffixes[-1] if suffixes else ""


def _open(path: Path) -> TextIO:
    opener = _OPENERS.get(path.suffix, open)
    return opener(path, "rt", encoding="utf-8")


def _paragraphs(file: TextIO) -> Iterator[str]:
    for is_blank, lines in itertools.groupby(file, key=lambda line: not line.strip()):
        if not is_blank:
            yield "".join(lines).rstrip("\n")


def _json_lines(source: str, file: TextIO) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            if not isinstance(text, str) or not _is_unicode_text(text):
                raise ValueError("no text")
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f'Line {number} of {source} must be a JSON object such as {{"text": "..."}}, but '
                f"it is {line[:60]!r}."
            ) from None
        yield text


def source_name(source: str) -> str:
    """Returns the name of a source, or of its file without folder and suffixes."""
    return source if source in SOURCES else Path(source).name.split(".")[0]


def corpus_version(source: str) -> str:
    """Returns what a source's documents depend on beyond its name: for a file, its content."""
    if source in SOURCES:
        return f"python {platform.python_version()}" if source == "stdlib" else ""
    with open(source, "rb") as file:
        return f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"


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
