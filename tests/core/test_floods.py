"""What costs this end more than it costs the peer is bounded; and no honest peer ever meets the bound."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from protoframe.core.events import (
    CallFailed,
    Ended,
    ItemsReceived,
    RequestCancelled,
    RequestReceived,
    ResponseReceived,
)
from protoframe.core.floods import Allowance
from protoframe.core.frames import ErrorBody
from protoframe.core.limits import Limits
from protoframe.core.state import State
from protoframe.errors import CancelFlood, DeadlineExceeded, Flood, PingFlood, Status
from tests.core.pairs import (
    CANCEL,
    CHUNK,
    ERROR,
    GOAWAY,
    ITEM,
    ITEMS,
    MORE,
    NOT_PROCESSED,
    ONEWAY,
    PING,
    PONG,
    REQUEST,
    RESPONSE,
    SMALL,
    STREAM,
    STREAMING,
    Pair,
    cut,
    frame,
    item_message,
    opened,
    request_message,
)

CANCELLED = ErrorBody(1, "Cancelled", "")


class AllowanceTests(SynchronousTestCase):
    def take(self, allowance, now, times=10_000):
        """How many are given, of so many that are asked for."""
        return sum(allowance.take(now) for _ in range(times))

    def test_it_gives_so_many_at_once(self):
        for burst in (1, 7, 1000):
            self.assertEqual(self.take(Allowance(burst, 1e-9, 5.0), 5.0), burst)

    def test_and_so_many_a_second(self):
        allowance = Allowance(10, 4.0, 0.0)
        self.take(allowance, 0.0)
        self.assertEqual([self.take(allowance, now) for now in (0.2, 0.25, 0.5, 1.0, 1.1, 1.25)], [0, 1, 1, 2, 0, 1])

    def test_it_holds_no_more_than_it_began_with(self):
        allowance = Allowance(10, 4.0, 0.0)
        self.assertEqual(self.take(allowance, 1e6), 10)
        self.assertEqual(self.take(allowance, 2e6), 10)

    def test_what_is_refused_costs_nothing(self):
        allowance = Allowance(1, 1.0, 0.0)
        self.take(allowance, 0.0)
        for tenth in range(1, 10):
            self.assertFalse(allowance.take(tenth / 10))
        self.assertTrue(allowance.take(1.0001))

    def test_it_is_full_until_something_is_taken_and_when_that_came_back(self):
        allowance = Allowance(10, 2.0, 0.0)
        self.assertTrue(allowance.is_full(0.0))
        allowance.take(0.0)
        self.assertFalse(allowance.is_full(0.4))
        self.assertTrue(allowance.is_full(0.5))

    @given(st.integers(1, 50), st.floats(0.01, 100.0), st.lists(st.floats(0.0, 5.0), max_size=100))
    def test_in_any_time_it_gives_no_more_than_it_says(self, burst, rate, waits):
        allowance = Allowance(burst, rate, 0.0)
        now, given_at = 0.0, []
        for wait in waits:
            now += wait
            if allowance.take(now):
                given_at.append(now)
        for first in range(len(given_at)):
            for last in range(first, len(given_at)):
                most = burst + rate * (given_at[last] - given_at[first])
                self.assertLessEqual(last - first + 1, most + 1e-6)

    @given(st.integers(1, 50), st.floats(0.1, 100.0), st.integers(1, 200))
    def test_whoever_keeps_to_the_rate_is_never_refused(self, burst, rate, times):
        allowance = Allowance(burst, rate, 0.0)
        self.assertTrue(all(allowance.take(number * (1.0001 / rate)) for number in range(times)))


class Case(SynchronousTestCase):
    def check_refused(self, end, cls):
        error = end.ended.error
        self.assertIs(type(error), cls)
        self.assertIsInstance(error, Flood)
        self.assertEqual(error.status, Status.RESOURCE_EXHAUSTED)
        end.send()
        kind, _, _, payload = cut(bytes(end.link))[-1]
        self.assertEqual((kind, payload[:2], payload[10:].decode()), (GOAWAY, b"\0\x08", error.message))


class Cancels(Case):
    def test_calls_that_are_cancelled_at_once_end_the_conversation(self):
        # Whatever is done between them: all in one go, or each pair alone and answered at once.
        pairs = [
            frame(REQUEST, 0, call_id, request_message()) + frame(CANCEL, 0, call_id)
            for call_id in range(1, 200_001, 2)
        ]
        for limits in (Limits(), Limits(max_calls=10), Limits(max_calls=5000)):
            for at_once in (1, 500, 100_000):
                end = opened(limits)
                running, most, pairs_taken = set(), 0, 0
                for at in range(0, len(pairs), at_once):
                    end.receive(b"".join(pairs[at : at + at_once]))
                    for event in end.events:
                        if isinstance(event, RequestReceived):
                            running.add(event.call_id)
                            most = max(most, len(running))
                        elif isinstance(event, RequestCancelled) and event.call_id in running:
                            running.discard(event.call_id)
                            if end.conversation.state is State.OPEN:
                                end.conversation.refuse(event.call_id, CANCELLED)
                    if end.conversation.state is State.CLOSED:
                        break
                    pairs_taken += at_once
                    end.events.clear()
                    end.send()
                    end.link.clear()
                self.assertLessEqual(most, limits.max_calls)
                self.assertLessEqual(pairs_taken, max(1000, limits.max_calls))
                self.check_refused(end, CancelFlood)

    def test_cancels_within_the_rate_never_do(self):
        end = opened(Limits(max_calls=10))
        for call_id in range(1, 20_001, 2):
            end.now += 1 / 32.9
            end.receive(frame(REQUEST, 0, call_id, request_message()) + frame(CANCEL, 0, call_id))
            end.conversation.refuse(call_id, CANCELLED)
            end.send()
            end.link.clear()
        self.assertEqual(end.of(Ended), [])
        self.assertEqual(len(end.of(RequestCancelled)), 10_000)

    def test_all_calls_that_are_open_may_be_cancelled_at_once(self):
        for max_calls in (1024, 4000):
            end = opened(Limits(max_calls=max_calls))
            ids = range(1, 2 * max_calls, 2)
            end.receive(b"".join(frame(REQUEST, 0, call_id, request_message()) for call_id in ids))
            end.receive(b"".join(frame(CANCEL, 0, call_id) for call_id in ids))
            self.assertEqual(len(end.of(RequestCancelled)), max_calls)
            self.assertEqual(end.of(Ended), [])

    def test_calls_whose_time_is_over_are_told_less_often_than_is_a_flood(self):
        pair = Pair()
        settled = 0
        for _ in range(60):
            # 100 a second expire at the caller, three times as many as a peer may cancel.
            tokens = [pair.initiator.call(timeout=1.0)[1] for _ in range(100)]
            pair.settle()
            for event in pair.acceptor.of(RequestReceived)[settled:]:
                pair.acceptor.conversation.suspend(event.call_id, event.deadline + 0.5)
            settled = len(pair.acceptor.of(RequestReceived))
            pair.advance(1.0)
            for token in tokens:
                self.assertIsInstance(pair.initiator.outcome(token).error, DeadlineExceeded)
            pair.settle()
            pair.advance(0.5)
            for call_id in sorted(pair.acceptor.conversation._incoming.running):
                pair.acceptor.conversation.refuse(call_id, ErrorBody(4, "DeadlineExceeded", ""))
            pair.settle()
            pair.initiator.events.clear()
        self.assertEqual([end.of(Ended) for end in pair.ends], [[], []])
        told = [event for event in pair.acceptor.of(RequestCancelled) if not event.expired]
        # So many at once and 15 a second, in the 90 s that it took.
        self.assertGreater(len(told), 450 + 15 * 60)
        self.assertLessEqual(len(told), 450 + 15 * 90)
        self.assertEqual((pair.initiator.conversation.pending, pair.acceptor.conversation.running), (0, 0))

    def test_one_of_which_part_was_sent_is_told_all_the_same(self):
        pair = Pair(SMALL, SMALL)
        # Nothing is left of the allowance.
        pair.initiator.conversation._outgoing._expiries = Allowance(0, 1e-9, pair.now)
        call_id, token = pair.initiator.call(bytes(5000), timeout=1.0)
        pair.initiator.send(1)
        pair.initiator.link.clear()
        pair.advance(1.0)
        self.assertIsInstance(pair.initiator.outcome(token).error, DeadlineExceeded)
        pair.initiator.send()
        self.assertEqual(cut(bytes(pair.initiator.link)), [(CANCEL, 0, call_id, b"")])

    def test_or_its_item_is_finished(self):
        pair = Pair(SMALL, SMALL)
        pair.initiator.conversation._outgoing._expiries = Allowance(0, 1e-9, pair.now)
        call_id, token = pair.initiator.call(timeout=1.0, flags=ITEMS)
        pair.settle()
        pair.initiator.conversation.send_items(call_id, 1, bytes(5000))
        pair.initiator.send(1)
        pair.deliver(pair.initiator)
        pair.advance(1.0)
        self.assertIsInstance(pair.initiator.outcome(token).error, DeadlineExceeded)
        pair.initiator.send()
        self.assertEqual([one[:2] for one in cut(bytes(pair.initiator.link))], [(CHUNK, MORE), (CHUNK, 0)])
        pair.settle()
        self.assertEqual(len(pair.acceptor.of(ItemsReceived)), 1)
        self.assertEqual([end.of(Ended) for end in pair.ends], [[], []])

    def test_half_sent_requests_that_are_given_up_do_not_count(self):
        limits = Limits(max_frame=2048, max_calls=10, cancel_burst=20)
        pair = Pair(limits, limits)
        for _ in range(200):
            _, token = pair.initiator.call(bytes(9000))
            pair.initiator.send(1)
            pair.deliver(pair.initiator)
            pair.initiator.conversation.cancel(int(pair.initiator.conversation._outgoing._next_id) - 2)
            pair.settle()
            self.assertFalse(pair.initiator.outcome(token).error.may_have_run)
            for end in pair.ends:
                self.assertEqual((end.of(Ended), end.of(RequestReceived)), ([], []))
                end.events.clear()
        self.assertEqual((pair.initiator.conversation.pending, pair.acceptor.conversation.running), (0, 0))

    def test_calls_that_are_cancelled_within_their_first_item_do(self):
        end = opened(settings=STREAMING)
        for call_id in range(1, 4001, 2):
            item = frame(ITEM, MORE, call_id, struct.pack("!I", 3000) + item_message())
            end.receive(frame(REQUEST, ITEMS, call_id, request_message()) + item + frame(CANCEL, 0, call_id))
            if end.of(Ended):
                break
            end.conversation.refuse(call_id, CANCELLED)
        self.assertGreater(call_id, 2000)
        self.check_refused(end, CancelFlood)

    def test_streams_left_after_their_first_item_do_not_count(self):
        limits = Limits(max_calls=10, cancel_burst=20)
        pair = Pair(limits, limits)
        for _ in range(200):
            call_id, _ = pair.initiator.call(flags=STREAM)
            pair.settle()
            pair.acceptor.conversation.send_items(call_id, 1, b"a")
            pair.settle()
            event = pair.initiator.of(ItemsReceived)[-1]
            pair.initiator.conversation.cancel(call_id)
            pair.initiator.conversation.give_back(call_id, event.cost)
            pair.settle()
            pair.acceptor.conversation.refuse(call_id, CANCELLED)
            pair.settle()
            for end in pair.ends:
                end.events.clear()
        self.assertEqual([end.conversation.state for end in pair.ends], [State.OPEN] * 2)

    def test_streams_left_before_their_first_item_do(self):
        end = opened()
        for call_id in range(1, 4001, 2):
            end.receive(frame(REQUEST, STREAM, call_id, request_message()) + frame(CANCEL, 0, call_id))
            if end.of(Ended):
                break
            end.conversation.refuse(call_id, CANCELLED)
        self.check_refused(end, CancelFlood)

    def test_a_cancel_that_crosses_the_answer_does_not_count(self):
        for flags in (0, STREAM):
            limits = Limits(max_calls=10, cancel_burst=20)
            pair = Pair(limits, limits)
            for _ in range(60):
                call_id, _ = pair.initiator.call(flags=flags)
                pair.settle()
                if flags:
                    pair.acceptor.conversation.send_items(call_id, 1, b"a")
                    pair.acceptor.conversation.end_items(call_id)
                else:
                    pair.acceptor.conversation.respond(call_id, b"")
                pair.acceptor.send()
                pair.initiator.conversation.cancel(call_id)
                pair.settle()
                for end in pair.ends:
                    self.assertEqual(end.of(Ended), [], flags)
                    end.events.clear()

    def test_a_large_request_that_is_refused_and_stopped_does_not_count(self):
        limits = Limits(max_frame=2048, max_calls=10, cancel_burst=20)
        pair = Pair(limits, limits)
        pair.acceptor.conversation._incoming._max_arguments = lambda method: 3000
        for _ in range(60):
            _, token = pair.initiator.call(bytes(9000))
            pair.initiator.send(1)
            pair.deliver(pair.initiator)
            pair.settle()
            self.assertEqual(pair.initiator.outcome(token).body.name, "MessageTooLarge")
            for end in pair.ends:
                self.assertEqual(end.of(Ended), [])
                end.events.clear()


class Told(Case):
    """An end tells the other of what it gave up less often than is a flood."""

    LIMITS = Limits(max_calls=1000)

    def setUp(self):
        self.pair = Pair(self.LIMITS, self.LIMITS)
        self.caller, self.server = self.pair.initiator, self.pair.acceptor

    def give_up(self, number, **options):
        """Makes calls, and gives them all up; their ids."""
        calls = [self.caller.call(timeout=1e6, **options) for _ in range(number)]
        self.pair.settle()
        for call_id, _ in calls:
            self.caller.conversation.cancel(call_id)
        self.caller.look()
        # Whoever waited is told at once, of all of them.
        failed = [event.token for event in self.caller.of(CallFailed)]
        self.assertEqual(failed[-number:], [token for _, token in calls])
        return [call_id for call_id, _ in calls]

    def told(self):
        self.pair.settle()
        self.assertEqual([end.of(Ended) for end in self.pair.ends], [[], []])
        return [event.call_id for event in self.server.of(RequestCancelled)]

    def test_900_at_once_and_30_a_second_in_the_order_in_which_they_were_given_up(self):
        ids = self.give_up(1000)
        self.assertEqual(self.told(), ids[:900])
        # One timer is enough for all that wait.
        deadlines = self.caller.conversation.traffic.deadlines
        self.assertEqual([one for _, one in deadlines._new + deadlines._heap].count(-3), 1)
        for second in range(1, 4):
            self.pair.advance(1.0)
            most = 900 + 30 * second
            self.assertTrue(most - 3 <= len(self.told()) <= most, second)
        self.pair.advance(1.0)
        self.assertEqual(self.told(), ids)
        # Nothing is left to wake up for.
        self.assertEqual(len(self.caller.conversation._outgoing._untold), 0)
        self.assertGreater(self.caller.conversation.next_timer(), self.pair.now + 1.0)

    def test_one_that_is_answered_meanwhile_is_not_told(self):
        ids = self.give_up(1000)
        for call_id in ids[900:950]:
            self.server.conversation.respond(call_id, b"")
        self.assertEqual(self.told(), ids[:900])
        self.pair.advance(10.0)
        self.assertEqual(self.told(), ids[:900] + ids[950:])
        for call_id in ids[:900] + ids[950:]:
            self.server.conversation.refuse(call_id, CANCELLED)
        self.pair.settle()
        self.assertEqual((self.caller.conversation.pending, self.server.conversation.running), (0, 0))

    def test_one_that_is_given_up_later_is_told_later(self):
        ids = self.give_up(950)
        ids += self.give_up(1)
        self.assertEqual(self.told(), ids[:900])
        self.pair.advance(1.0)
        # An allowance has come back, and all the same it is not told before those that wait.
        ids += self.give_up(1)
        self.pair.advance(9.0)
        self.assertEqual(self.told(), ids)

    def test_the_end_of_the_conversation_ends_it(self):
        for how in ("lost", "ended"):
            self.setUp()
            self.give_up(1000)
            if how == "lost":
                self.caller.lose()
            else:
                self.server.conversation.end(None)
                self.caller.receive(frame(GOAWAY, 0, 0, b"\0\x0d" + bytes(8)))
            self.caller.conversation.handle_timer(self.pair.now + 5.0)
            self.caller.send()
            self.assertNotIn(CANCEL, [one[0] for one in cut(bytes(self.caller.link))][900:])
            self.assertEqual(len(self.caller.conversation._outgoing._untold), 0)

    def test_whatever_a_program_gives_up_is_no_flood(self):
        for round_ in range(30):
            self.give_up(500)
            told = self.told()
            self.assertLessEqual(len(told), 900 + 30 * round_ + 1)
            self.pair.advance(1.0)
            self.pair.settle()
            for call_id in sorted(self.server.conversation._incoming.running):
                self.server.conversation.refuse(call_id, CANCELLED)
            self.pair.settle()
            self.assertEqual(self.caller.conversation.pending, 0)
            self.caller.events.clear()
        self.assertGreater(len(self.told()), 900 + 25 * 30)

    def test_one_whose_time_is_over_leaves_half_of_it_to_others(self):
        for _ in range(1000):
            self.caller.call(timeout=1.0)
        self.pair.settle()
        self.pair.advance(1.0)
        told = self.told()
        self.assertEqual(len(told), 450)
        for call_id in range(1, 2000, 2):
            self.server.conversation.refuse(call_id, ErrorBody(4, "DeadlineExceeded", ""))
        self.pair.settle()
        ids = self.give_up(400)
        self.assertEqual(self.told()[450:], ids)

    def test_a_half_sent_request_is_told_at_once(self):
        small = Limits(max_frame=2048, max_calls=1000)
        self.pair = Pair(small, small)
        self.caller, self.server = self.pair.initiator, self.pair.acceptor
        self.give_up(950)
        self.told()
        call_id, _ = self.caller.call(bytes(9000))
        self.caller.send(1)
        self.caller.conversation.cancel(call_id)
        self.caller.send()
        self.assertEqual(
            [one[:3] for one in cut(bytes(self.caller.link))], [(REQUEST, MORE, call_id), (CANCEL, 0, call_id)]
        )

    def test_within_an_item_it_is_told_when_it_may_be_and_the_item_goes_on_until_then(self):
        small = Limits(max_frame=2048, max_calls=1000)
        for sent_meanwhile in (False, True):
            self.pair = Pair(small, small)
            self.caller, self.server = self.pair.initiator, self.pair.acceptor
            self.give_up(910)
            self.assertEqual(len(self.told()), 900)
            call_id, token = self.caller.call(flags=ITEMS)
            self.pair.settle()
            self.caller.conversation.send_items(call_id, 1, bytes(9000))
            self.caller.send(1)
            self.caller.conversation.cancel(call_id)
            self.caller.look()
            self.assertIsInstance(self.caller.outcome(token), CallFailed)
            self.assertEqual(self.caller.conversation.room(call_id), 0)
            self.caller.send(1)
            self.assertEqual([one[:2] for one in cut(bytes(self.caller.link))], [(ITEM, MORE), (CHUNK, MORE)])
            self.assertNotIn(call_id, self.told() if sent_meanwhile else [])
            self.pair.advance(1.0)
            # Half of it is sent, and no more of it comes, or all.
            self.caller.send()
            self.assertEqual(cut(bytes(self.caller.link))[-1][:3], (CANCEL, 0, call_id))
            self.assertIn(call_id, self.told())
            self.assertEqual(len(self.server.of(ItemsReceived)), sent_meanwhile)

    def test_of_more_slots_more_may_be_given_up_at_once(self):
        for slots, most in ((10, 10), (1024, 921), (4000, 3600)):
            limits = Limits(max_calls=slots)
            self.pair = Pair(limits, limits)
            self.caller, self.server = self.pair.initiator, self.pair.acceptor
            ids = self.give_up(slots)
            self.assertEqual(self.told(), ids[:most])
            self.assertLessEqual(max(900, most), max(limits.cancel_burst, slots))

    def test_a_stream_whose_items_have_come_is_told_at_once(self):
        self.give_up(950)
        count = len(self.told())
        streams = [self.caller.call(flags=STREAM) for _ in range(2)]
        self.pair.settle()
        (with_items, _), (without, _) = streams
        self.server.conversation.send_items(with_items, 1, b"a")
        self.pair.settle()
        for call_id, _ in streams:
            self.caller.conversation.cancel(call_id)
        self.assertEqual(self.told()[count:], [with_items])
        self.pair.advance(5.0)
        self.assertIn(without, self.told())


class OverLimit(Case):
    def test_calls_over_the_limit_again_and_again_end_the_conversation(self):
        for size in (None, 1 << 30):
            end = opened(SMALL)
            for call_id in range(1, 4001, 2):
                if size and call_id > 6:
                    message = struct.pack("!I", size) + request_message()
                    end.receive(frame(REQUEST, MORE, call_id, message) + frame(CANCEL, 0, call_id))
                else:
                    end.receive(frame(REQUEST, 0, call_id, request_message()))
                if end.of(Ended):
                    break
                self.assertLessEqual(end.conversation.running, 3)
                # As many refusals as there may be cancelled calls.
                self.assertLessEqual(call_id // 2 - 2, 1000)
            self.assertEqual(len(end.of(RequestReceived)), 3)
            self.check_refused(end, CancelFlood)

    def test_within_the_rate_they_are_refused_one_by_one(self):
        end = opened(SMALL)
        for call_id in range(1, 6001, 2):
            end.now += 1 / 32.9
            end.receive(frame(REQUEST, 0, call_id, request_message()))
        self.assertEqual(end.of(Ended), [])
        end.send()
        refusals = cut(bytes(end.link))
        self.assertEqual(len(refusals), 2997)
        self.assertEqual({one[:2] for one in refusals}, {(ERROR, NOT_PROCESSED)})

    def test_calls_without_an_answer_take_no_slot_from_others(self):
        # The caller cannot know of them when they end.
        pair = Pair(SMALL, SMALL)
        for _ in range(9):
            pair.initiator.call(flags=ONEWAY)
        pair.settle()
        for _ in range(1500):
            calls = [pair.initiator.call() for _ in range(3)]
            pair.settle()
            for call_id, token in calls:
                pair.acceptor.conversation.respond(call_id, b"")
                pair.settle()
                self.assertIsInstance(pair.initiator.outcome(token), ResponseReceived)
            pair.initiator.events.clear()
        self.assertEqual([end.of(Ended) for end in pair.ends], [[], []])
        self.assertEqual(pair.acceptor.conversation.running, 9)

    def test_and_leave_no_room_for_more_than_there_may_be(self):
        end = opened(SMALL)
        oneway = b"".join(frame(REQUEST, ONEWAY, call_id, request_message()) for call_id in range(1, 21, 2))
        end.receive(oneway + b"".join(frame(REQUEST, 0, call_id, request_message()) for call_id in range(21, 29, 2)))
        self.assertEqual(len(end.of(RequestReceived)), 13)
        end.send()
        self.assertEqual([one[:3] for one in cut(bytes(end.link))], [(ERROR, NOT_PROCESSED, 27)])


class Pings(Case):
    def test_a_flood_of_them_ends_the_conversation(self):
        end = opened()
        end.receive(frame(PING, 0, 0, bytes(8)) * 101)
        self.assertEqual(end.of(Ended), [])
        end.receive(frame(PING, 0, 0, bytes(8)))
        self.check_refused(end, PingFlood)
        # All but the last were answered.
        self.assertEqual([one[0] for one in cut(bytes(end.link))], [PONG] * 101 + [GOAWAY])

    def test_it_is_found_in_one_go_too(self):
        end = opened()
        end.receive(frame(PING, 0, 0, bytes(8)) * 100_000)
        self.check_refused(end, PingFlood)
        self.assertLess(len(end.link), 3000)

    def test_within_the_rate_they_never_do(self):
        end = opened()
        for _ in range(5000):
            end.now += 0.1001
            end.receive(frame(PING, 0, 0, bytes(8)))
        self.assertEqual(end.of(Ended), [])

    def test_one_too_many_is_forgiven_when_all_of_the_allowance_came_back(self):
        end = opened()
        for _ in range(10):
            end.receive(frame(PING, 0, 0, bytes(8)) * 101)
            end.now += 10.2
        self.assertEqual(end.of(Ended), [])

    def test_but_not_before(self):
        end = opened()
        end.receive(frame(PING, 0, 0, bytes(8)) * 101)
        end.now += 5.0
        end.receive(frame(PING, 0, 0, bytes(8)) * 50)
        self.assertEqual(end.of(Ended), [])
        end.receive(frame(PING, 0, 0, bytes(8)) * 2)
        self.check_refused(end, PingFlood)

    def test_answers_are_no_flood(self):
        end = opened()
        end.receive(frame(PONG, 0, 0, bytes(8)) * 5000)
        self.assertEqual(end.of(Ended), [])


class Oneway(Case):
    def setUp(self):
        self.pair = Pair(SMALL, SMALL)
        self.caller, self.server = self.pair.initiator, self.pair.acceptor

    def quiet(self):
        self.pair.settle()
        for end in self.pair.ends:
            conversation = end.conversation
            self.assertEqual((conversation.state, end.of(Ended)), (State.OPEN, []))
            self.assertEqual((conversation.pending, conversation.running), (0, 0))
            self.assertEqual((len(conversation.traffic.assembler), conversation._incoming._oneway), (0, {}))

    def test_nothing_is_answered_whatever_the_handler_says(self):
        for answer in (
            lambda call_id: self.server.conversation.respond(call_id, b"r" * 3000),
            lambda call_id: self.server.conversation.refuse(call_id, ErrorBody(2, "E", "no")),
            lambda call_id: self.server.conversation.refuse(call_id, CANCELLED, processed=False),
        ):
            call_id, token = self.caller.call(flags=ONEWAY)
            self.assertEqual(self.caller.conversation.pending, 0)
            self.pair.settle()
            self.assertEqual((self.server.request.call_id, self.server.request.flags), (call_id, ONEWAY))
            self.assertEqual(self.server.conversation.running, 1)
            answer(call_id)
            self.server.send()
            self.assertEqual(self.server.link, b"")
            self.assertEqual(self.caller.outcomes(token), [])
        self.quiet()

    def test_it_takes_no_slot_at_the_caller_and_does_not_wait_for_one(self):
        tokens = [self.caller.call()[1] for _ in range(7)]
        self.caller.call(flags=ONEWAY)
        self.assertEqual(len(self.caller.conversation._outgoing.waiting), 4)
        self.caller.send()
        self.assertEqual([one[:3] for one in cut(bytes(self.caller.link))][-1], (REQUEST, ONEWAY, 15))
        self.assertEqual(len(tokens), 7)

    def test_where_no_slot_is_free_it_is_delivered_all_the_same(self):
        for _ in range(3):
            self.caller.call()
        self.pair.settle()
        for size in (1, 5000):
            self.caller.call(bytes(size), flags=ONEWAY)
            self.pair.settle()
            self.assertEqual(self.server.request.arguments, bytes(size))
        self.assertEqual(len(self.server.of(RequestReceived)), 5)
        for call_id in (1, 3, 5, 7, 9):
            self.server.conversation.respond(call_id, b"")
        self.quiet()

    def test_a_burst_of_them_is_delivered_and_is_no_flood(self):
        end = opened()
        ids = range(1, 10_001, 2)
        end.receive(b"".join(frame(REQUEST, ONEWAY, call_id, request_message()) for call_id in ids))
        self.assertEqual([event.call_id for event in end.of(RequestReceived)], list(ids))
        self.assertEqual(end.conversation.running, 5000)
        end.receive(frame(REQUEST, 0, 10_001, request_message()))
        self.assertEqual(end.request.call_id, 10_001)
        for call_id in (*ids, 10_001):
            end.conversation.respond(call_id, b"r")
        end.send()
        self.assertEqual([one[:3] for one in cut(bytes(end.link))], [(RESPONSE, 0, 10_001)])
        self.assertEqual((end.of(Ended), end.conversation.running), ([], 0))

    def test_many_large_ones_on_the_way_are_no_fault(self):
        limits = Limits(max_frame=2048, max_calls=1)
        pair = Pair(limits, limits)
        for _ in range(200):
            pair.initiator.call(bytes(9000), flags=ONEWAY)
        pair.settle()
        self.assertEqual([end.of(Ended) for end in pair.ends], [[], []])
        self.assertEqual(len(pair.acceptor.of(RequestReceived)), 200)

    def test_a_large_one_is_delivered_whole(self):
        self.caller.call(bytes(5000), flags=ONEWAY)
        self.pair.settle()
        self.assertEqual((self.server.request.arguments, self.server.request.flags), (bytes(5000), ONEWAY))
        self.server.conversation.respond(1, b"")
        self.quiet()

    def test_one_whose_time_is_over_is_not_answered_either(self):
        for octets in (
            frame(REQUEST, ONEWAY, 1, request_message(milliseconds=0)),
            frame(REQUEST, ONEWAY | MORE, 1, struct.pack("!I", 3000) + request_message(milliseconds=1)),
            frame(REQUEST, ONEWAY | MORE, 1, struct.pack("!I", 1 << 31) + request_message()),
        ):
            end = opened(SMALL)
            end.receive(octets)
            end.conversation.handle_timer(1001.0)
            end.look()
            end.send()
            self.assertEqual((end.link, end.events, end.conversation.running), (b"", [], 0))

    def test_one_that_runs_is_stopped_at_its_deadline(self):
        self.caller.call(flags=ONEWAY, timeout=2.0)
        self.pair.settle()
        self.server.conversation.suspend(1, self.server.request.deadline)
        self.pair.advance(2.0)
        self.assertEqual(self.server.of(RequestCancelled), [RequestCancelled(1, True)])
        self.server.conversation.refuse(1, ErrorBody(4, "DeadlineExceeded", ""))
        self.quiet()
        self.assertEqual(self.caller.of(CallFailed), [])

    def test_one_that_misses_a_goaway_is_not_answered(self):
        # Call 1 is large, and call 3 overtakes it: GOAWAY promises an answer to both, but call 1 wants none.
        for size in (1, 5000):
            self.setUp()
            _, late = self.caller.call(bytes(5000), flags=ONEWAY)
            _, token = self.caller.call()
            self.caller.send(0)
            self.pair.deliver(self.caller)
            self.server.conversation.go_away()
            if size == 1:
                # The same of one that is small, from an end that sends them in any order.
                self.server.receive(frame(REQUEST, ONEWAY, 1, request_message()))
            else:
                self.pair.settle()
            self.server.conversation.respond(3, b"")
            self.pair.settle()
            self.assertIsInstance(self.caller.outcome(token), ResponseReceived)
            self.assertEqual(self.caller.outcomes(late), [])
            self.assertEqual([end.of(Ended) for end in self.pair.ends], [[], []])

    def test_it_may_be_cancelled(self):
        end = opened(SMALL)
        end.receive(frame(REQUEST, ONEWAY, 1, request_message()) + frame(CANCEL, 0, 1))
        self.assertEqual(end.of(RequestCancelled), [RequestCancelled(1, False)])
        end.conversation.refuse(1, CANCELLED)
        half = frame(REQUEST, ONEWAY | MORE, 3, struct.pack("!I", 3000) + request_message())
        end.receive(half + frame(CANCEL, 0, 3))
        end.send()
        self.assertEqual((end.link, end.conversation.running), (b"", 0))
        end.receive(frame(CHUNK, 0, 3, b"a"))
        self.assertEqual(len(end.of(Ended)), 1)

    def test_the_end_of_the_conversation_stops_one_that_runs(self):
        self.caller.call(flags=ONEWAY)
        self.pair.settle()
        self.server.lose()
        self.assertEqual(self.server.of(RequestCancelled), [RequestCancelled(1, False)])

    def test_a_peer_without_slots_is_called_all_the_same(self):
        end = opened(settings=STREAMING.replace(b"max_calls\x02", b"max_calls\x00"))
        end.call(flags=ONEWAY)
        self.assertFalse(end.call(flags=ITEMS)[1] in end.events)
        end.send()
        self.assertEqual([one[:2] for one in cut(bytes(end.link))], [(REQUEST, ONEWAY)])
