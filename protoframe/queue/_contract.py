"""The `Queue` Protocol: what a message queue answers, and the types and errors of that.

Knows declarations alone; `protoframe.servers.queue` serves them, and `protoframe.queue.QueueClient` calls them.  Times
are seconds since the epoch of 1970, and durations seconds.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Sequence
from typing import Annotated

from msgspec import Meta, Struct, field
from twisted.internet.defer import Deferred

from protoframe import (
    AlreadyExists,
    FailedPrecondition,
    GoingAway,
    InvalidArgument,
    NotFound,
    Protocol,
    ResourceExhausted,
    TryLater,
    Unavailable,
    request,
)

__all__ = [
    "HIGHEST_PRIORITY",
    "LARGEST_BODY",
    "LARGEST_PROPERTIES",
    "MOST_AT_ONCE",
    "Count",
    "DeadLetter",
    "Delivery",
    "DeliveryPolicy",
    "DifferentSettings",
    "Duration",
    "Exclusive",
    "GroupStatistics",
    "Headers",
    "InvalidMessage",
    "InvalidSettings",
    "LeaseLost",
    "Message",
    "Messages",
    "NoSuchGroup",
    "NoSuchQueue",
    "NotEmpty",
    "Order",
    "Overflow",
    "Overloaded",
    "Positive",
    "Priority",
    "Queue",
    "QueueFull",
    "QueueName",
    "Receipt",
    "Receipts",
    "Settings",
    "Settled",
    "ShortText",
    "State",
    "Statistics",
    "Storage",
    "StoreFailed",
    "StoreFull",
    "Tag",
    "Tags",
    "TooMany",
    "Wait",
    "Waiting",
]

#: Octets of the largest body: with its properties, it fits in a message of the default size.
LARGEST_BODY = 4 * 1024 * 1024 - 64 * 1024
#: Octets of a message's other properties, encoded.
LARGEST_PROPERTIES = 32 * 1024
#: Messages that one call publishes, settles or asks for.
MOST_AT_ONCE = 10_000
#: The highest priority; 0 is the lowest, and the default.
HIGHEST_PRIORITY = 9
#: Seconds of the longest duration: ten years.
LONGEST = 315_360_000.0

#: The name of a queue or a group.
QueueName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.:/-]*$", max_length=200)]
#: A subject, a key or a note.
ShortText = Annotated[str, Meta(max_length=255)]
#: Texts by name.
Headers = dict[str, str]
#: Of a message: 0 to 9, the highest.
Priority = Annotated[int, Meta(ge=0, le=HIGHEST_PRIORITY)]
#: Seconds, more than none.
Duration = Annotated[float, Meta(gt=0, le=LONGEST)]
#: Seconds, or none.
Wait = Annotated[float, Meta(ge=0, le=LONGEST)]
#: Messages that one call asks for.
Count = Annotated[int, Meta(ge=1, le=MOST_AT_ONCE)]
#: A number, more than none.
Positive = Annotated[int, Meta(ge=1, le=2**53)]


class Order(enum.Enum):
    """In which order a queue gives its messages."""

    FIFO = "fifo"
    """As they were published: first in, first out."""
    PRIORITY = "priority"
    """Those of the highest priority first, and of these as they were published."""
    LAST_VALUE = "last-value"
    """As they were published, and of those with one key only the last: it takes the place of one that waits."""


class DeliveryPolicy(enum.Enum):
    """How often a message is delivered."""

    AT_LEAST_ONCE = "at-least-once"
    """Until it is acknowledged."""
    AT_MOST_ONCE = "at-most-once"
    """Once, or never, where it is lost on the way: it is gone from the queue before it is sent."""


class Overflow(enum.Enum):
    """What becomes of a message for which a queue has no room."""

    REFUSE = "refuse"
    """It is refused, by `QueueFull`."""
    DROP_OLDEST = "drop-oldest"
    """The oldest that wait make room for it."""


class Storage(enum.Enum):
    """Where a queue's messages are."""

    DISK = "disk"
    """They outlive the server, and a loss of power."""
    MEMORY = "memory"
    """They are gone when the server ends.  For queues that deliver at most once."""


