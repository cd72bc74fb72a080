"""Consumers get what they have credit for, in turn; what they leave comes back; and the broker knows what is there."""

from __future__ import annotations

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from protoframe.queue import (
    DeliveryPolicy,
    Exclusive,
    Message,
    NoSuchGroup,
    NoSuchQueue,
    NotEmpty,
    Order,
    Overloaded,
    Settings,
    Storage,
    StoreFailed,
    StoreFull,
    Tag,
    TooMany,
)
from protoframe.servers.queue import rules
from protoframe.servers.queue.broker import Broker
from protoframe.servers.queue.memory import MemoryStore
from protoframe.servers.queue.selector import Selector
from protoframe.servers.queue.store import Action, Verdict

_DONE = Verdict(Action.DONE)


class Slow(MemoryStore):
    """A store whose answers wait until `answer` lets them go; and which can be told what to answer."""

    def __init__(self, reactor, clock):
        super().__init__(reactor, clock)
        self.is_slow = False
        self.waiting = []
        self.asked = []
        self.refusal = None
        self.pending_bytes = 0

    def _submit(self, function, *arguments):
        if self.refusal is not None and function.__name__ == "take":
            failing = Deferred()
            failing.errback(self.refusal)
            return failing
        self.asked.append(function.__name__)
        done = super()._submit(function, *arguments)
        if not self.is_slow:
            return done
        answer = Deferred()
        self.waiting.append(lambda: done.chainDeferred(answer))
        return answer

    def answer(self):
        waiting, self.waiting = self.waiting, []
        for go in waiting:
            go()


class BrokerTestCase(SynchronousTestCase):
    def setUp(self):
        self.clock = Clock()
        self.clock.advance(1000)
        self.store = Slow(self.clock, self.clock.seconds)
        self.memory = MemoryStore(self.clock, self.clock.seconds)
        self.broken = []
        self.broker = self.make()

    def make(self, **options):
        broker = Broker(self.clock, self.clock.seconds, self.store, self.memory, broken=self.broken.append, **options)
        broker.open()
        return broker

    def run_all(self):
        for _ in range(50):
            self.clock.advance(0)

    def declare(self, name="q", *, replace=False, **settings):
        return self.successResultOf(
            Deferred.fromCoroutine(self.broker.declare(name, Settings(**settings), replace=replace))
        )

    def publish(self, *bodies, name="q", **fields):
        answer = self.broker.publish(name, [Message(body=body, **fields) for body in bodies])
        self.run_all()
        return answer

    def consume(self, prefetch=100, *, name="q", group="", selector=None, is_exclusive=False, limit=None):
        consumer = self.broker.consume(name, group, prefetch, selector, is_exclusive=is_exclusive, limit=limit)
        self.run_all()
        return consumer

    def sent(self, consumer):
        """What a consumer is sent until there is no more."""
        deliveries = []
        while consumer.buffer:
            deliveries.append(consumer.next())
            self.run_all()
        return deliveries

    def bodies(self, consumer):
        return [delivery.body for delivery in self.sent(consumer)]

    def settle(self, deliveries, verdict=_DONE):
        settled = self.broker.settle("q", "", [delivery.tag for delivery in deliveries], verdict)
        self.run_all()
        return settled

    def group(self, name="q"):
        return self.successResultOf(Deferred.fromCoroutine(self.broker.look(name))).groups[0]


