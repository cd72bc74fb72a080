"""Whether the other end is still there, and reads: signs of life, silence, and who is given up when."""

from __future__ import annotations

import dataclasses

from twisted.trial.unittest import SynchronousTestCase

from protoframe.core.conversation import Conversation
from protoframe.core.events import CallFailed, Ended, Greeted, ItemsReceived, Opened
from protoframe.core.limits import Limits
from protoframe.core.state import Role, State
from protoframe.errors import (
    ConnectionLost,
    HandshakeTimeout,
    KeepaliveTimeout,
    LocalProtocolError,
    RemoteProtocolError,
    WriteTimeout,
)
from tests.core.pairs import (
    CANCEL,
    END,
    GOAWAY,
    HELLO,
    ITEM,
    PING,
    PONG,
    REQUEST,
    RESPONSE,
    SETTINGS,
    STREAM,
    STREAMING,
    End,
    Pair,
    cut,
    frame,
    item_message,
    opened,
    request_message,
)

#: 30 s of silence, then 10 s for an answer; 30 s for a peer that reads nothing.
LIMITS = Limits()


class Case(SynchronousTestCase):
    def setUp(self):
        self.end = opened()
        self.conversation = self.end.conversation

    def at(self, seconds):
        """Lets the time come, timer by timer; the frames that are sent until then."""
        until = 1000.0 + seconds
        while (due := self.conversation.next_timer()) <= until:
            self.end.now = max(due, self.end.now)
            self.conversation.handle_timer(self.end.now)
            self.assertGreater(self.conversation.next_timer(), self.end.now, "a timer comes again and again")
        self.end.now = until
        self.end.look()
        self.end.send()
        octets = bytes(self.end.link)
        self.end.link.clear()
        return cut(octets)


class Keepalive(Case):
    def test_a_silent_peer_is_asked_for_a_sign_of_life(self):
        self.assertEqual(self.at(29.9), [])
        self.assertEqual(self.at(30.0), [(PING, 0, 0, bytes(8))])

    def test_and_given_up_when_it_gives_none(self):
        _, token = self.end.call(timeout=1000.0)
        self.at(39.9)
        self.assertEqual(self.end.of(Ended), [])
        frames = self.at(40.0)
        error = self.end.ended.error
        self.assertIs(type(error), KeepaliveTimeout)
        self.assertIsInstance(error, ConnectionLost)
        self.assertEqual(error.message, "the peer gave no sign of life for 40 s")
        # Nobody is there to read why.
        self.assertEqual(frames, [])
        self.assertTrue(self.end.outcome(token).error.may_have_run)
        self.assertEqual(self.conversation.next_timer(), float("inf"))

    def test_a_half_open_connection_is_found_within_two_intervals(self):
        # Whenever it went silent, and however short the intervals are.
        for heard in (0.0, 0.1, 29.9, 30.0, 31.0, 39.9, 64.3):
            for idle, timeout in ((30.0, 10.0), (5.0, 5.0)):
                self.end = opened(dataclasses.replace(LIMITS, keepalive_idle=idle, keepalive_timeout=timeout))
                self.conversation = self.end.conversation
                # Until then it gives signs of life, in time.
                for tenth in range(int(heard * 10)):
                    self.at(tenth / 10)
                    self.end.receive(frame(0x80))
                self.at(heard)
                self.end.receive(frame(0x80))
                self.at(heard + idle + timeout - 0.01)
                self.assertEqual(self.end.of(Ended), [], (heard, idle))
                self.at(heard + 2 * max(idle, timeout))
                self.assertIs(type(self.end.ended.error), KeepaliveTimeout)

    def test_anything_that_comes_is_a_sign_of_life(self):
        for octets in (
            frame(PONG, 0, 0, bytes(8)),
            frame(PING, 0, 0, b"12345678"),
            frame(REQUEST, 0, 1, request_message()),
            frame(CANCEL, 0, 1),
            frame(0x80),
            # Part of a frame, too.
            frame(REQUEST, 0, 1, request_message())[:5],
        ):
            self.setUp()
            self.at(35.0)
            self.end.receive(octets)
            frames = self.at(64.9)
            self.assertEqual([one for one in frames if one[0] == PING], [], octets)
            self.assertEqual(self.end.of(Ended), [])
            self.assertEqual([one[0] for one in self.at(65.0)], [PING])

    def test_a_busy_peer_is_never_asked(self):
        for second in range(1, 300, 10):
            self.assertEqual(self.at(second), [])
            self.end.receive(frame(0x80))
        self.assertEqual(self.end.of(Ended), [])

    def test_two_idle_ends_stay_together(self):
        pair = Pair()
        pair.advance(3600.0, arriving=True)
        self.assertEqual([end.of(Ended) for end in pair.ends], [[], []])

    def test_two_ends_of_which_one_vanished(self):
        pair = Pair()
        pair.advance(100.0, arriving=True)
        # Nothing arrives any more, either way.
        began = pair.now
        pair.advance(60.0)
        self.assertEqual([type(end.ended.error) for end in pair.ends], [KeepaliveTimeout] * 2)
        self.assertLessEqual(began + 40.0, pair.now)

    def test_signs_of_life_are_no_flood(self):
        for limits in (Limits(), Limits(keepalive_idle=0.2, keepalive_timeout=0.2)):
            pair = Pair(limits, limits)
            pair.advance(300 * limits.keepalive_idle, arriving=True)
            self.assertEqual([end.of(Ended) for end in pair.ends], [[], []])

    def test_it_asks_nothing_before_the_conversation_is_open(self):
        limits = Limits(keepalive_idle=1.0, keepalive_timeout=1.0)
        end = End(Role.ACCEPTOR, limits, 1000.0)
        end.receive(b"\x89PF\n\x01\x01\0\0")
        end.conversation.handle_timer(1005.0)
        end.send()
        self.assertEqual([one[0] for one in cut(bytes(end.link[8:]))], [HELLO])


