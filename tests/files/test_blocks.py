"""Blocks, their map and the journal: no files, no connections."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protoframe.files import Digest, DigestUnavailable, Source
from protoframe.files._blocks import (
    RECORD,
    BlockMap,
    block_size_for,
    digest_function,
    is_block_size,
    journal_attempt,
    journal_block,
    journal_header,
    read_journal,
    runs,
    transfer_key,
    window_for,
)

KIB = 1024
KEY = "k" * 40
SIZE = 100 * 16 * KIB - 5
digests = st.binary(min_size=32, max_size=32)
writes = st.lists(st.tuples(st.integers(0, 99), digests), max_size=60)


def journal(blocks):
    return b"".join([journal_header(KEY), journal_attempt(KEY, 1), *(journal_block(KEY, *one) for one in blocks)])


def noted(octets):
    blocks = BlockMap(SIZE, 16 * KIB)
    attempts = read_journal(KEY, octets, blocks)
    return attempts, {index: blocks.digest(index) for index in range(100) if blocks.has(index)}


@given(writes, st.integers(0, 80 * RECORD.size))
def test_journal_cut_at_any_byte_has_what_was_written_before(blocks, cut):
    octets = journal(blocks)[:cut]
    whole = max(0, cut // RECORD.size - 2)
    expected = dict(blocks[:whole])
    attempts, found = noted(octets)
    assert found == expected
    assert attempts == (1 if cut >= 2 * RECORD.size else 0)


@given(writes, st.data())
def test_flipped_bit_in_a_journal_loses_one_record_and_invents_none(blocks, data):
    octets = bytearray(journal(blocks))
    bit = data.draw(st.integers(0, len(octets) * 8 - 1))
    octets[bit // 8] ^= 1 << bit % 8
    _, found = noted(bytes(octets))
    record = bit // 8 // RECORD.size
    if record == 0:
        assert found == {}
    else:
        left = blocks if record == 1 else blocks[: record - 2] + blocks[record - 1 :]
        assert found == dict(left)


def test_journal_of_another_copy_counts_for_nothing():
    blocks = BlockMap(SIZE, 16 * KIB)
    assert read_journal("x" * 40, journal([(3, bytes(32))]), blocks) == 0
    assert blocks.missing == 100


@given(st.sets(st.integers(0, 99)))
def test_missing_ranges_are_exactly_what_is_not_there(there):
    blocks = BlockMap(SIZE, 16 * KIB)
    for index in there:
        blocks.add(index, bytes(32))
    missing = [index for first, count in blocks.missing_ranges() for index in range(first, first + count)]
    assert missing == sorted(set(range(100)) - there)
    assert blocks.missing == len(missing)
    assert blocks.missing_size() == sum(blocks.length(index) for index in missing)
    assert runs(missing) == blocks.missing_ranges()


@given(st.integers(0, 4 << 40))
def test_block_size_is_allowed_and_a_map_of_it_is_bounded(size):
    block = block_size_for(size)
    assert is_block_size(block)
    assert -(-size // block) <= max(65536, -(-size // (2048 * KIB)))


@pytest.mark.parametrize(("size", "block"), [(-1, 16384), (5 << 40, 2 << 20), (1, 1), (1, 3 << 14), (1 << 40, 16384)])
def test_a_map_is_refused_that_no_file_has(size, block):
    with pytest.raises(ValueError, match="no file has"):
        BlockMap(size, block)


@pytest.mark.parametrize("size", [64 << 20, 256 << 20, 1 << 30, 100 << 30])
def test_twenty_lost_windows_are_less_than_five_hundredths_of_a_file(size):
    block = block_size_for(size)
    # The window, and the block that overdraws it.
    assert sum(window_for(size, block, attempt) for attempt in range(1, 21)) < 0.05 * size


def test_digest_of_the_whole_is_that_of_the_block_digests_behind_the_size():
    function = digest_function(Digest.SHA256)
    blocks = BlockMap(20_000, 16 * KIB)
    data = bytes(range(250)) * 80
    parts = [hashlib.sha256(data[:16384]).digest(), hashlib.sha256(data[16384:]).digest()]
    for index, digest in enumerate(parts):
        blocks.add(index, digest)
    head = b"protoframe files\0" + (20_000).to_bytes(8, "big") + (16384).to_bytes(8, "big")
    assert blocks.root(function) == hashlib.sha256(head + b"".join(parts)).digest()


def test_another_source_or_place_has_another_key():
    source = Source(1, 2, 0o644, 16384)
    others = [Source(2, 2, 0o644, 16384), Source(1, 3, 0o644, 16384), Source(1, 2, 0o600, 16384)]
    others += [Source(1, 2, 0o644, 32768), Source(1, 2, 0o644, 16384, Digest.BLAKE3)]
    keys = {transfer_key("a", source), transfer_key("b", source), *(transfer_key("a", other) for other in others)}
    assert len(keys) == 7


def test_digest_whose_package_is_missing_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "blake3", None)
    with pytest.raises(DigestUnavailable, match="blake3") as caught:
        digest_function(Digest.BLAKE3)
    assert caught.value.digest == "blake3"
