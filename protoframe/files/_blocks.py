"""Blocks of a file: their size, their digests, which of them are there, and the journal that says so after a crash.

Knows numbers and octets; no files, no Twisted and no time.  The digest of a whole file is the digest of its block
digests, one after another, behind its size and block size: it is computed from the contents in one pass, and tells
which block is wrong.
"""

from __future__ import annotations

import hashlib
import importlib
import struct
import zlib
from collections.abc import Callable, Iterable
from typing import Any

from protoframe.files._contract import Digest, DigestUnavailable, Source

__all__ = [
    "DIGEST_SIZE",
    "RECORD",
    "BlockMap",
    "block_count",
    "block_size_for",
    "digest_function",
    "is_block_size",
    "journal_attempt",
    "journal_block",
    "journal_header",
    "read_journal",
    "transfer_key",
    "window_for",
    "zero_digest",
]

KIB = 1024
SMALLEST_BLOCK = 16 * KIB
LARGEST_BLOCK = 2048 * KIB
#: A file has so many blocks, where the bounds of their size allow: what is sent again is then a small part of it.
_BLOCKS = 2048

DIGEST_SIZE = 32
#: Some 70 MB are held for the digests of its blocks.
LARGEST_FILE = 4 << 40

DigestFunction = Callable[[Any], bytes]


def digest_function(digest: Digest) -> DigestFunction:
    """What computes a digest of octets.

    :raises DigestUnavailable: the package that does is not installed.
    """
    if digest is Digest.SHA256:
        sha256 = hashlib.sha256
        return lambda octets: sha256(octets).digest()
    try:
        blake3: Any = importlib.import_module("blake3")
    except ImportError:
        raise DigestUnavailable(
            "BLAKE3 takes the package blake3, which is not installed at this end", digest=digest.value
        ) from None
    make = blake3.blake3
    return lambda octets: bytes(make(octets).digest())


def block_size_for(size: int) -> int:
    """The size of the blocks of a file: a power of two from 16 KiB to 2 MiB, so that there are 2048 or fewer if can be.

    From 2 GiB on there are more, of 1 MiB, and from 64 GiB on of 2 MiB.
    """
    if size > 64 * KIB**3:
        return LARGEST_BLOCK
    block = SMALLEST_BLOCK
    while block * _BLOCKS < size and block < 1024 * KIB:
        block *= 2
    return block


def is_block_size(size: int) -> bool:
    """Whether blocks may have this size."""
    return SMALLEST_BLOCK <= size <= LARGEST_BLOCK and not size & (size - 1)


