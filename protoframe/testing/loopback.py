"""Servers and clients on the loopback interface, in the reactor of the process that tests them.

Knows protoframe's public face, and that what was opened is to be closed.
"""

from __future__ import annotations

from typing import Any, TypeVar

from twisted.internet.defer import Deferred

from protoframe import Connecting, Factory, ListeningPort, Protocol, connect, listen

__all__ = ["Loopback"]

P = TypeVar("P", bound=Protocol[Any])


class Loopback:
    """Serves and connects at 127.0.0.1, and closes all of it in the end."""

    def __init__(self) -> None:
        from twisted.internet import reactor

        self._reactor = reactor
        self._ports: list[ListeningPort] = []
        self._factories: list[Factory] = []
        self._opened: list[Connecting[Any]] = []

    async def serve(self, served: type[Protocol[Any]] | Factory, kind: str = "tcp") -> str:
        """Serves a Protocol, or a Factory, at a free port; the string for `connect`.

        :param kind: ``tcp`` or ``udp``.
        :raises ValueError: it is neither.
        """
        if kind not in ("tcp", "udp"):
            raise ValueError(f"kind: expected 'tcp' or 'udp', got {kind!r}")
        factory = served if isinstance(served, Factory) else Factory(served)
        port = await listen(self._reactor, f"{kind}:0:interface=127.0.0.1", factory)
        self._ports.append(port)
        self._factories.append(factory)
        return f"{kind}:127.0.0.1:{port.getHost().port}"

    def connect(self, where: str, protocol: type[P], **options: Any) -> Connecting[P]:
        """What `protoframe.connect` gives."""
        connecting = connect(self._reactor, where, protocol, **options)
        self._opened.append(connecting)
        return connecting

    def close(self) -> Deferred[None]:
        """Closes connections and ports; fires when that is done."""
        return Deferred.fromCoroutine(self._close())

    async def _close(self) -> None:
        for connecting in self._opened:
            await connecting.close()
        for port in self._ports:
            await port.stopListening()
        for factory in self._factories:
            await factory.drain(0.0)
