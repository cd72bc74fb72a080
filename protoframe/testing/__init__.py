"""A simulated network for tests: hosts, links that lose, double, reorder and corrupt, and virtual time.

Knows Twisted's reactors from outside, and protoframe by its public face alone.  ``docs/testing.md`` shows how to use
it.

>>> from protoframe import Protocol, request
>>> from protoframe.testing import Network
>>> class Speech(Protocol):
...     @request
...     async def upper(self, text: str) -> str:
...         return text.upper()
>>> network = Network(seed=7, loss=0.3)
>>> where = network.serve(Speech, "udp:12000")
>>> async def scenario():
...     async with network.connect(where, Speech) as speech:
...         return await speech.upper("hello")
>>> network.run(scenario())
'HELLO'
"""

from __future__ import annotations

from protoframe.testing._host import Host
from protoframe.testing._links import Conditions
from protoframe.testing.network import Network, NotQuiet, Stuck
from protoframe.testing.seeds import run_seeds

__all__ = ["Conditions", "Host", "Network", "NotQuiet", "Stuck", "run_seeds"]
