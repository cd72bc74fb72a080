"""How a conversation ends: the table of states, GOAWAY, and who may have run."""

from __future__ import annotations

import struct

from twisted.trial.unittest import SynchronousTestCase

from protoframe.core.events import (
    CallFailed,
    Drained,
    Ended,
    ErrorReceived,
    RequestCancelled,
    RequestReceived,
    ResponseReceived,
)
from protoframe.core.frames import ErrorBody
from protoframe.core.limits import Limits
from protoframe.core.state import TRANSITIONS, Input, Role, State
from protoframe.errors import ConnectionLost, GoingAway, LocalProtocolError, RemoteProtocolError, VersionMismatch
from tests.core.pairs import (
    CANCEL,
    CHUNK,
    ERROR,
    GOAWAY,
    HELLO,
    MORE,
    NOT_PROCESSED,
    REQUEST,
    SETTINGS,
    SMALL,
    End,
    Pair,
    cut,
    frame,
    opened,
    request_message,
)


def goaway(status=0, last_call_id=0, text=b""):
    return frame(GOAWAY, payload=struct.pack("!HQ", status, last_call_id) + text)


PREFACE = b"\x89PF\n\x01\x01\0\0"


def hello(end):
    end.receive((b"" if end.reader.version else PREFACE) + frame(HELLO, payload=SETTINGS))


INPUTS = {
    Input.HELLO_RECEIVED: hello,
    Input.GOAWAY_RECEIVED: lambda end: end.receive((b"" if end.reader.version else PREFACE) + goaway()),
    Input.GOAWAY_SENT: lambda end: end.conversation.go_away(),
    Input.ENDED: lambda end: end.conversation.end(None),
}
#: How each state is come by; every arrow of the table but those to CLOSED is on one of the ways.
WAYS = {
    State.GREETING: [[]],
    State.OPEN: [[Input.HELLO_RECEIVED]],
    State.LEAVING: [[Input.HELLO_RECEIVED, Input.GOAWAY_SENT]],
    State.LEFT: [[Input.HELLO_RECEIVED, Input.GOAWAY_RECEIVED]],
    State.DRAINING: [
        [Input.HELLO_RECEIVED, Input.GOAWAY_SENT, Input.GOAWAY_RECEIVED],
        [Input.HELLO_RECEIVED, Input.GOAWAY_RECEIVED, Input.GOAWAY_SENT],
    ],
    State.CLOSED: [[Input.ENDED]],
}


def come_to(way):
    end = End(Role.ACCEPTOR, Limits(), 1000.0)
    for step in way:
        INPUTS[step](end)
    end.look()
    end.send()
    end.events.clear()
    end.link.clear()
    return end


