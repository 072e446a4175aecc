"""Where documents come from, and how they part into training and validation."""

import ast
import contextlib
import functools
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import lzma
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

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
            if text and len(text) > _SHORTEST_DOCSTRING and isinstance(_checked(text), str):
                yield text


# Read once: to parse the library takes seconds, and a corpus is read several times.
SOURCES: dict[str, Callable[[], list[str]]] = {"stdlib": functools.cache(stdlib_docstrings)}


class _Bad(NamedTuple):
    """A document that cannot be read, and why."""

    complaint: str


_Text = str | _Bad


def _checked(text: _Text) -> _Text:
    """The text; or why not, where it has no UTF-8 form. Bytes that are no UTF-8 are read as lone
    surrogates, and an escape in a string may spell one."""
    try:
        if isinstance(text, str):
            text.encode()
        return text
    except UnicodeEncodeError as error:
        nearby = text[max(0, error.start - 20) : error.start + 20]
        return _Bad(f"is not valid UTF-8 near {nearby!r}")


# By form of file, the units that it can be read in; the first is the one of "auto".
_UNITS: dict[str, tuple[str, ...]] = {
    ".txt": ("paragraph", "line", "file"),
    ".jsonl": ("record",),
    ".parquet": ("record",),
}
_PACKAGES = {".parquet": "pyarrow", ".zst": "zstandard"}  # by last suffix
_BATCH = 1024  # records
_CHUNK = 2**16  # characters


