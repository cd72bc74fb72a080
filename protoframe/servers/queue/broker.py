"""The broker: which queue is in which store, who consumes it, and what is stored together.

Knows queues by their names, and stores by `IStore`; not how messages are kept, nor what carries calls here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

import msgspec
from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from protoframe import Error
from protoframe.queue import (
    DeliveryPolicy,
    DifferentSettings,
    InvalidSettings,
    Message,
    NoSuchGroup,
    NoSuchQueue,
    NotEmpty,
    Order,
    Overloaded,
    Receipt,
    Settings,
    Settled,
    Statistics,
    Storage,
    StoreFailed,
    Tag,
    TooMany,
    Waiting,
)
from protoframe.servers.queue.consumers import Consumer, Group
from protoframe.servers.queue.rates import Rate
from protoframe.servers.queue.selector import Selector
from protoframe.servers.queue.store import Action, IStore, IStoreListener, Verdict

__all__ = ["Broker"]

_log = Logger(namespace="protoframe.queue")
_T = TypeVar("_T")

#: Octets of bodies that a look into a queue reads at a time.
_PAGE = 1024 * 1024
#: Seconds between two looks for queues that nobody uses.
_LOOK_EVERY = 1.0
#: Seconds after which a publisher that came too much may come again.
_RETRY_AFTER = 0.1


class _Gathering:
    """Publications of a queue that wait to be stored together.

    :ivar calls: the messages of each call, and what it waits for.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Sequence[Message], Deferred[list[Receipt]]]] = []
        self.count = 0
        self.octets = 0
        self.timer: Any = None


class _Queue:
    """A queue, as far as it is not in the store.

    :ivar used: when it was used last.
    :ivar is_going: whether it is being deleted, because nobody uses it.
    """

    def __init__(self, reactor: Any, store: IStore, name: str, settings: Settings, clock: Callable[[], float]) -> None:
        self.store = store
        self.name = name
        self.published = Rate(clock)
        self.used = clock()
        self.is_going = False
        self.gathering = _Gathering()
        self.groups: dict[str, Group] = {}
        self._reactor = reactor
        self._clock = clock
        self.set(settings)

    def set(self, settings: Settings) -> None:
        """Takes settings."""
        self.settings = settings
        wanted = settings.groups or ("",)
        for name in wanted:
            if name not in self.groups:
                self.groups[name] = Group(self._reactor, self.store, self.name, name, settings, self._clock)
        for name in [name for name in self.groups if name not in wanted]:
            text = f"queue {self.name} has no group {name!r} any more"
            self.groups.pop(name).end(NoSuchGroup(text, queue=self.name, group=name))

    @property
    def consumers(self) -> int:
        """How many there are."""
        return sum(len(group.consumers) for group in self.groups.values())

    def group(self, name: str) -> Group:
        """
        :raises NoSuchGroup: there is none of that name.
        """
        group = self.groups.get(name)
        if group is None:
            text = f"queue {self.name} has no group {name!r}"
            raise NoSuchGroup(text, queue=self.name, group=name)
        return group

    def end(self, error: Error) -> None:
        """It is gone."""
        if self.gathering.timer is not None:
            self.gathering.timer.cancel()
        for _, waiting in self.gathering.calls:
            waiting.errback(Failure(error))
        self.gathering = _Gathering()
        for group in self.groups.values():
            group.end(error)


