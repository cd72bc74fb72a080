"""`listen` and `connect`: conversations from endpoint strings.

Knows where; what happens there is `Factory`'s and the connection's.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import typing
from collections.abc import Generator, Iterable
from types import TracebackType
from typing import Any, Generic, TypeVar

from OpenSSL.crypto import Error as CryptoError
from OpenSSL.SSL import Error as SSLError
from twisted.internet.defer import CancelledError, Deferred, maybeDeferred
from twisted.internet.endpoints import clientFromString, serverFromString
from twisted.internet.error import CannotListenError, ConnectError, ConnectingCancelledError, DNSLookupError
from twisted.internet.error import TimeoutError as TwistedTimeoutError
from twisted.internet.interfaces import (
    IProtocolFactory,
    IReactorTime,
    ISSLTransport,
    IStreamClientEndpoint,
    IStreamServerEndpoint,
)
from twisted.internet.protocol import ClientFactory
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.filepath import UnlistableError

from protoframe._clock import call_later, clock_of
from protoframe._connection import Connection
from protoframe._context import scope
from protoframe._datagram import DatagramCarrier
from protoframe._datagram_endpoints import client_of_udp, is_udp, server_of_udp
from protoframe._factory import AGENT, Factory, method_table
from protoframe._protocol import Protocol
from protoframe._proxy import proxy_class
from protoframe._stream import StreamCarrier
from protoframe._tls import client_endpoint_of, describe_tls_failure, is_tls_client, is_tls_server, server_endpoint_of
from protoframe.authentication import Token
from protoframe.core.limits import Limits
from protoframe.core.state import Role
from protoframe.errors import ConnectFailed, ConnectionLost, DeadlineExceeded, Error, Unauthenticated, VersionMismatch
from protoframe.interceptors import Interceptor, checked

__all__ = ["Connecting", "ListeningPort", "connect", "listen"]

_log = Logger(namespace="protoframe.endpoints")

P = TypeVar("P", bound=Protocol[Any])

_BRACKETS = re.compile(r"^(\w+):\[([0-9A-Fa-f:.]+)(%\w+)?\](?=:|$)")
#: What ``sun_path`` of a UNIX socket's address holds, on Linux.
_LONGEST_PATH = 107
_SERVER_PORTS = frozenset({"tcp", "tcp6", "ssl"})
_CLIENT_PORTS = frozenset({"tcp", "ssl", "tls"})


class ListeningPort(typing.Protocol):
    """What `listen` gives: Twisted's `IListeningPort`, as type checkers see it without a plugin for zope.interface."""

    def getHost(self) -> Any:
        """The address where it listens."""

    def stopListening(self) -> Deferred[None]:
        """Listens no more; connections that are open go on."""
        ...


def listen(reactor: Any, where: str | IStreamServerEndpoint, factory: Any) -> Deferred[ListeningPort]:
    """Serves a `Factory`.

    :param where: ``udp:12000``, ``udp:12000:interface=127.0.0.1``, or ``udp:systemd=0`` for a socket that systemd has
        opened; or a Twisted server endpoint string, such as ``tcp:12000``, ``tcp6:12000``, ``unix:/run/x.sock`` or
        ``tls:12000:privateKey=key.pem:certKey=cert.pem``; or an endpoint.
    :return: fires with the listening port; ``port.stopListening()`` ends it, ``port.getHost()`` tells its address.

    :raises TypeError: the factory is none, or ``where`` is neither a string nor an endpoint.

    It fails with `ValueError` where the string is wrong, and with Twisted's `CannotListenError` where the port is
    taken.
    """
    if not typing.cast("Any", IProtocolFactory).providedBy(factory):
        raise TypeError(f"listen serves a Factory, such as Factory(Speech), not {factory!r}")
    _check_where(where, IStreamServerEndpoint)
    if getattr(factory, "reactor", reactor) is None:
        factory.reactor = reactor
    return maybeDeferred(_listen, reactor, where, factory)


def _check_where(where: Any, interface: Any) -> None:
    if not isinstance(where, str) and not interface.providedBy(where):
        raise TypeError(f"expected an endpoint string or an endpoint, got {where!r}")


def _listen(reactor: Any, where: Any, factory: Any) -> Deferred[ListeningPort]:
    if isinstance(where, str) and is_udp(where) and not isinstance(factory, Factory):
        raise TypeError(f"over UDP listen serves a protoframe.Factory, not {factory!r}")
    endpoint: Any = server_endpoint(reactor, where) if isinstance(where, str) else where
    listening: Deferred[ListeningPort] = endpoint.listen(factory)
    return listening