class Settings(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How a queue treats its messages.

    :ivar order: in which order it gives them.
    :ivar delivery: how often.
    :ivar storage: where they are; memory is for queues that deliver at most once.
    :ivar lease: for how long a consumer has a message before it is delivered again, unless it is settled; 0.1 or more.
    :ivar max_deliveries: how often a message is delivered before it becomes a dead letter; without it, any number.
    :ivar dead_letter: the queue that gets this one's dead letters; without it, they are counted and gone.
    :ivar message_ttl: the longest that a message may wait, before it is a dead letter.
    :ivar queue_ttl: for how long the queue may be without use, a consumer or a call, before it is deleted.
    :ivar delay: for how long a message is kept before it is delivered, if it does not say so itself.
    :ivar max_messages: that may wait in each group, beside those that consumers have.
    :ivar max_bytes: that the bodies and properties of these may have.
    :ivar overflow: what becomes of a message for which there is no room.
    :ivar dedup_window: for how long a deduplication key is remembered; a message with a key that is known is not stored
        again.  0 remembers none.
    :ivar groups: of consumers: each gets every message that is published from when it is there.  Without any, there is
        one, whose name is empty.
    :ivar batch_count: messages that are stored together at most, where ``batch_time`` says to wait for others.
    :ivar batch_bytes: the same, in octets of bodies.
    :ivar batch_time: for how long a published message waits for others to be stored with it; 1 s at most.
    """

    order: Order = Order.FIFO
    delivery: DeliveryPolicy = DeliveryPolicy.AT_LEAST_ONCE
    storage: Storage = Storage.DISK
    lease: Annotated[float, Meta(ge=0.1, le=LONGEST)] = 30.0
    max_deliveries: Positive | None = None
    dead_letter: QueueName | None = None
    message_ttl: Duration | None = None
    queue_ttl: Duration | None = None
    delay: Wait = 0.0
    max_messages: Positive | None = None
    max_bytes: Positive | None = None
    overflow: Overflow = Overflow.REFUSE
    dedup_window: Wait = 0.0
    groups: Annotated[tuple[QueueName, ...], Meta(max_length=100)] = ()
    batch_count: Count = 1000
    batch_bytes: Annotated[int, Meta(ge=1, le=2**30)] = 1024 * 1024
    batch_time: Annotated[float, Meta(ge=0, le=1)] = 0.0


_ORDINARY = Settings()


class Message(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is published.

    :ivar body: `LARGEST_BODY` octets at most.
    :ivar subject: words with dots between, by which consumers choose, ``orders.eu.new``.
    :ivar headers: texts by name, by which they choose too.
    :ivar key: of a queue that keeps the last value of each.
    :ivar priority: 0 to 9, the highest.
    :ivar ttl: for how long it may wait; the queue's ``message_ttl`` holds too.
    :ivar delay: for how long it is kept before it is delivered; the queue's, where it says nothing.
    :ivar dedup: a key by which a message that is published again is known again, in the queue's ``dedup_window``.
    """

    body: bytes
    subject: ShortText = ""
    headers: Headers = {}
    key: ShortText = ""
    priority: Priority = 0
    ttl: Duration | None = None
    delay: Wait | None = None
    dedup: ShortText = ""


class Receipt(Struct, frozen=True, array_like=True):
    """Says that a message is stored.

    :ivar sequence: its number, which grows with each that is published to the queue.
    :ivar is_duplicate: whether it was stored already; then the number is that of the one that is.
    """

    sequence: int
    is_duplicate: bool = False


class Tag(Struct, frozen=True, array_like=True):
    """Which delivery of which message.

    :ivar sequence: the message's.
    :ivar lease: how often it has been given to a consumer, this time included.
    """

    sequence: int
    lease: int


class DeadLetter(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a dead letter comes from, and why it is one.

    :ivar reason: ``expired``, ``rejected``, ``max-deliveries`` or ``dropped``.
    :ivar queue: where it was.
    :ivar group: whose consumers had it.
    :ivar sequence: its number there.
    :ivar attempts: how often it was delivered there.
    :ivar time: when it became one.
    :ivar note: what the consumer said that rejected it.
    """

    reason: str
    queue: str
    group: str = ""
    sequence: int
    attempts: int = 0
    time: float
    note: str = ""


class Delivery(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A message that is delivered.

    :ivar sequence: its number in the queue.
    :ivar lease: with the number, the `Tag` by which it is settled; 0 where it need not be.
    :ivar attempt: how often it was delivered, this time included.
    :ivar redelivered: whether it may have reached a consumer before.
    :ivar published: when it was published; of a dead letter, at first.
    :ivar expires: when it expires.
    :ivar dead: of a dead letter, why.
    """

    sequence: int
    body: bytes
    lease: int = 0
    attempt: int = 1
    redelivered: bool = False
    published: float
    expires: float | None = None
    subject: str = ""
    headers: Headers = {}
    key: str = ""
    priority: int = 0
    dead: DeadLetter | None = None

    @property
    def tag(self) -> Tag:
        """Which delivery this is."""
        return Tag(self.sequence, self.lease)


class State(enum.Enum):
    """What a message in a queue waits for."""

    READY = "ready"
    """A consumer."""
    DELAYED = "delayed"
    """Its time."""
    LEASED = "leased"
    """A consumer has it, and has not settled it."""


class Waiting(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A message that is in a queue, as `Queue.peek` shows it.

    :ivar message: as it was or would be delivered, with the ``attempt`` and ``lease`` of the last time; 0 before the
        first.
    :ivar state: what it waits for.
    :ivar due: when that comes, where it is a time.
    """

    message: Delivery
    state: State
    due: float | None = None


class Settled(Struct, frozen=True, omit_defaults=True):
    """What became of deliveries.

    :ivar count: those that are settled now.
    :ivar lost: those that are not: the message was delivered again since, or is gone.
    """

    count: int
    lost: list[Tag] = []


class GroupStatistics(Struct, frozen=True, kw_only=True):
    """How a group of consumers stands.  Counts are of the time since the server's start, rates of the last minute.

    :ivar name: empty where the queue has no named ones.
    :ivar ready: messages that wait for a consumer.
    :ivar delayed: those that wait for their time.
    :ivar leased: those that consumers have.
    :ivar bytes: of all of them.
    :ivar oldest_age: seconds since the oldest of them was published; ``None`` where there is none.
    :ivar consumers: that are there.
    :ivar delivered: messages that were given to consumers, again included.
    :ivar redelivered: those of them that were given before.
    :ivar acknowledged: settled as done.
    :ivar dead_lettered: given up, whether there is a queue for them or not.
    :ivar expired: those of them whose time had passed.
    :ivar dropped: those that made room for others.
    :ivar delivered_rate: a second.
    :ivar acknowledged_rate: a second.
    """

    name: str
    ready: int = 0
    delayed: int = 0
    leased: int = 0
    bytes: int = 0
    oldest_age: float | None = None
    consumers: int = 0
    delivered: int = 0
    redelivered: int = 0
    acknowledged: int = 0
    dead_lettered: int = 0
    expired: int = 0
    dropped: int = 0
    delivered_rate: float = 0.0
    acknowledged_rate: float = 0.0


class Statistics(Struct, frozen=True, kw_only=True):
    """How a queue stands.

    :ivar depth: messages in it, of all groups.
    :ivar published: messages that were stored since the server's start, dead letters from elsewhere included.
    :ivar duplicates: those that were stored already.
    :ivar refused: those for which there was no room.
    :ivar published_rate: a second, in the last minute.
    """

    name: str
    settings: Settings
    created: float
    depth: int = 0
    bytes: int = 0
    published: int = 0
    duplicates: int = 0
    refused: int = 0
    published_rate: float = 0.0
    groups: list[GroupStatistics] = field(default_factory=list)


class NoSuchQueue(NotFound):
    """There is no queue of that name; for a consumer, any more."""

    queue: str


class NoSuchGroup(NotFound):
    """The queue has no such group of consumers."""

    queue: str
    group: str


class DifferentSettings(AlreadyExists):
    """The queue is there, with other settings; ``replace`` changes them, but for those that cannot be changed."""

    queue: str
    fields: list[str]


class InvalidSettings(InvalidArgument):
    """Settings that do not go together; the message says which."""


class InvalidMessage(InvalidArgument):
    """A message that the queue does not take, whatever room it has; none of its batch is stored."""

    queue: str


class QueueFull(ResourceExhausted):
    """The queue has no room for the messages; none of them is stored."""

    queue: str
    max_messages: int | None = None
    max_bytes: int | None = None


class StoreFull(ResourceExhausted):
    """The server's disk is full; nothing is stored until consumers, or its operator, have made room."""


class StoreFailed(Unavailable):
    """The server's store failed; what was not answered may be stored or not."""


class Overloaded(TryLater):
    """More waits to be stored than the server keeps; nothing of the call is."""


class TooMany(ResourceExhausted):
    """More queues or consumers than the server takes."""

    limit: int


class LeaseLost(FailedPrecondition):
    """The delivery can be settled no more: its message was delivered again, was settled, or is gone."""

    queue: str
    sequence: int


class Exclusive(FailedPrecondition):
    """The group has an exclusive consumer; or it has consumers, and one that asks to be the only one came."""

    queue: str
    group: str


class NotEmpty(FailedPrecondition):
    """The queue has messages or consumers, and was to be deleted only without."""

    queue: str


#: What one call publishes, and settles.
Messages = Annotated[Sequence[Message], Meta(max_length=MOST_AT_ONCE)]
Tags = Annotated[Sequence[Tag], Meta(max_length=MOST_AT_ONCE)]
Receipts = list[Receipt]


class Queue(Protocol):
    """A durable message queue.

    A call that stores something is answered when it is durable.  One that fails says whether it may have run; what is
    published again with its deduplication key is not stored twice.
    """

    @request(idempotent=True, raises=[DifferentSettings, InvalidSettings, NoSuchQueue, StoreFull, StoreFailed, TooMany])
    async def declare(self, queue: QueueName, settings: Settings = _ORDINARY, replace: bool = False) -> bool:
        """Has a queue be there; whether it was not yet.

        Its dead-letter queue has to be there before.

        :param replace: whether other settings of one that is there are replaced.  Where it is stored, how it is
            ordered and how often it delivers stay.  A group that is not among the new ones is gone, with its messages.
        """
        raise NotImplementedError

    @request(raises=[NoSuchQueue, InvalidMessage, QueueFull, StoreFull, StoreFailed, Overloaded])
    def publish(
        self,
        queue: QueueName,
        body: bytes,
        subject: ShortText = "",
        headers: Headers = {},  # noqa: B006 - it is not changed
        key: ShortText = "",
        priority: Priority = 0,
        ttl: Duration | None = None,
        delay: Wait | None = None,
        dedup: ShortText = "",
    ) -> Deferred[Receipt]:
        """Publishes a message; the parameters are those of `Message`.  The answer says that it is durable."""
        raise NotImplementedError

    @request(raises=[NoSuchQueue, InvalidMessage, QueueFull, StoreFull, StoreFailed, Overloaded])
    def publish_batch(self, queue: QueueName, messages: Messages) -> Deferred[Receipts]:
        """Publishes messages, all or none of them; receipts, in their order, when all are durable."""
        raise NotImplementedError

    @request(raises=[NoSuchQueue, NoSuchGroup, Exclusive, GoingAway, StoreFailed, StoreFull, TooMany, InvalidArgument])
    def consume(
        self,
        queue: QueueName,
        group: str = "",
        prefetch: Count = 100,
        subject: ShortText = "",
        headers: Headers = {},  # noqa: B006 - it is not changed
        exclusive: bool = False,
        limit: Positive | None = None,
    ) -> AsyncIterator[Delivery]:
        """Delivers messages, for as long as the caller takes them.

        When the stream ends, what was delivered and not settled is given to others.  It can be settled until then.
        A server that shuts down ends it with `GoingAway`.

        :param prefetch: messages that may be delivered and not settled; where the queue delivers at most once, that
            are on the way.
        :param subject: delivers those whose subject has these words: ``*`` stands for one, ``#`` for any number.
        :param headers: and that have these headers.
        :param exclusive: as the group's only consumer.
        :param limit: delivers so many in all; then nothing more comes, and what is there can be settled.
        """
        raise NotImplementedError

    @request(raises=[NoSuchQueue, NoSuchGroup, StoreFailed, StoreFull])
    def acknowledge(self, queue: QueueName, tags: Tags, group: str = "") -> Deferred[Settled]:
        """Settles deliveries: their messages are done, and leave the queue."""
        raise NotImplementedError

    @request(raises=[NoSuchQueue, NoSuchGroup, StoreFailed, StoreFull])
    def reject(
        self,
        queue: QueueName,
        tags: Tags,
        group: str = "",
        requeue: bool = False,
        delay: Wait = 0.0,
        note: ShortText = "",
        seen: bool = True,
    ) -> Deferred[Settled]:
        """Settles deliveries: their messages are dead letters, or are delivered again.

        :param requeue: whether they are delivered again, from the place that they had.
        :param delay: for how long they are kept before.
        :param note: why; it goes with a dead letter.
        :param seen: that somebody has looked at them; what nobody has is not counted as delivered.
        """
        raise NotImplementedError

    @request(raises=[NoSuchQueue, NoSuchGroup, StoreFailed, StoreFull])
    def extend(self, queue: QueueName, tags: Tags, group: str = "") -> Deferred[Settled]:
        """Has the leases of deliveries begin anew."""
        raise NotImplementedError

    @request(idempotent=True, raises=[NoSuchQueue, NoSuchGroup, StoreFailed, InvalidArgument])
    def peek(
        self,
        queue: QueueName,
        group: str = "",
        count: Positive = 10,
        subject: ShortText = "",
        headers: Headers = {},  # noqa: B006 - it is not changed
    ) -> AsyncIterator[Waiting]:
        """Shows messages that are in a queue, in its order, and changes nothing."""
        raise NotImplementedError

    @request(raises=[NoSuchQueue, NoSuchGroup, StoreFailed, StoreFull])
    async def purge(self, queue: QueueName, group: str | None = None) -> int:
        """Removes the messages that no consumer has, of one group or of all; how many."""
        raise NotImplementedError

    @request(idempotent=True, raises=[NoSuchQueue, StoreFailed])
    async def statistics(self, queue: QueueName) -> Statistics:
        """How a queue stands."""
        raise NotImplementedError

    @request(idempotent=True, raises=[StoreFailed])
    def list(self, prefix: str = "") -> AsyncIterator[Statistics]:
        """How the queues stand whose names begin so, in the order of their names."""
        raise NotImplementedError

    @request(raises=[NoSuchQueue, NotEmpty, StoreFailed, StoreFull])
    async def delete(self, queue: QueueName, only_unused: bool = False) -> int:
        """Deletes a queue, with its messages; how many these were.

        :param only_unused: whether to refuse where it has messages or consumers.
        """
        raise NotImplementedError
