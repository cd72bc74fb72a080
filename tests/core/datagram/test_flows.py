"""Frames into segments and back: what keeps its order, what is sent again, and what is taken once."""

from __future__ import annotations

import random

from twisted.trial.unittest import SynchronousTestCase

from protoframe.core.datagram.inflow import Full, Inflow
from protoframe.core.datagram.outflow import Outflow
from protoframe.core.datagram.packets import RUN_OVERHEAD, Once, Part, Run, parse_segments, serialize_once
from protoframe.errors import FrameTooLarge, RemoteProtocolError
from tests.core.pairs import (
    CANCEL,
    CHUNK,
    END,
    GOAWAY,
    HELLO,
    ITEM,
    ITEMS,
    MORE,
    ONEWAY,
    REQUEST,
    RESPONSE,
    cut,
    frame,
    serialize_message,
)

ROOM = 1179
GREETING = frame(HELLO, payload=b"hello")


def flow(confirmed=None):
    """An outflow that has greeted."""
    out = Outflow((confirmed if confirmed is not None else []).append)
    out.put([GREETING], ROOM)
    out.come(filled(out)[1])
    return out


def filled(out, room=ROOM):
    """The segments of a packet, parsed, and its items."""
    octets, items = out.fill(room, is_empty=True)
    return [segment for one in octets for segment in parse_segments(one, 0)], items


def all_of(out, room=ROOM):
    """Everything that there is to send: what `filled` gives, packet by packet."""
    packets = []
    while out.has_more():
        segments, items = filled(out, room)
        if segments:
            packets.append((segments, items))
    return packets


def request(call_id, flags=0, size=20):
    return frame(REQUEST, flags, call_id, bytes(size))


