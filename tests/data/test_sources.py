"""Documents: where they come from and which side each falls on."""

import contextlib
import gzip
import hashlib
import itertools
import json
import lzma
import platform
import tracemalloc

import pytest

from lomdm_jax.data import sources
from lomdm_jax.data.sources import Source, check_share, is_valid
from lomdm_jax.errors import UserError


def read(name, **settings):
    return list(Source(str(name), **settings).documents())


def until_error(name, **settings):
    """The documents before the error, and its message."""
    found = []
    with pytest.raises(UserError) as error:
        for document in Source(str(name), **settings).documents():
            found.append(document)
    return found, str(error.value)


# The standard library


def test_stdlib_docstrings_are_many_long_enough_and_distinct(library, monkeypatch):
    assert len(library) > 4000
    assert min(map(len, library)) > 40
    assert len(set(library)) == len(library)
    assert any(text.startswith("JSON (JavaScript Object Notation)") for text in library)
    monkeypatch.setitem(sources.SOURCES, "stdlib", lambda: library)  # reading takes seconds
    assert library == read("stdlib")


def test_only_the_library_itself_is_walked(tmp_path, monkeypatch):
    def write(path, text):
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'def f():\n    """{text}"""\n')

    write(tmp_path / "kept.py", "kept " * 20)
    write(tmp_path / "b" / "c.py", "deeper " * 20)
    write(tmp_path / "a.py", "sooner " * 20)
    write(tmp_path / "test" / "a.py", "skipped " * 20)
    write(tmp_path / "site-packages" / "b.py", "skipped " * 20)
    write(tmp_path / "twin.py", "kept " * 20)
    write(tmp_path / "short.py", "x" * 40)
    write(tmp_path / "surrogate.py", "\\ud800" + "x" * 60)
    (tmp_path / "broken.py").write_text("def f(:\n")
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(sources, "_FEWEST_DOCSTRINGS", 1)
    expected = [f"{word} " * 20 for word in ("sooner", "kept", "deeper")]
    assert sources.stdlib_docstrings() == expected


def test_a_library_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"found only 0 docstrings under .* no .py sources"):
        sources.stdlib_docstrings()


# Files


def open_zst(path, mode, **options):
    return pytest.importorskip("zstandard").open(path, mode, **options)


TEXTS = ["first\nline", "second é"]
JSON_LINES = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in TEXTS)
OPENERS = {"": open, ".gz": gzip.open, ".xz": lzma.open, ".zst": open_zst}


@pytest.mark.parametrize("compression", OPENERS)
@pytest.mark.parametrize(
    ("kind", "content"), [(".txt", "\n\n".join([*TEXTS, ""])), (".jsonl", JSON_LINES)]
)
def test_files_of_every_form_hold_their_documents(tmp_path, kind, content, compression):
    path = tmp_path / f"my.novels{kind}{compression}"
    with OPENERS[compression](path, "wt", encoding="utf-8") as file:
        file.write(content)
    assert read(path) == TEXTS
    assert Source(str(path)).label() == "my"


def test_a_pass_starts_afresh_each_time(tmp_path):
    (tmp_path / "a.txt").write_text("a\n\nb\n\nc")
    source = Source(str(tmp_path / "a.txt"))
    assert next(source.documents()) == "a"
    assert list(source.documents()) == list(source.documents()) == ["a", "b", "c"]


TEXT = " \n\n  a\r\nb \n \t\n\nc\u2028d\n\n"


@pytest.mark.parametrize(
    ("unit", "keep_empty", "expected"),
    [
        ("auto", False, ["  a\nb ", "c\u2028d"]),
        ("paragraph", True, ["  a\nb ", "c\u2028d"]),
        ("line", False, ["  a", "b ", "c\u2028d"]),
        ("line", True, [" ", "", "  a", "b ", " \t", "", "c\u2028d", ""]),
        ("file", False, [TEXT.replace("\r", "")]),
        ("characters:8", False, [" \n\n  a\nb", " \n \t\n\nc\u2028", "d\n\n"]),
        ("characters:3", False, ["  a", "\nb ", "\n\nc", "\u2028d\n"]),
        ("characters:3", True, [" \n\n", "  a", "\nb ", "\n \t", "\n\nc", "\u2028d\n", "\n"]),
    ],
)
def test_a_text_is_read_in_every_unit(tmp_path, unit, keep_empty, expected):
    (tmp_path / "a.txt").write_text(TEXT, newline="")
    assert read(tmp_path / "a.txt", unit=unit, keep_empty=keep_empty) == expected