class States(SynchronousTestCase):
    def test_every_arrow_of_the_table_leads_where_it_says(self):
        seen = set()
        for state, ways in WAYS.items():
            for way in ways:
                for happened, act in INPUTS.items():
                    if (state, happened) in TRANSITIONS:
                        end = come_to(way)
                        self.assertEqual(end.conversation.state, state)
                        act(end)
                        self.assertEqual(end.conversation.state, TRANSITIONS[state, happened], (state, happened))
                        seen.add((state, happened))
        self.assertEqual(seen, set(TRANSITIONS))

    def test_what_is_not_in_the_table_is_refused_to_the_peer_and_does_nothing_for_this_end(self):
        for state, ways in WAYS.items():
            for way in ways:
                for happened, act in INPUTS.items():
                    if (state, happened) in TRANSITIONS:
                        continue
                    end = come_to(way)
                    act(end)
                    end.look()
                    what = (state, happened)
                    if state is State.CLOSED:
                        self.assertEqual((end.conversation.state, end.events), (State.CLOSED, []), what)
                    elif happened is Input.GOAWAY_SENT:
                        # Not open yet, there is nothing to go away from but the connection.
                        self.assertEqual(
                            end.conversation.state, State.CLOSED if state is State.GREETING else state, what
                        )
                    else:
                        self.assertIsInstance(end.ended.error, RemoteProtocolError, what)
                        self.assertEqual(end.conversation.state, State.CLOSED, what)

    def test_no_way_leads_out_of_closed_and_every_state_but_it_can_end(self):
        self.assertEqual({state for state, _ in TRANSITIONS}, set(State) - {State.CLOSED})
        for state in set(State) - {State.CLOSED}:
            self.assertIs(TRANSITIONS[state, Input.ENDED], State.CLOSED)

    def test_a_closed_conversation_takes_and_gives_nothing(self):
        for error in (None, RemoteProtocolError("fault"), ConnectionLost("cut")):
            end = opened()
            end.call()
            end.conversation.end(error)
            end.look()
            end.send()
            end.link.clear()
            end.events.clear()
            for kind in range(256):
                for call_id in (0, 1, 2):
                    end.conversation.handle_frames([(kind, 0, call_id, b""), (kind, MORE, call_id, bytes(8))], 1000.0)
            end.conversation.handle_timer(1e9)
            end.conversation.cancel(2)
            end.conversation.end(error)
            end.look()
            end.send()
            self.assertEqual((end.events, bytes(end.link)), ([], b""))
            self.assertEqual(end.conversation.next_timer(), float("inf"))
            self.assertFalse(self.assertRaises(ConnectionLost, end.call).may_have_run)
            self.assertRaises(LocalProtocolError, end.conversation.respond, 1, b"")

    def test_where_a_call_may_be_made_and_where_not(self):
        for state, ways in WAYS.items():
            end = come_to(ways[0])
            if state in (State.OPEN, State.LEAVING):
                end.call()
            else:
                expected = {State.GREETING: LocalProtocolError, State.CLOSED: ConnectionLost}.get(state, GoingAway)
                self.assertRaises(expected, end.call)


class Ending(SynchronousTestCase):
    def test_each_state_ends_once_with_its_reason(self):
        for ways in WAYS.values():
            for error in (None, ConnectionLost("cut"), RemoteProtocolError("fault"), VersionMismatch("version")):
                end = come_to(ways[0])
                if end.conversation.state is State.CLOSED:
                    continue
                end.conversation.end(error)
                end.conversation.end(RemoteProtocolError("later"))
                end.look()
                self.assertIs(end.ended.error, error)
                end.send()
                frames = cut(bytes(end.link))
                if error is None or isinstance(error, ConnectionLost):
                    self.assertEqual(frames, [])
                else:
                    payload = struct.pack("!HQ", error.status, 0) + error.message.encode()
                    self.assertEqual(frames, [(GOAWAY, 0, 0, payload)])

    def test_every_open_call_has_its_outcome_and_every_handler_is_told(self):
        pair = Pair(SMALL, SMALL)
        tokens = [pair.initiator.call()[1] for _ in range(5)]
        pair.acceptor.call()
        pair.settle()
        pair.initiator.conversation.end(None)
        pair.initiator.look()
        errors = [pair.initiator.outcome(token).error for token in tokens]
        self.assertEqual([error.may_have_run for error in errors], [True, True, True, False, False])
        self.assertEqual({type(error) for error in errors}, {ConnectionLost})
        self.assertEqual(pair.initiator.of(RequestCancelled), [RequestCancelled(2, False)])
        self.assertIsInstance(pair.initiator.events[-1], Ended)

    def test_a_call_whose_request_was_not_all_sent_certainly_did_not_run(self):
        pair = Pair(SMALL, SMALL)
        tokens = [pair.initiator.call(bytes(5000))[1] for _ in range(3)]
        pair.initiator.send(4 * 2048 + 1)
        pair.initiator.lose()
        self.assertEqual([pair.initiator.outcome(token).error.may_have_run for token in tokens], [True, False, False])

    def test_a_request_that_is_not_whole_was_never_told_and_is_not_cancelled(self):
        end = opened(SMALL)
        end.receive(frame(REQUEST, MORE, 1, struct.pack("!I", 20) + request_message()))
        end.lose()
        self.assertEqual([type(event) for event in end.events], [Ended])

    def test_whole_frames_that_wait_go_before_the_goaway(self):
        end = opened()
        end.call()
        end.receive(frame(0))
        end.send()
        self.assertEqual([one[0] for one in cut(bytes(end.link))], [REQUEST, GOAWAY])


