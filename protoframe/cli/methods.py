"""The method that is called: what its server says of it, and its arguments as it takes them.

Knows descriptions, and that some servers give none.  Not how the method is called, nor what becomes of its answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from protoframe.cli.arguments import Argument, compose, read_content
from protoframe.cli.schemas import takes_bytes

if TYPE_CHECKING:
    from protoframe import Connecting
    from protoframe.reflection import MethodDescription, Reflection

__all__ = ["UNDESCRIBED", "Method", "find_method"]


@dataclasses.dataclass(frozen=True, slots=True)
class Method:
    """A method, as far as it is known.

    :ivar description: what its server says of it; ``None`` where it says nothing.
    :ivar definitions: what the schemas refer to.
    :ivar is_mute: whether the server describes nothing at all.
    """

    description: MethodDescription | None = None
    definitions: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_mute: bool = False

    @property
    def is_described(self) -> bool:
        """Whether anything is known."""
        return self.description is not None

    @property
    def streams(self) -> bool:
        """Whether it is known to answer with a stream."""
        return self.description is not None and self.description.stream

    @property
    def sent_streams(self) -> set[str]:
        """The parameters that are known to be streams."""
        return (
            {one.name for one in self.description.parameters if one.stream} if self.description is not None else set()
        )

    async def compose(self, arguments: Sequence[Argument]) -> bytes:
        """Arguments as a JSON object; their files are read.

        :raises Problem: a file cannot be read, or does not fit its parameter.
        """
        from protoframe.cli.running import in_thread

        for argument in arguments:
            if argument.file is not None:
                await in_thread(read_content, argument)
        if self.description is None:
            return compose(arguments, lambda _: None)
        properties = self.description.arguments_schema.get("properties", {})
        return compose(arguments, lambda name: takes_bytes(properties.get(name), self.definitions))


#: Nobody was asked.
UNDESCRIBED = Method()


async def find_method(connecting: Connecting[Reflection], name: str) -> Method:
    """What the server says of ``Protocol.method``; nothing is known of one that it does not know.

    :raises Error: it cannot be asked.
    """
    from protoframe import NotFound, UnknownMethod
    from protoframe.cli.describing import describe

    protocol, _, own = name.rpartition(".")
    try:
        (description,) = await describe(connecting, [protocol])
    except (NotFound, UnknownMethod) as error:
        return Method(is_mute=isinstance(error, UnknownMethod))
    found = next((one for one in description.methods if one.name == own), None)
    return Method(found, description.definitions)
