"""The endpoints of ``udp:``: ``udp:12000:interface=127.0.0.1`` for servers, ``udp:host:12000`` for clients.

Knows endpoint strings, names of hosts, and sockets that a service manager has opened; what goes over them is
`protoframe._datagram_sockets`'s.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from contextlib import suppress
from typing import Any

from twisted.internet import endpoints
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.error import DNSLookupError
from twisted.internet.interfaces import IResolutionReceiver
from twisted.python.failure import Failure
from twisted.python.systemd import ListenFDs
from zope.interface import implementer

from protoframe._clock import Timer, call_later
from protoframe._datagram import DatagramCarrier
from protoframe._datagram_ports import adopt_port, open_port
from protoframe._datagram_sockets import DatagramClient, DatagramServer
from protoframe._endpoint_strings import bind_parts, number_of, port_of, split_endpoint
from protoframe.core.datagram.association import Address
from protoframe.errors import Error

__all__ = ["client_of_udp", "is_udp", "server_of_udp"]

#: Seconds from one address of a host to the next, where the first does not answer; RFC 8305, section 5.
_NEXT_ADDRESS = 0.25


def is_udp(where: str) -> bool:
    """Whether an endpoint string is one of these."""
    return where.partition(":")[0] == "udp"


def server_of_udp(reactor: Any, where: str) -> UDPServerEndpoint:
    """Where to serve.

    :raises ValueError: the string is wrong.
    """
    _, positional, named = split_endpoint(where)
    parts = bind_parts(positional, named, ["port"], ["port", "interface", "systemd"], [])
    if ("port" in parts) == ("systemd" in parts):
        raise ValueError("it takes a port, or systemd= with the number of a socket")
    if "systemd" in parts:
        if "interface" in parts:
            raise ValueError("a socket of systemd's has an interface already")
        index = 0 if parts["systemd"] == "0" else number_of("systemd", parts["systemd"])
        return UDPServerEndpoint(reactor, 0, "", index)
    interface = parts.get("interface", "")
    if interface:
        _check_address(interface)
    return UDPServerEndpoint(reactor, port_of(parts["port"]), interface, None)


def _check_address(text: str) -> None:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(f"interface={text} is no IP address") from None


class UDPServerEndpoint:
    """Where to serve over UDP.

    :param interface: the address of this machine's to take datagrams at; empty for all of IPv4.
    :param systemd: the number, from 0 on, of a socket that systemd has opened, which then takes the place of the rest.
    """

    def __init__(self, reactor: Any, port: int, interface: str, systemd: int | None) -> None:
        self._reactor = reactor
        self._port = port
        self._interface = interface
        self._systemd = systemd

    def listen(self, factory: Any) -> Deferred[DatagramServer]:
        """Serves a `Factory`.

        :raises ValueError: systemd has opened no such socket, or it is none for datagrams.
        :raises CannotListenError: the port is taken.
        """
        server = DatagramServer(self._reactor, factory)
        if self._systemd is None:
            open_port(self._reactor, self._port, server, self._interface)
            return succeed(server)
        opened = _opened_by_systemd()
        if self._systemd >= len(opened):
            raise ValueError(f"systemd has opened {len(opened)} sockets, and none has the number {self._systemd}")
        descriptor = opened[self._systemd]
        with socket.socket(fileno=os.dup(descriptor)) as adopted:
            if adopted.type != socket.SOCK_DGRAM or adopted.family not in (socket.AF_INET, socket.AF_INET6):
                raise ValueError(f"socket {self._systemd} of systemd's is none for UDP")
            adopted.setblocking(False)
            adopt_port(self._reactor, descriptor, adopted.family, server)
        return succeed(server)


def _opened_by_systemd() -> list[int]:
    """The descriptors of the sockets that systemd has opened.

    Twisted takes them out of the environment when its endpoints are imported, for its own ``systemd:``.
    """
    known: ListenFDs = getattr(endpoints, "_SystemdParser")._sddaemon  # noqa: B009 - it has no public name
    return known.inheritedDescriptors() or ListenFDs.fromEnvironment().inheritedDescriptors()


def client_of_udp(reactor: Any, where: str) -> UDPClientEndpoint:
    """Whom to connect to.

    :raises ValueError: the string is wrong.
    """
    _, positional, named = split_endpoint(where)
    parts = bind_parts(positional, named, ["host", "port"], ["host", "port"], ["host", "port"])
    return UDPClientEndpoint(reactor, parts["host"], port_of(parts["port"]))


class UDPClientEndpoint:
    """Whom to connect to over UDP: a host, by name or address, and a port.

    Of a name that has several addresses each is tried, a quarter of a second after the one before, until a server has
    let this client in.
    """

    def __init__(self, reactor: Any, host: str, port: int) -> None:
        self._reactor = reactor
        self._host = host
        self._port = port

    def connect(self, factory: Any) -> Deferred[DatagramCarrier]:
        """Fires with what carries the conversation, when a server has let this client in."""
        return _Attempts(self._reactor, factory, self._host, self._port).start()


@implementer(IResolutionReceiver)
class _Attempts:
    """Finds the addresses of a host, and tries them."""

    def __init__(self, reactor: Any, factory: Any, host: str, port: int) -> None:
        self._reactor = reactor
        self._factory = factory
        self._host = host
        self._port = port
        self._done: Deferred[DatagramCarrier] = Deferred(self._cancel)
        self._untried: list[Address] = []
        self._trying: list[Deferred[DatagramCarrier]] = []
        self._resolution: Any = None
        self._timer: Timer | None = None
        self._last: Failure | None = None

    def start(self) -> Deferred[DatagramCarrier]:
        """Begins."""
        try:
            ipaddress.ip_address(self._host.partition("%")[0])
        except ValueError:
            self._reactor.nameResolver.resolveHostName(self, self._host, self._port, transportSemantics="UDP")
        else:
            self._untried.append((self._host, self._port))
            self._try_next()
        return self._done

    # IResolutionReceiver

    def resolutionBegan(self, resolutionInProgress: Any) -> None:  # noqa: N803 - the interface calls it so
        """A name is being looked up."""
        self._resolution = resolutionInProgress

    def addressResolved(self, address: Any) -> None:
        """The host has this address too."""
        if (address.host, self._port) not in self._untried:
            self._untried.append((address.host, self._port))

    def resolutionComplete(self) -> None:
        """The host has no other."""
        self._resolution = None
        if not self._untried and not self._done.called:
            self._done.errback(DNSLookupError(f"no addresses of {self._host}"))
        self._try_next()

    def _try_next(self) -> None:
        self._stop_timer()
        if self._done.called:
            return
        if not self._untried:
            if not self._trying and self._last is not None:
                self._done.errback(self._last)
            return
        attempt = DatagramClient(self._reactor, self._factory, self._untried.pop(0)).open()
        self._trying.append(attempt)
        attempt.addCallbacks(self._succeeded, self._failed, callbackArgs=(attempt,), errbackArgs=(attempt,))
        if self._untried and not self._done.called:
            self._timer = call_later(self._reactor, _NEXT_ADDRESS, self._try_next)

    def _succeeded(self, carrier: DatagramCarrier, attempt: Deferred[DatagramCarrier]) -> None:
        self._trying.remove(attempt)
        self._untried.clear()
        self._stop()
        self._done.callback(carrier)

    def _failed(self, failure: Failure, attempt: Deferred[DatagramCarrier]) -> None:
        if attempt in self._trying:
            self._trying.remove(attempt)
        if failure.check(CancelledError) or self._done.called:
            return
        if failure.check(Error):
            # A server has said why: its other addresses would say the same.
            self._untried.clear()
            self._stop()
            self._done.errback(failure)
            return
        self._last = failure
        self._try_next()

    def _cancel(self, _: Any) -> None:
        self._untried.clear()
        if self._resolution is not None:
            # Twisted's own has no way to stop; what it finds is not looked at then.
            with suppress(NotImplementedError):
                self._resolution.cancel()
        self._stop()

    def _stop(self) -> None:
        self._stop_timer()
        trying, self._trying = self._trying, []
        for attempt in trying:
            attempt.cancel()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
