"""Calls and their outcomes, over a link in virtual time."""

from __future__ import annotations

import struct

from twisted.trial.unittest import SynchronousTestCase

from protoframe.core.events import (
    CallFailed,
    Ended,
    ErrorReceived,
    Opened,
    PongReceived,
    RequestCancelled,
    RequestReceived,
    ResponseReceived,
)
from protoframe.core.frames import ErrorBody
from protoframe.core.limits import Limits
from protoframe.core.state import State
from protoframe.errors import (
    Cancelled,
    ConnectionLost,
    DeadlineExceeded,
    LocalProtocolError,
    MessageTooLarge,
    RemoteProtocolError,
    TooManyCalls,
    VersionMismatch,
)
from tests.core.pairs import (
    CANCEL,
    CHUNK,
    ERROR,
    GOAWAY,
    HELLO,
    JSON,
    MORE,
    NOT_PROCESSED,
    REQUEST,
    RESPONSE,
    SETTINGS,
    SMALL,
    Pair,
    cut,
    frame,
    opened,
    request_message,
)


class Handshake(SynchronousTestCase):
    def test_either_end_may_speak_first(self):
        for first in (0, 1):
            pair = Pair(opened=False)
            for end in pair.ends:
                end.send()
            pair.deliver(pair.ends[first])
            pair.deliver(pair.ends[1 - first])
            for end in pair.ends:
                self.assertEqual(end.conversation.state, State.OPEN)
                self.assertEqual(end.events, [Opened(pair.other(end).conversation.peer and end.conversation.peer)])

    def test_each_end_learns_the_others_settings(self):
        pair = Pair(SMALL, Limits())
        peer = pair.acceptor.conversation.peer
        self.assertEqual(
            (peer.max_frame, peer.max_message, peer.max_unfinished, peer.max_calls), (2048, 6000, 12000, 3)
        )
        self.assertEqual(peer.agent, "test")
        self.assertEqual(pair.initiator.conversation.peer.max_frame, 65536)

    def test_a_call_before_the_peers_hello_is_this_ends_mistake(self):
        self.assertRaises(LocalProtocolError, Pair(opened=False).initiator.call)

    def test_a_peer_that_says_nothing_is_given_up(self):
        pair = Pair(opened=False)
        pair.advance(9.9)
        self.assertEqual(pair.initiator.events, [])
        pair.advance(0.1)
        self.assertEqual(pair.initiator.ended.error.message, "no HELLO within 10 s")

    def test_a_peer_of_another_version_is_told_so(self):
        pair = Pair(opened=False)
        pair.acceptor.receive(b"\x89PF\n\x02\x03\0\0")
        self.assertIsInstance(pair.acceptor.ended.error, VersionMismatch)
        pair.acceptor.send()
        *_, (kind, _, _, payload) = cut(bytes(pair.acceptor.link[8:]))
        self.assertEqual(
            (kind, payload[:2], payload[10:]),
            (GOAWAY, b"\0\x0c", b"no version in common: the peer speaks 2 to 3, this end 1"),
        )

    def test_once_open_the_handshake_has_no_deadline(self):
        pair = Pair()
        pair.advance(100.0, arriving=True)
        self.assertEqual([end.of(Ended) for end in pair.ends], [[], []])