def server_endpoint(reactor: Any, where: str) -> IStreamServerEndpoint:
    """The endpoint of a server string.

    :raises ValueError: the string is wrong; the text says how, on one line.
    """
    _check_port(where, 1, _SERVER_PORTS)
    make: Any = server_endpoint_of if is_tls_server(where) else server_of_udp if is_udp(where) else serverFromString
    try:
        endpoint: IStreamServerEndpoint = make(reactor, where)
    except Exception as error:
        raise ValueError(f"{where!r} is no place to listen: {_one_line(error)}") from None
    return endpoint


def client_endpoint(reactor: Any, where: str) -> IStreamClientEndpoint:
    """The endpoint of a client string.

    :raises ValueError: the string is wrong; the text says how, on one line.
    """
    where = _BRACKETS.sub(
        lambda match: f"{match[1]}:{(match[2] + (match[3] or '')).replace(':', chr(92) + ':')}", where
    )
    _check_port(where, 2, _CLIENT_PORTS)
    make: Any = client_endpoint_of if is_tls_client(where) else client_of_udp if is_udp(where) else clientFromString
    try:
        endpoint: IStreamClientEndpoint = make(reactor, where)
    except Exception as error:
        raise ValueError(f"{where!r} is no place to connect to: {_one_line(error)}") from None
    return endpoint


def _check_port(where: str, position: int, kinds: frozenset[str]) -> None:
    # Twisted takes any number here and fails when it is used, in a way that depends on the platform.
    parts = re.split(r"(?<!\\):", where)
    if parts[0] == "unix" and len(parts) > 1 and len(os.fsencode(parts[1])) > _LONGEST_PATH:
        raise ValueError(f"{where!r}: the path of a UNIX socket has {_LONGEST_PATH} bytes at most")
    if parts[0] in kinds:
        named = [part[5:] for part in parts if part.startswith("port=")]
        text = named[0] if named else next((part for part in parts[position : position + 1] if "=" not in part), "")
        if text and not text.isdecimal():
            raise ValueError(f"{where!r}: {text!r} is no port number")
        if text and int(text) > 65535:
            raise ValueError(f"{where!r}: port {text} is above 65535")


def _one_line(error: Exception) -> str:
    if isinstance(error, TypeError):
        # A wrong or a missing part of the string reaches a Python function as an argument; its words are about that.
        return "a part of it is missing, unknown or too many"
    if isinstance(error, IndexError | KeyError):
        return "a part of it is missing"
    if isinstance(error, OSError):
        return reason_of(error)
    if isinstance(error, SSLError | CryptoError):
        return "the certificate or the key cannot be read"
    text = " ".join(str(error).split())
    return text or type(error).__name__


class _ClientFactory(ClientFactory):
    noisy = False

    def __init__(
        self,
        reactor: IReactorTime,
        limits: Limits,
        serving: list[Protocol[Any]],
        token: Token | None = None,
        interceptors: tuple[Interceptor, ...] = (),
        session: bytes = b"",
        next_key: int = 0,
    ) -> None:
        self._reactor = reactor
        self._session = session
        self._next_key = next_key
        self._token = token
        self._interceptors = interceptors
        self._limits = limits
        self._serving = serving
        self._table = method_table(tuple(type(protocol) for protocol in serving))

    def buildProtocol(self, addr: Any) -> Any:
        def connection(carrier: Any, address: Any) -> Connection:
            if self._token is not None and not _is_private(carrier.transport, address):
                _log.warn("the token goes to {peer} unencrypted: whoever listens in can use it", peer=address)
            return Connection(
                Role.INITIATOR,
                self._reactor,
                self._limits,
                self._table,
                self._serving,
                carrier,
                address,
                AGENT,
                token=self._token.reveal() if self._token is not None else "",
                interceptors=self._interceptors,
                session=self._session,
                next_key=self._next_key,
            )

        if getattr(addr, "type", None) == "UDP":
            return DatagramCarrier(connection, self._limits, self._reactor)
        return StreamCarrier(connection, self._limits, clock_of(self._reactor), pauses_peer=False)


