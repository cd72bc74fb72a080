"""Whatever happens, each call has exactly one outcome, and honest ends never blame each other.

A random walk acts on two conversations over a link that hands over any number of octets at a time; its seed is in the
message of what fails.  A state machine of Hypothesis does the same and finds the shortest walk that fails.
"""

from __future__ import annotations

import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from twisted.trial.unittest import SynchronousTestCase

from protoframe.core.events import CallFailed, Ended, ErrorReceived, RequestReceived, ResponseReceived
from protoframe.core.frames import ErrorBody
from protoframe.core.state import State
from protoframe.errors import ConnectionLost, Error, ProtocolError
from tests.core.pairs import SMALL, Pair

SIZES = (0, 10, 1900, 2030, 2100, 4500, 5990)


class Walk:
    """Two ends, what they called and what they were told."""

    def __init__(self):
        self.pair = Pair(SMALL, SMALL)
        self.calls = {end: {} for end in self.pair.ends}  # id by token
        self.delivered = set()
        self.turned_away = set()
        self.answers = {}
        self.seen = dict.fromkeys(self.pair.ends, 0)
        self.running = {end: {} for end in self.pair.ends}  # token by id

    def look(self):
        for end in self.pair.ends:
            end.look()
            for event in end.events[self.seen[end] :]:
                if isinstance(event, RequestReceived):
                    token = event.arguments[:8].rstrip(b".").decode()
                    assert token not in self.delivered, "a request was delivered twice"
                    self.delivered.add(token)
                    self.running[end][event.call_id] = token
            self.seen[end] = len(end.events)

    def call(self, end, size, timeout):
        expected = f"{end._prefix}{len(self.calls[end]) + 1}"
        arguments = expected.encode().ljust(8, b".") + bytes(size)
        try:
            call_id = end.conversation.request(b"P.m", arguments, expected, end.now + timeout, end.now)
        except Error as error:
            refused = error
        else:
            self.calls[end][expected] = call_id
            return
        assert not refused.may_have_run

    def answer(self, end, pick, size, how):
        running = self.running[end]
        if not running or end.conversation.state is State.CLOSED:
            return
        call_id = sorted(running)[pick % len(running)]
        token = running.pop(call_id)
        if how == "respond":
            self.answers[token] = token.encode() + bytes(size)
            end.conversation.respond(call_id, self.answers[token])
        else:
            if how == "not run":
                self.turned_away.add(token)
            body = ErrorBody(2, token, "", bytes(size))
            end.conversation.refuse(call_id, body, processed=how == "refuse")

    def cancel(self, end, pick):
        ids = sorted(self.calls[end].values())
        if ids:
            end.conversation.cancel(ids[pick % len(ids)])

    def suspend(self, end, pick):
        ids = sorted(self.running[end])
        if ids:
            end.conversation.suspend(ids[pick % len(ids)], end.now + 1.0)

    def finish(self):
        """Both links are cut, and the accounts are checked."""
        self.look()
        for end in self.pair.ends:
            end.lose()
        self.look()
        for end in self.pair.ends:
            assert end.conversation.pending == end.conversation.running == 0
            assert isinstance(end.events[-1], Ended)
            assert len(end.of(Ended)) == 1
            self.check_ended(end)
            outcomes = {}
            for event in end.events:
                if isinstance(event, ResponseReceived | ErrorReceived | CallFailed):
                    assert event.token not in outcomes, f"two outcomes of {event.token}"
                    outcomes[event.token] = event
            assert outcomes.keys() == self.calls[end].keys(), "a call has no outcome"
            for token, event in outcomes.items():
                self.check_outcome(token, event)

    def check_outcome(self, token, event):
        if isinstance(event, ResponseReceived):
            assert event.message == self.answers[token]
            return
        may_have_run = event.error.may_have_run if isinstance(event, CallFailed) else event.may_have_run
        if not may_have_run:
            assert token not in self.delivered or token in self.turned_away, f"{token} ran"
        if isinstance(event, ErrorReceived) and event.body.status == 2:
            assert event.body.name == token

    def check_ended(self, end):
        for event in end.of(Ended):
            assert not isinstance(event.error, ProtocolError), event.error
            assert event.error is None or "peer ended" not in event.error.message, event.error

    def drain(self):
        """All is answered and delivered: nothing of it is left at either end."""
        if any(end.conversation.state is State.CLOSED for end in self.pair.ends):
            return
        for _ in range(200):
            self.pair.settle()
            self.look()
            if not any(self.running.values()):
                break
            for end in self.pair.ends:
                self.answer(end, 0, 10, "respond")
        for end in self.pair.ends:
            conversation = end.conversation
            assert conversation.pending == conversation.running == 0, "a call was never answered"
            assert not conversation.outbox
            assert conversation.outbox._large_octets == 0
            assert len(conversation.traffic.assembler) == conversation.traffic.assembler._octets == 0


