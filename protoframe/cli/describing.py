"""Asks a server what it serves.

Knows `protoframe.reflection`; what is done with the answers is the commands' business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from protoframe.cli.problems import REMOTE, Problem
from protoframe.errors import Status, UnknownMethod

if TYPE_CHECKING:
    from protoframe import Connecting
    from protoframe.cli.running import Target
    from protoframe.reflection import ProtocolDescription, Reflection

__all__ = ["describe", "protocol_names"]

#: Questions on the way at once.
_AT_ONCE = 64


async def protocol_names(connecting: Connecting[Reflection], target: Target) -> list[str]:
    """The names of the Protocols that are served.

    :raises Problem: the server does not describe itself.
    """
    try:
        return await _reflection(connecting).protocols()
    except UnknownMethod:
        text = f"{target.where}: this server does not describe itself"
        hint = f"{target.command('call', 'Protocol.method', 'k=v')}, which needs no description"
        raise Problem(text, REMOTE + Status.UNIMPLEMENTED, hint) from None


async def describe(connecting: Connecting[Reflection], names: list[str]) -> list[ProtocolDescription]:
    """The descriptions of Protocols, in the order of the names."""
    reflection = _reflection(connecting)
    descriptions: list[ProtocolDescription] = []
    for start in range(0, len(names), _AT_ONCE):
        asked = [reflection.describe(name) for name in names[start : start + _AT_ONCE]]
        descriptions += [await answer for answer in asked]
    return descriptions


def _reflection(connecting: Connecting[Reflection]) -> Reflection:
    from protoframe.reflection import Reflection

    return connecting.connection.proxy(Reflection)