class Calls(SynchronousTestCase):
    def setUp(self):
        self.pair = Pair(SMALL, SMALL)
        self.caller, self.server = self.pair.initiator, self.pair.acceptor

    def call(self, *args, **options):
        call_id, token = self.caller.call(*args, **options)
        self.pair.settle()
        return call_id, token

    def test_either_end_calls_and_is_answered(self):
        for caller in self.pair.ends:
            server = self.pair.other(caller)
            call_id, token = caller.call(b"\x81\xa1a\x01", metadata=b"\x81\xa1k\xa1v", flags=JSON)
            self.pair.settle()
            request = server.request
            self.assertEqual((request.call_id, request.method, request.arguments), (call_id, b"P.m", b"\x81\xa1a\x01"))
            self.assertEqual(
                (request.metadata, request.flags, request.deadline), (b"\x81\xa1k\xa1v", JSON, self.pair.now + 10)
            )
            self.assertEqual((server.conversation.running, caller.conversation.pending), (1, 1))
            server.conversation.respond(request.call_id, b"result")
            self.pair.settle()
            self.assertEqual(caller.outcome(token), ResponseReceived(token, b"result"))
            self.assertEqual((server.conversation.running, caller.conversation.pending), (0, 0))

    def test_ids_are_odd_at_the_end_that_connected_and_even_at_the_other(self):
        self.assertEqual([self.caller.call()[0] for _ in range(3)], [1, 3, 5])
        self.assertEqual([self.server.call()[0] for _ in range(3)], [2, 4, 6])

    def test_an_error_reaches_the_caller_and_says_whether_the_call_may_have_run(self):
        for processed in (True, False):
            _, token = self.call()
            body = ErrorBody(5, "NotFound", "no", b"\x80")
            self.server.conversation.refuse(self.server.request.call_id, body, processed=processed)
            self.pair.settle()
            self.assertEqual(self.caller.outcome(token), ErrorReceived(token, body, processed))

    def test_answers_may_come_in_any_order(self):
        tokens = [self.call()[1] for _ in range(3)]
        for call_id in (3, 5, 1):
            self.server.conversation.respond(call_id, b"%d" % call_id)
        self.pair.settle()
        self.assertEqual([self.caller.outcome(token).message for token in tokens], [b"1", b"3", b"5"])

    def test_a_call_is_answered_once(self):
        self.call()
        self.server.conversation.respond(1, b"")
        self.assertRaises(LocalProtocolError, self.server.conversation.respond, 1, b"")
        self.assertRaises(LocalProtocolError, self.server.conversation.refuse, 1, ErrorBody(2, "E", ""))
        self.assertRaises(LocalProtocolError, self.server.conversation.respond, 99, b"")
        self.server.send()
        self.assertEqual([one[:3] for one in cut(bytes(self.server.link))], [(RESPONSE, 0, 1)])

    def test_what_does_not_fit_a_request_is_this_ends_mistake(self):
        conversation = self.caller.conversation
        for method, metadata in ((b"", b""), (b"a" * 256, b""), (b"m", b"a" * 65536)):
            self.assertRaises(
                LocalProtocolError,
                conversation.request,
                method,
                b"\x80",
                "token",
                1e9,
                self.pair.now,
                metadata=metadata,
            )
        self.assertEqual(conversation.pending, 0)
        conversation.request(b"a" * 255, b"\x80", "token", 1e9, self.pair.now, metadata=b"a" * 65535)
        self.pair.settle()
        self.assertEqual((self.server.request.method, self.server.request.metadata), (b"a" * 255, b"a" * 65535))

    def test_a_ping_comes_back(self):
        self.assertRaises(LocalProtocolError, self.caller.conversation.ping, b"1234567")
        self.caller.conversation.ping(b"12345678")
        self.pair.settle()
        self.assertEqual(self.caller.of(PongReceived), [PongReceived(b"12345678")])

    def test_kinds_that_may_be_skipped_are(self):
        end = opened()
        end.receive(b"".join(frame(kind, 0xFF, 7, b"later") for kind in range(0x80, 0x100)))
        self.assertEqual((end.events, end.conversation.state), ([], State.OPEN))


