"""What a store of queues has to do, in lists and dicts: written from what the Protocol promises, not from the rules.

Knows the semantics alone, and is as slow as it likes.  Each method answers as the store's does, or raises the same
class of error; `Letter` says of a message that it goes to a dead-letter queue, where the store gives it its number.
"""

from __future__ import annotations

import dataclasses

from protoframe.queue import (
    DeliveryPolicy,
    DifferentSettings,
    InvalidMessage,
    InvalidSettings,
    Message,
    NoSuchGroup,
    NoSuchQueue,
    NotEmpty,
    Order,
    Overflow,
    QueueFull,
    Settings,
    Tag,
)
from protoframe.servers.queue.selector import Selector

READY, DELAYED, LEASED = "ready", "delayed", "leased"


@dataclasses.dataclass
class Item:
    """A message in a group."""

    sequence: int
    message: Message
    published: float
    expires: float | None
    state: str = READY
    due: float | None = None
    lease: int = 0
    unseen: int = 0
    unseen_at: int = 0
    reason: str = ""
    origin: tuple[str, str, int] | None = None

    @property
    def attempts(self):
        return self.lease - self.unseen

    @property
    def waits(self):
        return self.state in (READY, DELAYED)


@dataclasses.dataclass
class Group:
    items: list[Item] = dataclasses.field(default_factory=list)
    delivered: int = 0
    redelivered: int = 0
    acknowledged: int = 0
    dead_lettered: int = 0
    expired: int = 0
    dropped: int = 0

    def count(self, state):
        return sum(item.state == state for item in self.items)

    @property
    def waiting(self):
        return [item for item in self.items if item.waits]


@dataclasses.dataclass
class Queue:
    name: str
    settings: Settings
    groups: dict[str, Group]
    sequence: int = 0
    published: int = 0
    duplicates: int = 0
    refused: int = 0
    # By key: number, and until when it is known.
    dedup: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)