class ConsumerTests(BrokerTestCase):
    def test_no_more_than_its_credit_is_given_to_a_consumer(self):
        self.declare()
        self.publish(*(b"%d" % number for number in range(10)))
        consumer = self.consume(3)
        first = self.sent(consumer)
        self.assertEqual([delivery.body for delivery in first], [b"0", b"1", b"2"])
        self.settle(first[:2])
        self.assertEqual(self.bodies(consumer), [b"3", b"4"])

    def test_octets_that_wait_to_be_sent_are_bounded(self):
        self.declare()
        for number in range(8):
            self.publish(bytes([number]) * 400_000)
        consumer = self.consume(8)
        self.assertLess(len(consumer.buffer), 6)
        self.assertEqual(len(self.sent(consumer)), 8)

    def test_a_consumer_that_delivers_at_most_once_has_credit_for_what_is_on_the_way(self):
        self.declare(delivery=DeliveryPolicy.AT_MOST_ONCE)
        self.publish(*[b"x"] * 10)
        consumer = self.consume(2)
        self.assertEqual(len(consumer.buffer), 2)
        self.assertEqual(len(self.sent(consumer)), 10)
        self.assertEqual(self.group().leased, 0)

    def test_consumers_have_their_turns(self):
        self.declare()
        consumers = [self.consume(200) for _ in range(3)]
        for _ in range(3):
            self.publish(*[b"x"] * 96)
        counts = [len(consumer.buffer) for consumer in consumers]
        self.assertEqual(sum(counts), 288)
        self.assertGreaterEqual(min(counts), 64)

    def test_an_exclusive_consumer_is_alone(self):
        self.declare()
        one = self.consume(is_exclusive=True)
        self.assertRaises(Exclusive, self.consume)
        one.leave()
        self.consume()
        self.assertRaises(Exclusive, self.consume, is_exclusive=True)

    def test_what_a_consumer_leaves_comes_back_and_what_was_not_sent_counts_as_unseen(self):
        self.declare()
        self.publish(b"a", b"b", b"c")
        consumer = self.consume()
        consumer.next()
        consumer.leave()
        self.run_all()
        again = self.sent(self.consume())
        self.assertEqual([(one.body, one.redelivered) for one in again], [(b"a", True), (b"b", False), (b"c", False)])

    def test_what_is_on_its_way_to_a_consumer_that_leaves_comes_back_as_unseen(self):
        self.declare()
        self.publish(b"a")
        self.store.is_slow = True
        consumer = self.consume()
        consumer.leave()
        self.store.is_slow = False
        self.store.answer()
        self.run_all()
        (again,) = self.sent(self.consume())
        self.assertFalse(again.redelivered)

    def test_what_was_settled_as_unseen_gives_no_credit_to_who_is_about_to_leave(self):
        self.declare()
        self.publish(b"a", b"b", b"c")
        consumer = self.consume(2)
        self.settle(self.sent(consumer), Verdict(Action.UNSEEN))
        self.assertEqual(self.bodies(consumer), [])

    def test_a_lease_that_ends_frees_credit_although_nothing_comes_back(self):
        self.declare(lease=5.0, max_deliveries=1)
        self.publish(b"a", b"b")
        consumer = self.consume(1)
        self.assertEqual(self.bodies(consumer), [b"a"])
        self.clock.advance(6)
        self.run_all()
        self.assertEqual(self.bodies(consumer), [b"b"])

    def test_what_was_not_sent_before_its_lease_ended_is_not_sent_twice(self):
        self.declare(lease=5.0)
        self.publish(b"a", b"b")
        consumer = self.consume(2)
        for _ in range(10):
            self.clock.advance(6)
            self.run_all()
        self.assertLessEqual(len(consumer.buffer), 2)
        self.assertEqual(self.bodies(consumer), [b"a", b"b"])

    def test_a_limit_is_of_what_was_sent_whatever_leases_ended_before(self):
        self.declare(lease=5.0)
        self.publish(b"a", b"b", b"c")
        consumer = self.consume(2, limit=2)
        self.clock.advance(6)
        self.run_all()
        deliveries = self.sent(consumer)
        self.assertEqual([delivery.body for delivery in deliveries], [b"a", b"b"])
        self.settle(deliveries)
        self.assertEqual(self.bodies(consumer), [])
        self.assertEqual(self.group().ready, 1)

    def test_a_consumer_that_is_to_end_gets_no_more_however_fast_it_takes(self):
        self.declare(delivery=DeliveryPolicy.AT_MOST_ONCE)
        self.publish(*[b"%d" % number for number in range(10)])
        consumer = self.consume(2)
        self.broker.end_consumers(StoreFailed("it is time"))
        self.assertEqual(self.bodies(consumer), [b"0", b"1"])
        with self.assertRaises(StoreFailed):
            consumer.wait()
        self.assertEqual(self.group().ready, 8)

    def test_what_is_acknowledged_twice_is_counted_once(self):
        self.declare()
        self.publish(b"a")
        deliveries = self.sent(self.consume())
        self.settle(deliveries)
        self.settle(deliveries)
        self.clock.advance(1)
        self.assertEqual(self.group().acknowledged_rate, 1.0)

    def test_the_end_of_a_lease_that_is_told_late_does_not_end_the_next(self):
        self.declare(lease=5.0)
        self.publish(b"a")
        first, second = self.consume(1), self.consume(1)
        (delivery,) = self.sent(first)
        self.assertEqual(self.bodies(second), [])
        again = self.successResultOf(self.broker.settle("q", "", [delivery.tag], Verdict(Action.AGAIN)))
        self.assertEqual(again.count, 1)
        self.run_all()
        holder = first if first.leases else second
        self.assertEqual(list(holder.leases.items()), [(1, 2)])
        self.broker.lost("q", "", [Tag(1, 1)])
        self.assertEqual((holder.leases, holder.has), ({1: 2}, 1))

    def test_a_message_that_comes_anew_before_the_end_of_its_lease_is_told_changes_its_holder(self):
        self.declare(lease=5.0)
        self.publish(b"a")
        first = self.consume(1)
        self.sent(first)
        second = self.consume(1)
        # The store gives it to the other in one turn, and tells of the end of the lease in the next.
        self.store.is_slow = True
        self.broker.publish("q", [Message(body=b"b")])
        self.store._rules.settle("q", "", [Tag(1, 1)], Verdict(Action.AGAIN))
        self.store.is_slow = False
        second.dry_at = -1
        self.broker._queues["q"].groups[""].feed(second)
        self.store.answer()
        self.run_all()
        held = {**first.leases, **second.leases}
        self.assertEqual(sorted(held), [1, 2])
        self.assertEqual((first.has, second.has), (len(first.leases), len(second.leases)))

    def test_a_selector_finds_what_is_behind_many_others_while_more_is_published(self):
        self.declare()
        for _ in range(3):
            self.publish(*[b"x"] * 2000)
        self.publish(b"wanted", subject="red")
        self.store.is_slow = True
        consumer = self.consume(selector=Selector("red", {}))
        for _ in range(10):
            self.broker.publish("q", [Message(body=b"x")])
            self.store.answer()
            self.run_all()
        self.assertEqual([delivery.body for delivery in consumer.buffer], [b"wanted"])

    def test_a_selector_finds_what_comes_before_where_it_was(self):
        self.declare(order=Order.PRIORITY)
        self.publish(b"x")
        consumer = self.consume(selector=Selector("red", {}))
        self.publish(b"high", subject="red", priority=9)
        self.assertEqual(self.bodies(consumer), [b"high"])

    def test_a_selector_finds_what_another_gave_back(self):
        self.declare()
        self.publish(b"a", b"b", subject="red")
        first = self.consume(1)
        (delivery,) = self.sent(first)
        second = self.consume(selector=Selector("red", {}))
        self.assertEqual(self.bodies(second), [b"b"])
        self.settle([delivery], Verdict(Action.AGAIN))
        self.assertEqual(self.bodies(first) + self.bodies(second), [b"a"])

    def test_very_many_that_a_selector_does_not_want_are_looked_at_without_end_of_the_stack(self):
        self.declare()
        self.patch(rules, "_SCAN", 5)
        self.publish(*[b""] * 5000)
        self.publish(b"wanted", subject="red")
        consumer = self.broker.consume("q", "", 1, Selector("red", {}), is_exclusive=False)
        for _ in range(1100):
            self.clock.advance(0)
        self.assertEqual(self.bodies(consumer), [b"wanted"])

    def test_many_consumers_of_a_store_that_answers_at_once_do_not_end_the_stack(self):
        self.declare()
        consumers = [self.broker.consume("q", "", 10, None, is_exclusive=False) for _ in range(1500)]
        self.publish(*[b""] * 9000)
        self.assertEqual(sum(len(consumer.buffer) for consumer in consumers), 9000)

    def test_a_full_disk_is_asked_again(self):
        self.declare()
        self.publish(b"a")
        self.store.refusal = StoreFull("full")
        consumer = self.consume()
        self.assertEqual(self.bodies(consumer), [])
        self.store.refusal = None
        self.clock.advance(1)
        self.assertEqual(self.bodies(consumer), [b"a"])

    def test_a_consumer_is_told_of_an_error_when_it_has_what_there_is(self):
        self.declare()
        self.publish(b"a")
        consumer = self.consume()
        self.successResultOf(Deferred.fromCoroutine(self.broker.delete("q", only_unused=False)))
        self.successResultOf(consumer.wait())
        self.assertEqual(self.bodies(consumer), [b"a"])
        self.assertRaises(NoSuchQueue, consumer.wait)

    def test_a_consumer_that_waits_is_woken_by_a_message(self):
        self.declare()
        consumer = self.consume()
        waiting = consumer.wait()
        self.assertNoResult(waiting)
        self.publish(b"a")
        self.successResultOf(waiting)

    def test_consumers_of_a_group_that_is_gone_are_told(self):
        self.declare(groups=("x", "y"))
        consumer = self.consume(group="y")
        self.declare(replace=True, groups=("x",))
        self.assertRaises(NoSuchGroup, consumer.wait)

    def test_no_more_consumers_than_there_may_be(self):
        self.broker = self.make(max_consumers=1)
        self.declare()
        one = self.consume()
        self.assertRaises(TooMany, self.consume)
        one.leave()
        self.consume()