class WhoAsksFirst(SynchronousTestCase):
    """An end that looks at the peer's greeting before it greets."""

    def setUp(self):
        limits = Limits(keepalive_idle=2.0, keepalive_timeout=1.0)
        self.end = End(Role.ACCEPTOR, limits, 1000.0)
        self.end.conversation = Conversation(Role.ACCEPTOR, limits, 1000.0, "server", asks_first=True)
        self.end.receive(b"\x89PF\n\x01\x01\0\0")

    def greeted(self):
        self.end.receive(frame(HELLO, payload=SETTINGS))
        self.assertEqual([type(event) for event in self.end.events], [Greeted])
        self.assertEqual(self.sent(), [])

    def sent(self):
        self.end.send()
        octets = bytes(self.end.link[8:])
        del self.end.link[8:]
        return [one[0] for one in cut(octets)]

    def test_it_greets_when_it_is_told_to(self):
        self.greeted()
        self.assertEqual(self.end.conversation.state, State.GREETING)
        self.assertRaises(LocalProtocolError, self.end.call)
        self.end.conversation.greet()
        self.end.look()
        self.assertEqual(self.sent(), [HELLO])
        self.assertIsInstance(self.end.events[-1], Opened)
        self.end.call()
        self.end.conversation.greet()
        self.assertEqual(self.sent(), [REQUEST])

    def test_nothing_goes_before_its_greeting(self):
        self.greeted()
        self.end.conversation.handle_timer(1005.0)
        self.assertRaises(LocalProtocolError, self.end.conversation.ping, bytes(8))
        self.end.conversation.greet()
        self.assertEqual(self.sent(), [HELLO])

    def test_what_comes_before_its_greeting_is_refused(self):
        for octets in (
            frame(PING, 0, 0, bytes(8)),
            frame(REQUEST, 0, 1, request_message()),
            frame(ITEM, 0, 1, item_message()),
            frame(RESPONSE, 0, 2, b""),
            frame(CANCEL, 0, 1),
            frame(END, 0, 1),
            frame(HELLO, payload=SETTINGS),
        ):
            self.setUp()
            self.greeted()
            self.end.receive(octets)
            self.assertIsInstance(self.end.ended.error, RemoteProtocolError, octets)
            self.assertEqual(self.sent(), [GOAWAY])
            self.end.conversation.greet()
            self.assertEqual(self.sent(), [])

    def test_whoever_does_not_decide_in_time_loses_the_peer(self):
        self.greeted()
        self.end.conversation.handle_timer(1010.0)
        self.end.look()
        self.assertIs(type(self.end.ended.error), HandshakeTimeout)