class Source(NamedTuple):
    """Where documents are and how to read them.

    name: "stdlib"; or the path of a file: .txt, .jsonl (.gz, .xz or .zst around them), .parquet, or
      text without a suffix; or that of a folder, whose files of these forms, other than those
      without a suffix, are read in the order of their relative paths; or
      "hf:NAME[@REVISION][:CONFIG]", a data set of the Hugging Face hub, or a folder that
      datasets.load_dataset understands. What exists as a folder is one, whatever signs are in its
      path, and has no revision. In a revision that the hub has made, refs/convert/parquet, CONFIG
      is the name of a folder (without it all folders are read), and where the split is called
      partial-SPLIT, the hub has kept its first 5 GB.
    split: of hf, as in datasets: "train", "train[:-100000]". Of others "" or a slice of documents
      (bad ones counted): "[:90]", "[90:95]", "[-5:]"; negative numbers cost another pass.
    column: of .jsonl, .parquet and hf records.
    unit: what a document is: a "paragraph" (blank lines separate them), "line" (without its end) or
      "file" of text, a "record", or "characters:N", consecutive pieces of N characters of all the
      text, the last one shorter. "auto": paragraphs of text, and records.
    streaming: hf is read over the network instead of downloaded first; it knows no slices then.
    keep_empty: documents without text count too.
    skip_bad: a document that cannot be read is skipped, given as None, instead of an error.

    Text is UTF-8. Files are read in a stream: no more than a document, or some thousand records, is
    in memory.
    """

    name: str
    split: str = ""
    column: str = "text"
    unit: str = "auto"
    streaming: bool = False
    keep_empty: bool = False
    skip_bad: bool = False

    def documents(self) -> Iterator[str | None]:
        """A fresh pass, in a fixed order; None for each bad document that was skipped.

        Raises:
            UserError: there is no such source or no document in it; a document is bad (names the
                file, and the line, from 1, or the record, from 0); or a file is cut short or
                damaged, which skip_bad does not help.
        """
        self.check("data.source")
        part = slice(None) if _hub(self.name) else _slice(self.split)
        if min(part.start or 0, part.stop or 0) < 0:
            part = slice(*part.indices(sum(1 for _ in self._all())))
        found = False
        for document in itertools.islice(self._all(), part.start, part.stop):
            found = True
            yield document
        if not found:
            where = f"{self.name}{self.split and f' with split {self.split!r}'}"
            raise UserError(f"{where} holds no documents; give a source with text in it.")

    def label(self) -> str:
        """A short name for a folder: of a file without folder and suffixes, of hf the last part."""
        hub = _hub(self.name)
        if hub:
            return Path(hub.name).name
        return self.name if self.name in SOURCES else Path(self.name).name.split(".")[0]

    def version(self) -> str:
        """What documents depend on beyond the settings, found without a network.

        The SHA-256 of a file's content, or of the names and contents in a folder, wherever it lies;
        Python's version for "stdlib"; of the hub name, revision and config as they are. So a
        revision that is no commit may change and the version does not.
        """
        hub = _hub(self.name)
        if self.name in SOURCES:
            return f"python {platform.python_version()}" if self.name == "stdlib" else ""
        if hub is None:
            return f"sha256 {_sha256(Path(self.name).expanduser(), _files(self.name))}"
        folder = Path(hub.name)
        if not folder.is_dir():
            return self.name
        files = [path for path in folder.rglob("*") if path.is_file()]
        return f"sha256 {_sha256(folder, _in_order(folder, files))} {hub.config}".rstrip()

    def check(self, key: str) -> None:
        """Checks that there is such a source, without reading it.

        Raises:
            UserError: names the config key, its value and the remedy.
        """
        hub = _hub(self.name)
        if hub:
            _check_hub(key, self)
        else:
            _slice(self.split)
        kinds = {".jsonl"} if hub or self.name in SOURCES else _check_files(key, self.name)
        for kind in kinds:
            if self.unit not in ("auto", *_UNITS[kind]) and not _piece_size(self.unit):
                raise UserError(
                    f"data.unit is {self.unit!r}; {self.name} can be read in the units auto, "
                    f"{', '.join(_UNITS[kind])} and characters:N, such as characters:1000."
                )

    def _all(self) -> Iterator[str | None]:
        for where, found in self._found():
            text = _checked(found)
            if isinstance(text, str):
                if self.keep_empty or text.strip():
                    yield text
            elif self.skip_bad:
                yield None
            else:
                raise UserError(
                    f"{where} {text.complaint}. Mend it, or skip such documents with "
                    "data.skip_bad = true."
                )

    def _found(self) -> Iterator[tuple[str, _Text]]:
        """Every document, and where it was found."""
        size = _piece_size(self.unit)
        if not size:
            return self._read()
        pieces = _pieces((text for _, text in self._read()), size)
        return _numbered("Piece", self.name, pieces)

    def _read(self) -> Iterator[tuple[str, _Text]]:
        hub = _hub(self.name)
        if hub:
            return self._read_hub(hub)
        if self.name in SOURCES:
            return _numbered("Document", self.name, SOURCES[self.name]())
        return itertools.chain.from_iterable(map(self._read_file, _files(self.name)))

    def _read_file(self, path: Path) -> Iterator[tuple[str, _Text]]:
        kind = _kind(path)
        with _told(str(path), "It must be whole, and of the form that its name says."):
            if kind == ".parquet":
                texts = _texts(_parquet_columns(path, self.column), self.column)
                yield from _numbered("Record", str(path), texts)
                return
            with _open(path) as file:
                for number, text in self._reader(kind)(file):
                    yield f"Line {number} of {path}", text

    def _reader(self, kind: str) -> Callable[[TextIO], Iterator[tuple[int, _Text]]]:
        if kind == ".jsonl":
            return lambda file: _json_lines(file, self.column)
        if _piece_size(self.unit):
            return _chunks
        return {"line": _lines, "file": _whole}.get(self.unit, _paragraphs)

    def _read_hub(self, hub: "_Hub") -> Iterator[tuple[str, _Text]]:
        with _told(f"{self.name} with split {self.split!r}", _HUB_REMEDY):
            columns = _hub_columns(hub, self)
            yield from _numbered("Record", self.name, _texts(columns, self.column))


def _numbered(noun: str, name: str, texts: Iterable[_Text]) -> Iterator[tuple[str, _Text]]:
    return ((f"{noun} {i} (the first is 0) of {name}", text) for i, text in enumerate(texts))


