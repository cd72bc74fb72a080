"""The store in memory: for queues that need not outlive the server, and for tests.

Knows how rows are found in memory; what is done with them is `protoframe.servers.queue.rules`'s.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from zope.interface import implementer

from protoframe.queue import Settings
from protoframe.servers.queue.rows import DELAYED, LEASED, READY, GroupRecord, QueueRecord, Row, Waits
from protoframe.servers.queue.ruled import RuledStore
from protoframe.servers.queue.rules import Rules
from protoframe.servers.queue.store import IStore, IStoreListener

__all__ = ["MemoryRows", "MemoryStore"]

#: Places that are left unused at the beginning of a list before it is made shorter; and times, of rows that are gone.
_SLACK = 1000


class _Places:
    """Places in order, which mostly come at the end and go at the beginning."""

    __slots__ = ("_head", "_places")

    def __init__(self) -> None:
        self._places: list[tuple[int, int]] = []
        self._head = 0

    def add(self, place: tuple[int, int]) -> None:
        if not self._places or place > self._places[-1]:
            self._places.append(place)
        else:
            insort(self._places, place, lo=self._head)

    def remove(self, place: tuple[int, int]) -> None:
        at = bisect_left(self._places, place, lo=self._head)
        if at > self._head:
            del self._places[at]
            return
        self._head += 1
        if self._head > _SLACK and 2 * self._head > len(self._places):
            del self._places[: self._head]
            self._head = 0

    def after(self, place: tuple[int, int], most: int) -> list[tuple[int, int]]:
        at = bisect_right(self._places, place, lo=self._head)
        return self._places[at : at + most]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for at in range(self._head, len(self._places)):
            yield self._places[at]


class _Group:
    __slots__ = ("by_key", "numbers", "places")

    def __init__(self) -> None:
        self.places = {READY: _Places(), LEASED: _Places(), DELAYED: _Places()}
        # Of all, by number; and of those that are not leased, by key.
        self.numbers = _Places()
        self.by_key: dict[str, set[int]] = {}


class MemoryRows:
    """Rows in memory.  Nothing is undone: the rules refuse before they change anything."""

    def __init__(self) -> None:
        self._rows: dict[int, Row] = {}
        self._groups: dict[int, _Group] = {}
        self._numbers = 0
        # What is due, and what expires: rows that have changed since are found by looking.
        self._due: list[tuple[float, int]] = []
        self._expires: list[tuple[float, int]] = []
        self._known: dict[int, dict[str, tuple[int, float]]] = {}
        self._forget: list[tuple[float, int, str]] = []

    def load(self) -> list[QueueRecord]:
        return []

    def begin(self) -> None:
        pass

    def commit(self) -> None:
        pass

    def rollback(self) -> None:
        pass

    def add_queue(self, name: str, settings: Settings, created: float) -> int:
        self._numbers += 1
        return self._numbers

    def change_queue(self, queue: int, settings: Settings) -> None:
        pass

    def remove_queue(self, queue: int) -> None:
        self._known.pop(queue, None)

    def add_group(self, queue: int, name: str, sequence: int) -> int:
        self._numbers += 1
        self._groups[self._numbers] = _Group()
        return self._numbers

    def save_group(self, group: GroupRecord) -> None:
        pass

    def remove_group(self, group: int) -> None:
        for _, identifier in self._groups.pop(group).numbers:
            del self._rows[identifier]

    def collect(self, most: int) -> bool:
        return False

    def insert(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._rows[row.id] = row
            self._groups[row.group].numbers.add((0, row.id))
            self._enter(row)
        self._tidy()

    def _enter(self, row: Row) -> None:
        group = self._groups[row.group]
        group.places[row.state].add((row.rank, row.id))
        if row.due is not None:
            heapq.heappush(self._due, (row.due, row.id))
        if row.state != LEASED:
            if row.key is not None:
                group.by_key.setdefault(row.key, set()).add(row.id)
            if row.expires is not None:
                heapq.heappush(self._expires, (row.expires, row.id))

    def _leave(self, row: Row) -> None:
        group = self._groups[row.group]
        group.places[row.state].remove((row.rank, row.id))
        if row.state != LEASED and row.key is not None:
            group.by_key[row.key].discard(row.id)
            if not group.by_key[row.key]:
                del group.by_key[row.key]

    def get(self, ids: Sequence[int]) -> list[Row]:
        return [_copied(self._rows[identifier]) for identifier in ids if identifier in self._rows]

    def body(self, identifier: int) -> bytes:
        return self._rows[identifier].body

    def delete(self, ids: Sequence[int]) -> None:
        for identifier in ids:
            row = self._rows.pop(identifier)
            self._leave(row)
            self._groups[row.group].numbers.remove((0, identifier))

    def lease(self, ids: Sequence[int], due: float) -> None:
        for identifier in ids:
            self._rows[identifier].leases += 1
        self.change(ids, LEASED, due)

    def change(self, ids: Sequence[int], state: int, due: float | None, *, unseen: bool = False) -> None:
        for identifier in ids:
            row = self._rows[identifier]
            self._leave(row)
            row.state, row.due = state, due
            if unseen and row.unseen_at != row.leases:
                row.unseen += 1
                row.unseen_at = row.leases
            self._enter(row)
        self._tidy()

    def _tidy(self) -> None:
        """Forgets when rows would have been due that are gone: there may be many more of them than of others."""
        most = _SLACK + 4 * len(self._rows)
        if len(self._due) > most:
            self._due = [(row.due, row.id) for row in self._rows.values() if row.due is not None]
            heapq.heapify(self._due)
        if len(self._expires) > most:
            rows = (row for row in self._rows.values() if row.state != LEASED)
            self._expires = [(row.expires, row.id) for row in rows if row.expires is not None]
            heapq.heapify(self._expires)

    def ready(self, group: int) -> Iterator[Row]:
        for _, identifier in self._groups[group].places[READY]:
            row = _copied(self._rows[identifier])
            row.body = self._rows[identifier].body
            yield row

    def waits(self, group: int, after: tuple[int, int], most: int) -> list[Waits]:
        rows = [self._rows[identifier] for _, identifier in self._groups[group].places[READY].after(after, most)]
        return [Waits(row.rank, row.id, row.expires, row.properties) for row in rows]

    def oldest(self, group: int, most: int) -> list[Row]:
        found: list[Row] = []
        for _, identifier in self._groups[group].numbers:
            row = self._rows[identifier]
            if row.state != LEASED:
                found.append(_copied(row))
                if len(found) == most:
                    break
        return found

    def by_key(self, group: int, keys: Sequence[str]) -> list[Row]:
        by_key = self._groups[group].by_key
        return [_copied(self._rows[identifier]) for key in set(keys) for identifier in by_key.get(key, ())]

    def in_state(self, group: int, state: int, after: tuple[int, int], most: int) -> list[Row]:
        places = self._groups[group].places[state].after(after, most)
        return [_copied(self._rows[identifier]) for _, identifier in places]

    def first_published(self, group: int) -> float | None:
        for _, identifier in self._groups[group].numbers:
            return self._rows[identifier].published
        return None

    def due(self, now: float, most: int) -> list[Row]:
        return self._pop(self._due, now, most, lambda row: row.due)

    def expired(self, now: float, most: int) -> list[Row]:
        return self._pop(self._expires, now, most, lambda row: None if row.state == LEASED else row.expires)

    def _pop(
        self, heap: list[tuple[float, int]], now: float, most: int, when: Callable[[Row], float | None]
    ) -> list[Row]:
        found: dict[int, Row] = {}
        while heap and heap[0][0] <= now and len(found) < most:
            time, identifier = heapq.heappop(heap)
            row = self._rows.get(identifier)
            if row is not None and when(row) == time:
                found[identifier] = _copied(row)
        return list(found.values())

    def next_due(self) -> float:
        return min(
            self._first(self._due, lambda row: row.due),
            self._first(self._expires, lambda row: None if row.state == LEASED else row.expires),
        )

    def _first(self, heap: list[tuple[float, int]], when: Callable[[Row], float | None]) -> float:
        while heap:
            time, identifier = heap[0]
            row = self._rows.get(identifier)
            if row is not None and when(row) == time:
                return time
            heapq.heappop(heap)
        return math.inf

    def known(self, queue: int, keys: Sequence[str], now: float) -> dict[str, int]:
        known = self._known.get(queue, {})
        found = {key: known[key] for key in keys if key in known}
        return {key: sequence for key, (sequence, expires) in found.items() if expires > now}

    def remember(self, queue: int, keys: Iterable[tuple[str, int]], expires: float) -> None:
        known = self._known.setdefault(queue, {})
        for key, sequence in keys:
            known[key] = (sequence, expires)
            heapq.heappush(self._forget, (expires, queue, key))

    def forget(self, now: float, most: int) -> float:
        for _ in range(most):
            if not self._forget or self._forget[0][0] > now:
                break
            expires, queue, key = heapq.heappop(self._forget)
            known = self._known.get(queue, {})
            if key in known and known[key][1] == expires:
                del known[key]
        return self._forget[0][0] if self._forget else math.inf


def _copied(row: Row) -> Row:
    """A row that may be changed, without its body."""
    return Row(
        row.id,
        row.group,
        row.rank,
        row.state,
        row.due,
        row.leases,
        row.unseen,
        row.unseen_at,
        row.expires,
        row.key,
        row.size,
        row.published,
        row.properties,
    )


@implementer(IStore)
class MemoryStore(RuledStore):
    """Keeps queues in memory.  All is done at once.

    :param reactor: for the time when something is due.
    :param clock: gives the time, in seconds since the epoch.
    """

    pending_bytes = 0

    def __init__(self, reactor: Any, clock: Callable[[], float]) -> None:
        super().__init__(reactor, clock)
        self._rules = Rules(MemoryRows(), clock)

    def open(self, listener: IStoreListener) -> list[tuple[str, Settings]]:
        """Begins; there is no queue."""
        self._listener = listener
        return []

    def close(self) -> Deferred[None]:
        """Ends."""
        self._stop()
        return succeed(None)

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> Deferred[Any]:
        try:
            result = function(*arguments)
            self._rules.commit()
        except Exception as error:
            return fail(error)
        self._tell_later()
        return succeed(result)