def walk(seed):
    chance = random.Random(seed)
    it = Walk()
    leaves = chance.random() < 0.3
    for _ in range(chance.randrange(150)):
        end = it.pair.ends[chance.randrange(2)]
        what = chance.random()
        if what < 0.25:
            it.call(end, chance.choice(SIZES), chance.choice([0.5, 3.0, 30.0]))
        elif what < 0.40:
            it.answer(
                end,
                chance.randrange(9),
                chance.choice(SIZES),
                chance.choice(["respond", "respond", "refuse", "not run"]),
            )
        elif what < 0.50:
            it.cancel(end, chance.randrange(99))
        elif what < 0.65:
            end.send(chance.choice([0, 1, 2048, 5000]))
        elif what < 0.90:
            it.pair.deliver(end, chance.choice([1, 11, 12, 100, 2000, 5000, None]))
        elif what < 0.93:
            it.suspend(end, chance.randrange(9))
        elif what < 0.985:
            it.pair.advance(chance.choice([0.1, 1.0]))
        elif leaves:
            end.conversation.go_away("bye")
        it.look()
    if chance.random() < 0.7:
        it.drain()
    it.finish()


@settings(max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
class Machine(RuleBasedStateMachine):
    ends = st.integers(0, 1)

    def __init__(self):
        super().__init__()
        self.it = Walk()

    @rule(end=ends, size=st.sampled_from(SIZES), timeout=st.sampled_from([0.5, 30.0]))
    def call(self, end, size, timeout):
        self.it.call(self.it.pair.ends[end], size, timeout)

    @precondition(lambda self: any(self.it.running.values()))
    @rule(
        end=ends,
        pick=st.integers(0, 3),
        size=st.sampled_from(SIZES),
        how=st.sampled_from(["respond", "refuse", "not run"]),
    )
    def answer(self, end, pick, size, how):
        self.it.answer(self.it.pair.ends[end], pick, size, how)

    @rule(end=ends, pick=st.integers(0, 20))
    def cancel(self, end, pick):
        self.it.cancel(self.it.pair.ends[end], pick)

    @rule(end=ends, allowance=st.sampled_from([0, 1, 5000]))
    def send(self, end, allowance):
        self.it.pair.ends[end].send(allowance)

    @rule(end=ends, octets=st.integers(1, 5000))
    def deliver(self, end, octets):
        self.it.pair.deliver(self.it.pair.ends[end], octets)

    @rule(seconds=st.sampled_from([0.1, 1.0]))
    def advance(self, seconds):
        self.it.pair.advance(seconds)

    @rule(end=ends)
    def go_away(self, end):
        self.it.pair.ends[end].conversation.go_away()

    @rule()
    def settle(self):
        self.it.pair.settle()

    @invariant()
    def look(self):
        self.it.look()
        for end in self.it.pair.ends:
            self.it.check_ended(end)

    def teardown(self):
        self.it.drain()
        self.it.finish()


class Outcomes(SynchronousTestCase):
    def test_random_walks(self):
        for seed in range(1500):
            try:
                walk(seed)
            except Exception as error:
                raise AssertionError(f"the walk of seed {seed} failed: {error!r}") from error

    def test_the_state_machine(self):
        run_state_machine_as_test(Machine)

    def test_a_link_that_is_cut_at_every_octet(self):
        def scene(cut_after):
            """A conversation with all kinds of calls; how many octets went through before it was cut."""
            it = Walk()
            budget = cut_after
            one, other = it.pair.ends

            def settle():
                nonlocal budget
                for _ in range(3):
                    for end in it.pair.ends:
                        end.send()
                        budget -= it.pair.deliver(end, max(budget, 0))
                    it.look()

            for size in (0, 2500, 0):
                it.call(one, size, 30.0)
            it.call(other, 0, 30.0)
            settle()
            it.answer(other, 0, 2500, "respond")
            it.cancel(one, 2)
            settle()
            it.answer(other, 0, 0, "not run")
            it.answer(one, 0, 0, "refuse")
            it.call(one, 0, 30.0)
            other.conversation.go_away()
            settle()
            while it.running[other]:
                it.answer(other, 0, 0, "respond")
            settle()
            it.finish()
            return cut_after - budget

        whole = scene(1 << 30)
        self.assertGreater(whole, 5000)
        # Every octet of the frames' headers and small payloads; of large payloads, every seventh.
        for cut_after in range(whole + 1):
            if cut_after % 7 == 0 or cut_after < 120 or cut_after > whole - 250:
                scene(cut_after)

    def test_an_end_that_loses_the_link_says_so_to_each_call(self):
        it = Walk()
        one = it.pair.initiator
        it.call(one, 0, 30.0)
        one.lose()
        self.assertIsInstance(one.of(CallFailed)[0].error, ConnectionLost)