def test_pieces_go_on_over_files_and_records(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("abcdefg")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("abcd")
    (tmp_path / "folder" / "b.jsonl").write_text('{"text": "e"}\n{"text": ""}\n{"text": "fg"}')
    for chunk in (1, 2, 100):
        monkeypatch.setattr(sources, "_CHUNK", chunk)
        for name in ("a", "folder"):
            assert read(tmp_path / name, unit="characters:3") == ["abc", "def", "g"]


def test_a_record_without_text_counts_if_asked(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"t": ""}\n\n{"t": "a"}\n{"t": " "}\n')
    assert read(tmp_path / "a.jsonl", column="t") == ["a"]
    assert read(tmp_path / "a.jsonl", column="t", keep_empty=True) == ["", "a", " "]


def write_parquet(path, texts, column="text", **options):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    binary = [text.encode() if isinstance(text, str) else text for text in texts]
    strings = arrow.array(binary, arrow.binary()).view(arrow.string())  # as they are
    numbers = arrow.array(range(len(texts)))
    parquet.write_table(arrow.table({"n": numbers, column: strings}), path, **options)


def test_parquet_is_read_in_order_over_row_groups(tmp_path):
    texts = [f"text {i}" for i in range(1500)]
    write_parquet(tmp_path / "a.parquet", texts, row_group_size=700)
    assert read(tmp_path / "a.parquet") == texts


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["a"], column="article")
    message = r"data.column is 'text', but the columns of .*a.parquet are: n, article\."
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.parquet", skip_bad=True)
    with pytest.raises(UserError, match=r"Record 0 .*a.parquet must hold a string .* it is 0"):
        read(tmp_path / "a.parquet", column="n")


def test_a_folder_is_its_files_of_known_form_by_relative_path(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "a-b.txt", "c.md", "README", "a/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    with gzip.open(tmp_path / "a" / "y.jsonl.gz", "wt") as file:
        file.write('{"text": "a/y.jsonl.gz"}')
    expected = ["a-b.txt", "a/b/c.txt", "a/y.jsonl.gz", "a/z.txt", "b.txt"]
    assert read(tmp_path) == expected
    assert Source(str(tmp_path)).label() == tmp_path.name


def test_text_is_not_kept_in_memory(tmp_path):
    with open(tmp_path / "a.txt", "w") as file:
        for i in range(4000):
            file.write(f"{i} " + "word " * 400 + "\n\n")
    size = (tmp_path / "a.txt").stat().st_size
    for unit in ("paragraph", "line", "characters:5000"):
        tracemalloc.start()
        assert sum(map(len, Source(str(tmp_path / "a.txt"), unit=unit).documents())) > 0.9 * size
        assert tracemalloc.get_traced_memory()[1] < size / 2, unit
        tracemalloc.stop()


@pytest.mark.parametrize(
    "split", ["", "[:]", "[:2]", "[1:3]", "[3:]", "[-2:]", "[:-1]", "[-3:-1]", "[1:-1]", "[-9:9]"]
)
def test_a_split_is_a_slice_of_documents(tmp_path, split):
    documents = list("abcde")
    (tmp_path / "a.txt").write_text("\n\n".join(documents))
    expected = eval(f"documents{split or '[:]'}")
    assert read(tmp_path / "a.txt", split=split) == expected


def test_a_slice_counts_the_documents_that_are_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\nbad\n{"text": "b"}\n')
    path = tmp_path / "a.jsonl"
    parts = [read(path, split=split, skip_bad=True) for split in ("[:2]", "[2:]", "[-2:]")]
    assert parts == [["a", None], ["b"], [None, "b"]]


@pytest.mark.parametrize("split", ["train", "[:10%]", "[::2]", "[1]", "[-:]", "[:90"])
def test_a_split_that_is_no_slice_is_refused(tmp_path, split):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match=r"data.split or data.valid_split is .* '\[:90\]'"):
        Source(str(tmp_path / "a.txt"), split=split).check("data.source")


@pytest.mark.parametrize(("content", "split"), [("\n \n", ""), ("a\n\nb", "[2:]")])
def test_no_documents_are_an_error(tmp_path, content, split):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(UserError, match=r"a.txt.* holds no documents"):
        read(tmp_path / "a.txt", split=split)


# Bad data

