"""Servers by the SRV records of a name (RFC 2782): ``srv:_speech._tcp.example.com``.

Knows DNS by way of twisted.names; what is done with the servers is `protoframe._client`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from twisted.internet.defer import Deferred
from twisted.internet.error import DNSLookupError
from twisted.python.failure import Failure

from protoframe._clock import Timer, call_later
from protoframe.errors import ConnectFailed, Error, not_run

__all__ = ["Place", "ServiceLookup", "service_name"]

_SCHEME = "srv:"
#: The first label but one says what is spoken.
_CARRIERS = {"_tcp": "tcp", "_udp": "udp"}
#: Seconds until records are looked up again: as their TTL says, within these bounds, and where there are none.
_SOONEST, _LATEST, _AFTER_FAILURE = 5.0, 300.0, 5.0


class Place(msgspec.Struct, frozen=True):
    """A server, and how it stands to the others.

    :ivar where: as `connect` takes it.
    :ivar priority: the servers with the lowest that can be reached are called.
    :ivar weight: among them, how often for one that has half of it.
    """

    where: Any
    priority: int = 0
    weight: int = 1


def service_name(where: Any) -> str | None:
    """The name of a string ``srv:NAME``; ``None`` of anything else.

    :raises ValueError: it is not ``_service._tcp.domain`` or ``_service._udp.domain``.
    """
    if not isinstance(where, str) or not where.startswith(_SCHEME):
        return None
    name = where[len(_SCHEME) :]
    labels = name.rstrip(".").split(".")
    if len(labels) < 3 or not labels[0].startswith("_") or labels[1] not in _CARRIERS or not all(labels):
        raise ValueError(f"{where!r}: expected srv:_service._tcp.domain, or _udp")
    return name


def system_resolver(reactor: Any) -> Any:
    """A resolver that asks the name servers of this machine.

    That of twisted.names looks at the file again and again, with a timer that nothing ends.
    """
    from twisted.names.client import Resolver

    servers = []
    with suppress(OSError):
        for line in Path("/etc/resolv.conf").read_text(errors="replace").splitlines():
            words = line.split()
            if len(words) > 1 and words[0] == "nameserver":
                servers.append((words[1], 53))
    return Resolver(servers=servers or [("127.0.0.1", 53)], reactor=reactor)


class ServiceLookup:
    """Looks the records of a name up, again and again.

    :param reactor: for the time.
    :param name: see `service_name`.
    :param resolver: has ``lookupService``, as twisted.names has it.
    :param found: given the servers.
    :param failed: given why there are none.
    """

    def __init__(
        self,
        reactor: Any,
        name: str,
        resolver: Any,
        found: Callable[[list[Place]], None],
        failed: Callable[[Error], None],
    ) -> None:
        self._reactor = reactor
        self._name = name
        self._carrier = _CARRIERS[name.split(".")[1]]
        self._resolver = resolver
        self._found = found
        self._failed = failed
        self._timer: Timer | None = None
        self._asking: Deferred[Any] | None = None

    def start(self) -> None:
        """Looks them up, and goes on doing so."""
        self._timer = None
        self._asking = asking = (self._resolver or system_resolver(self._reactor)).lookupService(self._name)
        asking.addCallbacks(self._answered, self._not_answered)

    def stop(self) -> None:
        """No more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        asking, self._asking = self._asking, None
        if asking is not None:
            asking.cancel()

    def _answered(self, answer: Any) -> None:
        if self._asking is None:
            return
        records = [record for record in answer[0] if hasattr(record.payload, "weight")]
        # RFC 2782: a target that is the root says that there is no such service.
        records = [record for record in records if str(record.payload.target).rstrip(".")]
        if not records:
            self._none(f"{self._name} has no SRV records")
            return
        places = [
            Place(
                f"{self._carrier}:{str(record.payload.target).rstrip('.')}:{record.payload.port}",
                record.payload.priority,
                record.payload.weight,
            )
            for record in records
        ]
        least = min(record.ttl for record in records)
        self._again(min(max(float(least), _SOONEST), _LATEST))
        self._found(sorted(places, key=lambda place: (place.priority, place.where)))

    def _not_answered(self, failure: Failure) -> None:
        if self._asking is not None:
            why = failure.getErrorMessage() if not failure.check(DNSLookupError) else "no such name"
            self._none(f"{self._name}: {why or type(failure.value).__name__}")

    def _none(self, why: str) -> None:
        self._again(_AFTER_FAILURE)
        self._failed(not_run(ConnectFailed(why)))

    def _again(self, seconds: float) -> None:
        self._asking = None
        self._timer = call_later(self._reactor, seconds, self.start)