class QueueTests(BrokerTestCase):
    def test_a_queue_that_nobody_uses_is_deleted_in_its_time(self):
        self.declare(queue_ttl=10.0)
        consumer = self.consume()
        self.clock.pump([1.0] * 30)
        self.assertEqual(self.broker.names(""), ["q"])
        consumer.leave()
        self.clock.pump([1.0] * 5)
        self.publish(b"x")
        self.clock.pump([1.0] * 9)
        self.assertEqual(self.broker.names(""), ["q"])
        self.clock.pump([1.0] * 3)
        self.assertEqual(self.broker.names(""), [])

    def test_a_queue_that_takes_long_to_be_deleted_is_deleted_once(self):
        self.declare(queue_ttl=2.0)
        self.store.is_slow = True
        self.clock.pump([1.0] * 10)
        self.assertEqual(self.store.asked.count("delete"), 1)
        self.store.answer()
        self.assertEqual(self.broker.names(""), [])

    def test_a_queue_that_is_deleted_and_declared_in_one_turn_is_there(self):
        self.declare()
        self.store.is_slow = True
        deleting = Deferred.fromCoroutine(self.broker.delete("q", only_unused=False))
        declaring = Deferred.fromCoroutine(self.broker.declare("q", Settings(), replace=False))
        self.store.is_slow = False
        self.store.answer()
        self.run_all()
        self.successResultOf(deleting)
        self.assertTrue(self.successResultOf(declaring))
        self.successResultOf(self.publish(b"x"))

    def test_a_queue_whose_declaring_caller_went_away_is_there(self):
        self.store.is_slow = True
        declaring = Deferred.fromCoroutine(self.broker.declare("q", Settings(), replace=False))
        declaring.cancel()
        self.failureResultOf(declaring, CancelledError)
        self.store.is_slow = False
        self.store.answer()
        self.assertEqual(self.broker.names(""), ["q"])

    def test_a_queue_whose_deleting_caller_went_away_is_gone(self):
        self.declare()
        self.store.is_slow = True
        deleting = Deferred.fromCoroutine(self.broker.delete("q", only_unused=False))
        deleting.cancel()
        self.failureResultOf(deleting, CancelledError)
        self.store.answer()
        self.assertEqual(self.broker.names(""), [])

    def test_a_queue_with_consumers_is_not_deleted_as_unused(self):
        self.declare()
        self.consume()
        self.failureResultOf(Deferred.fromCoroutine(self.broker.delete("q", only_unused=True)), NotEmpty)

    def test_no_more_queues_than_there_may_be(self):
        self.broker = self.make(max_queues=1)
        self.declare()
        self.declare()
        self.failureResultOf(Deferred.fromCoroutine(self.broker.declare("r", Settings(), replace=False)), TooMany)

    def test_queues_are_where_they_say(self):
        self.declare(storage=Storage.MEMORY, delivery=DeliveryPolicy.AT_MOST_ONCE)
        self.assertEqual(list(self.memory._rules.queues), ["q"])
        self.assertEqual(list(self.store._rules.queues), [])

    def test_a_store_that_fails_ends_everything(self):
        self.declare(batch_time=1.0)
        consumer = self.consume()
        publishing = self.publish(b"x")
        self.broker.failed(StoreFailed("the disk is gone"))
        self.failureResultOf(publishing, StoreFailed)
        self.assertRaises(StoreFailed, consumer.wait)
        self.assertEqual(len(self.broken), 1)


