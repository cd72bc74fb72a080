"""A network of hosts, simulated in virtual time: the same seed, the same packets at the same times.

Knows hosts and what is between them; what happens to a packet on the way is `protoframe.testing._links`'s, and what
runs on a host `protoframe.testing._host`'s.
"""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from collections.abc import Coroutine
from contextlib import suppress
from contextvars import Token
from types import CoroutineType
from typing import Any, TypeVar

import msgspec
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from protoframe import Connecting, Factory, Protocol, connect, listen
from protoframe._context import scope
from protoframe.testing._host import LOOPBACK, Host
from protoframe.testing._links import Conditions, Link, Packet
from protoframe.testing._timeline import Timeline

__all__ = ["Network", "NotQuiet", "Stuck"]

P = TypeVar("P", bound=Protocol[Any])

#: Seconds of virtual time that `Network.run` takes at most, where nobody says.
_PATIENCE = 60.0
#: Packets of which is kept what became of them.
_TRACE = 2000


class Stuck(AssertionError):
    """What was waited for did not come, in the time that it had or because nothing is left that could happen."""


class NotQuiet(AssertionError):
    """Packets go on although there is nothing left to say."""


class Network:
    """Hosts and what is between them.

    Each gets its name, its addresses and its place on the network when it is first asked for with `host`.

    :param seed: decides all that is left to chance.
    :param conditions: what `Conditions` takes: they hold between any two hosts, unless `set` says something else.
    :raises ValueError: the seed is below 0, or a condition is out of its bounds.
    :ivar seed: see above.
    :ivar sent: how many packets were sent.
    """

    def __init__(self, seed: int = 0, **conditions: Any) -> None:
        if seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {seed}")
        self.seed = seed
        self._random = random.Random(seed)  # noqa: S311 - it is to be foreseeable
        self._conditions = Conditions(**conditions)
        self._timeline = Timeline(self._random)
        self._hosts: dict[str, Host] = {}
        self._addresses: dict[str, Host] = {}
        self._links: dict[tuple[str, str], Link] = {}
        self._between: dict[tuple[str, str], Conditions] = {}
        self._trace: deque[tuple[float, str, Packet]] = deque(maxlen=_TRACE)
        self._local = 0
        self.sent = 0
        self._arrived: dict[tuple[str, str], int] = {}
        self._opened: list[Any] = []

    def __repr__(self) -> str:
        return f"<Network with seed {self.seed} at {self.now:.6f} s>"

    # Time.

    @property
    def now(self) -> float:
        """The time, in seconds since the network was made."""
        return self._timeline.now

    def advance(self, seconds: float) -> None:
        """Lets time pass, and what is due in it happen.

        :raises ValueError: the seconds are below 0.
        """
        if seconds < 0:
            raise ValueError(f"time does not run backwards: {seconds} s")
        until = self._timeline.now + seconds
        while (due := self._timeline.next_due()) is not None and due <= until:
            self._timeline.run_next()
        # What happened may have let more time pass.
        self._timeline.now = max(self._timeline.now, until)

    def run(self, what: Any, seconds: float = _PATIENCE) -> Any:
        """Lets time pass until a Deferred or a coroutine is done; its result.

        `protoframe.timeout` goes by the time of the network inside of the coroutine.

        :param seconds: of virtual time that it may take.
        :raises Stuck: it takes longer, or nothing is left that could happen.
        """
        deferred: Deferred[Any]
        if isinstance(what, Coroutine | CoroutineType):
            deferred = self._start(what)
        elif isinstance(what, Deferred):
            deferred = what
        else:

            async def wait() -> Any:
                return await what

            deferred = self._start(wait())
        outcome: list[Any] = []
        deferred.addBoth(outcome.append)
        until = self._timeline.now + seconds
        while not outcome:
            due = self._timeline.next_due()
            if due is None or due > until:
                why = "nothing is left that could happen" if due is None else f"it takes longer than {seconds:g} s"
                deferred.addErrback(lambda _: None)
                with suppress(Exception):
                    deferred.cancel()
                raise Stuck(f"{self!r}: {why}")
            self._timeline.run_next()
        if isinstance(outcome[0], Failure):
            outcome[0].raiseException()
        return outcome[0]

    def _start(self, coroutine: Coroutine[Any, Any, Any]) -> Deferred[Any]:
        token = self.enter()
        try:
            return Deferred.fromCoroutine(coroutine)
        finally:
            scope.reset(token)

    def enter(self) -> Token[Any]:
        """Has `protoframe.timeout` go by the time of the network, in this context; what undoes that."""
        return scope.set(msgspec.structs.replace(scope.get(), clock=lambda: self._timeline.now))

    def settle(self, seconds: float = _PATIENCE, quiet: float = 1.0) -> None:
        """Lets time pass until no packet was sent for a while, and none is on its way.

        :param seconds: of virtual time that it may take.
        :param quiet: seconds without a packet.
        :raises NotQuiet: it takes longer.
        """
        until = self.now + seconds
        while True:
            sent = self.sent
            self.advance(quiet)
            if self.sent == sent and not self._travelling():
                return
            if self.now > until:
                raise NotQuiet(f"{self!r}: packets go on after {seconds:g} s\n{self.trace(20)}")

    def close(self) -> None:
        """Ends all: ports are closed, and nothing more happens."""
        for connecting in self._opened:
            with suppress(Exception):
                connecting.close()
        for host in self._hosts.values():
            host.crash()

    # Hosts and what is between them.

    def host(self, name: str) -> Host:
        """The host of a name; a new one at the first time."""
        host = self._hosts.get(name)
        if host is None:
            number = len(self._hosts) + 1
            host = self._hosts[name] = Host(self, name, number)
        return host

    def set(self, source: str | None = None, destination: str | None = None, **conditions: Any) -> None:
        """Changes what the network does to packets from now on.

        :param source: the host that they come from; with ``destination``, in that direction alone.  Without either,
            everywhere where nothing of its own was set.
        :param conditions: what is to change; the rest stays.
        :raises ValueError: there is no such host yet: `host` makes it.
        """
        if source is None and destination is None:
            self._conditions = dataclasses.replace(self._conditions, **conditions)
            return
        if source is None or destination is None:
            raise TypeError("set takes a source and a destination, or neither")
        self._check_hosts(source, destination)
        before = self._between.get((source, destination), self._conditions)
        self._between[source, destination] = dataclasses.replace(before, **conditions)

    @property
    def conditions(self) -> Conditions:
        """What the network does to packets where nothing of its own was set."""
        return self._conditions

    def partition(self, one: str, other: str) -> None:
        """Lets nothing through between two hosts, what is under way included.

        :raises ValueError: there is no such host yet: `host` makes it.
        """
        self._check_hosts(one, other)
        for pair in ((one, other), (other, one)):
            self._link(*pair).is_cut = True

    def heal(self) -> None:
        """Lets packets through again everywhere."""
        for link in self._links.values():
            link.is_cut = False

    def _check_hosts(self, *names: str) -> None:
        for name in names:
            if name not in self._hosts:
                known = ", ".join(self._hosts) or "none"
                raise ValueError(f"there is no host {name!r} yet, only: {known}; host({name!r}) makes it")

    def _travelling(self) -> bool:
        """Whether a packet is on its way."""
        return self._local > 0 or any(link.travelling for link in self._links.values())

    def _link(self, source: str, destination: str) -> Link:
        pair = (source, destination)
        link = self._links.get(pair)
        if link is None:
            link = self._links[pair] = Link(
                self._timeline,
                self._random,
                lambda: self._between.get(pair, self._conditions),
                self._deliver,
                self._note,
            )
        return link

    # Packets.

    def send(self, source: Host, packet: Packet) -> None:
        """Sends a packet from a host to wherever its address is."""
        self.sent += 1
        address = packet.destination[0]
        destination = source if address in LOOPBACK else self._addresses.get(address)
        self._note("sent", packet)
        if destination is None:
            self._note("nobody there", packet)
        elif destination is source:
            # A host's own address: no network is between.
            self._local += 1
            self._timeline.call_later(0, self._deliver_locally, source, packet)
        else:
            self._link(source.name, destination.name).send(packet)

    def _deliver_locally(self, host: Host, packet: Packet) -> None:
        self._local -= 1
        self._arrive(host, packet)

    def _deliver(self, packet: Packet) -> None:
        host = self._addresses.get(packet.destination[0])
        if host is None:
            self._note("nobody there", packet)
        else:
            self._arrive(host, packet)

    def _arrive(self, host: Host, packet: Packet) -> None:
        self._note("arrived", packet)
        self._arrived[host.name, packet.kind] = self._arrived.get((host.name, packet.kind), 0) + packet.size
        host.arrived(packet)

    def _note(self, what: str, packet: Packet) -> None:
        self._trace.append((self._timeline.now, what, packet))

    def trace(self, most: int = _TRACE) -> str:
        """What became of the last packets, a line each."""
        lines = []
        for when, what, packet in list(self._trace)[-most:]:
            source, destination = packet.source, packet.destination
            lines.append(
                f"{when:12.6f} {what:12} {packet.kind} {source[0]}:{source[1]} > {destination[0]}:{destination[1]}"
                f" {packet.size}",
            )
        return "\n".join(lines)

    def sent_to(self, host: str, kind: str) -> int:
        """Octets that have arrived at a host, headers included.

        :param kind: ``udp`` or ``tcp``.
        """
        return self._arrived.get((host, kind), 0)

    def take_address(self, address: str, host: Host | None) -> None:
        """An address is a host's from now on, or nobody's."""
        if host is None:
            self._addresses.pop(address, None)
        else:
            self._addresses[address] = host

    def resolve(self, name: str) -> list[str]:
        """The addresses of a host by its name, IPv4 first; none where there is no such host."""
        host = self._hosts.get(name)
        return [host.ipv4, host.ipv6] if host is not None else []

    @property
    def timeline(self) -> Timeline:
        """What is to happen."""
        return self._timeline

    @property
    def random(self) -> random.Random:
        """Chance."""
        return self._random

    # Servers and clients.

    def serve(self, served: type[Protocol[Any]] | Factory, where: str = "udp:12000", host: str = "server") -> str:
        """Serves a Protocol, or a Factory, at a host; the string for `connect`."""
        factory = served if isinstance(served, Factory) else Factory(served)
        port = self.run(listen(self.host(host), where, factory))
        return f"{where.partition(':')[0]}:{host}:{port.getHost().port}"

    def connect(self, where: str, protocol: type[P], host: str = "client", **options: Any) -> Connecting[P]:
        """What `protoframe.connect` gives, from a host."""
        connecting = connect(self.host(host), where, protocol, **options)
        self._opened.append(connecting)
        return connecting
