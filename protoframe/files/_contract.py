"""`Files`: what a server of files answers, as a declaration.

Knows types alone: what is sent, by whom, and which errors travel.  Paths are relative to the server's root, with ``/``
between components; the empty text is the root itself.

A copy has a *sending* end and a *receiving* end, whichever of them is the client.  The sending end says `Block`,
`Same`, `Holes` and at last `Whole`; the receiving end says `Want`, `Got`, `Again` and at last `Receipt`.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator

from msgspec import Struct

from protoframe import (
    Aborted,
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    Limits,
    NotFound,
    Protocol,
    ResourceExhausted,
    Unimplemented,
    request,
)

__all__ = [
    "FILES_LIMITS",
    "Again",
    "Answer",
    "BadTransfer",
    "Block",
    "CorruptCopy",
    "Digest",
    "DigestUnavailable",
    "Entry",
    "Exists",
    "FileTooLarge",
    "Files",
    "Got",
    "Holes",
    "Kind",
    "Missing",
    "NoSuchPath",
    "NotEmpty",
    "Offer",
    "OutOfSpace",
    "Outcome",
    "OverQuota",
    "ReadOnly",
    "Receipt",
    "Same",
    "Sent",
    "SmallFile",
    "Source",
    "SourceChanged",
    "Superseded",
    "Verified",
    "Want",
    "Whole",
]

MIB = 1024 * 1024

#: What both ends of `Files` take: a few blocks of one stream, and of several copies at once.
FILES_LIMITS = Limits(stream_credit=8 * MIB, connection_credit=16 * MIB, max_unread=24 * MIB)

#: Seconds that the digest of a large file may take where the caller sets no deadline.
_LONG = 24 * 3600.0


class NoSuchPath(NotFound):
    """There is nothing at this path that the caller may have; why not is never told."""


class Exists(AlreadyExists):
    """Something is there already."""


class NotEmpty(FailedPrecondition):
    """A directory that is to be removed has something in it."""


class ReadOnly(FailedPrecondition):
    """The server, or this directory, may be read only."""


class FileTooLarge(ResourceExhausted):
    """The file has more bytes than the server takes.

    :ivar limit: bytes that one file may have.
    """

    limit: int


class OverQuota(ResourceExhausted):
    """The file would take more bytes than are left for all files together.

    :ivar left: bytes.
    """

    left: int


class OutOfSpace(ResourceExhausted):
    """The disk is full."""


class DigestUnavailable(Unimplemented):
    """An end cannot compute this digest: its package is not installed there."""

    digest: str


class SourceChanged(Aborted):
    """The file changed while it was copied; nothing was delivered."""


class CorruptCopy(DataLoss):
    """What is on the disk of the receiving end differs from what was sent, again and again; nothing was delivered."""


class Superseded(Aborted):
    """The same copy was begun anew by somebody else, who goes on with it."""


class BadTransfer(InvalidArgument):
    """The other end broke the rules of a copy."""


class Digest(enum.Enum):
    """How contents are verified."""

    SHA256 = "sha256"
    BLAKE3 = "blake3"


class Kind(enum.Enum):
    """What is at a path; nothing else is ever shown."""

    FILE = "file"
    DIRECTORY = "directory"


class Entry(Struct, frozen=True, gc=False, omit_defaults=True):
    """Something at a path.

    :ivar path: relative to the root.
    :ivar size: bytes; 0 for a directory.
    :ivar mtime_ns: nanoseconds since 1970.
    :ivar mode: permission bits, at most 0o777.
    :ivar is_readable: ``False`` for a directory that the server cannot read: in a listing of what is below it is not
        empty, but what is in it is not known.  Elsewhere nobody has looked.
    """

    path: str
    kind: Kind
    size: int
    mtime_ns: int
    mode: int
    is_readable: bool = True


class Source(Struct, frozen=True, gc=False):
    """The file that is copied, as it was when the copy began.

    :ivar block_size: bytes; a power of two.
    """

    size: int
    mtime_ns: int
    mode: int
    block_size: int
    digest: Digest = Digest.SHA256


class Block(Struct, frozen=True, gc=False, tag="block", array_like=True):
    """One block: ``data`` of the file at ``index * block_size``, and the sender's digest of it."""

    index: int
    digest: bytes
    # A view of the message that it came in: to copy half a megabyte for each block takes its time.
    data: memoryview


class Same(Struct, frozen=True, gc=False, tag="same", array_like=True):
    """The digests, one after another, of blocks that the receiving end said it has; it compares them."""

    first: int
    digests: bytes


class Holes(Struct, frozen=True, gc=False, tag="holes", array_like=True):
    """Blocks that are holes in the source, and so are all zeros."""

    first: int
    count: int


class Whole(Struct, frozen=True, gc=False, tag="whole", array_like=True):
    """All was sent, and the source has not changed; the digest of all block digests."""

    digest: bytes


class Offer(Struct, frozen=True, gc=False, tag="offer", array_like=True):
    """The first that a reader gets: what the file is."""

    source: Source


class Want(Struct, frozen=True, gc=False, tag="want", array_like=True):
    """The first that a receiving end says.

    :ivar ranges: first block and count, in order, of the blocks to send.
    :ivar window: bytes that may be on the way without a `Got`; one block always may.
    """

    ranges: list[tuple[int, int]]
    window: int


class Got(Struct, frozen=True, gc=False, tag="got", array_like=True):
    """So many bytes of blocks were written down; whether they came right is seen when they are read from the disk."""

    octets: int


