"""Sessions: a call runs once, its reply is given again, and what is not known is said to be lost."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from twisted.trial.unittest import SynchronousTestCase

from protoframe.core.frames import ErrorBody, Key
from protoframe.core.limits import Limits
from protoframe.core.replies import Reply, Sessions
from protoframe.errors import FailedPrecondition, SessionLost, TooManyCalls


def opened(next_key=0, **limits):
    """The sessions of a server, and one of them."""
    sessions = Sessions(Limits(**limits))
    session, _, _ = sessions.open("ann", next_key, "connection")
    return sessions, session


class Calls(SynchronousTestCase):
    def test_a_call_is_new_once_then_it_is_joined_and_then_answered_again(self):
        sessions, session = opened()
        call, is_new = sessions.take(session, Key(0, 0), b"digest")
        self.assertTrue(is_new)
        self.assertEqual(sessions.take(session, Key(0, 0), b"digest"), (call, False))
        self.assertIs(call.reply, None)
        sessions.finish(call, Reply(b"result"))
        again, is_new = sessions.take(session, Key(0, 0), b"digest")
        self.assertEqual((again.reply, is_new), (Reply(b"result"), False))

    def test_another_call_with_a_key_that_is_known_is_refused(self):
        sessions, session = opened()
        sessions.take(session, Key(0, 0), b"digest")
        error = self.assertRaises(FailedPrecondition, sessions.take, session, Key(0, 0), b"other")
        self.assertFalse(error.may_have_run)

    def test_what_was_sent_before_the_session_began_here_may_have_run(self):
        sessions, session = opened(next_key=5)
        error = self.assertRaises(SessionLost, sessions.take, session, Key(4, 4), b"digest")
        self.assertTrue(error.may_have_run)
        # As it is after another connection of the same session too.
        again, former, _ = sessions.open("ann", 9, "another")
        self.assertEqual((again, former), (session, "connection"))
        self.assertRaises(SessionLost, sessions.take, session, Key(4, 4), b"digest")
        self.assertTrue(sessions.take(session, Key(6, 6), b"digest")[1])

    def test_what_the_caller_does_not_want_any_more_is_forgotten_and_does_not_run_again(self):
        sessions, session = opened()
        for number in range(10):
            call, _ = sessions.take(session, Key(number, 0), b"")
            sessions.finish(call, Reply(bytes(100)))
        before = sessions.octets
        sessions.take(session, Key(10, 7), b"")
        self.assertLess(sessions.octets, before)
        self.assertRaises(SessionLost, sessions.take, session, Key(3, 3), b"")
        self.assertEqual(sessions.take(session, Key(8, 3), b"")[0].reply, Reply(bytes(100)))
        # One that runs goes on, and is forgotten when it has ended.
        sessions.take(session, Key(11, 11), b"")
        self.assertEqual(set(session.calls), {10, 11})
        sessions.finish(session.calls[10], Reply(b""))
        self.assertEqual(set(session.calls), {11})

    def test_one_that_was_turned_away_may_come_again(self):
        sessions, session = opened()
        call, _ = sessions.take(session, Key(0, 0), b"")
        sessions.drop(call)
        self.assertEqual((sessions.octets, session.running), (0, 0))
        self.assertTrue(sessions.take(session, Key(0, 0), b"")[1])

    def test_an_error_is_a_reply_too(self):
        sessions, session = opened()
        call, _ = sessions.take(session, Key(0, 0), b"")
        sessions.finish(call, Reply(error=ErrorBody(5, "NotFound", "text", b"detail")))
        self.assertEqual(call.reply.size, len("NotFoundtextdetail"))


class Bounds(SynchronousTestCase):
    def test_the_oldest_replies_go_first_and_are_lost(self):
        sessions, session = opened(max_replies=4000)
        for number in range(10):
            call, _ = sessions.take(session, Key(number, 0), b"")
            sessions.finish(call, Reply(bytes(1000)))
            self.assertLessEqual(sessions.octets, 4000)
        self.assertRaises(SessionLost, sessions.take, session, Key(0, 0), b"")
        self.assertEqual(sessions.take(session, Key(9, 0), b"")[0].reply, Reply(bytes(1000)))

    def test_a_reply_that_is_larger_than_all_that_is_kept_is_not_kept(self):
        sessions, session = opened(max_replies=100)
        call, _ = sessions.take(session, Key(0, 0), b"")
        sessions.finish(call, Reply(bytes(1000)))
        self.assertEqual(sessions.octets, 0)
        self.assertRaises(SessionLost, sessions.take, session, Key(0, 0), b"")

    def test_no_more_run_than_may(self):
        sessions, session = opened(max_calls=3)
        for number in range(3):
            sessions.take(session, Key(number, 0), b"")
        error = self.assertRaises(TooManyCalls, sessions.take, session, Key(3, 0), b"")
        self.assertFalse(error.may_have_run)
        sessions.finish(session.calls[0], Reply(b""))
        self.assertTrue(sessions.take(session, Key(3, 0), b"")[1])

    def test_a_new_session_takes_the_place_of_the_one_that_was_left_longest(self):
        sessions, first = opened(max_sessions=2)
        second, _, _ = sessions.open("bob", 0, "two")
        running, _ = sessions.take(first, Key(0, 0), b"")
        sessions.leave(second, "two", 1.0)
        sessions.leave(first, "connection", 2.0)
        sessions.open("cid", 0, "three")
        self.assertTrue(second.is_over)
        _, _, given_up = sessions.open("dan", 0, "four")
        self.assertEqual((first.is_over, given_up), (True, [running]))
        # Those that are used are bounded by the connections that there may be.
        sessions.open("eve", 0, "five")
        self.assertEqual(len(sessions), 3)

    def test_a_session_to_which_nobody_comes_back_ends(self):
        sessions, session = opened(session_retention=10.0)
        self.assertEqual(sessions.next_timer(), float("inf"))
        call, _ = sessions.take(session, Key(0, 0), b"")
        sessions.leave(session, "another", 5.0)
        self.assertEqual(sessions.next_timer(), float("inf"))
        sessions.leave(session, "connection", 5.0)
        self.assertEqual(sessions.next_timer(), 15.0)
        self.assertEqual(sessions.expire(14.9), [])
        self.assertEqual(sessions.expire(15.0), [call])
        self.assertEqual((len(sessions), sessions.octets), (0, 0))
        # What it says now is of no use to anybody.
        sessions.finish(call, Reply(b"late"))
        self.assertEqual(sessions.octets, 0)

    def test_who_comes_back_in_time_finds_all_as_it_was(self):
        sessions, session = opened(session_retention=10.0)
        call, _ = sessions.take(session, Key(0, 0), b"")
        sessions.leave(session, "connection", 5.0)
        again, former, _ = sessions.open("ann", 1, "next")
        self.assertEqual((again, former, sessions.next_timer()), (session, None, float("inf")))
        self.assertEqual(sessions.take(session, Key(0, 0), b""), (call, False))


class Model(RuleBasedStateMachine):
    """Against what is promised: nothing runs twice, and no reply is another call's."""

    def __init__(self):
        super().__init__()
        self.sessions = Sessions(Limits(max_replies=3000, max_sessions=3, max_calls=8))
        self.runs = {}
        self.open = {}
        self.next_key = {}
        self.clock = 0.0

    names = st.sampled_from("abcde")

    @rule(name=names)
    def come(self, name):
        session, _, _ = self.sessions.open(name, self.next_key.get(name, 0), object())
        self.open[name] = session

    @rule(name=names, back=st.integers(0, 20), settled=st.integers(0, 20))
    def call(self, name, back, settled):
        session = self.open.get(name)
        if session is None:
            return
        following = self.next_key.get(name, 0)
        number = max(0, following - back)
        self.next_key[name] = max(following, number + 1)
        unsettled = max(0, number - settled)
        try:
            call, is_new = self.sessions.take(session, Key(number, unsettled), str((name, number)).encode())
        except (SessionLost, TooManyCalls):
            return
        if is_new:
            self.runs[name, number] = self.runs.get((name, number), 0) + 1
        if call.reply is not None:
            assert call.reply.result.startswith(f"{name} {number} ".encode())

    @rule(name=names, size=st.integers(0, 1500), which=st.integers(0, 7))
    def answer(self, name, size, which):
        session = self.open.get(name)
        if session is None:
            return
        running = [call for call in session.calls.values() if call.reply is None]
        if running:
            call = running[which % len(running)]
            self.sessions.finish(call, Reply(f"{name} {call.number} ".encode().ljust(size)))

    @rule(name=names, seconds=st.floats(0, 300))
    def leave(self, name, seconds):
        session = self.open.pop(name, None)
        if session is not None:
            self.clock += seconds
            self.sessions.leave(session, session.user, self.clock)
            self.sessions.expire(self.clock)

    @invariant()
    def nothing_runs_twice(self):
        assert all(count == 1 for count in self.runs.values())

    @invariant()
    def what_is_kept_is_what_is_counted(self):
        kept = [call for session in self.sessions._sessions.values() for call in session.calls.values()]
        assert self.sessions.octets == sum(256 + (call.reply.size if call.reply else 0) for call in kept)
        assert all(call.reply is None for call in kept) or self.sessions.octets <= 3000
        for session in self.sessions._sessions.values():
            assert session.running == sum(call.reply is None for call in session.calls.values())


class ModelTests(SynchronousTestCase):
    def test_it_keeps_to_the_model(self):
        test = Model.TestCase("runTest")
        test.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
        test.runTest()
