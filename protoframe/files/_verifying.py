"""The digests of files as they are on the disk, at either end.

Knows how a file is read for its digest alone, by calls that block; not whose it is, nor what it is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence

from protoframe.files._contract import Digest, SourceChanged
from protoframe.files._small import SMALL
from protoframe.files._source import SourceFile
from protoframe.files._tree import Tree

__all__ = ["small_digests"]


def small_digests(tree: Tree, paths: Sequence[str], digest: Digest) -> list[bytes]:
    """The whole digests of small files; empty for one that cannot be had, is larger than 64 KiB, or changes meanwhile.

    :raises DigestUnavailable: this end cannot compute the digest.
    """
    return [_small_digest(tree, path, digest) for path in paths]


def _small_digest(tree: Tree, path: str, digest: Digest) -> bytes:
    try:
        source = SourceFile(tree.open_file(path), digest)
    except (OSError, ValueError):
        return b""
    try:
        if source.source.size > SMALL:
            return b""
        source.stretch(0, bytearray(source.blocks.count), SMALL)
        return source.whole()
    except (OSError, SourceChanged):
        return b""
    finally:
        source.close()
