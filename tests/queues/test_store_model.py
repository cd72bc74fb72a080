"""Whatever is done with a store, it is as the model says: in memory, in SQLite, and however calls are committed.

``PROTOFRAME_SEEDS`` says for how many walks (`make soak` runs many more).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from unittest import mock

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from twisted.trial.unittest import SynchronousTestCase

from protoframe import Error
from protoframe.queue import DeliveryPolicy, Message, Order, Overflow, Settings, State, Tag
from protoframe.servers.queue import rules as rules_module
from protoframe.servers.queue.memory import MemoryRows
from protoframe.servers.queue.rules import Rules
from protoframe.servers.queue.selector import Selector
from protoframe.servers.queue.sqlite import SQLiteRows
from protoframe.servers.queue.store import Action, Verdict
from tests.queues.model import DELAYED, LEASED, READY, Model, tags_of

WALKS = max(12, int(os.environ.get("PROTOFRAME_SEEDS", "0")) // 2)

_PLENTY = 2**30
#: Where dead letters of "a" and "b" go, and its own.
_DEAD = "dead"
_STATES = {READY: State.READY, DELAYED: State.DELAYED, LEASED: State.LEASED}

names = st.sampled_from(["a", "b", _DEAD])
sources = st.sampled_from(["a", "a", "a", "b", _DEAD])
picks = st.integers(0, 10**6)
selectors = st.sampled_from([None, None, Selector("red", {}), Selector("*.green", {}), Selector("", {"h": "1"})])
messages = st.builds(
    Message,
    body=st.binary(max_size=8).map(lambda octets: octets * 2),
    subject=st.sampled_from(["", "red", "light.green"]),
    headers=st.sampled_from([{}, {"h": "1"}]),
    key=st.sampled_from(["", "k", "l", "m"]),
    priority=st.integers(0, 2),
    ttl=st.sampled_from([None, None, 2.0, 6.0]),
    delay=st.sampled_from([None, None, 0.0, 3.0]),
    dedup=st.sampled_from(["", "d", "e"]),
)


@st.composite
def queue_settings(draw, name):
    order = draw(st.sampled_from([Order.FIFO, *Order] if name != _DEAD else [Order.FIFO, Order.PRIORITY]))
    # The model does not know how many octets properties have: where octets count, there are none.
    max_bytes = draw(st.sampled_from([None, None, 20])) if order is Order.FIFO and name != _DEAD else None
    return Settings(
        order=order,
        delivery=draw(st.sampled_from([DeliveryPolicy.AT_LEAST_ONCE] * 3 + [DeliveryPolicy.AT_MOST_ONCE])),
        lease=draw(st.sampled_from([1.0, 5.0])),
        max_deliveries=draw(st.sampled_from([None, None, 1, 2])),
        dead_letter=draw(st.sampled_from([None, _DEAD, _DEAD])) if name != _DEAD else None,
        message_ttl=draw(st.sampled_from([None, None, 4.0, 20.0])),
        delay=draw(st.sampled_from([0.0, 0.0, 2.0])),
        max_messages=draw(st.sampled_from([None, None, 2, 4])) if name != _DEAD else None,
        max_bytes=max_bytes,
        overflow=draw(st.sampled_from(Overflow)),
        dedup_window=draw(st.sampled_from([0.0, 5.0])),
        groups=draw(st.sampled_from([(), (), ("x",), ("x", "y")])),
    )


class Subject:
    """A store's rules, over rows, as a store has them run: by the transaction."""

    def __init__(self, clock, directory=None, *, is_grouped=False):
        self._clock = clock
        self._directory = directory
        self._is_grouped = is_grouped
        self.is_on_disk = directory is not None
        self.open()

    def open(self):
        if self.is_on_disk:
            self.rows = SQLiteRows(os.path.join(self._directory, "queue.sqlite3"))
            # Nobody pulls the plug.
            self.rows._database.execute("PRAGMA synchronous = OFF")
        else:
            self.rows = MemoryRows()
        self.rules = Rules(self.rows, self._clock)
        self.rules.load()
        self._is_in = False

    def call(self, method, *arguments):
        """What a call gives: its answer, or the class of its error."""
        self.begin()
        try:
            answer = getattr(self.rules, method)(*arguments)
        except Error as error:
            answer = type(error)
        if not self._is_grouped:
            self.commit()
        return answer

    def begin(self):
        if not self._is_in:
            self.rules.begin()
            self._is_in = True

    def commit(self):
        if self._is_in:
            self.rules.commit()
            self._is_in = False

    def undone(self, calls):
        """Calls in a transaction that is rolled back, as it is when one of them or the disk fails."""
        self.commit()
        self.rules.begin()
        for method, arguments in calls:
            with contextlib.suppress(Error):
                getattr(self.rules, method)(*arguments)
        self.rules.rollback()

    def told(self):
        """What it has to tell: groups that were woken, and leases that were lost."""
        told = (self.rules.woken, {(queue, group, *tag_of(tag)) for queue, group, tag in self.rules.lost})
        self.rules.woken, self.rules.lost = set(), []
        return told

    def reopen(self):
        self.commit()
        self.close()
        self.open()

    def close(self):
        if self.is_on_disk:
            self.rows.close()

    def counted(self, group):
        """Of a group, what is in the rows: counts and octets by state."""
        if self.is_on_disk:
            statement = "SELECT state, count(*), sum(size) FROM message WHERE consumer_group = ? GROUP BY state"
            found = {state: (count, size) for state, count, size in self.rows._database.execute(statement, (group,))}
        else:
            found = {}
            for row in self.rows._rows.values():
                if row.group == group:
                    count, size = found.get(row.state, (0, 0))
                    found[row.state] = (count + 1, size + row.size)
        return [found.get(state, (0, 0)) for state in (0, 1, 2)]

    def browsed(self, queue, group, page, selector=None):
        """All that is in a group, in pages of so many messages."""
        found, after = [], None
        while True:
            some, after = self.call("browse", queue, group, page, _PLENTY, selector, after)
            assert len(some) <= page
            found += some
            if after is None:
                return found

    def dump(self):
        """All that it knows, to be compared."""
        queues = {}
        for name, queue in self.rules.queues.items():
            groups = {group: self.browsed(name, group, 100) for group in queue.groups}
            queues[name] = (self.call("statistics", name), queue.sequence, groups)
        return queues


