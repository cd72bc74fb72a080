"""Octets that are given to a socket itself, as protoframe does, and not to the reactor's next turn.

Knows Twisted's TCP transports and what they hold back.  It must not know what the octets are.
"""

from __future__ import annotations

from typing import Any

__all__ = ["give"]


def give(transport: Any, data: bytes) -> None:
    """Sends octets at once where the transport has nothing to write; what the socket does not take is left to it."""
    if transport.dataBuffer or transport._tempDataBuffer:
        transport.write(data)
        return
    try:
        sent = transport.getHandle().send(data)
    except OSError:
        # It is full, or the connection is gone, which the transport finds out for itself.
        sent = 0
    if sent < len(data):
        transport.write(data[sent:])
