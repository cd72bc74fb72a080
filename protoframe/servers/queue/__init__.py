"""``twistd pf-queue``: a durable message queue, ready to run.

Knows its command line, and how it begins and ends; what a queue does is in the modules of this package.
"""

from __future__ import annotations

import os
from typing import Any

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.endpoints import serverFromString
from twisted.internet.interfaces import IListeningPort
from twisted.python import usage
from twisted.python.failure import Failure

from protoframe import Error, GoingAway
from protoframe.servers.queue.ballast import Ballast
from protoframe.servers.queue.broker import Broker
from protoframe.servers.queue.clock import wall_clock
from protoframe.servers.queue.disk import BALLAST, DiskStore
from protoframe.servers.queue.memory import MemoryStore
from protoframe.servers.queue.metrics import metrics_site
from protoframe.servers.queue.service import QueueFactory
from protoframe.service import ServerOptions, ServerService

__all__ = ["Options", "QueueService", "makeService"]

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_CHECKS = ("none", "quick", "full")
#: Seconds that consumers may take to read what is on its way to them, when the server is stopped.
_GRACE = 1.0


class Options(ServerOptions):
    """The command line of ``twistd pf-queue``."""

    longdesc = "Serves message queues that outlive the server, from a directory: pf queue --help tells how to use them."
    default_listen = "tcp:12100:interface=127.0.0.1"

    def __init__(self) -> None:
        super().__init__()
        self["data"] = None
        self["ballast"] = 64 * 2**20
        self["check"] = "quick"
        self["metrics"] = None
        self["max-queues"] = self["max-consumers"] = 10_000

    def opt_data(self, directory: str) -> None:
        """The directory where the queues are; it is made if it is not there."""
        self["data"] = os.path.abspath(directory)

    opt_d = opt_data

    def opt_ballast(self, size: str) -> None:
        """Octets of a file that is given up when the disk is full, so that consumers go on: 64M; 0 for none."""
        self["ballast"] = _size("--ballast", size)

    def opt_check(self, how: str) -> None:
        """How the data is checked at the start: none, quick (the default) or full."""
        if how not in _CHECKS:
            raise usage.UsageError(f"--check: expected {', '.join(_CHECKS)}, got {how!r}")
        self["check"] = how

    def opt_max_queues(self, count: str) -> None:
        """Queues that there may be: 10000."""
        self["max-queues"] = _count("--max-queues", count)

    def opt_max_consumers(self, count: str) -> None:
        """Consumers that there may be at once: 10000."""
        self["max-consumers"] = _count("--max-consumers", count)

    def opt_metrics(self, where: str) -> None:
        """Where to serve metrics to Prometheus, by HTTP: tcp:9100:interface=127.0.0.1, any Twisted stream endpoint."""
        from twisted.internet import reactor

        try:
            self["metrics"] = serverFromString(reactor, where)
        except (ValueError, TypeError, IndexError, LookupError) as error:
            raise usage.UsageError(f"--metrics: {where!r} is no endpoint: {error}") from None

    def postOptions(self) -> None:
        """Checks that there is a directory."""
        super().postOptions()
        if self["data"] is None:
            raise usage.UsageError("say where the queues are: --data DIRECTORY")


def _size(option: str, text: str) -> int:
    number, unit = (text[:-1], text[-1:].upper()) if text[-1:].upper() in ("K", "M", "G") else (text, "")
    if not number.isascii() or not number.isdigit() or int(number) * _UNITS[unit] > 2**50:
        raise usage.UsageError(f"{option}: expected a number of octets, as 64M, got {text!r}")
    return int(number) * _UNITS[unit]


def _count(option: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 1_000_000):
        raise usage.UsageError(f"{option}: expected a number from 1 to 1000000, got {text!r}")
    return int(text)


class QueueService(ServerService):
    """Serves the queues of a directory, from its start to its end.

    A directory that cannot be used ends the process, as a place does that cannot be had; and so does a disk that fails
    while it runs, for nobody knows then what it has.

    :param options: the command line.
    """

    def __init__(self, options: Options) -> None:
        from twisted.internet import reactor

        clock = wall_clock()
        directory = options["data"]
        ballast = Ballast(os.path.join(directory, BALLAST), options["ballast"])
        self.broker = Broker(
            reactor,
            clock,
            DiskStore(reactor, clock, directory, ballast=ballast, check=options["check"]),
            MemoryStore(reactor, clock),
            broken=self._store_failed,
            max_queues=options["max-queues"],
            max_consumers=options["max-consumers"],
        )
        self._metrics = options["metrics"]
        self._metrics_port: IListeningPort | None = None
        if self._metrics is not None:
            try:
                self._site = metrics_site(self.broker)
            except ImportError:
                raise SystemExit("--metrics needs prometheus-client: pip install 'protoframe[metrics]'") from None
        super().__init__(QueueFactory(self.broker, reflection=not options["no-reflection"]), options)

    def prepare(self) -> None:
        """Opens the directory, and serves the metrics."""
        try:
            self.broker.open()
        except ValueError as error:
            self.fail(str(error))
            return
        if self._metrics is not None:
            listening = self._metrics.listen(self._site)
            listening.addCallbacks(self._serving_metrics, self._no_metrics)

    def _serving_metrics(self, port: IListeningPort) -> None:
        self._metrics_port = port

    def _no_metrics(self, failure: Failure) -> None:
        self.fail(f"--metrics: cannot listen: {failure.getErrorMessage()}")

    def stopService(self) -> Deferred[Any]:
        """Has consumers go, lets the calls end that run, and closes the directory."""
        from twisted.internet import reactor

        if self._metrics_port is not None:
            self._metrics_port.stopListening()
        self.broker.end_consumers(GoingAway("the server is shutting down"))
        clock: Any = reactor
        self._leaving = clock.callLater(_GRACE, self._see_off, clock)
        stopped = maybeDeferred(super().stopService)
        return stopped.addBoth(self._close)

    def _see_off(self, clock: Any) -> None:
        """Has those go that do not read to the end of their streams: what they have not settled is not lost."""
        if self.broker.is_storing:
            self._leaving = clock.callLater(_GRACE, self._see_off, clock)
        elif self.broker.consumers:
            self.hurry()

    def _close(self, result: Any) -> Deferred[Any]:
        if self._leaving.active():
            self._leaving.cancel()
        closing: Deferred[Any] = Deferred.fromCoroutine(self.broker.close())
        return closing.addCallback(lambda _: result)

    def _store_failed(self, error: Error) -> None:
        self.fail(str(error))


def makeService(options: Options) -> QueueService:
    """The service that twistd runs."""
    return QueueService(options)