def tag_of(tag):
    return tag.sequence, tag.lease


class Machine(RuleBasedStateMachine):
    """Does the same with stores and with the model."""

    def __init__(self):
        super().__init__()
        self.model = Model()
        self.subjects = self.make()
        self.given = []
        # What a consumer with a selector knows: how far was looked, by queue, group and selector.
        self.positions = {}

    def clock(self):
        return self.model.now

    def make(self):
        return [Subject(self.clock)]

    def teardown(self):
        for subject in self.subjects:
            subject.close()

    def both(self, method, *arguments, model=None):
        """The same call of everyone; the stores' answer and the model's."""
        method_of_model, arguments_of_model = model or (method, arguments)
        try:
            expected = getattr(self.model, method_of_model)(*arguments_of_model)
        except Error as error:
            expected = type(error)
        answers = [subject.call(method, *arguments) for subject in self.subjects]
        for answer in answers:
            assert answer == answers[0]
        if isinstance(expected, type) or isinstance(answers[0], type):
            assert answers[0] == expected, (answers[0], expected)
            return None, None
        return answers[0], expected

    def pick(self, name, pick):
        queue = self.model.queues.get(name)
        groups = sorted(queue.groups) if queue is not None else [""]
        return [*groups, *groups, *groups, "none"][pick % (3 * len(groups) + 1)]

    # What callers do.

    @initialize(data=st.data())
    def begin(self, data):
        for name in (_DEAD, "a"):
            self.both("declare", name, data.draw(queue_settings(name)), False)

    @rule(name=names, data=st.data(), replace=st.booleans())
    def declare(self, name, data, replace):
        wanted = data.draw(queue_settings(name))
        known = self.model.queues.get(name)
        if known is not None and replace:
            same = {field: getattr(known.settings, field) for field in ("order", "delivery")}
            is_empty = not any(group.items for group in known.groups.values())
            if not is_empty or wanted.order is not Order.FIFO or same["order"] is not Order.FIFO:
                same["max_bytes"] = known.settings.max_bytes
            fields = {field: getattr(wanted, field) for field in Settings.__struct_fields__}
            wanted = Settings(**{**fields, **same})
        answer, expected = self.both("declare", name, wanted, replace)
        assert answer == expected

    @rule(name=sources, batch=st.lists(messages, min_size=1, max_size=5))
    def publish(self, name, batch):
        queue = self.model.queues.get(name)
        if queue is not None and queue.settings.max_bytes is not None:
            batch = [Message(body=one.body, ttl=one.ttl, delay=one.delay, dedup=one.dedup) for one in batch]
        elif queue is not None and queue.settings.order is Order.LAST_VALUE and len(batch) > 1:
            batch = [one for one in batch if one.key] or batch
        answer, expected = self.both("publish", name, batch)
        if answer is not None:
            assert [(one.sequence, one.is_duplicate) for one in answer] == expected
            if queue.settings.order is Order.PRIORITY:
                self.look_anew(name)

    def look_anew(self, name, group=None):
        for known in list(self.positions):
            if known[0] == name and group in (None, known[1]):
                del self.positions[known]

    @rule(name=sources, pick=picks, count=st.integers(1, 4), selector=selectors)
    def take(self, name, pick, count, selector):
        group = self.pick(name, pick)
        where = (name, group, id(selector))
        taken = []
        while True:
            after = self.positions.get(where)
            left = count - len(taken)
            answers = [subject.call("take", name, group, left, _PLENTY, selector, after) for subject in self.subjects]
            for answer in answers:
                assert answer == answers[0]
            if isinstance(answers[0], type):
                assert name not in self.model.queues or group not in self.model.queues[name].groups
                return
            (answer, *_) = answers
            taken += answer.deliveries
            if selector is not None:
                self.positions[where] = answer.position
            if len(taken) == count or not answer.is_more:
                break
            if selector is None and not answer.deliveries:
                # So many have expired that it looks no further until they are removed.
                self.sweep()
        expected = self.model.take(name, group, count, selector)
        assert [(one.sequence, one.lease, one.attempt) for one in taken] == [
            (item.sequence, lease, attempt) for item, lease, attempt in expected
        ]
        for one, (item, _, attempt) in zip(taken, expected, strict=True):
            self.compare(one, item)
            assert one.redelivered == (attempt > 1)
        self.given += [(name, group, tag) for tag in tags_of(expected) if tag.lease]

    def compare(self, delivery, item):
        message = item.message
        assert delivery.body == message.body
        assert (delivery.subject, delivery.headers, delivery.key) == (message.subject, message.headers, message.key)
        assert (delivery.priority, delivery.published) == (message.priority, item.published)
        assert delivery.expires == item.expires
        assert (delivery.dead is not None) == (item.origin is not None)
        if delivery.dead is not None:
            assert (delivery.dead.reason, origin_of(delivery)) == (item.reason, item.origin)

    def some_tags(self, pick, count, stale):
        """Tags of one group that were given, the last of them mostly, and perhaps some that never were."""
        if not self.given:
            return "a", "", [Tag(1, 1)]
        last = self.given[-8:]
        name, group, _ = last[pick % len(last)]
        tags = [tag for *where, tag in last if where == [name, group]][-count:]
        if stale:
            tags += [tags[0], Tag(tags[0].sequence, tags[0].lease + 1), Tag(99, 1), Tag(-1, 0), Tag(2**60, 1)]
        return name, group, tags

    @rule(
        pick=picks,
        count=st.integers(1, 3),
        action=st.sampled_from(Action),
        delay=st.sampled_from([0.0, 0.0, 2.0]),
        stale=st.booleans(),
    )
    def settle(self, pick, count, action, delay, stale):
        name, group, tags = self.some_tags(pick, count, stale)
        verdict = Verdict(action, delay=delay, note="because")
        model = ("settle", (name, group, tags, action.value, delay))
        answer, expected = self.both("settle", name, group, tags, verdict, model=model)
        if answer is not None:
            assert (answer.count, answer.lost) == expected

    @rule(name=sources, batch=st.lists(messages, min_size=1, max_size=3), action=st.sampled_from(Action))
    def publish_take_and_settle(self, name, batch, action):
        self.publish(name, batch)
        self.take(name, 0, 2, None)
        self.settle(0, 2, action, 0.0, False)
        self.settle(1, 1, Action.UNSEEN, 0.0, False)

    @rule(pick=picks, count=st.integers(1, 3), stale=st.booleans())
    def extend(self, pick, count, stale):
        name, group, tags = self.some_tags(pick, count, stale)
        answer, expected = self.both("extend", name, group, tags)
        if answer is not None:
            assert answer.count == expected[0]
            assert set(map(tag_of, answer.lost)) == set(map(tag_of, expected[1]))

    @rule(name=names, pick=picks)
    def purge(self, name, pick):
        group = self.pick(name, pick)
        if name not in self.model.queues or group == "none":
            self.both("purge", name, group)
            return
        expected = self.model.purge(name, group)
        for subject in self.subjects:
            count = 0
            while some := subject.call("purge", name, group):
                count += some
            assert count == expected

    @rule(name=names, only_empty=st.booleans(), really=picks)
    def delete(self, name, only_empty, really):
        if only_empty or really % 4 == 0:
            answer, expected = self.both("delete", name, only_empty)
            assert answer == expected
            if answer is not None:
                self.look_anew(name)

    @rule(name=names, pick=picks, page=st.integers(1, 3), selector=selectors)
    def browse(self, name, pick, page, selector):
        group = self.pick(name, pick)
        if name in self.model.queues and group in self.model.queues[name].groups:
            for subject in self.subjects:
                every = subject.browsed(name, group, 100)
                some = subject.browsed(name, group, page, selector)
                takes = selector.takes if selector is not None else lambda *_: True
                assert some == [one for one in every if takes(one.message.subject, one.message.headers)]

    # Time.

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0, 5.0]), sweeps=st.booleans())
    def time_passes(self, seconds, sweeps):
        self.model.now += seconds
        if sweeps:
            self.sweep()

    @rule()
    def sweep(self):
        self.model.sweep()
        for subject in self.subjects:
            for _ in range(1000):
                if not subject.call("sweep"):
                    break
            else:
                raise AssertionError("there is no end of sweeping")

    # What holds after each step.

    @invariant()
    def is_as_the_model_says(self):
        self.place_letters()
        for subject in self.subjects:
            assert sorted(subject.rules.queues) == sorted(self.model.queues)
            assert subject.rules.next_due <= max(self.model.due(), self.model.now), "the timer would not go off"
            for name, queue in self.model.queues.items():
                self.compare_queue(subject, name, queue)
        self.model.woken = {
            (name, group)
            for name, group in self.model.woken
            if name in self.model.queues and group in self.model.queues[name].groups
        }
        for number, subject in enumerate(self.subjects):
            subject.commit()
            woken, lost = subject.told()
            assert self.model.woken <= woken, "nobody is told of messages"
            assert lost == self.model.lost
            if not number:
                for name, group in woken:
                    self.look_anew(name, group)
        self.model.woken, self.model.lost = set(), set()

    def place_letters(self):
        for name in list(self.model.letters):
            letters = len(self.model.letters[name])
            if name not in self.model.queues:
                del self.model.letters[name]
                continue
            queue = self.model.queues[name]
            (group, *_) = queue.groups
            found = self.subjects[0].browsed(name, group, 100)
            first = queue.sequence - letters
            numbers = {origin_of(one.message): one.message.sequence for one in found if one.message.sequence > first}
            self.model.place(name, numbers)

    def compare_queue(self, subject, name, queue):
        statistics = subject.call("statistics", name)
        assert (statistics.published, statistics.duplicates) == (queue.published, queue.duplicates)
        assert statistics.refused == queue.refused
        assert statistics.settings == queue.settings
        assert sorted(one.name for one in statistics.groups) == sorted(queue.groups)
        assert statistics.depth == sum(len(group.items) for group in queue.groups.values())
        for one in statistics.groups:
            group = queue.groups[one.name]
            assert (one.ready, one.delayed, one.leased) == tuple(map(group.count, (READY, DELAYED, LEASED)))
            for field in ("delivered", "redelivered", "acknowledged", "dead_lettered", "expired", "dropped"):
                assert getattr(one, field) == getattr(group, field), field
            first = min(group.items, key=lambda item: item.sequence, default=None)
            assert one.oldest_age == (None if first is None else self.model.now - first.published)
            self.compare_items(subject, name, one.name, group)
            self.compare_record(subject, name, one.name)

    def compare_items(self, subject, name, label, group):
        found = {one.message.sequence: one for one in subject.browsed(name, label, 100)}
        assert sorted(found) == sorted(item.sequence for item in group.items)
        for item in group.items:
            one = found[item.sequence]
            assert (one.state, one.due) == (_STATES[item.state], item.due)
            assert (one.message.lease, one.message.attempt) == (item.lease, item.attempts)
            self.compare(one.message, item)

    def compare_record(self, subject, name, label):
        record = subject.rules.queues[name].groups[label]
        ready, leased, delayed = subject.counted(record.id)
        assert (record.ready, record.leased, record.delayed) == (ready[0], leased[0], delayed[0])
        assert record.bytes == ready[1] + leased[1] + delayed[1]
        assert record.leased_bytes == leased[1]


