"""`Client` in virtual time: connections and servers that go and come, calls made again, and several servers."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, fail, gatherResults, succeed
from twisted.internet.task import deferLater
from twisted.names import dns
from twisted.names.error import DNSNameError
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from protoframe import (
    Backoff,
    Client,
    ClientState,
    ConnectFailed,
    ConnectionLost,
    DeadlineExceeded,
    Error,
    Factory,
    Identity,
    IInterceptor,
    NotFound,
    Protocol,
    RetryPolicy,
    SessionLost,
    Token,
    TokenAuthenticator,
    TryLater,
    Unauthenticated,
    current_call,
    metadata,
    request,
    timeout,
)
from protoframe.health import Health
from protoframe.testing import Network

KINDS = ("tcp", "udp")


class Work(Protocol):
    """Counts what runs."""

    @request
    async def add(self, key: str, seconds: float = 0.01, late: bool = False) -> str:
        return await self.factory.add(key, seconds, late)  # type: ignore[attr-defined, no-any-return]

    @request(idempotent=True)
    async def get(self, seconds: float = 0.0) -> str:
        return await self.factory.get(seconds)  # type: ignore[attr-defined, no-any-return]

    @request
    async def later(self, times: int, seconds: float) -> int:
        self.factory.runs["later"] += 1
        if self.factory.runs["later"] <= times:
            raise TryLater(retry_after=seconds)
        return self.factory.runs["later"]

    @request
    async def seen(self) -> dict[str, str]:
        return dict(current_call().metadata)

    @request
    def numbers(self, count: int) -> AsyncIterator[int]:
        return self.factory.numbers(count)  # type: ignore[attr-defined, no-any-return]

    @request
    async def total(self, numbers: AsyncIterator[int]) -> int:
        return sum([number async for number in numbers])

    @request(oneway=True)
    async def note(self, key: str) -> None:
        self.factory.runs[key] += 1


class WorkFactory(Factory):
    def __init__(self, host: Any, runs: Counter[str] | None = None, **options: Any) -> None:
        super().__init__(Work, reactor=host, **options)
        self.host = host
        self.runs: Counter[str] = runs if runs is not None else Counter()
        self.slowness = 0.0

    async def add(self, key: str, seconds: float, late: bool) -> str:
        if not late:
            self.runs[key] += 1
        await deferLater(self.host, seconds)
        if late:
            self.runs[key] += 1
        return key

    async def get(self, seconds: float) -> str:
        self.runs["get"] += 1
        await deferLater(self.host, seconds + self.slowness)
        return self.host.name

    async def numbers(self, count: int) -> AsyncIterator[int]:
        for number in range(count):
            yield number
            await deferLater(self.host, 0.1)


class World:
    """Some servers and a client that is started."""

    def __init__(self, kind: str = "tcp", servers: int = 1, seed: int = 1, options: Any = None, **asked: Any) -> None:
        self.network = Network(seed)
        self.kind = kind
        self.options = options or {}
        self.factories = [self.serve(f"server{number}") for number in range(servers)]
        self.host = self.network.host("client")
        where = [f"{kind}:server{number}:12000" for number in range(servers)]
        self.client = Client(self.host, where if servers > 1 else where[0], Work, **asked)
        self.client.startService()
        self.work: Any = self.network.run(self.client.whenConnected())
        self.network.advance(0.1)

    def serve(self, name: str, runs: Counter[str] | None = None) -> WorkFactory:
        factory = WorkFactory(self.network.host(name), runs, **self.options)
        self.network.serve(factory, f"{self.kind}:12000", name)
        return factory

    @property
    def factory(self) -> WorkFactory:
        return self.factories[0]

    @property
    def runs(self) -> Counter[str]:
        return self.factory.runs

    def run(self, what: Any, seconds: float = 60.0) -> Any:
        return self.network.run(what, seconds)

    def reset(self, factory: WorkFactory | None = None) -> None:
        """Breaks all connections of a server."""
        for connection in list((factory or self.factory)._connections):
            connection._carrier.abort()

    def restart(self, seconds: float = 0.5, number: int = 0) -> None:
        """Ends a server without a word, and starts it again."""
        runs = self.factories[number].runs
        self.reset(self.factories[number])
        self.network.advance(0.003)
        self.network.host(f"server{number}").crash()
        self.network.advance(seconds)
        self.factories[number] = self.serve(f"server{number}", runs)


class Each(SynchronousTestCase):
    def each(self, **options: Any) -> Any:
        for kind in KINDS:
            with self.subTest(kind):
                world = World(kind, **options)
                yield world
                self.run_out(world)

    def run_out(self, world: World) -> None:
        """In the end nothing is left, anywhere."""
        world.run(world.client.stopService())
        world.network.advance(1.0)
        # No timer either, which trial would complain of.
        timers = [call for call in world.host.getDelayedCalls() if call.active()]
        self.assertEqual(timers, [])
        world.network.advance(300.0)
        for factory in world.factories:
            self.assertEqual(len(factory._connections), 0)
            keeper = factory._keeper
            self.assertTrue(keeper is None or (len(keeper.sessions), keeper.sessions.octets) == (0, 0))
        self.assertEqual([link.calls for link in world.client._links], [{}] * len(world.factories))
        self.assertEqual(world.client.state, ClientState.IDLE)

    def failed(self, world: World, what: Any, kind: type[Any], seconds: float = 60.0) -> Any:
        return self.assertRaises(kind, world.run, what, seconds)


class Opening(Each):
    def test_the_first_connection_fails_fast(self):
        for kind in KINDS:
            network = Network(1)
            network.host("server")
            client = Client(network.host("client"), f"{kind}:server:12000", Work)

            async def use(client=client):
                async with client:
                    self.fail("there is no server")

            error = self.assertRaises(ConnectFailed, network.run, use())
            self.assertFalse(error.may_have_run)
            self.assertLess(network.now, 1.0)
            self.assertEqual(client.state, ClientState.IDLE)

    def test_of_several_servers_one_is_enough(self):
        network = Network(1)
        network.host("server0")
        network.serve(WorkFactory(network.host("server1")), "tcp:12000", "server1")
        client = Client(network.host("client"), ["tcp:server0:12000", "tcp:server1:12000"], Work)
        client.startService()
        work = network.run(client.whenConnected())
        self.assertEqual(network.run(work.get()), "server1")

    def test_as_a_service_it_waits_for_the_server_and_calls_do_too(self):
        for kind in KINDS:
            network = Network(1)
            host = network.host("server")
            client = Client(network.host("client"), f"{kind}:server:12000", Work)
            states = []
            client.watch(states.append)
            client.startService()
            network.advance(100.0)
            call = client.proxy.add("a")
            network.advance(3.0)
            factory = WorkFactory(host)
            network.serve(factory, f"{kind}:12000")
            began = network.now
            self.assertEqual(network.run(call), "a")
            # However long it had been in vain.
            self.assertLess(network.now - began, 3.0)
            self.assertEqual(states, [ClientState.CONNECTING, ClientState.UNAVAILABLE, ClientState.READY])
            network.run(client.stopService())
            self.assertEqual(states[-1], ClientState.IDLE)

    def test_a_call_that_waits_in_vain_did_not_run_and_is_told_why(self):
        network = Network(1)
        network.host("server")
        client = Client(network.host("client"), "tcp:server:12000", Work)
        client.startService()
        error = self.assertRaises(DeadlineExceeded, network.run, client.proxy.add("a"))
        self.assertFalse(error.may_have_run)
        self.assertIn("refused", str(error))

    def test_it_is_started_before_it_is_used_and_says_so(self):
        client = Client(Network(1).host("client"), "tcp:server:12000", Work)
        for call in (client.proxy.add("a"), client.whenConnected(), client.proxy.note("a")):
            self.assertFalse(self.failureResultOf(call, ConnectFailed).value.may_have_run)

    def test_what_is_wrong_is_told_at_once(self):
        host = Network(1).host("client")
        self.assertRaises(ValueError, Client, host, "tcp:server:port", Work)
        self.assertRaises(ValueError, Client, host, [], Work)
        self.assertRaises(ValueError, Client, host, "tcp:server:1", Work, retries={"nothing": RetryPolicy()})
        self.assertRaises(TypeError, Client, host, "tcp:server:1", object)
        self.assertRaises(TypeError, Client, host, "tcp:server:1", Work, token="secret")

    def test_who_is_not_known_is_told_so_and_does_not_wait(self):
        network = Network(1)
        authenticator = knows(ann="a-secret-of-twenty-octets")
        network.serve(WorkFactory(network.host("server"), authenticator=authenticator), "tcp:12000")
        client = Client(network.host("client"), "tcp:server:12000", Work, token=token("another-one-of-that-length"))
        client.startService()
        began = network.now
        self.assertRaises(Unauthenticated, network.run, client.proxy.add("a"))
        self.assertLess(network.now - began, 1.0)

    def test_it_can_be_stopped_and_started_again_and_again(self):
        for world in self.each():
            for _ in range(3):
                world.run(world.client.stopService())
                self.assertEqual(world.client.state, ClientState.IDLE)
                self.failureResultOf(world.work.add("never"), ConnectFailed)
                world.client.startService()
                self.assertIs(world.run(world.client.whenConnected()), world.work)
                self.assertEqual(world.run(world.work.add("a")), "a")
            # Also where it was in vain.
            world.run(world.client.stopService())
            world.network.partition("client", "server0")
            world.client.startService()
            world.network.advance(40.0)
            world.run(world.client.stopService())
            world.network.heal()
            world.client.startService()
            self.assertIs(world.run(world.client.whenConnected()), world.work)
            self.assertNotIn("never", world.runs)


class Surviving(Each):
    def test_a_call_that_runs_when_the_connection_is_lost_goes_on_and_has_its_answer(self):
        for world in self.each():
            calls = [world.work.add(f"{late}", 0.5, late) for late in (False, True)]
            world.network.advance(0.1)
            world.reset()
            self.assertEqual(world.run(gatherResults(calls)), ["False", "True"])
            self.assertEqual(world.runs, {"False": 1, "True": 1})

    def test_an_answer_that_was_lost_is_given_again(self):
        for world in self.each():
            call = world.work.add("a", 0.1)
            world.network.advance(0.05)
            world.network.partition("server0", "client")
            world.network.advance(0.2)
            world.client._links[0].connection._carrier.abort()
            world.network.advance(0.1)
            world.network.heal()
            self.assertEqual(world.run(call, 10.0), "a")
            self.assertEqual(world.runs, {"a": 1})

    def test_a_call_that_never_arrived_is_sent_again(self):
        for world in self.each():
            world.network.partition("server0", "client")
            call = world.work.add("a", 0.1)
            world.network.advance(0.05)
            world.client._links[0].connection._carrier.abort()
            world.network.heal()
            self.assertEqual(world.run(call, 10.0), "a")
            self.assertEqual(world.runs, {"a": 1})

    def test_several_losses_in_a_row_are_survived(self):
        for world in self.each(seed=3):
            with timeout_of(world, 100.0):
                calls = [world.work.add(str(number), 20.0, bool(number % 2)) for number in range(10)]
            for _ in range(8):
                world.network.advance(1.7)
                world.reset()
            self.assertEqual(world.run(gatherResults(calls), 60.0), [str(number) for number in range(10)])
            self.assertEqual(set(world.runs.values()), {1})

    def test_after_a_restart_the_truth_is_told(self):
        for world in self.each():
            calls = [world.work.add(f"{late}", 0.5, late) for late in (False, True)]
            world.network.advance(0.1)
            world.restart()
            for call in calls:
                self.assertTrue(self.failed(world, call, SessionLost).may_have_run)
            self.assertEqual(world.runs, {"False": 1})
            self.assertEqual(world.run(world.work.add("new")), "new")

    def test_an_idempotent_call_is_made_again_after_a_restart(self):
        for world in self.each():
            call = world.work.get(0.5)
            world.network.advance(0.1)
            world.restart()
            self.assertEqual(world.run(call), "server0")
            self.assertEqual((world.runs["get"], world.client.budget.retries), (2, 1))

    def test_the_deadline_is_kept_while_there_is_no_connection(self):
        for world in self.each():
            with timeout_of(world, 5.0):
                call = world.work.add("a", 100.0)
            began = world.network.now
            world.network.advance(0.1)
            world.reset()
            world.network.partition("server0", "client")
            self.assertTrue(self.failed(world, call, DeadlineExceeded).may_have_run)
            self.assertAlmostEqual(world.network.now - began, 5.0, 1)
            world.network.heal()

    def test_a_handler_whose_client_is_gone_ends_at_its_deadline(self):
        for world in self.each():
            with timeout_of(world, 5.0):
                call = world.work.add("a", 8.0, True)
            call.addErrback(lambda _: None)
            world.network.advance(0.1)
            world.network.partition("server0", "client")
            world.reset()
            world.network.advance(20.0)
            self.assertEqual(world.runs, {})
            world.network.heal()

    def test_one_that_is_given_up_meanwhile_is_not_sent_again(self):
        for world in self.each():
            world.network.partition("server0", "client")
            call = world.work.add("a", 0.1)
            world.network.advance(0.05)
            world.client._links[0].connection._carrier.abort()
            world.network.advance(0.01)
            call.cancel()
            self.failureResultOf(call, CancelledError)
            world.network.heal()
            world.network.advance(20.0)
            self.assertEqual(world.runs, {})

    def test_one_that_was_given_up_unseen_ends_at_its_deadline_though_the_client_is_back(self):
        for world in self.each():
            with timeout_of(world, 5.0):
                call = world.work.add("a", 8.0, True)
            world.network.advance(0.1)
            # The server does not learn that this connection is gone.
            world.network.partition("server0", "client")
            world.client._links[0].connection._carrier.abort()
            world.network.advance(0.01)
            call.cancel()
            self.failureResultOf(call, CancelledError)
            world.network.heal()
            world.network.advance(20.0)
            self.assertEqual((world.client.state, world.runs), (ClientState.READY, {}))

    def test_one_that_is_given_up_is_cancelled_there_also_where_it_runs_for_an_earlier_connection(self):
        for world in self.each():
            call = world.work.add("a", 8.0, True)
            world.network.advance(0.1)
            world.reset()
            world.network.advance(3.0)
            self.assertEqual(world.client.state, ClientState.READY)
            call.cancel()
            self.failureResultOf(call, CancelledError)
            world.network.advance(20.0)
            self.assertEqual(world.runs, {})

    def test_a_stream_fails_and_says_so(self):
        for world in self.each():

            async def read(world=world):
                return [number async for number in world.work.numbers(100)]

            reading = Deferred.fromCoroutine(read())
            sending = world.work.total(endless(world.host))
            world.network.advance(0.5)
            world.reset()
            for stream in (reading, sending):
                self.assertTrue(self.failed(world, stream, ConnectionLost).may_have_run)

            async def read_again(world=world):
                return [number async for number in world.work.numbers(3)]

            self.assertEqual(world.run(read_again()), [0, 1, 2])

    def test_a_client_that_stops_ends_what_runs_for_it(self):
        for world in self.each():
            call = world.work.add("a", 8.0, True)
            world.network.advance(0.1)
            world.run(world.client.stopService())
            self.assertTrue(self.failureResultOf(call, ConnectionLost).value.may_have_run)
            world.network.advance(20.0)
            self.assertEqual(world.runs, {})

    def test_a_server_that_drains_ends_what_runs_in_time_and_calls_that_come_wait(self):
        for world in self.each():
            calls = [world.work.add("quick", 0.2, True), world.work.add("slow", 9.0, True)]
            world.network.advance(0.1)
            draining = world.factory.drain(2.0)
            late = world.work.add("late", 0.1)
            self.assertEqual(world.run(calls[0]), "quick")
            world.run(draining)
            self.assertTrue(self.failed(world, calls[1], Error).may_have_run)
            self.assertEqual(world.run(late), "late")
            self.assertEqual(world.runs, {"quick": 1, "late": 1})

    def test_what_surrounds_a_call_goes_with_it_each_time(self):
        for world in self.each():
            world.network.partition("server0", "client")
            with metadata(tenant="a"):
                call = world.work.seen()
            world.network.advance(0.05)
            world.client._links[0].connection._carrier.abort()
            world.network.heal()
            self.assertEqual(world.run(call), {"tenant": "a"})

    def test_a_secret_is_of_no_use_to_another(self):
        authenticator = knows(ann="a-secret-of-twenty-octets", bob="another-of-twenty-octets")
        for kind in KINDS:
            world = World(kind, options={"authenticator": authenticator}, token=token("a-secret-of-twenty-octets"))
            call = world.work.add("a", 3.0)
            world.network.advance(0.1)
            thief = Client(
                world.network.host("thief"),
                f"{kind}:server0:12000",
                Work,
                token=token("another-of-twenty-octets"),
            )
            link, stolen = thief._links[0], world.client._links[0]
            link._session, link._next_key = stolen._session, stolen._next_key
            thief.startService()
            world.run(thief.whenConnected())
            # The session that it names is one of its own.
            self.assertEqual(len(world.factory._keeper.sessions), 2)
            self.assertEqual(world.run(call), "a")


class Again(Each):
    def test_try_later_is_obeyed_and_did_not_run(self):
        for world in self.each():
            began = world.network.now
            self.assertEqual(world.run(world.work.later(2, 3.0)), 3)
            self.assertGreater(world.network.now - began, 6.0)
            self.assertLess(world.network.now - began, 7.0)
            self.assertEqual(world.client.budget.retries, 2)

    def test_it_is_never_made_again_past_the_deadline(self):
        for world in self.each():
            with timeout_of(world, 2.0):
                call = world.work.later(100, 5.0)
            began = world.network.now
            error = self.failed(world, call, TryLater)
            self.assertEqual((error.retry_after, error.may_have_run), (5.0, False))
            self.assertLess(world.network.now - began, 2.0)

    def test_the_policy_is_kept(self):
        for world in self.each(retry=RetryPolicy(attempts=2), retries={"later": RetryPolicy(attempts=3)}):
            self.failed(world, world.work.later(100, 0.01), TryLater)
            self.assertEqual(world.runs["later"], 3)
            world.runs["later"] = -1000
            world.client._retries.clear()
            self.failed(world, world.work.later(100, 0.01), TryLater)
            self.assertEqual(world.runs["later"], -998)

    def test_the_budget_is_kept(self):
        for world in self.each(budget=(0.1, 0.0)):
            calls = [world.work.later(10_000, 0.0) for _ in range(200)]
            for call in calls:
                self.failed(world, call, TryLater)
            budget = world.client.budget
            self.assertEqual(budget.calls, 200)
            self.assertTrue(1 <= budget.retries <= 21, budget.retries)
            self.assertGreater(budget.refused, 100)

    def test_interceptors_run_once_around_each_call(self):
        seen = []

        @implementer(IInterceptor)
        class Watch:
            async def intercept(self, call: Any, proceed: Any) -> Any:
                seen.append(call.method)
                return await proceed()

        for world in self.each(interceptors=[Watch()]):
            seen.clear()
            self.assertEqual(world.run(world.work.later(1, 0.1)), 2)
            self.assertEqual(seen, ["Work.later"])


class Several(Each):
    def test_calls_go_to_all_of_them(self):
        for world in self.each(servers=3):
            calls = [world.work.get(0.01) for _ in range(300)]
            counts = Counter(world.run(gatherResults(calls)))
            self.assertEqual(len(counts), 3)
            self.assertGreater(min(counts.values()), 50)

    def test_one_that_is_gone_is_not_missed(self):
        for world in self.each(servers=3):
            running = [world.work.get(0.3) for _ in range(30)]
            world.network.advance(0.1)
            world.reset(world.factories[0])
            world.network.advance(0.002)
            world.network.host("server0").crash()
            # Its timers are gone with it, which would have ended them.
            world.factories[0]._connections.clear()
            world.factories[0]._keeper = None
            counts = Counter(world.run(gatherResults([*running, *(world.work.get() for _ in range(100))])))
            self.assertEqual(counts["server0"], 0)

    def one_is_slow(self, hedge_after: float | None, pause: float) -> float:
        """The 99th percentile of the seconds that calls take, where one of three servers is slow."""
        world = World("tcp", servers=3, retry=RetryPolicy(hedge_after=hedge_after))
        world.factories[0].slowness = 0.5
        times: list[float] = []

        async def one() -> None:
            began = world.network.now
            await world.work.get(0.005)
            times.append(world.network.now - began)

        for _ in range(2000):
            Deferred.fromCoroutine(one())
            world.network.advance(pause)
        world.network.advance(2.0)
        self.assertEqual(len(times), 2000)
        requests = sum(factory.runs["get"] for factory in world.factories)
        self.assertLessEqual(requests, 1.2 * 2000 + 1)
        self.run_out(world)
        return sorted(times)[1980]

    def test_a_slow_one_is_hedged(self):
        for pause in (0.002, 0.01, 0.1):
            self.assertLess(self.one_is_slow(0.03, pause), self.one_is_slow(None, pause) / 2, pause)

    def test_one_that_fails_again_and_again_is_left_alone(self):
        world = World("tcp", servers=3)

        async def fail(seconds: float) -> str:
            raise TryLater

        world.factories[0].get = fail  # type: ignore[method-assign]
        for _ in range(300):
            world.run(world.work.get())
        link = world.client._links[0]
        self.assertGreater(world.client._balance.until(link), world.network.now)
        before = world.client.budget.retries
        for _ in range(50):
            world.run(world.work.get())
        self.assertEqual(world.client.budget.retries, before)


class Readiness(Each):
    def test_one_that_is_not_ready_is_not_called_until_it_is(self):
        for world in self.each(servers=2):
            world.factories[0].set_ready(False)
            world.network.advance(6.0)
            counts = Counter(world.run(gatherResults([world.work.get() for _ in range(50)])))
            self.assertEqual(counts, {"server1": 50})
            world.factories[0].set_ready(True, Work)
            world.network.advance(6.0)
            counts = Counter(world.run(gatherResults([world.work.get(0.01) for _ in range(50)])))
            self.assertEqual(len(counts), 2)

    def test_it_is_told_of_each_protocol_and_of_all(self):
        for world in self.each():
            health = world.client._links[0].connection.proxy(Health)
            self.assertTrue(world.run(health.check()))
            self.assertTrue(world.run(health.check("Work")))
            world.factory.set_ready(False, Work)
            self.assertFalse(world.run(health.check()))
            self.assertFalse(world.run(health.check("Work")))
            world.factory.set_ready(True)
            self.assertTrue(world.run(health.check()))
            self.failed(world, health.check("Other"), NotFound)
            self.assertRaises(ValueError, world.factory.set_ready, True, Other)

    def test_a_server_that_drains_is_not_ready(self):
        for world in self.each():
            waiting = world.work.add("a", 1.0)
            world.network.advance(0.1)
            world.factory.drain(5.0)
            self.assertFalse(world.factory.is_ready(Work))
            world.run(waiting)
            world.network.advance(10.0)
            self.assertTrue(world.factory.is_ready(Work))


class Other(Protocol):
    """Nobody serves it."""

    @request
    async def nothing(self) -> None: ...


class Names:
    """A resolver that knows the SRV records of one name."""

    def __init__(self) -> None:
        self.records: list[tuple[int, int, int, str]] = []
        self.asked = 0

    def lookupService(self, name: str) -> Deferred[Any]:
        self.asked += 1
        if name != "_work._tcp.example.com":
            return fail(DNSNameError())
        headers = [
            dns.RRHeader(name, dns.SRV, ttl=20, payload=dns.Record_SRV(priority, weight, port, target))
            for priority, weight, port, target in self.records
        ]
        return succeed((headers, [], []))


class Records(SynchronousTestCase):
    def world(self, *records: tuple[int, int, int, str]) -> Any:
        network = Network(2)
        for number in range(3):
            network.serve(WorkFactory(network.host(f"server{number}")), "tcp:12000", f"server{number}")
        names = Names()
        names.records = list(records)
        client = Client(network.host("client"), "srv:_work._tcp.example.com", Work, resolver=names)
        client.startService()
        return network, names, client

    def counts(self, network: Network, client: Any, count: int = 100) -> Counter[str]:
        return Counter(network.run(gatherResults([client.proxy.get(0.01) for _ in range(count)])))

    def test_the_servers_are_those_of_the_records_and_change_with_them(self):
        network, names, client = self.world((0, 1, 12000, "server0"), (0, 1, 12000, "server1"))
        network.run(client.whenConnected())
        network.advance(1.0)
        self.assertEqual(set(self.counts(network, client)), {"server0", "server1"})
        names.records = [(0, 1, 12000, "server2")]
        network.advance(25.0)
        self.assertEqual(set(self.counts(network, client)), {"server2"})
        network.run(client.stopService())
        asked = names.asked
        network.advance(100.0)
        self.assertEqual(names.asked, asked)

    def test_what_is_on_its_way_survives_a_change_of_the_records(self):
        network, names, client = self.world((0, 1, 12000, "server0"))
        network.run(client.whenConnected())
        network.advance(18.0)
        calls = [client.proxy.add("a", 6.0), client.proxy.get(6.0)]
        names.records = [(0, 5, 12000, "server0")]
        network.advance(3.0)
        self.assertEqual(client._links[0].place.weight, 5)
        self.assertEqual(network.run(gatherResults(calls)), ["a", "server0"])
        network.advance(15.0)
        calls = [client.proxy.add("b", 6.0), client.proxy.get(6.0)]
        names.records = [(0, 1, 12000, "server1")]
        network.advance(3.0)
        self.assertEqual([link.where for link in client._links], ["tcp:server1:12000"])
        self.assertEqual(network.run(gatherResults(calls)), ["b", "server0"])
        network.advance(1.0)
        self.assertEqual([link.is_running for link in client._leaving], [False])
        network.run(client.stopService())
        network.advance(1.0)
        self.assertEqual(network.host("client").getDelayedCalls(), [])

    def test_those_with_a_lower_priority_come_first_and_weights_are_kept(self):
        network, _, client = self.world(
            (1, 30, 12000, "server0"), (1, 10, 12000, "server1"), (2, 100, 12000, "server2")
        )
        network.run(client.whenConnected())
        network.advance(1.0)
        counts = self.counts(network, client, 400)
        self.assertEqual(counts["server2"], 0)
        self.assertTrue(2 < counts["server0"] / counts["server1"] < 4, counts)
        network.host("server0").crash()
        network.host("server1").crash()
        network.advance(60.0)
        self.assertEqual(set(self.counts(network, client)), {"server2"})

    def test_a_name_that_there_is_not_is_told_and_tried_again(self):
        network, names, client = self.world()
        error = self.assertRaises(ConnectFailed, network.run, client.whenConnected())
        self.assertIn("no SRV records", str(error))
        call = client.proxy.get()
        names.records = [(0, 0, 12000, "server0")]
        self.assertEqual(network.run(call), "server0")
        other = Client(network.host("client"), "srv:_other._tcp.example.com", Work, resolver=names)
        other.startService()
        self.assertRaises(ConnectFailed, network.run, other.whenConnected())

    def test_what_is_no_name_of_a_service_is_refused(self):
        host = Network(1).host("client")
        for where in (
            "srv:",
            "srv:example.com",
            "srv:_work._sctp.example.com",
            "srv:_work._tcp",
            "srv:_work._tcp..com",
        ):
            self.assertRaises(ValueError, Client, host, where, Work)


class Stopping(Each):
    def test_every_call_ends_whatever_it_was_about_to_do(self):
        for world in self.each(servers=2, retry=RetryPolicy(hedge_after=0.5)):
            calls = {
                "runs": world.work.add("a", 8.0, True),
                "is idempotent": world.work.get(8.0),
                "is put off": world.work.later(100, 5.0),
            }
            world.network.advance(0.2)
            for factory in world.factories:
                world.reset(factory)
            world.network.advance(0.003)
            for number in range(2):
                world.network.partition(f"server{number}", "client")
            world.network.advance(1.0)
            calls["waits"] = world.work.add("b")
            world.network.advance(1.0)
            world.client.stopService()
            truth = {"runs": True, "is idempotent": True, "is put off": False, "waits": False}
            for name, call in calls.items():
                with self.subTest(name):
                    self.assertIs(self.failureResultOf(call, ConnectionLost).value.may_have_run, truth[name])
            world.network.heal()

    def test_a_hedge_that_finds_no_server_does_not_end_the_call(self):
        for world in self.each(retry=RetryPolicy(hedge_after=0.5)):
            call = world.work.get(3.0)
            world.network.advance(0.1)
            world.reset()
            world.network.advance(0.6)
            self.assertEqual(world.run(call), "server0")
            self.assertEqual(world.runs["get"], 1)

    def test_it_may_be_stopped_twice_and_each_is_told_when_that_is_done(self):
        for world in self.each():
            first, second = world.client.stopService(), world.client.stopService()
            self.assertEqual((first.called, second.called), (False, False))
            world.run(second)
            self.assertEqual((first.called, len(world.factory._connections)), (True, 0))
            world.run(world.client.stopService())
            # Started and stopped again before it is stopped.
            world.client.startService()
            world.run(world.client.whenConnected())
            first = world.client.stopService()
            world.client.startService()
            second = world.client.stopService()
            world.run(gatherResults([first, second]))
            self.assertEqual(len(world.factory._connections), 0)

    def test_who_is_told_may_give_up_others_or_stop_it(self):
        for world in self.each():
            world.network.partition("server0", "client")
            world.client._links[0].connection._carrier.abort()
            world.network.advance(0.1)
            calls = [world.work.add(str(number)) for number in range(3)]
            calls[0].addErrback(lambda _, calls=calls: calls[1].cancel())
            stopped = world.client.stopService()
            self.failureResultOf(calls[1], CancelledError)
            self.failureResultOf(calls[2], ConnectionLost)
            world.network.heal()
            world.run(stopped)

    def test_a_watcher_may_stop_it_while_it_is_started(self):
        network = Network(1)
        network.serve(WorkFactory(network.host("server")), "tcp:12000")
        host = network.host("client")
        client = Client(host, ["tcp:server:12000", "tcp:server:12000"], Work)
        client.watch(lambda state: client.stopService() if state is ClientState.CONNECTING else None)
        client.startService()
        network.advance(10.0)
        self.assertEqual((client.running, host.getDelayedCalls()), (0, []))

    def test_waiting_for_the_first_server_can_be_given_up(self):
        network = Network(1)
        network.host("server")
        client = Client(network.host("client"), "tcp:server:12000", Work)
        client.startService()
        given_up, other = client.whenConnected(), client.whenConnected()
        given_up.cancel()
        self.failureResultOf(given_up, CancelledError)
        began = network.now
        self.assertRaises(ConnectFailed, network.run, other)
        self.assertLess(network.now - began, 0.5)
        self.assertEqual(client._waiting, {})

    def test_each_is_told_in_an_error_of_its_own(self):
        network = Network(1)
        network.host("server")
        client = Client(network.host("client"), "tcp:server:12000", Work)
        client.startService()
        errors = [self.assertRaises(ConnectFailed, network.run, client.whenConnected()) for _ in range(2)]
        self.assertEqual(str(errors[0]), str(errors[1]))
        self.assertIsNot(errors[0], errors[1])

    def test_a_client_that_is_here_again_keeps_its_session_when_the_former_connection_ends(self):
        for world in self.each():
            keeper = world.factory._keeper
            (session,) = keeper.sessions._sessions.values()
            former, session.user = session.user, object()
            former._conversation.was_left = True
            world.reset()
            world.network.advance(0.5)
            self.assertFalse(session.is_over)
            keeper.end(session, session.user)
            self.assertTrue(session.is_over)


class Budgets(SynchronousTestCase):
    def test_an_outage_is_not_multiplied(self):
        for kind in KINDS:
            world = World(kind, servers=2, reconnect=Backoff(first=0.2, longest=1.0))
            host = world.host
            results: list[Any] = []
            calls = 0
            for step in range(2000):
                if step == 500:
                    for number in range(2):
                        world.reset(world.factories[number])
                        world.network.host(f"server{number}").crash()
                if step == 1500:
                    for number in range(2):
                        world.factories[number] = world.serve(f"server{number}")
                with timeout_of(world, 1.0):
                    world.work.get().addBoth(results.append)
                calls += 1
                world.network.advance(0.01)
            world.network.advance(20.0)
            self.assertEqual(len(results), calls)
            budget = world.client.budget
            self.assertEqual(budget.calls, calls)
            self.assertLessEqual(budget.retries, 0.2 * calls + 10 * 20)
            self.assertEqual(results[-100:], [result for result in results[-100:] if isinstance(result, str)])
            self.assertIsNotNone(host)


def token(secret: str) -> Token:
    return Token(secret, "here")


def knows(**secrets: str) -> TokenAuthenticator:
    """An authenticator that knows who has which secret."""
    return TokenAuthenticator(
        [(hashlib.sha256(secret.encode()).digest(), Identity(name)) for name, secret in secrets.items()]
    )


def timeout_of(world: World, seconds: float) -> Any:
    """A deadline in the time of the network."""
    return _Timeout(world, seconds)


class _Timeout:
    def __init__(self, world: World, seconds: float) -> None:
        self.world = world
        self.inner = timeout(seconds)
        self.token: Any = None

    def __enter__(self) -> None:
        self.token = self.world.network.enter()
        self.inner.__enter__()

    def __exit__(self, *args: object) -> None:
        from protoframe._context import scope

        self.inner.__exit__(*args)
        scope.reset(self.token)


async def endless(host: Any) -> AsyncIterator[int]:
    while True:
        yield 1
        await deferLater(host, 0.1)
