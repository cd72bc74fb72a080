"""The sockets of UDP: one that a server shares among its peers, and one of each client's own.

Knows Twisted's datagram transports, whose each datagram is, and who is let in; what is carried is
`protoframe._datagram`'s, and what is in a datagram `protoframe.core.datagram`'s.
"""

from __future__ import annotations

import errno
import secrets
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionRefusedError as TwistedConnectionRefusedError
from twisted.internet.error import MessageLengthError
from twisted.internet.protocol import DatagramProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure

from protoframe._clock import Timer, call_later, clock_of
from protoframe._datagram import DatagramCarrier, lose_datagram
from protoframe._datagram_ports import open_port
from protoframe._stream import TurnedAway
from protoframe.core.datagram.association import Address, Association, Path
from protoframe.core.datagram.gate import Gate
from protoframe.core.datagram.knock import Knock
from protoframe.core.datagram.packets import (
    BASE_SIZE,
    DATA_OVERHEAD,
    Data,
    Initial,
    Kind,
    Malformed,
    Refused,
    Reset,
    Retry,
    Token,
    Versions,
    read_kind,
    read_plain,
)
from protoframe.core.datagram.rtt import INITIAL_RTT
from protoframe.core.floods import Allowance
from protoframe.core.frames import FIRST_VERSION, LAST_VERSION, GoAway, agree_on_version
from protoframe.errors import ConnectionLost, Error, Status, VersionMismatch

__all__ = ["DatagramClient", "DatagramServer"]

_log = Logger(namespace="protoframe.datagram")

#: Octets of datagrams that the kernel is asked to keep while the process is busy.
_SOCKET_BUFFER = 2 * 1024 * 1024
#: How often in a row a client is told that nothing listens, until it believes it.
_REFUSALS = 3
#: Seconds until a client opens another socket, where the one that it had was closed under it.
_REOPEN_AFTER = 0.1
#: RESETs that a server sends at once, and a second.
_RESET_BURST, _RESET_RATE = 100, 100.0
#: Tokens that are kept for later, of one reactor.
_MOST_TOKENS = 1000

# Of <linux/in.h> and <linux/in6.h>: datagrams are not cut on the way, and may be larger than the path is known to take.
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE = 10, 23, 3

#: Where random octets come from, and tokens of earlier connections by the server's address.
_tokens: WeakKeyDictionary[Any, dict[Address, bytes]] = WeakKeyDictionary()


#: What a client is told that is not wanted, where nobody says why.
_UNWANTED = GoAway(Status.UNAVAILABLE, 0, "the server does not take this connection").serialize()
_TO_SERVER = int(Kind.TO_SERVER)
_TO_CLIENT = int(Kind.TO_CLIENT)
_WITH_SEGMENTS = frozenset((_TO_CLIENT, int(Kind.ACCEPT)))


def random_of(reactor: Any) -> Callable[[int], bytes]:
    """A function that gives random octets: the system's, unless the reactor has its own, as a simulated one does."""
    own: Callable[[int], bytes] | None = getattr(reactor, "token_bytes", None)
    return own if own is not None else secrets.token_bytes


def peer_address(address: Address) -> IPv4Address | IPv6Address:
    """Where a peer is, as Twisted has it."""
    return (IPv6Address if ":" in address[0] else IPv4Address)("UDP", *address)


class _Port(DatagramProtocol):
    """What both ends do with a socket."""

    noisy = False
    transport: Any
    _handle: Any = None

    def startProtocol(self) -> None:
        """Sets the socket up."""
        get_handle = getattr(self.transport, "getHandle", None)
        if get_handle is None:
            return
        self._handle = get_handle()
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            with suppress(OSError):
                self._handle.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)
        if sys.platform == "linux":
            is_ipv6 = self._handle.family == socket.AF_INET6
            level, option = (
                (socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER) if is_ipv6 else (socket.IPPROTO_IP, _IP_MTU_DISCOVER)
            )
            with suppress(OSError):
                self._handle.setsockopt(level, option, _PMTUDISC_PROBE)

    def stopProtocol(self) -> None:
        """The socket is closed."""
        self._handle = None

    def _write(self, datagram: bytes, address: Address | None) -> None:
        """Sends a datagram where there is no socket of the system's, but something that Twisted has as one."""
        if self.transport is not None:
            self.transport.write(datagram, address)