def origin_of(delivery):
    return delivery.dead.queue, delivery.dead.group, delivery.dead.sequence


class OnDisk(Machine):
    """The same on disk, once with each call committed and once with many at a time; and what only a disk has."""

    def make(self):
        self.directory = tempfile.mkdtemp()
        self.directories = [os.path.join(self.directory, name) for name in ("each", "grouped")]
        for directory in self.directories:
            os.mkdir(directory)
        each, grouped = self.directories
        return [Subject(self.clock, each), Subject(self.clock, grouped, is_grouped=True)]

    def teardown(self):
        super().teardown()
        shutil.rmtree(self.directory)

    @rule()
    def server_begins_again(self):
        self.model.restart()
        for subject in self.subjects:
            subject.reopen()
        self.positions.clear()
        # Nobody is told: there is no consumer yet.
        self.place_letters()
        self.model.woken.clear()

    @precondition(lambda self: self.model.queues)
    @rule(
        name=sources,
        batch=st.lists(messages, min_size=1, max_size=3),
        pick=picks,
        data=st.data(),
        acts=st.sets(st.sampled_from(["publish", "take", "settle", "extend", "purge", "sweep", "delete", "declare"])),
    )
    def what_is_rolled_back_was_not(self, name, batch, pick, data, acts):
        group = self.pick(name, pick)
        of, at, tags = self.some_tags(pick, 3, False)
        calls = {
            "publish": ("publish", (name, batch)),
            "take": ("take", (name, group, 2, _PLENTY, None, None)),
            "settle": ("settle", (of, at, tags, Verdict(list(Action)[pick % 4]))),
            "extend": ("extend", (of, at, tags)),
            "purge": ("purge", (name, group)),
            "sweep": ("sweep", ()),
            "delete": ("delete", (name, False)),
            "declare": ("declare", (name, data.draw(queue_settings(name)), True)),
        }
        for subject in self.subjects:
            before = subject.dump()
            subject.undone([calls[act] for act in sorted(acts)])
            assert subject.dump() == before


class StoresTests(SynchronousTestCase):
    def walk(self, machine, walks=WALKS):
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=walks,
                stateful_step_count=40,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                print_blob=True,
                # The same walks each time, unless chance is asked for.
                derandomize="PROTOFRAME_SEEDS" not in os.environ,
            ),
        )

    def few_at_a_time(self):
        """Has all that is done piece by piece be done in small pieces."""
        for name in ("_SCAN", "_SWEEP", "_PURGE"):
            patch = mock.patch.object(rules_module, name, 2)
            patch.start()
            self.addCleanup(patch.stop)

    def test_a_store_in_memory_does_what_the_model_says(self):
        self.walk(Machine, 2 * WALKS)

    def test_a_store_in_memory_that_does_little_at_a_time_does_what_the_model_says(self):
        self.few_at_a_time()
        self.walk(Machine)

    def test_a_store_on_disk_does_what_the_model_says(self):
        self.walk(OnDisk)

    def test_a_store_on_disk_that_does_little_at_a_time_does_what_the_model_says(self):
        self.few_at_a_time()
        self.walk(OnDisk)
