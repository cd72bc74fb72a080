"""The small parts: sets of numbers, round trips, the window, the size of packets, cookies, and a client that asks."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from protoframe.core.datagram.congestion import NewReno, Pacer
from protoframe.core.datagram.gate import Gate
from protoframe.core.datagram.knock import Knock
from protoframe.core.datagram.mtu import BLACK_HOLE, WARM_UP, PathMTU
from protoframe.core.datagram.packets import (
    Accept,
    Ack,
    Initial,
    Kind,
    Malformed,
    Refused,
    Retry,
    Versions,
    parse_segments,
    read_kind,
)
from protoframe.core.datagram.ranges import RangeSet
from protoframe.core.datagram.recovery import Recovery, SentPacket
from protoframe.core.datagram.rtt import RoundTrip
from protoframe.errors import VersionMismatch

SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 8)), max_size=30)


class Ranges(SynchronousTestCase):
    @given(SPANS, st.integers(0, 40))
    def test_it_is_a_set(self, spans, floor):
        ranges, plain = RangeSet(), set()
        for start, length in spans:
            if length:
                self.assertEqual(ranges.misses(start, start + length), plain.isdisjoint(range(start, start + length)))
            ranges.add(start, start + length)
            plain |= set(range(start, start + length))
        self.assertEqual({number for number in range(80) if number in ranges}, plain)
        self.assertEqual(ranges.end, max(plain, default=-1) + 1)
        self.assertEqual(ranges.prefix, min(set(range(100)) - plain))
        told = [number for first, last in ranges.newest_first(100) for number in range(first, last + 1)]
        self.assertEqual(sorted(told), sorted(plain))
        ranges.drop_below(floor)
        self.assertEqual({number for number in range(80) if number in ranges}, plain | set(range(floor)))

    @given(st.sets(st.integers(0, 3000), min_size=1))
    def test_an_ack_says_what_has_come(self, numbers):
        ranges = RangeSet()
        for number in random.Random(1).sample(sorted(numbers), len(numbers)):
            ranges.add(number, number + 1)
        (ack,) = parse_segments(Ack(0.25, ranges.newest_first(33)).serialize(), 0)
        said = {number for first, last in ack.ranges for number in range(first, last + 1)}
        self.assertLessEqual(said, numbers)
        self.assertIn(max(numbers), said)
        self.assertAlmostEqual(ack.delay, 0.25)


class RoundTrips(SynchronousTestCase):
    def test_the_first_is_taken_as_it_is_and_further_ones_are_smoothed(self):
        rtt = RoundTrip()
        self.assertEqual((rtt.smoothed, rtt.variance), (0.333, 0.1665))
        rtt.measure(0.1, 0.0)
        self.assertEqual((rtt.smoothed, rtt.variance), (0.1, 0.05))
        rtt.measure(0.2, 0.02)
        self.assertAlmostEqual(rtt.variance, 0.75 * 0.05 + 0.25 * 0.08)
        self.assertAlmostEqual(rtt.smoothed, 0.875 * 0.1 + 0.125 * 0.18)

    def test_a_delay_that_is_not_plausible_is_not_subtracted(self):
        rtt = RoundTrip()
        rtt.measure(0.1, 0.0)
        rtt.measure(0.11, 0.05)
        self.assertAlmostEqual(rtt.smoothed, 0.875 * 0.1 + 0.125 * 0.11)

    def test_an_ack_of_long_ago_does_not_raise_the_estimate(self):
        rtt = RoundTrip()
        rtt.measure(1.802, 1.8)
        self.assertAlmostEqual(rtt.smoothed, 0.002)


class Window(SynchronousTestCase):
    def test_it_doubles_until_something_is_lost_then_is_halved_once_a_round_trip(self):
        reno = NewReno(1000)
        self.assertEqual(reno.window, 10_000)
        reno.is_full = True
        for _ in range(10):
            reno.acknowledged(1000, 1.0)
        self.assertEqual(reno.window, 20_000)
        for _ in range(3):
            reno.congested(1.0, 2.0)
        self.assertEqual(reno.window, 10_000)
        for _ in range(10):
            reno.acknowledged(1000, 3.0)
        self.assertTrue(10_900 < reno.window <= 11_000)

    def test_it_does_not_grow_while_it_is_not_used_and_has_a_least(self):
        reno = NewReno(1000)
        reno.acknowledged(1000, 1.0)
        self.assertEqual(reno.window, 10_000)
        for now in range(20):
            reno.congested(float(now), now + 0.5)
        self.assertEqual(reno.window, 2000)

    def test_packets_are_spaced_out_after_a_burst(self):
        pacer = Pacer(0.0)
        for _ in range(16):
            self.assertLessEqual(pacer.allows(0.0, 10_000, 1000, 0.1), 0.0)
            pacer.left -= 1000
        pacer.left -= 1000
        self.assertAlmostEqual(pacer.allows(0.0, 10_000, 1000, 0.1), 1000 / 125_000)


def sent(recovery, count, at=0.0, size=1000):
    for _ in range(count):
        recovery.sent(SentPacket(recovery.next_number, at, size, [], -1))
        recovery.next_number += 1


class Losses(SynchronousTestCase):
    def test_three_later_ones_or_the_time_tell_what_is_lost(self):
        recovery = Recovery(0.0, 1200)
        sent(recovery, 5)
        came, lost = recovery.handle_ack(Ack(0.0, [(4, 4)]), 0.1)
        self.assertEqual(([one.number for one in came], [one.number for one in lost]), ([4], [0, 1]))
        self.assertAlmostEqual(recovery.next_timer(), 0.1125)
        lost, asks = recovery.handle_timer(0.1125)
        self.assertEqual(([one.number for one in lost], asks), ([2, 3], False))
        self.assertEqual(recovery.congestion.in_flight, 0)

    def test_a_timer_that_goes_off_finds_what_it_was_set_for(self):
        chance = random.Random(4)
        for _ in range(2000):
            recovery = Recovery(0.0, 1200)
            at = chance.random() * 1000
            sent(recovery, 2, at)
            recovery.handle_ack(Ack(0.0, [(1, 1)]), at + chance.random())
            due = recovery.next_timer()
            if due != float("inf"):
                recovery.handle_timer(due)
                self.assertNotEqual(recovery.next_timer(), due)

    def test_without_an_answer_it_is_asked_at_growing_distances(self):
        recovery = Recovery(0.0, 1200)
        recovery.round_trip.measure(0.1, 0.0)
        sent(recovery, 1)
        waits = []
        now = 0.0
        for _ in range(7):
            due = recovery.next_timer()
            waits.append(round(due - now, 6))
            now = due
            self.assertTrue(recovery.handle_timer(now)[1])
        self.assertEqual(waits, [0.325, 0.65, 1.3, 2.0, 2.0, 2.0, 2.0])

    def test_an_ack_of_what_was_not_sent_is_none(self):
        recovery = Recovery(0.0, 1200)
        sent(recovery, 2)
        with self.assertRaises(Malformed):
            recovery.handle_ack(Ack(0.0, [(0, 2)]), 0.1)


class Sizes(SynchronousTestCase):
    def test_it_goes_up_the_ladder_and_stops_where_three_probes_are_lost(self):
        mtu = PathMTU()
        self.assertEqual(mtu.probe(0.0), 0)
        for _ in range(WARM_UP):
            mtu.filled()
        self.assertEqual(mtu.probe(0.0), 1400)
        self.assertEqual(mtu.probe(0.0), 0)
        mtu.probe_came(1400)
        for _ in range(3):
            self.assertEqual(mtu.probe(1.0), 1452)
            mtu.probe_lost(1452, 1.0)
        self.assertEqual((mtu.size, mtu.probe(2.0)), (1400, 0))
        self.assertEqual(mtu.probe(602.0), 1452)

    def test_large_packets_that_vanish_make_it_fall_back(self):
        mtu = PathMTU()
        for _ in range(WARM_UP):
            mtu.filled()
        mtu.probe_came(mtu.probe(0.0))
        for _ in range(BLACK_HOLE - 1):
            mtu.vanished(1400, 1.0)
        mtu.came(1400)
        for _ in range(BLACK_HOLE - 1):
            mtu.vanished(1400, 1.0)
        self.assertEqual(mtu.size, 1400)
        mtu.vanished(1400, 1.0)
        self.assertEqual(mtu.size, 1200)

    def test_what_the_machine_does_not_take_is_not_tried_again_soon(self):
        mtu = PathMTU()
        for _ in range(WARM_UP):
            mtu.filled()
        mtu.too_large(mtu.probe(0.0), 0.0)
        self.assertEqual((mtu.size, mtu.probe(1.0)), (1200, 0))


class Gates(SynchronousTestCase):
    def test_a_cookie_is_of_one_address_port_connection_and_time(self):
        gate = Gate(bytes(32))
        cookie = gate.cookie("10.0.0.1", 5, 7, 100.0)
        self.assertAlmostEqual(gate.admits(cookie, "10.0.0.1", 5, 7, 100.2), 0.2, places=4)
        for wrong in (("10.0.0.2", 5, 7, 100.2), ("10.0.0.1", 6, 7, 100.2), ("10.0.0.1", 5, 8, 100.2)):
            self.assertIsNone(gate.admits(cookie, *wrong))
        self.assertIsNone(gate.admits(cookie, "10.0.0.1", 5, 7, 116.0))
        self.assertIsNone(Gate(b"x" * 32).admits(cookie, "10.0.0.1", 5, 7, 100.2))

    def test_a_token_is_of_one_address_and_a_day(self):
        gate = Gate(bytes(32))
        token = gate.token("10.0.0.1", 100.0)
        self.assertEqual(gate.admits(token, "10.0.0.1", 1, 2, 50_000.0), 0.0)
        self.assertIsNone(gate.admits(token, "10.0.0.2", 1, 2, 50_000.0))
        self.assertIsNone(gate.admits(token, "10.0.0.1", 1, 2, 90_000.0))
        for at in range(len(token)):
            forged = token[:at] + bytes([token[at] ^ 1]) + token[at + 1 :]
            self.assertIsNone(gate.admits(forged, "10.0.0.1", 1, 2, 50_000.0))
            self.assertIsNone(gate.admits(token[:at], "10.0.0.1", 1, 2, 50_000.0))


class Knocking(SynchronousTestCase):
    def test_it_asks_again_at_growing_distances_twice_each_time(self):
        knock = Knock(7, b"", 0.0)
        asked = []
        now = 0.0
        while now < 8.0:
            now = knock.next_timer()
            asked.append((round(now, 3), len(knock.poll(now))))
        self.assertEqual(asked[:4], [(0.0, 1), (0.333, 2), (0.833, 2), (1.582, 2)])
        self.assertLessEqual(asked[-1][0] - asked[-2][0], 2.0)

    def test_a_retry_has_it_ask_at_once_with_the_token_and_measures_the_way(self):
        knock = Knock(7, b"", 0.0)
        knock.poll(0.0)
        self.assertIsNone(knock.handle(Kind.RETRY, Retry(7, b"token").serialize(), 0.05))
        (again,) = knock.poll(0.05)
        self.assertEqual(Initial.parse(again).token, b"token")
        self.assertEqual(read_kind(again)[0], Kind.INITIAL)
        self.assertEqual(knock.round_trip, 0.05)

    def test_no_common_version_is_told(self):
        with self.assertRaisesRegex(VersionMismatch, "the peer speaks 8 to 9"):
            Knock(7, b"", 0.0).handle(Kind.VERSIONS, Versions(7, 8, 9).serialize(), 0.1)

    def test_what_is_malformed_has_no_effect(self):
        for kind, datagram in (
            (Kind.ACCEPT, Accept(7, 0, 77, 1).serialize(b"\x7f\x7f")),
            (Kind.REFUSED, Refused(7, b"").serialize()),
            (Kind.VERSIONS, Versions(7, 9, 3).serialize()),
            (Kind.VERSIONS, Versions(7, 0, 3).serialize()),
        ):
            with self.subTest(kind), self.assertRaises(Malformed):
                Knock(7, b"", 0.0).handle(kind, datagram, 0.1)
