"""What a twistd plugin needs: options that say where to listen, and the service that listens there.

Knows twistd and endpoint strings; what is served is the `Factory`'s.  A plugin is a module with ``Options``, a
subclass of `ServerOptions`, and ``makeService``, which gives a `ServerService`; `protoframe.servers` has some.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredList, maybeDeferred
from twisted.internet.interfaces import IListeningPort
from twisted.logger import Logger
from twisted.python import usage
from twisted.python.failure import Failure

from protoframe._endpoints import listen, reason_of, server_endpoint
from protoframe._factory import Factory
from protoframe._version import __version__

__all__ = ["ServerOptions", "ServerService"]

_log = Logger(namespace="protoframe.service")


class ServerOptions(usage.Options):
    """Command-line options that every server has; a server's own go into a subclass.

    What is wrong with them is one line on standard error and exit status 2.

    :cvar default_listen: where to listen if no ``--listen`` is given.
    """

    optFlags: ClassVar[list[list[str | None]]] = [["no-reflection", None, "Do not describe to peers what is served."]]
    default_listen = "tcp:12000:interface=127.0.0.1"

    def __init__(self) -> None:
        super().__init__()
        self["listen"] = []

    def opt_listen(self, where: str) -> None:
        """Where to listen: a Twisted endpoint string (tcp:12000, unix:/run/x.sock, ...); may be given several times."""
        self["listen"].append(where)

    opt_l = opt_listen

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
            _complain(f"{error}; see: twistd {self._name()} --help")
            raise SystemExit(2) from None

    def _name(self) -> str:
        parent: Any = getattr(self, "parent", None)
        return getattr(parent, "subCommand", None) or "NAME"


class ServerService(Service):
    """Serves a factory at one or more places, or not at all.

    A place that cannot be had ends the process, with one line on standard error and exit status 1: no server runs that
    listens at half of its places.

    :param factory: what to serve.
    :param options: the command line, with where to listen.
    """

    def __init__(self, factory: Factory, options: ServerOptions) -> None:
        self._factory = factory
        self._options = options
        self._ports: list[IListeningPort] = []
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

    def startService(self) -> None:
        """Runs; twistd has called `privilegedStartService` before."""
        if not self._ports:
            self.privilegedStartService()
        super().startService()

    def stopService(self) -> Deferred[Any]:
        """Stops listening, and closes the conversations in order."""
        super().stopService()
        ports, self._ports = self._ports, []
        waits: list[Deferred[Any]] = [maybeDeferred(port.stopListening) for port in ports]
        waits += [connection.close() for connection in self._factory.connections]
        return DeferredList(waits, consumeErrors=True)

    def _listening(self, port: IListeningPort, where: str) -> None:
        self._ports.append(port)
        _log.info("serving {protocols} at {where}", where=where, protocols=", ".join(self._names()))

    def _names(self) -> list[str]:
        return [protocol.__name__ for protocol in self._factory.protocols]

    def _failed(self, failure: Failure, where: str) -> None:
        self._broken = True
        text = f"cannot listen at {where}: {reason_of(failure.value)}"
        _log.critical("{text}", text=text)
        parent: Any = getattr(self._options, "parent", None) or {}
        pidfile = parent.get("pidfile")
        if pidfile and os.path.exists(pidfile):
            os.unlink(pidfile)
        pipe = parent.get("statusPipe")
        if pipe is not None and self._starting:
            # A daemon has no standard error any more: the process that started it reads this, and says it there.
            os.write(pipe, b"1 " + text.encode("ascii", "replace")[:98])
            os.close(pipe)
        else:
            _complain(text)
        if not self._starting:
            # An endpoint that took its time: the reactor runs by now, and its end would be exit status 0.
            from twisted.internet import reactor

            running: Any = reactor
            running.addSystemEventTrigger("after", "shutdown", os._exit, 1)
            running.stop()


def _complain(text: str) -> None:
    stream = sys.__stderr__
    if stream is not None:
        stream.write(f"{os.path.basename(sys.argv[0])}: {text}\n")
        stream.flush()