class Slots(Calls):
    def test_no_more_calls_are_in_flight_than_the_peer_takes(self):
        tokens = [self.call()[1] for _ in range(7)]
        self.assertEqual([event.call_id for event in self.server.of(RequestReceived)], [1, 3, 5])
        self.assertEqual(self.caller.conversation.pending, 7)
        for call_id in (3, 1, 5, 9, 7, 11, 13):
            self.server.conversation.respond(call_id, b"")
            self.pair.settle()
        self.assertEqual([event.call_id for event in self.server.of(RequestReceived)], [1, 3, 5, 7, 9, 11, 13])
        self.assertTrue(all(isinstance(self.caller.outcome(token), ResponseReceived) for token in tokens))

    def test_more_calls_than_may_wait_are_refused(self):
        for _ in range(7):
            self.call()
        error = self.assertRaises(TooManyCalls, self.call)
        self.assertFalse(error.may_have_run)

    def test_a_cancelled_call_keeps_its_slot_until_it_is_answered(self):
        first, *_ = [self.call()[0] for _ in range(4)]
        self.caller.conversation.cancel(first)
        self.pair.settle()
        self.assertEqual(len(self.server.of(RequestReceived)), 3)
        self.server.conversation.refuse(first, ErrorBody(1, "Cancelled", ""))
        self.pair.settle()
        self.assertEqual(len(self.server.of(RequestReceived)), 4)

    def test_a_call_that_waits_tells_the_time_that_is_left_when_it_goes(self):
        for _ in range(4):
            self.call(timeout=5.0)
        self.pair.advance(2.0)
        self.server.conversation.respond(1, b"")
        self.pair.settle()
        self.assertEqual(self.server.request.deadline, 1005.0)

    def test_a_call_that_waits_may_expire_and_certainly_did_not_run(self):
        for _ in range(3):
            self.call(timeout=50.0)
        _, token = self.call(timeout=5.0)
        self.pair.advance(5.0)
        error = self.caller.outcome(token).error
        self.assertIsInstance(error, DeadlineExceeded)
        self.assertFalse(error.may_have_run)
        self.pair.settle()
        self.assertEqual(len(self.server.of(RequestReceived)), 3)

    def test_a_peer_that_calls_more_than_it_was_told_is_refused_and_may_go_on(self):
        end = opened(SMALL)
        end.receive(b"".join(frame(REQUEST, 0, call_id, request_message()) for call_id in (1, 3, 5, 7)))
        self.assertEqual([event.call_id for event in end.of(RequestReceived)], [1, 3, 5])
        end.send()
        ((kind, flags, call_id, payload),) = cut(bytes(end.link))
        self.assertEqual((kind, flags, call_id), (ERROR, NOT_PROCESSED, 7))
        self.assertIn(b"TooManyCalls", payload)
        end.conversation.respond(1, b"")
        end.receive(frame(REQUEST, 0, 7, request_message()))
        self.assertEqual(end.request.call_id, 7)

    def test_a_large_request_over_the_slots_is_refused_at_its_first_frame(self):
        end = opened(SMALL)
        end.receive(b"".join(frame(REQUEST, 0, call_id, request_message()) for call_id in (1, 3, 5)))
        end.receive(frame(REQUEST, MORE, 7, struct.pack("!I", 20) + request_message()))
        end.send()
        self.assertEqual([one[:3] for one in cut(bytes(end.link))], [(ERROR, NOT_PROCESSED, 7)])
        end.receive(frame(CHUNK, 0, 7, b"a" * 8))
        self.assertEqual((end.conversation.state, len(end.of(RequestReceived))), (State.OPEN, 3))

    def test_a_peer_without_slots_leaves_calls_waiting(self):
        end = opened(settings=SETTINGS.replace(b"max_calls\x02", b"max_calls\x00"))
        _, token = end.call(timeout=3.0)
        end.send()
        self.assertEqual(end.link, b"")
        end.conversation.handle_timer(1003.0)
        end.look()
        self.assertFalse(end.outcome(token).error.may_have_run)


