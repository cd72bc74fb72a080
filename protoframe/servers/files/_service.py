"""What answers `Files`: permissions, limits and errors around a tree.

Knows calls; how a copy goes is `protoframe.files`'s, at both ends.  Whatever is not there, or not for the caller, or no
file or directory, is one and the same error.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import aclosing
from typing import Any, TypeVar, cast

from msgspec import structs
from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from protoframe import Factory, Limits, TryLater, current_call
from protoframe.files import (
    FILES_LIMITS,
    Answer,
    BadTransfer,
    CorruptCopy,
    Digest,
    Entry,
    Exists,
    Files,
    FileTooLarge,
    Kind,
    Missing,
    NoSuchPath,
    NotEmpty,
    Outcome,
    OutOfSpace,
    OverQuota,
    ReadOnly,
    Sent,
    SmallFile,
    Source,
    Superseded,
    Verified,
    split_path,
)
from protoframe.files._batches import Batches, in_items, read_ahead
from protoframe.files._blocks import is_block_size, transfer_key
from protoframe.files._contract import Digests, Found, Outcomes, Paths, SmallFiles
from protoframe.files._copying import Receiver, Sender, pump, whole_digest
from protoframe.files._disk import Disk, ended
from protoframe.files._partial import Partial, clean_partials, unfinished
from protoframe.files._small import BatchWriter
from protoframe.files._source import SourceFile
from protoframe.files._system import FULL
from protoframe.files._tree import Tree, size_at
from protoframe.files._verifying import small_digests
from protoframe.servers.files._access import Access, Quota

__all__ = ["FilesFactory", "FilesService"]

_log = Logger(namespace="protoframe.files")

T = TypeVar("T")
F = TypeVar("F", Partial, SourceFile)

#: Bytes of one file, unless told otherwise.
MAX_FILE = 1 << 40
#: Seconds for which an unfinished copy is kept, unless told otherwise.
KEEP_PARTIALS = 7 * 86400.0
#: Seconds between two looks for old ones.
_CLEANING = 3600.0
#: Files that are written at once; each holds the digests of its blocks, up to 17 MB for a file of 1 TiB.
_MOST_COPIES = 64
#: Paths that one message may ask for.
_MOST_PATHS = 1024

#: Faults of the machine, of which the caller hears that there was one.
_FAULTS = frozenset({errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EBADF, errno.EROFS, errno.ESTALE})


class _Copy:
    """A copy that is being written."""

    def __init__(self) -> None:
        self.receiver: Receiver | None = None
        self.is_superseded = False
        self.over: Deferred[None] = Deferred()

    def supersede(self) -> None:
        self.is_superseded = True
        if self.receiver is not None:
            self.receiver.fail(Superseded("this copy was begun anew"))


class FilesFactory(Factory):
    """Serves the files below a directory.

    :param reactor: runs the threads' results and the cleaning.
    :param root: the directory.
    :param access: who may do what.
    :param quota: bytes that all files may have together.
    :param max_file: bytes that one may have.
    :param keep_partials: seconds for which an unfinished copy is kept that nobody goes on with.
    :param threads: for disk work; 0 does it in the reactor's thread, which is for simulated time.
    :param limits: as `Factory` takes them.
    :param options: what else `Factory` takes.
    :raises OSError: the root cannot be opened.
    """

    def __init__(
        self,
        reactor: Any,
        root: str,
        *,
        access: Access | None = None,
        quota: int | None = None,
        max_file: int = MAX_FILE,
        keep_partials: float = KEEP_PARTIALS,
        threads: int = 4,
        limits: Limits = FILES_LIMITS,
        **options: Any,
    ) -> None:
        super().__init__(FilesService, reactor=reactor, limits=limits, **options)
        self.tree = Tree(root)
        self.disk = Disk(reactor, threads)
        self.access = access if access is not None else Access()
        #: Bytes that unfinished copies take, by their keys: they count until they are gone on with, or removed.
        self.kept = unfinished(self.tree) if quota is not None and not self.access.read_only else {}
        self.quota = Quota(quota, self.tree.usage() + sum(self.kept.values()) if quota is not None else 0)
        self.max_file = max_file
        self.copies: dict[tuple[str, Source], _Copy] = {}
        self._keep = keep_partials
        self._cleaning = LoopingCall(self._clean)
        self._cleaning.clock = reactor

    def create(self, protocol: type[Any]) -> Any:
        """Makes the instance that serves one conversation."""
        return protocol(self) if issubclass(protocol, FilesService) else protocol()

    def start_cleaning(self) -> None:
        """Removes unfinished copies that are old, now and from time to time."""
        if not self._cleaning.running and not self.access.read_only:
            self._cleaning.start(_CLEANING)

    def close(self) -> Deferred[None]:
        """Lets go of the tree, when nobody is connected any more; fires when unfinished copies may be gone on with."""
        if self._cleaning.running:
            self._cleaning.stop()
        return self.disk.close().addCallback(lambda _: self.tree.close())

    def _clean(self) -> Deferred[Any]:
        cleaning: Deferred[Any] = self.disk.run(clean_partials, self.tree, self._keep)
        cleaning.addCallback(lambda _: self.disk.run(unfinished, self.tree))
        cleaning.addCallback(self._forget_removed)
        cleaning.addErrback(lambda failure: _log.failure("old unfinished copies cannot be removed", failure))
        return cleaning

    def _forget_removed(self, there: dict[str, int]) -> None:
        for key in self.kept.keys() - there.keys():
            self.quota.give_back(self.kept.pop(key))


class FilesService(Files, name="Files"):
    """Answers `Files` for one conversation."""

    def __init__(self, store: FilesFactory) -> None:
        self._store = store
        self._disk = store.disk
        self._tree = store.tree

    async def stat(self, path: str) -> Entry:
        """What is at a path."""
        self._checked(path)
        return await self._work(self._tree.stat, path)

    async def list(self, path: str = "", recursive: bool = False) -> AsyncIterator[Entry]:
        """What is in a directory, and below."""
        permissions = _permissions()
        self._checked(path)
        # Iterators of directories, the innermost last.
        waiting = [iter(await self._work(self._tree.names, path))]
        while waiting:
            entry = next(waiting[-1], None)
            if entry is None:
                waiting.pop()
                continue
            if not self._store.access.may_read(split_path(entry.path) or (), permissions):
                continue
            if recursive and entry.kind is Kind.DIRECTORY:
                try:
                    waiting.append(iter(await self._disk.run(self._tree.names, entry.path)))
                except (FileNotFoundError, NotADirectoryError):
                    # It is gone meanwhile, or so deep that nothing in it has a path.
                    pass
                except OSError as error:
                    if error.errno in _FAULTS:
                        raise
                    # Not the same as empty: who makes another tree like this one would remove what is in it.
                    entry = structs.replace(entry, is_readable=False)
            yield entry

    async def read(self, path: str, digest: Digest, answers: AsyncIterator[Answer]) -> AsyncIterator[Sent]:
        """Copies a file to the caller."""
        self._checked(path)
        source = await self._opened(lambda: SourceFile(self._tree.open_file(path), digest))
        sender = Sender(self._disk, source, offer=True)
        pumping = pump(answers, sender.answer, sender)
        try:
            async with aclosing(cast("Any", sender.items())) as items:
                async for item in items:
                    yield item
        except OSError as error:
            raise _told(error) from None
        finally:
            pumping.cancel()
            self._disk.run(source.close)

    async def write(self, path: str, source: Source, sent: AsyncIterator[Sent]) -> AsyncIterator[Answer]:
        """Copies a file from the caller."""
        store = self._store
        if not self._checked(path, write=True):
            raise _no_such_path()
        if source.size > store.max_file:
            raise FileTooLarge(f"a file may have {store.max_file} bytes", limit=store.max_file)
        if not 0 <= source.mtime_ns < 1 << 63:
            raise BadTransfer("no file is of that time")
        key = (path, source)
        while (before := store.copies.get(key)) is not None:
            before.supersede()
            over: Deferred[None] = Deferred()
            before.over.chainDeferred(over)
            await over
        if len(store.copies) >= _MOST_COPIES:
            raise TryLater(retry_after=1.0)
        copy = store.copies[key] = _Copy()
        reserved = 0
        is_spoilt = False
        partial: Partial | None = None
        pumping: Deferred[None] | None = None
        try:
            name = transfer_key(path, source)
            if store.kept.pop(name, None) is None:
                store.quota.take(source.size)
            reserved = source.size
            partial = await self._opened(self._partial, path, source)

            def committed(replaced: int) -> None:
                nonlocal reserved
                reserved = 0
                store.quota.give_back(replaced)

            receiver = copy.receiver = Receiver(self._disk, partial, lambda: _commit(partial, committed))
            if copy.is_superseded:
                copy.supersede()
            pumping = pump(sent, receiver.feed, receiver)
            async with aclosing(cast("Any", receiver.answers())) as answers:
                async for answer in answers:
                    yield answer
        except OSError as error:
            raise _told(error) from None
        except CorruptCopy:
            is_spoilt = True
            raise
        finally:
            if pumping is not None:
                pumping.cancel()
            try:
                if partial is not None:
                    await ended(self._disk.run(partial.discard if is_spoilt else partial.close))
            finally:
                if partial is not None and reserved and not is_spoilt and store.quota.limit is not None:
                    # What was written stays, to be gone on with, and takes room.
                    store.kept[partial.key] = reserved
                else:
                    store.quota.give_back(reserved)
                del store.copies[key]
                copy.over.callback(None)

    async def read_many(self, paths: AsyncIterator[Paths], digest: Digest) -> AsyncIterator[Found]:
        """Copies small files to the caller."""
        permissions = _permissions()
        may_read = self._store.access.may_read
        async for some in paths:
            if len(some) > _MOST_PATHS:
                raise BadTransfer(f"{_MOST_PATHS} paths may be asked for at a time")
            allowed = [path for path in some if (parts := split_path(path)) and may_read(parts, permissions)]
            waiting = iter(some)
            async with aclosing(cast("Any", read_ahead(self._disk, self._tree, allowed, digest))) as reading:
                async for files in reading:
                    found: Found = []
                    for file in files:
                        while (path := next(waiting)) != file.path:
                            found.append(Missing(path))
                        found.append(file)
                    for together in in_items(found):
                        yield together
            missing: Found = [Missing(path) for path in waiting]
            if missing:
                yield missing

    async def write_many(self, files: AsyncIterator[SmallFiles], digest: Digest) -> AsyncIterator[Outcomes]:
        """Copies small files from the caller."""
        store = self._store
        permissions = _permissions()
        access, quota, max_file = store.access, store.quota, store.max_file

        def judge(file: SmallFile) -> Outcome | None:
            parts = split_path(file.path)
            try:
                if not parts:
                    return Outcome.REFUSED
                access.check(parts, permissions, write=True)
                if len(file.data) > max_file:
                    return Outcome.TOO_LARGE
                quota.take(len(file.data))
            except NoSuchPath:
                return Outcome.REFUSED
            except ReadOnly:
                return Outcome.READ_ONLY
            except OverQuota:
                return Outcome.OVER_QUOTA
            return None

        if access.read_only:
            async for some in files:
                yield [judge(file) or Outcome.READ_ONLY for file in some]
            return
        writer = await self._disk.open(BatchWriter, self._tree, digest, judge, quota.give_back)
        batches = Batches(self._disk, writer)

        async def fill() -> None:
            try:
                async for some in files:
                    if len(some) > _MOST_PATHS:
                        raise BadTransfer(f"{_MOST_PATHS} files may come at a time")
                    if (full := batches.feed(some)) is not None:
                        await full
            except BaseException as error:
                batches.fail(error)
            else:
                batches.end()

        filling = Deferred.fromCoroutine(fill())
        try:
            async with aclosing(cast("Any", batches.outcomes())) as outcomes:
                async for told in outcomes:
                    yield told
        finally:
            filling.cancel()

    async def verify(self, path: str, digest: Digest = Digest.SHA256, block_size: int = 0) -> Verified:
        """The digest of a file, read from the disk now."""
        self._checked(path)
        if block_size and not is_block_size(block_size):
            raise BadTransfer(f"no block has {block_size} bytes")
        source = await self._opened(lambda: _source(self._tree, path, digest, block_size))
        try:
            whole = await whole_digest(self._disk, source)
        except OSError as error:
            raise _told(error) from None
        finally:
            self._disk.run(source.close)
        facts = source.source
        return Verified(whole, facts.block_size, facts.size, facts.mtime_ns)

    async def verify_many(self, paths: Paths, digest: Digest = Digest.SHA256) -> Digests:
        """The digests of small files, read from the disk now."""
        if len(paths) > _MOST_PATHS:
            raise BadTransfer(f"{_MOST_PATHS} paths may be asked for at a time")
        permissions = _permissions()
        may_read = self._store.access.may_read
        allowed = [path for path in paths if (parts := split_path(path)) and may_read(parts, permissions)]
        found = dict(zip(allowed, await self._disk.run(small_digests, self._tree, allowed, digest), strict=True))
        return [found.get(path, b"") for path in paths]

    async def remove(self, path: str) -> None:
        """Removes a file, or a directory that is empty."""
        parts = self._checked(path, write=True)
        if not parts or self._store.access.is_guarded(parts):
            raise _no_such_path()
        entry = await self._work(self._tree.remove, path)
        self._store.quota.give_back(entry.size)

    async def rename(self, path: str, to: str) -> None:
        """Renames a file or a directory."""
        for parts in (self._checked(path, write=True), self._checked(to, write=True)):
            if not parts or self._store.access.is_guarded(parts):
                raise _no_such_path()
        self._store.quota.give_back(await self._work(self._tree.rename, path, to))

    async def mkdir(self, path: str, parents: bool = False) -> None:
        """Makes a directory."""
        if not self._checked(path, write=True):
            if parents:
                return
            raise _no_such_path()
        await self._work(lambda: self._tree.mkdir(path, parents=parents))

    def _checked(self, path: str, *, write: bool = False) -> Sequence[str]:
        """The components of a path that the caller may use.

        :raises NoSuchPath: there is nothing for it.
        :raises ReadOnly: there is, for reading.
        """
        parts = split_path(path)
        if parts is None:
            raise _no_such_path()
        self._store.access.check(parts, _permissions(), write=write)
        return parts

    def _partial(self, path: str, source: Source) -> Partial:
        directory = path.rpartition("/")[0]
        if directory:
            self._tree.mkdir(directory, parents=True)
        with self._tree.parent(path) as (fd, name):
            size_at(fd, name)
        return Partial(self._tree, path, source)

    async def _opened(self, function: Callable[..., F], *arguments: Any) -> F:
        try:
            return await self._disk.open(function, *arguments)
        except OSError as error:
            raise _told(error) from None

    async def _work(self, function: Callable[..., T], *arguments: Any) -> T:
        try:
            return await self._disk.run(function, *arguments)
        except OSError as error:
            raise _told(error) from None


def _permissions() -> Collection[str]:
    identity = current_call().identity
    return identity.permissions if identity is not None else ()


def _source(tree: Tree, path: str, digest: Digest, block_size: int) -> SourceFile:
    try:
        return SourceFile(tree.open_file(path), digest, block_size)
    except ValueError as error:
        raise BadTransfer(str(error)) from None


def _commit(partial: Partial | None, committed: Callable[[int], None]) -> None:
    if partial is not None:
        partial.commit(committed)


def _no_such_path() -> NoSuchPath:
    return NoSuchPath("no such path")


def _told(error: OSError) -> Exception:
    """What a caller may know of a failure of the disk."""
    if error.errno in FULL:
        return OutOfSpace("the disk is full")
    if error.errno == errno.ENOTEMPTY:
        return NotEmpty("the directory has something in it")
    if error.errno == errno.EEXIST:
        return Exists("something is there already")
    if error.errno in _FAULTS:
        return error
    return _no_such_path()
