"""What runs at the two ends of a lossy link: a Protocol that counts, and a client that compares.

    tools/lossy_calls.py TASK    makes the calls of a `Task`, in JSON, and prints their `Outcome`, in JSON

Knows calls and what became of them, by the public face of protoframe alone; not the network under them, nor what must
hold over which, which is `lossy.py`'s.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections import Counter, defaultdict
from typing import Any

from twisted.internet.defer import Deferred, FirstError, gatherResults
from twisted.internet.defer import TimeoutError as Hung
from twisted.internet.task import deferLater, react

from protoframe import ConnectionLost, DeadlineExceeded, Error, Protocol, connect, request, timeout

__all__ = ["PATIENCE", "Counting", "Outcome", "Task"]

#: Seconds that a call has, and by which it may miss its deadline on a busy machine before it is said to hang.
DEADLINE = 10.0
GRACE = 3.0
#: Seconds that opening a connection has, and how often it is tried.
OPENING = 10.0
OPENINGS = 30
#: Seconds that a process has to begin and to end.
PATIENCE = 30.0

# The server.

#: How often each call was run, by the run that it belongs to and its number.
EXECUTIONS: defaultdict[str, Counter[int]] = defaultdict(Counter)


@dataclasses.dataclass
class Answer:
    """What a call gives: which one it was, and how often it has been run by now."""

    run: str
    number: int
    times: int


class Counting(Protocol):
    """Counts how often each call is run."""

    @request
    async def count(self, run: str, number: int, pause: float = 0.0) -> Answer:
        """Counts one, and answers after a while."""
        from twisted.internet import reactor

        executions = EXECUTIONS[run]
        executions[number] += 1
        if pause:
            await deferLater(reactor, pause)
        return Answer(run=run, number=number, times=executions[number])

    @request(idempotent=True)
    async def executed(self, run: str) -> dict[int, int]:
        """How often each call of a run was run; those that never were are not in it."""
        return EXECUTIONS[run]

    @request(idempotent=True)
    async def repeated(self) -> int:
        """How many calls were run more than once, of all runs together."""
        return sum(times > 1 for executions in EXECUTIONS.values() for times in executions.values())


# The client.


@dataclasses.dataclass(frozen=True)
class Task:
    """What a client is to do.

    :param where: the server, across the link.
    :param beside: the server, not across the link: a UNIX socket, which namespaces share.
    :param run: a name of this run's own.
    :param calls: how many.
    :param at_once: how many of them at once, on all connections together.
    :param connections: over how many connections.
    :param pause: seconds that every tenth handler waits.
    """

    where: str
    beside: str
    run: str
    calls: int
    at_once: int
    connections: int
    pause: float

    @property
    def longest(self) -> float:
        """Seconds after which it hangs, whatever it does."""
        return math.ceil(self.calls / self.at_once) * (DEADLINE + GRACE) + OPENINGS * OPENING + PATIENCE


@dataclasses.dataclass
class Outcome:
    """What became of the calls.

    :ivar answered: had their own answer, which says that they were run once.
    :ivar late: failed with `DeadlineExceeded`.
    :ivar hung: had no outcome when their deadline had long passed.
    :ivar wrong: had the answer of another call, or one that says that they were run more than once.
    :ivar failed: failed otherwise, by the name of the error.
    :ivar repeated: were run more than once.
    :ivar not_run: were answered, and not run.
    :ivar openings_failed: connections that could not be opened, and were tried again.
    :ivar reopened: connections that were lost, and opened again.
    :ivar seconds: what all took.
    :ivar milliseconds: what each call took, whatever became of it, in order of size.
    """

    answered: int = 0
    late: int = 0
    hung: int = 0
    wrong: int = 0
    failed: Counter[str] = dataclasses.field(default_factory=Counter)
    repeated: int = 0
    not_run: int = 0
    openings_failed: int = 0
    reopened: int = 0
    seconds: float = 0.0
    milliseconds: list[float] = dataclasses.field(default_factory=list)

    def percentile(self, percent: float) -> float:
        """The milliseconds in which so many of all calls, or more, had their outcome."""
        if not self.milliseconds:
            return math.nan
        return self.milliseconds[math.ceil(len(self.milliseconds) * percent / 100) - 1]


class CannotOpen(Exception):
    """There is no connection to be had, however often it is tried."""


class Client:
    """Makes the calls of a task, a bounded number at a time."""

    def __init__(self, reactor: Any, task: Task) -> None:
        self._reactor = reactor
        self._task = task
        self._numbers = iter(range(task.calls))
        self._left = task.calls
        self._answered: list[int] = []
        self.outcome = Outcome()

    async def run(self) -> Outcome:
        """Makes all calls, and compares what came of them with what the server has counted."""
        task, outcome = self._task, self.outcome
        began = time.monotonic()
        lanes = [
            task.at_once // task.connections + (n < task.at_once % task.connections) for n in range(task.connections)
        ]
        await gatherResults([Deferred.fromCoroutine(self._lane(workers)) for workers in lanes], consumeErrors=True)
        outcome.seconds = time.monotonic() - began
        outcome.milliseconds.sort()
        async with connect(self._reactor, task.beside, Counting) as counting:
            executed = await counting.executed(task.run)
        outcome.repeated = sum(times > 1 for times in executed.values())
        outcome.not_run = sum(number not in executed for number in self._answered)
        return outcome

    async def _lane(self, workers: int) -> None:
        """One connection, opened again for as long as it is lost, and those who call over it."""
        is_first = True
        while self._left:
            if not is_first:
                self.outcome.reopened += 1
            is_first = False
            connecting, counting = await self._open()
            work = [Deferred.fromCoroutine(self._work(counting)) for _ in range(workers)]
            await gatherResults(work, consumeErrors=True)
            await connecting.close()

    async def _open(self) -> tuple[Any, Counting]:
        for _ in range(OPENINGS):
            connecting = connect(self._reactor, self._task.where, Counting)
            try:
                with timeout(OPENING):
                    return connecting, await connecting
            except Error as error:
                last = error
                self.outcome.openings_failed += 1
        raise CannotOpen(f"{self._task.where} could not be opened in {OPENINGS} tries: {last!r}")

    async def _work(self, counting: Counting) -> None:
        for number in self._numbers:
            self._left -= 1
            began = time.monotonic()
            is_connected = await self._call(counting, number)
            self.outcome.milliseconds.append(1000 * (time.monotonic() - began))
            if not is_connected:
                return

    async def _call(self, counting: Counting, number: int) -> bool:
        """Makes a call, and tells whether others may follow it over this connection."""
        task, outcome = self._task, self.outcome
        try:
            with timeout(DEADLINE):
                call: Any = counting.count(task.run, number, 0.0 if number % 10 else task.pause)
            call.addTimeout(DEADLINE + GRACE, self._reactor)
            answer = await call
        except DeadlineExceeded:
            outcome.late += 1
        except Hung:
            outcome.hung += 1
        except Error as error:
            outcome.failed[error.type_name] += 1
            return not isinstance(error, ConnectionLost)
        else:
            if answer == Answer(run=task.run, number=number, times=1):
                outcome.answered += 1
                self._answered.append(number)
            else:
                outcome.wrong += 1
        return True


def main() -> None:
    """Makes the calls of the task that the command line has, and prints what became of them."""
    task = Task(**json.loads(sys.argv[1]))

    async def run(reactor: Any) -> None:
        try:
            outcome = await Client(reactor, task).run()
        except FirstError as error:
            raise SystemExit(str(error.subFailure.value)) from None
        print(json.dumps(dataclasses.asdict(outcome)))

    react(lambda reactor: Deferred.fromCoroutine(run(reactor)))


if __name__ == "__main__":
    main()