class LargeMessages(Calls):
    def test_they_go_both_ways_whole(self):
        for size in (2000, 2030, 2036, 2037, 4068, 5999, 6000):
            octets = bytes(index % 251 for index in range(size))
            _, token = self.call(octets)
            self.assertEqual(self.server.request.arguments, octets, size)
            self.server.conversation.respond(self.server.request.call_id, octets)
            self.pair.settle()
            self.assertEqual(self.caller.outcome(token).message, octets, size)

    def test_a_large_error_detail_arrives(self):
        _, token = self.call()
        self.server.conversation.refuse(1, ErrorBody(2, "E", "text", b"d" * 5000))
        self.pair.settle()
        self.assertEqual(self.caller.outcome(token).body, ErrorBody(2, "E", "text", b"d" * 5000))

    def test_arguments_that_the_peer_does_not_take_are_not_sent(self):
        error = self.assertRaises(MessageTooLarge, self.call, bytes(6001))
        self.assertFalse(error.may_have_run)
        self.assertEqual(
            (error.message, self.caller.conversation.pending),
            ("the arguments are 6001 bytes, and the peer takes 6000", 0),
        )

    def test_a_result_that_the_peer_does_not_take_is_not_sent_and_the_call_still_wants_its_answer(self):
        _, token = self.call()
        self.assertRaises(MessageTooLarge, self.server.conversation.respond, 1, bytes(6001))
        self.server.conversation.respond(1, b"small")
        self.pair.settle()
        self.assertEqual(self.caller.outcome(token).message, b"small")

    def test_a_request_that_is_too_large_all_the_same_is_refused_at_its_first_frame(self):
        end = opened(SMALL)
        end.receive(frame(REQUEST, MORE, 1, struct.pack("!I", 1 << 31) + request_message()))
        end.send()
        ((kind, flags, call_id, payload),) = cut(bytes(end.link))
        self.assertEqual((kind, flags, call_id), (ERROR, NOT_PROCESSED, 1))
        self.assertIn(b"MessageTooLarge", payload)
        self.assertEqual((end.events, end.conversation.running), ([], 0))
        end.receive(frame(CANCEL, 0, 1))
        self.assertEqual(end.conversation.state, State.OPEN)

    def test_a_request_that_is_too_large_by_little_is_refused_when_it_is_whole(self):
        end = opened(SMALL)
        message = request_message(arguments=bytes(6001))
        end.receive(frame(REQUEST, MORE, 1, struct.pack("!I", len(message)) + message[:2000]))
        end.receive(frame(CHUNK, MORE, 1, message[2000:4000]) + frame(CHUNK, 0, 1, message[4000:]))
        end.send()
        self.assertEqual([one[:3] for one in cut(bytes(end.link))], [(ERROR, NOT_PROCESSED, 1)])
        self.assertEqual(end.events, [])

    def test_a_response_that_is_too_large_fails_the_call_at_its_first_frame(self):
        end = opened(SMALL)
        _, token = end.call()
        end.receive(frame(RESPONSE, MORE, 2, struct.pack("!I", 6001) + b"a"))
        error = end.outcome(token).error
        self.assertIsInstance(error, MessageTooLarge)
        self.assertTrue(error.may_have_run)
        end.send()
        self.assertEqual([one[0] for one in cut(bytes(end.link))], [REQUEST, CANCEL])
        end.receive(frame(ERROR, 0, 2, struct.pack("!HBH", 1, 0, 0)))
        self.assertEqual((end.conversation.pending, end.conversation.state), (0, State.OPEN))

    def test_a_large_request_is_delivered_with_the_time_that_was_left_when_it_began(self):
        call_id, token = self.caller.call(bytes(5000), timeout=8.0)
        self.caller.send(1)
        self.pair.deliver(self.caller)
        self.pair.advance(3.0)
        self.pair.settle()
        self.assertEqual((self.server.request.call_id, self.server.request.deadline), (call_id, 1008.0))
        self.assertEqual(self.caller.outcomes(token), [])

    def test_a_large_request_whose_rest_does_not_come_in_time_is_refused_and_holds_nothing(self):
        end = opened(SMALL)
        message = request_message(milliseconds=5000, arguments=bytes(5000))
        end.receive(frame(REQUEST, MORE, 1, struct.pack("!I", len(message)) + message[:2000]))
        self.assertEqual((end.conversation.running, end.conversation.next_timer()), (1, 1005.0))
        end.conversation.handle_timer(1005.0)
        end.look()
        self.assertEqual((end.events, end.conversation.running), ([], 0))
        end.send()
        ((kind, flags, call_id, payload),) = cut(bytes(end.link))
        self.assertEqual((kind, flags, call_id, payload[:2]), (ERROR, NOT_PROCESSED, 1, b"\0\x04"))
        end.receive(frame(CHUNK, MORE, 1, message[2000:4000]) + frame(CHUNK, 0, 1, message[4000:]))
        self.assertEqual((end.events, end.conversation.state), ([], State.OPEN))

    def test_more_unfinished_messages_than_there_are_calls_end_the_conversation(self):
        end = opened(SMALL)
        for call_id in range(1, 100, 2):
            end.receive(frame(REQUEST, MORE, call_id, struct.pack("!I", 1 << 30) + request_message()))
        self.assertIn("messages are on the way at once", end.ended.error.message)

    def test_more_unfinished_octets_than_was_said_end_the_conversation(self):
        end = opened(Limits(max_frame=2048, max_message=200_000, max_unfinished=200_000))
        for call_id in (1, 3):
            end.receive(frame(REQUEST, MORE, call_id, struct.pack("!I", 200_000) + request_message()))
        self.assertIn("400000 octets are on the way at once", end.ended.error.message)


