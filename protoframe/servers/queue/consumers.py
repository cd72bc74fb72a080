"""Consumers of a group: who gets the next messages, and how many each may have.

Knows consumers, their credit and which of them has which lease; not where messages are kept, nor what carries them to
whom.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
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


class Consumer:
    """One consumer.

    :param group: whose it is.
    :param prefetch: messages that it may have at once.
    :param selector: what it wants; ``None`` for everything.
    :param limit: messages that it gets in all.
    :ivar buffer: what is to be sent to it.
    """

    def __init__(
        self, group: Group, prefetch: int, selector: Selector | None, *, is_exclusive: bool, limit: int | None
    ) -> None:
        self.buffer: deque[Delivery] = deque()
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
        return 0 if self._octets >= _OCTETS else int(min(self._prefetch - self.has, self._left))

    def forgo(self, count: int) -> None:
        """It may have so many less at once: it is about to leave."""
        self._prefetch -= count

    def give(self, deliveries: Sequence[Delivery]) -> None:
        """Messages are to be sent to it."""
        self.buffer.extend(deliveries)
        self._left -= len(deliveries)
        self._octets += sum(len(delivery.body) for delivery in deliveries)
        self._tell()

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
            self._group.pump()
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
        self._holders: dict[int, tuple[int, Consumer]] = {}
        self._turn = 0
        # Grows with each thing that may have brought messages.
        self._happened = 0
        self._again: Any = None

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
        self.pump()
        return consumer

    def leave(self, consumer: Consumer) -> None:
        """A consumer takes no more: what it has is given back."""
        if consumer not in self.consumers:
            return
        self.consumers.remove(consumer)
        unsent = {delivery.sequence for delivery in consumer.buffer}
        consumer.buffer.clear()
        held = [Tag(number, lease) for number, (lease, holder) in self._holders.items() if holder is consumer]
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
        if self._again is not None:
            self._again.cancel()
            self._again = None

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
        for consumer in self.consumers:
            consumer.position = None

    def lost(self, sequences: Sequence[int]) -> None:
        """Leases have ended."""
        for sequence in sequences:
            self._let_go(sequence, None)

    def settled(self, tags: Sequence[Tag], *, is_unseen: bool) -> None:
        """Deliveries are settled, which makes room for others."""
        for tag in tags:
            consumer = self._let_go(tag.sequence, tag.lease)
            if consumer is not None and is_unseen:
                consumer.forgo(1)
        self.pump()

    def _let_go(self, sequence: int, lease: int | None) -> Consumer | None:
        held = self._holders.get(sequence)
        if held is None or lease not in (None, held[0]):
            return None
        del self._holders[sequence]
        held[1].has -= 1
        return held[1]

    def pump(self) -> None:
        """Has messages fetched for consumers that may have some, in turn."""
        count = len(self.consumers)
        if not count:
            return
        self._turn = (self._turn + 1) % count
        for number in range(count):
            consumer = self.consumers[(self._turn + number) % count]
            if not consumer.is_taking and consumer.dry_at < self._happened and consumer.credit > 0:
                self._take(consumer)

    def _take(self, consumer: Consumer) -> None:
        wanted = consumer.credit if len(self.consumers) == 1 else min(consumer.credit, _SLICE)
        consumer.is_taking = True
        happened = self._happened
        taking = self._store.take(self._queue, self._name, wanted, _OCTETS, consumer.selector, consumer.position)
        taking.addCallbacks(self._took, self._not_taken, callbackArgs=(consumer, happened), errbackArgs=(consumer,))

    def _took(self, taken: Taken, consumer: Consumer, happened: int) -> None:
        consumer.is_taking = False
        deliveries = taken.deliveries
        if consumer.is_gone:
            self._return([delivery.tag for delivery in deliveries if delivery.lease], Action.UNSEEN)
            return
        if happened == self._happened:
            consumer.position = taken.position
        if not taken.is_more:
            consumer.dry_at = happened
        if deliveries:
            consumer.has += len(deliveries)
            if not self._is_once:
                for delivery in deliveries:
                    self._holders[delivery.sequence] = (delivery.lease, consumer)
            self.delivered.add(len(deliveries))
            consumer.give(deliveries)
        self.pump()

    def _not_taken(self, failure: Failure, consumer: Consumer) -> None:
        consumer.is_taking = False
        error = failure.value
        if isinstance(error, StoreFull):
            if self._again is None:
                self._again = self._reactor.callLater(_TRY_AGAIN, self._try_again)
        elif isinstance(error, Error):
            consumer.end(error)
        else:
            _log.failure("messages could not be taken", failure)
            consumer.end(Error("messages could not be taken; the server's log has the details"))

    def _try_again(self) -> None:
        self._again = None
        self.pump()


def _ignored(failure: Failure) -> None:
    if not failure.check(Error):
        _log.failure("deliveries could not be given back", failure)
