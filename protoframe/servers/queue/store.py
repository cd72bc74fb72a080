"""What keeps messages: the interface of stores, and what they give.

Knows what a queue promises; not who consumes, nor how a message gets here.  `protoframe.servers.queue.disk` and
`protoframe.servers.queue.memory` implement it, both by the rules of `protoframe.servers.queue.rules`.  An engine that
keeps its queues elsewhere would implement it in its own way.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence

import msgspec
from twisted.internet.defer import Deferred
from zope.interface import Attribute, Interface

from protoframe.queue import Delivery, Message, Receipt, Settings, Settled, Statistics, Tag, Waiting
from protoframe.servers.queue.selector import Selector

__all__ = ["IStore", "IStoreListener", "Position", "Taken", "Verdict"]

#: A place in the order of a group's messages: rank and number.
Position = tuple[int, int]


class Taken(msgspec.Struct, frozen=True):
    """What a group's consumer gets.

    :ivar deliveries: in the queue's order.
    :ivar position: how far was looked; what a selector did not take before it need not be looked at again, until
        something comes back.
    :ivar is_more: whether there may be more that could be taken now.
    """

    deliveries: list[Delivery]
    position: Position | None
    is_more: bool


class Action(enum.Enum):
    """What is done with a delivery that is settled."""

    DONE = "done"
    DEAD = "dead"
    AGAIN = "again"
    UNSEEN = "unseen"


class Verdict(msgspec.Struct, frozen=True):
    """How deliveries are settled.

    :ivar action: their messages are done, are dead letters, or are delivered again; again, and as if they had not been.
    :ivar delay: seconds until then.
    :ivar note: goes with a dead letter.
    """

    action: Action
    delay: float = 0.0
    note: str = ""


class IStoreListener(Interface):
    """Is told, in the reactor's thread, what happened in a store that nobody waits for."""

    def ready(queue: str, group: str) -> None:
        """Messages that came back, or whose time came, or dead letters, wait for consumers."""

    def lost(queue: str, group: str, tags: Sequence[Tag]) -> None:
        """Leases have ended by themselves."""

    def failed(error: Exception) -> None:
        """The store does not work any more."""


class IStore(Interface):
    """Keeps queues and their messages.

    Each method but `open` and `close` gives a Deferred that fires when what it did is as durable as the store makes
    it, and fails with the errors of `protoframe.queue.Queue`, or `StoreFailed`; then nothing of it was done, but for
    `StoreFailed`, after which nobody knows.  What is called first is done first.  Times are seconds since the epoch.
    """

    pending_bytes: int = Attribute("Octets of messages that are not stored yet.")

    def open(listener: IStoreListener) -> Sequence[tuple[str, Settings]]:
        """Begins; the queues that are there.

        :raises ValueError: it cannot be opened; the text says why, on one line.
        """

    def close() -> Deferred[None]:
        """Does what it was asked for, and ends."""

    def declare(queue: str, settings: Settings, replace: bool) -> Deferred[bool]:
        """Has a queue be there; whether it was not yet."""

    def delete(queue: str, only_empty: bool) -> Deferred[int]:
        """Deletes a queue; how many messages it had."""

    def publish(queue: str, messages: Sequence[Message]) -> Deferred[list[Receipt]]:
        """Stores messages, all or none of them."""

    def take(
        queue: str, group: str, count: int, octets: int, selector: Selector | None, after: Position | None
    ) -> Deferred[Taken]:
        """Gives messages to a consumer: it has their leases; where they are delivered at most once, they are gone.

        :param count: messages at most.
        :param octets: of bodies at most, but for the first.
        """

    def settle(queue: str, group: str, tags: Sequence[Tag], verdict: Verdict) -> Deferred[Settled]:
        """Ends leases."""

    def extend(queue: str, group: str, tags: Sequence[Tag]) -> Deferred[Settled]:
        """Has leases begin anew."""

    def browse(
        queue: str, group: str, count: int, octets: int, selector: Selector | None, after: object
    ) -> Deferred[tuple[list[Waiting], object]]:
        """Messages as they are, and where to go on; ``None`` at the end."""

    def purge(queue: str, group: str) -> Deferred[int]:
        """Removes messages that nobody has, many at a time; how many, 0 when there are no more."""

    def statistics(queue: str) -> Deferred[Statistics]:
        """How a queue stands; not who consumes it, nor how fast."""


Clock = Callable[[], float]