class Cancelling(Calls):
    def failed(self, token, cls):
        event = self.caller.outcome(token)
        self.assertIsInstance(event, CallFailed)
        self.assertIsInstance(event.error, cls)
        return event.error.may_have_run

    def quiet(self):
        """Both ends are open, and nothing is left of any call."""
        self.pair.settle()
        for end in self.pair.ends:
            self.assertEqual((end.conversation.state, end.of(Ended)), (State.OPEN, []))
            self.assertEqual((end.conversation.pending, end.conversation.running), (0, 0))
            self.assertEqual(len(end.conversation.traffic.assembler), 0)
            self.assertEqual(end.conversation.traffic.assembler._octets, 0)
            self.assertEqual(end.conversation.outbox._large_octets, 0)

    def test_while_it_waits_for_a_slot(self):
        for _ in range(3):
            self.call()
        call_id, token = self.call()
        self.caller.conversation.cancel(call_id)
        self.caller.look()
        self.assertFalse(self.failed(token, Cancelled))
        for open_id in (1, 3, 5):
            self.server.conversation.respond(open_id, b"")
        self.quiet()
        self.assertEqual(len(self.server.of(RequestReceived)), 3)

    def test_before_anything_of_a_large_one_is_sent(self):
        call_id, token = self.caller.call(bytes(5000))
        self.caller.conversation.cancel(call_id)
        self.caller.look()
        self.assertFalse(self.failed(token, Cancelled))
        self.quiet()
        self.assertEqual(self.server.events, [Opened(self.server.conversation.peer)])

    def test_while_its_request_is_sent(self):
        call_id, token = self.caller.call(bytes(5000))
        self.caller.send(1)
        self.pair.deliver(self.caller)
        self.assertEqual(self.server.conversation.running, 1)
        self.caller.conversation.cancel(call_id)
        self.caller.look()
        self.assertFalse(self.failed(token, Cancelled))
        self.quiet()
        self.assertEqual(self.server.of(RequestReceived), [])

    def test_while_it_runs(self):
        call_id, token = self.call()
        self.caller.conversation.cancel(call_id)
        self.pair.settle()
        self.assertTrue(self.failed(token, Cancelled))
        self.assertEqual(self.server.of(RequestCancelled), [RequestCancelled(call_id, False)])
        self.server.conversation.refuse(call_id, ErrorBody(1, "Cancelled", ""))
        self.quiet()

    def test_while_it_runs_and_the_handler_answers_all_the_same(self):
        for answer in (b"small", bytes(5000)):
            call_id, token = self.call()
            self.caller.conversation.cancel(call_id)
            self.server.conversation.respond(call_id, answer)
            self.quiet()
            self.assertTrue(self.failed(token, Cancelled))

    def test_while_its_answer_is_sent(self):
        call_id, token = self.call()
        self.server.conversation.respond(call_id, bytes(5000))
        self.server.send(1)
        self.pair.deliver(self.server)
        self.caller.conversation.cancel(call_id)
        self.caller.look()
        self.assertTrue(self.failed(token, Cancelled))
        self.assertEqual(self.caller.conversation.traffic.assembler._octets, 0)
        self.caller.send()
        self.pair.deliver(self.caller)
        self.server.send()
        self.assertEqual([one[:3] for one in cut(bytes(self.server.link))], [(ERROR, 0, call_id)])
        self.quiet()

    def test_while_all_of_its_answer_is_on_the_way(self):
        call_id, token = self.call()
        self.server.conversation.respond(call_id, bytes(5000))
        self.server.send()
        self.caller.conversation.cancel(call_id)
        self.quiet()
        self.assertTrue(self.failed(token, Cancelled))

    def test_after_its_outcome_it_changes_nothing(self):
        call_id, token = self.call()
        self.server.conversation.respond(call_id, b"")
        self.pair.settle()
        self.caller.conversation.cancel(call_id)
        self.quiet()
        self.assertIsInstance(self.caller.outcome(token), ResponseReceived)

    def test_twice_is_once(self):
        call_id, token = self.call()
        self.caller.conversation.cancel(call_id)
        self.caller.conversation.cancel(call_id)
        self.pair.settle()
        self.caller.outcome(token)
        self.assertEqual(len(self.server.of(RequestCancelled)), 1)

    def test_with_an_error_of_the_callers_own(self):
        call_id, token = self.call()
        self.caller.conversation.cancel(call_id, DeadlineExceeded("enough"))
        self.caller.look()
        self.assertEqual(self.caller.outcome(token).error.message, "enough")

    def test_a_refusal_of_a_half_sent_request_stops_it(self):
        call_id, token = self.caller.call(bytes(5000))
        self.caller.send(1)
        self.pair.deliver(self.caller)
        self.server.conversation.refuse(call_id, ErrorBody(8, "TooManyCalls", ""), processed=False)
        self.server.send()
        self.pair.deliver(self.server)
        self.assertFalse(self.caller.outcome(token).may_have_run)
        self.caller.send()
        self.assertEqual([one[0] for one in cut(bytes(self.caller.link))], [CANCEL])
        self.quiet()

    def test_a_cancel_of_a_call_that_is_not_open_is_ignored(self):
        end = opened()
        end.receive(frame(CANCEL, 0, 1) + frame(CANCEL, 0, 99, b"payload"))
        self.assertEqual((end.events, end.conversation.state), ([], State.OPEN))


