"""The peers: what each is called, which module has it, what must be installed, and how it is used here.

Knows them by name, and imports none before it is asked for: what is not installed is left out.  The module of a peer
has ``serve()``, which tells its port (`benchmarks.loads.announce`) and serves until its process is ended, and
``take(task, port)``, which does a client's task and gives the figure.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
from types import ModuleType

__all__ = ["PEERS", "Peer"]


@dataclasses.dataclass(frozen=True)
class Peer:
    """One of those that are compared.

    :param module: in this package.
    :param distributions: what must be installed, the one whose version counts first.
    :param use: how it is used, for the page.
    """

    name: str
    module: str
    distributions: tuple[str, ...]
    use: str

    def missing(self) -> str | None:
        """What is not installed of what it takes, if anything."""
        for distribution in self.distributions:
            try:
                importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                return distribution
        return None

    def load(self) -> ModuleType:
        """Its module."""
        return importlib.import_module(f"benchmarks.peers.{self.module}")


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "protoframe",
            "protoframe_tcp",
            ("protoframe",),
            "A `Protocol` served by `listen`, and called through `connect`, over TCP, with the default limits;"
            " but its server, and a client with payloads of 1 MiB and more, allow 8 MiB to a message.",
        ),
        Peer(
            "raw echo",
            "raw_echo",
            ("twisted",),
            "A Twisted `Protocol` whose `dataReceived` writes back what came: 37 octets, TCP_NODELAY, nothing"
            " decoded. It writes by `transport.write`, which leaves octets to the reactor's next turn.",
        ),
        Peer(
            "raw echo, direct",
            "raw_echo_direct",
            ("twisted",),
            "The same, but that octets are given to the socket itself (`transport.getHandle().send`) while the"
            " transport has nothing to write, as protoframe does. It is the limit of what a round trip in Twisted's"
            " reactor can be.",
        ),
        Peer(
            "raw stream",
            "raw_stream",
            ("twisted",),
            "A Twisted `Protocol` that counts octets, and acknowledges each payload by its length in four"
            " octets. It writes by `transport.write`.",
        ),
        Peer(
            "hand-written",
            "handwritten",
            ("twisted", "msgspec"),
            "Calls written by hand on Twisted and msgspec, for these methods alone: frames with a length, an"
            " id, a deadline and a method's name, written once a turn of the reactor by"
            " `transport.write`; no limits, errors, cancellation or streams.",
        ),
        Peer(
            "hand-written, direct",
            "handwritten_direct",
            ("twisted", "msgspec"),
            "The same, but that what is unsent is given to the socket itself after every 16 frames and at the end of"
            " a turn, as protoframe does.",
        ),
        Peer(
            "AMP",
            "amp_",
            ("twisted",),
            "Twisted's `twisted.protocols.amp`: a `Command` with a responder, called by `callRemote`. A value"
            " has at most 65,535 octets, so larger payloads are left out.",
        ),
        Peer(
            "grpc.aio",
            "grpc_aio",
            ("grpcio", "protobuf"),
            "gRPC's own package on asyncio, with an insecure channel. Messages are protobuf's, of classes made"
            " from a descriptor when it starts, and methods are generic handlers and multicallables: what"
            " generated code consists of, without a generator. Where payloads are large the largest message is"
            " raised from its 4 MiB.",
        ),
        Peer(
            "grpclib",
            "grpclib_",
            ("grpclib", "protobuf"),
            "The other gRPC of asyncio, in Python; with the same protobuf messages, and its `Handler`s and"
            " methods as its generated code has them.",
        ),
        Peer(
            "pycapnp",
            "capnp_",
            ("pycapnp",),
            "Cap'n Proto's RPC by its C++ library on asyncio: a schema that is loaded when it starts,"
            " `AsyncIoStream`, `TwoPartyServer` and `TwoPartyClient`.",
        ),
        Peer(
            "rpyc",
            "rpyc_",
            ("rpyc",),
            "A `Service` with exposed methods in a `ThreadedServer`; one at a time called as they are, in"
            " flight by `async_`. A stream is an exposed generator, taken by `rpyc.utils.helpers.buffiter`, which asks"
            " for 10 items, then 20, and so on up to 1,000 at a time.",
        ),
        Peer(
            "thriftpy2",
            "thriftpy2_",
            ("thriftpy2",),
            "`make_server`, with a thread for each connection, and `make_client`, with its compiled buffers and"
            " binary protocol. A connection has one call at a time, so what is in flight is a connection and a"
            " thread for each.",
        ),
        Peer(
            "protoframe, UDP",
            "protoframe_udp",
            ("protoframe",),
            "The same `Protocol` over UDP: acknowledged, sent again where lost, and run once.",
        ),
        Peer(
            "raw datagrams",
            "raw_datagrams",
            ("twisted",),
            "A Twisted `DatagramProtocol` that sends each datagram back: 68 octets, one call a datagram. What"
            " is lost its client sends again after half a second.",
        ),
        Peer(
            "aiocoap",
            "aiocoap_",
            ("aiocoap",),
            "CoAP: a resource that gives back what is POSTed. One at a time requests are confirmable; in flight"
            " they are non-confirmable (`transport_tuning=Unreliable`), which nothing sends again, since of"
            " confirmable ones there is one at a time to a server (NSTART, RFC 7252, section 4.7).",
        ),
        Peer(
            "aiocoap, confirmable",
            "aiocoap_confirmable",
            ("aiocoap",),
            "The same with confirmable requests: 64 are asked for, and aiocoap has one at a time on its way.",
        ),
    )
}
