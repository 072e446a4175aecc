"""Batches: every block once an epoch, resumed exactly, shared without loss, checked when read."""

import dataclasses
import itertools
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from lomdm_jax.data.pipeline import as_batch, open_mixture, train_batches, valid_batches
from lomdm_jax.data.shards import Tally, shard_name
from lomdm_jax.errors import UserError


def blocks_of(prepared, split):
    """The blocks as stored, read without the pipeline."""
    records = []
    for name, _, _ in prepared.split(split)["shards"]:
        reader = ArrayRecordReader(str(prepared.folder / name))
        records += reader.read(0, reader.num_records())
        reader.close()
    return [tuple(np.frombuffer(record, "<u2").tolist()) for record in records]


def rows(batches, count):
    """The first `count` rows of the batches, as tuples."""
    every = (tuple(row) for batch in batches for row in batch["tokens"].tolist())
    return list(itertools.islice(every, count))


def test_batches_have_their_shape_and_types(prepared):
    batch = next(train_batches(prepared, 8, seed=0))
    assert set(batch) == {"tokens", "counted"}
    assert batch["tokens"].shape == batch["counted"].shape == (8, 16)
    assert batch["tokens"].dtype == np.int32 and batch["counted"].dtype == bool
    assert batch["counted"].all()


def test_each_epoch_holds_every_block_once_in_an_order_of_its_own(prepared):
    blocks = blocks_of(prepared, "train")
    drawn = rows(train_batches(prepared, 8, seed=0), 2 * len(blocks))
    first, second = drawn[: len(blocks)], drawn[len(blocks) :]
    assert Counter(first) == Counter(second) == Counter(blocks)
    assert first != blocks and second != blocks and first != second


def test_the_stream_is_a_function_of_the_seed(prepared):
    streams = [rows(train_batches(prepared, 8, seed), 64) for seed in (0, 0, 1)]
    assert streams[0] == streams[1] != streams[2]


