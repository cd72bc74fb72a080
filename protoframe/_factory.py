"""`Factory`: serves Protocols on any Twisted stream endpoint, and over UDP.

Knows how an address becomes a conversation; where to listen is `protoframe.listen`'s.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.interfaces import IAddress, IReactorTime
from twisted.internet.protocol import Factory as TwistedFactory
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.logger import Logger

from protoframe._alarms import Alarms
from protoframe._carrier import Carrier
from protoframe._clock import clock_of
from protoframe._connection import Connection
from protoframe._datagram import DatagramCarrier
from protoframe._protocol import Protocol
from protoframe._serving import MethodTable
from protoframe._sessions import Keeper
from protoframe._stream import StreamCarrier, TurnedAway
from protoframe._version import __version__
from protoframe.authentication import is_authenticator
from protoframe.core.limits import Limits
from protoframe.core.schema import Method, methods_of, wire_names
from protoframe.core.state import Role
from protoframe.errors import TooManyConnections
from protoframe.health import Health
from protoframe.interceptors import Interceptor, checked
from protoframe.reflection import Reflection

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from protoframe.authentication import Authenticator

__all__ = ["AGENT", "Factory"]

P = TypeVar("P", bound=Protocol[Any])

AGENT = f"protoframe/{__version__}"

_log = Logger(namespace="protoframe.factory")


class Factory(TwistedFactory):
    """Serves one or more Protocols to everyone who connects.

    It is an `IProtocolFactory`, so any stream endpoint listens with it, and `protoframe.listen` does so from a string.
    Each conversation gets instances of its own, made by `create`; state that they share can live on a subclass:

    >>> from protoframe import request
    >>> class Bank(Protocol):
    ...     def __init__(self, accounts: dict[str, int]) -> None:
    ...         self.accounts = accounts
    ...
    ...     @request
    ...     async def balance(self, name: str) -> int:
    ...         return self.accounts[name]
    >>> class BankFactory(Factory):
    ...     def __init__(self) -> None:
    ...         super().__init__(Bank)
    ...         self.accounts = {"ann": 10}
    ...
    ...     def create(self, protocol):
    ...         return protocol(self.accounts)
    >>> BankFactory().create(Bank).accounts
    {'ann': 10}

    :param protocols: the Protocol classes to serve.
    :param limits: what this end takes of its peers.
    :param reflection: whether peers may ask what is served.
    :param reactor: for timers; by default the one that `protoframe.listen` was given, or else the installed one.
    :param authenticator: finds out who a peer is, before anything is told or served to it.  Without one everybody is
        let in, and a peer is known by the certificate that it has shown, if its connection asks for one.
    :param anonymous: whether a peer is let in, as nobody, that shows nothing which the authenticator looks at.
    :param interceptors: what runs around each call that is served, and each that is made to a peer; the first is the
        outermost.
    :raises TypeError: no Protocol is given, one has a signature that cannot travel, or something is no authenticator or
        interceptor.
    :raises ValueError: two Protocols serve methods of the same name.
    """

    noisy = False

    def __init__(
        self,
        *protocols: type[Protocol[Any]],
        limits: Limits | None = None,
        reflection: bool = True,
        reactor: IReactorTime | None = None,
        authenticator: Authenticator | None = None,
        anonymous: bool = False,
        interceptors: Iterable[Interceptor] = (),
    ) -> None:
        if authenticator is not None and not is_authenticator(authenticator):
            raise TypeError(f"authenticator: {authenticator!r} does not provide IAuthenticator")
        if not protocols:
            raise TypeError("a Factory serves at least one Protocol")
        for protocol in protocols:
            if not (isinstance(protocol, type) and issubclass(protocol, Protocol)):
                raise TypeError(f"a Factory serves subclasses of protoframe.Protocol, not {protocol!r}")
        self.limits = limits if limits is not None else Limits()
        self.reactor = reactor
        self.authenticator = authenticator
        self.anonymous = anonymous
        self.interceptors = checked(interceptors)
        self.protocols = protocols
        # In the order in which they came: it is that in which they are drained.
        self._connections: dict[Connection, None] = {}
        self._turned_away = 0
        self._keeper: Keeper | None = None
        # These serve all connections: each of their own would cost every connection what only few ask for.
        self._helpers: tuple[Protocol[Any], ...] = ()
        self._alarms: Alarms | None = None
        self._gone = lambda connection: self._connections.pop(connection, None)
        self._unready: set[type[Protocol[Any]]] = set()
        self._is_draining = False
        self._helping: tuple[type[Protocol[Any]], ...] = (Health, Reflection) if reflection else (Health,)
        self._table = method_table((*protocols, *self._helping))

    @property
    def connections(self) -> AbstractSet[Connection]:
        """The connections that are open now: of peers that have greeted, and were let in."""
        return {connection: None for connection in self._connections if connection.is_open}.keys()

    @property
    def methods(self) -> list[Method]:
        """What is served, but for what only looks at it."""
        return [method for protocol in self.protocols for method in methods_of(protocol).values() if method.function]

    def create(self, protocol: type[P]) -> P:
        """Makes the instance of a Protocol that serves one conversation; override it to pass arguments."""
        return protocol()

    def set_ready(self, ready: bool, *protocols: type[Protocol[Any]]) -> None:
        """Says whether calls are to come, for whoever asks (`protoframe.health.Health`); those that do are served.

        :param protocols: of which; all that are served by default.
        :raises ValueError: one is not served here.
        """
        for protocol in protocols or self.protocols:
            if protocol not in self.protocols:
                raise ValueError(f"{protocol!r} is not served here")
            if ready:
                self._unready.discard(protocol)
            else:
                self._unready.add(protocol)

    def is_ready(self, protocol: type[Protocol[Any]]) -> bool:
        """Whether calls of a Protocol are to come."""
        return protocol not in self._unready and not self._is_draining

    def drain(self, seconds: float | None = None) -> Deferred[None]:
        """Has all connections take no new calls, and close when what runs has ended; fires when all are gone.

        Stop listening first.

        :param seconds: until what still runs is cancelled; `Limits.drain_timeout` by default.
        """
        done: Deferred[None] = Deferred()
        self._is_draining = True
        waits = DeferredList([connection.drain(seconds) for connection in self._connections])
        waits.addCallback(lambda _: self.stopFactory())
        waits.addCallback(lambda _: setattr(self, "_is_draining", False))
        waits.addCallback(lambda _: done.callback(None))
        return done

    def stopFactory(self) -> None:
        """Nobody can come again: nothing is kept for those who have lost their connection."""
        if self._keeper is not None:
            self._keeper.end_left()

    def buildProtocol(self, addr: IAddress | None) -> TwistedProtocol | None:
        """Makes what handles the connection of a peer; a subclass may return ``None`` to turn the peer away."""
        reactor = self.reactor
        if reactor is None:
            from twisted.internet import reactor as installed

            reactor = self.reactor = IReactorTime(installed)
        if len(self._connections) >= self.limits.max_connections:
            return self._turn_away(addr, reactor)

        if self._alarms is None or self._alarms.reactor is not reactor:
            self._alarms = Alarms(reactor)
        if self._keeper is None:
            self._keeper = Keeper(self.limits, reactor)
            self._helpers = tuple(self._create(protocol) for protocol in self._helping)
        if getattr(addr, "type", None) == "UDP":
            # It is no `IProtocol`, and what asks for it (`protoframe.listen`) takes it for what it is.
            datagrams: Any = DatagramCarrier(self._connect, self.limits, reactor)
            return typing.cast("TwistedProtocol", datagrams)
        carrier = StreamCarrier(self._connect, self.limits, clock_of(reactor), pauses_peer=True)
        carrier.factory = self
        return carrier

    def _connect(self, carrier: Carrier, address: Any) -> Connection:
        connection = Connection(
            Role.ACCEPTOR,
            typing.cast("IReactorTime", self.reactor),
            self.limits,
            self._table,
            tuple([self._create(protocol) for protocol in self.protocols]),
            carrier,
            address,
            AGENT,
            authenticator=self.authenticator,
            anonymous=self.anonymous,
            interceptors=self.interceptors,
            keeper=self._keeper,
            alarms=self._alarms,
            helpers=self._helpers,
            gone=self._gone,
        )
        self._connections[connection] = None
        return connection

    def _turn_away(self, address: IAddress | None, reactor: IReactorTime) -> TurnedAway:
        self._turned_away += 1
        error = TooManyConnections(f"{len(self._connections)} connections are open already")
        if self._turned_away & (self._turned_away - 1) == 0:
            # The first, the second, the fourth...: a flood of them is no flood of lines.
            _log.warn(
                "{peer}: {kind}: {error}; {count} were turned away by now",
                peer=address,
                kind=error.type_name,
                error=error.message,
                count=self._turned_away,
            )
        return TurnedAway(error, reactor, self.limits.close_timeout)

    def _create(self, protocol: type[Any]) -> Any:
        instance = protocol() if protocol in (Health, Reflection) else self.create(protocol)
        instance.factory = self
        return instance


def method_table(protocols: tuple[type[Protocol[Any]], ...]) -> MethodTable:
    """What Protocols serve, by the names on the wire.

    :raises TypeError: a signature cannot travel.
    :raises ValueError: two Protocols serve methods of the same name.
    """
    table: dict[bytes, tuple[Method, int]] = {}
    for index, protocol in enumerate(protocols):
        methods: Mapping[str, Method] = methods_of(protocol)
        for method in methods.values():
            for name in wire_names(protocol, method):
                if table.setdefault(name.encode(), (method, index))[1] != index:
                    raise ValueError(
                        f"{name} is served by {protocols[table[name.encode()][1]].__name__} and {protocol.__name__}"
                    )
    return table