class DatagramServer(_Port):
    """Serves a `Factory` at a UDP port: finds out whose each datagram is, and who is let in.

    :param reactor: for the time.
    :param factory: what is served.
    """

    def __init__(self, reactor: Any, factory: Any) -> None:
        self._reactor = reactor
        self._clock = clock_of(reactor)
        self._factory = factory
        self._random = random_of(reactor)
        self._gate = Gate(self._random(32))
        self._carriers: dict[int, DatagramCarrier] = {}
        self._let_in: dict[tuple[Address, int], DatagramCarrier] = {}
        self._resets = Allowance(_RESET_BURST, _RESET_RATE, self._clock())
        self._is_listening = True

    def send_datagram(self, datagram: bytes, address: Address) -> bool:
        """Sends a datagram, or loses it, as a network may; whether it is too large for this machine."""
        handle = self._handle
        try:
            if handle is not None:
                handle.sendto(datagram, address)
            else:
                self._write(datagram, address)
        except MessageLengthError:
            return True
        except OSError as error:
            return error.errno == errno.EMSGSIZE
        return False

    def datagramReceived(self, datagram: bytes, addr: Any) -> bool:  # type: ignore[override]
        """Takes a datagram; whether it is of a client that was let in.  Nothing but what one sends is ever answered."""
        try:
            plain = read_plain(datagram, _TO_SERVER)
            if plain is not None:
                carrier = self._carriers.get(plain[0])
                if carrier is not None:
                    if not carrier.plain_received(plain, datagram, addr):
                        carrier.datagram_received(datagram, _TO_SERVER, addr)
                    return True
            kind, identifier = read_kind(datagram)
            if kind == _TO_SERVER:
                carrier = self._carriers.get(identifier)
                if carrier is not None:
                    carrier.datagram_received(datagram, kind, addr)
                    return True
                self._reset(datagram, addr)
            elif kind == Kind.INITIAL and self._is_listening:
                self._knocked(Initial.parse(datagram), addr)
        except Malformed:
            pass
        return False

    def _reset(self, datagram: bytes, address: Address) -> None:
        """A client speaks of an association that is gone: tells it so, in fewer octets than it sent."""
        if len(datagram) > DATA_OVERHEAD and self._resets.take(self._clock()):
            packet = Data.parse(datagram)
            self.send_datagram(Reset(packet.identifier, packet.number).serialize(), address)

    def _knocked(self, initial: Initial, address: Address) -> None:
        known = self._let_in.get((address, initial.client_id))
        if known is not None:
            known.knocked()
            return
        try:
            agree_on_version(initial.first_version, initial.last_version)
        except VersionMismatch:
            self.send_datagram(Versions(initial.client_id, FIRST_VERSION, LAST_VERSION).serialize(), address)
            return
        host, port = address[0], address[1]
        now = self._clock()
        out = self._gate.admits(initial.token, host, port, initial.client_id, now)
        if out is None:
            cookie = self._gate.cookie(host, port, initial.client_id, now)
            self.send_datagram(Retry(initial.client_id, cookie).serialize(), address)
            return
        self._let(initial.client_id, address, out)

    def _let(self, client_id: int, address: Address, round_trip: float) -> None:
        """Lets a client in that is where it says, unless the factory turns it away."""
        peer = peer_address(address)
        try:
            carrier = self._factory.buildProtocol(peer)
        except Exception:
            _log.failure("what should serve {peer} could not be made", peer=peer)
            carrier = None
        if not isinstance(carrier, DatagramCarrier):
            reason = carrier.reason if isinstance(carrier, TurnedAway) else _UNWANTED
            self.send_datagram(Refused(client_id, reason).serialize(), address)
            return
        own_id = int.from_bytes(self._random(8))
        # A token says nothing of the port, so it has to show itself yet.
        path = Path(address, is_proven=round_trip > 0)
        path.received = BASE_SIZE
        association = Association(
            is_server=True,
            own_id=own_id,
            peer_id=client_id,
            path=path,
            limits=carrier.limits,
            now=self._clock(),
            random=self._random,
            confirm=carrier.confirm,
        )
        if 0 < round_trip < INITIAL_RTT:
            # One that took longer was asked for again and again, more likely.
            association.recovery.round_trip.measure(round_trip, 0.0)
        association.outflow.add(Token(self._gate.token(address[0], self._clock())).serialize())
        self._carriers[own_id] = carrier
        self._let_in[address, client_id] = carrier

        def forget() -> None:
            self._carriers.pop(own_id, None)
            self._let_in.pop((address, client_id), None)
            if not self._is_listening and not self._carriers:
                self._close_socket()

        try:
            carrier.begin(association, peer, self.send_datagram, forget)
        except Exception:
            _log.failure("what should serve {peer} could not be made", peer=peer)
            forget()
            self.send_datagram(Refused(client_id, _UNWANTED).serialize(), address)

    # IListeningPort, for whoever listens: it stops letting clients in, and those that are in go on.

    def getHost(self) -> Any:
        """The address where it listens."""
        return self.transport.getHost()

    def startListening(self) -> None:
        """It does so already."""

    def stopListening(self) -> Deferred[None]:
        """Lets nobody in any more; fires at once.  The socket is closed when the last association is gone."""
        if self._is_listening:
            self._is_listening = False
            if not self._carriers:
                self._close_socket()
        done: Deferred[None] = Deferred()
        done.callback(None)
        return done

    def _close_socket(self) -> None:
        if self.transport is not None:
            self.transport.stopListening()


