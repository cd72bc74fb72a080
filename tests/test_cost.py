"""What a call and an item cost: byte codes of this package, beside those of the hand-written loop of the benchmarks.

Seconds say little on a machine that does other things too, and a ratio of counts is the same on each.  A check that is
added to the path of every call shows here, and is worth its cost or is to be put elsewhere.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import contextmanager

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.endpoints import clientFromString, connectProtocol
from twisted.internet.protocol import Factory as TwistedFactory

import protoframe
from benchmarks.peers import handwritten
from protoframe import Protocol, request
from protoframe.testing import Network

OWN = os.path.dirname(protoframe.__file__) + os.sep
TESTING = OWN + "testing" + os.sep
LOOP = handwritten.__file__

#: Calls before those that are counted, and these.
WARM_UP, COUNTED = 300, 100
ITEMS = 5000


class Speech(Protocol):
    @request
    async def upper(self, text: str) -> str:
        return text.upper()

    @request
    async def items(self, count: int) -> AsyncIterator[str]:
        for _ in range(count):
            yield "hello world"


class Counter:
    """Counts byte codes of the files of this package, or of the loop."""

    def __init__(self, is_counted):
        self.count = 0
        self._is_counted = is_counted
        self._files = {}

    def __call__(self, frame, event, argument):
        name = frame.f_code.co_filename
        counted = self._files.get(name)
        if counted is None:
            counted = self._files[name] = self._is_counted(name)
        if not counted:
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return self._one

    def _one(self, frame, event, argument):
        self.count += event == "opcode"
        return self._one


@contextmanager
def counting(is_counted):
    counter = Counter(is_counted)
    before = sys.gettrace()
    sys.settrace(counter)
    try:
        yield counter
    finally:
        sys.settrace(before)


def is_own(name):
    return name.startswith(OWN) and not name.startswith(TESTING)


async def each(call, count):
    for _ in range(count):
        await call()


async def cost_of(call, is_counted, at_once=1):
    """Byte codes for each call, at both ends together."""
    await each(call, WARM_UP)
    with counting(is_counted) as counter:
        await gatherResults([Deferred.fromCoroutine(each(call, COUNTED // at_once)) for _ in range(at_once)])
    return counter.count / (COUNTED // at_once * at_once)


async def cost_of_loop(at_once):
    port = reactor.listenTCP(0, TwistedFactory.forProtocol(lambda: handwritten.Server(reactor)), interface="127.0.0.1")
    where = f"tcp:127.0.0.1:{port.getHost().port}"
    client = await connectProtocol(clientFromString(reactor, where), handwritten.Client(reactor))
    try:
        call = lambda: client.call(b"Speech.upper", handwritten.Upper("hello world"), handwritten.decode_text)  # noqa: E731
        return await cost_of(call, LOOP.__eq__, at_once)
    finally:
        client.transport.abortConnection()
        await port.stopListening()


def in_network(kind):
    """A network in virtual time, where a busy machine makes nothing late, and who calls there."""
    network = Network(1)
    return network, network.run(network.connect(network.serve(Speech, f"{kind}:12000"), Speech))


def cost_of_calls(kind, at_once):
    network, speech = in_network(kind)
    return network.run(cost_of(lambda: speech.upper("hello world"), is_own, at_once))


#: How many times as many byte codes as a call by hand a call may take, at both ends: a tenth more than it takes.
MOST = {("tcp", 1): 4.9, ("tcp", 50): 5.4, ("udp", 1): 10.4, ("udp", 50): 8.9}
#: The same of an item of a stream, beside a call by hand of which there are many at once.
MOST_OF_AN_ITEM = 0.37


@pytest.mark.parametrize(("kind", "at_once"), MOST)
@pytest_twisted.ensureDeferred
async def test_a_call_costs_no_more_than_it_did(kind, at_once):
    by_hand = await cost_of_loop(at_once)
    assert by_hand > 100
    assert by_hand < cost_of_calls(kind, at_once) < MOST[kind, at_once] * by_hand


@pytest_twisted.ensureDeferred
async def test_an_item_costs_no_more_than_it_did():
    by_hand = await cost_of_loop(50)
    network, speech = in_network("tcp")

    async def take():
        return sum([1 async for _ in speech.items(ITEMS)])

    assert network.run(take()) == ITEMS
    with counting(is_own) as counter:
        assert network.run(take()) == ITEMS
    assert 10 < counter.count / ITEMS < MOST_OF_AN_ITEM * by_hand