class Blocked(Case):
    def test_a_peer_that_reads_nothing_is_given_up(self):
        _, token = self.end.call(timeout=1000.0)
        self.at(5.0)
        self.conversation.handle_blocked(self.end.now)
        self.at(34.9)
        self.assertEqual(self.end.of(Ended), [])
        frames = self.at(35.0)
        error = self.end.ended.error
        self.assertIs(type(error), WriteTimeout)
        self.assertEqual(error.message, "the peer read nothing for 30 s")
        self.assertIsInstance(self.end.outcome(token), CallFailed)
        # It would not be read either.
        self.assertEqual([one for one in frames if one[0] == GOAWAY], [])

    def test_one_that_reads_again_in_time_is_not(self):
        for number in range(20):
            at = 40.0 * number
            self.at(at)
            self.conversation.handle_blocked(self.end.now)
            self.at(at + 29.9)
            self.conversation.handle_unblocked(self.end.now)
            self.end.receive(frame(0x80))
        self.assertEqual(self.end.of(Ended), [])

    def test_each_time_counts_alone(self):
        self.conversation.handle_blocked(self.end.now)
        self.at(29.0)
        self.conversation.handle_unblocked(self.end.now)
        self.conversation.handle_blocked(self.end.now)
        # The timer of the first time comes by and finds that it is not due.
        self.at(58.9)
        self.assertEqual(self.end.of(Ended), [])
        self.at(59.0)
        self.assertIs(type(self.end.ended.error), WriteTimeout)

    def test_no_sign_of_life_is_asked_of_a_peer_that_is_not_read_from(self):
        self.end = opened(Limits(write_timeout=500.0))
        self.conversation = self.end.conversation
        self.conversation.handle_blocked(self.end.now)
        self.assertEqual(self.at(400.0), [])
        self.assertEqual(self.end.of(Ended), [])
        # Then it has its time from there.
        self.conversation.handle_unblocked(self.end.now)
        self.assertEqual(self.at(429.9), [])
        self.assertEqual([one[0] for one in self.at(430.0)], [PING])
        self.at(440.0)
        self.assertIs(type(self.end.ended.error), KeepaliveTimeout)

    def test_an_answer_that_is_due_while_nothing_is_read_is_waited_for(self):
        self.end = opened(Limits(write_timeout=500.0))
        self.conversation = self.end.conversation
        self.assertEqual([one[0] for one in self.at(30.0)], [PING])
        self.conversation.handle_blocked(self.end.now)
        self.at(200.0)
        self.assertEqual(self.end.of(Ended), [])
        self.conversation.handle_unblocked(self.end.now)
        self.at(229.0)
        self.assertEqual(self.end.of(Ended), [])

    def test_deadlines_pass_meanwhile(self):
        _, token = self.end.call(timeout=5.0)
        self.conversation.handle_blocked(self.end.now)
        self.at(5.0)
        self.assertIsInstance(self.end.outcome(token), CallFailed)

    def test_after_the_end_it_means_nothing(self):
        self.end.lose()
        self.conversation.handle_blocked(self.end.now)
        self.assertEqual(self.conversation.next_timer(), float("inf"))
        self.conversation.handle_unblocked(self.end.now)
        self.assertEqual(len(self.end.of(Ended)), 1)

    def test_before_the_greeting_too(self):
        end = Pair(opened=False).acceptor
        end.conversation.handle_blocked(1000.0)
        end.conversation.handle_timer(1010.0)
        end.look()
        self.assertIs(type(end.ended.error), HandshakeTimeout)


class WithoutDeadline(SynchronousTestCase):
    def test_a_call_may_last_as_long_as_the_conversation(self):
        pair = Pair()
        call_id, token = pair.initiator.call(timeout=float("inf"), flags=STREAM)
        pair.settle()
        self.assertEqual(pair.acceptor.request.deadline, float("inf"))
        pair.acceptor.conversation.suspend(call_id, pair.acceptor.request.deadline)
        pair.advance(1e5, arriving=True)
        self.assertEqual(pair.initiator.outcomes(token), [])
        pair.acceptor.conversation.send_items(call_id, 1, b"a")
        pair.acceptor.conversation.end_items(call_id)
        pair.settle()
        self.assertEqual(len(pair.initiator.of(ItemsReceived)), 1)
        pair.initiator.outcome(token)

    def test_no_time_at_all_is_refused_at_once(self):
        message = request_message(milliseconds=0)
        for octets in (
            frame(REQUEST, 0, 1, message),
            frame(REQUEST, 1, 1, b"\0\0\x10\0" + message),
        ):
            end = opened(settings=STREAMING)
            end.receive(octets)
            end.send()
            ((kind, flags, call_id, payload),) = cut(bytes(end.link))
            # An ERROR that says that nothing was done, and why.
            self.assertEqual((kind, flags, call_id, payload[:2]), (4, 2, 1, b"\0\x04"))
            self.assertEqual((end.events, end.conversation.running), ([], 0))

    def test_the_least_time_is_some(self):
        end = opened()
        end.receive(frame(REQUEST, 0, 1, request_message(milliseconds=1)))
        self.assertEqual(end.request.deadline, 1000.001)
