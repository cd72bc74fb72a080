"""A stream cut into frames: the same ones however the octets come, and faults as early as they can be seen."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from protoframe.core import stream
from protoframe.core.frames import serialize_preface
from protoframe.core.stream import FrameReader
from protoframe.errors import RemoteProtocolError, VersionMismatch
from tests.core.pairs import PING, RESPONSE, cut, frame
from tests.core.test_frames import vectors

RECORDED = serialize_preface() + b"".join(bytes.fromhex(vector["hex"]) for vector in vectors("frames.json"))


def feed(parts, max_frame=65536):
    reader = FrameReader(max_frame, 30.0)
    return [one for part in parts for one in reader.feed(bytes(part), 0.0)]


class Cutting(SynchronousTestCase):
    whole = cut(RECORDED[8:])

    def test_all_frames_are_read_from_the_whole(self):
        self.assertEqual([tuple(one) for one in feed([RECORDED])], self.whole)

    def test_the_same_frames_are_read_octet_by_octet(self):
        self.assertEqual(feed([octet] for octet in RECORDED), self.whole)

    def test_the_same_frames_are_read_at_every_split(self):
        for at in range(len(RECORDED) + 1):
            self.assertEqual(feed([RECORDED[:at], RECORDED[at:]]), self.whole, at)

    @given(st.lists(st.integers(0, len(RECORDED)), max_size=30))
    def test_the_same_frames_are_read_from_any_parts(self, cuts):
        bounds = [0, *sorted(cuts), len(RECORDED)]
        self.assertEqual(feed(RECORDED[a:b] for a, b in itertools.pairwise(bounds)), self.whole)

    def test_a_frame_comes_with_its_last_octet(self):
        reader = FrameReader(2048, 30.0)
        reader.feed(serialize_preface(), 0.0)
        octets = frame(PING, 0, 0, b"12345678")
        for octet in octets[:-1]:
            self.assertEqual(reader.feed(bytes([octet]), 0.0), [])
        self.assertEqual(len(reader.feed(octets[-1:], 0.0)), 1)

    def test_the_version_is_known_once_the_preface_is_there(self):
        reader = FrameReader(2048, 30.0)
        reader.feed(serialize_preface()[:7], 0.0)
        self.assertEqual(reader.version, 0)
        reader.feed(serialize_preface()[7:], 0.0)
        self.assertEqual(reader.version, 1)

    def test_what_is_held_is_not_copied_for_each_octet_that_comes(self):
        # Of a frame that comes octet by octet, only what is appended may be touched.
        appended = copied = 0

        class Held(bytearray):
            def __iadd__(held, octets):  # noqa: N805
                nonlocal appended
                appended += len(octets)
                return super().__iadd__(octets)

            def __getitem__(held, at):  # noqa: N805
                nonlocal copied
                copied += len(held)
                return super().__getitem__(at)

        stream.bytearray = Held
        self.addCleanup(delattr, stream, "bytearray")
        reader = FrameReader(65536, 30.0)
        reader.feed(serialize_preface(), 0.0)
        appended = 0
        octets = frame(RESPONSE, 0, 1, b"a" * 60000)
        frames = [one for octet in octets for one in reader.feed(bytes([octet]), 0.0)]
        self.assertEqual(frames, [(RESPONSE, 0, 1, b"a" * 60000)])
        self.assertGreaterEqual(appended, len(octets))
        self.assertLess(appended + copied, len(octets) + 64)


class Faults(SynchronousTestCase):
    def test_a_wrong_first_octet_is_refused_at_once(self):
        for octet in set(range(256)) - {0x89}:
            self.assertRaises(RemoteProtocolError, feed, [bytes([octet])])

    def test_a_wrong_magic_is_refused_at_its_first_wrong_octet(self):
        for at in range(4):
            good = serialize_preface()[:at]
            self.assertEqual(feed([good]), [])
            self.assertRaises(RemoteProtocolError, feed, [good + b"\0"])

    def test_a_version_that_is_not_spoken_is_refused(self):
        self.assertRaises(VersionMismatch, feed, [serialize_preface(2, 3)])

    def test_a_length_over_the_limit_is_refused_as_soon_as_the_header_is_there(self):
        for max_frame in (2048, 5000, 65536):
            octets = frame(RESPONSE, 0, 1, b"a" * (max_frame - 12))
            self.assertEqual(len(feed([serialize_preface() + octets], max_frame)), 1)
        header = frame(RESPONSE, 0, 1, b"a" * 2037)[:12]
        reader = FrameReader(2048, 30.0)
        reader.feed(serialize_preface() + header[:11], 0.0)
        error = self.assertRaises(RemoteProtocolError, reader.feed, header[11:], 0.0)
        self.assertEqual(error.message, "a frame of 2049 octets is longer than 2048")


class Timing(SynchronousTestCase):
    def setUp(self):
        self.reader = FrameReader(65536, 30.0)
        self.reader.feed(serialize_preface(), 0.0)

    def test_nothing_is_waited_for_between_frames(self):
        self.assertEqual(self.reader.next_timer(), math.inf)
        self.reader.feed(frame(PING, 0, 0, b"12345678"), 5.0)
        self.assertEqual(self.reader.next_timer(), math.inf)
        self.reader.handle_timer(1e9)

    def test_a_frame_has_its_time_from_its_first_octet_on_however_it_trickles(self):
        octets = frame(RESPONSE, 0, 1, b"a" * 100)
        for second, octet in enumerate(octets[:29]):
            self.reader.feed(bytes([octet]), 100.0 + second)
            self.assertEqual(self.reader.next_timer(), 130.0, second)
        self.reader.handle_timer(129.9)
        error = self.assertRaises(RemoteProtocolError, self.reader.handle_timer, 130.0)
        self.assertEqual(error.message, "a frame did not come whole within 30 s")

    def test_the_time_starts_anew_with_the_next_frame(self):
        octets = frame(PING, 0, 0, b"12345678")
        self.reader.feed(octets[:5], 100.0)
        self.reader.feed(octets[5:] + octets[:3], 120.0)
        self.assertEqual(self.reader.next_timer(), 150.0)

    def test_a_preface_has_its_time_too(self):
        reader = FrameReader(65536, 30.0)
        reader.feed(b"\x89", 7.0)
        reader.feed(b"P", 20.0)
        self.assertEqual(reader.next_timer(), 37.0)
