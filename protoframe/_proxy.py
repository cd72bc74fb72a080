"""Typed proxies: the other end of a conversation, as an object whose methods call it.

Knows a Protocol's methods, and of a connection that it takes calls; to type checkers a proxy of ``Speech`` is a
``Speech``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from protoframe.core.schema import Method, encode_msgpack, methods_of

if TYPE_CHECKING:
    from twisted.internet.defer import Deferred

    from protoframe._connection import Connection

__all__ = ["Proxy", "proxy_class"]


class Proxy:
    """What every proxy has; each Protocol's own class adds a method for each request."""

    _protocol: type

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __repr__(self) -> str:
        return f"<{self._protocol.__name__} at {self._connection.where}>"

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self._protocol.__name__} has no request called {name}")


#: Made once for each Protocol.
_classes: dict[type, type[Proxy]] = {}


def proxy_class(protocol: type) -> type[Proxy]:
    """The class of the proxies of a Protocol.

    :raises TypeError: the Protocol has a method whose signature cannot travel.
    """
    known = _classes.get(protocol)
    if known is not None:
        return known
    body: dict[str, Any] = {name: _caller(protocol, method) for name, method in methods_of(protocol).items()}
    body["_protocol"] = protocol
    body["__doc__"] = protocol.__doc__
    made = _classes[protocol] = type(f"{protocol.__name__}Proxy", (Proxy,), body)
    return made


def _caller(protocol: type, method: Method) -> Callable[..., Deferred[Any]]:
    parameters = method.parameters

    def call(self: Proxy, /, *args: Any, **kwargs: Any) -> Deferred[Any]:
        return self._connection.call(method, encode_msgpack(parameters(*args, **kwargs)))

    declared = inspect.getattr_static(protocol, method.name)
    call.__name__ = method.name
    call.__qualname__ = f"{protocol.__name__}.{method.name}"
    call.__doc__ = declared.__doc__
    call.__signature__ = inspect.signature(declared)  # type: ignore[attr-defined]
    return call