BAD = [
    ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n{"text": "c"}', "auto", 'Line 2 .* be .* {"text"'),
    ("a.jsonl", b'{"text": "a"}\n\n["b"]\n{"text": "c"}', "auto", r"Line 3 .* '\[\"b\"\]"),
    ("a.jsonl", b'{"text": "a"}\n{"text": 1}\n{"text": "c"}', "auto", "Line 2 .* must be "),
    ("a.jsonl", b'{"text": "a"}\n{"text": "b\n{"text": "c"}', "auto", "Line 2 .* must be "),
    ("a.jsonl", b'{"text": "a"}\n' + b"[" * 9**6 + b'\n{"text": "c"}', "auto", "Line 2 .* '\\["),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n{"text": "c"}', "auto", "Line 2 .* UTF-8"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "b\xff"}\n{"text": "c"}', "auto", "Line 2 .* UTF-8"),
    ("a.jsonl", b'{"text": "a"}\n{"b\xff": 1, "text": ""}\n{"text": "c"}', "auto", "Line 2 .* UTF"),
    ("a.txt", b"a\n\nb\nb\xe9b\n\nc", "paragraph", r"Line 3 .* UTF-8 near 'b\\nb\\udce9"),
    ("a.txt", b"a\nb\xed\xa0\x80\nc", "line", "Line 2 .*a.txt is not valid UTF-8"),
    ("a.txt", b"a\xffc", "characters:1", r"Piece 1 \(the first is 0\) .* UTF-8"),
    ("folder/b.txt", b"\xff", "file", "Line 1 .*b.txt is not valid UTF-8"),
]


@pytest.mark.parametrize(("name", "content", "unit", "message"), BAD)
def test_a_bad_document_is_told_or_skipped_and_never_lost(tmp_path, name, content, unit, message):
    path = tmp_path / name
    if name.startswith("folder"):
        path.parent.mkdir()
        path.with_name("a.txt").write_text("a")
        path.with_name("c.txt").write_text("c")
        path, file = path.parent, path
        file.write_bytes(content)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message + ".*data.skip_bad = true"):
        read(path, unit=unit)
    assert read(path, unit=unit, skip_bad=True) == ["a", None, "c"]


def test_a_bad_record_of_parquet_is_told_or_skipped(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["a", None, b"\xff", "", "b"])
    with pytest.raises(UserError, match=r"Record 1 \(the first is 0\) of .*a.parquet must hold a"):
        read(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"Piece 1 .* must hold a string .* it is None"):
        read(tmp_path / "a.parquet", unit="characters:1")
    assert read(tmp_path / "a.parquet", skip_bad=True) == ["a", None, None, "b"]


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kept", [-20, 20])
def test_a_file_cut_short_is_an_error_always(tmp_path, compression, kept):
    path = tmp_path / f"a.txt{compression}"
    with OPENERS[compression](path, "wt") as file:
        for i in range(4000):
            file.write(f"{hashlib.sha256(str(i).encode()).hexdigest()}\n\n")
    path.write_bytes(path.read_bytes()[:kept])
    found, message = until_error(path, skip_bad=True)
    assert f"{path} cannot be read: Compressed file ended before" in message
    assert None not in found and (len(found) > 1000) == (kept < 0)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.xz", "a.txt.zst", "a.parquet"])
def test_a_file_of_another_form_than_its_name_is_refused(tmp_path, name):
    pytest.importorskip("zstandard")
    pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(b"no archive, no table")
    with pytest.raises(UserError, match=f"{name} cannot be read: .* its name says"):
        read(tmp_path / name, skip_bad=True)


def test_zstandard_files_may_have_many_frames(tmp_path):
    compress = pytest.importorskip("zstandard").ZstdCompressor().compress
    frames = [compress(f"{i}\n\n".encode() * 9000) for i in range(3)]
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip"
    (tmp_path / "a.txt.zst").write_bytes(skippable + b"".join(frames) + skippable)
    expected = [str(i) for i in range(3) for _ in range(9000)]
    assert read(tmp_path / "a.txt.zst") == expected
    (tmp_path / "a.txt.zst").write_bytes(b"".join(frames)[:-1])
    assert len(until_error(tmp_path / "a.txt.zst")[0]) >= 18000


# What is refused before anything is read


