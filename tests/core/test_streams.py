"""Streams of items, either way and both, and the credit that bounds them: none of it is ever lost."""

from __future__ import annotations

import dataclasses
import math
import struct

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from protoframe.core.credit import Granted, Received, cost_of
from protoframe.core.events import (
    CallFailed,
    CreditReceived,
    Drained,
    Ended,
    EndReceived,
    ErrorReceived,
    ItemsReceived,
    RequestCancelled,
    RequestReceived,
    ResponseReceived,
    StopReceived,
)
from protoframe.core.frames import ErrorBody
from protoframe.core.limits import Limits
from protoframe.errors import (
    Cancelled,
    ConnectionLost,
    CreditExceeded,
    DeadlineExceeded,
    LocalProtocolError,
    MessageTooLarge,
    RemoteProtocolError,
    TooMuchUnfinished,
    Unimplemented,
)
from tests.core.pairs import (
    CANCEL,
    CHUNK,
    CREDIT,
    END,
    ERROR,
    GOAWAY,
    ITEM,
    ITEMS,
    MORE,
    ONEWAY,
    REQUEST,
    RESPONSE,
    STOP,
    STREAM,
    STREAMING,
    Pair,
    cut,
    frame,
    item_message,
    opened,
    request_message,
)

BOTH = ITEMS | STREAM

#: Small enough that a few octets meet every bound.
TIGHT = Limits(
    max_frame=2048,
    max_message=6000,
    max_unfinished=12000,
    max_calls=3,
    max_waiting=4,
    stream_credit=4096,
    connection_credit=6144,
)
#: The same of an end that lets the peer send more only when what came is taken.
STRICT = dataclasses.replace(TIGHT, max_unread=0)


class OctetPair(Pair):
    """Two ends between which each octet comes alone."""

    def deliver(self, sender, octets=None):
        whole = len(sender.link) if octets is None else octets
        return sum(super(OctetPair, self).deliver(sender, 1) for _ in range(whole))


class Case(SynchronousTestCase):
    pairs = Pair
    limits = TIGHT

    def setUp(self):
        self.pair = self.pairs(self.limits, self.limits)
        self.caller, self.server = self.pair.initiator, self.pair.acceptor
        self.taken = dict.fromkeys(self.pair.ends, 0)

    def call(self, flags, **options):
        call_id, token = self.caller.call(flags=flags, **options)
        self.pair.settle()
        return call_id, token

    def send(self, end, call_id, *texts, size=0):
        """Sends an ITEM that has these texts, or one that is padded to a size."""
        octets = b",".join(text.encode() for text in texts)
        end.conversation.send_items(call_id, len(texts), octets.ljust(size, b"."))

    def texts(self, end, call_id):
        """The items of a stream that came to an end so far."""
        found = []
        for event in end.of(ItemsReceived):
            if event.call_id == call_id:
                (count,) = struct.unpack_from("!H", event.message)
                texts = event.message[2:].rstrip(b".").decode().split(",")
                self.assertEqual((len(texts), event.count), (count, count))
                found += texts
        return found

    def take(self, end):
        """Takes all items that came to an end."""
        end.look()
        events = end.of(ItemsReceived)
        for event in events[self.taken[end] :]:
            end.conversation.give_back(event.call_id, event.cost)
        self.taken[end] = len(events)

    def frames(self, end):
        """What lies in the link from an end, taken out of it: kinds, flags and call ids."""
        end.send()
        octets = bytes(end.link)
        end.link.clear()
        return [one[:3] for one in cut(octets)]

    def finish(self):
        """All that came is taken; then both windows are whole, and nothing is left of any call."""
        for _ in range(4):
            self.pair.settle()
            for end in self.pair.ends:
                self.take(end)
        self.assertEqual([end.of(Ended) for end in self.pair.ends], [[], []])
        check_whole(self.pair)


def check_whole(pair):
    """Nothing is left of any call, and all credit is where it was."""
    for end in pair.ends:
        conversation, sender = end.conversation, pair.other(end).conversation
        assert conversation.pending == conversation.running == 0
        assert len(conversation.traffic.assembler) == conversation.traffic.assembler._octets == 0
        assert not conversation.outbox
        assert not conversation.outbox.cut
        assert conversation.outbox._large_octets == conversation.outbox._waiting_octets == 0
        for state in (
            conversation.traffic.granted.streams,
            conversation.traffic.credit.streams,
            conversation._incoming.streaming,
            conversation._incoming._oneway,
            conversation._incoming.suspended,
            conversation._outgoing.waiting,
            conversation._incoming.running,
            conversation._outgoing.pending,
        ):
            assert not state, state
        granted = conversation.traffic.granted
        window = granted._connection
        assert window.left == sender.traffic.credit.connection, "an end believes in other credit than the other"
        assert window.left + window.returned + granted._kept == end.limits.connection_credit, "credit leaked"
        assert granted._unread == granted._kept == 0, "something is taken for unread"
        # What is kept back until it is worth a frame is less than what is left: it holds nobody up.
        assert window.returned < window.left


