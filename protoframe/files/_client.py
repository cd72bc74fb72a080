"""`FileClient`: copies files to and from a server of files, through interruptions of either end.

Knows one connection that is made again, and the copy of one file; trees are `protoframe.files._trees`'s.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.task import deferLater
from twisted.logger import Logger

from protoframe import Backoff, Client, DeadlineExceeded, Error, Limits, RetryPolicy, Token, Unavailable, remaining
from protoframe.files._blocks import digest_function
from protoframe.files._contract import (
    FILES_LIMITS,
    Answer,
    BadTransfer,
    Block,
    CorruptCopy,
    Digest,
    Entry,
    Files,
    Got,
    Kind,
    NoSuchPath,
    Offer,
    Receipt,
    Source,
    Verified,
    Want,
)
from protoframe.files._copying import Receiver, Sender, whole_digest
from protoframe.files._disk import Disk, ended
from protoframe.files._partial import Partial, clean_partials
from protoframe.files._progress import Change, Meter, Pace, Progress, Summary
from protoframe.files._source import SourceFile
from protoframe.files._tree import Tree
from protoframe.files._trees import Direction, TreeCopy

__all__ = ["FileClient"]

_log = Logger(namespace="protoframe.files")

T = TypeVar("T")


class FileClient:
    """Copies files and trees, verified at both ends; used as ``async with FileClient(reactor, where) as files:``.

    Entering fails as `connect` does where no server can be reached.  From then on a copy that is cut off goes on from
    what was verified, over the next connection.

    :param where: the server, as `protoframe.Client` takes it.
    :param token: shows the server who calls.
    :param digest: how contents are verified.
    :param at_once: how many large files are copied at the same time.
    :param bandwidth: bytes of contents a second, all copies together; ``None`` for as many as go.
    :param tries: how often in a row a copy may be cut off without that anything more of it arrived.
    :param backoff: how long to wait before the next try, and before the server is tried again.
    :param observer: called with `Progress`, ten times a second at most.
    :param threads: for disk work; 0 does it in the reactor's thread, which is for simulated time.
    :param limits: what this end takes of the server.
    :param keep_partials: seconds for which an unfinished copy at this end is kept that nobody goes on with.
    :raises ValueError: ``where`` is wrong, or a number is out of its bounds.
    :raises DigestUnavailable: this end cannot compute the digest.
    :ivar files: the proxy of the server.
    """

    def __init__(
        self,
        reactor: Any,
        where: str | IStreamClientEndpoint,
        *,
        token: Token | None = None,
        digest: Digest = Digest.SHA256,
        at_once: int = 4,
        bandwidth: float | None = None,
        tries: int = 10,
        backoff: Backoff | None = None,
        observer: Callable[[Progress], None] | None = None,
        threads: int = 4,
        limits: Limits = FILES_LIMITS,
        keep_partials: float = 7 * 86400.0,
    ) -> None:
        if at_once < 1 or tries < 1 or (bandwidth is not None and not bandwidth > 0):
            raise ValueError("at_once and tries are 1 or more, and a bandwidth is above 0")
        digest_function(digest)
        self.reactor = reactor
        self.digest = digest
        self.at_once = at_once
        self.keep_partials = keep_partials
        self._tries = tries
        self._backoff = backoff if backoff is not None else Backoff(first=0.1, factor=2.0, longest=10.0)
        self._observer = observer
        self._client = Client(
            reactor,
            where,
            Files,
            limits=limits,
            token=token,
            reconnect=self._backoff,
            retry=RetryPolicy(attempts=3),
        )
        self.files: Files = self._client.proxy
        self.disk = Disk(reactor, threads)
        self.pace = Pace(reactor, bandwidth)

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._client.stopService()
        await self.disk.close()

    # What there is, and changes of it.

    def list(self, path: str = "", *, recursive: bool = False) -> AsyncIterator[Entry]:
        """What is in a directory of the server, by name; with ``recursive`` what is below as well.

        :raises NoSuchPath: there is no such directory.
        """
        return self.files.list(path, recursive=recursive)

    async def stat(self, path: str) -> Entry:
        """What is at a path of the server.

        :raises NoSuchPath: nothing.
        """
        return await self.files.stat(path)

    async def verify(self, path: str) -> Verified:
        """The digest of a file, as the server reads it from its disk now.

        :raises NoSuchPath: there is no such file.
        """
        return await self.files.verify(path, self.digest)

    async def verify_local(self, path: str, block_size: int = 0) -> Verified:
        """The digest of a file of this end, as it is read from the disk now.

        :param block_size: that of the digest; 0 for what is taken for a file of this size.
        :raises OSError: it cannot be read.
        :raises SourceChanged: it changed meanwhile.
        :raises ValueError: a file of this size has no such blocks.
        """
        directory, name = _place(path, follow=True)
        tree = Tree(directory)
        try:
            return await self.digest_of(tree, name, block_size)
        finally:
            tree.close()

    async def remove(self, path: str) -> None:
        """Removes a file of the server, or a directory that is empty."""
        await self.files.remove(path)

    async def rename(self, path: str, to: str) -> None:
        """Renames a file or a directory of the server."""
        await self.files.rename(path, to)

    async def mkdir(self, path: str, *, parents: bool = False) -> None:
        """Makes a directory at the server."""
        await self.files.mkdir(path, parents=parents)

    # Copies.

    async def put(self, local: str, remote: str, *, by_digest: bool = False) -> Summary:
        """Copies a file, or a tree, to the server.

        :param remote: the path that it is to have there; of a tree it may be the root (``""``).
        :param by_digest: whether a file that has the same contents there is left alone; of a tree see `sync`.
        :raises OSError: there is no such file here.
        :raises Error: a file could not be copied; of a tree no file raises this: ``failed`` of the `Summary` tells.
        """
        if _is_directory(local):
            return await self._tree_copy(local, remote, Direction.PUT, differing=False, by_digest=False, delete=False)
        meter = self._meter()
        directory, name = _place(local, follow=True)
        tree = Tree(directory)
        try:
            size = os.stat(local).st_size
            meter.files_total, meter.octets_total = 1, size
            if not by_digest or not await self._is_same(tree, name, remote, meter):
                await self.put_file(tree, name, remote, meter)
        finally:
            tree.close()
        return meter.summary()

    async def get(self, remote: str, local: str, *, by_digest: bool = False) -> Summary:
        """Copies a file, or a tree, from the server.

        :param local: the path that it is to have here; an existing directory is copied into only if it is a tree.
        :param by_digest: whether a file that has the same contents here is left alone; of a tree see `sync`.
        :raises OSError: it cannot be written here.
        :raises Error: a file could not be copied; of a tree no file raises this: ``failed`` of the `Summary` tells.
        """
        meter = self._meter()
        entry = await self.persist(lambda: self.stat(remote), meter)
        if entry.kind is Kind.DIRECTORY:
            return await self._tree_copy(local, remote, Direction.GET, differing=False, by_digest=False, delete=False)
        directory, name = _place(local, follow=False)
        tree = Tree(directory)
        try:
            meter.files_total, meter.octets_total = 1, entry.size
            await self.disk.run(clean_partials, tree, self.keep_partials)
            if not by_digest or not await self._is_same(tree, name, remote, meter):
                await self.get_file(remote, tree, name, meter)
        finally:
            tree.close()
        return meter.summary()

    async def sync(
        self,
        local: str,
        remote: str,
        *,
        direction: Direction = Direction.PUT,
        by_digest: bool = False,
        delete: bool = False,
        dry_run: Callable[[Change], None] | None = None,
    ) -> Summary:
        """Makes one tree like the other, and copies only what differs.

        What is at both ends and of another kind, a file here and a directory there, is a problem of the `Summary`.
        So is all else that was not copied: the tree is there only if its ``failed`` is 0.

        :param direction: which end is made like the other.
        :param by_digest: whether files of one size are compared by their contents, rather than by their times.
        :param delete: whether what the source has not is removed; nothing is, at all, where a directory of the source
            could not be read.  What the server closes to this caller is not there: its copies here are removed.
        :param dry_run: nothing is changed, and this is called with each change that would be made; the `Summary` counts
            them as made.
        """
        if dry_run is None:
            return await self._tree_copy(local, remote, direction, differing=True, by_digest=by_digest, delete=delete)
        meter = self._meter()
        is_put = direction is Direction.PUT
        with tempfile.TemporaryDirectory() as nothing:
            is_there = await self._is_there(remote, meter) if is_put else _exists(local)
            tree = Tree(local if is_put or is_there else nothing)
            try:
                copy = TreeCopy(
                    self, tree, remote, direction, meter, by_digest=by_digest, delete=delete, dry_run=dry_run
                )
                await copy.run(differing=is_there)
            finally:
                tree.close()
        return meter.summary(one=False)

    async def _is_there(self, remote: str, meter: Meter) -> bool:
        try:
            await self.persist(lambda: self.stat(remote), meter)
        except NoSuchPath:
            return False
        return True

    async def _tree_copy(
        self, local: str, remote: str, direction: Direction, *, differing: bool, by_digest: bool, delete: bool
    ) -> Summary:
        if direction is Direction.GET:
            os.makedirs(local, exist_ok=True)
        tree = Tree(local)
        meter = self._meter()
        try:
            if direction is Direction.GET:
                await self.disk.run(clean_partials, tree, self.keep_partials)
            copy = TreeCopy(self, tree, remote, direction, meter, by_digest=by_digest, delete=delete)
            await copy.run(differing=differing)
        finally:
            tree.close()
        return meter.summary(one=False)

    def _meter(self) -> Meter:
        return Meter(self.reactor.seconds, self._observer)

    # One file, for trees too.

    async def digest_of(self, tree: Tree, name: str, block_size: int = 0) -> Verified:
        """The digest of a file of a tree of this end."""
        source = await self.disk.open(lambda: SourceFile(tree.open_file(name), self.digest, block_size))
        try:
            whole = await whole_digest(self.disk, source)
        finally:
            self.disk.run(source.close)
        return Verified(whole, source.source.block_size, source.source.size, source.source.mtime_ns)

    async def _is_same(self, tree: Tree, name: str, remote: str, meter: Meter) -> bool:
        """Whether a file has the same contents at both ends; what there is of it is counted as skipped then."""
        try:
            theirs = await self.persist(lambda: self.verify(remote), meter)
            ours = await self.digest_of(tree, name, theirs.block_size)
        except (NoSuchPath, FileNotFoundError, ValueError):
            # It is at one end only, or so much larger here that it can have no such blocks.
            return False
        if ours.digest != theirs.digest:
            return False
        meter.skipped += 1
        meter.digest = theirs.digest
        return True

    async def put_file(self, tree: Tree, name: str, remote: str, meter: Meter) -> None:
        """Copies one file to the server, through interruptions."""
        counted = _Counted(meter)
        source = await self.disk.open(lambda: SourceFile(tree.open_file(name), self.digest))
        meter.path = name
        try:
            # The digests that were computed are kept through interruptions, and computed again.
            meter.digest = await self._through(lambda: self._put_once(source, remote, counted), meter, counted)
        finally:
            self.disk.run(source.close)
        counted.settle(source.source.size)
        meter.done(name, source.source.size)

    async def _put_once(self, source: SourceFile, remote: str, counted: _Counted) -> bytes:
        facts = source.source
        sender = Sender(self.disk, source, pace=self.pace.take, sent=counted.moved)
        items = _Noted(sender.items())
        try:
            async with aclosing(cast("Any", self.files.write(remote, facts, items.run()))) as answers:
                async for answer in answers:
                    sender.answer(answer)
                    if isinstance(answer, Want):
                        counted.begin(facts.size - _wanted_size(answer, facts))
                    elif isinstance(answer, Got):
                        counted.got(answer.octets)
        except Exception:
            if items.error is not None and not isinstance(items.error, CancelledError):
                raise items.error from None
            raise
        finally:
            sender.fail(BadTransfer("the copy has ended"))
        if sender.receipt is None:
            raise BadTransfer("the server ended a copy without a receipt")
        if sender.receipt.digest != sender.whole:
            raise CorruptCopy("the server's receipt has another digest than the file")
        return sender.whole

    async def get_file(self, remote: str, tree: Tree, name: str, meter: Meter) -> None:
        """Copies one file from the server, through interruptions."""
        counted = _Counted(meter)
        meter.path = name
        receipt = await self._through(lambda: self._get_once(remote, tree, name, counted), meter, counted)
        counted.settle(receipt.size)
        meter.digest = receipt.digest
        meter.done(name, receipt.size)

    async def _get_once(self, remote: str, tree: Tree, name: str, counted: _Counted) -> Receipt:
        offered: Deferred[Receiver] = Deferred()
        answers = _Noted(_answers(offered))
        receiver: Receiver | None = None
        partial: Partial | None = None
        is_spoilt = False
        try:
            try:
                async with aclosing(cast("Any", self.files.read(remote, self.digest, answers.run()))) as sent:
                    async for item in sent:
                        if receiver is not None:
                            if isinstance(item, Block):
                                counted.moved(len(item.data))
                                await self.pace.take(len(item.data))
                            await receiver.feed(item)
                        elif isinstance(item, Offer) and item.source.digest is self.digest:
                            partial = await self.disk.open(Partial, tree, name, item.source)
                            receiver = Receiver(self.disk, partial, partial.commit, counted.begin, counted.got)
                            offered.callback(receiver)
                        else:
                            raise BadTransfer("the server offers no file, or another digest")
            except Exception:
                if receiver is not None and receiver.receipt is not None and partial is not None:
                    # Only the end of the conversation about it is missing.
                    return receiver.receipt
                if answers.error is not None and not isinstance(answers.error, CancelledError):
                    raise answers.error from None
                raise
        except CorruptCopy:
            is_spoilt = True
            raise
        finally:
            if receiver is not None:
                receiver.fail(BadTransfer("the copy has ended"))
            elif not offered.called:
                offered.cancel()
            if partial is not None:
                await ended(self.disk.run(partial.discard if is_spoilt else partial.close))
        if receiver is None or receiver.receipt is None or partial is None:
            raise BadTransfer("the server ended a copy before it was whole")
        return receiver.receipt

    async def _through(self, attempt: Callable[[], Awaitable[T]], meter: Meter, counted: _Counted) -> T:
        """Copies one file, through interruptions."""
        try:
            return await self.persist(attempt, meter, lambda: counted.most)
        except CancelledError:
            # Who gives up is told what is there, to be gone on with.
            raise
        except BaseException:
            counted.settle(0)
            raise

    async def persist(
        self,
        attempt: Callable[[], Awaitable[T]],
        meter: Meter,
        progress: Callable[[], int] = lambda: 0,
    ) -> T:
        """Does something again when it was cut off, as long as something comes of it.

        :param progress: a number that grows.
        :raises Unavailable: nothing more came of so many tries.
        """
        failures = 0
        before = progress()
        while True:
            try:
                return await attempt()
            except Error as error:
                if not self.is_cut_off(error):
                    raise
                now = progress()
                failures = 1 if now > before else failures + 1
                before = max(now, before)
                if failures >= self._tries or not self._client.running:
                    if isinstance(error, Unavailable):
                        raise
                    raise Unavailable(error.message) from None
                meter.interruptions += 1
                _log.debug("a copy is cut off, and goes on: {error}", error=error)
            await self.reconnected(failures)

    @staticmethod
    def is_cut_off(error: Error) -> bool:
        """Whether something failed because the connection was lost, or there is no server for a while."""
        # A call waits for a server no longer than for an answer; whoever surrounds it with a deadline has that.
        return isinstance(error, Unavailable) or (
            isinstance(error, DeadlineExceeded) and not error.may_have_run and remaining() is None
        )

    async def reconnected(self, failures: int) -> None:
        """Waits before the next try, and for a server."""
        waiting: Deferred[None] = deferLater(
            self.reactor,
            self._backoff.seconds(failures, random.random()),  # noqa: S311 - it spreads load
        )
        await waiting
        try:
            await self._client.whenConnected()
        except Error as error:
            if not self.is_cut_off(error):
                raise
            # The next attempt says so.


class _Counted:
    """What is known of one file, through all attempts.

    :ivar most: bytes that were there, or written down, at the receiving end, at the most.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._now = 0
        self._begun = False
        self.most = 0

    def moved(self, octets: int) -> None:
        """A block goes over the network."""
        self._meter.move(octets)

    def begin(self, octets: int) -> None:
        """An attempt begins with so many bytes."""
        self.settle(octets)
        if not self._begun:
            self._begun = True
            self.most = octets

    def got(self, octets: int) -> None:
        """The receiving end has so many more."""
        self.settle(self._now + octets)
        if self._now > self.most:
            self._meter.fresh += self._now - self.most
            self.most = self._now

    def settle(self, octets: int) -> None:
        """So many bytes of the file are done."""
        change, self._now = octets - self._now, octets
        self._meter.advance(change)


class _Noted:
    """A stream that this end sends, and what ended it: to whoever reads the answer that is told as the end of a call.

    :ivar error: what it raised.
    """

    def __init__(self, items: AsyncIterator[Any]) -> None:
        self._items = items
        self.error: Exception | None = None

    async def run(self) -> AsyncIterator[Any]:
        """The items."""
        try:
            async with aclosing(cast("Any", self._items)) as items:
                async for item in items:
                    yield item
        except Exception as error:
            self.error = error
            raise


async def _answers(offered: Deferred[Receiver]) -> AsyncIterator[Answer]:
    receiver = await offered
    async with aclosing(cast("Any", receiver.answers())) as answers:
        async for answer in answers:
            yield answer


def _wanted_size(want: Want, source: Source) -> int:
    size = source.block_size
    return sum(min(source.size, (first + count) * size) - first * size for first, count in want.ranges)


def _is_directory(path: str) -> bool:
    return os.path.isdir(path)


def _exists(path: str) -> bool:
    return os.path.lexists(path)


def _place(path: str, *, follow: bool) -> tuple[str, str]:
    """The directory of a path of this end, and the name in it."""
    return os.path.split(os.path.realpath(path) if follow else os.path.abspath(path))
