"""A host of the simulated network: the reactor of what runs there.

Knows addresses, sockets and timers of one host, and the interfaces of Twisted's reactors; what is between hosts is the
network's, and what UDP and TCP are `protoframe.testing._datagrams`'s and `protoframe.testing._streams`'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import (
    IHostnameResolver,
    IHostResolution,
    IReactorPluggableNameResolver,
    IReactorTCP,
    IReactorTime,
    IReactorUDP,
)
from zope.interface import implementer

from protoframe.testing._datagrams import DatagramPort
from protoframe.testing._links import Packet
from protoframe.testing._streams import StreamConnector, StreamPort
from protoframe.testing._tcp import HEADERS_4, Segment, StreamConnection
from protoframe.testing._timeline import Call

if TYPE_CHECKING:
    from protoframe.testing.network import Network

__all__ = ["LOOPBACK", "Host"]

_FIRST_EPHEMERAL = 49152
#: Addresses at which every host finds itself alone.
LOOPBACK = frozenset(("127.0.0.1", "::1"))
#: Calls of which account is kept before those that were cancelled are looked for.
_CALLS = 256


@implementer(IReactorTime, IReactorTCP, IReactorUDP, IReactorPluggableNameResolver)
class Host:
    """A host of the network, and the reactor of what runs there: `listen` and `connect` take it for one.

    :ivar name: by which others find it.
    :ivar ipv4: its address, and
    :ivar ipv6: the other one.
    :ivar interface_mtu: octets of a packet, headers included, that it sends at all.
    """

    def __init__(self, network: Network, name: str, number: int) -> None:
        self.name = name
        self.ipv4 = f"10.0.{number // 250}.{number % 250 + 1}"
        self.ipv6 = f"fd00::{number:x}"
        self.interface_mtu = 65535
        self._network = network
        self._number = number
        self._moves = 0
        self._shift = 0
        # In the order in which they were made.
        self._calls: dict[Call, None] = {}
        self._most_calls = _CALLS
        self._ports: dict[tuple[str, int, bool], Any] = {}
        self._streams: dict[tuple[int, tuple[str, int]], StreamConnection] = {}
        self._ephemeral = _FIRST_EPHEMERAL
        for address in (self.ipv4, self.ipv6):
            network.take_address(address, self)

    def __repr__(self) -> str:
        return f"<Host {self.name} of {self._network!r}>"

    # What befalls it.

    def change_address(self) -> None:
        """Has it be at other addresses from now on, as behind a NAT that forgot, or on another network.

        Its programs do not notice.  What is sent to where it was is lost.
        """
        self._moves += 1
        for address in (self.ipv4, self.ipv6):
            self._network.take_address(address, None)
        self.ipv4 = f"10.{self._moves % 200 + 1}.{self._number // 250}.{self._number % 250 + 1}"
        self.ipv6 = f"fd00:{self._moves:x}::{self._number:x}"
        for address in (self.ipv4, self.ipv6):
            self._network.take_address(address, self)

    def change_ports(self) -> None:
        """Has its datagrams come from other ports from now on, as behind a NAT that forgot."""
        self._shift = self._shift % 1000 + 1

    def crash(self) -> None:
        """Ends all its programs without a word: sockets are gone, and no timer of theirs goes off any more."""
        for call in list(self._calls):
            if call.active():
                call.cancel()
        self._calls.clear()
        for port in list(self._ports.values()):
            port.vanish()
        for stream in list(self._streams.values()):
            stream.vanish()

    # Packets.

    def send(
        self, kind: str, port: int, destination: tuple[str, int], size: int, payload: Any, *, is_ipv6: bool
    ) -> None:
        """Sends a packet from a port."""
        seen = port + self._shift if kind == "udp" else port
        own = self.ipv6 if is_ipv6 else self.ipv4
        source = (destination[0] if destination[0] in LOOPBACK else own, seen)
        self._network.send(self, Packet(kind, source, destination, size, payload))

    def arrived(self, packet: Packet) -> None:
        """Hands a packet to whoever it is for."""
        port = packet.destination[1]
        is_ipv6 = ":" in packet.destination[0]
        if packet.kind == "tcp":
            self._stream_arrived(packet, port, is_ipv6=is_ipv6)
            return
        port -= self._shift
        taker = self._port_for("udp", port, packet)
        if taker is not None:
            taker.arrived(packet)
        elif packet.kind == "udp":
            refusal = Packet("icmp", packet.destination, packet.source, HEADERS_4, None)
            self._network.send(self, refusal)

    def _port_for(self, kind: str, port: int, packet: Packet) -> Any:
        """The socket that a packet is for; one that listens on the loopback interface is for this host's own."""
        address = packet.destination[0]
        found = self._ports.get((kind, port, ":" in address))
        if found is not None and found.interface in LOOPBACK and address != found.interface:
            return None
        return found

    def _stream_arrived(self, packet: Packet, port: int, *, is_ipv6: bool) -> None:
        segment: Segment = packet.payload
        stream = self._streams.get((port, packet.source))
        if stream is not None:
            stream.arrived(segment)
            return
        listening = self._port_for("tcp", port, packet)
        if listening is not None and segment.syn and not segment.acknowledged:
            stream = self.open_stream(port, packet.source, is_ipv6=is_ipv6)
            stream.on_open = listening.opened
            stream.accept()
        elif not segment.rst:
            reset = Segment(segment.acknowledged, segment.sequence + segment.length, rst=True)
            self.send("tcp", port, packet.source, HEADERS_4, reset, is_ipv6=is_ipv6)

    def open_stream(self, port: int, remote: tuple[str, int], *, is_ipv6: bool) -> StreamConnection:
        """An end of a TCP connection, not connected yet."""
        stream = self._streams[port, remote] = StreamConnection(self, port, remote, is_ipv6=is_ipv6)
        return stream

    def free_stream(self, stream: StreamConnection) -> None:
        """An end of a TCP connection is gone."""
        self._streams.pop((stream.local, stream.remote), None)

    def free(self, kind: str, number: int, port: Any) -> None:
        """A port is closed."""
        for key in [key for key, one in self._ports.items() if one is port and key[:2] == (kind, number)]:
            del self._ports[key]

    def _take_port(self, kind: str, number: int, *, is_ipv6: bool, interface: str) -> int:
        if interface and interface not in ("0.0.0.0", "::", "127.0.0.1", "::1", self.ipv4, self.ipv6):  # noqa: S104
            raise CannotListenError(interface, number, OSError(99, "Cannot assign requested address"))
        if not number:
            while ("udp", self._ephemeral, is_ipv6) in self._ports or ("tcp", self._ephemeral, is_ipv6) in self._ports:
                self._ephemeral += 1
            number = self._ephemeral
            self._ephemeral = number + 1 if number < 60000 else _FIRST_EPHEMERAL
        elif (kind, number, is_ipv6) in self._ports:
            raise CannotListenError(interface, number, OSError(98, "Address already in use"))
        return number

    def take_ephemeral(self, *, is_ipv6: bool) -> int:
        """A port for an end that does not mind which."""
        return self._take_port("tcp", 0, is_ipv6=is_ipv6, interface="")

    def resolve(self, name: str) -> list[str]:
        """The addresses of a host by its name."""
        return self._network.resolve(name)

    def make_address(self, kind: str, host: str, port: int) -> Any:
        """An address as Twisted has it."""
        address: Any = IPv6Address if ":" in host else IPv4Address
        return address(kind, host, port)

    def address_of(self, kind: str, port: int, *, is_ipv6: bool) -> Any:
        """That of a port of this host."""
        return self.make_address(kind, self.ipv6 if is_ipv6 else self.ipv4, port)

    # IReactorTime, and what else protoframe asks of a reactor.

    def seconds(self) -> float:
        """The time."""
        return self._network.now

    def callLater(self, delay: float, callable: Any, *args: Any, **kwargs: Any) -> Call:  # noqa: A002 - the interface
        """Makes a call in so many seconds."""
        call: Call

        def run() -> None:
            self._calls.pop(call, None)
            callable(*args, **kwargs)

        call = self._network.timeline.call_later(delay, run)
        self._calls[call] = None
        if len(self._calls) > self._most_calls:
            self._calls = dict.fromkeys(call for call in self._calls if call.active())
            self._most_calls = max(_CALLS, 2 * len(self._calls))
        return call

    def timeline_call(self, delay: float, function: Any, *args: Any) -> Call:
        """The same, for what is no program of this host's, but the host itself."""
        return self._network.timeline.call_later(delay, function, *args)

    def getDelayedCalls(self) -> list[Any]:
        """The calls that are still to be made."""
        return [call for call in self._calls if call.active()]

    def callFromThread(self, function: Any, *args: Any, **kwargs: Any) -> None:
        """Makes a call in a turn of its own; there is but one thread."""
        self.callLater(0, function, *args, **kwargs)

    def token_bytes(self, count: int) -> bytes:
        """Random octets, that the seed decides."""
        return self._network.random.randbytes(count)

    # IReactorUDP

    def listenUDP(self, port: int, protocol: Any, interface: str = "", maxPacketSize: int = 8192) -> DatagramPort:  # noqa: N803
        """Opens a UDP socket."""
        is_ipv6 = ":" in interface
        number = self._take_port("udp", port, is_ipv6=is_ipv6, interface=interface)
        opened = DatagramPort(
            self, number, is_ipv6=is_ipv6, protocol=protocol, max_packet_size=maxPacketSize, interface=interface
        )
        self._ports["udp", number, is_ipv6] = opened
        opened.startListening()
        return opened

    # IReactorTCP

    def listenTCP(self, port: int, factory: Any, backlog: int = 50, interface: str = "") -> StreamPort:
        """Listens at a TCP port."""
        is_ipv6 = ":" in interface
        number = self._take_port("tcp", port, is_ipv6=is_ipv6, interface=interface)
        opened = StreamPort(self, number, factory, is_ipv6=is_ipv6, interface=interface)
        self._ports["tcp", number, is_ipv6] = opened
        opened.startListening()
        return opened

    def connectTCP(self, host: str, port: int, factory: Any, timeout: float = 30, bindAddress: Any = None) -> Any:  # noqa: N803
        """Connects to a TCP port."""
        connector = StreamConnector(self, host, port, factory, timeout)
        connector.connect()
        return connector

    # IReactorPluggableNameResolver

    @property
    def nameResolver(self) -> Any:
        """Finds hosts by their names."""
        return _Resolver(self)

    def installNameResolver(self, resolver: Any) -> Any:
        """There is one already, and it stays.

        :raises NotImplementedError: always.
        """
        raise NotImplementedError("names are those of the network's hosts")