class _ClientSocket(_Port):
    """One socket of a client, connected to the server."""

    def __init__(self, client: DatagramClient) -> None:
        self._client = client
        # At once: each datagram comes by here.
        self.datagramReceived = client.datagram_received  # type: ignore[assignment]

    def send_datagram(self, datagram: bytes, _: Address) -> bool:
        """Sends a datagram, or loses it, as a network may; whether it is too large for this machine."""
        handle = self._handle
        try:
            if handle is not None:
                handle.send(datagram)
            else:
                self._write(datagram, None)
        except MessageLengthError:
            return True
        except OSError as error:
            if error.errno == errno.ECONNREFUSED:
                self.refused()
            return error.errno == errno.EMSGSIZE
        return False

    def refused(self) -> None:
        """Hands on that the server's machine says that nothing listens there."""
        self._client.refused()

    # As Twisted has it.
    connectionRefused = refused

    def stopProtocol(self) -> None:
        """The socket is closed: by this end, or by Twisted, which does so when the network reports an error."""
        error = 0
        with suppress(OSError):
            error = self._handle.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if self._handle is not None else 0
        super().stopProtocol()
        if error == errno.ECONNREFUSED:
            self.refused()
        self._client.socket_closed(self)


class DatagramClient:
    """A client, for one association, which may go on from another socket than it began with.

    :param reactor: for the time and the sockets.
    :param factory: gives what carries the conversation, by `buildProtocol`.
    :param address: the server's.
    :ivar connected: fires with the carrier when the server has let this client in.
    """

    def __init__(self, reactor: Any, factory: Any, address: Address) -> None:
        self.connected: Deferred[DatagramCarrier] = Deferred(self._give_up)
        self._reactor = reactor
        self._clock = clock_of(reactor)
        self._factory = factory
        self._address = address
        self._random = random_of(reactor)
        self._kept = _tokens.setdefault(reactor, {})
        self._client_id = int.from_bytes(self._random(8))
        self._knock: Knock | None = Knock(self._client_id, self._kept.pop(address, b""), self._clock())
        self._timer: Timer | None = None
        self._timer_to_reopen: Timer | None = None
        self._socket: _ClientSocket | None = None
        self._carrier: DatagramCarrier | None = None
        self._server_id = 0
        self._refusals = 0
        self._is_over = False

    def open(self) -> Deferred[DatagramCarrier]:
        """Opens a socket, and asks to be let in."""
        try:
            self._open_socket()
        except Exception as error:
            self._fail(error)
        else:
            self._ask()
        return self.connected

    def _open_socket(self) -> None:
        """Goes on from another socket."""
        host, port = self._address
        interface = "::" if ":" in host else "0.0.0.0"  # noqa: S104 - the kernel chooses the one that leads there
        opened = _ClientSocket(self)
        open_port(self._reactor, 0, opened, interface)
        try:
            opened.transport.connect(host, port)
        except Exception:
            opened.transport.stopListening()
            raise
        self._socket = opened
        if self._carrier is not None:
            self._carrier.transmit = opened.send_datagram

    def _ask(self) -> None:
        knock = self._knock
        if knock is None:
            return
        now = self._clock()
        for datagram in knock.poll(now):
            if self._socket is not None:
                self._socket.send_datagram(datagram, self._address)
        if not self._is_over:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = call_later(self._reactor, knock.next_timer() - now, self._ask)

    def datagram_received(self, datagram: bytes, _: Any = None) -> bool:
        """Takes a datagram of the server's; whether it is of the conversation."""
        if self._is_over:
            return False
        carrier = self._carrier
        try:
            plain = read_plain(datagram, _TO_CLIENT)
            if plain is not None and carrier is not None and plain[0] == self._client_id:
                if not carrier.plain_received(plain, datagram, self._address):
                    carrier.datagram_received(datagram, _TO_CLIENT, self._address)
                self._refusals = 0
                return True
            kind, identifier = read_kind(datagram)
            if kind in _WITH_SEGMENTS and identifier == self._client_id and carrier is not None:
                self._refusals = 0
                carrier.datagram_received(datagram, kind, self._address)
                if carrier.association.token:
                    self._keep_token(carrier.association)
                return True
            if kind == Kind.RESET:
                self._reset(Reset.parse(datagram))
            elif identifier == self._client_id and self._carrier is None:
                self._answered(kind, datagram)
        except Malformed:
            pass
        return False

    def _answered(self, kind: int, datagram: bytes) -> None:
        knock = self._knock
        if knock is None:
            return
        now = self._clock()
        try:
            accept = knock.handle(kind, datagram, now)
        except Error as error:
            self._fail(error)
            return
        if accept is None:
            self._ask()
            return
        self._knock = None
        self._stop_timer()
        self._server_id = accept.server_id
        peer = peer_address(self._address)
        self._carrier = carrier = self._factory.buildProtocol(peer)
        association = Association(
            is_server=False,
            own_id=self._client_id,
            peer_id=accept.server_id,
            path=Path(self._address, is_proven=True),
            limits=carrier.limits,
            now=now,
            random=self._random,
            confirm=carrier.confirm,
            awaits=carrier.awaits,
        )
        if knock.round_trip:
            association.recovery.round_trip.measure(knock.round_trip, 0.0)
        transmit = self._socket.send_datagram if self._socket is not None else lose_datagram
        carrier.begin(association, peer, transmit, self._close, self._roam)
        self.connected.callback(carrier)
        carrier.datagram_received(datagram, kind, self._address)

    def _roam(self) -> None:
        """Goes on from another socket: the association is known by its ids, wherever the client is."""
        former = self._socket
        if self._is_over or former is None:
            return
        try:
            self._open_socket()
        except Exception as error:
            # There is no way to the server just now; time will tell.
            _log.info("{address}: no other socket: {error}", address=self._address, error=error)
        else:
            former.transport.stopListening()

    def socket_closed(self, closed: _ClientSocket) -> None:
        """A socket is closed; where this end did not do that, it goes on from another."""
        if closed is self._socket:
            self._socket = None
            if self._carrier is not None:
                self._carrier.transmit = lose_datagram
            self._timer_to_reopen = call_later(self._reactor, _REOPEN_AFTER, self._reopen)

    def _reopen(self) -> None:
        try:
            self._open_socket()
        except Exception:
            self._timer_to_reopen = call_later(self._reactor, _REOPEN_AFTER, self._reopen)

    def _keep_token(self, association: Association) -> None:
        self._kept[self._address] = association.token
        association.token = b""
        if len(self._kept) > _MOST_TOKENS:
            del self._kept[next(iter(self._kept))]

    def _reset(self, reset: Reset) -> None:
        carrier = self._carrier
        if (
            carrier is not None
            and reset.server_id == self._server_id
            and reset.number < carrier.association.recovery.next_number
        ):
            carrier.lose(ConnectionLost("the server does not know this connection any more"))

    def refused(self) -> None:
        """The server's machine says that nothing listens there."""
        if self._is_over:
            return
        if self._carrier is None:
            self._fail(TwistedConnectionRefusedError(errno.ECONNREFUSED))
            return
        self._refusals += 1
        if self._refusals >= _REFUSALS:
            self._carrier.lose(TwistedConnectionRefusedError(errno.ECONNREFUSED))

    def _fail(self, error: Exception) -> None:
        self._close()
        if not self.connected.called:
            self.connected.errback(Failure(error))

    def _give_up(self, _: Any) -> None:
        self._close()

    def _close(self) -> None:
        self._is_over = True
        self._knock = None
        self._stop_timer()
        if self._timer_to_reopen is not None:
            self._timer_to_reopen.cancel()
        if self._socket is not None:
            closing, self._socket = self._socket, None
            if closing.transport is not None:
                closing.transport.stopListening()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
