"""The rows that a queue is made of, and what a table of them can do.

Knows no rule of queues: `protoframe.servers.queue.rules` has these, and works on whatever implements `Rows`.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from protoframe.queue import Settings

__all__ = [
    "DELAYED",
    "LEASED",
    "READY",
    "SEQUENCE_BITS",
    "GroupRecord",
    "QueueRecord",
    "Row",
    "Rows",
    "Waits",
    "row_id",
    "sequence_of",
]

READY, LEASED, DELAYED = 0, 1, 2

#: Of a message's number in its queue: as many as four million million.  The others of 63 are the group's.
SEQUENCE_BITS = 42


def row_id(group: int, sequence: int) -> int:
    """The number of a message's row: those of a group are next to each other, in the order of publication."""
    return group << SEQUENCE_BITS | sequence


def sequence_of(identifier: int) -> int:
    """The message's number in its queue."""
    return identifier & ((1 << SEQUENCE_BITS) - 1)


class Row(msgspec.Struct):
    """A message, in one group of consumers.

    :ivar id: `row_id`.
    :ivar group: the group's number.
    :ivar rank: what is lower is delivered before.
    :ivar state: `READY`, `LEASED` or `DELAYED`.
    :ivar due: when the lease or the delay ends.
    :ivar leases: how often it was given to a consumer.
    :ivar unseen: how often of these nobody looked at it.
    :ivar unseen_at: the last of these.
    :ivar expires: when it does.
    :ivar key: where the last value of each is kept.
    :ivar size: octets of body and properties.
    :ivar published: when it was.
    :ivar properties: what else a message has, encoded.
    :ivar body: empty where it was not asked for: bodies may be large.
    """

    id: int
    group: int
    rank: int
    state: int
    due: float | None
    leases: int
    unseen: int
    unseen_at: int
    expires: float | None
    key: str | None
    size: int
    published: float
    properties: bytes | None
    body: bytes = b""


class Waits(msgspec.Struct):
    """What a selector looks at, of a row that is ready."""

    rank: int
    id: int
    expires: float | None
    properties: bytes | None


class GroupRecord(msgspec.Struct, eq=False):
    """A group of consumers, and counts of its messages; those behind ``sequence`` are not kept beyond a restart."""

    id: int
    name: str
    ready: int = 0
    delayed: int = 0
    leased: int = 0
    bytes: int = 0
    leased_bytes: int = 0
    sequence: int = 0
    delivered: int = 0
    redelivered: int = 0
    acknowledged: int = 0
    dead_lettered: int = 0
    expired: int = 0
    dropped: int = 0


class QueueRecord(msgspec.Struct, eq=False):
    """A queue.

    :ivar sequence: the number of the last message.
    """

    id: int
    name: str
    settings: Settings
    created: float
    groups: dict[str, GroupRecord]
    sequence: int = 0
    published: int = 0
    duplicates: int = 0
    refused: int = 0


class Rows(typing.Protocol):
    """A table of messages, with what goes with it.  Between `begin` and `commit` or `rollback`, but for `load`."""

    def load(self) -> list[QueueRecord]:
        """The queues, with their groups."""
        ...

    def begin(self) -> None:
        """A transaction begins."""
        ...

    def commit(self) -> None:
        """Makes it durable."""
        ...

    def rollback(self) -> None:
        """Undoes it."""
        ...

    # Queues and groups.

    def add_queue(self, name: str, settings: Settings, created: float) -> int:
        """A new queue; its number."""
        ...

    def change_queue(self, queue: int, settings: Settings) -> None:
        """Other settings."""
        ...

    def remove_queue(self, queue: int) -> None:
        """It is gone, with its deduplication keys.  Its groups are removed each by itself."""
        ...

    def add_group(self, queue: int, name: str, sequence: int) -> int:
        """A new group; its number."""
        ...

    def save_group(self, group: GroupRecord) -> None:
        """Keeps its counts."""
        ...

    def remove_group(self, group: int) -> None:
        """It is gone; its messages are, as far as `collect` has come."""
        ...

    def collect(self, most: int) -> bool:
        """Removes so many messages of groups that are gone; whether there are more."""
        ...

    # Messages.

    def insert(self, rows: Sequence[Row]) -> None:
        """New ones."""
        ...

    def get(self, ids: Sequence[int]) -> list[Row]:
        """Those that are there, in no order, without their bodies; so are all others, but where it is said."""
        ...

    def body(self, identifier: int) -> bytes:
        """Of one that is there."""
        ...

    def delete(self, ids: Sequence[int]) -> None:
        """They are gone."""
        ...

    def lease(self, ids: Sequence[int], due: float) -> None:
        """A consumer has them, once more."""
        ...

    def change(self, ids: Sequence[int], state: int, due: float | None, *, unseen: bool = False) -> None:
        """Sets their state.

        :param unseen: counts their last lease as one in which nobody looked at them; once, however often it is said.
        """
        ...

    def ready(self, group: int) -> Iterator[Row]:
        """Those that are ready, with bodies, in the order of rank and number; nothing else is asked meanwhile."""
        ...

    def waits(self, group: int, after: tuple[int, int], most: int) -> list[Waits]:
        """The same behind a place."""
        ...

    def oldest(self, group: int, most: int) -> list[Row]:
        """The first by number that are not leased."""
        ...

    def by_key(self, group: int, keys: Sequence[str]) -> list[Row]:
        """Those with a key that are not leased."""
        ...

    def in_state(self, group: int, state: int, after: tuple[int, int], most: int) -> list[Row]:
        """Those in a state, in the order of rank and number, behind a place."""
        ...

    def first_published(self, group: int) -> float | None:
        """When the first by number was."""
        ...

    def due(self, now: float, most: int) -> list[Row]:
        """Those whose lease or delay has ended."""
        ...

    def expired(self, now: float, most: int) -> list[Row]:
        """Those that have expired, but for leased ones."""
        ...

    def next_due(self) -> float:
        """When the next is due or expires; the past where messages are to be collected, infinity where nothing is."""
        ...

    # Deduplication keys.

    def known(self, queue: int, keys: Sequence[str], now: float) -> dict[str, int]:
        """The numbers of the messages that had them, where they have not expired."""
        ...

    def remember(self, queue: int, keys: Iterable[tuple[str, int]], expires: float) -> None:
        """Keys, with the numbers of their messages."""
        ...

    def forget(self, now: float, most: int) -> float:
        """Removes so many keys that have expired; when the next does, infinity where there is none."""
        ...