@contextlib.contextmanager
def _told(name: str, remedy: str) -> Iterator[None]:
    """Turns what goes wrong with a source into a message."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # gzip, lzma, zstandard, pyarrow and datasets have their own
        reason = f"{error}".rstrip(".") or type(error).__name__
        raise UserError(f"{name} cannot be read: {reason}. {remedy}") from error


def _slice(split: str) -> slice:
    """The documents of a split that is no name.

    Raises:
        UserError: it is not a slice of documents.
    """
    match = re.fullmatch(r"\[(-?\d+)?:(-?\d+)?\]", split or "[:]")
    if not match:
        raise UserError(
            f"data.split or data.valid_split is {split!r}; of files, give a slice of documents, "
            "such as '[:90]', '[90:95]' or '[-5:]', or nothing for all of them."
        )
    return slice(*(number and int(number) for number in match.groups()))


def _piece_size(unit: str) -> int:
    """N of "characters:N"; 0 of other units."""
    match = re.fullmatch(r"characters:([1-9]\d*)", unit)
    return int(match[1]) if match else 0


def _pieces(texts: Iterable[_Text], size: int) -> Iterator[_Text]:
    rest = ""
    for text in texts:
        if isinstance(text, _Bad):
            yield text
            continue
        rest += text
        end = len(rest) - len(rest) % size
        yield from (rest[i : i + size] for i in range(0, end, size))
        rest = rest[end:]
    if rest:
        yield rest


# Files


def _check_files(key: str, name: str) -> set[str]:
    """The forms of the files of a source, if it has any and they can be read here."""
    files = _files(name)
    kinds = {_kind(path) for path in files}
    if not kinds or not kinds <= _UNITS.keys() or not files[0].is_file():
        raise UserError(
            f"{key} is {name!r}; give a known source ({', '.join(sorted(SOURCES))}), "
            "hf:NAME[@REVISION][:CONFIG], or the path of a .txt, .jsonl or .parquet file or of a "
            "folder with such files; .txt and .jsonl may be compressed as .gz, .xz or .zst."
        )
    for suffix in _PACKAGES.keys() & {path.suffix for path in files}:
        _require(_PACKAGES[suffix], name)
    return kinds


def _require(package: str, name: str, install: str = "") -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{name} needs the package {package}: pip install {install or package}")


def _files(name: str) -> list[Path]:
    """A file itself; of a folder, the files of known form below it."""
    path = Path(name).expanduser()
    if not path.is_dir():
        return [path]
    found = (file for file in path.rglob("*") if file.suffix and file.is_file())
    return _in_order(path, (file for file in found if _kind(file) in _UNITS))


def _in_order(folder: Path, files: Iterable[Path]) -> list[Path]:
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def _sha256(root: Path, files: Sequence[Path]) -> str:
    """Of the content of a file; of a folder, of its files' relative names and contents."""
    digests = []
    for path in files:
        with _told(str(path), "Make it readable."), open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    if not root.is_dir():
        return digests[0]
    names = (path.relative_to(root).as_posix() for path in files)
    listing = "".join(f"{digest} {name}\n" for name, digest in zip(names, digests, strict=True))
    return hashlib.sha256(os.fsencode(listing)).hexdigest()


def _kind(path: Path) -> str:
    """The form of a file by the suffix under that of its compression, which only text has."""
    kind = Path(path.stem).suffix if path.suffix in _OPENERS else path.suffix
    return path.suffix if kind == ".parquet" else kind or ".txt"


def _open(path: Path) -> TextIO:
    """Bytes that are no UTF-8 become lone surrogates, so that their document can be told."""
    opener = _OPENERS.get(path.suffix, open)
    return io.TextIOWrapper(opener(path, "rb"), encoding="utf-8", errors="surrogateescape")


class _Zstandard(io.RawIOBase):
    """The bytes of a .zst file. The package's own reader takes its first frame for all of them, and
    one that is cut short for whole."""

    def __init__(self, path: Path) -> None:
        self._chunks, self._rest = _zstandard_chunks(path), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._rest = self._rest or memoryview(next(self._chunks, b""))
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def _zstandard_chunks(path: Path) -> Iterator[bytes]:
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)  # the largest there is
    frame = None
    with open(path, "rb") as file:
        while data := file.read(2**16):
            while data:
                frame = frame or decompressor.decompressobj()
                if text := frame.decompress(data):
                    yield text
                data = frame.unused_data
                frame = None if frame.eof else frame
    if frame:
        raise EOFError("Compressed file ended before the end of its last frame")


def _open_zstandard(path: Path, mode: str) -> io.BufferedReader:
    return io.BufferedReader(_Zstandard(path))


_OPENERS: dict[str, Callable[..., Any]] = {  # by last suffix
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}


# Readers of text: documents, and the number of the line that each starts in


def _paragraphs(file: TextIO) -> Iterator[tuple[int, _Text]]:
    numbered = enumerate(file, start=1)
    for is_blank, found in itertools.groupby(numbered, key=lambda line: not line[1].strip()):
        if not is_blank:
            numbers, lines = zip(*found, strict=True)
            yield numbers[0], "".join(lines).rstrip("\n")


def _lines(file: TextIO) -> Iterator[tuple[int, _Text]]:
    return ((number, line.rstrip("\n")) for number, line in enumerate(file, start=1))


def _whole(file: TextIO) -> Iterator[tuple[int, _Text]]:
    yield 1, file.read()


def _chunks(file: TextIO) -> Iterator[tuple[int, _Text]]:
    """All the text, at no particular line."""
    return ((1, text) for text in iter(lambda: file.read(_CHUNK), ""))


