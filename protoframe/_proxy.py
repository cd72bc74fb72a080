"""Typed proxies: the other end of a conversation, as an object whose methods call it.

Knows a Protocol's methods, and what makes the calls of one end; to type checkers a proxy of ``Speech`` is a
``Speech``.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred

from protoframe.core.schema import Method, encode_msgpack, methods_of

if TYPE_CHECKING:
    from typing import TypeAlias

    from protoframe._calling import Caller
    from protoframe._client import Calls

    AnyCaller: TypeAlias = Caller | Calls

__all__ = ["Proxy", "proxy_class"]


class Proxy:
    """What every proxy has; each Protocol's own class adds a method for each request."""

    _protocol: type

    def __init__(self, calls: AnyCaller, where: str) -> None:
        self._calls = calls
        self._where = where

    def __repr__(self) -> str:
        return f"<{self._protocol.__name__} at {self._where}>"


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


def _caller(protocol: type, method: Method) -> Callable[..., Any]:
    """The method of a proxy that makes the calls of one request."""
    declared = inspect.getattr_static(protocol, method.name)
    signature = inspect.signature(declared)
    parameters = method.parameters
    sends = method.sends

    def call(self: Proxy, /, *args: Any, **kwargs: Any) -> Any:
        calls = self._calls
        arguments = parameters(*args, **kwargs) if kwargs else parameters(*args)
        if calls.is_intercepted:
            return _intercepted(calls, method, arguments, None)
        return calls.call(method, encode_msgpack(arguments))

    def call_otherwise(self: Proxy, /, *args: Any, **kwargs: Any) -> Any:
        calls = self._calls
        sent = None
        if sends is not None:
            given = signature.bind(self, *args, **kwargs).arguments
            _, sent = given.pop(next(iter(given))), given.pop(sends)
            if not hasattr(sent, "__aiter__"):
                raise TypeError(f"{method.full_name}: {sends}: expected an async iterator, got {type(sent).__name__}")
            arguments = parameters(**given)
        else:
            arguments = parameters(*args, **kwargs)
        if calls.is_intercepted:
            return _intercepted(calls, method, arguments, sent)
        return _make(calls, method, arguments, sent)

    made = call if not method.flags else call_otherwise
    made.__name__ = method.name
    made.__qualname__ = f"{protocol.__name__}.{method.name}"
    made.__doc__ = declared.__doc__
    made.__signature__ = signature  # type: ignore[attr-defined]
    return made


def _make(calls: AnyCaller, method: Method, arguments: Any, sent: Any) -> Any:
    """Makes a call of any kind."""
    octets = encode_msgpack(arguments)
    if method.items is not None:
        return calls.call_stream(method, octets, sent)
    if method.options.oneway:
        return calls.call_oneway(method, octets)
    return calls.call(method, octets, sent)


def _intercepted(calls: AnyCaller, method: Method, arguments: Any, sent: Any) -> Any:
    """Makes a call as the interceptors of this end have it."""
    running = calls.make_intercepted(method, arguments, lambda: _make(calls, method, arguments, sent))
    return running if method.items is None else InterceptedStream(running)


class InterceptedStream(AsyncIterator[Any]):
    """A stream that interceptors give when they have proceeded.

    :param running: fires with it.
    """

    def __init__(self, running: Deferred[Any]) -> None:
        self._running = running
        self._items = _items_of(running)

    def __await__(self) -> Any:
        # As a `Stream` can be awaited.
        return self
        yield

    def __aiter__(self) -> AsyncIterator[Any]:  # noqa: PYI034 - it is not `self` that gives the items
        return self._items

    async def __anext__(self) -> Any:
        return await anext(self._items)

    async def aclose(self) -> None:
        """Takes no more."""
        await self._items.aclose()
        self._running.cancel()
        self._running.addCallbacks(lambda items: Deferred.fromCoroutine(_close(items)), lambda _: None)


async def _items_of(running: Any) -> AsyncGenerator[Any, None]:
    """The items of a stream that interceptors give when they have proceeded."""
    try:
        items = await running
    except GeneratorExit:
        running.cancel()
        raise
    try:
        async for item in items:
            yield item
    finally:
        await _close(items)


async def _close(items: Any) -> None:
    close = getattr(items, "aclose", None)
    if close is not None:
        await close()
