"""The file that is copied, at the end that has it: its blocks, its holes, and whether it has changed.

Knows one open file, by calls that block; what is sent of it, and when, is `protoframe.files._copying`'s.
"""

from __future__ import annotations

import os
import threading

from protoframe.files._blocks import BlockMap, block_count, block_size_for, digest_function, runs, zero_digest
from protoframe.files._contract import Block, Digest, Holes, Same, Sent, Source, SourceChanged

__all__ = ["SourceFile"]

#: Bytes that are read at a time.
_PIECE = 2 * 1024 * 1024


class SourceFile:
    """A file that is being copied.

    :param fd: a regular file, open for reading; `close` closes it, and so does a failure here.
    :raises DigestUnavailable: this end cannot compute the digest.
    :raises ValueError: the file is too large, or the blocks are too small for it.
    :ivar source: the file as it is now.
    """

    def __init__(self, fd: int, digest: Digest, block_size: int = 0) -> None:
        self._lock = threading.Lock()
        self._fd = fd
        try:
            self._begin(fd, digest, block_size)
        except BaseException:
            self.close()
            raise

    def _begin(self, fd: int, digest: Digest, block_size: int) -> None:
        self._function = digest_function(digest)
        status = os.fstat(fd)
        self._status = _identity(status)
        self.source = Source(
            status.st_size,
            status.st_mtime_ns,
            status.st_mode & 0o777,
            block_size or block_size_for(status.st_size),
            digest,
        )
        self.blocks = BlockMap(self.source.size, self.source.block_size)
        self._zero = zero_digest(self._function, self.source.block_size)
        self._is_sparse = status.st_blocks * 512 < status.st_size
        # A stretch of which is known that it is, or is not, a hole.
        self._hole = (0, 0)
        self._data = (0, 0 if self._is_sparse else status.st_size)

    def close(self) -> None:
        """Lets it go, when what reads it has ended."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def stretch(self, first: int, wanted: bytearray, octets: int) -> tuple[list[Sent], int]:
        """What to say of the next blocks, until so many bytes are read, and which block is next.

        :param wanted: for each block, whether its data is to be sent.
        :raises SourceChanged: the file is shorter than it was, or a block is another than when it was read before.
        """
        found: list[Sent] = []
        blocks = self.blocks
        index = first
        same: list[int] = []
        with self._lock:
            while index < blocks.count and octets > 0:
                holes = self._holes_from(index) if self._is_sparse else 0
                if holes:
                    blocks.add_run(index, holes, self._zero)
                    found.append(Holes(index, holes))
                    index += holes
                    continue
                for data, digest in self._read(index, 1 if self._is_sparse else min(octets, _PIECE)):
                    if wanted[index]:
                        found.append(Block(index, digest, data))
                    else:
                        same.append(index)
                    octets -= len(data)
                    index += 1
        for start, count in runs(same):
            found.append(Same(start, b"".join(blocks.digest(number) for number in range(start, start + count))))
        return found, index

    def again(self, indexes: list[int]) -> list[Sent]:
        """Blocks that are wanted again.

        :raises SourceChanged: one is another than when it was read before.
        """
        with self._lock:
            return [Block(index, digest, data) for index in indexes for data, digest in self._read(index, 1)]

    def whole(self) -> bytes:
        """The digest of the file, all blocks of which were read.

        :raises SourceChanged: it has changed since it was opened.
        """
        with self._lock:
            self.check()
            return self.blocks.root(self._function)

    def check(self) -> None:
        """Looks whether it is as it was.

        :raises SourceChanged: the file has changed since it was opened.
        """
        if _identity(os.fstat(self._fd)) != self._status:
            raise SourceChanged("the file changed while it was copied")

    def _read(self, first: int, octets: int) -> list[tuple[memoryview, bytes]]:
        """Blocks from this one on, until so many bytes are read, each with its digest."""
        blocks = self.blocks
        size = blocks.block_size
        at = first * size
        data = memoryview(self._read_at(at, min(-(-octets // size) * size, blocks.size - at)))
        found = []
        for index in range(first, first + block_count(len(data), size)):
            block = data[index * size - at : (index + 1) * size - at]
            digest = self._function(block)
            if blocks.has(index):
                if blocks.digest(index) != digest:
                    raise SourceChanged("a block of the file is not what it was when it was read before")
            else:
                blocks.add(index, digest)
            found.append((block, digest))
        return found

    def _read_at(self, at: int, length: int) -> bytes:
        data = os.pread(self._fd, length, at)
        while len(data) < length:
            more = os.pread(self._fd, length - len(data), at + len(data))
            if not more:
                raise SourceChanged("the file became shorter while it was copied")
            data += more
        return data

    def _holes_from(self, index: int) -> int:
        """How many whole blocks from here on are holes."""
        blocks = self.blocks
        at = index * blocks.block_size
        if self._data[0] <= at < self._data[1]:
            return 0
        if not self._hole[0] <= at < self._hole[1]:
            try:
                start = os.lseek(self._fd, at, os.SEEK_DATA)
            except OSError:
                # Nothing but a hole until the end.
                start = blocks.size
            if start > at:
                self._hole = (at, start)
            else:
                self._data = (at, os.lseek(self._fd, at, os.SEEK_HOLE))
                return 0
        count = self._hole[1] // blocks.block_size - index
        if self._hole[1] >= blocks.size and not blocks.size % blocks.block_size:
            count = blocks.count - index
        return max(0, count)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    # The time of the last change of any kind too: that of the contents can be set back.
    return (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
