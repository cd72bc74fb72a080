"""Ports of UDP: what they read in a turn of the reactor, what becomes of errors, and when the reactor may sleep."""

from __future__ import annotations

import errno
import itertools
import socket
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IListeningPort
from twisted.internet.protocol import DatagramProtocol
from twisted.internet.task import deferLater
from twisted.internet.testing import MemoryReactorClock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from protoframe import Factory, Protocol, _datagram_ports, connect, listen, request
from protoframe._datagram_ports import AWAKE, MOST_IN_A_TURN, PATIENCE, RETRY_AFTER, DatagramPort, open_port
from protoframe._datagram_sockets import DatagramServer, _ClientSocket
from protoframe.core.datagram.packets import LARGEST_SIZE


class Taker(DatagramProtocol):
    """Notes what comes; ``then`` is called with each."""

    def __init__(self) -> None:
        self.came: list[bytes] = []
        self.sources: list[Any] = []
        self.refused = 0
        self.is_known = True
        self.then: Any = lambda _: None

    def datagramReceived(self, datagram: bytes, addr: Any) -> bool:  # type: ignore[override]
        self.came.append(datagram)
        self.sources.append(addr)
        self.then(datagram)
        return self.is_known

    def connectionRefused(self) -> None:
        self.refused += 1


class Counting:
    """A socket that counts how often it was read, and fails if it is told to."""

    def __init__(self, inner: socket.socket) -> None:
        self._inner = inner
        self.reads = 0
        self.error: OSError | None = None

    def recvfrom_into(self, buffer: bytearray) -> Any:
        self.reads += 1
        if self.error is not None:
            raise self.error
        return self._inner.recvfrom_into(buffer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Turns(MemoryReactorClock):
    """A reactor whose turns are the test's."""

    def turn(self) -> None:
        """Makes the calls that wait, and not those that they lead to."""
        due, self.calls[:] = list(self.calls), []
        for call in due:
            call.called = 1
            call.func(*call.args, **call.kw)


class Case(SynchronousTestCase):
    """A port whose reactor is the test, over a real socket: on loopback what was sent has come."""

    interface = "127.0.0.1"

    def setUp(self) -> None:
        self.now = 1000.0
        self.patch(_datagram_ports, "monotonic", lambda: self.now)
        self.patch(_datagram_ports, "processors", lambda: 2)
        self.reactor = Turns()
        self.taker = Taker()
        self.port = self.opened(self.taker)
        self.counting: Any = Counting(self.port.socket)
        self.port.socket = self.counting
        family = socket.AF_INET6 if ":" in self.interface else socket.AF_INET
        self.peer = socket.socket(family, socket.SOCK_DGRAM)
        self.addCleanup(self.peer.close)
        self.peer.bind((self.interface, 0))

    def opened(self, taker: Taker) -> DatagramPort:
        port = DatagramPort(0, taker, self.interface, LARGEST_SIZE, self.reactor)
        port.startListening()
        self.addCleanup(lambda: port.connected and port.connectionLost())
        return port

    def send(self, *datagrams: bytes) -> None:
        for datagram in datagrams:
            self.peer.sendto(datagram, (self.interface, self.port.getHost().port))

    def turn(self) -> int:
        """The reactor finds that there is something to read; how many datagrams that gave."""
        before = len(self.taker.came)
        self.port.doRead()
        return len(self.taker.came) - before


class Reading(Case):
    def test_it_is_what_twisted_listens_with(self) -> None:
        verifyObject(IListeningPort, self.port)
        assert self.port in self.reactor.readers
        assert self.port.getHost().host == "127.0.0.1"
        self.port.stopListening()
        assert self.port not in self.reactor.readers

    def test_datagrams_that_come_one_at_a_time_take_hardly_more_reads_than_there_are(self) -> None:
        for number in range(160):
            self.send(b"%d" % number)
            assert self.turn() == 1
        assert self.counting.reads <= 160 + 160 // 16 + 1

    def test_a_burst_is_read_in_order_and_no_turn_takes_more_than_its_share(self) -> None:
        sent = [b"%d" % number for number in range(3 * MOST_IN_A_TURN)]
        self.send(*sent)
        turns = []
        while self.taker.came != sent:
            turns.append(self.turn())
            assert 0 < turns[-1] <= MOST_IN_A_TURN
        assert max(turns) == MOST_IN_A_TURN
        assert len(turns) <= 16 + 4
        # It goes on so, at once, where another burst comes soon.
        self.send(*sent[:MOST_IN_A_TURN])
        assert self.turn() == MOST_IN_A_TURN

    def test_where_bursts_are_over_it_reads_one_at_a_time_again(self) -> None:
        self.send(*[b"burst"] * 20)
        while len(self.taker.came) < 20:
            self.turn()
        for _ in range(40):
            self.send(b"one")
            self.turn()
        before = self.counting.reads
        for _ in range(10):
            self.send(b"one")
            self.turn()
        assert self.counting.reads - before <= 11

    def test_where_there_is_nothing_to_read_after_all_nothing_happens(self) -> None:
        assert self.turn() == 0
        self.send(b"later")
        assert self.turn() == 1

    def test_the_largest_datagram_comes_whole_and_what_came_before_it_stays_as_it_was(self) -> None:
        self.peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        large = bytes(range(256)) * 256
        self.send(b"small", large[:LARGEST_SIZE], b"", b"tiny")
        while len(self.taker.came) < 4:
            self.turn()
        assert self.taker.came == [b"small", large[:LARGEST_SIZE], b"", b"tiny"]
        assert set(self.taker.sources) == {self.peer.getsockname()}

    def test_what_cannot_be_taken_is_logged_and_the_rest_comes(self) -> None:
        def then(datagram: bytes) -> None:
            if datagram == b"bad":
                raise ValueError(datagram)

        self.taker.then = then
        self.send(b"bad", b"good")
        assert self.turn() + self.turn() == 2
        assert len(self.flushLoggedErrors(ValueError)) == 1

    def test_a_port_that_is_closed_while_it_reads_reads_no_more(self) -> None:
        self.send(*[b"%d" % number for number in range(40)])
        while self.turn() == 1:
            pass
        self.send(b"last", b"too late")
        self.taker.then = lambda _: self.port.connectionLost()
        assert self.turn() == 1
        assert self.taker.came[-1] == b"last"
        assert not self.port.connected

    def test_an_error_of_the_socket_is_for_the_reactor_which_closes_it(self) -> None:
        self.counting.error = OSError(errno.EIO, "broken")
        with self.assertRaises(OSError):
            self.port.doRead()
        self.counting.error = InterruptedError(errno.EINTR, "a signal")
        self.port.doRead()
        # What a port that is not connected is told of one of its datagrams is no concern of the others.
        self.counting.error = ConnectionRefusedError(errno.ECONNREFUSED, "refused")
        self.port.doRead()
        assert self.taker.refused == 0
        self.counting.error = None
        self.send(b"more")
        assert self.turn() == 1

    def test_a_connected_port_is_told_that_nothing_listens_and_reads_on(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as early:
            early.bind(("127.0.0.1", 0))
            number = early.getsockname()[1]
        taker = Taker()
        port = self.opened(taker)
        port.connect("127.0.0.1", number)
        port.write(b"anybody?")
        port.doRead()
        assert taker.refused == 1
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as late:
            late.bind(("127.0.0.1", number))
            late.sendto(b"here", ("127.0.0.1", port.getHost().port))
        port.doRead()
        assert taker.came == [b"here"]
        assert taker.sources == [("127.0.0.1", number)]
        assert taker.refused == 1


class OverIPv6(Case):
    interface = "::1"

    def test_addresses_are_a_host_and_a_port(self) -> None:
        self.send(b"six")
        assert self.turn() == 1
        assert self.taker.sources == [self.peer.getsockname()[:2]]


class StayingAwake(Case):
    @property
    def is_awake(self) -> bool:
        """Whether the reactor has a turn to go to at once."""
        return bool(self.reactor.getDelayedCalls())

    def later(self, seconds: float) -> None:
        """Time passes, and turns with it."""
        self.now += seconds
        self.reactor.turn()

    def came(self) -> None:
        self.send(b"x")
        assert self.turn() == 1

    def test_after_a_datagram_the_reactor_has_turns_for_a_moment(self) -> None:
        assert not self.is_awake
        self.came()
        for _ in range(9):
            assert self.is_awake
            self.later(AWAKE / 10)
        assert self.is_awake
        self.later(AWAKE / 5)
        assert not self.is_awake

    def test_one_that_comes_within_it_is_waited_after_as_long(self) -> None:
        self.came()
        self.later(AWAKE * 0.8)
        self.came()
        self.later(AWAKE * 0.8)
        assert self.is_awake
        assert len(self.reactor.getDelayedCalls()) == 1
        self.later(AWAKE * 0.4)
        assert not self.is_awake

    def test_where_it_is_in_vain_it_is_given_up_and_tried_again_now_and_then(self) -> None:
        woke = []
        for _ in range(PATIENCE + 3 * RETRY_AFTER):
            self.came()
            woke.append(self.is_awake)
            self.later(AWAKE * 2)
            assert not self.is_awake
        assert woke[:PATIENCE] == [True] * PATIENCE
        assert woke.count(True) <= PATIENCE + 3
        assert True in woke[PATIENCE:]

    def test_where_it_is_of_use_again_it_is_done_again(self) -> None:
        for _ in range(PATIENCE + 1):
            self.came()
            self.later(AWAKE * 2)
        assert not self.is_awake
        while not self.is_awake:
            self.came()
        for _ in range(PATIENCE):
            self.came()
        for _ in range(PATIENCE - 1):
            self.later(AWAKE * 2)
            assert not self.is_awake
            self.came()
            assert self.is_awake

    def test_where_it_is_in_vain_more_often_than_not_it_is_given_up(self) -> None:
        awake = 0
        for _ in range(2 * RETRY_AFTER):
            self.came()
            self.later(AWAKE / 2)
            self.came()
            awake += self.is_awake
            self.later(AWAKE * 2)
            self.came()
            self.later(AWAKE * 2)
        assert 0 < awake < RETRY_AFTER

    def test_where_it_is_of_use_more_often_than_not_it_goes_on(self) -> None:
        for _ in range(2 * RETRY_AFTER):
            for _ in range(3):
                self.came()
                assert self.is_awake
                self.later(AWAKE / 2)
            self.later(AWAKE)

    def test_a_turn_that_found_nothing_keeps_nobody_awake(self) -> None:
        assert self.turn() == 0
        assert not self.is_awake

    def test_a_stranger_keeps_nobody_awake(self) -> None:
        self.taker.is_known = False
        self.came()
        assert not self.is_awake

    def test_a_port_that_is_closed_keeps_nobody_awake(self) -> None:
        self.came()
        assert self.is_awake
        self.port.connectionLost()
        assert not self.is_awake
        self.port = self.opened(self.taker)
        self.taker.then = lambda _: self.port.connectionLost()
        self.came()
        assert not self.is_awake

    def test_where_there_is_one_processor_nobody_is_kept_from_it(self) -> None:
        self.patch(_datagram_ports, "processors", lambda: 1)
        self.taker = Taker()
        self.port = self.opened(self.taker)
        self.came()
        assert not self.is_awake

    def test_processors_are_those_that_this_process_may_use(self) -> None:
        self.patch(_datagram_ports.os, "sched_getaffinity", lambda _: {3})
        assert _PROCESSORS() == 1
        self.patch(_datagram_ports.os, "sched_getaffinity", lambda _: {1, 3})
        assert _PROCESSORS() == 2


# The function itself, which cases replace.
_PROCESSORS = _datagram_ports.processors


class Speech(Protocol):
    @request
    async def upper(self, text: str) -> str:
        return text.upper()


@pytest_twisted.ensureDeferred
async def test_either_end_of_a_conversation_keeps_awake_and_what_is_of_none_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_datagram_ports, "processors", lambda: 2)
    kept: list[type] = []

    def stay_awake(port: DatagramPort, *, is_in_time: bool) -> None:
        kept.append(type(port.protocol))

    monkeypatch.setattr(DatagramPort, "_stay_awake", stay_awake)
    server: Any = await listen(reactor, "udp:0:interface=127.0.0.1", Factory(Speech))
    try:
        came: Deferred[None] = Deferred()
        receive = server.datagramReceived

        def received(datagram: bytes, address: Any) -> bool:
            known: bool = receive(datagram, address)
            if not came.called:
                came.callback(None)
            return known

        server.datagramReceived = received
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            stranger.sendto(b"x" * 100, ("127.0.0.1", server.getHost().port))
            await came
        await deferLater(reactor, 0, lambda: None)  # type: ignore[arg-type]
        assert kept == []
        async with connect(reactor, f"udp:127.0.0.1:{server.getHost().port}", Speech) as speech:
            kept.clear()
            for _ in range(100):
                assert await speech.upper("hello") == "HELLO"
        assert kept.count(DatagramServer) >= 100
        assert kept.count(_ClientSocket) >= 100
    finally:
        await server.stopListening()


@pytest_twisted.ensureDeferred
async def test_a_flood_of_datagrams_leaves_the_reactor_its_other_turns() -> None:
    count = 2000
    taker = Taker()
    port = open_port(reactor, 0, taker, "127.0.0.1")
    try:
        assert isinstance(port, DatagramPort)
        port.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as flood:
            flood.connect(("127.0.0.1", port.getHost().port))
            for _ in range(count):
                flood.send(b"x")
        # Others have a turn after each share, beginning with the first.
        seen = []
        done: Deferred[None] = Deferred()

        def look() -> None:
            seen.append(len(taker.came))
            if seen[-1] - (seen[-2] if len(seen) > 1 else 0) == 0 and len(seen) > 1:
                done.callback(None)
            else:
                reactor.callLater(0, look)  # type: ignore[attr-defined]

        reactor.callLater(0, look)  # type: ignore[attr-defined]
        await done
        assert max(after - before for before, after in itertools.pairwise(seen)) <= MOST_IN_A_TURN
        assert seen[-1] > 3 * MOST_IN_A_TURN
    finally:
        await port.stopListening()
