"""How fast text becomes tokens and tokens become batches; and what well-known texts become.

python benchmarks/data.py [--texts NAME=TRAIN[+VALID],...] [--gpt2 DIR] [--bert DIR] [--folder DIR]

Three tables, written into the folder as data.md:

batches     tokens per second of CPU time from record files to batches on the host, by block length
prepare     megabytes of text per second of CPU time that `--job prepare` makes blocks of with one
            worker, and that the tokenizer alone encodes, by tokenizer, one after the other
texts       what each text holds under each tokenizer: counts, tokens per byte, and the SHA-256 of
            the training tokens

Without options it takes the texts and vocabularies that lie beside the project, if they do, and the
docstrings of Python's standard library if not.
"""

import argparse
import pathlib
import time
from collections.abc import Iterator
from typing import Any

from orders import ROOT
from orders_table import as_markdown

SHARED = ROOT.parent / "shared" / "data"
TEXTS = {
    "wikitext2": ("wikitext2/valid.txt", "wikitext2/test.txt"),
    "novels": ("novels/novels_train.jsonl.xz", "novels/novels_valid.jsonl"),
}
LENGTHS = (128, 1024)
ROWS = 256  # of a batch
SECONDS = 5.0  # of each measurement


def make_config(options: argparse.Namespace, text: str, tokenizer: str, length: int) -> Any:
    from lomdm_jax.config import default_config, validate

    config = default_config()
    config.data.source, config.data.valid_source = options.texts[text]
    config.data.tokenizer, config.data.length = tokenizer, length
    config.data.vocab_size = 8192 if tokenizer.startswith("sentencepiece-") else 0
    config.data.directory, config.data.workers = str(options.folder / "data"), options.workers
    validate(config)
    return config


def prepared(options: argparse.Namespace, *asked: Any) -> Any:
    from lomdm_jax.data.prepare import prepare

    return prepare(make_config(options, *asked).data)


def batches_row(options: argparse.Namespace, text: str, length: int) -> list[str]:
    """Tokens per second from record files to host batches."""
    from lomdm_jax.data.pipeline import train_batches

    corpus = prepared(options, text, "bytes", length)
    rows = min(ROWS, corpus.split("train")["blocks"])
    batches = train_batches(corpus, rows, seed=0)
    for _ in range(8):  # what is read ahead
        next(batches)
    wall, cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - wall < SECONDS:
        count += next(batches)["tokens"].size
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return [str(length), f"{count / cpu / 1e6:.1f}", f"{count / wall / 1e6:.1f}"]


def prepare_row(options: argparse.Namespace, text: str, tokenizer: str) -> list[str]:
    """Megabytes of text per second of CPU, of `prepare` and of the tokenizer alone."""
    from lomdm_jax.data import shards
    from lomdm_jax.data.packing import make_rules
    from lomdm_jax.data.prepare import record_dtype, sources_of

    data = make_config(options, text, tokenizer, 1024).data
    known = prepared(options, text, tokenizer, 1024).tokenizer
    source = sources_of(data)["valid" if data.valid_source else "train"]
    documents = [text for text in source.documents() if text]
    megabytes = sum(len(text.encode()) for text in documents) / 1e6
    folder = options.folder / "prepare"
    folder.mkdir(exist_ok=True)
    rules, dtype = make_rules(data, known), record_dtype(known)
    task = shards.Task(folder, "timed", source, None, "none", rules, dtype)

    def whole() -> None:
        for file in folder.iterdir():
            file.unlink()
        shards.write_split(task, known, workers=1)

    def alone() -> None:
        for text in documents:
            known.encode(text)

    speeds = [megabytes / min(seconds(f) for _ in range(3)) for f in (whole, alone)]
    cells = [f"{speed:.2f}" for speed in speeds]
    return [tokenizer_name(tokenizer), *cells, f"{speeds[0] / speeds[1]:.2f}"]


def seconds(function: Any) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def text_row(options: argparse.Namespace, text: str, tokenizer: str) -> list[str]:
    corpus = prepared(options, text, tokenizer, 128)
    entry = corpus.split("train")
    size = sum(len(document.encode()) for document in training_text(options, text))
    return [
        text,
        tokenizer_name(tokenizer),
        f"{corpus.tokenizer.vocab_size:,}",
        f"{entry['documents']:,}",
        f"{entry['tokens']:,}",
        f"{entry['tokens'] / size:.3f}",
        f"{entry['blocks']:,}",
        f"`{entry['sha256'][:16]}`",
    ]


def training_text(options: argparse.Namespace, text: str) -> Iterator[str]:
    from lomdm_jax.data.prepare import sources_of
    from lomdm_jax.data.sources import is_valid

    data = make_config(options, text, "bytes", 128).data
    for document in sources_of(data)["train"].documents():
        if document and (data.valid_source or not is_valid(document, data.valid_share)):
            yield document


def tokenizer_name(tokenizer: str) -> str:
    kind, colon, where = tokenizer.partition(":")
    return f"`{kind}{colon}{pathlib.Path(where).name}`"


def write(options: argparse.Namespace) -> None:
    last = list(options.texts)[-1]
    batches = [batches_row(options, last, length) for length in LENGTHS]
    heads = ["length", "million tokens per CPU second", "million tokens per second"]
    parts = [f"Batches of {ROWS} rows:\n", as_markdown([heads, *batches])]
    rows = [prepare_row(options, last, tokenizer) for tokenizer in options.tokenizers]
    heads = ["tokenizer", "`prepare`, MB per CPU second", "tokenizer alone", "ratio"]
    parts += [f"Tokenising {last}, one worker:\n", as_markdown([heads, *rows])]
    rows = [
        text_row(options, text, tokenizer)
        for text in options.texts
        for tokenizer in options.tokenizers
        if not tokenizer.endswith(("bytes", "bert"))
    ]
    heads = ["text", "tokenizer", "ids", "documents", "tokens", "tokens per byte", "blocks of 128"]
    parts += ["Training splits:\n", as_markdown([[*heads, "SHA-256 of the tokens"], *rows])]
    (options.folder / "data.md").write_text("\n".join(parts))
    print("\n".join(parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found = {n: "+".join(str(SHARED / f) for f in files) for n, files in TEXTS.items()}
    texts = (
        ",".join(f"{n}={files}" for n, files in found.items())
        if SHARED.is_dir()
        else "stdlib=stdlib"
    )
    parser.add_argument("--texts", default=texts)
    for name in ("gpt2", "bert"):
        parser.add_argument(f"--{name}", default=str(SHARED / name) if SHARED.is_dir() else "")
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "runs" / "data-benchmark")
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    pairs = (pair.split("=") for pair in options.texts.split(","))
    options.texts = {
        name: (files.split("+")[0], "".join(files.split("+")[1:])) for name, files in pairs
    }
    given = [f"hf:{folder}" for folder in (options.gpt2, options.bert) if folder]
    options.tokenizers = ["sentencepiece-bpe", *given, "characters", "bytes"]
    options.folder.mkdir(parents=True, exist_ok=True)
    write(options)


if __name__ == "__main__":
    main()