@implementer(IHostnameResolver)
class _Resolver:
    """Finds hosts of the network by their names."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def resolveHostName(
        self,
        resolutionReceiver: Any,  # noqa: N803 - the interface calls it so
        hostName: str,  # noqa: N803 - likewise
        portNumber: int = 0,  # noqa: N803 - likewise
        addressTypes: Any = None,  # noqa: N803 - likewise
        transportSemantics: str = "TCP",  # noqa: N803 - likewise
    ) -> Any:
        """Gives a host's addresses, in a turn of its own."""
        resolution = _Resolution(hostName)
        resolutionReceiver.resolutionBegan(resolution)

        def found() -> None:
            for address in self._host.resolve(hostName):
                family: Any = IPv6Address if ":" in address else IPv4Address
                made = family(transportSemantics, address, portNumber)
                if addressTypes is None or isinstance(made, tuple(addressTypes)):
                    resolutionReceiver.addressResolved(made)
            resolutionReceiver.resolutionComplete()

        self._host.callLater(0, found)
        return resolution


@implementer(IHostResolution)
class _Resolution:
    """A name that is looked up."""

    def __init__(self, name: str) -> None:
        self.name = name

    def cancel(self) -> None:
        """It goes on, as Twisted's own does.

        :raises NotImplementedError: always.
        """
        raise NotImplementedError
