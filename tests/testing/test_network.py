"""The simulated network does what it says, and the same for the same seed."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.error import CannotListenError, InvalidAddressError, MessageLengthError
from twisted.internet.interfaces import IHalfCloseableProtocol, IReactorCore, IReactorTCP, IReactorTime, IReactorUDP
from twisted.internet.protocol import ClientFactory, DatagramProtocol, ServerFactory
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.internet.task import deferLater
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from protoframe import ConnectFailed, DeadlineExceeded, Factory, Protocol, request, timeout
from protoframe.testing import Conditions, Network, Stuck, run_seeds
from tests.processes import environment

pytest_plugins = ("pytester",)

RUN = """
from tests.testing.test_network import Speech
from protoframe.testing import Network
network = Network(5, loss=0.2, duplicate=0.2, reorder=0.2, jitter=0.01, corrupt=0.1)
for kind in ("udp", "tcp"):
    where = network.serve(Speech, f"{kind}:12000")
    speech = network.run(network.connect(where, Speech))
    for text in ("a", "b" * 5000):
        assert network.run(speech.upper(text)) == text.upper()
print(network.now, network.trace())
"""


class Speech(Protocol):
    @request
    async def upper(self, text: str) -> str:
        return text.upper()


class Taker(DatagramProtocol):
    noisy = False

    def __init__(self) -> None:
        self.got: list[tuple[float, bytes, Any]] = []
        self.refused = 0
        self.network: Any = None

    def datagramReceived(self, datagram: bytes, addr: Any) -> None:
        self.got.append((self.network.now, datagram, addr))

    def connectionRefused(self) -> None:
        self.refused += 1


class Pair:
    """Two hosts, each with a UDP port."""

    def __init__(self, **conditions: Any) -> None:
        self.network = Network(1, **conditions)
        self.one, self.other = Taker(), Taker()
        self.one.network = self.other.network = self.network
        self.port = self.network.host("one").listenUDP(1000, self.one)
        self.network.host("other").listenUDP(2000, self.other)
        self.to = (self.network.host("other").ipv4, 2000)

    def send(self, count: int, size: int = 100) -> list[tuple[float, bytes, Any]]:
        """Sends numbered datagrams; what arrives."""
        for number in range(count):
            self.port.write(number.to_bytes(4).ljust(size, b"."), self.to)
        self.network.advance(100.0)
        return self.other.got


class Chance(SynchronousTestCase):
    def test_the_same_seed_gives_the_same_to_the_last_packet_in_another_process_too(self):
        outputs = {
            subprocess.run(
                [sys.executable, "-c", RUN],
                env=environment(PYTHONHASHSEED=seed),
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for seed in ("1", "2")
        }
        self.assertEqual(len(outputs), 1)
        self.assertIn("lost", outputs.pop())

    def test_probabilities_are_what_they_are_said_to_be(self):
        self.assertEqual(len(Pair().send(1000)), 1000)
        self.assertTrue(650 < len(Pair(loss=0.3).send(1000)) < 750)
        self.assertTrue(1250 < len(Pair(duplicate=0.3).send(1000)) < 1350)
        got = [datagram for _, datagram, _ in Pair(corrupt=0.3).send(1000)]
        intact = {number.to_bytes(4).ljust(100, b".") for number in range(1000)}
        self.assertTrue(250 < len([one for one in got if one not in intact]) < 350)
        order = [int.from_bytes(datagram[:4]) for _, datagram, _ in Pair(reorder=0.3).send(1000)]
        self.assertNotEqual(order, sorted(order))

    def test_what_is_due_at_once_is_done_in_an_order_of_the_seeds(self):
        orders = set()
        for seed in range(20):
            network = Network(seed)
            done: list[int] = []
            for number in range(3):
                network.host("a").callLater(1.0, done.append, number)
            network.advance(2.0)
            orders.add(tuple(done))
        self.assertEqual(len(orders), 6)

    def test_delay_bandwidth_and_the_queue_are_kept(self):
        ((when, _, _),) = Pair(delay=0.25).send(1)
        self.assertEqual(when, 0.25)
        got = Pair(delay=0.0, bandwidth=12_800.0, queue=10**6).send(100)
        self.assertAlmostEqual(got[-1][0], 1.0)
        self.assertEqual(len(Pair(bandwidth=12_800.0, queue=1280).send(100)), 11)

    def test_what_is_larger_than_the_path_takes_vanishes_and_than_the_interface_raises(self):
        self.assertEqual(len(Pair(mtu=500).send(3, 473)), 0)
        self.assertEqual(len(Pair(mtu=500).send(3, 472)), 3)
        pair = Pair()
        pair.network.host("one").interface_mtu = 500
        with pytest.raises(MessageLengthError):
            pair.send(1, 473)

    def test_a_partition_lets_nothing_through_until_it_heals(self):
        pair = Pair()
        pair.network.partition("one", "other")
        self.assertEqual(pair.send(5), [])
        pair.network.heal()
        self.assertEqual(len(pair.send(5)), 5)

    def test_an_address_that_changes_is_seen_and_the_old_one_leads_nowhere(self):
        pair = Pair()
        host = pair.network.host("one")
        before = host.ipv4
        pair.send(1)
        host.change_address()
        host.change_ports()
        pair.send(1)
        self.assertEqual([addr for _, _, addr in pair.other.got], [(before, 1000), (host.ipv4, 1001)])
        pair.other.transport.write(b"x", (before, 1000))
        pair.other.transport.write(b"y", (host.ipv4, 1001))
        pair.network.advance(1.0)
        self.assertEqual([datagram for _, datagram, _ in pair.one.got], [b"y"])

    def test_a_port_where_nothing_listens_refuses(self):
        network = Network(1)
        taker = Taker()
        port = network.host("one").listenUDP(0, taker)
        port.connect(network.host("other").ipv4, 7)
        port.write(b"x")
        network.advance(1.0)
        self.assertEqual(taker.refused, 1)


class Hosts(SynchronousTestCase):
    def test_a_host_is_a_reactor_but_not_the_real_one(self):
        host = Network(1).host("a")
        for interface in (IReactorTime, IReactorTCP, IReactorUDP):
            verifyObject(interface, host)
        self.assertFalse(IReactorCore.providedBy(host))

    def test_a_port_that_is_taken_cannot_be_had(self):
        host = Network(1).host("a")
        host.listenUDP(5, Taker())
        with pytest.raises(CannotListenError):
            host.listenUDP(5, Taker())

    def test_a_host_that_crashes_has_no_timers_left(self):
        network = Network(1)
        done: list[int] = []
        network.host("a").callLater(1.0, done.append, 1)
        network.host("a").crash()
        network.advance(2.0)
        self.assertEqual(done, [])


class Running(SynchronousTestCase):
    def test_what_cannot_come_is_told_and_what_takes_too_long(self):
        network = Network(17)
        with pytest.raises(Stuck, match=r"seed 17 .*nothing is left that could happen"):
            network.run(Deferred())
        with pytest.raises(Stuck, match="it takes longer than 5 s"):
            network.run(deferLater(network.host("a"), 6.0), 5.0)

    def test_a_failure_says_its_seed_and_how_to_have_it_again(self):
        async def scenario(network: Network) -> None:
            if network.seed == 7:
                raise ValueError("seven")

        with pytest.raises(ValueError, match="seven") as failed:
            run_seeds(scenario, 20)
        self.assertIn("PROTOFRAME_SEED=7", failed.value.__notes__[0])
        self.assertEqual(run_seeds(scenario, range(8, 20)), 12)

    def test_wrong_conditions_are_refused(self):
        for wrong in ({"loss": 1.1}, {"delay": -1}, {"bandwidth": 0}, {"mtu": 10}, {"queue": -1}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                Conditions(**wrong)  # type: ignore[arg-type]

    def test_a_thousand_seeds_take_seconds(self):
        async def scenario(network: Network) -> None:
            from protoframe import Factory, listen

            await listen(network.host("server"), "udp:12000", Factory(Speech))
            async with network.connect("udp:server:12000", Speech) as speech:
                for text in "abc":
                    assert await speech.upper(text) == text.upper()

        self.assertEqual(run_seeds(scenario, range(1000), loss=0.1, duplicate=0.1), 1000)


def test_the_plugin_gives_a_network_and_tells_its_seed(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        def test_fails(pf_net):
            assert pf_net.seed == 0

        def test_passes(pf_net):
            pf_net.advance(5.0)
            assert pf_net.now == 5.0
        """
    )
    result = pytester.runpytest_subprocess("--pf-seed=4711")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*pf_net had seed 4711*", "to replay it: pytest --pf-seed=4711 *test_fails*"])


