"""The rules of queues: what publishing, taking, settling and the passage of time do to rows.

Knows queues, groups and messages; not where rows are kept, nor threads, connections or consumers.  What is called here
happens within a transaction, and takes the time from a clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import msgspec

from protoframe.queue import (
    LARGEST_BODY,
    LARGEST_PROPERTIES,
    DeadLetter,
    Delivery,
    DeliveryPolicy,
    DifferentSettings,
    GroupStatistics,
    InvalidMessage,
    InvalidSettings,
    Message,
    NoSuchGroup,
    NoSuchQueue,
    NotEmpty,
    Order,
    Overflow,
    QueueFull,
    Receipt,
    Settings,
    Settled,
    State,
    Statistics,
    Tag,
    Waiting,
)
from protoframe.servers.queue.rows import (
    DELAYED,
    LEASED,
    READY,
    GroupRecord,
    QueueRecord,
    Row,
    Rows,
    row_id,
    sequence_of,
)
from protoframe.servers.queue.selector import Selector
from protoframe.servers.queue.store import Action, Position, Taken, Verdict

__all__ = ["Rules"]

#: Messages that a selector looks at, that the passage of time moves, and that are removed, in one go: other calls wait.
_SCAN, _SWEEP, _PURGE = 2000, 500, 2000
#: Messages that are looked at, at a time, to make room for octets.
_DROP = 64
#: Octets of dead letters that are copied at a time.
_COPIED = 4 * 1024 * 1024
#: Seconds between two looks for deduplication keys that have expired.
_FORGET_EVERY = 1.0
#: Before the first place.
_START: Position = (-(2**31), -1)

_FIXED = ("order", "delivery", "storage")
_STATES = {READY: State.READY, LEASED: State.LEASED, DELAYED: State.DELAYED}


class _Properties(msgspec.Struct, array_like=True, omit_defaults=True):
    """What a message has beside its body, as it is kept."""

    subject: str = ""
    headers: dict[str, str] = {}
    key: str = ""
    priority: int = 0
    dead: DeadLetter | None = None


_NONE = _Properties()
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Properties).decode


def _properties(octets: bytes | None) -> _Properties:
    return _NONE if octets is None else _decode(octets)


class Rules:
    """What queues do.

    :param rows: where everything is.
    :param clock: gives the time, in seconds since the epoch.
    :ivar queues: by their names.
    :ivar woken: groups of which messages came to be ready in another way than by being published to them, in
        transactions that were committed.
    :ivar lost: leases that ended by themselves, in these: queue, group and tag.
    :ivar next_due: not after when `sweep` has something to do.
    """

    def __init__(self, rows: Rows, clock: Callable[[], float]) -> None:
        self._rows = rows
        self._clock = clock
        self.queues: dict[str, QueueRecord] = {}
        self.woken: set[tuple[str, str]] = set()
        self.lost: list[tuple[str, str, Tag]] = []
        self.next_due = math.inf
        self._groups: dict[int, tuple[QueueRecord, GroupRecord]] = {}
        self._new: list[Row] = []
        # What is told when the transaction is committed.
        self._woken: set[tuple[str, str]] = set()
        self._lost: list[tuple[str, str, Tag]] = []
        # As they were before the transaction.
        self._before: dict[GroupRecord | QueueRecord, Any] = {}
        self._catalogue: tuple[dict[str, QueueRecord], dict[int, tuple[QueueRecord, GroupRecord]]] | None = None
        self._forgets_at = 0.0
        self._due_before = (self.next_due, self._forgets_at)

    # Transactions.

    def load(self) -> None:
        """Takes up what is there; nobody has a lease any more."""
        for queue in self._rows.load():
            self.queues[queue.name] = queue
            for group in queue.groups.values():
                self._groups[group.id] = (queue, group)
                queue.sequence = max(queue.sequence, group.sequence)
        for queue, group in list(self._groups.values()):
            while leased := self._rows.in_state(group.id, LEASED, _START, _PURGE):
                self.begin()
                self._give_back(queue, group, leased, self._clock(), Verdict(Action.AGAIN))
                self.commit()
        self.woken.clear()
        # Deduplication keys may have expired, too.
        self.next_due = min(self._rows.next_due(), self._clock())

    def begin(self) -> None:
        """A transaction begins."""
        self._due_before = (self.next_due, self._forgets_at)
        self._rows.begin()

    def commit(self) -> None:
        """Makes all of it durable."""
        self._flush()
        for record in self._before:
            if isinstance(record, GroupRecord) and record.id in self._groups:
                record.sequence = self._groups[record.id][0].sequence
                self._rows.save_group(record)
        self._rows.commit()
        self.woken |= self._woken
        self.lost += self._lost
        self._end_transaction()

    def rollback(self) -> None:
        """Undoes all of it."""
        self._new = []
        for record, fields in self._before.items():
            for name, value in fields.items():
                setattr(record, name, value)
        if self._catalogue is not None:
            self.queues, self._groups = self._catalogue
        # What a sweep did is due again.
        due, forgets = self._due_before
        self.next_due, self._forgets_at = min(self.next_due, due), min(self._forgets_at, forgets)
        self._end_transaction()
        self._rows.rollback()

    def _end_transaction(self) -> None:
        self._before.clear()
        self._catalogue = None
        self._woken.clear()
        self._lost.clear()

    def _touch(self, record: GroupRecord | QueueRecord) -> None:
        if record not in self._before:
            fields = msgspec.structs.asdict(record)
            if "groups" in fields:
                fields["groups"] = dict(fields["groups"])
            self._before[record] = fields

    def _flush(self) -> None:
        if self._new:
            rows, self._new = self._new, []
            self._rows.insert(rows)

    def _wake_by(self, due: float) -> None:
        self.next_due = min(self.next_due, due)

    # Queues.

    def _queue(self, name: str) -> QueueRecord:
        queue = self.queues.get(name)
        if queue is None:
            raise NoSuchQueue(f"there is no queue {name}", queue=name)
        return queue

    def _group(self, name: str, group: str) -> tuple[QueueRecord, GroupRecord]:
        queue = self._queue(name)
        found = queue.groups.get(group)
        if found is None:
            known = ", ".join(sorted(filter(None, queue.groups)))
            text = f"queue {name} has no group {group!r}" + (f", but {known}" if known else "; it has no named groups")
            raise NoSuchGroup(text, queue=name, group=group)
        return queue, found

    def _save_catalogue(self) -> None:
        if self._catalogue is None:
            self._catalogue = (dict(self.queues), dict(self._groups))

    def declare(self, name: str, settings: Settings, replace: bool) -> bool:
        """Has a queue be there.

        :raises InvalidSettings: they do not go together.
        :raises NoSuchQueue: its dead-letter queue is not there.
        :raises DifferentSettings: it is there, with others.
        """
        self._check(name, settings)
        queue = self.queues.get(name)
        if queue is None:
            if settings.order is Order.LAST_VALUE:
                for other in self.queues.values():
                    if other.settings.dead_letter == name:
                        text = f"order: queue {name} gets the dead letters of {other.name}, which have no keys"
                        raise InvalidSettings(text)
            self._save_catalogue()
            now = self._clock()
            queue = QueueRecord(self._rows.add_queue(name, settings, now), name, settings, now, {})
            self.queues[name] = queue
            for group in settings.groups or ("",):
                self._add_group(queue, group)
            return True
        different = [
            field for field in Settings.__struct_fields__ if getattr(settings, field) != getattr(queue.settings, field)
        ]
        fixed = [field for field in different if field in _FIXED]
        if fixed:
            text = f"queue {name} is there with another {', '.join(fixed)}, which cannot be changed"
            raise DifferentSettings(text, queue=name, fields=fixed)
        if different and not replace:
            text = f"queue {name} is there with another {', '.join(different)}"
            raise DifferentSettings(text, queue=name, fields=different)
        if different:
            self._replace(queue, settings)
        return False

    def _check(self, name: str, settings: Settings) -> None:
        if len(set(settings.groups)) < len(settings.groups):
            raise InvalidSettings("groups: one is there twice")
        target, seen = settings.dead_letter, {name}
        while target is not None:
            if target in seen:
                raise InvalidSettings(f"dead_letter: {target} would get its own dead letters")
            seen.add(target)
            letters = self.queues.get(target)
            if letters is None:
                if target == settings.dead_letter:
                    raise NoSuchQueue(f"dead_letter: there is no queue {target}", queue=target)
                break
            if letters.settings.order is Order.LAST_VALUE:
                raise InvalidSettings(f"dead_letter: {target} keeps the last value of each key")
            target = letters.settings.dead_letter

    def _replace(self, queue: QueueRecord, settings: Settings) -> None:
        self._save_catalogue()
        self._touch(queue)
        queue.settings = settings
        self._rows.change_queue(queue.id, settings)
        wanted = settings.groups or ("",)
        for name in wanted:
            if name not in queue.groups:
                self._add_group(queue, name)
        for name in [name for name in queue.groups if name not in wanted]:
            group = queue.groups.pop(name)
            self._remove_group(group)

    def _add_group(self, queue: QueueRecord, name: str) -> None:
        number = self._rows.add_group(queue.id, name, queue.sequence)
        group = GroupRecord(number, name, sequence=queue.sequence)
        queue.groups[name] = group
        self._groups[number] = (queue, group)

    def _remove_group(self, group: GroupRecord) -> None:
        self._flush()
        del self._groups[group.id]
        self._rows.remove_group(group.id)
        self._wake_by(self._clock())

    def delete(self, name: str, only_empty: bool) -> int:
        """Deletes a queue.

        :raises NotEmpty: it has messages, and was to be deleted without only.
        """
        queue = self._queue(name)
        depth = sum(group.ready + group.delayed + group.leased for group in queue.groups.values())
        if only_empty and depth:
            raise NotEmpty(f"queue {name} has {depth} messages", queue=name)
        self._save_catalogue()
        del self.queues[name]
        for group in queue.groups.values():
            self._remove_group(group)
        self._rows.remove_queue(queue.id)
        return depth

    # Publishing.

    def publish(self, name: str, messages: Sequence[Message]) -> list[Receipt]:
        """Stores messages, all or none.

        :raises InvalidMessage: one is not for this queue.
        :raises QueueFull: there is no room.
        """
        queue = self._queue(name)
        settings = queue.settings
        now = self._clock()
        rows = [self._row(queue, message, now) for message in messages]
        fresh: list[tuple[str, int]] = []
        if settings.dedup_window:
            receipts, rows, fresh = self._news(queue, messages, rows, now)
        else:
            receipts = [Receipt(number) for number in range(queue.sequence + 1, queue.sequence + 1 + len(rows))]
        stored = len(rows)
        for number, row in enumerate(rows, queue.sequence + 1):
            row.id = number
        superseded: dict[int, list[Row]] = {}
        if settings.order is Order.LAST_VALUE:
            rows = list({row.key: row for row in rows}.values())
            superseded = {group.id: self._superseded(group, rows) for group in queue.groups.values()}
        self._touch(queue)
        if settings.max_messages is not None or settings.max_bytes is not None:
            for group in queue.groups.values():
                self._check_room(queue, group, rows, superseded.get(group.id, []))
        # From here on nothing is refused any more.
        queue.sequence += stored
        queue.published += stored
        queue.duplicates += len(messages) - stored
        if fresh:
            expires = now + settings.dedup_window
            self._rows.remember(queue.id, fresh, expires)
            self._forgets_at = min(self._forgets_at, expires)
            self._wake_by(expires)
        for group in queue.groups.values():
            if superseded:
                self._remove(group, superseded[group.id])
            self._add(queue, group, rows)
            if settings.overflow is Overflow.DROP_OLDEST:
                self._make_room(queue, group, now)
        return receipts

    def _row(self, queue: QueueRecord, message: Message, now: float) -> Row:
        """A message, without a number and a group yet."""
        settings = queue.settings
        size = len(message.body)
        if size > LARGEST_BODY:
            text = f"the body has {size} octets, and {LARGEST_BODY} are allowed"
            raise InvalidMessage(text, queue=queue.name)
        properties = None
        if message.subject or message.headers or message.key or message.priority:
            properties = _encode(_Properties(message.subject, message.headers, message.key, message.priority))
            if len(properties) > LARGEST_PROPERTIES:
                text = f"the properties have {len(properties)} octets, and {LARGEST_PROPERTIES} are allowed"
                raise InvalidMessage(text, queue=queue.name)
            size += len(properties)
        key = None
        if settings.order is Order.LAST_VALUE:
            if not message.key:
                text = f"queue {queue.name} keeps the last value of each key, and the message has none"
                raise InvalidMessage(text, queue=queue.name)
            key = message.key
        rank = -message.priority if settings.order is Order.PRIORITY else 0
        delay = settings.delay if message.delay is None else message.delay
        state, due = (DELAYED, now + delay) if delay else (READY, None)
        expires = None
        if message.ttl is not None or settings.message_ttl is not None:
            expires = _earliest(now, message.ttl, settings.message_ttl)
        return Row(0, 0, rank, state, due, 0, 0, 0, expires, key, size, now, properties, message.body)

    def _news(
        self, queue: QueueRecord, messages: Sequence[Message], rows: list[Row], now: float
    ) -> tuple[list[Receipt], list[Row], list[tuple[str, int]]]:
        """Receipts, the messages that are not known yet, and the deduplication keys of these, with their numbers."""
        keys = [message.dedup for message in messages if message.dedup]
        known = self._rows.known(queue.id, keys, now) if keys else {}
        sequence = queue.sequence
        receipts, new, fresh = [], [], []
        for message, row in zip(messages, rows, strict=True):
            earlier = known.get(message.dedup) if message.dedup else None
            if earlier is not None:
                receipts.append(Receipt(earlier, True))
                continue
            sequence += 1
            receipts.append(Receipt(sequence))
            new.append(row)
            if message.dedup:
                known[message.dedup] = sequence
                fresh.append((message.dedup, sequence))
        return receipts, new, fresh

    def _superseded(self, group: GroupRecord, rows: list[Row]) -> list[Row]:
        """What rows take the place of."""
        self._flush()
        return self._rows.by_key(group.id, [row.key for row in rows if row.key is not None])

    def _check_room(self, queue: QueueRecord, group: GroupRecord, rows: list[Row], superseded: list[Row]) -> None:
        settings = queue.settings
        messages, octets = settings.max_messages, settings.max_bytes
        if not rows:
            return
        if settings.overflow is Overflow.REFUSE:
            count = group.ready + group.delayed + len(rows) - len(superseded)
            size = group.bytes - group.leased_bytes + _size(rows) - _size(superseded)
            is_full = (messages is not None and count > messages) or (octets is not None and size > octets)
        else:
            # The others make room, but none can make more than there is.
            is_full = octets is not None and any(row.size > octets for row in rows)
        if is_full:
            queue.refused += len(rows)
            waits = group.ready + group.delayed
            text = f"queue {queue.name} has no room for {len(rows)} messages of {_size(rows)} octets: {waits} wait"
            raise QueueFull(text, queue=queue.name, max_messages=messages, max_bytes=octets)

    def _add(self, queue: QueueRecord, group: GroupRecord, rows: Iterable[Row]) -> None:
        """New messages of a group, of which each has its number in the queue instead of its row's."""
        self._touch(group)
        is_only = len(queue.groups) == 1
        for template in rows:
            identifier = row_id(group.id, template.id)
            if is_only:
                row = template
                row.id, row.group = identifier, group.id
            else:
                row = msgspec.structs.replace(template, id=identifier, group=group.id)
            if row.state == READY:
                group.ready += 1
            else:
                group.delayed += 1
                self._wake_by(row.due or 0.0)
            if row.expires is not None:
                self._wake_by(row.expires)
            group.bytes += row.size
            self._new.append(row)

    def _make_room(self, queue: QueueRecord, group: GroupRecord, now: float) -> None:
        """The oldest go, where there are too many."""
        settings = queue.settings
        while True:
            excess = 0 if settings.max_messages is None else group.ready + group.delayed - settings.max_messages
            octets = 0 if settings.max_bytes is None else group.bytes - group.leased_bytes - settings.max_bytes
            if excess <= 0 and octets <= 0:
                return
            self._flush()
            oldest = self._rows.oldest(group.id, min(max(excess, 1 if octets <= 0 else _DROP), _SWEEP))
            if octets > 0:
                # Those that are needed for the octets, or for the number where these are more.
                sums = accumulate(row.size for row in oldest)
                enough = next((count for count, size in enumerate(sums, 1) if size >= octets), len(oldest))
                oldest = oldest[: max(excess, enough)]
            if not oldest:
                return
            group.dropped += len(oldest)
            self._bury(queue, group, oldest, "dropped", "", now)

    # Removing.

    def _remove(self, group: GroupRecord, rows: Sequence[Row]) -> None:
        """Messages are gone."""
        if not rows:
            return
        self._touch(group)
        for row in rows:
            if row.state == READY:
                group.ready -= 1
            elif row.state == DELAYED:
                group.delayed -= 1
            else:
                group.leased -= 1
                group.leased_bytes -= row.size
            group.bytes -= row.size
        self._rows.delete([row.id for row in rows])

    def _bury(
        self, queue: QueueRecord, group: GroupRecord, rows: Sequence[Row], reason: str, note: str, now: float
    ) -> None:
        """Messages are dead letters."""
        if not rows:
            return
        self._touch(group)
        group.dead_lettered += len(rows)
        letters = self.queues.get(queue.settings.dead_letter or "")
        if letters is not None:
            self._touch(letters)
            for part in _parts(rows):
                copies = [self._dead(queue, group, letters, row, reason, note, now) for row in part]
                for target in letters.groups.values():
                    self._add(letters, target, copies)
                self._flush()
            for target in letters.groups.values():
                self._woken.add((letters.name, target.name))
        self._remove(group, rows)
        if letters is not None and letters.settings.overflow is Overflow.DROP_OLDEST:
            for target in letters.groups.values():
                self._make_room(letters, target, now)

    def _dead(
        self,
        queue: QueueRecord,
        group: GroupRecord,
        letters: QueueRecord,
        row: Row,
        reason: str,
        note: str,
        now: float,
    ) -> Row:
        properties = _properties(row.properties)
        dead = DeadLetter(
            reason=reason,
            queue=queue.name,
            group=group.name,
            sequence=sequence_of(row.id),
            attempts=row.leases - row.unseen,
            time=now,
            note=note,
        )
        octets = _encode(msgspec.structs.replace(properties, dead=dead))
        body = self._rows.body(row.id)
        letters.sequence += 1
        letters.published += 1
        settings = letters.settings
        rank = -properties.priority if settings.order is Order.PRIORITY else 0
        expires = _earliest(now, settings.message_ttl)
        size = len(octets) + len(body)
        return Row(letters.sequence, 0, rank, READY, None, 0, 0, 0, expires, None, size, row.published, octets, body)

    # Taking.

    def take(
        self, name: str, group_name: str, count: int, octets: int, selector: Selector | None, after: Position | None
    ) -> Taken:
        """Gives messages to a consumer."""
        queue, group = self._group(name, group_name)
        self._flush()
        if not group.ready:
            return Taken([], after, False)
        now = self._clock()
        position = after
        if selector is None:
            rows, is_more = self._first(group, count, octets, now)
        else:
            rows, position, is_more = self._selected(group, count, octets, selector, after, now)
        if not rows:
            return Taken([], position, is_more)
        self._touch(group)
        group.delivered += len(rows)
        ids = [row.id for row in rows]
        if queue.settings.delivery is DeliveryPolicy.AT_MOST_ONCE:
            self._remove(group, rows)
            return Taken([_delivery(row, 0, row.leases - row.unseen + 1) for row in rows], position, is_more)
        due = now + queue.settings.lease
        self._rows.lease(ids, due)
        self._wake_by(due)
        group.ready -= len(rows)
        group.leased += len(rows)
        group.leased_bytes += _size(rows)
        deliveries = [_delivery(row, row.leases + 1, row.leases + 1 - row.unseen) for row in rows]
        group.redelivered += sum(delivery.redelivered for delivery in deliveries)
        return Taken(deliveries, position, is_more)

    def _first(self, group: GroupRecord, count: int, octets: int, now: float) -> tuple[list[Row], bool]:
        rows: list[Row] = []
        expired = 0
        for row in self._rows.ready(group.id):
            if row.expires is not None and row.expires <= now:
                expired += 1
                if expired == _SCAN:
                    # It is time for them to be removed.
                    return rows, True
                continue
            octets -= row.size
            if rows and octets < 0:
                break
            rows.append(row)
            if len(rows) == count or octets <= 0:
                break
        return rows, group.ready > len(rows) > 0

    def _selected(
        self, group: GroupRecord, count: int, octets: int, selector: Selector, after: Position | None, now: float
    ) -> tuple[list[Row], Position | None, bool]:
        position = after
        waits = self._rows.waits(group.id, after or _START, _SCAN)
        rows: list[Row] = []
        for wait in waits:
            properties = _properties(wait.properties)
            is_expired = wait.expires is not None and wait.expires <= now
            if not is_expired and selector.takes(properties.subject, properties.headers):
                (row,) = self._rows.get([wait.id])
                octets -= row.size
                if rows and octets < 0:
                    return rows, position, True
                row.body = self._rows.body(row.id)
                rows.append(row)
            position = (wait.rank, wait.id)
            if len(rows) == count or octets <= 0:
                return rows, position, True
        return rows, position, len(waits) == _SCAN

    # Settling.

    def settle(self, name: str, group_name: str, tags: Sequence[Tag], verdict: Verdict) -> Settled:
        """Ends leases."""
        queue, group = self._group(name, group_name)
        rows, lost = self._tagged(group, tags)
        if rows:
            self._touch(group)
            now = self._clock()
            if verdict.action is Action.DONE:
                group.acknowledged += len(rows)
                self._remove(group, rows)
            elif verdict.action is Action.DEAD:
                self._bury(queue, group, rows, "rejected", verdict.note, now)
            else:
                self._give_back(queue, group, rows, now, verdict)
        return Settled(len(rows), lost)

    def extend(self, name: str, group_name: str, tags: Sequence[Tag]) -> Settled:
        """Has leases begin anew."""
        queue, group = self._group(name, group_name)
        rows, lost = self._tagged(group, tags)
        ended = [row for row in rows if row.state != LEASED]
        rows = [row for row in rows if row.state == LEASED]
        if rows:
            due = self._clock() + queue.settings.lease
            self._rows.change([row.id for row in rows], LEASED, due)
            self._wake_by(due)
        return Settled(len(rows), lost + [Tag(sequence_of(row.id), row.leases) for row in ended])

    def _tagged(self, group: GroupRecord, tags: Sequence[Tag]) -> tuple[list[Row], list[Tag]]:
        """The messages of which the last delivery has one of these tags, and the tags of no such message."""
        self._flush()
        wanted = {row_id(group.id, tag.sequence): tag for tag in tags if 0 < tag.sequence <= _LAST_SEQUENCE}
        rows = {row.id: row for row in self._rows.get(list(wanted))} if wanted else {}
        found: dict[int, Row] = {}
        lost = []
        for tag in tags:
            row = rows.get(row_id(group.id, tag.sequence)) if 0 < tag.sequence <= _LAST_SEQUENCE else None
            if row is not None and row.leases == tag.lease > 0:
                found[row.id] = row
            else:
                lost.append(tag)
        return list(found.values()), lost

    def _give_back(
        self, queue: QueueRecord, group: GroupRecord, rows: Sequence[Row], now: float, verdict: Verdict
    ) -> None:
        """Messages that consumers had are delivered again, but for those that have been too often, or are of no use."""
        is_unseen = verdict.action is Action.UNSEEN
        most = queue.settings.max_deliveries
        expired: list[Row] = []
        worn: list[Row] = []
        back: list[Row] = []
        for row in rows:
            if row.expires is not None and row.expires <= now:
                expired.append(row)
            elif not is_unseen and most is not None and row.leases - row.unseen >= most:
                worn.append(row)
            else:
                back.append(row)
        if queue.settings.order is Order.LAST_VALUE:
            back = self._still_last(group, back)
        if back:
            self._touch(group)
            state, due = (DELAYED, now + verdict.delay) if verdict.delay else (READY, None)
            for row in back:
                self._moved(group, row, state)
            # That may be said when the lease has ended, of a connection that was lost.
            self._rows.change([row.id for row in back], state, due, unseen=is_unseen)
            if due is None:
                self._woken.add((queue.name, group.name))
            else:
                self._wake_by(due)
        if expired:
            self._touch(group)
            group.expired += len(expired)
            self._bury(queue, group, expired, "expired", "", now)
        self._bury(queue, group, worn, "max-deliveries", "", now)

    def _still_last(self, group: GroupRecord, rows: Sequence[Row]) -> list[Row]:
        """The messages of which no later one has the key; the others are gone."""
        last: dict[str | None, int] = {}
        for row in [*self._rows.by_key(group.id, [row.key for row in rows if row.key is not None]), *rows]:
            last[row.key] = max(last.get(row.key, 0), row.id)
        self._remove(group, [row for row in rows if last[row.key] != row.id])
        return [row for row in rows if last[row.key] == row.id]

    def _moved(self, group: GroupRecord, row: Row, state: int) -> None:
        """Counts that a message is in another state now."""
        if row.state == LEASED and state != LEASED:
            group.leased -= 1
            group.leased_bytes -= row.size
        elif row.state == READY:
            group.ready -= 1
        elif row.state == DELAYED:
            group.delayed -= 1
        if state == READY:
            group.ready += 1
        else:
            group.delayed += 1

    # Time.

    def sweep(self) -> bool:
        """Does what is due; whether there is more to do at once."""
        self._flush()
        now = self._clock()
        due = self._rows.due(now, _SWEEP)
        for queue, group, found in self._by_group(due):
            leased = [row for row in found if row.state == LEASED]
            self._lost += [(queue.name, group.name, Tag(sequence_of(row.id), row.leases)) for row in leased]
            self._give_back(queue, group, leased, now, Verdict(Action.AGAIN))
            delayed = [row for row in found if row.state == DELAYED]
            if delayed:
                self._touch(group)
                for row in delayed:
                    self._moved(group, row, READY)
                self._rows.change([row.id for row in delayed], READY, None)
                self._woken.add((queue.name, group.name))
        expired = self._rows.expired(now, _SWEEP)
        for queue, group, rows in self._by_group(expired):
            self._touch(group)
            group.expired += len(rows)
            self._bury(queue, group, rows, "expired", "", now)
        is_more = self._rows.collect(_PURGE)
        if now >= self._forgets_at:
            self._forgets_at = max(self._rows.forget(now, _PURGE), now + _FORGET_EVERY)
        self._flush()
        self.next_due = min(self._rows.next_due(), self._forgets_at)
        return is_more or len(due) == _SWEEP or len(expired) == _SWEEP

    def _by_group(self, rows: Iterable[Row]) -> list[tuple[QueueRecord, GroupRecord, list[Row]]]:
        groups: dict[int, list[Row]] = {}
        for row in rows:
            groups.setdefault(row.group, []).append(row)
        return [(*self._groups[number], found) for number, found in groups.items() if number in self._groups]

    # Looking.

    def browse(
        self, name: str, group_name: str, count: int, octets: int, selector: Selector | None, after: Any
    ) -> tuple[list[Waiting], Any]:
        """Messages as they are, and where to go on."""
        _, group = self._group(name, group_name)
        self._flush()
        place, position = after if after is not None else (0, _START)
        found: list[Waiting] = []
        state = _BROWSED[place]
        rows = self._rows.in_state(group.id, state, position, min(count, _SWEEP) if selector is None else _SWEEP)
        for row in rows:
            properties = _properties(row.properties)
            if selector is None or selector.takes(properties.subject, properties.headers):
                octets -= row.size
                if found and (octets < 0 or len(found) == count):
                    return found, (place, position)
                row.body = self._rows.body(row.id)
                delivery = _delivery(row, row.leases, row.leases - row.unseen)
                found.append(Waiting(message=delivery, state=_STATES[state], due=row.due))
            position = (row.rank, row.id)
        if rows:
            return found, (place, position)
        return found, (place + 1, _START) if place + 1 < len(_BROWSED) else None

    def purge(self, name: str, group_name: str) -> int:
        """Removes messages that nobody has; how many, 0 when there are no more."""
        _, group = self._group(name, group_name)
        self._flush()
        rows = self._rows.in_state(group.id, READY, _START, _PURGE) or self._rows.in_state(
            group.id, DELAYED, _START, _PURGE
        )
        self._remove(group, rows)
        return len(rows)

    def statistics(self, name: str) -> Statistics:
        """How a queue stands."""
        queue = self._queue(name)
        self._flush()
        now = self._clock()
        groups = []
        for group in queue.groups.values():
            first = self._rows.first_published(group.id)
            groups.append(
                GroupStatistics(
                    name=group.name,
                    ready=group.ready,
                    delayed=group.delayed,
                    leased=group.leased,
                    bytes=group.bytes,
                    oldest_age=None if first is None else max(0.0, now - first),
                    delivered=group.delivered,
                    redelivered=group.redelivered,
                    acknowledged=group.acknowledged,
                    dead_lettered=group.dead_lettered,
                    expired=group.expired,
                    dropped=group.dropped,
                )
            )
        return Statistics(
            name=queue.name,
            settings=queue.settings,
            created=queue.created,
            depth=sum(group.ready + group.delayed + group.leased for group in groups),
            bytes=sum(group.bytes for group in groups),
            published=queue.published,
            duplicates=queue.duplicates,
            refused=queue.refused,
            groups=groups,
        )


