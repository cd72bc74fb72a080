"""What protoframe promises, over networks that lose, double, reorder and corrupt, for many seeds: in virtual time.

``PROTOFRAME_SEEDS`` says for how many (`make soak` runs many more), ``PROTOFRAME_SEED`` has one again.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred, gatherResults
from twisted.internet.task import deferLater

from protoframe import (
    DeadlineExceeded,
    Error,
    Factory,
    Limits,
    Protocol,
    connect,
    listen,
    request,
    timeout,
)
from protoframe._connection import Connection
from protoframe.testing import Network, run_seeds
from tests.ends import leftovers, missing_credit


class Refused(Error):
    number: int


class Work(Protocol["Client"]):
    """All kinds of calls; `runs` counts how often each ran."""

    def __init__(self, runs: Counter[str], reactor: Any) -> None:
        self.runs = runs
        self.reactor = reactor

    @request
    async def square(self, key: str, number: int) -> int:
        self.runs[key] += 1
        return number * number

    @request(raises=[Refused])
    async def refuse(self, key: str, number: int) -> int:
        self.runs[key] += 1
        raise Refused(number=number)

    @request
    async def later(self, key: str, seconds: float) -> str:
        self.runs[key] += 1
        await deferLater(self.reactor, seconds)
        return key

    @request
    async def digest(self, key: str, data: bytes) -> bytes:
        self.runs[key] += 1
        return hashlib.sha256(data).digest() + data[::-1]

    @request
    async def numbers(self, key: str, count: int) -> AsyncIterator[int]:
        self.runs[key] += 1
        for number in range(count):
            yield number

    @request
    async def total(self, key: str, numbers: AsyncIterator[int]) -> int:
        self.runs[key] += 1
        return sum([number async for number in numbers])

    @request
    async def double(self, key: str, numbers: AsyncIterator[int]) -> AsyncIterator[int]:
        self.runs[key] += 1
        async for number in numbers:
            yield 2 * number

    @request
    async def ask_back(self, key: str, number: int) -> int:
        self.runs[key] += 1
        return await self.peer.twice(number)

    @request(oneway=True)
    async def note(self, key: str) -> None:
        self.runs[key] += 1


class Client(Protocol[Work]):
    @request
    async def twice(self, number: int) -> int:
        return 2 * number


class WorkFactory(Factory):
    def __init__(self, reactor: Any, **options: Any) -> None:
        super().__init__(Work, **options)
        self.runs: Counter[str] = Counter()
        self.clock = reactor

    def create(self, protocol: Any) -> Any:
        return protocol(self.runs, self.clock)


async def count_to(count: int) -> AsyncIterator[int]:
    for number in range(count):
        yield number


class Drive:
    """A client that makes calls of all kinds, and what came of them.

    :ivar ended: by the key of each call, whether it was answered.
    """

    def __init__(self, network: Network, work: Work, deadline: float = 60.0) -> None:
        self.network = network
        self.work = work
        self.deadline = deadline
        self.ended: dict[str, bool] = {}
        self._random = network.random

    async def some(self, count: int, at_once: int = 4) -> None:
        """Makes so many, several at a time."""
        keys = iter(range(count))

        async def worker() -> None:
            for number in keys:
                kind = self._random.choice(self.KINDS)
                key = f"{kind}-{len(self.ended)}-{number}"
                assert key not in self.ended
                self.ended[key] = False
                try:
                    with timeout(self.deadline):
                        await getattr(self, f"_{kind}")(key, number)
                except DeadlineExceeded:
                    continue
                self.ended[key] = True

        await gatherResults([Deferred.fromCoroutine(worker()) for _ in range(at_once)])

    KINDS = (
        "square",
        "square",
        "refuse",
        "later",
        "large",
        "numbers",
        "leave",
        "total",
        "double",
        "back",
        "cancel",
        "note",
    )

    async def _square(self, key: str, number: int) -> None:
        assert await self.work.square(key, number) == number * number

    async def _refuse(self, key: str, number: int) -> None:
        with pytest.raises(Refused) as refused:
            await self.work.refuse(key, number)
        assert refused.value.number == number

    async def _later(self, key: str, number: int) -> None:
        assert await self.work.later(key, 0.2) == key

    async def _large(self, key: str, number: int) -> None:
        data = self._random.randbytes(self._random.randint(1000, 80_000))
        answer = await self.work.digest(key, data)
        assert answer == hashlib.sha256(data).digest() + data[::-1]

    async def _numbers(self, key: str, number: int) -> None:
        count = self._random.randint(0, 400)
        assert [one async for one in self.work.numbers(key, count)] == list(range(count))

    async def _leave(self, key: str, number: int) -> None:
        async for one in self.work.numbers(key, 1_000_000):
            if one == 20:
                break

    async def _total(self, key: str, number: int) -> None:
        assert await self.work.total(key, count_to(300)) == sum(range(300))

    async def _double(self, key: str, number: int) -> None:
        assert [one async for one in self.work.double(key, count_to(50))] == list(range(0, 100, 2))

    async def _back(self, key: str, number: int) -> None:
        assert await self.work.ask_back(key, number) == 2 * number

    async def _cancel(self, key: str, number: int) -> None:
        call: Any = self.work.later(key, 1000.0)
        await deferLater(self.network.host("client"), self._random.random() * 0.1)
        call.cancel()
        with contextlib.suppress(CancelledError):
            await call

    async def _note(self, key: str, number: int) -> None:
        await self.work.note(key)

    def check(self, runs: Counter[str]) -> None:
        """Nothing ran twice, and what was answered ran."""
        for key, ended in self.ended.items():
            assert runs[key] <= 1, f"{key} ran {runs[key]} times"
            if ended and not key.startswith(("note", "cancel")):
                assert runs[key] == 1, f"{key} was answered, and did not run"


def rest(*connections: Connection) -> None:
    """Nothing is left of any call, at either end."""
    for connection in connections:
        assert not leftovers(connection), leftovers(connection)
        association = getattr(connection._carrier, "association", None)
        if association is not None:
            flow = association.outflow
            assert flow.is_settled
            assert not flow.lanes
            assert not association.recovery.packets
            inflow = association._inflow
            assert not inflow._channels
            numbers = (
                flow.queued,
                association.recovery.congestion.in_flight,
                inflow._held,
                connection.outbox._unconfirmed,
            )
            assert numbers == (0, 0, 0, 0)
    assert missing_credit(*connections) == [0, 0, 0, 0]


async def drive(network: Network, kind: str, calls: int, *, late: bool) -> None:
    """A server, a client, calls of all kinds, and what must hold afterwards."""
    server, client = network.host("server"), network.host("client")
    factory = WorkFactory(server, limits=PATIENT)
    await listen(server, f"{kind}:12000", factory)
    connecting = connect(client, f"{kind}:server:12000", Work, serving=Client, limits=PATIENT)
    driving = Drive(network, await connecting)
    await driving.some(calls)
    driving.check(factory.runs)
    assert late or all(driving.ended.values()), "a call was not answered in a minute"
    # What was cancelled ends meanwhile; and then nothing more is said.
    network.set(loss=min(network.conditions.loss, 0.1))
    await deferLater(client, 14.0 if kind == "udp" else LONGEST_RTO)
    (served,) = factory.connections
    rest(connecting.connection, served)
    before = network.sent
    await deferLater(client, 12.0)
    assert network.sent == before, f"{network.sent - before} packets were sent for nothing"
    await connecting.close()
    await deferLater(client, 60.0)
    assert not factory.connections


#: A network that loses half of all may take its time to let a client in; and nobody asks for a sign of life while it
#: is looked at whether anything is said for nothing.
PATIENT = Limits(handshake_timeout=60.0, frame_timeout=120.0, write_timeout=120.0, keepalive_idle=600.0)
#: Seconds after which a TCP sends again at the latest what the network has lost several times.
LONGEST_RTO = 60.0


def over(kind: str, calls: int = 12, *, late: bool = False) -> Any:
    """The scenario over one kind of network.

    :param late: whether calls may meet their deadline.
    """

    async def scenario(network: Network) -> None:
        await drive(network, kind, calls, late=late)

    return scenario


@pytest.mark.parametrize(
    "conditions",
    [
        {},
        {"loss": 0.1, "jitter": 0.002},
        {"loss": 0.3, "duplicate": 0.1, "reorder": 0.3, "corrupt": 0.05},
        {"duplicate": 0.5, "reorder": 0.5, "jitter": 0.02},
        {"loss": 0.05, "delay": 0.08, "bandwidth": 250_000.0, "queue": 20_000},
        {"delay": 0.0},
    ],
    ids=str,
)
def test_every_call_has_one_outcome_and_runs_once_over_datagrams(conditions: dict[str, Any]) -> None:
    run_seeds(over("udp"), 150, **conditions)


def test_half_of_all_packets_may_be_lost() -> None:
    run_seeds(over("udp", 6, late=True), 100, loss=0.5)


@pytest.mark.parametrize("conditions", [{}, {"loss": 0.05, "reorder": 0.1, "duplicate": 0.1, "corrupt": 0.02}], ids=str)
def test_the_same_holds_over_streams(conditions: dict[str, Any]) -> None:
    run_seeds(over("tcp"), 60, **conditions)