def _json_lines(file: TextIO, column: str) -> Iterator[tuple[int, _Text]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, _json_text(line, column)


def _json_text(line: str, column: str) -> _Text:
    try:
        text = json.loads(line)[column]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if isinstance(text, str):
        return text if _checked(line) == line else _checked(line)
    return _Bad(f'must be a JSON object such as {{"{column}": "..."}}, but it is {line[:60]!r}')


# Readers of records: batches of the column, as pyarrow arrays


def _parquet_columns(path: Path, column: str) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        _check_column(column, file.schema_arrow.names, str(path))
        for batch in file.iter_batches(_BATCH, columns=[column]):
            yield batch.column(0)


def _check_column(column: str, columns: Sequence[str], name: str) -> None:
    if column not in columns:
        known = ", ".join(columns)
        raise UserError(f"data.column is {column!r}, but the columns of {name} are: {known}.")


def _texts(columns: Iterable[Any], column: str) -> Iterator[_Text]:
    return (_text(value, column) for values in columns for value in values)


def _text(value: Any, column: str) -> _Text:
    """The text of a pyarrow scalar."""
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        return _Bad(f"is not valid UTF-8: {error}")
    if isinstance(text, str):
        return text
    return _Bad(f"must hold a string in column {column!r}, but it is {text!r:.60}")


# Data sets of the Hugging Face hub


class _Hub(NamedTuple):
    name: str
    revision: str = ""
    config: str = ""


_HUB_REMEDY = (
    "Check the name, revision, config and split. Of a data set that is a loading script, which "
    "datasets no longer runs, the hub may have a copy in revision @refs/convert/parquet, or there "
    "is a mirror (lomdm_jax/data/presets.py names some). Without a network, download its files "
    "elsewhere and give their folder."
)


def _hub(name: str) -> _Hub | None:
    """The parts of "hf:NAME[@REVISION][:CONFIG]"; None of a source that is not of this form."""
    if not name.startswith("hf:"):
        return None
    rest = name.removeprefix("hf:")
    folder, _, config = rest.rpartition(":")
    if os.path.isdir(rest):
        return _Hub(rest)
    if os.path.isdir(folder):
        return _Hub(folder, config=config)
    rest, _, config = rest.partition(":")
    rest, _, revision = rest.partition("@")
    return _Hub(rest, revision, config)


def _check_hub(key: str, source: Source) -> None:
    hub = _hub(source.name)
    assert hub is not None
    if not os.path.isdir(hub.name) and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", hub.name):
        raise UserError(
            f"{key} is {source.name!r}; give hf:NAME[@REVISION][:CONFIG], with a name as on the "
            "hub, such as hf:Salesforce/wikitext:wikitext-103-raw-v1, or a folder that exists."
        )
    if not source.split or (source.streaming and "[" in source.split):
        raise UserError(
            f"{key} is {source.name!r}, with data.split or data.valid_split = {source.split!r}; "
            "name a split of it, such as 'train', or, unless data.streaming, a slice of one, such "
            "as 'train[:-1000]'."
        )
    _require("datasets", source.name, '"datasets>=4"')


def _hub_columns(hub: _Hub, source: Source) -> Iterator[Any]:
    import datasets

    is_made_by_hub = hub.revision.startswith("refs/convert/")
    data: Any = datasets.load_dataset(
        hub.name,
        **{"data_dir" if is_made_by_hub else "name": hub.config or None},
        split=source.split,
        revision=hub.revision or None,
        streaming=source.streaming,
    )
    _check_column(source.column, data.column_names or [source.column], source.name)
    for table in data.select_columns([source.column]).with_format("arrow").iter(_BATCH):
        yield table.column(0)


# Training and validation


def check_share(valid_share: float) -> None:
    """Checks the expected share of validation documents.

    Raises:
        UserError: it is not strictly between 0 and 1.
    """
    if not 0.0 < valid_share < 1.0:
        raise UserError(
            f"data.valid_share is {valid_share}; give a share strictly between 0 and 1, "
            "such as 0.05."
        )


def is_valid(text: str, valid_share: float) -> bool:
    """Whether a document is for validation, with an expected share of 0 to 1 of all documents.

    Its side depends on the SHA-256 of its text alone, so it keeps its side whatever other documents
    come or go, and equal texts always fall together.
    """
    digest = hashlib.sha256(text.encode()).digest()
    share = int.from_bytes(digest[:6], "big") / 2**48  # 48 bits: exact in a float, never 1.0
    return share < valid_share
