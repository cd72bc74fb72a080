"""A bank whose network resets, partitions and loses, and whose server restarts: what its client is told is true."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater

from protoframe import Client, Error, Factory, Protocol, listen, request, timeout
from protoframe.testing import Network, run_seeds

TRANSFERS = 20


class Bank(Protocol):
    @request
    async def move(self, key: str, amount: int) -> int:
        return await self.factory.move(key, amount)  # type: ignore[attr-defined, no-any-return]

    @request(idempotent=True)
    async def balance(self) -> int:
        return self.factory.ledger.total  # type: ignore[attr-defined, no-any-return]


class Ledger:
    """What is on the disk of the bank: it outlives the server."""

    def __init__(self) -> None:
        self.applied: Counter[str] = Counter()
        self.total = 0


class BankFactory(Factory):
    def __init__(self, host: Any, ledger: Ledger) -> None:
        super().__init__(Bank, reactor=host)
        self.ledger = ledger
        self.host = host

    async def move(self, key: str, amount: int) -> int:
        # Some are applied before they wait, and some after: the answer may be lost either way.
        if amount % 2:
            await deferLater(self.host, amount / 100)
        self.ledger.applied[key] += 1
        self.ledger.total += amount
        await deferLater(self.host, amount / 50)
        return self.ledger.total


class Day:
    """One day of the bank."""

    def __init__(self, network: Network, kind: str) -> None:
        self.network = network
        self.kind = kind
        self.chance = network.random
        self.ledger = Ledger()
        self.server, self.client = network.host("server"), network.host("client")
        self.factory = BankFactory(self.server, self.ledger)
        self.done: dict[str, int] = {}
        self.failed: dict[str, Error] = {}

    async def open(self) -> None:
        self.factory = BankFactory(self.server, self.ledger)
        await listen(self.server, f"{self.kind}:12000", self.factory)

    async def transfers(self, bank: Any, worker: int) -> None:
        for number in range(TRANSFERS // 4):
            key, amount = f"{worker}.{number}", self.chance.randint(1, 9)
            try:
                with timeout(self.chance.choice((2.0, 30.0))):
                    await bank.move(key, amount)
            except Error as error:
                self.failed[key] = error
            else:
                self.done[key] = amount
            await deferLater(self.client, self.chance.random())

    async def mishaps(self) -> None:
        for _ in range(6):
            await deferLater(self.client, self.chance.random())
            what = self.chance.choice(("reset", "partition", "restart", "move", "drain"))
            if what == "reset":
                for connection in list(self.factory.connections):
                    connection._carrier.abort()  # type: ignore[attr-defined]
            elif what == "partition":
                self.network.partition("server", "client")
                await deferLater(self.client, 3 * self.chance.random())
                self.network.heal()
            elif what == "restart":
                self.server.crash()
                await deferLater(self.client, self.chance.random())
                await self.open()
            elif what == "move":
                self.client.change_address()
            else:
                await self.factory.drain(0.05)

    def check(self) -> None:
        """What was told is true."""
        applied = self.ledger.applied
        twice = [key for key, times in applied.items() if times > 1]
        assert not twice, f"applied twice: {twice}"
        for key in self.done:
            assert applied[key] == 1, f"{key} was reported done, and was not"
        for key, error in self.failed.items():
            if not error.may_have_run:
                assert not applied[key], f"{key} was reported not to have run, and was applied: {error!r}"
        total = sum(self.done.values())
        assert self.ledger.total >= total, f"{self.ledger.total} are there, and {total} were reported"


def a_day(kind: str) -> Any:
    async def scenario(network: Network) -> None:
        day = Day(network, kind)
        await day.open()
        async with Client(day.client, f"{kind}:server:12000", Bank) as bank:
            running = [Deferred.fromCoroutine(day.transfers(bank, worker)) for worker in range(4)]
            mishaps = Deferred.fromCoroutine(day.mishaps())
            await gatherResults([*running, mishaps], consumeErrors=True)
            with timeout(60.0):
                await bank.balance()
        day.check()
        assert len(day.done) + len(day.failed) == TRANSFERS
        await deferLater(day.client, 400.0)
        assert not day.factory._connections
        keeper = day.factory._keeper
        assert keeper is None or not len(keeper.sessions)
        assert keeper is None or keeper.sessions.octets == 0

    return scenario


@pytest.mark.parametrize("conditions", [{}, {"loss": 0.1, "jitter": 0.01, "reorder": 0.1}], ids=str)
@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_what_the_bank_is_told_is_true(kind: str, conditions: dict[str, Any]) -> None:
    run_seeds(a_day(kind), 250, **conditions)
