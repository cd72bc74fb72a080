"""A server of files and a client of it, in one process, for tests."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from twisted.internet import reactor

from protoframe import listen
from protoframe.files import FileClient
from protoframe.servers.files import FilesFactory

MIB = 1024 * 1024


def content(size: int, seed: int = 1) -> bytes:
    """Bytes that do not repeat from block to block."""
    return hashlib.shake_128(seed.to_bytes(8, "big")).digest(size)


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def contents(root: Path) -> dict[str, bytes]:
    """All files below a directory, unfinished ones left out."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".pf-files" not in path.parts
    }


def leftovers(root: Path) -> list[str]:
    """What is in the hidden directory."""
    hidden = root / ".pf-files"
    return sorted(os.listdir(hidden)) if hidden.exists() else []


class Ends:
    """The two ends.

    :ivar root: what is served.
    :ivar local: a directory of the client's.
    """

    def __init__(self, root: Path, local: Path, factory: FilesFactory, client: FileClient) -> None:
        self.root = root
        self.local = local
        self.factory = factory
        self.client = client

    def cut(self) -> None:
        """The connection is lost."""
        for connection in self.factory.connections:
            connection.close()


@asynccontextmanager
async def ends(directory: Path, *, client: Any = None, factory: Any = None, **options: Any) -> AsyncIterator[Ends]:
    root, local = directory / "root", directory / "local"
    root.mkdir(exist_ok=True)
    local.mkdir(exist_ok=True)
    made = (factory or FilesFactory)(reactor, str(root), **options)
    port = await listen(reactor, "tcp:0:interface=127.0.0.1", made)
    try:
        async with FileClient(reactor, f"tcp:127.0.0.1:{port.getHost().port}", **(client or {})) as copies:
            yield Ends(root, local, made, copies)
    finally:
        await port.stopListening()
        await made.drain(0)
        await made.close()
