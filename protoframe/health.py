"""Health: whether a server takes calls, told to balancers, to service managers and to ``pf health``.

Knows readiness by the name of a Protocol; it is a `Protocol` like any other, which each `Factory` serves.
"""

from __future__ import annotations

from typing import Any

from protoframe._protocol import Protocol, request
from protoframe.core.schema import protocol_name
from protoframe.errors import NotFound

__all__ = ["Health"]


class Health(Protocol[Any], name="protoframe.Health"):
    """Whether this server takes calls."""

    @request(idempotent=True, raises=[NotFound])
    async def check(self, protocol: str = "") -> bool:
        """Whether it takes calls of a Protocol that it serves, or without a name of all of them.

        A server that is draining takes none.  What is not served is `NotFound`.
        """
        readiness = {protocol_name(served): self.factory.is_ready(served) for served in self.factory.protocols}
        if not protocol:
            return all(readiness.values())
        if protocol not in readiness:
            raise NotFound(f"no Protocol {protocol} is served here; there is {', '.join(sorted(readiness))}")
        return readiness[protocol]