def test_the_plugin_imports_nothing_until_it_is_asked(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import sys\n\ndef test_it():\n    assert 'twisted' not in sys.modules\n")
    result = pytester.runpytest_subprocess("-p", "no:pytest_twisted", "-p", "no:twisted", "-p", "no:hypothesispytest")
    result.assert_outcomes(passed=1)


class Sleeper(Protocol):
    def __init__(self, clock: Any) -> None:
        self.clock = clock

    @request
    async def nap(self, seconds: float) -> None:
        await deferLater(self.clock, seconds)


class SleeperFactory(Factory):
    def __init__(self, clock: Any) -> None:
        super().__init__(Sleeper)
        self.clock = clock

    def create(self, protocol: Any) -> Any:
        return protocol(self.clock)


def sleeping(network: Network, kind: str) -> Any:
    return network.run(network.connect(network.serve(SleeperFactory(network.host("server")), f"{kind}:0"), Sleeper))


class Deadlines(SynchronousTestCase):
    def test_a_deadline_is_in_the_time_of_the_network_whatever_the_wall_clock_does(self):
        for kind in ("udp", "tcp"):
            network = Network(1)
            sleeper = sleeping(network, kind)
            ends = []

            async def nap(sleeper=sleeper, network=network, ends=ends):
                with timeout(2.0):
                    await sleeper.nap(0.9)
                    await sleeper.nap(0.9)
                    # The wall clock has nothing to do with it.
                    time.sleep(0.3)  # noqa: ASYNC251
                    try:
                        await sleeper.nap(0.9)
                    except DeadlineExceeded:
                        ends.append(network.now)

            began = network.now
            network.run(nap())
            self.assertEqual([round(end - began, 6) for end in ends], [2.0])

    def test_a_server_that_drains_does_so_in_one_order(self):
        script = (
            "import hashlib\nfrom tests.testing.test_network import *\nfrom protoframe import Factory\ntraces = []\n"
            "for seed in range(5):\n"
            "    network = Network(seed, jitter=0.01, loss=0.1)\n"
            "    factory = Factory(Speech, reactor=network.host('server'))\n"
            "    where = network.serve(factory)\n"
            "    for number in range(6):\n"
            "        network.run(network.connect(where, Speech, host=f'client{number}'))\n"
            "    async def drain():\n        with timeout(5.0):\n            await factory.drain()\n"
            "    network.run(drain())\n    traces.append(network.trace())\n"
            "print(hashlib.sha256(repr(traces).encode()).hexdigest())\n"
        )
        outputs = set()
        for number in range(3):
            done = subprocess.run(
                [sys.executable, "-c", script],
                env=environment() | {"PYTHONHASHSEED": str(number)},
                capture_output=True,
                text=True,
                check=True,
            )
            outputs.add(done.stdout)
        self.assertEqual(len(outputs), 1)

    def test_time_does_not_run_backwards(self):
        network = Network(1)
        network.advance(10.0)
        self.assertRaises(ValueError, network.advance, -5.0)
        network.host("one").callLater(1.0, network.advance, 10.0)
        network.advance(2.0)
        self.assertEqual(network.now, 21.0)

    def test_it_is_not_settled_while_a_packet_is_on_its_way(self):
        pair = Pair(delay=2.5)
        pair.port.write(b"late", pair.to)
        pair.network.settle()
        self.assertEqual([datagram for _, datagram, _ in pair.other.got], [b"late"])


class Mistakes(SynchronousTestCase):
    def test_a_host_that_there_is_not_is_told(self):
        network = Network(1)
        network.host("client")
        self.assertIn("'clinet'", str(self.assertRaises(ValueError, network.partition, "clinet", "client")))
        self.assertRaises(ValueError, network.set, "client", "sever", loss=1.0)

    def test_a_seed_is_a_number_and_there_is_one(self):
        self.assertRaises(ValueError, Network, -5)
        self.assertRaises(ValueError, run_seeds, None, 0)
        self.assertRaises(TypeError, Conditions, loss="0.3")

    def test_what_serve_says_is_where_it_listens(self):
        for where in ("udp:0", "tcp:0", "udp:interface=10.0.0.2:port=12000", r"udp:interface=fd00\:\:1:port=12001"):
            network = Network(1)
            speech = network.run(network.connect(network.serve(Speech, where), Speech))
            self.assertEqual(network.run(speech.upper("a")), "A")

    def test_an_address_that_is_none_is_refused(self):
        pair = Pair()
        for address in (("other", 2000), ("fd00::1", 2000), ("10.0.0.2", 70000), ("10.0.0.2", "5")):
            self.assertRaises(InvalidAddressError, pair.port.write, b"", address)


class Loopback(SynchronousTestCase):
    def test_it_is_the_hosts_own(self):
        for kind in ("udp", "tcp"):
            network = Network(1)
            where = network.serve(Speech, f"{kind}:12000:interface=127.0.0.1")
            own = network.run(network.connect(f"{kind}:127.0.0.1:12000", Speech, host="server"))
            self.assertEqual(network.run(own.upper("a")), "A")
            self.assertRaises(ConnectFailed, network.run, network.connect(where, Speech))


class Told(TwistedProtocol):
    """Writes down what it is told."""

    def __init__(self, events: list[str], name: str, on_made: Any = None) -> None:
        self.events = events
        self.name = name
        self.on_made = on_made

    def connectionMade(self) -> None:
        if self.on_made is not None:
            self.on_made(self.transport)

    def connectionLost(self, reason: Any = None) -> None:
        self.events.append(f"{self.name} {reason.type.__name__}")


class ToldClient(ClientFactory):
    noisy = False

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def buildProtocol(self, addr: Any) -> Any:
        return Told(self.events, "client")

    def clientConnectionLost(self, connector: Any, reason: Any) -> None:
        self.events.append("lost")

    def stopFactory(self) -> None:
        self.events.append("stopped")


@implementer(IHalfCloseableProtocol)
class Half(Told):
    def readConnectionLost(self) -> None:
        self.events.append(f"{self.name} read all")
        self.transport.write(b"the answer")
        self.transport.loseConnection()

    def writeConnectionLost(self) -> None:
        self.events.append(f"{self.name} wrote all")

    def dataReceived(self, data: bytes) -> None:
        self.events.append(f"{self.name} {data.decode()}")


class Streams(SynchronousTestCase):
    def one_that_closes(self, seed: int, **conditions: Any) -> list[str]:
        """What both ends are told where a server writes and closes."""
        network = Network(seed, **conditions)
        events: list[str] = []
        server = ServerFactory()
        server.buildProtocol = lambda _: Told(  # type: ignore[method-assign]
            events, "server", lambda transport: (transport.write(b"x" * 100), transport.loseConnection())
        )
        network.host("server").listenTCP(80, server)
        network.host("client").connectTCP("server", 80, ToldClient(events))
        network.advance(600.0)
        network.close()
        return events

    def test_the_factory_of_a_client_is_told_of_the_end(self):
        events = self.one_that_closes(1)
        self.assertEqual(events.count("server ConnectionDone"), 1)
        events.remove("server ConnectionDone")
        self.assertEqual(events, ["client ConnectionDone", "lost", "stopped"])

    def test_one_that_closes_in_order_does_so_also_where_packets_get_lost(self):
        for seed in range(100):
            events = self.one_that_closes(seed, loss=0.3)
            self.assertEqual([event for event in events if event.endswith("ConnectionLost")], [], seed)

    def test_one_direction_can_be_closed_alone(self):
        network = Network(3)
        events: list[str] = []
        server = ServerFactory()
        server.buildProtocol = lambda _: Half(events, "server")  # type: ignore[method-assign]
        network.host("server").listenTCP(80, server)

        class HalfClient(ToldClient):
            def buildProtocol(self, addr: Any) -> Any:
                return Half(self.events, "client", lambda transport: transport.loseWriteConnection())

        network.host("client").connectTCP("server", 80, HalfClient(events))
        network.advance(60.0)
        self.assertIn("client the answer", events)
        self.assertIn("client wrote all", events)
        self.assertEqual(events.count("server read all"), 1)
        self.assertEqual(events.count("server ConnectionDone"), 1)

    def test_the_factory_of_a_host_that_crashed_hears_nothing_any_more(self):
        network = Network(1)
        events: list[str] = []
        client = ToldClient(events)
        client.clientConnectionFailed = lambda *_: events.append("failed")  # type: ignore[method-assign]
        network.host("server")
        network.set(loss=1.0)
        network.host("client").connectTCP("server", 80, client)
        network.advance(1.0)
        network.host("client").crash()
        network.advance(100.0)
        self.assertEqual(events, [])

    def test_timers_that_were_cancelled_are_forgotten(self):
        host = Network(1).host("one")
        for _ in range(10_000):
            host.callLater(1.0, list).cancel()
        self.assertLess(len(host._calls), 1000)


def test_the_seed_is_told_where_a_fixture_fails(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.fixture
        def fails(pf_net):
            raise AssertionError

        @pytest.fixture
        def fails_after(pf_net):
            yield
            raise AssertionError

        def test_one(fails): pass
        def test_other(fails_after): pass

        @pytest.mark.parametrize("text", ["a b"])
        def test_seeds(text):
            from protoframe.testing import run_seeds
            async def scenario(network): raise AssertionError
            run_seeds(scenario, 3)
        """
    )
    result = pytester.runpytest_subprocess("--pf-seed=4711")
    assert result.stdout.str().count("pf_net had seed 4711") == 2
    result.stdout.fnmatch_lines(["*pytest 'test_the_seed_is_told_where_a_fixture_fails.py::test_seeds[[]a b]'"])