def _is_private(transport: Any, address: Any) -> bool:
    """Whether what is sent is read by the other end alone, or by this machine."""
    host = getattr(address, "host", None)
    if host is None:
        return True
    encrypted: bool = typing.cast("Any", ISSLTransport).providedBy(transport)
    try:
        return encrypted or ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def connect(
    reactor: Any,
    where: str | IStreamClientEndpoint,
    protocol: type[P],
    *,
    serving: Protocol[Any] | type[Protocol[Any]] | None = None,
    limits: Limits | None = None,
    token: Token | None = None,
    interceptors: Iterable[Interceptor] = (),
) -> Connecting[P]:
    """Opens a conversation with a server.

    Used as ``async with connect(reactor, "tcp:127.0.0.1:12000", Speech) as speech:``, it gives a proxy, typed as the
    Protocol, and closes in order when the block ends.  Awaited instead, it gives the same proxy, and
    `Connecting.close` closes.

    :param where: ``udp:host:port``; or a Twisted client endpoint string, such as ``tcp:host:port``, ``tls:host:port``
        or ``unix:path``; or an endpoint.  An IPv6 address may stand in brackets (``tcp:[::1]:12000``).
    :param protocol: what the server answers.
    :param serving: what this end answers, where the server may call it: a Protocol, or its class.
    :param limits: what this end takes of the server.
    :param token: shows the server who calls.  Whoever can listen in on the connection reads it: use TLS, or a UNIX
        socket.
    :param interceptors: what runs around each call that is made or served here; the first is the outermost.
    :raises ValueError: ``where`` is wrong.
    :raises TypeError: the Protocol has a signature that cannot travel.

    Opening takes `Limits.handshake_timeout` at most, or what is left of `timeout`.  It fails with `ConnectFailed` where
    nothing listens or what listens does not speak the wire format, with `VersionMismatch`, with `Unauthenticated` where
    the server does not know who calls, or with `DeadlineExceeded`.
    """
    return Opening(
        reactor, where, protocol, serving, limits if limits is not None else Limits(), token, checked(interceptors)
    ).begin()


class Opening(Generic[P]):
    """What is asked of a conversation, before it is opened; see `connect`.

    :raises ValueError: ``where`` is wrong.
    :raises TypeError: something is not of its type.
    :ivar where: where to, as a text.
    :ivar limits: what this end takes.
    """

    def __init__(
        self,
        reactor: Any,
        where: str | IStreamClientEndpoint,
        protocol: type[P],
        serving: Protocol[Any] | type[Protocol[Any]] | None,
        limits: Limits,
        token: Token | None,
        interceptors: tuple[Interceptor, ...] = (),
    ) -> None:
        if not (isinstance(protocol, type) and issubclass(protocol, Protocol)):
            raise TypeError(f"connect calls a subclass of protoframe.Protocol, not {protocol!r}")
        proxy_class(protocol)
        _check_where(where, IStreamClientEndpoint)
        if serving is not None and not (
            isinstance(serving, Protocol) or (isinstance(serving, type) and issubclass(serving, Protocol))
        ):
            raise TypeError(f"serving: expected a Protocol or its class, got {serving!r}")
        if token is not None and not isinstance(token, Token):
            # What it is instead may be the secret itself: it is not shown.
            raise TypeError(f"token: expected a protoframe.Token, got {type(token).__name__}")
        self.where = where if isinstance(where, str) else repr(where)
        self.limits = limits
        self._endpoint = client_endpoint(reactor, where) if isinstance(where, str) else where
        self._reactor = reactor
        self._protocol = protocol
        self._serving = serving
        self._token = token
        self._interceptors = interceptors

    def begin(self, session: bytes = b"", next_key: int = 0) -> Connecting[P]:
        """A conversation that is not open yet.

        :param session: the secret by which the server knows this client again.
        :param next_key: see `Hello.next_key`.
        """
        serving = self._serving() if isinstance(self._serving, type) else self._serving
        served = [serving] if serving is not None else []
        factory = _ClientFactory(self._reactor, self.limits, served, self._token, self._interceptors, session, next_key)
        return Connecting(self._reactor, self._endpoint, self.where, self._protocol, factory, self.limits)


