"""What a `Client` does when servers are slow or gone, in the simulated network: no second of real time is waited.

    python benchmarks/outages.py [--seeds N]

Printed are the 99th percentile of idempotent calls where one of three servers answers slowly, with hedging and without,
and how many requests that takes; and how many calls are made again in an outage of 10 seconds under load, beside what
the budget allows.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from protoframe import Client, Factory, Protocol, RetryPolicy, TryLater, request, timeout
from protoframe.testing import Network

#: Seconds that a server takes, and that the slow one does.
QUICK, SLOW = 0.005, 0.5
SERVERS = 3


class Work(Protocol):
    @request(idempotent=True)
    async def get(self) -> int:
        self.factory.requests += 1
        if self.factory.is_overloaded:
            raise TryLater
        await deferLater(self.factory.reactor, self.factory.seconds)
        return 1


class WorkFactory(Factory):
    def __init__(self, seconds: float) -> None:
        super().__init__(Work)
        self.seconds = seconds
        self.requests = 0
        self.is_overloaded = False


def serve(network: Network, number: int, seconds: float) -> WorkFactory:
    factory = WorkFactory(seconds)
    factory.reactor = network.host(f"server{number}")
    network.serve(factory, "tcp:12000", f"server{number}")
    return factory


def hedged(seed: int, hedge_after: float | None, every: float, count: int = 2000) -> tuple[float, float]:
    """The 99th percentile in seconds, and the requests for each call."""
    network = Network(seed)
    factories = [serve(network, number, SLOW if not number else QUICK) for number in range(SERVERS)]
    where = [f"tcp:server{number}:12000" for number in range(SERVERS)]
    client = Client(network.host("client"), where, Work, retry=RetryPolicy(hedge_after=hedge_after))
    client.startService()
    work = network.run(client.whenConnected())
    network.advance(0.1)
    times = []

    async def one() -> None:
        began = network.now
        await work.get()
        times.append(network.now - began)

    for _ in range(count):
        Deferred.fromCoroutine(one())
        network.advance(every)
    network.advance(2.0)
    network.run(client.stopService())
    return sorted(times)[count * 99 // 100], sum(factory.requests for factory in factories) / count


def outage(seed: int, *, gone: bool, seconds: float = 10.0, every: float = 0.01) -> tuple[int, int, float]:
    """Calls in an outage, how many were made again, and how many the budget allows.

    :param gone: whether the servers are gone, or there, and refuse every call.
    """
    network = Network(seed)
    factories = [serve(network, number, QUICK) for number in range(SERVERS)]
    where = [f"tcp:server{number}:12000" for number in range(SERVERS)]
    client = Client(network.host("client"), where, Work)
    client.startService()
    network.run(client.whenConnected())
    network.advance(0.1)

    async def one() -> None:
        with timeout(2.0):
            await client.proxy.get()

    def load(until: float) -> None:
        while network.now < until:
            Deferred.fromCoroutine(one()).addErrback(lambda _: None)
            network.advance(every)

    load(network.now + 2.0)
    calls, retries = client.budget.calls, client.budget.retries
    for number, factory in enumerate(factories):
        factory.is_overloaded = True
        if not gone:
            continue
        for connection in list(factory.connections):
            connection._carrier.abort()
        network.advance(0.001)
        network.host(f"server{number}").crash()
    began = network.now
    load(began + seconds)
    for number, factory in enumerate(factories):
        factory.is_overloaded = False
        if gone:
            serve(network, number, QUICK)
    load(network.now + 3.0)
    lasted = network.now - began
    calls, retries = client.budget.calls - calls, client.budget.retries - retries
    network.run(client.stopService())
    return calls, retries, 0.2 * calls + 10 * lasted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    for every in (0.002, 0.02, 0.1):
        without: list[Any] = [hedged(seed, None, every) for seed in seeds]
        with_: list[Any] = [hedged(seed, 0.03, every) for seed in seeds]
        p99, requests = (statistics.median(column) for column in zip(*with_, strict=True))
        before = statistics.median(one[0] for one in without)
        print(
            f"one of three takes {SLOW:g} s, {1 / every:.0f} calls/s: 99 % {1000 * before:.0f} ms without hedging,"
            f" {1000 * p99:.0f} ms with it, at {requests:.3f} requests a call (at most 1.2)"
        )
    for gone in (True, False):
        for seed in seeds:
            calls, retries, allowed = outage(seed, gone=gone)
            print(
                f"10 s in which the servers {'are gone' if gone else 'refuse every call'}: {retries} of {calls} calls"
                f" made again; the budget allows {allowed:.0f}"
            )


if __name__ == "__main__":
    main()