class Conversations(Case):
    def test_an_answer_of_many_items(self):
        call_id, token = self.call(STREAM)
        self.assertEqual(self.server.request.flags, STREAM)
        self.send(self.server, call_id, "a", "b")
        self.send(self.server, call_id, "c")
        self.pair.settle()
        self.assertEqual(self.texts(self.caller, call_id), ["a", "b", "c"])
        self.assertEqual(self.caller.outcomes(token), [])
        self.assertEqual((self.server.conversation.running, self.caller.conversation.pending), (1, 1))
        self.send(self.server, call_id, "d")
        self.server.conversation.end_items(call_id)
        self.pair.settle()
        self.assertEqual(self.texts(self.caller, call_id), ["a", "b", "c", "d"])
        self.assertEqual(self.caller.outcome(token), EndReceived(call_id, token))
        self.assertIsInstance(self.caller.events[-1], EndReceived)
        self.finish()

    def test_an_answer_of_no_items(self):
        call_id, token = self.call(STREAM)
        self.server.conversation.end_items(call_id)
        self.finish()
        self.assertEqual(self.caller.outcome(token), EndReceived(call_id, token))
        self.assertEqual(self.texts(self.caller, call_id), [])

    def test_many_items_as_arguments(self):
        call_id, token = self.call(ITEMS)
        self.send(self.caller, call_id, "a")
        self.send(self.caller, call_id, "b", "c")
        self.caller.conversation.end_items(call_id)
        self.pair.settle()
        self.assertEqual(self.texts(self.server, call_id), ["a", "b", "c"])
        self.assertEqual(self.server.events[-1], EndReceived(call_id, None))
        self.server.conversation.respond(call_id, b"3")
        self.finish()
        self.assertEqual(self.caller.outcome(token), ResponseReceived(token, b"3"))

    def test_items_that_go_at_once_with_their_request(self):
        call_id, token = self.caller.call(flags=ITEMS)
        self.send(self.caller, call_id, "a")
        self.caller.conversation.end_items(call_id)
        self.pair.settle()
        self.assertEqual(
            [type(event) for event in self.server.events[1:]], [RequestReceived, ItemsReceived, EndReceived]
        )
        self.server.conversation.respond(call_id, b"")
        self.finish()
        self.assertIsInstance(self.caller.outcome(token), ResponseReceived)

    def test_both_ways_at_once_and_either_may_end_first(self):
        for first in ("caller", "server"):
            call_id, token = self.call(BOTH)
            for text in "abc":
                self.send(self.caller, call_id, f"to {text}")
                self.send(self.server, call_id, f"from {text}")
                self.pair.settle()
            self.assertEqual(self.texts(self.server, call_id), ["to a", "to b", "to c"])
            self.assertEqual(self.texts(self.caller, call_id), ["from a", "from b", "from c"])
            if first == "caller":
                # Half closed: answers still come.
                self.caller.conversation.end_items(call_id)
                self.pair.settle()
                self.assertEqual(self.server.events[-1], EndReceived(call_id, None))
                self.assertRaises(LocalProtocolError, self.send, self.caller, call_id, "more")
                self.assertRaises(LocalProtocolError, self.caller.conversation.end_items, call_id)
                self.send(self.server, call_id, "late")
            self.server.conversation.end_items(call_id)
            self.finish()
            self.assertEqual(self.caller.outcome(token), EndReceived(call_id, token))
            self.assertEqual(self.texts(self.caller, call_id)[3:], ["late"] if first == "caller" else [])
            # An answer ends both streams.
            for end in self.pair.ends:
                self.assertEqual(end.conversation.room(call_id), 0)
                self.assertRaises(LocalProtocolError, self.send, end, call_id, "more")
                self.assertRaises(LocalProtocolError, end.conversation.end_items, call_id)

    def test_the_other_end_may_call_so_too(self):
        call_id, token = self.server.call(flags=BOTH)
        self.pair.settle()
        self.send(self.server, call_id, "to")
        self.send(self.caller, call_id, "from")
        self.server.conversation.end_items(call_id)
        self.pair.settle()
        self.assertEqual((self.texts(self.caller, call_id), self.texts(self.server, call_id)), (["to"], ["from"]))
        self.caller.conversation.end_items(call_id)
        self.finish()
        self.assertIsInstance(self.server.outcome(token), EndReceived)

    def test_an_error_in_the_middle_is_the_answer_and_what_came_before_it_counts(self):
        call_id, token = self.call(BOTH)
        self.send(self.server, call_id, "a")
        self.send(self.caller, call_id, "b")
        body = ErrorBody(2, "E", "no more", b"\x80")
        self.server.conversation.refuse(call_id, body)
        self.finish()
        self.assertEqual(self.texts(self.caller, call_id), ["a"])
        self.assertEqual(self.caller.outcome(token), ErrorReceived(token, body, True))
        self.assertIsInstance(self.caller.events[-1], ErrorReceived)

    def test_an_early_answer_needs_no_end_of_the_items(self):
        for flags in (ITEMS, BOTH):
            call_id, token = self.call(flags)
            self.send(self.caller, call_id, "a")
            self.pair.settle()
            if flags == ITEMS:
                self.server.conversation.respond(call_id, b"enough")
            else:
                self.server.conversation.end_items(call_id)
            # These cross it.
            self.send(self.caller, call_id, "b", size=1000)
            self.caller.conversation.end_items(call_id)
            self.finish()
            self.assertEqual(self.texts(self.server, call_id), ["a"])
            self.assertEqual(self.server.of(EndReceived), [])
            self.assertIsInstance(self.caller.outcome(token), ResponseReceived if flags == ITEMS else EndReceived)

    def test_large_items_arrive_whole(self):
        call_id, _ = self.call(BOTH)
        for size in (2033, 2034, 2035, 5999, 6000):
            for end in self.pair.ends:
                self.send(end, call_id, f"{size}", size=size)
                self.pair.settle()
                message = self.pair.other(end).of(ItemsReceived)[-1].message
                self.assertEqual((message[:6], len(message)), (b"\0\1%d" % size, size + 2))
                self.take(self.pair.other(end))
                self.pair.settle()
        self.server.conversation.end_items(call_id)
        self.finish()

    def test_a_call_that_waits_for_a_slot_has_no_room_until_it_goes(self):
        for _ in range(3):
            self.call(0)
        call_id, token = self.call(BOTH)
        self.assertEqual(self.caller.conversation.room(call_id), 0)
        self.assertRaises(LocalProtocolError, self.send, self.caller, call_id, "a")
        self.caller.events.clear()
        self.server.conversation.respond(1, b"")
        self.pair.settle()
        self.assertIn(CreditReceived(call_id), self.caller.events)
        self.assertEqual(self.caller.conversation.room(call_id), 4096)
        self.send(self.caller, call_id, "a")
        self.pair.settle()
        self.assertEqual(self.texts(self.server, call_id), ["a"])
        for open_id in (3, 5):
            self.server.conversation.respond(open_id, b"")
        self.server.conversation.end_items(call_id)
        self.finish()
        self.assertIsInstance(self.caller.outcome(token), EndReceived)

    def test_a_large_request_goes_before_its_items(self):
        call_id, _ = self.caller.call(bytes(5000), flags=ITEMS)
        self.caller.send(1)
        self.assertEqual(self.caller.conversation.room(call_id), 0)
        self.assertRaises(LocalProtocolError, self.send, self.caller, call_id, "a")
        self.caller.conversation.outbox.departed = ()
        self.pair.settle()
        self.assertEqual(self.caller.conversation.outbox.departed, (call_id,))
        self.send(self.caller, call_id, "a")
        self.pair.settle()
        self.assertEqual(self.texts(self.server, call_id), ["a"])
        self.server.conversation.respond(call_id, b"")
        self.finish()

    def test_they_go_on_after_goaway_and_drain(self):
        call_id, token = self.call(BOTH)
        self.server.conversation.go_away()
        self.pair.settle()
        self.send(self.caller, call_id, "a")
        self.send(self.server, call_id, "b")
        self.caller.conversation.end_items(call_id)
        self.pair.settle()
        self.assertEqual((self.texts(self.server, call_id), self.texts(self.caller, call_id)), (["a"], ["b"]))
        self.assertEqual([end.of(Drained) for end in self.pair.ends], [[], []])
        self.server.conversation.end_items(call_id)
        self.finish()
        self.assertIsInstance(self.caller.outcome(token), EndReceived)
        self.assertEqual([end.of(Drained) for end in self.pair.ends], [[Drained()]] * 2)

    def test_items_of_calls_that_crossed_a_goaway_are_ignored(self):
        self.call(0)
        self.server.conversation.go_away()
        call_id, token = self.caller.call(flags=ITEMS)
        self.send(self.caller, call_id, "a", size=3000)
        self.caller.send()
        self.send(self.caller, call_id, "b")
        self.caller.conversation.end_items(call_id)
        self.pair.settle()
        self.assertEqual([end.of(Ended) for end in self.pair.ends], [[], []])
        self.assertFalse(self.caller.outcome(token).error.may_have_run)
        self.server.conversation.respond(1, b"")
        self.finish()

    def test_items_of_a_call_that_is_refused_are_ignored(self):
        for _ in range(3):
            self.call(0)
        self.server.conversation.respond(1, b"")
        # The slot that this answer frees is taken by another call before the caller's next one arrives.
        self.server.conversation._incoming.running.add(1)
        self.pair.settle()
        call_id, token = self.caller.call(flags=ITEMS)
        self.send(self.caller, call_id, "a")
        self.send(self.caller, call_id, "b", size=3000)
        self.caller.send()
        self.caller.conversation.end_items(call_id)
        self.server.conversation._incoming.running.add(1)
        self.pair.settle()
        self.assertEqual(self.caller.outcome(token).body.name, "TooManyCalls")
        self.assertEqual(self.server.of(ItemsReceived), [])
        self.server.conversation._incoming.running.discard(1)
        for open_id in (3, 5):
            self.server.conversation.respond(open_id, b"")
        self.finish()

    def test_cancelling_takes_credit_of_what_is_late_back(self):
        for by in ("caller", "deadline"):
            call_id, token = self.call(BOTH, timeout=5.0)
            self.send(self.server, call_id, "a", size=1500)
            self.pair.settle()
            self.send(self.server, call_id, "b", size=1000)
            self.server.send()
            if by == "caller":
                self.caller.conversation.cancel(call_id)
            else:
                self.pair.advance(5.0)
            self.send(self.server, call_id, "c", size=5000)
            self.pair.settle()
            self.assertEqual(self.texts(self.caller, call_id), ["a"])
            self.assertIn(RequestCancelled(call_id, False), self.server.events)
            self.server.conversation.refuse(call_id, ErrorBody(1, "Cancelled", ""))
            self.finish()
            error = self.caller.outcome(token).error
            self.assertIsInstance(error, Cancelled if by == "caller" else DeadlineExceeded)
            self.assertTrue(error.may_have_run)

    def test_an_end_that_crosses_a_cancel_is_the_answer(self):
        call_id, token = self.call(STREAM)
        self.server.conversation.end_items(call_id)
        self.server.send()
        self.caller.conversation.cancel(call_id)
        self.finish()
        self.assertIsInstance(self.caller.outcome(token), CallFailed)


class OctetByOctet(Conversations):
    pairs = OctetPair


