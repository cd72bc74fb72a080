"""UDP in the simulated network: what `listenUDP` of a host gives.

Knows Twisted's datagram transports; how packets travel is the network's.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import InvalidAddressError, MessageLengthError
from twisted.internet.interfaces import IListeningPort, IUDPTransport
from zope.interface import implementer

from protoframe.testing._links import Packet

if TYPE_CHECKING:
    from protoframe.testing._host import Host

__all__ = ["DatagramPort"]

#: Octets of the headers of IP and UDP.
_HEADERS_4, _HEADERS_6 = 28, 48
_LAST_PORT = 65535


@implementer(IUDPTransport, IListeningPort)
class DatagramPort:
    """A UDP socket of a simulated host.

    :param host: whose it is.
    :param port: its number.
    :param is_ipv6: whether it is one of IPv6.
    :param protocol: takes what comes.
    :ivar interface: the address that it takes datagrams at; all of the host's where that is empty.
    """

    def __init__(
        self, host: Host, port: int, *, is_ipv6: bool, protocol: Any, max_packet_size: int, interface: str = ""
    ) -> None:
        self.interface = interface
        self._host = host
        self._port = port
        self._is_ipv6 = is_ipv6
        self._protocol = protocol
        self._max_packet_size = max_packet_size
        self._peer: tuple[str, int] | None = None
        self._is_open = True

    def startListening(self) -> None:
        """Tells the protocol."""
        self._protocol.makeConnection(self)

    def write(self, packet: bytes, addr: tuple[str, int] | None = None) -> None:
        """Sends a datagram.

        :raises MessageLengthError: it is larger than the host's own interface takes.
        :raises InvalidAddressError: the address is no IP address of the socket's family, or has no port.
        """
        destination = addr if addr is not None else self._peer
        if destination is None:
            raise ValueError("a port that is not connected needs an address")
        if not self._is_open:
            return
        try:
            is_ipv6 = ipaddress.ip_address(destination[0].partition("%")[0]).version == 6
        except ValueError:
            raise InvalidAddressError(destination[0], "not an IP address") from None
        if is_ipv6 != self._is_ipv6:
            raise InvalidAddressError(destination[0], "not an address of this socket's family")
        if not isinstance(destination[1], int) or not 0 <= destination[1] <= _LAST_PORT:
            raise InvalidAddressError(destination[1], "not a port")
        size = len(packet) + (_HEADERS_6 if self._is_ipv6 else _HEADERS_4)
        if size > self._host.interface_mtu:
            raise MessageLengthError("message too long")
        self._host.send("udp", self._port, destination, size, bytes(packet), is_ipv6=self._is_ipv6)

    def writeSequence(self, packet: Any, addr: tuple[str, int] | None = None) -> None:
        """Sends a datagram that is put together from parts."""
        self.write(b"".join(packet), addr)

    def connect(self, host: str, port: int) -> None:
        """Takes datagrams from one peer alone, and is told when nothing listens there."""
        if self._peer is not None:
            raise RuntimeError("already connected, reconnecting is not currently supported")
        self._peer = (host, port)

    def arrived(self, packet: Packet) -> None:
        """A datagram came, or the news that nothing takes those that were sent."""
        if not self._is_open or (self._peer is not None and packet.source != self._peer):
            return
        if packet.kind == "icmp":
            if self._peer is not None:
                self._protocol.connectionRefused()
        else:
            self._protocol.datagramReceived(packet.payload[: self._max_packet_size], packet.source)

    def getHost(self) -> Any:
        """The address."""
        return self._host.address_of("UDP", self._port, is_ipv6=self._is_ipv6)

    def stopListening(self) -> Deferred[None]:
        """Closes the socket; fires when that is done."""
        if self._is_open:
            self.vanish()
            self._protocol.doStop()
        return succeed(None)

    def loseConnection(self) -> None:
        """Likewise."""
        self.stopListening()

    def vanish(self) -> None:
        """The socket is gone, and nobody is told."""
        self._is_open = False
        self._host.free("udp", self._port, self)

    def setBroadcastAllowed(self, enabled: bool) -> None:
        """There is no broadcast here.

        :raises NotImplementedError: it was to be allowed.
        """
        if enabled:
            raise NotImplementedError("the simulated network has no broadcast")

    def getBroadcastAllowed(self) -> bool:
        """It is not."""
        return False