class Again(Struct, frozen=True, gc=False, tag="again", array_like=True):
    """These blocks were wrong when they came, or are wrong on the disk: they are wanted (again)."""

    blocks: list[int]


class Receipt(Struct, frozen=True, gc=False, tag="receipt", array_like=True):
    """The file is in place, durably, and has this digest as read from the receiving end's disk."""

    digest: bytes
    size: int


Sent = Offer | Block | Same | Holes | Whole
Answer = Want | Got | Again | Receipt


class SmallFile(Struct, frozen=True, gc=False, tag="file", array_like=True):
    """A whole file of at most 64 KiB."""

    path: str
    mtime_ns: int
    mode: int
    digest: bytes
    data: bytes


class Missing(Struct, frozen=True, gc=False, tag="missing", array_like=True):
    """In place of a small file that cannot be had, is too large, or changes: `Files.read` says why."""

    path: str


class Outcome(enum.IntEnum):
    """What became of a small file."""

    STORED = 0
    """It is in place, durably, as verified from the disk."""
    REFUSED = 1
    """There is no such path to write to."""
    CORRUPT = 2
    """It came, or was written, with another digest."""
    TOO_LARGE = 3
    OVER_QUOTA = 4
    READ_ONLY = 5
    NO_SPACE = 6


class Verified(Struct, frozen=True):
    """The digest of a file as it is on the server's disk.

    :ivar digest: the digest of all block digests, which tells two contents apart as any digest does.
    """

    digest: bytes
    block_size: int
    size: int
    mtime_ns: int


# Within `Files` the name `list` is that of a method.
Paths = list[str]
Digests = list[bytes]
Outcomes = list[Outcome]
SmallFiles = list[SmallFile]
Found = list[SmallFile | Missing]

_READING = [NoSuchPath, DigestUnavailable, SourceChanged, BadTransfer]
_STORING = [
    NoSuchPath,
    ReadOnly,
    FileTooLarge,
    OverQuota,
    OutOfSpace,
    DigestUnavailable,
    CorruptCopy,
    Superseded,
    BadTransfer,
]


class Files(Protocol):
    """What a server of files answers."""

    @request(idempotent=True, raises=[NoSuchPath], timeout=60.0)
    async def stat(self, path: str) -> Entry:
        """What is at a path.

        :raises NoSuchPath: nothing that the caller may have.
        """
        raise NotImplementedError

    @request(idempotent=True, raises=[NoSuchPath])
    def list(self, path: str = "", recursive: bool = False) -> AsyncIterator[Entry]:
        """What is in a directory, by name; and with ``recursive`` what is below, each directory before its entries.

        What the caller may not have is left out, as if it were not there.  A directory that the server itself cannot
        read is among the entries, and marked.

        :raises NoSuchPath: it is no directory that the caller may have.
        """
        raise NotImplementedError

    @request(raises=_READING)
    def read(self, path: str, digest: Digest, answers: AsyncIterator[Answer]) -> AsyncIterator[Sent]:
        """Copies a file to the caller: an `Offer`, and when the caller has said what it wants, that."""
        raise NotImplementedError

    @request(raises=_STORING)
    def write(self, path: str, source: Source, sent: AsyncIterator[Sent]) -> AsyncIterator[Answer]:
        """Copies a file from the caller: a `Want`, and when all is there and in its place, a `Receipt`."""
        raise NotImplementedError

    @request(raises=[NoSuchPath, DigestUnavailable, BadTransfer])
    def read_many(self, paths: AsyncIterator[Paths], digest: Digest) -> AsyncIterator[Found]:
        """Copies small files to the caller, in the order of the paths, of which an item has 1024 at most."""
        raise NotImplementedError

    @request(raises=[DigestUnavailable, BadTransfer])
    def write_many(self, files: AsyncIterator[SmallFiles], digest: Digest) -> AsyncIterator[Outcomes]:
        """Copies small files from the caller, of which an item has 1024 at most.

        What became of each is told in order, once it is durable.
        """
        raise NotImplementedError

    @request(idempotent=True, raises=[*_READING], timeout=_LONG)
    async def verify(self, path: str, digest: Digest = Digest.SHA256, block_size: int = 0) -> Verified:
        """The digest of a file, read from the disk now.

        :param block_size: that of the digest; 0 for what the server takes for a file of this size.
        """
        raise NotImplementedError

    @request(idempotent=True, raises=[DigestUnavailable, BadTransfer], timeout=60.0)
    async def verify_many(self, paths: Paths, digest: Digest = Digest.SHA256) -> Digests:
        """The digests of small files, 1024 at the most, in the order of the paths.

        Empty for one that cannot be had, is larger than 64 KiB, or changes meanwhile: `verify` says why.
        """
        raise NotImplementedError

    @request(raises=[NoSuchPath, ReadOnly, NotEmpty], timeout=60.0)
    async def remove(self, path: str) -> None:
        """Removes a file, or a directory that is empty."""
        raise NotImplementedError

    @request(raises=[NoSuchPath, ReadOnly], timeout=60.0)
    async def rename(self, path: str, to: str) -> None:
        """Renames a file or a directory; a file that has the new name is replaced."""
        raise NotImplementedError

    @request(idempotent=True, raises=[NoSuchPath, ReadOnly, Exists, OutOfSpace], timeout=60.0)
    async def mkdir(self, path: str, parents: bool = False) -> None:
        """Makes a directory; with ``parents`` those above it too, and one that is there is none too many."""
        raise NotImplementedError
