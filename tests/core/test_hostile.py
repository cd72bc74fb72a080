"""Octets of any kind: one clear end, no other exception, and no more memory than the limits say."""

from __future__ import annotations

import random
import struct

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from protoframe.core.events import Ended, RequestReceived
from protoframe.core.frames import ErrorBody, Kind
from protoframe.core.messages import SLACK
from protoframe.core.state import State
from protoframe.errors import ConnectionLost, ProtocolError, VersionMismatch
from tests.core.pairs import (
    GOAWAY,
    HELLO,
    ITEMS,
    SETTINGS,
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

PREFACE = b"\x89PF\n\x01\x01\0\0"

some_frames = st.builds(
    frame,
    st.one_of(st.integers(0, 13), st.integers(0, 255)),
    st.integers(0, 255),
    st.one_of(st.integers(0, 9), st.integers(0, (1 << 64) - 1)),
    st.one_of(
        st.binary(max_size=40),
        st.builds(lambda rest: struct.pack("!I", 30) + rest, st.binary(max_size=20)),
        st.builds(lambda rest: struct.pack("!I", 30) + request_message() + rest, st.binary(max_size=4)),
        st.just(request_message()),
        st.just(SETTINGS),
        st.just(bytes(8)),
        st.just(bytes(10)),
        st.builds(item_message, st.sampled_from([1, 2, 0xFFFF]), st.integers(0, 40)),
        st.builds(lambda rest: struct.pack("!I", 30) + item_message() + rest, st.binary(max_size=4)),
        st.builds(lambda octets: struct.pack("!I", octets), st.sampled_from([0, 1, 5000, 1 << 30, 0xFFFFFFFF])),
    ),
)


class Hostile(SynchronousTestCase):
    def check(self, end):
        """What must hold after any octets."""
        conversation = end.conversation
        ended = end.of(Ended)
        self.assertLessEqual(len(ended), 1)
        self.assertEqual(conversation.state is State.CLOSED, bool(ended))
        self.assertLessEqual(conversation.traffic.assembler._octets, SMALL.max_unfinished + SLACK)
        # Those that want no answer take no slot.
        self.assertLessEqual(conversation.running - len(conversation._incoming._oneway), SMALL.max_calls)
        self.assertLessEqual(len(conversation.traffic.assembler), 2 * SMALL.max_calls + 2)
        self.assertLess(len(end.reader._held), SMALL.max_frame)
        if ended:
            error = ended[0].error
            self.assertIsInstance(error, ProtocolError | VersionMismatch | ConnectionLost)
            end.send()
            goaways = [one for one in cut(bytes(end.link)) if one[0] == GOAWAY and one[3][:2] != b"\0\0"]
            self.assertEqual(len(goaways), 0 if isinstance(error, ConnectionLost) else 1)
            if goaways:
                self.assertEqual(goaways[0][3][10:].decode(), error.message)

    def feed(self, end, octets, size=None):
        size = size or len(octets) or 1
        for at in range(0, len(octets), size):
            end.receive(octets[at : at + size])
            if end.conversation.state is State.CLOSED:
                break
        self.check(end)

    @given(st.binary(max_size=300))
    def test_octets_that_are_no_conversation(self, octets):
        end = Pair(SMALL, SMALL, opened=False).acceptor
        end.send()
        del end.link[:8]
        self.feed(end, octets)

    @given(st.binary(max_size=200))
    def test_octets_after_a_preface(self, octets):
        end = Pair(SMALL, SMALL, opened=False).acceptor
        end.send()
        del end.link[:8]
        self.feed(end, PREFACE + octets)

    @settings(max_examples=300)
    @given(st.lists(some_frames, max_size=25), st.sampled_from([None, 1, 13]), st.booleans())
    def test_frames_in_any_order(self, frames, size, leaving):
        end = opened(SMALL, settings=STREAMING)
        for flags in (0, ITEMS | STREAM, STREAM):
            end.call(flags=flags)
        if leaving:
            end.conversation.go_away()
        end.send()
        end.link.clear()
        end.events.clear()
        self.feed(end, b"".join(frames), size)

    def test_valid_conversations_with_octets_changed_added_and_lost(self):
        pair = Pair(SMALL, SMALL, opened=False)
        recorded = dict.fromkeys(pair.ends, b"")

        def settle():
            for _ in range(4):
                for end in pair.ends:
                    end.send()
                    recorded[end] += bytes(end.link)
                    pair.deliver(end)

        settle()
        for arguments in (b"\x80", bytes(3000), b"\x81\xa1a\x01"):
            pair.initiator.call(arguments)
        pair.acceptor.call()
        settle()
        for event in pair.acceptor.of(RequestReceived)[:2]:
            pair.acceptor.conversation.respond(event.call_id, bytes(2500))
        pair.initiator.conversation.refuse(2, ErrorBody(2, "E", "text", b"\x80"))
        pair.initiator.conversation.cancel(3)
        pair.initiator.conversation.ping(b"12345678")
        settle()
        pair.initiator.conversation.go_away()
        settle()
        for seed in range(400):
            chance = random.Random(seed)
            octets = bytearray(recorded[pair.initiator])
            for _ in range(chance.randrange(1, 4)):
                # Headers and heads are a small part of the octets and most of the trouble.
                at = chance.choice([chance.randrange(len(octets)), chance.randrange(min(300, len(octets)))])
                how = chance.randrange(4)
                if how == 0:
                    octets[at] ^= 1 << chance.randrange(8)
                elif how == 1:
                    del octets[at : at + chance.choice([1, 2, 12, 100])]
                elif how == 2:
                    octets[at:at] = chance.randbytes(chance.choice([1, 4, 12]))
                else:
                    part = octets[at : at + chance.choice([12, 40, 500])]
                    octets[at:at] = part
            end = Pair(SMALL, SMALL, opened=False).acceptor
            end.send()
            end.link = end.link[8:]
            self.feed(end, bytes(octets), chance.choice([None, 1, 100]))

    def test_a_peer_that_opens_calls_without_end_takes_no_more_than_its_slots(self):
        end = opened(SMALL)
        for call_id in range(1, 4001, 2):
            end.receive(frame(Kind.REQUEST, 0, call_id, request_message()))
        self.check(end)
        self.assertEqual(len(end.of(RequestReceived)), 3)

    def test_a_peer_that_calls_and_cancels_without_end_leaves_nothing_behind(self):
        end = opened(SMALL)
        for call_id in range(1, 4001, 2):
            # As often as it may.
            end.now += 1 / SMALL.cancel_rate
            end.receive(frame(Kind.REQUEST, 0, call_id, request_message()) + frame(Kind.CANCEL, 0, call_id))
            end.conversation.suspend(call_id, 1e6)
            end.conversation.refuse(call_id, ErrorBody(1, "Cancelled", ""))
            end.send()
            end.link.clear()
            end.conversation.next_timer()
        self.check(end)
        self.assertEqual(end.conversation.state, State.OPEN)
        self.assertLess(len(end.conversation.traffic.deadlines), 200)
        self.assertEqual(len(end.conversation._incoming.suspended), 0)

    def test_a_call_that_comes_in_parts_is_cancelled_and_comes_anew_expires_once(self):
        end = opened(SMALL)
        part = struct.pack("!I", 300) + request_message(milliseconds=1000)
        end.receive(
            frame(Kind.REQUEST, 1, 1, part) + frame(Kind.CANCEL, 0, 1) + frame(Kind.REQUEST, 1, 1, part),
        )
        end.now += 2.0
        end.conversation.handle_timer(end.now)
        self.assertEqual(end.conversation.state, State.OPEN)
        self.assertEqual(end.conversation.running, 0)
        self.assertGreater(end.conversation.next_timer(), end.now)

    def test_a_hello_after_any_frames_that_are_skipped_still_opens(self):
        end = Pair(SMALL, SMALL, opened=False).acceptor
        self.feed(end, PREFACE + frame(0x80, 0, 1, b"later") * 50 + frame(HELLO, payload=SETTINGS))
        self.assertEqual(end.conversation.state, State.OPEN)