class DeadlinesOfCalls(Calls):
    def test_at_the_caller(self):
        call_id, token = self.call(timeout=5.0)
        self.pair.advance(4.9)
        self.assertEqual(self.caller.outcomes(token), [])
        self.pair.advance(0.1)
        error = self.caller.outcome(token).error
        self.assertIsInstance(error, DeadlineExceeded)
        self.assertTrue(error.may_have_run)
        self.pair.settle()
        self.assertEqual(self.server.of(RequestCancelled), [RequestCancelled(call_id, False)])

    def test_at_the_server_where_the_caller_does_not_say(self):
        end = opened()
        end.receive(frame(REQUEST, 0, 1, request_message(milliseconds=2000)))
        end.conversation.suspend(1, end.request.deadline)
        end.conversation.handle_timer(1001.9)
        self.assertEqual(end.conversation.poll_events(), [])
        end.conversation.handle_timer(1002.0)
        self.assertEqual(end.conversation.poll_events(), [RequestCancelled(1, True)])
        self.assertEqual(end.conversation.running, 1)
        end.conversation.handle_timer(2000.0)
        self.assertEqual(end.conversation.poll_events(), [])
        end.conversation.refuse(1, ErrorBody(4, "DeadlineExceeded", ""))
        self.assertEqual(end.conversation.running, 0)

    def test_at_the_server_of_a_large_request_once(self):
        self.caller.call(bytes(5000), timeout=5.0)
        self.pair.settle()
        self.server.conversation.suspend(1, self.server.request.deadline)
        self.server.conversation.handle_timer(1005.0)
        self.server.look()
        self.assertEqual(self.server.of(RequestCancelled), [RequestCancelled(1, True)])

    def test_of_a_call_that_was_answered_means_nothing(self):
        _, token = self.call(timeout=5.0)
        self.server.conversation.suspend(1, self.server.request.deadline)
        self.server.conversation.respond(1, b"")
        self.pair.settle()
        self.pair.advance(10.0)
        self.assertIsInstance(self.caller.outcome(token), ResponseReceived)
        self.assertEqual(self.server.of(RequestCancelled), [])

    def test_that_has_passed_already_fails_the_call_at_the_next_timer(self):
        _, token = self.caller.call(timeout=-1.0)
        self.pair.advance(0.0)
        self.assertIsInstance(self.caller.outcome(token).error, DeadlineExceeded)

    def test_many_pass_in_order(self):
        pair = Pair()
        tokens = {pair.initiator.call(timeout=seconds)[1]: seconds for seconds in (5.0, 1.0, 3.0, 4.0, 2.0)}
        pair.advance(10.0)
        self.assertEqual([tokens[event.token] for event in pair.initiator.of(CallFailed)], [1.0, 2.0, 3.0, 4.0, 5.0])