class CreditOfStreams(Case):
    def fill(self, end, call_id, size=1000):
        """Sends as long as there is room; how many items that were."""
        sent = 0
        while end.conversation.room(call_id):
            self.send(end, call_id, "x", size=size)
            sent += 1
        self.pair.settle()
        return sent

    def test_a_stream_stops_when_it_has_spent_its_credit_and_goes_on_when_some_is_taken(self):
        call_id, _ = self.call(BOTH)
        for end in self.pair.ends:
            other = self.pair.other(end)
            # 1,002 octets of message and 32 for the item.
            self.assertEqual(self.fill(end, call_id), 4)
            self.assertEqual(end.conversation.traffic.credit.left(call_id), 4096 - 4 * 1034)
            self.assertRaises(LocalProtocolError, self.send, end, call_id, "x")
            first, *_ = other.of(ItemsReceived)
            self.assertEqual(first.cost, 1034)
            end.look()
            end.events.clear()
            self.pair.advance(1.0)
            self.pair.settle()
            self.assertEqual((end.events, end.conversation.room(call_id)), ([], 0))
            other.conversation.give_back(call_id, first.cost)
            self.pair.settle()
            self.assertEqual(end.events, [CreditReceived(call_id)])
            self.assertEqual(end.conversation.room(call_id), 1034 - (4 * 1034 - 4096))
            self.taken[other] = 1
            self.take(other)
            self.pair.settle()
        self.server.conversation.end_items(call_id)
        self.finish()

    def test_a_stream_whose_items_are_taken_at_once_never_stops(self):
        call_id, _ = self.call(STREAM)
        granted = 0
        for _ in range(400):
            self.assertGreater(self.server.conversation.room(call_id), 0)
            self.send(self.server, call_id, "x", size=66)
            self.server.send()
            self.pair.deliver(self.server)
            self.take(self.caller)
            self.caller.send()
            granted += [one[0] for one in cut(bytes(self.caller.link))].count(CREDIT)
            self.pair.settle()
        # 40,000 octets, of windows of 4,096 and 6,144: it is told now and then, not for each item.
        self.assertGreater(granted, 20)
        self.assertLess(granted, 50)
        self.server.conversation.end_items(call_id)
        self.finish()

    def test_all_streams_share_the_credit_of_the_connection_for_what_is_on_the_way(self):
        one, _ = self.call(STREAM)
        other, _ = self.call(STREAM)
        for call_id, most in ((one, 4), (other, 2)):
            for _ in range(most):
                self.assertGreater(self.server.conversation.room(call_id), 0)
                self.send(self.server, call_id, "x", size=1000)
            self.assertEqual(self.server.conversation.room(call_id), 0)
        self.assertLessEqual(self.server.conversation.traffic.credit.connection, 0)
        self.assertGreater(self.server.conversation.traffic.credit.streams[other], 0)
        self.pair.settle()
        self.server.events.clear()
        self.take(self.caller)
        self.pair.settle()
        self.assertGreater(self.server.conversation.room(other), 0)
        self.server.conversation.end_items(one)
        self.server.conversation.end_items(other)
        self.finish()

    def test_a_reader_that_is_slow_holds_up_no_other_stream_for_good(self):
        slow, _ = self.call(STREAM)
        fast, _ = self.call(STREAM)
        self.fill(self.server, slow)
        self.taken[self.caller] = len(self.caller.of(ItemsReceived))
        for number in range(20):
            self.assertGreater(self.fill(self.server, fast), 0, number)
            self.take(self.caller)
            self.pair.settle()

    def test_nor_does_one_that_is_slow_and_spends_what_others_gave_back(self):
        # All that came of one stream is taken, but less than half of the whole; then another spends the rest.
        slow, _ = self.call(STREAM)
        fast, _ = self.call(STREAM)
        self.send(self.server, fast, "x", size=2900)
        self.pair.settle()
        self.take(self.caller)
        self.send(self.server, slow, "x", size=3900)
        self.pair.settle()
        self.assertLessEqual(self.caller.conversation.traffic.granted.streams[slow].left, 4096 - 3900)
        self.assertGreater(self.server.conversation.room(fast), 0)

    def test_an_item_costs_its_message_and_32_octets_each(self):
        call_id, _ = self.call(STREAM)
        self.server.conversation.send_items(call_id, 7, bytes(100))
        self.pair.settle()
        self.assertEqual(self.caller.of(ItemsReceived)[0].cost, 2 + 100 + 7 * 32)
        self.assertEqual(self.server.conversation.room(call_id), 4096 - 326)
        self.assertEqual(cost_of(102, 7), 326)
        self.server.conversation.end_items(call_id)
        self.finish()

    def test_items_of_no_octets_are_not_for_nothing(self):
        call_id, _ = self.call(STREAM)
        self.assertLessEqual(self.fill(self.server, call_id, size=0), 4096 // 33)

    def test_an_item_larger_than_the_credit_passes_and_overdraws_once(self):
        for limits in (TIGHT, Limits(stream_credit=1024, connection_credit=1024)):
            self.pair = Pair(limits, limits)
            self.caller, self.server = self.pair.initiator, self.pair.acceptor
            self.taken = dict.fromkeys(self.pair.ends, 0)
            call_id, _ = self.call(BOTH)
            for end in self.pair.ends:
                self.send(end, call_id, "large", size=5900)
                self.pair.settle()
                self.assertEqual(self.texts(self.pair.other(end), call_id), ["large"])
                self.assertEqual(end.conversation.room(call_id), 0)
                self.take(self.pair.other(end))
                self.pair.settle()
                self.assertEqual(end.conversation.room(call_id), limits.stream_credit)
            self.server.conversation.end_items(call_id)
            self.finish()

    def test_a_large_item_is_paid_for_at_its_first_frame(self):
        call_id, _ = self.call(STREAM)
        self.send(self.server, call_id, "x", size=5900)
        self.server.send(1)
        self.pair.deliver(self.server)
        self.assertEqual(self.caller.conversation.traffic.granted.streams[call_id].left, 4096 - 5934)
        self.assertEqual(self.caller.of(ItemsReceived), [])
        self.caller.receive(frame(ITEM, 0, 1, item_message()))
        self.assertIsInstance(self.caller.ended.error, RemoteProtocolError)

    def test_an_item_that_the_peer_does_not_take_is_not_sent_and_the_stream_goes_on(self):
        call_id, _ = self.call(BOTH)
        for end in self.pair.ends:
            self.assertRaises(MessageTooLarge, self.send, end, call_id, "x", size=6006)
            self.assertEqual(end.conversation.room(call_id), 4096)
            self.send(end, call_id, "small")
        self.server.conversation.end_items(call_id)
        self.finish()

    def test_a_call_with_streams_is_not_made_to_a_peer_that_takes_none(self):
        for flags in (ITEMS, STREAM, BOTH):
            end = opened()
            error = self.assertRaises(Unimplemented, end.call, flags=flags)
            self.assertFalse(error.may_have_run)
            self.assertEqual(end.conversation.pending, 0)
            end.send()
            self.assertEqual(end.link, b"")

    def test_a_call_without_an_answer_has_no_streams(self):
        for flags in (ONEWAY | ITEMS, ONEWAY | STREAM):
            self.assertRaises(LocalProtocolError, self.caller.call, flags=flags)
        self.assertEqual(self.frames(self.caller), [])

    def test_a_method_without_a_stream_may_answer_a_caller_that_takes_one(self):
        for flags in (STREAM, BOTH):
            call_id, token = self.call(flags)
            self.server.conversation.respond(call_id, b"r" * 3000)
            self.finish()
            self.assertEqual(self.caller.outcome(token), ResponseReceived(token, b"r" * 3000))

    def test_after_an_item_the_answer_is_no_single_result(self):
        call_id, token = self.call(STREAM)
        self.send(self.server, call_id, "a")
        self.assertRaises(LocalProtocolError, self.server.conversation.respond, call_id, b"")
        self.server.conversation.end_items(call_id)
        self.finish()
        self.assertIsInstance(self.caller.outcome(token), EndReceived)

    def test_there_is_nothing_to_send_on_a_call_without_a_stream(self):
        one, _ = self.call(0)
        two, _ = self.call(ITEMS)
        three, _ = self.call(STREAM)
        for end, call_id in (
            (self.caller, one),
            (self.server, one),
            (self.server, two),
            (self.caller, three),
            (self.caller, 99),
        ):
            self.assertEqual(end.conversation.room(call_id), 0)
            self.assertRaises(LocalProtocolError, self.send, end, call_id, "x")
            self.assertRaises(LocalProtocolError, end.conversation.end_items, call_id)
        self.assertEqual([self.frames(end) for end in self.pair.ends], [[], []])

    def test_an_item_dropped_before_it_was_begun_costs_nothing(self):
        # Whoever drops it: an answer that comes early, a refusal, the caller, or its deadline.
        for how in ("early", "refused", "cancelled", "expired"):
            self.setUp()
            if how == "refused":
                call_id, token = self.call(STREAM)
                self.send(self.server, call_id, "x", size=5000)
                self.server.conversation.refuse(call_id, ErrorBody(2, "E", ""))
            else:
                call_id, token = self.call(ITEMS, timeout=5.0)
                self.send(self.caller, call_id, "x", size=5000)
                if how == "cancelled":
                    self.caller.conversation.cancel(call_id)
                elif how == "expired":
                    self.pair.advance(5.0)
                else:
                    self.server.conversation.respond(call_id, b"early")
                    self.server.send()
                    self.pair.deliver(self.server)
            self.pair.settle()
            if how in ("cancelled", "expired"):
                # Its request was sent whole: that it did not run is not for the caller to say.
                self.assertTrue(self.caller.outcome(token).error.may_have_run, how)
                self.assertEqual(self.server.of(RequestCancelled), [RequestCancelled(call_id, False)], how)
                self.server.conversation.refuse(call_id, ErrorBody(1, "Cancelled", ""))
            self.caller.outcome(token)
            self.finish()

    def test_credit_that_an_item_gives_back_lets_others_go_on(self):
        one, _ = self.call(ITEMS)
        other, _ = self.call(ITEMS)
        self.send(self.caller, one, "x", size=6000)
        self.send(self.caller, other, "x", size=2000)
        self.pair.deliver(self.caller)
        self.assertEqual(self.caller.conversation.room(other), 0)
        self.caller.look()
        self.caller.events.clear()
        self.caller.conversation.cancel(one)
        self.caller.look()
        self.assertIn(CreditReceived(0), self.caller.events)
        self.assertGreater(self.caller.conversation.room(other), 0)

    def test_an_item_dropped_when_it_was_begun_is_given_back_by_the_other_end(self):
        for how in ("early", "refused", "cancelled", "expired"):
            self.setUp()
            flags = STREAM if how == "refused" else ITEMS
            call_id, token = self.call(flags, timeout=5.0)
            sender = self.server if how == "refused" else self.caller
            self.send(sender, call_id, "x", size=5000)
            sender.send(1)
            self.pair.deliver(sender)
            if how == "refused":
                self.server.conversation.refuse(call_id, ErrorBody(2, "E", ""))
            elif how == "early":
                self.server.conversation.respond(call_id, b"early")
            elif how == "cancelled":
                self.caller.conversation.cancel(call_id)
            else:
                self.pair.advance(5.0)
            self.pair.settle()
            if how in ("cancelled", "expired"):
                self.assertTrue(self.caller.outcome(token).error.may_have_run, how)
                self.server.conversation.refuse(call_id, ErrorBody(1, "Cancelled", ""))
            self.caller.outcome(token)
            self.assertEqual([end.of(ItemsReceived) for end in self.pair.ends], [[], []])
            self.finish()

    def test_a_large_item_of_a_call_that_is_over_is_given_back_and_not_told(self):
        call_id, token = self.call(ITEMS)
        self.send(self.caller, call_id, "x", size=5000)
        self.caller.send(1)
        self.pair.deliver(self.caller)
        self.caller.send()
        self.server.conversation.respond(call_id, b"early")
        self.assertEqual(self.server.conversation.traffic.assembler._octets, 0)
        self.pair.settle()
        self.assertEqual(self.server.of(ItemsReceived), [])
        self.finish()
        self.assertIsInstance(self.caller.outcome(token), ResponseReceived)

    def test_credit_for_streams_that_are_not_there_is_ignored(self):
        call_id, _ = self.call(ITEMS)
        self.caller.conversation.end_items(call_id)
        before = self.caller.conversation.traffic.credit.connection
        for one in (call_id, 99, 2, 4):
            self.caller.receive(frame(CREDIT, 0, one, struct.pack("!I", 0x7FFFFFFF)))
        self.assertEqual((self.caller.conversation.traffic.credit.connection, self.caller.of(Ended)), (before, []))

    def test_an_item_that_is_too_large_for_its_caller_fails_the_call_at_its_first_frame(self):
        end = opened(dataclasses.replace(TIGHT, max_frame=65536), settings=STREAMING)
        end.conversation._outgoing._max_result = lambda token: 3000
        _, token = end.call(flags=STREAM)
        end.receive(frame(ITEM, MORE, 2, struct.pack("!I", 3007) + item_message()))
        self.assertEqual(end.outcomes(token), [])
        end.receive(frame(CHUNK, 0, 2, bytes(3007 - 102)))
        self.assertEqual(len(end.of(ItemsReceived)), 1)
        end.conversation.give_back(2, end.of(ItemsReceived)[0].cost)
        end.receive(frame(ITEM, MORE, 2, struct.pack("!I", 3008) + item_message()))
        error = end.outcome(token).error
        self.assertIsInstance(error, MessageTooLarge)
        self.assertTrue(error.may_have_run)
        self.assertIn((CANCEL, 0, 2), self.frames(end))
        window = end.conversation.traffic.granted._connection
        self.assertEqual(window.left + window.returned, 6144)
        # Its rest is skipped, and so is what follows.
        end.receive(frame(CHUNK, 0, 2, bytes(3008 - 102)) + frame(ITEM, 0, 2, item_message()) + frame(END, 0, 2))
        self.assertEqual((end.conversation.pending, end.of(Ended), len(end.of(ItemsReceived))), (0, [], 1))
        self.assertEqual(window.left + window.returned, 6144)

    def test_a_lost_link_says_that_a_call_may_have_run_whose_items_were_on_the_way(self):
        call_id, token = self.call(ITEMS)
        self.send(self.caller, call_id, "x", size=5000)
        self.caller.send(1)
        self.caller.lose()
        self.assertIsInstance(self.caller.outcome(token).error, ConnectionLost)
        self.assertTrue(self.caller.outcome(token).error.may_have_run)

    def test_after_the_end_of_the_conversation_nothing_is_left_to_send(self):
        call_id, token = self.call(BOTH)
        self.send(self.server, call_id, "a")
        self.pair.settle()
        event = self.caller.of(ItemsReceived)[0]
        for end in self.pair.ends:
            end.lose()
            end.conversation.give_back(call_id, 1 << 20)
            self.assertEqual(end.conversation.room(call_id), 0)
            self.assertRaises(LocalProtocolError, self.send, end, call_id, "x")
            self.assertRaises(LocalProtocolError, end.conversation.end_items, call_id)
            self.assertEqual(self.frames(end), [])
        self.assertEqual(event.count, 1)
        self.assertTrue(self.caller.outcome(token).error.may_have_run)


class StrictCreditOfStreams(CreditOfStreams):
    limits = STRICT

    def test_what_is_not_taken_holds_up_all_streams(self):
        one, _ = self.call(STREAM)
        other, _ = self.call(STREAM)
        self.assertEqual((self.fill(self.server, one), self.fill(self.server, other)), (4, 2))
        self.assertLessEqual(self.server.conversation.traffic.credit.connection, 0)
        self.assertGreater(self.server.conversation.traffic.credit.streams[other], 0)
        self.server.events.clear()
        self.take(self.caller)
        self.pair.settle()
        self.assertIn(CreditReceived(0), self.server.events)
        self.assertGreater(self.server.conversation.room(other), 0)
        self.server.conversation.end_items(one)
        self.server.conversation.end_items(other)
        self.finish()


class Unread(CreditOfStreams):
    """Items that nobody takes just now, and what they let others do."""

    limits = dataclasses.replace(TIGHT, max_calls=20, max_unread=100_000)

    def fill_all(self, number):
        """Streams that were sent as long as there was room, and of which nothing is taken."""
        streams = [self.call(STREAM)[0] for _ in range(number)]
        for call_id in streams:
            self.assertEqual(self.fill(self.server, call_id), 4)
        return streams

    def end_all(self, streams):
        for call_id in streams:
            self.server.conversation.end_items(call_id)
        self.finish()

    def test_streams_that_nobody_takes_hold_up_no_other(self):
        streams = self.fill_all(12)
        fast, _ = self.call(STREAM)
        already = len(self.caller.of(ItemsReceived))
        for number in range(60):
            self.assertGreater(self.server.conversation.room(fast), 0, number)
            self.send(self.server, fast, "x", size=1000)
            self.pair.settle()
            (event,) = self.caller.of(ItemsReceived)[already:]
            self.caller.conversation.give_back(fast, event.cost)
            self.caller.events.remove(event)
            self.pair.settle()
        for call_id in streams:
            self.assertEqual(self.server.conversation.room(call_id), 0)
        self.end_all([*streams, fast])

    def test_the_defaults_let_many_be_unread(self):
        limits = Limits()
        self.pair = Pair(limits, limits)
        self.caller, self.server = self.pair.initiator, self.pair.acceptor
        self.taken = dict.fromkeys(self.pair.ends, 0)
        streams = [self.call(STREAM)[0] for _ in range(40)]
        for call_id in streams:
            # Six of them would be more than the credit of the connection.
            self.assertEqual(self.fill(self.server, call_id, size=65_000), 5)
        fast, _ = self.call(STREAM)
        self.assertEqual(self.server.conversation.room(fast), limits.stream_credit)
        self.end_all([*streams, fast])

    def test_more_than_is_held_unread_holds_up_all_until_some_is_taken(self):
        limits = dataclasses.replace(self.limits, max_unread=10_000)
        self.pair = Pair(limits, limits)
        self.caller, self.server = self.pair.initiator, self.pair.acceptor
        self.taken = dict.fromkeys(self.pair.ends, 0)
        streams = [self.call(STREAM)[0] for _ in range(8)]
        sent = [self.fill(self.server, call_id) for call_id in streams]
        # Nine items are up to 10,000 octets, and six more spend all of the connection's credit.
        self.assertEqual(sent, [4, 4, 4, 3, 0, 0, 0, 0])
        self.assertLessEqual(self.server.conversation.traffic.credit.connection, 0)
        granted = self.caller.conversation.traffic.granted
        self.assertEqual((granted._unread, granted._kept), (15 * 1034, 6 * 1034))
        self.pair.advance(1.0)
        self.pair.settle()
        self.assertEqual(self.server.conversation.room(streams[-1]), 0)
        for taken in range(1, 16):
            self.server.events.clear()
            event = self.caller.of(ItemsReceived)[taken - 1]
            self.caller.conversation.give_back(event.call_id, event.cost)
            self.pair.settle()
            self.assertGreater(self.server.conversation.room(streams[-1]), 0)
            self.assertEqual(CreditReceived(0) in self.server.events, taken == 1)
            self.assertEqual(granted._kept, max(0, 6 - taken) * 1034)
        self.taken[self.caller] = 15
        self.end_all(streams)

    def test_the_credit_of_a_stream_comes_back_only_when_its_items_are_taken(self):
        (call_id,) = self.fill_all(1)
        self.server.events.clear()
        self.pair.advance(1.0)
        self.pair.settle()
        self.assertEqual((self.server.events, self.server.conversation.room(call_id)), ([], 0))
        self.assertGreater(self.server.conversation.traffic.credit.connection, 0)
        self.take(self.caller)
        self.pair.settle()
        self.assertIn(CreditReceived(call_id), self.server.events)
        self.end_all([call_id])

    def test_a_large_item_counts_from_its_first_frame_and_not_twice_when_it_does_not_come(self):
        call_id, _ = self.call(ITEMS)
        self.send(self.caller, call_id, "x", size=5000)
        self.caller.send(1)
        self.pair.deliver(self.caller)
        granted = self.server.conversation.traffic.granted
        self.assertEqual(granted._unread, 5034)
        self.caller.conversation.cancel(call_id)
        self.pair.settle()
        self.assertEqual(granted._unread, 0)
        self.server.conversation.refuse(call_id, ErrorBody(1, "Cancelled", ""))
        self.finish()


class Stops(Case):
    """Whoever serves a call takes no more of the stream that comes with it, and the call goes on."""

    def leave(self, call_id):
        self.server.conversation.leave(call_id)
        self.server.send()

    def answer(self, call_id, token):
        """The call goes on to its answer."""
        self.assertEqual(self.caller.outcomes(token), [])
        self.server.conversation.respond(call_id, b"r")
        self.finish()
        self.assertEqual(self.caller.outcome(token), ResponseReceived(token, b"r"))

    def test_the_caller_is_told_and_sends_no_more_and_the_call_goes_on(self):
        call_id, token = self.call(ITEMS)
        self.send(self.caller, call_id, "a")
        self.pair.settle()
        self.leave(call_id)
        self.assertEqual(cut(bytes(self.server.link)), [(STOP, 0, call_id, b"")])
        self.pair.settle()
        self.assertEqual(self.caller.of(StopReceived), [StopReceived(call_id)])
        self.assertEqual(self.caller.conversation.room(call_id), 0)
        self.assertRaises(LocalProtocolError, self.send, self.caller, call_id, "b")
        self.assertRaises(LocalProtocolError, self.caller.conversation.end_items, call_id)
        self.assertEqual(self.frames(self.caller), [])
        self.assertEqual(self.texts(self.server, call_id), ["a"])
        self.answer(call_id, token)
        self.assertEqual(self.server.of(RequestCancelled), [])

    def test_the_answer_may_still_be_a_stream(self):
        call_id, token = self.call(BOTH)
        self.leave(call_id)
        self.pair.settle()
        self.send(self.server, call_id, "a")
        self.pair.settle()
        self.assertEqual(self.texts(self.caller, call_id), ["a"])
        self.server.conversation.end_items(call_id)
        self.finish()
        self.assertEqual(self.caller.outcome(token), EndReceived(call_id, token))

    def test_items_and_the_end_that_cross_it_are_ignored_and_given_back(self):
        for ends in (False, True):
            call_id, token = self.call(ITEMS)
            self.leave(call_id)
            self.send(self.caller, call_id, "a", size=1000)
            self.send(self.caller, call_id, "b", size=1000)
            if ends:
                self.caller.conversation.end_items(call_id)
            self.pair.settle()
            self.assertEqual((self.server.of(ItemsReceived), self.server.of(EndReceived)), ([], []))
            self.assertEqual(StopReceived(call_id) in self.caller.events, not ends)
            self.answer(call_id, token)

    def test_what_came_and_was_not_taken_is_given_back_later(self):
        call_id, token = self.call(ITEMS)
        self.send(self.caller, call_id, "a", size=1500)
        self.pair.settle()
        self.leave(call_id)
        self.pair.settle()
        self.take(self.server)
        self.answer(call_id, token)

    def test_a_large_item_that_was_not_begun_is_not_sent_and_costs_nothing(self):
        call_id, token = self.call(ITEMS)
        other, _ = self.call(ITEMS)
        self.send(self.caller, call_id, "x", size=6000)
        self.send(self.caller, other, "y", size=2000)
        self.assertEqual(self.caller.conversation.room(other), 0)
        self.leave(call_id)
        self.pair.deliver(self.server)
        self.assertEqual(self.caller.conversation.traffic.credit.connection, 6144 - 2034)
        self.assertIn(CreditReceived(0), self.caller.events)
        self.assertEqual(self.frames(self.caller), [(ITEM, 0, other)])
        self.caller.link += frame(ITEM, 0, other, b"\0\1y".ljust(2002, b"."))
        self.server.conversation.respond(other, b"")
        self.answer(call_id, token)

    def test_one_that_was_begun_is_finished(self):
        for arrives in (False, True):
            self.setUp()
            call_id, token = self.call(ITEMS)
            self.send(self.caller, call_id, "x", size=5000)
            self.caller.send(1)
            if arrives:
                self.pair.deliver(self.caller)
            self.leave(call_id)
            # What came of it is forgotten, and its credit comes back.
            self.assertEqual(self.server.conversation.traffic.assembler._octets, 0)
            self.assertEqual(self.server.conversation.traffic.granted._unread, 0)
            self.pair.deliver(self.server)
            self.assertEqual(self.caller.conversation.room(call_id), 0)
            self.caller.send()
            kinds = [one[:2] for one in cut(bytes(self.caller.link))]
            self.assertEqual(kinds, [(ITEM, MORE), (CHUNK, MORE), (CHUNK, 0)][arrives:])
            self.pair.settle()
            self.assertEqual(self.server.of(ItemsReceived), [])
            self.answer(call_id, token)

    def test_the_answer_and_a_cancel_end_one_that_was_begun(self):
        for how in ("answer", "cancel", "expire"):
            self.setUp()
            call_id, token = self.call(ITEMS, timeout=5.0)
            self.send(self.caller, call_id, "x", size=5000)
            self.caller.send(1)
            self.leave(call_id)
            self.pair.deliver(self.server)
            if how == "answer":
                self.server.conversation.respond(call_id, b"")
                self.server.send()
                self.pair.deliver(self.server)
            elif how == "cancel":
                self.caller.conversation.cancel(call_id)
            else:
                self.pair.advance(5.0)
            self.caller.send()
            self.assertEqual([one[0] for one in cut(bytes(self.caller.link))], [ITEM, CANCEL])
            self.pair.settle()
            if how != "answer":
                self.server.conversation.refuse(call_id, ErrorBody(1, "Cancelled", ""))
            self.finish()
            self.caller.outcome(token)

    def test_it_crosses_a_cancel(self):
        call_id, token = self.call(BOTH)
        self.leave(call_id)
        self.caller.conversation.cancel(call_id)
        self.pair.settle()
        self.assertEqual(self.caller.of(StopReceived), [])
        self.assertEqual(self.server.of(RequestCancelled), [RequestCancelled(call_id, False)])
        self.server.conversation.leave(call_id)
        self.server.conversation.refuse(call_id, ErrorBody(1, "Cancelled", ""))
        self.finish()
        self.assertIsInstance(self.caller.outcome(token).error, Cancelled)

    def test_after_it_a_call_may_be_cancelled_or_run_out_of_time(self):
        for how in ("cancel", "expire"):
            call_id, token = self.call(ITEMS, timeout=5.0)
            self.leave(call_id)
            self.pair.settle()
            if how == "cancel":
                self.caller.conversation.cancel(call_id)
            else:
                self.pair.advance(5.0)
            self.pair.settle()
            self.assertEqual(self.server.of(RequestCancelled)[-1], RequestCancelled(call_id, False))
            self.server.conversation.refuse(call_id, ErrorBody(1, "Cancelled", ""))
            self.finish()
            self.assertIsInstance(self.caller.outcome(token), CallFailed)

    def test_it_goes_on_after_goaway_of_either_end(self):
        for leaving in (0, 1):
            for crossing in (False, True):
                self.setUp()
                call_id, token = self.call(ITEMS)
                self.pair.ends[leaving].conversation.go_away()
                if not crossing:
                    self.pair.settle()
                self.leave(call_id)
                self.pair.settle()
                self.assertEqual(self.caller.of(StopReceived), [StopReceived(call_id)])
                self.assertEqual(self.caller.of(Drained), [])
                self.answer(call_id, token)
                self.assertEqual([end.of(Drained) for end in self.pair.ends], [[Drained()]] * 2)

    def test_it_is_sent_once_and_only_while_there_is_something_to_stop(self):
        plain, _ = self.call(0)
        streamed, _ = self.call(STREAM)
        call_id, token = self.call(ITEMS)
        for _ in range(2):
            self.server.conversation.leave(call_id)
        self.assertEqual(self.frames(self.server), [(STOP, 0, call_id)])
        for one in (plain, streamed, 99):
            self.server.conversation.leave(one)
        self.server.conversation.respond(plain, b"")
        self.pair.settle()
        self.server.conversation.leave(plain)
        ended, _ = self.call(ITEMS)
        self.caller.conversation.end_items(ended)
        self.pair.settle()
        self.server.conversation.leave(ended)
        self.assertEqual(self.frames(self.server), [])
        self.server.conversation.respond(ended, b"")
        self.server.conversation.leave(ended)
        self.server.conversation.end_items(streamed)
        # Of the one that is stopped nothing was delivered.
        self.caller.receive(frame(STOP, 0, call_id))
        self.answer(call_id, token)
        for end in self.pair.ends:
            end.lose()
        self.server.conversation.leave(call_id)
        self.assertEqual(self.frames(self.server), [])

    def test_whoever_leaves_a_stream_that_is_an_answer_gives_the_call_up(self):
        for flags in (STREAM, BOTH):
            call_id, token = self.call(flags)
            self.send(self.server, call_id, "a")
            self.pair.settle()
            self.caller.conversation.leave(call_id)
            self.assertEqual(self.frames(self.caller), [(CANCEL, 0, call_id)])
            self.server.receive(frame(CANCEL, 0, call_id))
            self.pair.settle()
            self.assertIsInstance(self.caller.outcome(token).error, Cancelled)
            self.server.conversation.refuse(call_id, ErrorBody(1, "Cancelled", ""))
            self.finish()
            self.caller.conversation.leave(call_id)
            self.assertEqual(self.frames(self.caller), [])

    def test_one_of_a_call_that_has_no_stream_to_stop_is_ignored(self):
        plain, first = self.call(0)
        streamed, second = self.call(STREAM)
        ended, third = self.call(ITEMS)
        self.caller.conversation.end_items(ended)
        self.pair.settle()
        for call_id in (plain, streamed, ended, 7, 99, (1 << 64) - 1):
            self.caller.receive(frame(STOP, 0, call_id))
            self.caller.receive(frame(STOP, 0xFF, call_id, b"for later"))
        self.assertEqual((self.caller.of(StopReceived), self.caller.of(Ended)), ([], []))
        self.server.conversation.respond(plain, b"")
        self.server.conversation.end_items(streamed)
        self.server.conversation.respond(ended, b"")
        self.finish()
        # Nor is one that comes when the call is answered.
        for call_id in (plain, streamed, ended):
            self.caller.receive(frame(STOP, 0, call_id))
        self.assertEqual((self.caller.of(StopReceived), self.caller.of(Ended)), ([], []))
        for token in (first, second, third):
            self.caller.outcome(token)

    def test_one_of_a_call_that_was_not_sent_yet_is_ignored(self):
        for _ in range(self.limits.max_calls):
            self.call(0)
        call_id, token = self.call(ITEMS)
        self.caller.receive(frame(STOP, 0, call_id))
        self.assertEqual(self.caller.of(StopReceived), [])
        for event in self.server.of(RequestReceived):
            self.server.conversation.respond(event.call_id, b"")
        self.pair.settle()
        self.send(self.caller, call_id, "a")
        self.pair.settle()
        self.assertEqual(self.texts(self.server, call_id), ["a"])
        self.answer(call_id, token)

    def test_one_that_is_no_call_of_its_receivers_is_refused(self):
        for name, ids in (("caller", (0, 2, 98)), ("server", (0, 1, 3, 99))):
            for call_id in ids:
                self.setUp()
                self.call(ITEMS)
                end = getattr(self, name)
                end.receive(frame(STOP, 0, call_id))
                self.assertEqual(len(end.of(Ended)), 1, (name, call_id))
                self.assertIs(type(end.ended.error), RemoteProtocolError)
                self.assertIn("STOP", end.ended.error.message)


class StopsOctetByOctet(Stops):
    pairs = OctetPair


class StrictStops(Stops):
    limits = STRICT


class LargeItems(Case):
    def test_they_take_turns_with_other_calls_and_small_ones_go_first(self):
        one, _ = self.call(BOTH)
        other, _ = self.call(STREAM)
        self.send(self.server, one, "x", size=5900)
        self.send(self.server, other, "y", size=5900)
        self.server.send(1)
        small, _ = self.caller.call()
        self.caller.send()
        self.pair.deliver(self.caller)
        self.server.conversation.respond(small, b"small")
        self.assertEqual(
            self.frames(self.server),
            [
                (ITEM, MORE, one),
                (RESPONSE, 0, small),
                (ITEM, MORE, other),
                (CHUNK, MORE, one),
                (CHUNK, MORE, other),
                (CHUNK, 0, one),
                (CHUNK, 0, other),
            ],
        )

    def test_nothing_of_its_own_stream_overtakes_one(self):
        for begun in (0, 1):
            self.setUp()
            call_id, token = self.call(BOTH)
            for end in self.pair.ends:
                self.send(end, call_id, "large", size=3500)
                end.send(begun)
                self.assertEqual(end.conversation.room(call_id), 0)
                self.assertRaises(LocalProtocolError, self.send, end, call_id, "small")
                end.conversation.outbox.departed = ()
                end.send()
                self.assertEqual(end.conversation.outbox.departed, (call_id,))
                self.send(end, call_id, "small")
                end.conversation.end_items(call_id)
            # What the caller sends crosses the end.
            self.pair.settle()
            self.assertEqual(self.texts(self.caller, call_id), ["large", "small"])
            self.assertEqual(self.texts(self.server, call_id), [])
            self.finish()
            self.assertIsInstance(self.caller.outcome(token), EndReceived)

    def end_early(self, end, call_id):
        """Asks for the end of a stream when it cannot go yet: it is refused, or goes after what is before it."""
        try:
            end.conversation.end_items(call_id)
        except LocalProtocolError:
            self.pair.settle()
            end.conversation.end_items(call_id)
        self.pair.settle()
        self.assertEqual([end.of(Ended) for end in self.pair.ends], [[], []])

    def test_its_own_end_does_not_overtake_one(self):
        for begun in (0, 1):
            self.setUp()
            up, _ = self.call(ITEMS)
            down, token = self.call(STREAM)
            for end, call_id in ((self.caller, up), (self.server, down)):
                self.send(end, call_id, "large", size=3500)
                end.send(begun)
                self.end_early(end, call_id)
                self.assertEqual(self.texts(self.pair.other(end), call_id), ["large"])
                self.assertEqual(len(self.pair.other(end).of(EndReceived)), 1)
            self.assertIsInstance(self.caller.outcome(token), EndReceived)
            self.server.conversation.respond(up, b"")
            self.finish()

    def test_an_end_does_not_overtake_its_own_request(self):
        call_id, _ = self.caller.call(bytes(5000), flags=ITEMS)
        self.end_early(self.caller, call_id)
        self.assertEqual(self.server.events[-1], EndReceived(call_id, None))
        self.server.conversation.respond(call_id, b"")
        self.finish()

    def test_an_end_does_not_go_before_a_request_that_waits_for_a_slot(self):
        for _ in range(3):
            self.call(0)
        call_id, _ = self.call(ITEMS)
        try:
            self.caller.conversation.end_items(call_id)
        except LocalProtocolError:
            ended = False
        else:
            ended = True
        for open_id in (1, 3, 5):
            self.server.conversation.respond(open_id, b"")
        self.pair.settle()
        if not ended:
            self.caller.conversation.end_items(call_id)
        self.pair.settle()
        self.assertEqual([end.of(Ended) for end in self.pair.ends], [[], []])
        self.assertEqual(self.server.events[-1], EndReceived(call_id, None))
        self.server.conversation.respond(call_id, b"")
        self.finish()


def large_item(total, part):
    return frame(ITEM, MORE, 1, struct.pack("!I", total) + part)


def asked(flags, call_id=1):
    return frame(REQUEST, flags, call_id, request_message())


class RuleBreaks(SynchronousTestCase):
    """What a peer may not do.  The vectors of what is malformed have more, as octets."""

    def refused(self, octets, cls, *, calls=(), limits=TIGHT):
        for size in (len(octets), 1):
            end = opened(limits, settings=STREAMING)
            for flags in calls:
                end.call(flags=flags)
            end.send()
            end.link.clear()
            for at in range(0, len(octets), size):
                end.receive(octets[at : at + size])
            self.assertEqual(len(end.of(Ended)), 1, octets[:60])
            error = end.ended.error
            self.assertIs(type(error), cls, error)
            end.send()
            kind, _, _, payload = cut(bytes(end.link))[-1]
            self.assertEqual((kind, payload[:2]), (GOAWAY, b"\0\x0d"))

    def allowed(self, octets, *, calls=(), limits=TIGHT):
        end = opened(limits, settings=STREAMING)
        for flags in calls:
            end.call(flags=flags)
        end.receive(octets)
        self.assertEqual(end.of(Ended), [])
        return end

    def test_items_without_credit_of_the_stream(self):
        # The last item that a credit of 4,096 octets allows begins at 4,095 that are spent, and the next is too much.
        limits = Limits(stream_credit=4096, connection_credit=1 << 20)
        spent = frame(ITEM, 0, 1, item_message(1, 4095 - 34))
        last = frame(ITEM, 0, 1, item_message(1, 5000))
        end = self.allowed(asked(ITEMS) + spent + last, limits=limits)
        self.assertEqual(len(end.of(ItemsReceived)), 2)
        self.refused(asked(ITEMS) + spent + last + frame(ITEM, 0, 1, item_message(1, 0)), CreditExceeded, limits=limits)
        all_spent = frame(ITEM, 0, 1, item_message(1, 4096 - 34))
        self.refused(asked(ITEMS) + all_spent + last, CreditExceeded, limits=limits)
        self.refused(asked(ITEMS) + all_spent + large_item(3000, item_message()), CreditExceeded, limits=limits)

    def test_items_without_credit_of_the_connection(self):
        spent = asked(ITEMS, 1) + asked(ITEMS, 3) + frame(ITEM, 0, 1, item_message(1, 6144 - 34))
        more = frame(ITEM, 0, 3, item_message(1, 0))
        for limits in (
            Limits(stream_credit=4096, connection_credit=6144, max_unread=0),
            Limits(max_message=4096, stream_credit=4096, connection_credit=6144, max_unread=6143),
        ):
            self.allowed(spent, limits=limits)
            self.refused(spent + more, CreditExceeded, limits=limits)
        # Where that much may wait to be taken, the credit is back before the item has come.
        for most in (6144, 1 << 24):
            self.allowed(spent + more, limits=Limits(stream_credit=4096, connection_credit=6144, max_unread=most))

    def test_items_without_credit_in_an_answer(self):
        limits = Limits(stream_credit=4096, connection_credit=1 << 20)
        spent = frame(ITEM, 0, 2, item_message(1, 4096 - 34))
        self.allowed(spent, calls=[STREAM], limits=limits)
        self.refused(spent + frame(ITEM, 0, 2, item_message(1, 0)), CreditExceeded, calls=[STREAM], limits=limits)

    def test_items_of_calls_that_have_none(self):
        for octets in (frame(ITEM, 0, 2, item_message()), frame(END, 0, 2), large_item(3000, item_message())):
            of_two = octets[:4] + struct.pack("!Q", 2) + octets[12:]
            for calls in ([0], [ITEMS], []):
                self.refused(of_two, RemoteProtocolError, calls=calls)

    def test_items_of_calls_that_were_never_made(self):
        for call_id in (0, 1, 2, 3, (1 << 64) - 1):
            for octets in (frame(ITEM, 0, call_id, item_message()), frame(END, 0, call_id)):
                self.refused(octets, RemoteProtocolError)

    def test_anything_after_the_answer(self):
        for answer in (frame(END, 0, 2), frame(ERROR, 0, 2, struct.pack("!HBH", 2, 0, 0))):
            self.allowed(answer, calls=[STREAM])
            for more in (frame(ITEM, 0, 2, item_message()), frame(END, 0, 2), frame(RESPONSE, 0, 2, b"\xc0")):
                self.refused(answer + more, RemoteProtocolError, calls=[STREAM])

    def test_what_stands_between_the_parts_of_an_item(self):
        part = large_item(3000, item_message())
        for call_id, calls, before in ((1, (), asked(ITEMS)), (2, (STREAM,), b"")):
            begun = before + part[:4] + struct.pack("!Q", call_id) + part[12:]
            for octets in (
                frame(ITEM, 0, call_id, item_message()),
                frame(ITEM, MORE, call_id, struct.pack("!I", 3000) + item_message()),
                frame(END, 0, call_id),
            ):
                self.refused(begun + octets, RemoteProtocolError, calls=calls)
        self.refused(
            part[:4] + struct.pack("!Q", 2) + part[12:] + frame(RESPONSE, MORE, 2, struct.pack("!I", 99) + b"a"),
            RemoteProtocolError,
            calls=[STREAM],
        )

    def test_what_comes_before_the_request_is_whole(self):
        half = frame(REQUEST, MORE | ITEMS, 1, struct.pack("!I", 20) + request_message())
        for octets in (
            frame(ITEM, 0, 1, item_message()),
            large_item(3000, item_message()),
            frame(END, 0, 1),
        ):
            self.refused(half + octets, RemoteProtocolError)

    def test_items_that_lie_about_themselves(self):
        for octets in (
            frame(ITEM, 0, 1, b""),
            frame(ITEM, 0, 1, b"\1"),
            frame(ITEM, 0, 1, item_message(0)),
            large_item(3000, b""),
            large_item(3000, item_message(2)),
            large_item(3000, item_message(0)),
            large_item(6008, item_message()),
            large_item(50, item_message()),
            large_item(110, item_message()) + frame(CHUNK, 0, 1, bytes(9)),
            large_item(110, item_message()) + frame(CHUNK, 0, 1, bytes(7)),
        ):
            self.refused(asked(ITEMS) + octets, RemoteProtocolError)

    def test_more_large_items_than_was_said(self):
        limits = Limits(max_message=200_000, max_unfinished=200_000, max_frame=2048, stream_credit=1 << 20)
        begun = b"".join(
            asked(ITEMS, call_id) + frame(ITEM, MORE, call_id, struct.pack("!I", 200_000) + item_message())
            for call_id in (1, 3)
        )
        self.refused(begun, TooMuchUnfinished, limits=limits)

    def test_credit_of_nothing_or_of_more_than_can_be_counted(self):
        for octets in (
            frame(CREDIT, 0, 0, struct.pack("!I", 0)),
            frame(CREDIT, 0, 0, bytes(3)),
            frame(CREDIT, 0, 0, b"\0\0\0\0\1"),
            frame(CREDIT, 0, 0, struct.pack("!I", 0x80000000 - 8192)),
            frame(CREDIT, 0, 2, struct.pack("!I", 0x80000000 - 4096)),
        ):
            self.refused(octets, RemoteProtocolError, calls=[ITEMS])
        most = frame(CREDIT, 0, 0, struct.pack("!I", 0x7FFFFFFF - 8192))
        self.allowed(most + frame(CREDIT, 0, 2, struct.pack("!I", 0x7FFFFFFF - 4096)), calls=[ITEMS])

    def test_streams_of_a_call_that_wants_no_answer(self):
        for flags in (ITEMS, STREAM):
            self.refused(asked(ONEWAY | flags), RemoteProtocolError)
            half = frame(REQUEST, MORE | ONEWAY | flags, 1, struct.pack("!I", 20) + request_message())
            self.refused(half, RemoteProtocolError)

    def test_what_is_late_is_no_fault(self):
        # Items, and the end, of calls that were answered, refused or cancelled.
        late = frame(ITEM, 0, 1, item_message()) + large_item(110, item_message()) + frame(CHUNK, 0, 1, bytes(8))
        for flags in (ITEMS, 0):
            end = self.allowed(asked(flags))
            end.conversation.respond(1, b"")
            end.receive(late + frame(END, 0, 1) + frame(END, 0, 1))
            self.assertEqual((end.of(Ended), end.of(ItemsReceived), end.of(EndReceived)), ([], [], []))
        end = self.allowed(b"", calls=[STREAM])
        end.conversation.cancel(2)
        of_two = frame(ITEM, 0, 2, item_message()) + frame(ITEM, MORE, 2, struct.pack("!I", 110) + item_message())
        end.receive(of_two + frame(CHUNK, 0, 2, bytes(8)) + frame(END, 0, 2))
        self.assertEqual((end.of(Ended), end.of(ItemsReceived), end.conversation.pending), ([], [], 0))

    def test_what_is_late_needs_credit_all_the_same(self):
        end = self.allowed(asked(ITEMS))
        end.conversation.respond(1, b"")
        end.conversation.traffic.granted._connection.left = 0
        end.receive(frame(ITEM, 0, 1, item_message()))
        self.assertIs(type(end.ended.error), CreditExceeded)


SIZES = (1, 60, 900, 2030, 2100, 4500, 5990)


class StreamWalk:
    """Two ends, the streams between them, and whoever sends and takes items there."""

    def __init__(self, max_unread):
        limits = dataclasses.replace(TIGHT, max_unread=max_unread)
        self.max_unread = max_unread
        self.pair = Pair(limits, limits)
        self.stopped = set()
        self.seen = dict.fromkeys(self.pair.ends, 0)
        self.calls = {end: {} for end in self.pair.ends}  # token by id
        self.running = {end: {} for end in self.pair.ends}  # flags by id
        self.held = {end: [] for end in self.pair.ends}
        self.sent = {}  # by end and call id
        self.got = {}
        self.finished = set()

    def look(self):
        for end in self.pair.ends:
            end.look()
            for event in end.events[self.seen[end] :]:
                if isinstance(event, RequestReceived):
                    self.running[end][event.call_id] = event.flags
                    end.conversation.suspend(event.call_id, event.deadline)
                elif isinstance(event, ItemsReceived):
                    assert event.cost == len(event.message) + 32 * event.count
                    self.held[end].append(event)
                    self.got.setdefault((self.pair.other(end), event.call_id), []).append(event.message)
                elif isinstance(event, EndReceived):
                    self.finished.add((self.pair.other(end), event.call_id))
                elif isinstance(event, StopReceived):
                    assert (end, event.call_id) in self.stopped, "nobody stopped this"
                    assert event.call_id not in end.conversation.traffic.credit.streams
                    assert not end.conversation.room(event.call_id)
                else:
                    assert not isinstance(event, Ended), event.error
            self.seen[end] = len(end.events)
            self.check(end)

    def check(self, end):
        """What must hold at any time."""
        granted = end.conversation.traffic.granted
        largest = cost_of(6007, 1)
        for window in granted.streams.values():
            assert -largest < window.left <= window.left + window.returned <= TIGHT.stream_credit
        window = granted._connection
        assert -largest < window.left
        assert min(window.returned, granted._kept) >= 0
        assert window.left + window.returned + granted._kept == TIGHT.connection_credit, "the account is not whole"
        held = sum(event.cost for event in self.held[end])
        assert held <= granted._unread < self.max_unread + TIGHT.connection_credit + largest
        assert 0 <= granted._unread - granted._kept <= self.max_unread
        if granted._unread <= self.max_unread and not granted._kept:
            assert window.left > 0, "the other end may send nothing, and nothing is kept back"

    def call(self, end, flags, timeout):
        if end.conversation._outgoing.is_open and len(end.conversation._outgoing.waiting) < TIGHT.max_waiting:
            call_id, token = end.call(bytes(3000 if flags & MORE else 1), timeout, flags=flags & ~MORE)
            self.calls[end][call_id] = token

    def streams(self, end):
        """The streams that an end may send on now."""
        return [one for one in sorted(end.conversation.traffic.credit.streams) if end.conversation.room(one)]

    def items(self, end, pick, size):
        ready = self.streams(end)
        if ready:
            call_id = ready[pick % len(ready)]
            sent = self.sent.setdefault((end, call_id), [])
            # Of several items no more than a frame takes.
            count = 1 + pick % 3 if size < 1000 else 1
            message = struct.pack("!HI", count, len(sent)) + bytes(size)
            end.conversation.send_items(call_id, count, message[2:])
            sent.append(message)

    def end_items(self, end, pick):
        # One whose message is on the way cannot end yet.
        busy = {*end.conversation.outbox.cut, *end.conversation._outgoing.waiting}
        ready = [one for one in sorted(end.conversation.traffic.credit.streams) if one not in busy]
        if ready:
            call_id = ready[pick % len(ready)]
            end.conversation.end_items(call_id)
            self.running[end].pop(call_id, None)

    def answer(self, end, pick, size, how):
        running = sorted(self.running[end])
        if running:
            call_id = running[pick % len(running)]
            flags = self.running[end][call_id]
            if how == "refuse":
                end.conversation.refuse(call_id, ErrorBody(2, "E", "", bytes(size)))
            elif not flags & STREAM:
                end.conversation.respond(call_id, bytes(size))
            else:
                return
            del self.running[end][call_id]

    def stop(self, end, pick):
        """Takes no more of a stream that comes with a call of the other end's."""
        own = end.conversation._own_parity
        ready = [one for one in sorted(end.conversation.traffic.granted.streams) if one & 1 != own]
        if ready:
            call_id = ready[pick % len(ready)]
            end.conversation.leave(call_id)
            self.stopped.add((self.pair.other(end), call_id))

    def cancel(self, end, pick):
        ids = sorted(end.conversation._outgoing.pending)
        if ids:
            end.conversation.cancel(ids[pick % len(ids)])

    def take(self, end, pick):
        for event in self.held[end][: 1 + pick % 3]:
            end.conversation.give_back(event.call_id, event.cost)
        del self.held[end][: 1 + pick % 3]

    def do(self, what, number, pick, size):
        end = self.pair.ends[number]
        if what == "call":
            self.call(
                end, (0, ITEMS, STREAM, BOTH, BOTH | MORE, ITEMS | MORE)[pick % 6], (0.5, 30.0, math.inf)[pick % 3]
            )
        elif what == "items":
            self.items(end, pick, size)
        elif what == "end":
            self.end_items(end, pick)
        elif what == "answer":
            self.answer(end, pick, size, ("respond", "refuse")[pick % 2])
        elif what == "cancel":
            self.cancel(end, pick)
        elif what == "stop":
            self.stop(end, pick)
        elif what == "take":
            self.take(end, pick)
        elif what == "leave":
            if pick == 0:
                end.conversation.go_away()
        elif what == "send":
            end.send((0, 1, 2048, 5000)[pick % 4])
        elif what == "deliver":
            self.pair.deliver(end, (1, 12, 100, 2000, None)[pick % 5])
        else:
            self.pair.advance((0.1, 0.5)[pick % 2])
        self.look()

    def finish(self):
        """All is ended, delivered and taken, and the accounts are checked."""
        for _ in range(300):
            self.pair.settle()
            self.look()
            for end in self.pair.ends:
                for _ in range(len(self.held[end])):
                    self.take(end, 0)
                self.end_items(end, 0)
                self.answer(end, 0, 10, "respond")
            if not any(end.conversation.pending for end in self.pair.ends) and not any(self.held.values()):
                self.pair.settle()
                break
        self.look()
        for end in self.pair.ends:
            for call_id, token in self.calls[end].items():
                assert len(end.outcomes(token)) == 1, f"call {call_id} has not one outcome"
        for stream, got in self.got.items():
            assert got == self.sent[stream][: len(got)], "items came changed, or in another order"
        for stream in self.finished:
            assert self.got.get(stream, []) == self.sent.get(stream, []), "a stream ended before its items"
        check_whole(self.pair)


STEPS = (
    *("call", "items", "end", "answer", "cancel", "stop", "take", "send", "deliver", "wait", "leave"),
    *("call", "items", "items", "take", "send", "deliver"),
)


class Interleavings(SynchronousTestCase):
    @settings(max_examples=150)
    @given(
        st.lists(
            st.tuples(st.sampled_from(STEPS), st.integers(0, 1), st.integers(0, 11), st.sampled_from(SIZES)),
            # Short walks meet little; steps that find nothing to do are left out of what is shown.
            min_size=25,
            max_size=80,
        ),
        st.sampled_from([0, 3000, 10_000, Limits().max_unread]),
    )
    def test_no_credit_leaks_and_no_item_is_lost_or_overtaken(self, steps, max_unread):
        walk = StreamWalk(max_unread)
        for step in steps:
            walk.do(*step)
        walk.finish()


def granting(stream, connection, max_unread):
    return Granted(Limits(stream_credit=stream, connection_credit=connection, max_unread=max_unread))


class Accounts(SynchronousTestCase):
    """The two halves of the credit, alone."""

    @given(
        st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9000)), max_size=60),
        st.integers(1024, 9000),
        st.one_of(st.just(0), st.integers(1, 30_000)),
    )
    def test_what_one_grants_the_other_has(self, steps, size, max_unread):
        granted, received = granting(size, 2 * size, max_unread), Received(size, 2 * size)
        for call_id in (1, 3):
            granted.open(call_id)
            received.open(call_id)
        held = []
        for pick, cost in steps:
            call_id = 1 + 2 * (pick & 1)
            if pick < 2 and received.left(call_id) > 0:
                received.spend(call_id, cost)
                granted.spend(call_id, cost)
                held.append((call_id, cost))
            elif held:
                call_id, taken = held.pop(cost % len(held))
                granted.give_back(call_id, taken)
            for grant in granted.grants(call_id):
                received.add(*grant)
            self.assertEqual(received.connection, granted._connection.left)
            window = granted._connection
            self.assertEqual(window.left + window.returned + granted._kept, 2 * size)
            self.assertEqual(granted._unread, sum(cost for _, cost in held))
            # What was taken holds nobody up, whatever others hold.
            self.assertTrue(not window.returned or window.returned < window.left)
            for one in (1, 3):
                self.assertEqual(received.streams[one], granted.streams[one].left)
        for call_id, cost in held:
            granted.give_back(call_id, cost)
            for grant in granted.grants(call_id):
                received.add(*grant)
        self.assertGreater(min(received.left(1), received.left(3)), 0)
        self.assertEqual((granted._unread, granted._kept), (0, 0))
        for whole, window in ((2 * size, granted._connection), *((size, granted.streams[one]) for one in (1, 3))):
            self.assertEqual(window.left + window.returned, whole)

    def test_without_credit_nothing_is_taken(self):
        granted = granting(1024, 1024, 0)
        granted.open(1)
        granted.spend(1, 1024)
        self.assertRaises(CreditExceeded, granted.spend, 1, 1)
        self.assertRaises(CreditExceeded, granted.spend, 3, 1)
        granted.give_back(1, 512)
        self.assertRaises(CreditExceeded, granted.spend, 1, 1)
        self.assertEqual(granted.grants(1), [(1, 512), (0, 512)])
        granted.spend(1, 5000)
        self.assertRaises(CreditExceeded, granted.spend, 1, 1)

    def test_credit_is_granted_when_it_is_no_less_than_what_is_left(self):
        granted = granting(1024, 4000, 0)
        granted.open(1)
        granted.spend(1, 600)
        granted.give_back(1, 423)
        self.assertEqual(granted.grants(1), [])
        granted.give_back(1, 1)
        self.assertEqual(granted.grants(1), [(1, 424)])
        granted.close(1)
        granted.give_back(1, 176)
        self.assertEqual(granted.grants(1), [])
        granted.spend(3, 2799)
        self.assertEqual(granted.grants(3), [])
        granted.spend(3, 1)
        self.assertEqual(granted.grants(3), [(0, 600)])
        self.assertEqual(granted.grants(3), [])

    def test_that_of_the_connection_is_back_when_something_comes_until_too_much_is_unread(self):
        granted = granting(1024, 1024, 1000)
        account = granted._connection
        for cost, kept in ((600, 0), (400, 0), (1, 1), (400, 401)):
            granted.spend(1, cost)
            granted.grants(1)
            self.assertEqual((account.left + account.returned, granted._kept), (1024 - kept, kept), cost)
        # What was kept comes back first.
        for cost, kept in ((300, 101), (200, 0), (901, 0)):
            granted.give_back(1, cost)
            self.assertEqual((account.left + account.returned, granted._kept), (1024 - kept, kept), cost)
        self.assertEqual(granted._unread, 0)

    def test_what_has_come_of_a_stream_is_known_while_it_is_open(self):
        granted = granting(1024, 1024, 0)
        granted.open(1)
        self.assertFalse(granted.is_used(1))
        granted.spend(1, 1)
        self.assertEqual([granted.is_used(call_id) for call_id in (1, 3)], [True, False])
        granted.give_back(1, 1)
        self.assertTrue(granted.is_used(1))
        granted.close(1)
        self.assertFalse(granted.is_used(1))

    def test_only_what_lets_something_go_on_is_told(self):
        received = Received(1000, 1000)
        received.open(1)
        self.assertFalse(received.add(1, 10))
        self.assertFalse(received.add(0, 10))
        received.spend(1, 1020)
        self.assertEqual((received.left(1), received.left(3)), (-10, -10))
        self.assertFalse(received.add(1, 10))
        self.assertTrue(received.add(1, 1))
        self.assertFalse(received.add(0, 10))
        self.assertTrue(received.add(0, 1))
        self.assertEqual(received.left(1), 1)
        received.close(1)
        self.assertFalse(received.add(1, 1 << 31))
        self.assertRaises(RemoteProtocolError, received.add, 0, (1 << 31) - 1)
