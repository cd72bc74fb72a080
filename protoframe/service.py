"""What a twistd plugin needs: options that say where to listen and who may call, and the service that listens there.

Knows twistd, endpoint strings and the signals that end a process; what is served is the `Factory`'s.  A plugin is a
module with ``Options``, a subclass of `ServerOptions`, and ``makeService``, which gives a `ServerService`;
`protoframe.servers` has some.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredList, maybeDeferred
from twisted.internet.error import ReactorNotRunning
from twisted.internet.interfaces import IListeningPort
from twisted.logger import Logger
from twisted.python import usage
from twisted.python.failure import Failure

from protoframe._endpoints import listen, reason_of, server_endpoint
from protoframe._factory import Factory
from protoframe._version import __version__
from protoframe.authentication import TokenAuthenticator
from protoframe.core.schema import protocol_name
from protoframe.interceptors import LogCalls

__all__ = ["ServerOptions", "ServerService"]

_log = Logger(namespace="protoframe.service")

#: Where tokens are, if no file is named.
_TOKENS = "PROTOFRAME_TOKENS"
#: Seconds; what `select` and its kin take ends at some 24 days.
_LONGEST = 1_000_000
#: Octets of a text that twistd reads from a daemon that cannot start.
_PIPED = 98


class ServerOptions(usage.Options):
    """Command-line options that every server has; a server's own go into a subclass.

    What is wrong with them is one line on standard error and exit status 2.

    :cvar default_listen: where to listen if no ``--listen`` is given.
    """

    optFlags: ClassVar[list[list[str | None]]] = [
        ["no-reflection", None, "Do not describe to peers what is served."],
        ["log-calls", None, "Log a line for each call, when it has ended."],
    ]
    default_listen = "tcp:12000:interface=127.0.0.1"

    def __init__(self) -> None:
        super().__init__()
        self["listen"] = []
        self["authenticator"] = None
        self["drain"] = 30.0

    def opt_listen(self, where: str) -> None:
        """Where to listen: tcp:12000, udp:12000, unix:/run/x.sock, any Twisted endpoint; may be given several times."""
        self["listen"].append(where)

    opt_l = opt_listen

    def opt_tokens(self, path: str) -> None:
        """Serve only those who send a token that this file lists, or else $PROTOFRAME_TOKENS, if it is set."""
        try:
            self["authenticator"] = TokenAuthenticator.from_file(path)
        except ValueError as error:
            raise usage.UsageError(f"--tokens: {error}") from None

    def opt_drain(self, seconds: str) -> None:
        """Seconds that running calls may take to end, when the server is stopped, before they are cancelled: 30."""
        try:
            self["drain"] = float(seconds)
        except ValueError:
            raise usage.UsageError(f"--drain: expected a number of seconds, got {seconds!r}") from None
        # Of NaN neither holds.
        if not 0 <= self["drain"] <= _LONGEST:
            raise usage.UsageError(f"--drain: expected 0 to {_LONGEST} seconds, got {seconds}")

    def opt_version(self) -> NoReturn:
        """Show the version of protoframe and exit."""
        sys.stdout.write(f"protoframe {__version__}\n")
        raise SystemExit(0)

    def parseArgs(self) -> None:
        """Takes no arguments beside the options."""

    def postOptions(self) -> None:
        """Checks where to listen, before anything is started."""
        if not self["listen"]:
            self["listen"].append(self.default_listen)
        from twisted.internet import reactor

        for where in self["listen"]:
            try:
                server_endpoint(reactor, where)
            except ValueError as error:
                raise usage.UsageError(str(error)) from None

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        """Parses the command line; twistd would answer a mistake with pages of help on standard output."""
        try:
            super().parseOptions(options)
        except usage.UsageError as error:
            self._refuse(error)

    def apply(self, factory: Factory) -> None:
        """Has a factory ask for tokens, and log calls, as the options say.

        A factory with an authenticator of its own keeps it: ``--tokens`` is a mistake then.
        """
        try:
            if factory.authenticator is None:
                factory.authenticator = self["authenticator"]
                if factory.authenticator is None and _TOKENS in os.environ:
                    factory.authenticator = TokenAuthenticator.from_environment(_TOKENS)
            elif self["authenticator"] is not None:
                raise usage.UsageError("--tokens: the Factory that is served has an authenticator of its own")
        except (ValueError, usage.UsageError) as error:
            self._refuse(error)
        if self["log-calls"] and not any(isinstance(one, LogCalls) for one in factory.interceptors):
            factory.interceptors = (LogCalls(), *factory.interceptors)

    def _refuse(self, error: Exception) -> NoReturn:
        _complain(f"{error}; see: twistd {self._name()} --help")
        raise SystemExit(2) from None

    def _name(self) -> str:
        parent: Any = getattr(self, "parent", None)
        return getattr(parent, "subCommand", None) or "NAME"


class ServerService(Service):
    """Serves a factory at one or more places, or not at all.

    A place that cannot be had ends the process, with one line on standard error and exit status 1: no server runs that
    listens at half of its places.  Options that do not go with the factory end it too, with exit status 2.

    It ends in order: it listens no more, refuses new calls, and gives those that run the time of ``--drain``.  SIGTERM
    is a request to do so, and exit status 0 says that it was done; a second signal cuts the time short.

    :param factory: what to serve; its authenticator and its interceptors become what the options say.
    :param options: the command line, with where to listen.
    """

    def __init__(self, factory: Factory, options: ServerOptions) -> None:
        options.apply(factory)
        self._factory = factory
        self._options = options
        self._ports: list[IListeningPort] = []
        # Where it listens, and has not said so yet.
        self._unsaid: list[str] = []
        self._is_ready = False
        self._starting = False
        self._broken = False

    def privilegedStartService(self) -> None:
        """Listens, while the process may still have the rights that low ports ask for."""
        from twisted.internet import reactor

        self._starting = True
        for where in self._options["listen"]:
            listening = listen(reactor, where, self._factory)
            listening.addCallbacks(self._listening, self._failed, callbackArgs=(where,), errbackArgs=(where,))
            if self._broken:
                # Not an exception that twistd would print the traceback of.
                raise SystemExit(1)
        self._starting = False

    def prepare(self) -> None:
        """Called before anybody is served, when the process has given up the rights that it need not have.

        For a subclass that needs more than its factory; what cannot be had it says by `fail`.
        """

    def startService(self) -> None:
        """Runs; twistd has called `privilegedStartService` before."""
        if not self._ports:
            self.privilegedStartService()
        self._starting = True
        self.prepare()
        if self._broken:
            raise SystemExit(1)
        self._starting = False
        super().startService()
        from twisted.internet import reactor

        running: Any = reactor
        running.callWhenRunning(self._runs, running)

    def _runs(self, reactor: Any) -> None:
        """It may be ended in order from now on, so that whoever waited for it may be told."""
        _Signals.serve(reactor, self)
        if self.running:
            self._is_ready = True
            unsaid, self._unsaid = self._unsaid, []
            for where in unsaid:
                self._say(where)

    def stopService(self) -> Deferred[Any]:
        """Stops listening, takes no new calls, and lets those that run end, in the time of ``--drain``."""
        super().stopService()
        self._is_ready = False
        ports, self._ports = self._ports, []
        waits: list[Deferred[Any]] = [maybeDeferred(port.stopListening) for port in ports]
        seconds = self._options["drain"]
        connections = len(self._factory.connections)
        if connections:
            _log.info("{connections} connections have {seconds:g} s to end", connections=connections, seconds=seconds)
        waits.append(self._factory.drain(seconds))
        stopped = DeferredList(waits, consumeErrors=True)
        stopped.addCallback(self._stopped)
        return stopped

    def hurry(self) -> None:
        """Cancels what still runs."""
        connections = self._factory.connections
        _log.warn("{connections} connections are closed now", connections=len(connections))
        for connection in connections:
            connection.close()

    def _stopped(self, result: Any) -> Any:
        _Signals.forget(self)
        return result

    def _listening(self, port: IListeningPort, where: str) -> None:
        self._ports.append(port)
        if self._is_ready:
            self._say(where)
        else:
            self._unsaid.append(where)

    def _say(self, where: str) -> None:
        _log.info("serving {protocols} at {where}", where=where, protocols=", ".join(self._names()))

    def _names(self) -> list[str]:
        return [protocol_name(protocol) for protocol in self._factory.protocols]

    def _failed(self, failure: Failure, where: str) -> None:
        self.fail(f"cannot listen at {where}: {reason_of(failure.value)}")

    def fail(self, text: str) -> None:
        """Ends the process with exit status 1: what is served cannot be.

        :param text: why, on one line.
        """
        self._broken = True
        _log.critical("{text}", text=text)
        parent: Any = getattr(self._options, "parent", None) or {}
        pidfile = parent.get("pidfile")
        if pidfile and os.path.exists(pidfile):
            os.unlink(pidfile)
        pipe = parent.get("statusPipe")
        if pipe is not None and self._starting:
            # A daemon has no standard error any more: the process that started it reads this, and says it there; 100
            # octets of it, and what went wrong comes last.
            octets = text.encode("ascii", "replace")
            os.write(pipe, b"1 " + (octets if len(octets) <= _PIPED else b"..." + octets[3 - _PIPED :]))
            os.close(pipe)
        else:
            _complain(text)
        if not self._starting:
            # An endpoint that took its time: the reactor runs by now, and its end would be exit status 0.
            from twisted.internet import reactor

            running: Any = reactor
            running.addSystemEventTrigger("after", "shutdown", os._exit, 1)
            running.stop()


class _Signals:
    """SIGTERM and SIGINT while the reactor runs: the first has it stop, and the next has its services hurry.

    The reactor's own handlers note which signal it was, and twistd ends by the same signal at last.  For SIGINT that is
    what a shell wants to see; SIGTERM is kept from the reactor, so that a server which ended in order exits with 0.
    Handlers that are not the reactor's are somebody else's, and stay.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._services: list[ServerService] = []
        self._previous: dict[int, Any] = {}
        self._is_ending = False

    @classmethod
    def serve(cls, reactor: Any, service: ServerService) -> None:
        """Has a service of a running reactor told of signals."""
        if not service.running or threading.current_thread() is not threading.main_thread():
            return
        signals = cls._installed()
        if signals is None:
            signals = cls(reactor)
            signals._install()
        signals._services.append(service)

    @classmethod
    def forget(cls, service: ServerService) -> None:
        """A service has stopped."""
        signals = cls._installed()
        if signals is not None and service in signals._services:
            signals._services.remove(service)
            if not signals._services and not signals._is_ending:
                signals._restore()

    @classmethod
    def _installed(cls) -> _Signals | None:
        for number in (signal.SIGTERM, signal.SIGINT):
            installed = getattr(signal.getsignal(number), "__self__", None)
            if isinstance(installed, cls):
                return installed
        return None

    def _install(self) -> None:
        for number, own in ((signal.SIGTERM, "sigTerm"), (signal.SIGINT, "sigInt")):
            previous = signal.getsignal(number)
            if previous is not None and previous == getattr(self._reactor, own, None):
                self._previous[number] = previous
                signal.signal(number, self._handle)

    def _restore(self) -> None:
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, previous)

    def _handle(self, number: int, frame: Any) -> None:
        # Anything may be in the midst of anything now: the reactor does it in its turn.
        self._reactor.callFromThread(self._received, number, frame)

    def _received(self, number: int, frame: Any) -> None:
        if self._is_ending:
            for service in self._services:
                service.hurry()
            return
        self._is_ending = True
        self._reactor.addSystemEventTrigger("after", "shutdown", self._restore)
        if number == signal.SIGTERM:
            _log.info("received SIGTERM, shutting down")
            try:
                self._reactor.stop()
            except ReactorNotRunning:
                # It stops already, for another reason.
                self._received(number, frame)
        else:
            self._previous[number](number, frame)


def _complain(text: str) -> None:
    stream = sys.__stderr__
    if stream is not None:
        stream.write(f"{os.path.basename(sys.argv[0])}: {text}\n")
        stream.flush()