class Answers(SynchronousTestCase):
    def test_an_answer_to_a_call_that_waits_is_the_peers_fault(self):
        settings = SETTINGS.replace(b"max_calls\x02", b"max_calls\x00")
        for octets in (
            frame(RESPONSE, 0, 2, b""),
            frame(ERROR, 0, 2, struct.pack("!HBH", 2, 0, 0)),
            frame(RESPONSE, MORE, 2, struct.pack("!I", 2) + b"a") + frame(CHUNK, 0, 2, b"a"),
            frame(RESPONSE, MORE, 2, struct.pack("!I", 1 << 30) + b"a") + frame(RESPONSE, 0, 2, b"a"),
        ):
            end = opened(settings=settings)
            _, token = end.call()
            end.receive(octets)
            self.assertIsInstance(end.ended.error, RemoteProtocolError)
            self.assertFalse(end.outcome(token).error.may_have_run)

    def test_a_second_answer_is_the_peers_fault(self):
        end = opened()
        _, token = end.call()
        end.receive(frame(RESPONSE, 0, 2, b"one") + frame(RESPONSE, 0, 2, b"two"))
        self.assertEqual(end.outcome(token), ResponseReceived(token, b"one"))
        self.assertIsInstance(end.ended.error, RemoteProtocolError)

    def test_an_error_may_take_the_place_of_a_half_sent_result(self):
        end = opened()
        _, token = end.call()
        end.receive(
            frame(RESPONSE, MORE, 2, struct.pack("!I", 20) + b"a") + frame(ERROR, 0, 2, struct.pack("!HBH", 2, 0, 0))
        )
        self.assertIsInstance(end.outcome(token), ErrorReceived)
        end.receive(frame(CHUNK, 0, 2, b"a"))
        self.assertIsInstance(end.ended.error, RemoteProtocolError)

    def test_what_stood_before_a_fault_counts(self):
        end = opened()
        end.receive(frame(REQUEST, 0, 1, request_message()) + frame(HELLO, payload=SETTINGS))
        self.assertEqual([type(event) for event in end.events], [RequestReceived, RequestCancelled, Ended])

    def test_every_call_fails_with_the_conversation(self):
        end = opened()
        tokens = [end.call()[1] for _ in range(5)]
        end.receive(frame(0))
        for index, token in enumerate(tokens):
            error = end.outcome(token).error
            self.assertIsInstance(error, ConnectionLost)
            self.assertEqual(error.may_have_run, index < 2)