def block_count(size: int, block_size: int) -> int:
    """How many blocks a file has."""
    return -(-size // block_size)


def window_for(size: int, block_size: int, attempts: int) -> int:
    """Bytes that may be on the way in the attempt of this number, from 1 on.

    What is on the way when an attempt is cut off is sent again.  Each attempt may lose a quarter of what is left of
    four hundredths of the file, so that however many there are they do not lose more; but the window is never less
    than two blocks, nor more than 8 MiB.
    """
    share = size * 0.04 / 4 * 0.75 ** max(0, attempts - 1)
    return int(min(8192 * KIB, max(share, 2 * block_size, 256 * KIB if attempts <= 1 else 0)))


def zero_digest(function: DigestFunction, size: int) -> bytes:
    """The digest of a block of zeros."""
    return function(bytes(size))


class BlockMap:
    """Which blocks of a file are there, and the digest of each.

    32 bytes and one are held for each block: 16 MiB for a file of 1 TiB.

    :raises ValueError: no file has such a size or such blocks.
    """

    def __init__(self, size: int, block_size: int) -> None:
        # Smaller blocks than these would be more than can be held.
        if not (0 <= size <= LARGEST_FILE and is_block_size(block_size) and block_size >= block_size_for(size)):
            raise ValueError(f"no file has {size} bytes in blocks of {block_size}")
        self.size = size
        self.block_size = block_size
        self.count = block_count(size, block_size)
        self._digests = bytearray(DIGEST_SIZE * self.count)
        self._have = bytearray(self.count)
        self.missing = self.count

    def length(self, index: int) -> int:
        """Bytes of a block: the last may have fewer."""
        return min(self.block_size, self.size - index * self.block_size)

    def has(self, index: int) -> bool:
        """Whether a block is there."""
        return bool(self._have[index])

    def digest(self, index: int) -> bytes:
        """The digest that was noted for a block."""
        return bytes(self._digests[index * DIGEST_SIZE : (index + 1) * DIGEST_SIZE])

    def add(self, index: int, digest: bytes) -> None:
        """A block is there."""
        if len(digest) != DIGEST_SIZE:
            raise ValueError(f"a digest has {DIGEST_SIZE} bytes, not {len(digest)}")
        self._digests[index * DIGEST_SIZE : (index + 1) * DIGEST_SIZE] = digest
        if not self._have[index]:
            self._have[index] = 1
            self.missing -= 1

    def add_run(self, first: int, count: int, digest: bytes) -> None:
        """Several blocks with one digest are there."""
        self._digests[first * DIGEST_SIZE : (first + count) * DIGEST_SIZE] = digest * count
        self.missing -= self._have.count(0, first, first + count)
        self._have[first : first + count] = b"\1" * count

    def drop(self, index: int) -> None:
        """A block is not there after all."""
        if self._have[index]:
            self._have[index] = 0
            self.missing += 1

    def missing_ranges(self) -> list[tuple[int, int]]:
        """First block and count, in order, of what is not there."""
        ranges = []
        first = self._have.find(0)
        while first >= 0:
            end = self._have.find(1, first)
            end = self.count if end < 0 else end
            ranges.append((first, end - first))
            first = self._have.find(0, end)
        return ranges

    def missing_size(self) -> int:
        """Bytes of what is not there."""
        octets = self.missing * self.block_size
        if self.count and not self._have[-1]:
            octets -= self.block_size - self.length(self.count - 1)
        return octets

    def root(self, function: DigestFunction) -> bytes:
        """The digest of the whole, of which every block must be there."""
        head = b"protoframe files\0" + struct.pack(">QQ", self.size, self.block_size)
        return function(head + self._digests)


def transfer_key(target: str, source: Source) -> str:
    """What names an unfinished copy: another source, or another place, never goes on with it."""
    facts = (target, source.size, source.mtime_ns, source.mode, source.block_size, source.digest.value)
    return hashlib.sha256(repr(facts).encode("utf-8", "surrogateescape")).hexdigest()[:40]


# The journal: records of one size, so that a torn one spoils no other.  Each has a checksum that takes the key in.

RECORD = struct.Struct(">cxxxQ32sI")
_HEADER, _ATTEMPT, _BLOCK = b"H", b"A", b"B"


def _record(kind: bytes, number: int, octets: bytes, key: str) -> bytes:
    head = RECORD.pack(kind, number, octets, 0)[:-4]
    return head + struct.pack(">I", zlib.crc32(head, zlib.crc32(key.encode())))


def journal_header(key: str) -> bytes:
    """The first record: whose journal it is."""
    return _record(_HEADER, 1, key.encode()[:32], key)


def journal_attempt(key: str, number: int) -> bytes:
    """An attempt begins."""
    return _record(_ATTEMPT, number, bytes(32), key)


def journal_block(key: str, index: int, digest: bytes) -> bytes:
    """A block was written down."""
    return _record(_BLOCK, index, digest, key)


def read_journal(key: str, octets: bytes, blocks: BlockMap) -> int:
    """Notes in a map the blocks that a journal has, whatever became of a part of it; how many attempts there were.

    They count only when they were verified from the disk.
    """
    attempts = 0
    if octets[: RECORD.size] != journal_header(key):
        return 0
    salt = zlib.crc32(key.encode())
    whole = len(octets) - len(octets) % RECORD.size
    view = memoryview(octets)
    for at in range(RECORD.size, whole, RECORD.size):
        kind, number, digest, checksum = RECORD.unpack_from(octets, at)
        if zlib.crc32(view[at : at + RECORD.size - 4], salt) != checksum:
            continue
        if kind == _ATTEMPT:
            attempts = max(attempts, number)
        elif kind == _BLOCK and number < blocks.count:
            blocks.add(number, digest)
    return attempts


def runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """First and count of the runs of ascending numbers."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and sum(found[-1]) == number:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((number, 1))
    return found
