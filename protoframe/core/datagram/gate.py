"""Who is let in: cookies and tokens, by which a server knows without keeping anything that a client is where it says.

Knows addresses as texts, and a key; not what is done for whom it lets in.  A *cookie* (RETRY) holds for one address,
one port, one connection and some seconds; a *token* (TOKEN) for one address and a day, and saves the next connection
the round trip.  Both are what RFC 9000, section 8.1, has for the same ends.
"""

from __future__ import annotations

import hmac
import struct
from hashlib import blake2b

__all__ = ["Gate"]

_COOKIE, _TOKEN = 1, 2
_HEAD = struct.Struct("!BQ")
_SEAL_SIZE = 16

#: Seconds for which a cookie holds: as long as a client goes on asking.
COOKIE_LIFETIME = 15.0
#: Seconds for which a token does.
TOKEN_LIFETIME = 86_400.0


class Gate:
    """Makes cookies and tokens, and knows its own again.

    :param key: 16 to 64 octets that nobody else knows.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def cookie(self, host: str, port: int, client_id: int, now: float) -> bytes:
        """What a client at an address is to send back."""
        head = _HEAD.pack(_COOKIE, int(now * 1e6))
        return head + self._seal(head, host, port, client_id)

    def token(self, host: str, now: float) -> bytes:
        """What a client of that host may show at its next connection."""
        head = _HEAD.pack(_TOKEN, int(now * 1e6))
        return head + self._seal(head, host)

    def admits(self, shown: bytes, host: str, port: int, client_id: int, now: float) -> float | None:
        """For how many seconds, above 0, a cookie was out; 0 for a token; ``None`` where it does not hold."""
        if len(shown) != _HEAD.size + _SEAL_SIZE:
            return None
        head, seal = shown[: _HEAD.size], shown[_HEAD.size :]
        kind, made = _HEAD.unpack(head)
        age = now - made / 1e6
        if kind == _COOKIE and -0.001 <= age <= COOKIE_LIFETIME:
            right, out = self._seal(head, host, port, client_id), max(1e-6, age)
        elif kind == _TOKEN and -0.001 <= age <= TOKEN_LIFETIME:
            right, out = self._seal(head, host), 0.0
        else:
            return None
        return out if hmac.compare_digest(seal, right) else None

    def _seal(self, head: bytes, host: str, *more: int) -> bytes:
        text = "\0".join([host, *map(str, more)]).encode()
        return blake2b(head + text, key=self._key, digest_size=_SEAL_SIZE).digest()