@pytest.mark.parametrize("name", ["wiki", "a.csv", "folder", "a.parquet.gz", "a.txt.bz2", ""])
def test_what_is_no_source_lists_what_is(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for file in ("a.csv", "a.parquet.gz", "a.txt.bz2"):
        (tmp_path / file).write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.csv").write_text("x")
    name = name or str(tmp_path / "folder" / "deeper")
    message = rf"data.valid_source is '{name}'; give a known source \(.*stdlib.*\.txt, \.jsonl or"
    with pytest.raises(UserError, match=message):
        Source(name).check("data.valid_source")
    with pytest.raises(UserError, match=r"data.source is .*; give a known source"):
        read(name)


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("a.txt", "record"),
        ("a.txt", "characters:0"),
        ("a.txt", "characters"),
        ("a.txt", "word"),
        ("a.jsonl", "paragraph"),
        ("tiny", "line"),
    ],
)
def test_a_unit_that_the_form_has_not_is_refused(tmp_path, monkeypatch, name, unit):
    monkeypatch.chdir(tmp_path)
    for file in ("a.txt", "a.jsonl"):
        (tmp_path / file).write_text("x")
    message = rf"data.unit is '{unit}'; {name} can be read in the units auto, .* characters:N"
    with pytest.raises(UserError, match=message):
        Source(name, unit=unit).check("data.source")


@pytest.mark.parametrize(
    ("name", "package", "install"),
    [
        ("a.txt.zst", "zstandard", "zstandard"),
        ("a.parquet", "pyarrow", "pyarrow"),
        ("hf:a/b", "datasets", '"datasets>=4"'),
    ],
)
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, name, package, install):
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(OSError):
        (tmp_path / name).write_text("x")
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    message = f"{name} needs the package {package}: pip install {install}"
    with pytest.raises(UserError, match=message):
        Source(name, split="train" if name == "hf:a/b" else "").check("data.source")


# What documents depend on


def test_the_version_of_files_is_their_content_wherever_they_lie(tmp_path):
    def version(name):
        return Source(str(tmp_path / name)).version()

    for folder in ("a", "b"):
        (tmp_path / folder / "c").mkdir(parents=True)
        (tmp_path / folder / "c" / "x.txt").write_text("x")
        (tmp_path / folder / "y.txt").write_text("y")
    assert version("a/y.txt") == f"sha256 {hashlib.sha256(b'y').hexdigest()}"
    versions = [version("a")]
    assert version("b") == versions[0]
    (tmp_path / "a" / "z.md").write_text("not read")
    assert version("a") == versions[0]
    (tmp_path / "a" / "y.txt").write_text("z")
    versions.append(version("a"))
    (tmp_path / "a" / "y.txt").rename(tmp_path / "a" / "z.txt")
    versions.append(version("a"))
    assert len(set(versions)) == 3


def test_the_versions_of_other_sources(tmp_path):
    assert Source("stdlib").version() == f"python {platform.python_version()}"
    assert Source("tiny").version() == ""
    assert Source("hf:a/b@c:d").version() == "hf:a/b@c:d"
    (tmp_path / "x.csv").write_text("text\na\n")
    local = Source(f"hf:{tmp_path}").version()
    assert local.startswith("sha256 ")
    assert Source(f"hf:{tmp_path}:config").version() == f"{local} config"
    (tmp_path / "x.csv").write_text("text\nb\n")
    assert Source(f"hf:{tmp_path}").version() != local


def test_labels_are_short_names():
    assert Source("stdlib").label() == "stdlib"
    assert Source("a/b.c.txt").label() == "b"
    assert Source("a/b").label() == "b"
    assert Source("hf:ptb-text-only/ptb_text_only@refs/convert/parquet").label() == "ptb_text_only"


# The hub


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


@pytest.fixture
def hub_folder(tmp_path):
    """A data set as the hub lays it out."""
    folder = tmp_path / "a data@set:x"
    write_parquet(folder / "data" / "train-00000-of-00002.parquet", ["a", "", "b"])
    write_parquet(folder / "data" / "train-00001-of-00002.parquet", ["c"])
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", ["d"])
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_is_read_split_by_split(datasets, hub_folder, streaming):
    name = f"hf:{hub_folder}"
    options = {"streaming": streaming}
    assert read(name, split="train", **options) == ["a", "b", "c"]
    assert read(name, split="train", keep_empty=True, **options) == ["a", "", "b", "c"]
    assert read(name, split="test", **options) == ["d"]
    assert read(name, split="train", unit="characters:2", **options) == ["ab", "c"]
    assert Source(name).label() == hub_folder.name