class Connecting(Generic[P]):
    """A conversation from the end that opens it: what `connect` returns."""

    def __init__(
        self,
        reactor: Any,
        endpoint: IStreamClientEndpoint,
        where: str,
        protocol: type[P],
        factory: _ClientFactory,
        limits: Limits,
    ) -> None:
        self._reactor = reactor
        self._endpoint = endpoint
        self._where = where
        self._protocol = protocol
        self._limits = limits
        self._factory = factory
        self._connection: Connection | None = None
        self._opening = False
        self._attempt: Deferred[Any] | None = None

    def __await__(self) -> Generator[Any, Any, P]:
        return self._open().__await__()

    async def __aenter__(self) -> P:
        return await self._open()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def connection(self) -> Connection:
        """The open connection.

        :raises ConnectFailed: there is none.
        """
        if self._connection is None:
            raise ConnectFailed(f"{self._where}: not connected")
        return self._connection

    def close(self) -> Deferred[None]:
        """Ends the conversation in order; fires when the connection is gone.  Calls without an answer fail.

        Where it is not open yet, whoever waits for that gets a ``CancelledError``.
        """
        if self._connection is None:
            if self._attempt is not None:
                self._attempt.cancel()
            done: Deferred[None] = Deferred()
            done.callback(None)
            return done
        return self._connection.close()

    async def _open(self) -> P:
        if self._opening:
            raise ConnectFailed(f"{self._where}: connected already; call connect() again for another conversation")
        self._opening = True
        seconds = self._limits.handshake_timeout
        remaining = scope.get().remaining()
        if remaining is not None:
            seconds = min(seconds, max(0.0, remaining))
        attempt: Deferred[Any] = self._endpoint.connect(self._factory)
        self._attempt = attempt
        expired = False

        def expire() -> None:
            nonlocal expired
            expired = True
            attempt.cancel()

        timer = call_later(self._reactor, seconds, expire)
        try:
            carrier = await attempt
            # A wrapper, such as the one for TLS, gives the protocol itself.
            connection: Connection = carrier.connection
            self._attempt = attempt = connection.opened
            await attempt
        except Exception as error:
            self._opening = False
            if isinstance(error, CancelledError | ConnectingCancelledError) and not expired:
                raise CancelledError from None
            raise self._explain(error, seconds if expired else None) from None
        finally:
            timer.cancel()
            self._attempt = None
        self._connection = connection
        return connection.proxy(self._protocol)

    def _explain(self, error: Exception, seconds: float | None) -> Error:
        """What went wrong, as one of this package's errors."""
        where = self._where
        explained: Error
        if seconds is not None or isinstance(error, TwistedTimeoutError):
            after = f" within {seconds:.3g} s" if seconds is not None else ""
            explained = DeadlineExceeded(f"{where} did not answer{after}")
        elif isinstance(error, VersionMismatch):
            explained = VersionMismatch(f"{where}: {error.message}")
        elif isinstance(error.__cause__, Unauthenticated):
            explained = Unauthenticated(f"{where}: {error.__cause__.message}")
        elif isinstance(error, Error):
            # A server that speaks TLS has no words for who does not.
            plain = isinstance(error, ConnectionLost) and error.__cause__ is None and where.startswith("tcp:")
            hint = " (if TLS is spoken there, connect with tls: instead of tcp:)" if plain else ""
            explained = ConnectFailed(f"{where}: {error.message}{hint}")
        elif isinstance(error, DNSLookupError):
            explained = ConnectFailed(f"{where}: no such host")
        elif isinstance(error, ConnectError):
            explained = ConnectFailed(f"{where}: {reason_of(error)}")
        else:
            text = describe_tls_failure(error) or Failure(error).getErrorMessage()
            explained = ConnectFailed(f"{where}: {text or type(error).__name__}")
        explained.may_have_run = False
        return explained


def reason_of(error: BaseException | None) -> str:
    """Why a place cannot be listened at or connected to, in a few words."""
    cause: Any = error
    if isinstance(error, CannotListenError):
        cause = error.socketError
    elif isinstance(error, ConnectError) and isinstance(error.osError, OSError):
        cause = error.osError
    elif isinstance(error, UnlistableError):
        cause = error.originalException
    number = getattr(cause, "errno", None) or (error.osError if isinstance(error, ConnectError) else None)
    if isinstance(number, int) and number in _REASONS:
        return _REASONS[number]
    if isinstance(number, int) and not isinstance(cause, OSError):
        text = os.strerror(number)
        return f"{text[:1].lower()}{text[1:]}"
    if isinstance(cause, OSError) and cause.strerror:
        file = f": {cause.filename}" if isinstance(cause.filename, str) and not cause.filename.isdecimal() else ""
        return f"{cause.strerror[:1].lower()}{cause.strerror[1:]}{file}"
    text = " ".join(str(cause).split()).rstrip(".")
    return f"{text[:1].lower()}{text[1:]}" if text else type(cause).__name__


_REASONS = {
    errno.EADDRINUSE: "the address is in use",
    errno.EADDRNOTAVAIL: "this machine has no such address",
    errno.ECONNREFUSED: "connection refused",
    errno.ENETUNREACH: "the network cannot be reached",
    errno.EHOSTUNREACH: "the host cannot be reached",
}