class Outgoing(SynchronousTestCase):
    def test_frames_that_stand_alone_go_in_one_run_each_a_channel_of_its_own(self):
        out = flow()
        out.put([request(1), frame(RESPONSE, 0, 2, b"x"), request(3)], ROOM)
        ((run,), _) = filled(out)
        self.assertEqual((type(run), run.first, len(run.frames)), (Run, 1, 3))

    def test_the_frames_of_a_large_message_share_a_channel_and_it_ends_with_the_last(self):
        out = flow()
        out.put([*serialize_message(REQUEST, 0, 1, bytes(5000), 2048), request(3)], ROOM)
        parts = [one for segments, _ in all_of(out) for one in segments if isinstance(one, Part)]
        self.assertEqual(len({part.channel for part in parts}), 1)
        self.assertEqual([part.is_last for part in parts], [False] * (len(parts) - 1) + [True])
        self.assertEqual([frame[0] for frame in cut(b"".join(part.octets for part in parts))], [REQUEST, CHUNK, CHUNK])

    def test_what_is_small_goes_before_what_is_large(self):
        out = flow()
        out.put([*serialize_message(REQUEST, 0, 1, bytes(50_000), 65_536), request(3)], ROOM)
        kinds = [type(segment) for segments, _ in all_of(out)[:2] for segment in segments]
        self.assertIn(Run, kinds)

    def test_the_items_of_a_call_follow_its_request_and_end(self):
        out = flow()
        out.put([request(1, ITEMS), frame(ITEM, 0, 1, b"\0\1x"), frame(END, 0, 1)], ROOM)
        parts = [one for segments, _ in all_of(out) for one in segments]
        self.assertEqual({part.channel for part in parts}, {1})
        self.assertTrue(parts[-1].is_last)
        self.assertFalse(out.lanes)

    def test_a_call_without_an_answer_is_sent_once_and_never_again(self):
        out = flow()
        out.put([request(1, ONEWAY)], ROOM)
        ((once,), items) = filled(out)
        self.assertEqual((type(once), items, out.unacknowledged), (Once, [], set()))

    def test_cancel_waits_for_its_request_alone_and_goaway_for_all(self):
        out = flow()
        out.put([request(1)], ROOM)
        _, first = filled(out)
        out.put([request(3)], ROOM)
        _, second = filled(out)
        out.put([frame(CANCEL, 0, 1), frame(GOAWAY)], ROOM)
        self.assertEqual(filled(out)[0], [])
        self.assertFalse(out.is_settled)
        out.come(first)
        ((run,), third) = filled(out)
        self.assertEqual([one[0] for one in run.frames], [CANCEL])
        out.come(second)
        self.assertEqual(filled(out)[0], [])
        out.come(third)
        ((run,), _) = filled(out)
        self.assertEqual([one[0] for one in run.frames], [GOAWAY])

    def test_what_is_lost_goes_again_until_it_has_come(self):
        out = flow()
        out.put([request(1)], ROOM)
        (was,), items = filled(out)
        out.send_again(items)
        out.send_again(items)
        (again,), _ = filled(out)
        self.assertEqual(again, was)
        self.assertEqual(filled(out)[0], [])
        out.send_again(items)
        out.come(items)
        self.assertEqual(filled(out)[0], [])
        self.assertTrue(out.is_settled)

    def test_what_does_not_fit_any_more_is_cut_anew_and_is_the_same(self):
        out = flow()
        frames = [request(number, 0, 900) for number in (1, 3, 5)]
        out.put(frames, 4000)
        _, items = filled(out, 4000)
        out.send_again(items)
        inflow = greeted()
        got = [frame for segments, _ in all_of(out, 500) for one in segments for frame in take(inflow, one)]
        self.assertEqual(sorted(got), sorted(cut(b"".join(frames))))

    def test_a_large_message_is_confirmed_when_all_of_it_has_come(self):
        confirmed = []
        out = flow(confirmed)
        out.put(serialize_message(REQUEST, 0, 1, bytes(5000), 2048), ROOM)
        packets = all_of(out)
        for _, items in reversed(packets[1:]):
            out.come(items)
        self.assertEqual(confirmed, [])
        out.come(packets[0][1])
        self.assertEqual(confirmed, [5000])

    def test_one_that_is_called_off_is_confirmed_when_that_has_come(self):
        confirmed = []
        out = flow(confirmed)
        first, *_ = serialize_message(REQUEST, 0, 1, bytes(5000), 2048)
        out.put([first], ROOM)
        for _, items in all_of(out):
            out.come(items)
        self.assertEqual(confirmed, [])
        out.put([frame(CANCEL, 0, 1)], ROOM)
        for _, items in all_of(out):
            out.come(items)
        self.assertEqual(confirmed, [5000])
        self.assertFalse(out.lanes)

    def test_a_frame_that_just_does_not_fit_beside_something_else_goes_in_parts(self):
        # Were it left for the next packet, and that had something else too, it would never go.
        for less in range(1, RUN_OVERHEAD + 2):
            out = flow()
            out.put([request(1, size=900)], ROOM)
            frame_length = out.queued
            segments, _ = filled(out, frame_length + RUN_OVERHEAD - less)
            self.assertEqual([type(segment) for segment in segments], [Part], less)

    def test_a_call_that_is_answered_early_ends_its_channel(self):
        out = flow()
        out.put([request(1, ITEMS)], ROOM)
        filled(out)
        out.end_lane(1)
        ((part,), _) = filled(out)
        self.assertEqual((part.octets, part.is_last), (b"", True))
        out.put([*serialize_message(REQUEST, ITEMS, 3, bytes(5000), 2048)[:1]], ROOM)
        all_of(out)
        out.end_lane(3)
        self.assertIn(3, out.lanes)


def greeted(most=1 << 20, max_frame=65_536):
    inflow = Inflow(max_frame, most)
    assert inflow.take_part(Part(0, 0, GREETING, True)) == cut(GREETING)
    return inflow


def take(inflow, segment):
    return inflow.take_run(segment) if isinstance(segment, Run) else inflow.take_part(segment)


def run_of(first, *frames):
    return Run(first, cut(b"".join(frames)), b"".join(frames))