class GoingAwayInOrder(SynchronousTestCase):
    def setUp(self):
        self.pair = Pair(SMALL, SMALL)
        self.caller, self.server = self.pair.initiator, self.pair.acceptor

    def test_what_runs_ends_and_nothing_new_begins(self):
        _, token = self.caller.call()
        self.pair.settle()
        self.server.conversation.go_away("bye")
        self.pair.settle()
        self.assertEqual([end.conversation.state for end in self.pair.ends], [State.LEFT, State.LEAVING])
        self.assertFalse(self.assertRaises(GoingAway, self.caller.call).may_have_run)
        self.assertEqual(self.server.of(Drained), [])
        self.server.conversation.respond(1, b"late")
        self.pair.settle()
        self.assertEqual(self.caller.outcome(token).message, b"late")
        for end in self.pair.ends:
            self.assertEqual(end.of(Drained), [Drained()])
            self.assertIsInstance(end.events[-1], Drained)

    def test_an_end_that_leaves_may_still_call(self):
        self.server.conversation.go_away()
        _, token = self.server.call()
        self.pair.settle()
        self.caller.conversation.respond(2, b"yes")
        self.pair.settle()
        self.assertEqual(self.server.outcome(token).message, b"yes")

    def test_both_may_leave_at_once(self):
        calls = [(end, end.call()[1]) for end in self.pair.ends]
        self.pair.settle()
        for end in self.pair.ends:
            end.conversation.go_away()
        self.pair.settle()
        for end in self.pair.ends:
            self.assertEqual(end.conversation.state, State.DRAINING)
            self.assertRaises(GoingAway, end.call)
            end.conversation.respond(end.request.call_id, b"")
        self.pair.settle()
        for end, token in calls:
            self.assertIsInstance(end.outcome(token), ResponseReceived)
            self.assertEqual(end.of(Drained), [Drained()])

    def test_without_calls_it_is_drained_at_once(self):
        self.server.conversation.go_away()
        self.pair.settle()
        for end in self.pair.ends:
            self.assertEqual(end.of(Drained), [Drained()])

    def test_calls_that_crossed_the_goaway_certainly_did_not_run(self):
        _, first = self.caller.call()
        self.pair.settle()
        _, small = self.caller.call()
        _, large = self.caller.call(bytes(5000))
        _, waiting = self.caller.call()
        self.caller.send(1)
        self.server.conversation.go_away("bye")
        self.pair.settle()
        for token in (small, large, waiting):
            event = self.caller.outcome(token)
            self.assertEqual(
                (type(event.error), event.error.message, event.error.may_have_run), (GoingAway, "bye", False)
            )
        self.assertEqual(self.caller.outcomes(first), [])
        self.assertEqual(len(self.server.of(RequestReceived)), 1)
        self.server.conversation.respond(1, b"")
        self.pair.settle()
        self.assertIsInstance(self.caller.outcome(first), ResponseReceived)
        self.assertEqual([end.of(Drained) for end in self.pair.ends], [[Drained()]] * 2)
        self.assertEqual(len(self.server.conversation.traffic.assembler), 0)

    def test_a_request_that_was_overtaken_and_then_missed_the_goaway_is_refused(self):
        # Call 1 is large, and the first frame of call 3 goes first: GOAWAY then promises an answer to call 1 too.
        _, large = self.caller.call(bytes(5000))
        _, small = self.caller.call()
        self.caller.send(0)
        self.pair.deliver(self.caller)
        self.assertEqual(self.server.request.call_id, 3)
        self.server.conversation.go_away()
        self.pair.settle()
        event = self.caller.outcome(large)
        self.assertIsInstance(event, ErrorReceived)
        self.assertEqual((event.body.name, event.body.status, event.may_have_run), ("GoingAway", 14, False))
        self.server.conversation.respond(3, b"")
        self.pair.settle()
        self.assertIsInstance(self.caller.outcome(small), ResponseReceived)
        self.assertEqual([end.of(Ended) for end in self.pair.ends], [[], []])

    def test_the_same_holds_for_a_small_one(self):
        end = opened()
        end.receive(frame(REQUEST, 0, 3, request_message()))
        end.conversation.go_away()
        end.send()
        end.link.clear()
        end.receive(frame(REQUEST, 0, 1, request_message()) + frame(REQUEST, 0, 5, request_message()))
        end.send()
        self.assertEqual([one[:3] for one in cut(bytes(end.link))], [(ERROR, NOT_PROCESSED, 1)])
        self.assertEqual(len(end.of(RequestReceived)), 1)

    def test_a_late_request_with_a_wrong_id_is_the_peers_fault(self):
        for call_id in (0, 2):
            end = opened()
            end.conversation.go_away()
            end.receive(frame(REQUEST, 0, call_id, request_message()))
            self.assertIsInstance(end.of(Ended)[0].error, RemoteProtocolError)

    def test_calls_that_wait_for_a_slot_fail_whatever_the_goaway_promises(self):
        end = opened()
        tokens = [end.call()[1] for _ in range(4)]
        end.receive(goaway(0, (1 << 64) - 1))
        self.assertEqual([end.outcomes(token) for token in tokens[:2]], [[], []])
        self.assertEqual([end.outcome(token).error.may_have_run for token in tokens[2:]], [False, False])

    def test_a_request_that_is_on_the_way_when_this_end_leaves_is_served(self):
        end = opened()
        message = request_message(arguments=bytes(3000))
        end.receive(frame(REQUEST, MORE, 1, struct.pack("!I", len(message)) + message[:2000]))
        end.conversation.go_away()
        end.receive(frame(CHUNK, 0, 1, message[2000:]))
        self.assertEqual(end.request.call_id, 1)

    def test_a_call_given_up_after_the_goaway_drains_too(self):
        call_id, _ = self.caller.call()
        self.pair.settle()
        self.server.conversation.go_away()
        self.caller.conversation.cancel(call_id)
        self.pair.settle()
        self.assertEqual(self.caller.of(Drained), [])
        self.server.conversation.refuse(call_id, ErrorBody(1, "Cancelled", ""))
        self.pair.settle()
        self.assertEqual([end.of(Drained) for end in self.pair.ends], [[Drained()]] * 2)