#: In which order states are shown.
_BROWSED = (READY, DELAYED, LEASED)
_LAST_SEQUENCE = sequence_of(-1)


def _earliest(now: float, *durations: float | None) -> float | None:
    known = [duration for duration in durations if duration is not None]
    return now + min(known) if known else None


def _parts(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The same in parts, of which the bodies may be in memory at once."""
    part: list[Row] = []
    octets = 0
    for row in rows:
        part.append(row)
        octets += row.size
        if octets >= _COPIED:
            yield part
            part, octets = [], 0
    if part:
        yield part


def _size(rows: Iterable[Row]) -> int:
    return sum(row.size for row in rows)


def _delivery(row: Row, lease: int, attempt: int) -> Delivery:
    if row.properties is None:
        return Delivery(
            sequence=sequence_of(row.id),
            body=row.body,
            lease=lease,
            attempt=attempt,
            redelivered=attempt > 1,
            published=row.published,
            expires=row.expires,
        )
    properties = _decode(row.properties)
    return Delivery(
        sequence=sequence_of(row.id),
        body=row.body,
        lease=lease,
        attempt=attempt,
        redelivered=attempt > 1,
        published=row.published,
        expires=row.expires,
        subject=properties.subject,
        headers=properties.headers,
        key=properties.key,
        priority=properties.priority,
        dead=properties.dead,
    )