class GatheringTests(BrokerTestCase):
    def stored(self):
        return self.store._rules.queues["q"].published

    def test_messages_are_stored_when_their_time_has_come(self):
        self.declare(batch_time=0.5)
        publishing = self.publish(b"x")
        self.clock.advance(0.4)
        self.assertEqual(self.stored(), 0)
        self.clock.advance(0.1)
        self.assertEqual(self.stored(), 1)
        self.successResultOf(publishing)

    def test_messages_are_stored_when_there_are_enough(self):
        self.declare(batch_time=1.0, batch_count=3)
        self.publish(b"x", b"y")
        self.assertEqual(self.stored(), 0)
        self.publish(b"z")
        self.assertEqual(self.stored(), 3)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_messages_are_stored_when_they_are_large_enough(self):
        self.declare(batch_time=1.0, batch_bytes=100)
        self.publish(bytes(60))
        self.publish(bytes(60))
        self.assertEqual(self.stored(), 2)

    def test_what_its_caller_gave_up_is_not_stored(self):
        self.declare(batch_time=1.0)
        publishing = self.publish(b"x")
        publishing.cancel()
        self.failureResultOf(publishing, CancelledError)
        self.publish(b"y")
        self.clock.advance(1)
        self.assertEqual(self.stored(), 1)

    def test_what_is_gathered_is_stored_at_the_end(self):
        self.declare(batch_time=1.0)
        publishing = self.publish(b"x")
        self.successResultOf(Deferred.fromCoroutine(self.broker.close()))
        self.successResultOf(publishing)

    def test_publishers_are_told_to_come_later_when_too_much_waits(self):
        self.broker = self.make(max_pending=100)
        self.declare()
        self.store.pending_bytes = 101
        error = self.assertRaises(Overloaded, self.broker.publish, "q", [Message(body=b"x")])
        self.assertGreater(error.retry_after, 0)

    def test_what_waits_to_be_gathered_counts(self):
        self.broker = self.make(max_pending=100)
        self.declare(batch_time=1.0)
        self.publish(bytes(101))
        self.assertRaises(Overloaded, self.broker.publish, "q", [Message(body=b"x")])
