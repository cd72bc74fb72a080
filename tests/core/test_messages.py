"""Large messages: sent in turns, put together within bounds."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from protoframe.core.frames import Kind, parse_total, serialize_request
from protoframe.core.messages import SLACK, Assembler, Outbox
from protoframe.errors import RemoteProtocolError
from tests.core.pairs import CANCEL, CHUNK, ERROR, MORE, REQUEST, RESPONSE, cut, frame

ROOM = 2048 - 12


def outbox(max_unfinished=1 << 20):
    made = Outbox(2048)
    made.max_unfinished = max_unfinished
    return made


def ids(octets):
    return [call_id for _, _, call_id, _ in cut(b"".join(octets))]


class OutboxTests(SynchronousTestCase):
    def test_it_is_empty_until_something_is_put_in_and_once_all_is_out(self):
        box = outbox()
        self.assertFalse(box)
        box.put(RESPONSE, 0, 1, b"a")
        box.put(RESPONSE, 0, 3, b"a" * 5000)
        self.assertTrue(box)
        box.poll(1 << 20)
        self.assertFalse(box)
        self.assertEqual(box.poll(1 << 20), [])

    def test_whole_messages_go_in_order_and_are_frames_as_specified(self):
        box = outbox()
        box.put(RESPONSE, 4, 1, b"one")
        box.put_control(CANCEL, 3)
        box.put_request(5, 0, 1.5, b"P.m", b"\x80", b"\x80")
        self.assertEqual(
            b"".join(box.poll(1 << 20, large=False)),
            frame(RESPONSE, 4, 1, b"one")
            + frame(CANCEL, 0, 3)
            + frame(REQUEST, 0, 5, struct.pack("!IHH", 1500, 3, 1) + b"P.m\x80\x80"),
        )

    @given(st.floats(-1, 1e8), st.binary(min_size=1, max_size=255), st.binary(max_size=3000), st.binary(max_size=3000))
    def test_a_request_is_the_message_that_it_would_be_alone_whether_it_is_cut_or_not(
        self, remaining, name, metadata, arguments
    ):
        message = serialize_request(remaining, name, metadata, arguments)
        one, other = outbox(), outbox()
        one.put_request(7, 4, remaining, name, metadata, arguments)
        other.put(REQUEST, 4, 7, message)
        self.assertEqual(b"".join(one.poll(1 << 20)), b"".join(other.poll(1 << 20)))

    def test_of_a_large_message_nothing_is_copied_unless_each_of_its_frames_has_to_be_whole(self):
        box, message = outbox(), bytes(range(256)) * 20
        box.put(RESPONSE, 0, 1, message)
        pieces = box.poll(1 << 20)
        self.assertEqual([piece.obj is message for piece in pieces if isinstance(piece, memoryview)], [True] * 3)
        box.is_confirmed = True
        box.put(RESPONSE, 0, 1, message)
        frames = box.poll(1 << 20)
        self.assertEqual(([len(cut(one)) for one in frames], b"".join(frames)), ([1, 1, 1], b"".join(pieces)))

    def test_large_messages_take_turns_a_frame_each(self):
        box = outbox()
        for call_id in (1, 3, 5):
            box.put(RESPONSE, 0, call_id, bytes(3 * ROOM - 4 if call_id < 5 else ROOM + 1))
        self.assertEqual(ids(box.poll(1 << 20)), [1, 3, 5, 1, 3, 5, 1, 3])

    def test_a_small_message_overtakes_a_large_one(self):
        box = outbox()
        box.put(RESPONSE, 0, 1, bytes(10 * ROOM))
        self.assertEqual(ids(box.poll(1)), [1])
        box.put(RESPONSE, 0, 3, b"small")
        self.assertEqual(ids(box.poll(6)), [3, 1])

    def test_what_is_whole_keeps_to_the_allowance_too_and_goes_in_order(self):
        box = outbox()
        box.put(RESPONSE, 0, 1, bytes(10 * ROOM))
        for call_id in (3, 5, 7, 9):
            box.put(RESPONSE, 0, call_id, bytes(1000))
        self.assertEqual((ids(box.poll(1500)), box.is_left, box.octets), ([3, 5], True, 10 * ROOM + 2000))
        self.assertEqual((ids(box.poll(1000, large=False)), box.is_left), ([7], True))
        self.assertEqual(ids(box.poll(1001)), [9, 1])
        self.assertEqual(ids(box.poll(1 << 20)), [1] * 10)
        self.assertEqual((box.is_left, box.octets), (False, 0))

    def test_the_allowance_is_kept_to_a_frame(self):
        box = outbox()
        box.put(RESPONSE, 0, 1, bytes(100 * ROOM))
        self.assertEqual(len(box.poll(1 << 20, large=False)), 0)
        self.assertEqual(ids(box.poll(2048)), [1])
        self.assertEqual(ids(box.poll(2049)), [1, 1])
        self.assertTrue(box)

    def test_no_more_is_begun_than_the_peer_holds(self):
        box = outbox(max_unfinished=10_000)
        for call_id in (1, 3, 5):
            box.put(RESPONSE, 0, call_id, bytes(4900))
        sent = ids(box.poll(1 << 20))
        self.assertEqual(set(sent[: sent.index(5)]), {1, 3})
        self.assertGreater(sent.index(5), len(sent) - 1 - sent[::-1].index(1))

    def test_a_message_larger_than_the_peer_holds_at_once_goes_alone(self):
        box = outbox(max_unfinished=4000)
        for call_id in (1, 3):
            box.put(RESPONSE, 0, call_id, bytes(5000))
        self.assertEqual(ids(box.poll(1 << 20)), [1, 1, 1, 3, 3, 3])

    def test_what_is_dropped_is_not_sent_and_makes_room(self):
        box = outbox(max_unfinished=6000)
        for call_id in (1, 3, 5):
            box.put(RESPONSE, 0, call_id, bytes(5000))
        self.assertEqual(ids(box.poll(1)), [1])
        self.assertIs(box.drop(1), True)
        self.assertIs(box.drop(5), False)
        self.assertIsNone(box.drop(7))
        self.assertEqual(ids(box.poll(1 << 20)), [3, 3, 3])
        self.assertIsNone(box.drop(3))

    def test_drop_all_forgets_what_was_not_all_sent_and_keeps_whole_messages(self):
        box = outbox(max_unfinished=6000)
        for call_id in (1, 3):
            box.put(RESPONSE, 0, call_id, bytes(5000))
        box.poll(1)
        box.put(RESPONSE, 0, 5, b"small")
        self.assertEqual(set(box.cut), {1, 3})
        box.drop_all()
        self.assertEqual((box.cut, box.octets), ({}, 5))
        self.assertEqual(ids(box.poll(1 << 20)), [5])

    def test_room_is_given_back_however_a_message_leaves(self):
        box = outbox(max_unfinished=6000)
        for call_id in range(1, 200, 2):
            box.put(RESPONSE, 0, call_id, bytes(5000))
            box.poll(call_id % 7 * 1000)
            if call_id % 3:
                box.drop(call_id)
        box.poll(1 << 30)
        self.assertFalse(box)
        box.put(RESPONSE, 0, 1, bytes(3000))
        box.put(RESPONSE, 0, 3, bytes(3000))
        self.assertEqual(ids(box.poll(1 << 20)), [1, 3, 1, 3])


def begin(assembler, call_id, total, part=b"", kind=RESPONSE, *, wanted=True):
    payload = struct.pack("!I", total) + part
    assembler.begin((kind, MORE, call_id, payload), *parse_total(payload), 5.0, wanted=wanted)


class AssemblerTests(SynchronousTestCase):
    def setUp(self):
        self.assembler = Assembler(10_000)

    def go_on(self, call_id, part, flags=MORE):
        return self.assembler.go_on((CHUNK, flags, call_id, part))

    def test_messages_that_interleave_are_put_together(self):
        begin(self.assembler, 1, 6, b"ab")
        begin(self.assembler, 3, 4, b"AB", ERROR)
        self.assertIsNone(self.go_on(1, b"cd"))
        other = self.go_on(3, b"CD", 0)
        one = self.go_on(1, b"ef", 0)
        self.assertEqual((one.kind, one.begun, one.whole()), (RESPONSE, 5.0, b"abcdef"))
        self.assertEqual((other.kind, other.whole()), (ERROR, b"ABCD"))
        self.assertEqual(len(self.assembler), 0)

    def test_a_length_that_is_a_lie_is_refused_at_the_first_octet_that_shows_it(self):
        for part, flags in ((b"cde", 0), (b"cde", MORE), (b"cd", MORE), (b"c", 0), (b"", 0), (b"", MORE)):
            self.setUp()
            begin(self.assembler, 1, 4, b"ab")
            self.assertRaises(RemoteProtocolError, self.go_on, 1, part, flags)

    def test_a_chunk_of_no_message_is_refused(self):
        self.assertRaises(RemoteProtocolError, self.go_on, 1, b"a")
        begin(self.assembler, 1, 4, b"ab")
        self.go_on(1, b"cd", 0)
        self.assertRaises(RemoteProtocolError, self.go_on, 1, b"a")

    def test_no_more_is_held_than_was_said(self):
        begin(self.assembler, 1, 10_000)
        begin(self.assembler, 3, SLACK)
        self.assertRaises(RemoteProtocolError, begin, self.assembler, 5, 1)

    def test_a_claimed_length_takes_no_memory(self):
        begin(self.assembler, 1, 0xFFFFFFFF, b"a", wanted=False)
        self.assertRaises(RemoteProtocolError, begin, self.assembler, 3, 0xFFFFFFFF)

    def test_what_is_not_wanted_is_counted_and_not_held(self):
        begin(self.assembler, 1, 1_000_000, b"a" * 1000, wanted=False)
        message = None
        for left in range(998, -1, -1):
            message = self.go_on(1, b"a" * 1000, MORE if left else 0)
        self.assertIsNone(message.room)
        self.assertEqual(message.whole(), b"")
        begin(self.assembler, 3, 10_000 + SLACK)

    def test_what_is_no_longer_wanted_makes_room_and_is_still_counted(self):
        begin(self.assembler, 1, 10_000 + SLACK, b"a")
        self.assembler.stop_holding(1)
        self.assembler.stop_holding(1)
        self.assembler.stop_holding(99)
        begin(self.assembler, 3, 10_000 + SLACK)
        self.assertRaises(RemoteProtocolError, self.go_on, 1, b"a", 0)

    def test_what_is_discarded_makes_room_and_has_no_rest(self):
        begin(self.assembler, 1, 10_000 + SLACK, b"a")
        self.assembler.discard(1)
        self.assembler.discard(1)
        begin(self.assembler, 3, 10_000 + SLACK)
        self.assertRaises(RemoteProtocolError, self.go_on, 1, b"a")

    def test_it_tells_what_is_on_the_way(self):
        begin(self.assembler, 1, 10, kind=REQUEST)
        self.assertTrue(self.assembler.is_on_the_way(1, Kind.REQUEST))
        self.assertFalse(self.assembler.is_on_the_way(1, Kind.RESPONSE))
        self.assertFalse(self.assembler.is_on_the_way(3, Kind.REQUEST))
