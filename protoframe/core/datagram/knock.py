"""A client asks for a connection: INITIAL, again and again, until there is an answer.

Knows packets and the time; what follows an ACCEPT is `protoframe.core.datagram.association`'s.
"""

from __future__ import annotations

import math

from protoframe.core.datagram.packets import (
    Accept,
    Initial,
    Kind,
    Malformed,
    Refused,
    Retry,
    Versions,
    parse_segments,
)
from protoframe.core.datagram.rtt import INITIAL_RTT
from protoframe.core.frames import FIRST_VERSION, LAST_VERSION, GoAway, agree_on_version
from protoframe.errors import BY_STATUS, ConnectionLost, Error, RemoteProtocolError

__all__ = ["Knock"]

#: By how much longer it waits each time, and how long at the most; seconds.
_BACKOFF = 1.5
_LONGEST = 2.0
#: It waits for so many round trips, where it knows how long one takes, and no shorter than this.
_ROUND_TRIPS = 3.0
_SHORTEST = 0.02
#: How often it says the same when it has to say it again: both ways may lose it.
_COPIES = 2


class Knock:
    """A client that asks.

    :param client_id: what packets to it are to name.
    :param token: what an earlier connection to the same server gave, if any did.
    :param now: the time.
    :ivar round_trip: the seconds that one took; 0 where that is not known.
    """

    def __init__(self, client_id: int, token: bytes, now: float) -> None:
        self.round_trip = 0.0
        self.client_id = client_id
        self._token = token
        self._has_cookie = False
        self._wait = INITIAL_RTT
        self._sent = -math.inf
        self._times = 0
        self._due = now

    def poll(self, now: float) -> list[bytes]:
        """What to send now."""
        if now < self._due:
            return []
        self._due = now + self._wait
        self._wait = min(self._wait * _BACKOFF, _LONGEST)
        self._sent = now
        self._times += 1
        initial = Initial(FIRST_VERSION, LAST_VERSION, self.client_id, self._token).serialize()
        return [initial] * (1 if self._times == 1 else _COPIES)

    def next_timer(self) -> float:
        """When `poll` wants to be called."""
        return self._due

    def handle(self, kind: int, datagram: bytes, now: float) -> Accept | None:
        """Takes a packet that names this client: the ACCEPT, where it is one.

        :raises Malformed: it does not keep to the layout.
        :raises VersionMismatch: the server speaks no version that this end does.
        :raises ConnectionLost: the server does not want the connection; the cause has the status.
        """
        if kind == Kind.ACCEPT:
            accept = Accept.parse(datagram)
            parse_segments(datagram, accept.segments)
            if not FIRST_VERSION <= accept.version <= LAST_VERSION:
                raise Malformed("ACCEPT of a version that was not offered")
            return accept
        if kind == Kind.RETRY:
            self._retry(Retry.parse(datagram), now)
        elif kind == Kind.VERSIONS:
            versions = Versions.parse(datagram)
            agree_on_version(versions.first_version, versions.last_version)
            raise Malformed("VERSIONS that this end speaks")
        elif kind == Kind.REFUSED:
            try:
                goaway = GoAway.parse(Refused.parse(datagram).reason)
            except RemoteProtocolError as error:
                raise Malformed(f"REFUSED: {error}") from None
            lost = ConnectionLost(f"the peer ended the conversation: {goaway.text}")
            lost.__cause__ = BY_STATUS.get(goaway.status, Error)(goaway.text)
            raise lost
        return None

    def _retry(self, retry: Retry, now: float) -> None:
        self._token = retry.token
        if self._has_cookie:
            # The copies that were sent are each answered.
            return
        self._has_cookie = True
        if self._times == 1:
            # It says nothing of how long an answer takes that may be one to either of several.
            self.round_trip = now - self._sent
        self._times = 0
        self._wait = max(_ROUND_TRIPS * self.round_trip, _SHORTEST) if self.round_trip else INITIAL_RTT
        self._due = now