class GoingAwayForAFault(SynchronousTestCase):
    def test_it_ends_the_conversation_and_nothing_is_sent_back(self):
        for way in (WAYS[state][0] for state in State if state is not State.CLOSED):
            end = come_to(way)
            end.receive((b"" if end.reader.version else PREFACE) + goaway(13, 0, b"you did this"))
            self.assertIsInstance(end.ended.error, ConnectionLost)
            self.assertEqual(end.ended.error.message, "the peer ended the conversation: you did this")
            end.send()
            self.assertEqual(end.link, b"")

    def test_calls_that_it_rules_out_certainly_did_not_run(self):
        end = opened()
        tokens = [end.call()[1] for _ in range(3)]
        end.receive(goaway(13, 2, b"fault"))
        self.assertEqual([end.outcome(token).error.may_have_run for token in tokens], [True, False, False])
        self.assertEqual({type(event.error) for event in end.of(CallFailed)}, {ConnectionLost})

    def test_nothing_that_waited_is_sent_after_it(self):
        end = opened()
        for _ in range(4):
            end.call()
        end.send()
        end.link.clear()
        end.receive(goaway(13, 0, b"fault"))
        end.send()
        self.assertEqual((bytes(end.link), end.conversation.pending), (b"", 0))

    def test_the_last_call_of_the_peer_is_told(self):
        end = opened()
        end.receive(
            frame(REQUEST, 0, 7, request_message()) + frame(REQUEST, 0, 3, request_message()) + frame(CANCEL, 0, 2)
        )
        end.send()
        ((kind, _, _, payload),) = cut(bytes(end.link))
        self.assertEqual((kind, struct.unpack_from("!HQ", payload)), (GOAWAY, (13, 7)))