class Model:
    """All queues.

    :ivar now: the time.
    :ivar letters: dead letters that have no number yet: origin, reason and item, by dead-letter queue.
    :ivar lost: leases that have ended.
    :ivar woken: groups of which messages came back, or whose time came.
    """

    def __init__(self):
        self.now = 1000.0
        self.queues: dict[str, Queue] = {}
        self.letters: dict[str, list[Item]] = {}
        self.lost: set[tuple[str, str, int, int]] = set()
        self.woken: set[tuple[str, str]] = set()

    def queue(self, name):
        if name not in self.queues:
            raise NoSuchQueue("", queue=name)
        return self.queues[name]

    def group(self, name, group):
        queue = self.queue(name)
        if group not in queue.groups:
            raise NoSuchGroup("", queue=name, group=group)
        return queue, queue.groups[group]

    def declare(self, name, settings, replace):
        if len(set(settings.groups)) < len(settings.groups):
            raise InvalidSettings("")
        if settings.dead_letter == name:
            raise InvalidSettings("")
        if settings.dead_letter is not None:
            letters = self.queue(settings.dead_letter)
            if letters.settings.order is Order.LAST_VALUE or letters.settings.dead_letter == name:
                raise InvalidSettings("")
        known = self.queues.get(name)
        if known is None:
            if settings.order is Order.LAST_VALUE and any(
                other.settings.dead_letter == name for other in self.queues.values()
            ):
                raise InvalidSettings("")
            groups = {group: Group() for group in settings.groups or ("",)}
            self.queues[name] = Queue(name, settings, groups)
            return True
        if settings == known.settings:
            return False
        fixed = ("order", "delivery", "storage")
        if not replace or any(getattr(settings, field) != getattr(known.settings, field) for field in fixed):
            raise DifferentSettings("", queue=name, fields=[])
        known.settings = settings
        known.groups = {group: known.groups.get(group, Group()) for group in settings.groups or ("",)}
        return False

    def delete(self, name, only_empty):
        depth = sum(len(group.items) for group in self.queue(name).groups.values())
        if only_empty and depth:
            raise NotEmpty("", queue=name)
        del self.queues[name]
        return depth

    def publish(self, name, messages):
        queue = self.queue(name)
        settings = queue.settings
        if settings.order is Order.LAST_VALUE and not all(message.key for message in messages):
            raise InvalidMessage("", queue=name)
        receipts, items, known = [], [], {}
        sequence = queue.sequence
        for message in messages:
            if settings.dedup_window and message.dedup:
                number, until = known.get(message.dedup) or queue.dedup.get(message.dedup) or (0, 0.0)
                if until > self.now:
                    receipts.append((number, True))
                    continue
                known[message.dedup] = (sequence + 1, self.now + settings.dedup_window)
            sequence += 1
            receipts.append((sequence, False))
            items.append(self._item(sequence, message, settings))
        stored = len(items)
        if settings.order is Order.LAST_VALUE:
            items = [item for item in items if not any(superseded(item, by) for by in items)]
        for group in queue.groups.values():
            kept = [item for item in group.waiting if not self._replaced(queue, item, items)]
            if items and not self._has_room(settings, [*kept, *items], items):
                queue.refused += len(items)
                raise QueueFull("", queue=name)
        queue.sequence = sequence
        queue.published += stored
        queue.duplicates += len(messages) - stored
        queue.dedup.update(known)
        for label, group in queue.groups.items():
            group.items = [item for item in group.items if not (item.waits and self._replaced(queue, item, items))]
            group.items += [dataclasses.replace(item) for item in items]
            self._drop(queue, label, group)
        return receipts

    def _item(self, sequence, message, settings):
        delay = settings.delay if message.delay is None else message.delay
        ttls = [ttl for ttl in (message.ttl, settings.message_ttl) if ttl is not None]
        expires = self.now + min(ttls) if ttls else None
        if delay:
            return Item(sequence, message, self.now, expires, DELAYED, self.now + delay)
        return Item(sequence, message, self.now, expires)

    def _replaced(self, queue, item, items):
        return queue.settings.order is Order.LAST_VALUE and any(superseded(item, by) for by in items)

    def _has_room(self, settings, waiting, new):
        if settings.overflow is Overflow.DROP_OLDEST:
            return settings.max_bytes is None or all(len(item.message.body) <= settings.max_bytes for item in new)
        return self._fits(settings, waiting)

    def _fits(self, settings, waiting):
        octets = sum(len(item.message.body) for item in waiting)
        return (settings.max_messages is None or len(waiting) <= settings.max_messages) and (
            settings.max_bytes is None or octets <= settings.max_bytes
        )

    def _drop(self, queue, label, group):
        if queue.settings.overflow is Overflow.DROP_OLDEST:
            while not self._fits(queue.settings, group.waiting):
                group.dropped += 1
                self._bury(queue, label, group, min(group.waiting, key=lambda item: item.sequence), "dropped")

    def _bury(self, queue, label, group, item, reason):
        group.items.remove(item)
        group.dead_lettered += 1
        target = self.queues.get(queue.settings.dead_letter)
        if target is not None:
            ttl = target.settings.message_ttl
            dead = Item(
                0,
                item.message,
                item.published,
                None if ttl is None else self.now + ttl,
                reason=reason,
                origin=(queue.name, label, item.sequence),
            )
            self.letters.setdefault(target.name, []).append(dead)
            target.sequence += 1
            target.published += 1

    def place(self, name, numbers):
        """Dead letters get their numbers: by origin."""
        target = self.queues[name]
        letters = self.letters.pop(name, [])
        assert sorted(numbers) == sorted(item.origin for item in letters)
        assert sorted(numbers.values()) == list(range(target.sequence - len(letters) + 1, target.sequence + 1))
        for label, group in target.groups.items():
            for item in letters:
                group.items.append(dataclasses.replace(item, sequence=numbers[item.origin]))
            if letters:
                self.woken.add((name, label))

    def wanted(self, name, label, count, selector):
        """What the next `take` gives, at most so many."""
        queue, group = self.group(name, label)
        ready = [item for item in group.items if item.state == READY and not self._is_over(item)]
        ready.sort(key=lambda item: (rank(queue, item), item.sequence))
        return [item for item in ready if selects(selector, item.message)][:count]

    def _is_over(self, item):
        return item.expires is not None and item.expires <= self.now

    def take(self, name, label, count, selector=None):
        queue, group = self.group(name, label)
        taken = []
        for item in self.wanted(name, label, count, selector):
            group.delivered += 1
            if queue.settings.delivery is DeliveryPolicy.AT_MOST_ONCE:
                group.items.remove(item)
                taken.append((item, 0, 1))
                continue
            item.state, item.due = LEASED, self.now + queue.settings.lease
            item.lease += 1
            group.redelivered += item.attempts > 1
            taken.append((item, item.lease, item.attempts))
        return taken

    def _tagged(self, group, tags):
        items, lost = [], []
        for tag in tags:
            found = [item for item in group.items if item.sequence == tag.sequence and item.lease == tag.lease > 0]
            if not found:
                lost.append(tag)
            elif found[0] not in items:
                items.append(found[0])
        return items, lost

    def settle(self, name, label, tags, action, delay):
        queue, group = self.group(name, label)
        items, lost = self._tagged(group, tags)
        for item in items:
            if action == "done":
                group.items.remove(item)
                group.acknowledged += 1
            elif action == "dead":
                self._bury(queue, label, group, item, "rejected")
        if action in ("again", "unseen"):
            self._give_back(queue, label, items, delay, is_unseen=action == "unseen")
        return len(items), lost

    def extend(self, name, label, tags):
        queue, group = self.group(name, label)
        items, _ = self._tagged(group, tags)
        items = [item for item in items if item.state == LEASED]
        for item in items:
            item.due = self.now + queue.settings.lease
        extended = {(item.sequence, item.lease) for item in items}
        return len(items), [tag for tag in tags if (tag.sequence, tag.lease) not in extended]

    def _give_back(self, queue, label, items, delay, *, is_unseen):
        group = queue.groups[label]
        most = queue.settings.max_deliveries
        back = []
        for item in items:
            if self._is_over(item):
                group.expired += 1
                self._bury(queue, label, group, item, "expired")
            elif not is_unseen and most is not None and item.attempts >= most:
                self._bury(queue, label, group, item, "max-deliveries")
            else:
                back.append(item)
        if queue.settings.order is Order.LAST_VALUE:
            others = [item for item in group.items if item.waits or item in back]
            old = [item for item in back if any(superseded(item, by) for by in others)]
            group.items = [item for item in group.items if item not in old]
            back = [item for item in back if item not in old]
        for item in back:
            if is_unseen and item.unseen_at != item.lease:
                item.unseen += 1
                item.unseen_at = item.lease
            item.state, item.due = (DELAYED, self.now + delay) if delay else (READY, None)
        if back and not delay:
            self.woken.add((queue.name, label))

    def due(self):
        """When the next thing has to be done."""
        times = [
            time
            for queue in self.queues.values()
            for group in queue.groups.values()
            for item in group.items
            for time in (item.due, item.expires if item.waits else None)
            if time is not None
        ]
        return min(times, default=float("inf"))

    def sweep(self):
        for queue in self.queues.values():
            for label, group in queue.groups.items():
                over = [item for item in group.items if item.due is not None and item.due <= self.now]
                leased = [item for item in over if item.state == LEASED]
                self.lost |= {(queue.name, label, item.sequence, item.lease) for item in leased}
                for item in over:
                    if item.state == DELAYED:
                        item.state, item.due = READY, None
                        if not self._is_over(item):
                            self.woken.add((queue.name, label))
                self._give_back(queue, label, leased, 0, is_unseen=False)
                for item in group.waiting:
                    if self._is_over(item):
                        group.expired += 1
                        self._bury(queue, label, group, item, "expired")

    def purge(self, name, label):
        _, group = self.group(name, label)
        count = len(group.waiting)
        group.items = [item for item in group.items if not item.waits]
        return count

    def restart(self):
        """The server ends and begins again."""
        for queue in self.queues.values():
            queue.published = queue.duplicates = queue.refused = 0
            for group in queue.groups.values():
                for field in dataclasses.fields(Group)[1:]:
                    setattr(group, field.name, 0)
        for queue in self.queues.values():
            for label, group in queue.groups.items():
                leased = [item for item in group.items if item.state == LEASED]
                self._give_back(queue, label, leased, 0, is_unseen=False)


def rank(queue, item):
    return -item.message.priority if queue.settings.order is Order.PRIORITY else 0


def superseded(item, by):
    return by.message.key == item.message.key and by.sequence > item.sequence


def selects(selector, message):
    return selector is None or Selector.takes(selector, message.subject, message.headers)


def tags_of(taken):
    return [Tag(item.sequence, lease) for item, lease, _ in taken]
