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
from array_record.python.array_record_module import ArrayRecordReader

from lomdm_jax.data import prepare as prepare_module
from lomdm_jax.data.pipeline import train_batches, unigram_entropy, valid_batches
from lomdm_jax.errors import UserError


def blocks_of(prepared, split):
    """The blocks as stored, read without the pipeline."""
    reader = ArrayRecordReader(str(prepared.split_path(split)))
    records = reader.read(0, reader.num_records())
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
    blocks = prepared.manifest["splits"]["train"]["blocks"]
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


def test_processes_share_each_global_batch_in_order(prepared):
    alone = train_batches(prepared, 8, seed=5)
    shares = [train_batches(prepared, 8, 5, index, 2) for index in range(2)]
    for _ in range(2 * prepared.manifest["splits"]["train"]["blocks"] // 8):
        parts = [next(share)["tokens"] for share in shares]
        assert parts[0].shape == (4, 16)
        np.testing.assert_array_equal(np.concatenate(parts), next(alone)["tokens"])
    assert alone.get_state() == shares[0].get_state() == shares[1].get_state()


@pytest.mark.parametrize(("batch_size", "processes"), [(0, 1), (10**6, 1), (7, 2)])
def test_a_batch_size_that_does_not_fit_is_refused(prepared, batch_size, processes):
    with pytest.raises(UserError, match=f"batch size is {batch_size}; it must be from 1 to"):
        train_batches(prepared, batch_size, 0, process_count=processes)


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
    """The shared corpus with the blocks of both splits replaced by these."""
    for split in ("train", "valid"):
        path = folder / prepared.split_path(split).name
        prepare_module._write_records(path, [np.array(block, dtype="<u2") for block in blocks])
    return dataclasses.replace(prepared, folder=folder)


@pytest.mark.parametrize(
    ("row", "fault"),
    [([512] * 16, "holds id 512, not below 512"), ([1] * 15, "has 30 bytes where 32 are expected")],
)
def test_a_bad_record_is_named(prepared, tmp_path, row, fault):
    damaged = handmade(prepared, tmp_path, [[511] * 16, row])
    with pytest.raises(UserError, match=f"Record 1 of .*train.array_record {fault}"):
        next(train_batches(damaged, 2, 0))
    batches = valid_batches(damaged, 1)
    assert next(batches)["tokens"].tolist() == [[511] * 16]
    with pytest.raises(UserError, match=f"Record 1 of .*valid.array_record {fault}"):
        next(batches)


@pytest.mark.parametrize("byte", [200, 1000])  # in the first group, after 104 bytes of headers
def test_changed_bytes_are_caught_by_the_checksums(prepared, tmp_path, byte):
    folder = Path(shutil.copytree(prepared.folder, tmp_path / "copy"))
    damaged = dataclasses.replace(prepared, folder=folder)
    content = bytearray(damaged.split_path("valid").read_bytes())
    content[byte] ^= 255
    damaged.split_path("valid").write_bytes(content)
    with pytest.raises(UserError, match=r"valid.array_record cannot be read: Corrupted"):
        list(valid_batches(damaged, 1))


def test_entropy_is_that_of_the_token_frequencies(prepared, tmp_path):
    corpus = handmade(prepared, tmp_path, [[3] * 8 + [4] * 4 + [5] * 4, [3] * 8 + [6] * 8])
    # Shares 1/2, 1/8, 1/8, 1/4: 1.75 bits.
    assert unigram_entropy(corpus) == pytest.approx(1.75 * math.log(2))
    assert 3.0 < unigram_entropy(prepared, "train") < math.log(512)