class Incoming(SynchronousTestCase):
    def test_however_it_comes_each_frame_is_given_once_and_a_channel_in_order(self):
        for seed in range(60):
            chance = random.Random(seed)
            messages = [frame(ITEM, 0, 1, chance.randbytes(chance.randrange(300))) for _ in range(20)]
            octets = b"".join(messages)
            parts = []
            for _ in range(3):
                at = 0
                while at < len(octets):
                    size = chance.randrange(1, 400)
                    parts.append(Part(1, at, octets[at : at + size], at + size >= len(octets)))
                    at += size
            runs = [run_of(2 + 3 * number, *[request(7)] * 3) for number in range(10)]
            segments = [*parts, *runs, *runs]
            chance.shuffle(segments)
            inflow = greeted()
            got = [one for segment in segments for one in take(inflow, segment)]
            self.assertEqual([one for one in got if one[0] == ITEM], cut(octets))
            self.assertEqual(len([one for one in got if one[0] == REQUEST]), 30)
            self.assertEqual((inflow._held, inflow._channels), (0, {}))

    def test_nothing_is_given_before_the_first_channel(self):
        inflow = Inflow(65_536, 1 << 20)
        self.assertEqual(inflow.take_run(run_of(1, request(1))), [])
        self.assertEqual(inflow.take_part(Part(0, 0, GREETING, True)), cut(GREETING) + cut(request(1)))
        self.assertEqual(inflow._held, 0)

    def test_other_octets_under_a_number_that_is_known_are_refused(self):
        inflow = greeted()
        inflow.take_run(run_of(1, request(1)))
        self.assertEqual(inflow.take_run(run_of(1, request(1))), [])
        with self.assertRaisesRegex(RemoteProtocolError, "other frames"):
            inflow.take_run(run_of(1, request(3)))
        inflow.take_part(Part(5, 50, b"aaaa", False))
        with self.assertRaisesRegex(RemoteProtocolError, "other octets"):
            inflow.take_part(Part(5, 50, b"bbbb", False))

    def test_a_channel_ends_where_it_ends_and_not_within_a_frame(self):
        for parts, text in (
            ([Part(1, 0, request(1)[:-1], True)], "within a frame"),
            ([Part(1, 20, b"xx", True), Part(1, 30, b"x", True)], "it ends at"),
            ([Part(1, 30, b"xx", False), Part(1, 20, b"x", True)], "more came"),
        ):
            inflow = greeted()
            with self.assertRaisesRegex(RemoteProtocolError, text):
                for part in parts:
                    inflow.take_part(part)

    def test_frames_that_are_too_large_are_refused(self):
        for segment in (run_of(1, request(1, 0, 3000)), Part(1, 0, request(1, 0, 3000)[:100], False)):
            with self.assertRaises(FrameTooLarge):
                take(greeted(max_frame=2048), segment)

    def test_what_is_held_is_bounded_and_what_does_not_fit_can_come_again(self):
        inflow = greeted(most=20_000)
        with self.assertRaises(Full):
            for number in range(1, 100):
                inflow.take_part(Part(1, 1000 * number, bytes(1000), False))
        self.assertLessEqual(inflow._held, 20_000)
        with self.assertRaises(Full):
            for number in range(2, 1000):
                inflow.take_part(Part(number, 0, b"x", False))
        with self.assertRaises(Full):
            for number in range(5000, 50_000, 2):
                inflow.take_run(run_of(number, request(1)))
        self.assertTrue(MORE)

    def test_what_came_in_order_and_is_no_whole_frame_counts_too_and_the_lowest_channel_always_goes_on(self):
        inflow = greeted(most=100_000)
        octets = request(1, 0, 60_000)
        opened = []
        with self.assertRaises(Full):
            for number in range(1, 100):
                inflow.take_part(Part(number, 0, octets[:20_000], False))
                opened.append(number)
        self.assertIn(len(opened), (4, 5))
        for number in opened:
            with self.subTest(number):
                for at in range(20_000, len(octets), 1000):
                    piece = octets[at : at + 1000]
                    frames = inflow.take_part(Part(number, at, piece, at + 1000 >= len(octets)))
                self.assertEqual(len(frames), 1)
        self.assertEqual(inflow._held, 0)

    def test_frames_that_are_sent_once_are_no_larger_than_others(self):
        big = parse_segments(serialize_once(1, request(1, ONEWAY, 3000)), 0)[0]
        with self.assertRaises(FrameTooLarge):
            greeted(max_frame=2048).take_once(big)
        self.assertEqual(len(greeted().take_once(big)), 1)