@implementer(IStoreListener)
class Broker:
    """All queues of a server.

    :param reactor: for the time.
    :param clock: gives the time, in seconds since the epoch.
    :param disk: the store of queues that outlive the server.
    :param memory: the store of others.
    :param broken: called once, with the error, when a store does not work any more.
    :param max_queues: that there may be.
    :param max_consumers: that there may be, of all queues.
    :param max_pending: octets of messages that may wait to be stored, before publishers are told to come later.
    """

    def __init__(
        self,
        reactor: Any,
        clock: Callable[[], float],
        disk: IStore,
        memory: IStore,
        *,
        broken: Callable[[Error], None],
        max_queues: int = 10_000,
        max_consumers: int = 10_000,
        max_pending: int = 64 * 1024 * 1024,
    ) -> None:
        self._reactor = reactor
        self._clock = clock
        self._stores = {Storage.DISK: disk, Storage.MEMORY: memory}
        self._broken = broken
        self._max_queues = max_queues
        self._max_consumers = max_consumers
        self._max_pending = max_pending
        self._queues: dict[str, _Queue] = {}
        self._declaring: set[str] = set()
        self._looking: Any = None

    def open(self) -> None:
        """Begins.

        :raises ValueError: a store cannot be opened.
        """
        for store in self._stores.values():
            for name, settings in store.open(self):
                self._queues[name] = self._made(name, settings, store)
        self._look_later()

    def end_consumers(self, error: Error) -> None:
        """Has all consumers end, and stores what was gathered."""
        for queue in self._queues.values():
            self._store_gathered(queue)
            for group in queue.groups.values():
                group.end(error)

    async def close(self) -> None:
        """Does what it was asked for, and ends."""
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None
        for queue in self._queues.values():
            self._store_gathered(queue)
        for store in self._stores.values():
            await store.close()

    # IStoreListener

    def ready(self, queue: str, group: str) -> None:
        """Messages wait that did not before."""
        known = self._queues.get(queue)
        if known is not None and group in known.groups:
            known.groups[group].ready()

    def lost(self, queue: str, group: str, tags: Sequence[Tag]) -> None:
        """Leases have ended by themselves."""
        known = self._queues.get(queue)
        if known is not None and group in known.groups:
            known.groups[group].lost(tags)

    def failed(self, error: Exception) -> None:
        """A store does not work any more."""
        _log.critical("{error}", error=error)
        failure = error if isinstance(error, Error) else StoreFailed(str(error))
        for queue in self._queues.values():
            queue.end(failure)
        self._broken(failure)

    # Queues.

    def queue(self, name: str) -> _Queue:
        """
        :raises NoSuchQueue: there is none of that name.
        """
        queue = self._queues.get(name)
        if queue is None:
            raise _missing(name)
        queue.used = self._clock()
        return queue

    def _made(self, name: str, settings: Settings, store: IStore) -> _Queue:
        return _Queue(self._reactor, store, name, settings, self._clock)

    def names(self, prefix: str) -> list[str]:
        """Of the queues whose names begin so, in order."""
        return sorted(name for name in self._queues if name.startswith(prefix))

    async def declare(self, name: str, settings: Settings, *, replace: bool) -> bool:
        """Has a queue be there; whether it was not yet."""
        if settings.storage is Storage.MEMORY and settings.delivery is not DeliveryPolicy.AT_MOST_ONCE:
            raise InvalidSettings("storage: memory is for queues that deliver at-most-once")
        letters = self._queues.get(settings.dead_letter or "")
        if letters is not None and letters.settings.storage is not settings.storage:
            raise InvalidSettings("dead_letter: a queue and that of its dead letters have the same storage")
        known = self._queues.get(name)
        if known is not None and known.settings.storage is not settings.storage:
            text = f"queue {name} is there with another storage, which cannot be changed"
            raise DifferentSettings(text, queue=name, fields=["storage"])
        if known is None and len(self._queues) + len(self._declaring) >= self._max_queues:
            raise TooMany(f"there are {len(self._queues)} queues already", limit=self._max_queues)
        store = self._stores[settings.storage]
        self._declaring.add(name)
        declaring = store.declare(name, settings, replace)
        declaring.addBoth(self._declared, name, settings, store)
        return await _kept(declaring)

    def _declared(self, result: Any, name: str, settings: Settings, store: IStore) -> Any:
        self._declaring.discard(name)
        if not isinstance(result, Failure):
            known = self._queues.get(name)
            if known is None:
                self._queues[name] = self._made(name, settings, store)
            else:
                known.used = self._clock()
                known.set(settings)
            self._look_later()
        return result

    async def delete(self, name: str, *, only_unused: bool) -> int:
        """Deletes a queue; how many messages it had."""
        queue = self.queue(name)
        if only_unused and queue.consumers:
            raise NotEmpty(f"queue {name} has {queue.consumers} consumers", queue=name)
        return await _kept(self._delete(queue, only_empty=only_unused))

    def _delete(self, queue: _Queue, *, only_empty: bool) -> Deferred[int]:
        return queue.store.delete(queue.name, only_empty).addCallback(self._deleted, queue.name)

    def _deleted(self, depth: int, name: str) -> int:
        # What was called first is answered first: it is not one that was declared since.
        queue = self._queues.pop(name, None)
        if queue is not None:
            queue.end(_missing(name))
        return depth

    def _look_later(self) -> None:
        if self._looking is None and any(queue.settings.queue_ttl is not None for queue in self._queues.values()):
            self._looking = self._reactor.callLater(_LOOK_EVERY, self._look)

    def _look(self) -> None:
        """Deletes queues that nobody has used for their time."""
        self._looking = None
        now = self._clock()
        for queue in list(self._queues.values()):
            ttl = queue.settings.queue_ttl
            if ttl is None:
                continue
            if queue.consumers:
                queue.used = now
            elif now - queue.used >= ttl and not queue.is_going:
                queue.is_going = True
                self._delete(queue, only_empty=False).addErrback(_not_deleted, queue)
        self._look_later()

    # Publishing.

    def publish(self, name: str, messages: Sequence[Message]) -> Deferred[list[Receipt]]:
        """Stores messages; fires when they are."""
        queue = self.queue(name)
        pending = queue.store.pending_bytes + queue.gathering.octets
        if pending > self._max_pending:
            raise Overloaded(f"{pending} octets wait to be stored", retry_after=_RETRY_AFTER)
        if not queue.settings.batch_time:
            return self._publish(queue, messages)
        return self._gather(queue, messages)

    def _publish(self, queue: _Queue, messages: Sequence[Message]) -> Deferred[list[Receipt]]:
        publishing = queue.store.publish(queue.name, messages)
        queue.published.add(len(messages))
        is_ahead = queue.settings.order is Order.PRIORITY
        for group in queue.groups.values():
            if group.consumers:
                group.published(is_ahead=is_ahead)
        return publishing

    def _gather(self, queue: _Queue, messages: Sequence[Message]) -> Deferred[list[Receipt]]:
        waiting: Deferred[list[Receipt]] = Deferred()
        gathering = queue.gathering
        gathering.calls.append((messages, waiting))
        gathering.count += len(messages)
        gathering.octets += sum(len(message.body) for message in messages)
        settings = queue.settings
        if gathering.count >= settings.batch_count or gathering.octets >= settings.batch_bytes:
            self._store_gathered(queue)
        elif gathering.timer is None:
            gathering.timer = self._reactor.callLater(settings.batch_time, self._store_gathered, queue)
        return waiting

    def _store_gathered(self, queue: _Queue) -> None:
        gathering, queue.gathering = queue.gathering, _Gathering()
        if gathering.timer is not None and gathering.timer.active():
            gathering.timer.cancel()
        for messages, waiting in gathering.calls:
            if not waiting.called:
                self._publish(queue, messages).chainDeferred(waiting)

    # Consuming.

    def consume(
        self,
        name: str,
        group: str,
        prefetch: int,
        selector: Selector | None,
        *,
        is_exclusive: bool = False,
        limit: int | None = None,
    ) -> Consumer:
        """A new consumer."""
        joined = self.queue(name).group(group)
        if self.consumers >= self._max_consumers:
            raise TooMany(f"there are {self.consumers} consumers already", limit=self._max_consumers)
        return joined.join(prefetch, selector, is_exclusive=is_exclusive, limit=limit)

    @property
    def consumers(self) -> int:
        """How many there are."""
        return sum(queue.consumers for queue in self._queues.values())

    @property
    def is_storing(self) -> bool:
        """Whether there are messages that wait to be stored."""
        return any(store.pending_bytes for store in self._stores.values())

    def settle(self, name: str, group_name: str, tags: Sequence[Tag], verdict: Verdict) -> Deferred[Settled]:
        """Ends leases; fires when that is stored."""
        queue = self.queue(name)
        group = queue.group(group_name)
        settling = queue.store.settle(name, group_name, tags, verdict)
        if verdict.action is Action.DONE:
            settling.addCallback(_counted, group)
        group.settled(tags, is_unseen=verdict.action is Action.UNSEEN)
        return settling

    def extend(self, name: str, group: str, tags: Sequence[Tag]) -> Deferred[Settled]:
        """Has leases begin anew."""
        queue = self.queue(name)
        queue.group(group)
        return queue.store.extend(name, group, tags)

    # Looking.

    async def browse(self, name: str, group: str, count: int, selector: Selector | None) -> AsyncIterator[Waiting]:
        """Messages as they are."""
        queue = self.queue(name)
        queue.group(group)
        after: object = None
        while count > 0:
            found, after = await queue.store.browse(name, group, count, _PAGE, selector, after)
            for waiting in found:
                yield waiting
            count -= len(found)
            if after is None:
                break

    async def purge(self, name: str, group: str | None) -> int:
        """Removes messages that nobody has; how many."""
        queue = self.queue(name)
        if group is not None:
            queue.group(group)
        removed = 0
        for each in [group] if group is not None else list(queue.groups):
            # Not for ever, where others publish meanwhile.
            left = await self._waiting(queue, each)
            while left > 0:
                count = await queue.store.purge(name, each)
                removed += count
                left = left - count if count else 0
        return removed

    async def _waiting(self, queue: _Queue, group: str) -> int:
        statistics = await queue.store.statistics(queue.name)
        return sum(one.ready + one.delayed for one in statistics.groups if one.name == group)

    async def statistics(self, name: str) -> Statistics:
        """How a queue stands."""
        self.queue(name)
        return await self.look(name)

    async def look(self, name: str) -> Statistics:
        """The same, without that the queue counts as used."""
        queue = self._queues.get(name)
        if queue is None:
            raise _missing(name)
        statistics = await queue.store.statistics(name)
        groups = []
        for stored in statistics.groups:
            group = queue.groups.get(stored.name)
            if group is not None:
                more = {
                    "consumers": len(group.consumers),
                    "delivered_rate": group.delivered.per_second(),
                    "acknowledged_rate": group.acknowledged.per_second(),
                }
                groups.append(msgspec.structs.replace(stored, **more))
        return msgspec.structs.replace(statistics, published_rate=queue.published.per_second(), groups=groups)


def _counted(settled: Settled, group: Group) -> Settled:
    group.acknowledged.add(settled.count)
    return settled


def _missing(name: str) -> NoSuchQueue:
    return NoSuchQueue(f"there is no queue {name}", queue=name)


def _kept(doing: Deferred[_T]) -> Deferred[_T]:
    """Fires as another does: one whose caller may go away, and cancel it, while what it tells is needed here still."""
    answer: Deferred[_T] = Deferred()
    doing.chainDeferred(answer)
    return answer


def _not_deleted(failure: Failure, queue: _Queue) -> None:
    queue.is_going = False
    _log.failure("queue {name}, which nobody uses, could not be deleted", failure, name=queue.name)