def test_a_slice_of_a_split_is_the_package_s(datasets, hub_folder):
    name = f"hf:{hub_folder}"
    assert read(name, split="train[:-1]") == ["a", "b"]
    assert read(name, split="train[-1:]+test") == ["c", "d"]
    with pytest.raises(UserError, match=r"'train\[:1\]'; name a split .* unless data.streaming"):
        read(name, split="train[:1]", streaming=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_record_of_a_data_set_is_told_or_skipped(datasets, tmp_path, streaming):
    write_parquet(tmp_path / "x" / "train.parquet", ["a", None, b"\xff", "b"])
    options = {"split": "train", "streaming": streaming}
    with pytest.raises(UserError, match=r"Record 1 \(the first is 0\) of hf:.* it is None"):
        read(f"hf:{tmp_path / 'x'}", **options)
    found = read(f"hf:{tmp_path / 'x'}", skip_bad=True, **options)
    assert found == ["a", None, None, "b"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_wrong_split_column_or_config_is_told(datasets, hub_folder, streaming):
    def refuses(message, name=f"hf:{hub_folder}", **settings):
        with pytest.raises(UserError, match=message):
            read(name, streaming=streaming, **settings)

    refuses(r"with split 'validation' cannot be read: .*'train'", split="validation")
    refuses(r"data.column is 'article', but .*: n, text", split="train", column="article")
    refuses(r"cannot be read: .*'en' not found.*config", f"hf:{hub_folder}:en", split="train")
    refuses(r"data.valid_split = ''; name a split of it, such as 'train'")


def test_a_loading_script_and_a_missing_network_have_remedies(datasets, tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "old.py").write_text("")
    remedy = "@refs/convert/parquet, .*presets.py.* download its files"
    with pytest.raises(UserError, match=f"scripts are no longer supported.*{remedy}"):
        read(f"hf:{tmp_path / 'old'}", split="train")

    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach 'a/b' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=f"hf:a/b with split 'train' .*reach 'a/b'.*{remedy}"):
        read("hf:a/b", split="train")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a", dict(name=None, revision=None)),
        ("a/b:c.d-e", dict(name="c.d-e", revision=None)),
        ("a/b@v1:c", dict(name="c", revision="v1")),
        ("a/b@refs/pr/1", dict(name=None, revision="refs/pr/1")),
        ("a/b@refs/convert/parquet", dict(data_dir=None, revision="refs/convert/parquet")),
        ("a/b@refs/convert/parquet:c", dict(data_dir="c", revision="refs/convert/parquet")),
    ],
)
def test_a_name_has_a_revision_and_a_config(datasets, hub_folder, monkeypatch, name, expected):
    data, asked = datasets.load_dataset(str(hub_folder), split="test"), []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or data)
    assert read(f"hf:{name}", split="test") == ["d"]
    common = dict(split="test", streaming=False)
    assert asked == [((name.split("@")[0].split(":")[0],), common | expected)]


def test_a_folder_in_a_revision_of_the_hub_is_a_config(datasets, tmp_path, monkeypatch):
    """As the hub lays it out, where a large data set has "partial-" before its splits."""
    for config, part in itertools.product(("arxiv", "pubmed"), ("partial-train", "validation")):
        write_parquet(tmp_path / "x" / config / part / "0000.parquet", [f"{config} {part}"])
    load = datasets.load_dataset

    def locally(name, revision, **options):
        return load(str(tmp_path / "x"), **options)

    monkeypatch.setattr(datasets, "load_dataset", locally)
    name = "hf:a/x@refs/convert/parquet:arxiv"
    assert read(name, split="validation") == ["arxiv validation"]
    assert read(name, split="train", streaming=True) == ["arxiv partial-train"]


@pytest.mark.parametrize("name", ["hf:", "hf:/no/such/folder", "hf:a/b/c", "hf:a b", "hf:@main"])
def test_what_is_no_name_of_the_hub_is_refused(name):
    with pytest.raises(UserError, match=rf"data.source is '{name}'; give hf:NAME"):
        Source(name, split="train").check("data.source")


# Training and validation


def test_about_the_asked_share_is_for_validation(library):
    valid = [text for text in library if is_valid(text, 0.05)]
    assert 0.03 < len(valid) / len(library) < 0.07


def test_the_side_is_read_off_the_sha256_of_the_text(library):
    for text in library:
        share = int(hashlib.sha256(text.encode()).hexdigest(), 16) / 2**256
        assert is_valid(text, 0.05) == (share < 0.05)


def test_a_larger_share_only_adds(library):
    assert all(is_valid(text, 0.2) for text in library if is_valid(text, 0.05))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(UserError, match=r"data.valid_share is"):
        check_share(share)
    check_share(0.05)
