"""Consumers of a group: who gets the next messages, and how many each may have.

Knows consumers, their credit and which of them has which lease; not where messages are kept, nor what carries them to
whom.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure

from protoframe import Error
from protoframe.queue import Delivery, DeliveryPolicy, Exclusive, Settings, StoreFull, Tag
from protoframe.servers.queue.rates import Rate
from protoframe.servers.queue.selector import Selector
from protoframe.servers.queue.store import Action, IStore, Position, Taken, Verdict

__all__ = ["Consumer", "Group"]

_log = Logger(namespace="protoframe.queue")

#: Octets of bodies that a consumer is given at a time, and as many as wait to be sent to it, or a message more.
_OCTETS = 1024 * 1024
#: Messages that a consumer is given at a time where there are others.
_SLICE = 32
#: Seconds after which a full disk is asked again.
_TRY_AGAIN = 1.0
#: And so many that have expired.
_IN_THE_WAY = 0.01


class Consumer:
    """One consumer.

    :param group: whose it is.
    :param prefetch: messages that it may have at once.
    :param selector: what it wants; ``None`` for everything.
    :param limit: messages that it gets in all.
    :ivar buffer: what is to be sent to it.
    :ivar leases: what it has and has not settled: the lease of each, by number.
    """

    def __init__(
        self, group: Group, prefetch: int, selector: Selector | None, *, is_exclusive: bool, limit: int | None
    ) -> None:
        self.buffer: deque[Delivery] = deque()
        self.leases: dict[int, int] = {}
        self.is_exclusive = is_exclusive
        self.selector = selector
        self.position: Position | None = None
        self.has = 0
        self.is_taking = False
        self.is_gone = False
        # What had happened in the group when nothing more was found for it.
        self.dry_at = -1
        self._group = group
        self._prefetch = prefetch
        self._left = math.inf if limit is None else limit
        self._octets = 0
        self._error: Error | None = None
        self._waiting: Deferred[None] | None = None

    @property
    def credit(self) -> int:
        """Messages that it may be given now."""
        if self._octets >= _OCTETS or self._error is not None:
            return 0
        return int(min(self._prefetch - self.has, self._left))

    def forgo(self, count: int) -> None:
        """It may have so many less at once: it is about to leave."""
        self._prefetch -= count

    def give(self, deliveries: Sequence[Delivery]) -> None:
        """Messages are to be sent to it."""
        self.has += len(deliveries)
        self.buffer.extend(deliveries)
        self._left -= len(deliveries)
        self._octets += sum(len(delivery.body) for delivery in deliveries)
        self._tell()

    def drop(self, numbers: set[int]) -> None:
        """Of these messages the leases have ended: what is not sent yet is not sent any more."""
        kept = [delivery for delivery in self.buffer if delivery.sequence not in numbers]
        if len(kept) < len(self.buffer):
            self._left += len(self.buffer) - len(kept)
            self.buffer = deque(kept)
            self._octets = sum(len(delivery.body) for delivery in kept)

    def end(self, error: Error) -> None:
        """It gets no more, but an error when it has taken what there is."""
        if self._error is None:
            self._error = error
            self._tell()

    def _tell(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.callback(None)

    # For whoever sends them.

    def wait(self) -> Deferred[None]:
        """Fires when there is something to send.

        :raises Error: there will be no more.
        """
        if self.buffer:
            return succeed(None)
        if self._error is not None:
            raise self._error
        self._waiting = Deferred(self._forget)
        return self._waiting

    def _forget(self, _: Any) -> None:
        self._waiting = None

    def next(self) -> Delivery:
        """What is to be sent now."""
        delivery = self.buffer.popleft()
        was_full = self._octets >= _OCTETS
        self._octets -= len(delivery.body)
        if not delivery.lease:
            self.has -= 1
        if (was_full and self._octets < _OCTETS) or not delivery.lease:
            self._group.feed(self)
        return delivery

    def leave(self) -> None:
        """It takes no more; what it has is given to others."""
        self.is_gone = True
        self._group.leave(self)


class Group:
    """The consumers of one group of a queue.

    :param reactor: for the time.
    :param store: where the messages are.
    :param queue: the queue's name.
    :param name: the group's.
    :param settings: the queue's.
    :param clock: gives the time.
    :ivar consumers: that are there.
    """

    def __init__(self, reactor: Any, store: IStore, queue: str, name: str, settings: Settings, clock: Any) -> None:
        self.consumers: list[Consumer] = []
        self.delivered, self.acknowledged = Rate(clock), Rate(clock)
        self._reactor = reactor
        self._store = store
        self._queue = queue
        self._name = name
        self._is_once = settings.delivery is DeliveryPolicy.AT_MOST_ONCE
        self._holders: dict[int, Consumer] = {}
        self._turn = 0
        # Grows with each thing that may have brought messages; and of these, with each that may have brought some
        # that come before others.
        self._happened = 0
        self._came_ahead = 0
        self._again: Any = None
        # Consumers that are fed in the reactor's next turn.
        self._soon: list[Consumer] = []
        self._feeding: Any = None

    def join(
        self, prefetch: int, selector: Selector | None, *, is_exclusive: bool = False, limit: int | None = None
    ) -> Consumer:
        """A new consumer.

        :raises Exclusive: there is an exclusive one, or there are others and this wants to be one.
        """
        if self.consumers and (is_exclusive or self.consumers[0].is_exclusive):
            text = "has an exclusive consumer" if self.consumers[0].is_exclusive else "has consumers already"
            where = f"group {self._name} of queue {self._queue}" if self._name else f"queue {self._queue}"
            raise Exclusive(f"{where} {text}", queue=self._queue, group=self._name)
        consumer = Consumer(self, prefetch, selector, is_exclusive=is_exclusive, limit=limit)
        self.consumers.append(consumer)
        self.feed(consumer)
        return consumer

    def leave(self, consumer: Consumer) -> None:
        """A consumer takes no more: what it has is given back."""
        if consumer not in self.consumers:
            return
        self.consumers.remove(consumer)
        unsent = {delivery.sequence for delivery in consumer.buffer}
        consumer.buffer.clear()
        held = [Tag(number, lease) for number, lease in consumer.leases.items()]
        consumer.leases.clear()
        for tag in held:
            del self._holders[tag.sequence]
        self._return([tag for tag in held if tag.sequence in unsent], Action.UNSEEN)
        self._return([tag for tag in held if tag.sequence not in unsent], Action.AGAIN)

    def _return(self, tags: Sequence[Tag], action: Action) -> None:
        if tags:
            returned = self._store.settle(self._queue, self._name, tags, Verdict(action))
            # What cannot be given back comes back when its lease ends.
            returned.addErrback(_ignored)

    def end(self, error: Error) -> None:
        """There is nothing to be had any more."""
        for consumer in list(self.consumers):
            consumer.end(error)
        for timer in (self._again, self._feeding):
            if timer is not None:
                timer.cancel()
        self._again = self._feeding = None
        self._soon = []

    def published(self, *, is_ahead: bool) -> None:
        """Messages were given to the store.

        :param is_ahead: whether they may come before others.
        """
        self._happened += 1
        if is_ahead:
            self._look_anew()
        self.pump()

    def ready(self) -> None:
        """Messages are there that were not before, or are there again."""
        self._happened += 1
        self._look_anew()
        self.pump()

    def _look_anew(self) -> None:
        self._came_ahead += 1
        for consumer in self.consumers:
            consumer.position = None

    def lost(self, tags: Sequence[Tag]) -> None:
        """Leases have ended."""
        dropped: dict[Consumer, set[int]] = {}
        for tag in tags:
            consumer = self._let_go(tag)
            if consumer is not None:
                dropped.setdefault(consumer, set()).add(tag.sequence)
        for consumer, numbers in dropped.items():
            consumer.drop(numbers)
            self.feed(consumer)

    def settled(self, tags: Sequence[Tag], *, is_unseen: bool) -> None:
        """Deliveries are settled, which makes room for others."""
        fed: dict[Consumer, None] = {}
        for tag in tags:
            consumer = self._let_go(tag)
            if consumer is not None:
                fed[consumer] = None
                if is_unseen:
                    consumer.forgo(1)
        for consumer in fed:
            self.feed(consumer)

    def _let_go(self, tag: Tag) -> Consumer | None:
        consumer = self._holders.get(tag.sequence)
        if consumer is None or consumer.leases[tag.sequence] != tag.lease:
            return None
        del self._holders[tag.sequence]
        del consumer.leases[tag.sequence]
        consumer.has -= 1
        return consumer

    def pump(self) -> None:
        """Has messages fetched for consumers that may have some, in turn."""
        if self.consumers:
            self._turn = (self._turn + 1) % len(self.consumers)
            for consumer in self.consumers[self._turn :] + self.consumers[: self._turn]:
                self.feed(consumer)

    def feed(self, consumer: Consumer) -> None:
        """Has messages fetched for a consumer, if it may have some and there may be some."""
        if consumer.is_taking or consumer.is_gone or consumer.dry_at >= self._happened or consumer.credit <= 0:
            return
        wanted = consumer.credit if len(self.consumers) == 1 else min(consumer.credit, _SLICE)
        consumer.is_taking = True
        noted = (self._happened, self._came_ahead)
        taking = self._store.take(self._queue, self._name, wanted, _OCTETS, consumer.selector, consumer.position)
        # A store that answers at once would be asked without end, and for this consumer alone.
        feed = self._feed_soon if taking.called else self.feed
        taking.addCallbacks(self._took, self._not_taken, callbackArgs=(consumer, *noted, feed), errbackArgs=(consumer,))

    def _feed_soon(self, consumer: Consumer) -> None:
        self._soon.append(consumer)
        if self._feeding is None:
            self._feeding = self._reactor.callLater(0, self._feed_all)

    def _feed_all(self) -> None:
        self._feeding = None
        consumers, self._soon = self._soon, []
        for consumer in consumers:
            self.feed(consumer)

    def _took(
        self, taken: Taken, consumer: Consumer, happened: int, came_ahead: int, feed: Callable[[Consumer], None]
    ) -> None:
        consumer.is_taking = False
        deliveries = taken.deliveries
        if consumer.is_gone:
            self._return([delivery.tag for delivery in deliveries if delivery.lease], Action.UNSEEN)
            return
        if came_ahead == self._came_ahead:
            consumer.position = taken.position
        if not taken.is_more:
            consumer.dry_at = happened
        if deliveries:
            if not self._is_once:
                for delivery in deliveries:
                    self._hold(consumer, delivery)
            self.delivered.add(len(deliveries))
            consumer.give(deliveries)
        if taken.is_more and not deliveries and consumer.selector is None:
            # What has expired is in the way, and is about to be removed.
            self._later(_IN_THE_WAY)
        elif consumer.dry_at < self._happened and consumer.credit > 0:
            feed(consumer)

    def _hold(self, consumer: Consumer, delivery: Delivery) -> None:
        before = self._holders.get(delivery.sequence)
        if before is not None:
            # Its lease has ended, which the store has not told yet.
            self._let_go(Tag(delivery.sequence, before.leases[delivery.sequence]))
            before.drop({delivery.sequence})
            self._feed_soon(before)
        self._holders[delivery.sequence] = consumer
        consumer.leases[delivery.sequence] = delivery.lease

    def _not_taken(self, failure: Failure, consumer: Consumer) -> None:
        consumer.is_taking = False
        error = failure.value
        if isinstance(error, StoreFull):
            self._later(_TRY_AGAIN)
        elif isinstance(error, Error):
            consumer.end(error)
        else:
            _log.failure("messages could not be taken", failure)
            consumer.end(Error("messages could not be taken; the server's log has the details"))

    def _later(self, seconds: float) -> None:
        if self._again is None:
            self._again = self._reactor.callLater(seconds, self._try_again)

    def _try_again(self) -> None:
        self._again = None
        self.pump()


def _ignored(failure: Failure) -> None:
    if not failure.check(Error):
        _log.failure("deliveries could not be given back", failure)