def test_a_fresh_iterator_resumes_bit_for_bit(prepared):
    blocks = prepared.split("train")["blocks"]
    batches = train_batches(prepared, 8, seed=3)
    for _ in range(blocks // 8 - 1):  # the continuation then runs into the second epoch
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = rows(batches, 64)
    resumed = train_batches(prepared, 8, seed=3)
    next(resumed)
    resumed.set_state(state)
    assert rows(resumed, 64) == expected
    assert rows(train_batches(prepared, 8, seed=3), 64) != expected


def dealt(prepared, processes):
    """Iterators of the processes that share batches of 8, dealt to them in turn, and whose rows."""
    owns = [np.arange(8)[index::processes] for index in range(processes)]
    return [(own, train_batches(prepared, 8, 5, own)) for own in owns]


def joined(shares):
    """The next global batch, from its parts."""
    batch = np.full((8, 16), -1)
    for own, share in shares:
        batch[own] = next(share)["tokens"]
    return batch


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_each_global_batch(prepared, processes):
    alone, shares = train_batches(prepared, 8, seed=5), dealt(prepared, processes)
    for _ in range(2 * prepared.split("train")["blocks"] // 8):
        np.testing.assert_array_equal(joined(shares), next(alone)["tokens"])
    assert all(alone.get_state() == share.get_state() for _, share in shares)


def test_another_number_of_processes_goes_on_at_the_same_row(prepared):
    alone = train_batches(prepared, 8, seed=5)
    expected = [next(alone)["tokens"] for _ in range(12)]
    found, state = [], train_batches(prepared, 8, 5).get_state()
    for processes in (4, 1, 2):
        shares = dealt(prepared, processes)
        for _, share in shares:
            share.set_state(state)
        found += [joined(shares) for _ in range(4)]
        state = shares[-1][1].get_state()
    np.testing.assert_array_equal(found, expected)


def other_corpus(prepared, folder, blocks=40):
    """A corpus of the same kind whose blocks hold nothing but the id 7."""
    return handmade(prepared, folder, [[7] * 16] * blocks)


def test_a_mixture_deals_rows_by_weight_and_resumes(prepared, tmp_path):
    mixture = [(other_corpus(prepared, tmp_path), 0.25)]
    batches = train_batches(prepared, 10, 0, mixture=mixture)
    drawn = rows(batches, 1000)
    others = [index for index, row in enumerate(drawn) if row == (7,) * 16]
    assert abs(len(others) - 200) <= 2  # 0.25 of 1.25
    assert max(np.diff(others)) <= 6  # dealt evenly
    theirs = set(range(1000)) - set(others)
    alone = rows(train_batches(prepared, 10, 0), len(theirs))
    assert [drawn[index] for index in sorted(theirs)] == alone
    resumed = train_batches(prepared, 10, 0, mixture=mixture)
    resumed.set_state(json.loads(json.dumps(batches.get_state())))
    assert rows(resumed, 50) == rows(batches, 50)


def test_a_mixture_of_other_tokens_is_refused(prepared, tmp_path):
    other = other_corpus(prepared, tmp_path)
    longer = dataclasses.replace(other, length=32)
    with pytest.raises(UserError, match=r"data.mixture holds .* prepared with length 32, but"):
        train_batches(prepared, 8, 0, mixture=[(longer, 1.0)])


def test_a_mixture_is_named_by_folder_and_weight(prepared):
    (corpus, weight), (_, other) = open_mixture(f"{prepared.folder}=0.5,{prepared.folder}=2")
    assert (corpus.folder, weight, other) == (prepared.folder, 0.5, 2.0)
    assert open_mixture("") == []
    for bad in ("somewhere", "=2", f"{prepared.folder}=0", f"{prepared.folder}=x"):
        with pytest.raises(UserError, match=r"data.mixture has the part"):
            open_mixture(bad)


def test_pads_are_neither_counted_nor_lost(prepared):
    settings = prepared.manifest["settings"] | {"packing": "padded"}
    padded = dataclasses.replace(prepared, manifest=prepared.manifest | {"settings": settings})
    pad = prepared.tokenizer.pad_id
    given = np.array([[5, 6, -1, -1], [pad, 6, 5, -1]])
    batch = as_batch(padded, given)
    assert batch["tokens"].tolist() == [[5, 6, pad, pad], [pad, 6, 5, pad]]
    assert batch["padding"].tolist() == (given == -1).tolist()
    assert batch["counted"].tolist() == (given != -1).tolist()
    counted = as_batch(dataclasses.replace(padded, count_pads=True), given)
    assert set(counted) == {"tokens", "counted"} and counted["counted"].all()


def test_short_records_are_filled_up(prepared, tmp_path):
    settings = prepared.manifest["settings"] | {"packing": "padded"}
    corpus = handmade(prepared, tmp_path, [[5] * 3, [6] * 16])
    corpus = dataclasses.replace(corpus, manifest=corpus.manifest | {"settings": settings})
    (batch,) = valid_batches(corpus, 3)
    assert batch["counted"].sum(-1).tolist() == [3, 16, 0]
    assert batch["padding"].sum(-1).tolist() == [13, 0, 0]


def test_documents_are_told_apart(prepared):
    settings = prepared.manifest["settings"] | {"packing": "documents"}
    corpus = dataclasses.replace(prepared, manifest=prepared.manifest | {"settings": settings})
    end = prepared.tokenizer.eos_id
    batch = as_batch(corpus, np.array([[5, end, 6, 7, end, 8]]))
    assert batch["segments"].tolist() == [[0, 0, 1, 1, 1, 2]]


@pytest.mark.parametrize("batch_size", [0, 10**6])
def test_a_batch_size_that_does_not_fit_is_refused(prepared, batch_size):
    with pytest.raises(UserError, match=f"batch size is {batch_size}; it must be from 1 to"):
        train_batches(prepared, batch_size, 0)


def test_a_batch_of_one_row_works(prepared):
    assert rows(train_batches(prepared, 1, 0), 8) == rows(train_batches(prepared, 8, 0), 8)


def test_a_corpus_of_one_block_repeats_it(prepared, tmp_path):
    corpus = handmade(prepared, tmp_path, [[7] * 16])
    assert rows(train_batches(corpus, 1, 0), 3) == [(7,) * 16] * 3


def test_a_batch_of_all_blocks_is_an_epoch(prepared):
    blocks = blocks_of(prepared, "train")
    batch = next(train_batches(prepared, len(blocks), 0))
    assert Counter(map(tuple, batch["tokens"].tolist())) == Counter(blocks)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(prepared, seed):
    with pytest.raises(UserError, match=f"seed is {seed}"):
        train_batches(prepared, 8, seed)


@pytest.mark.parametrize("limit", [0, 1, 9, 10**6])
def test_validation_reads_in_order_and_pads_uncounted(prepared, limit):
    blocks = blocks_of(prepared, "valid")
    expected = blocks[: limit or None]
    batches = list(valid_batches(prepared, 7, limit))
    assert len(batches) == math.ceil(len(expected) / 7)
    tokens_RL = np.concatenate([batch["tokens"] for batch in batches])
    counted_RL = np.concatenate([batch["counted"] for batch in batches])
    assert tokens_RL.dtype == np.int32 and counted_RL.dtype == bool
    assert len(tokens_RL) == 7 * len(batches)
    assert list(map(tuple, tokens_RL[: len(expected)].tolist())) == expected
    assert counted_RL[: len(expected)].all()
    assert not counted_RL[len(expected) :].any() and not tokens_RL[len(expected) :].any()


@pytest.mark.parametrize(("batch_size", "limit"), [(0, 0), (4, -1)])
def test_bad_validation_sizes_are_refused_at_once(prepared, batch_size, limit):
    with pytest.raises(UserError, match="Validation batch size"):
        valid_batches(prepared, batch_size, limit)


def handmade(prepared, folder, blocks):
    """The shared corpus with the blocks of both splits replaced by these, in one file each."""
    splits = {}
    for split in ("train", "valid"):
        path = folder / shard_name(split, 0)
        writer = ArrayRecordWriter(str(path), "group_size:4,uncompressed")
        for block in blocks:
            writer.write(np.array(block, dtype="<u2").tobytes())
        writer.close()
        shard = [path.name, len(blocks), path.stat().st_size]
        splits[split] = prepared.split(split) | {"shards": [shard], "blocks": len(blocks)}
    manifest = prepared.manifest | {"splits": splits}
    return dataclasses.replace(prepared, folder=folder, manifest=manifest)


@pytest.mark.parametrize(
    ("row", "fault"),
    [([512] * 16, "holds id 512, not below 512"), ([1] * 15, "has 30 bytes where 32 are expected")],
)
def test_a_bad_record_is_named(prepared, tmp_path, row, fault):
    damaged = handmade(prepared, tmp_path, [[511] * 16, row])
    with pytest.raises(UserError, match=f"Record 1 of .*train-00000.array_record {fault}"):
        next(train_batches(damaged, 2, 0))
    batches = valid_batches(damaged, 1)
    assert next(batches)["tokens"].tolist() == [[511] * 16]
    with pytest.raises(UserError, match=f"Record 1 of .*valid-00000.array_record {fault}"):
        next(batches)


@pytest.mark.parametrize("byte", [200, 1000])  # in the first group, after 104 bytes of headers
def test_changed_bytes_are_caught_by_the_checksums(prepared, tmp_path, byte):
    folder = Path(shutil.copytree(prepared.folder, tmp_path / "copy"))
    path = folder / shard_name("valid", 0)
    content = bytearray(path.read_bytes())
    content[byte] ^= 255
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"valid-00000.array_record cannot be read: Corrupted"):
        list(valid_batches(dataclasses.replace(prepared, folder=folder), 1))


def test_a_file_with_other_records_than_the_manifest_says_is_refused(prepared, tmp_path):
    corpus = handmade(prepared, tmp_path, [[3] * 16] * 4)
    corpus.split("train")["shards"][0][1] = 5
    with pytest.raises(UserError, match=r"train-00000.array_record has 4 records where 5 are"):
        train_batches(corpus, 1, 0)


def test_entropy_is_that_of_the_token_frequencies():
    tally = Tally(10)
    tally.add(np.array([3] * 16 + [4] * 4 + [5] * 4, np.int64))
    tally.add(np.array([6] * 8, np.int64))
    # Shares 1/2, 1/8, 1/8, 1/4: 1.75 bits.
    assert tally.unigram_entropy == pytest.approx(1.75 * math.log(2))


def test_the_manifests_entropy_is_that_of_its_split(prepared):
    ids = np.array(blocks_of(prepared, "valid")).reshape(-1)
    share = np.unique(ids, return_counts=True)[1] / len(ids)
    entropy = -(share * np.log(share)).sum()
    assert prepared.split("valid")["unigram_entropy"] == pytest.approx(entropy)
