"""`Protocol` and ``@request``: how an application-layer protocol is declared.

Knows declarations alone: what they say is read by `protoframe.core.schema`, and conversations are held by
`protoframe._connection`.
"""

from __future__ import annotations

import sys
import typing
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from protoframe.core.schema import MARK, NAME, PERMISSION, RequestOptions
from protoframe.errors import Error, LocalProtocolError

if TYPE_CHECKING:
    from twisted.python.failure import Failure
    from typing_extensions import TypeVar as TypeVarWithDefault

    from protoframe._connection import Connection
    from protoframe._factory import Factory

    PeerT = TypeVarWithDefault("PeerT", default=Any)
else:
    PeerT = TypeVar("PeerT")

__all__ = ["Protocol", "request"]

F = TypeVar("F", bound=Callable[..., Any])


class Protocol(Generic[PeerT]):
    """One end of a conversation, and the declaration of what that end answers.

    Subclass it and decorate methods with `request`.  For each conversation there is one instance, made by
    `Factory.create`; state that conversations share belongs to the factory.

    A Protocol's name on the wire is its class's; ``class Speech2(Protocol, name="Speech")`` gives another.
    ``Protocol["ChatClient"]`` says what the other end answers, which is how `peer` is typed.
    ``class Admin(Protocol, permission="admin")`` is for peers whose `Identity` has that permission; so are its
    subclasses.

    :ivar factory: the `Factory` that serves this conversation; not set at the end that connects.
    """

    factory: Factory
    # The last of the conversations that it serves, how many there are, and the peer of that one once it was asked for.
    # Attributes that only the class has take no memory of the instances, of which there are as many as connections.
    _protoframe_connection: Connection | None = None
    _protoframe_live = 0
    _protoframe_peer: Any = None

    def __init_subclass__(cls, *, name: str | None = None, permission: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is not None:
            if not all(part.isidentifier() for part in name.split(".")):
                raise ValueError(f"{cls.__name__}: name: expected identifiers with dots between, got {name!r}")
            setattr(cls, NAME, name)
        if permission is not None:
            if not isinstance(permission, str) or not permission:
                raise TypeError(f"{cls.__name__}: permission: expected a name, got {permission!r}")
            setattr(cls, PERMISSION, permission)

    @property
    def peer(self) -> PeerT:
        """The typed proxy of the other end.

        :raises LocalProtocolError: the class does not say what the other end answers (``Protocol[...]``), there is no
            conversation yet, or the instance serves several at once.
        """
        if self._protoframe_live > 1:
            raise LocalProtocolError(f"this {type(self).__name__} serves several conversations: it has no one peer")
        proxy: PeerT | None = self._protoframe_peer
        if proxy is None:
            connection = self._protoframe_connection
            if connection is None:
                raise LocalProtocolError(f"{type(self).__name__} has no conversation yet, and so no peer")
            proxy = connection.proxy(peer_class(type(self)))
            _set(self, "_protoframe_peer", proxy)
        return proxy

    def connectionMade(self) -> None:
        """Called when the conversation is open, before the first request is served."""

    def connectionLost(self, reason: Failure) -> None:
        """Called when the conversation is over, once, if `connectionMade` was."""


# Whatever a Protocol does about attributes of its own.
_set = object.__setattr__


def begin_conversation(protocol: Protocol[Any], connection: Connection) -> None:
    """An instance serves a conversation."""
    if protocol._protoframe_peer is not None:
        # One that has served a conversation before had another peer then.
        _set(protocol, "_protoframe_peer", None)
    _set(protocol, "_protoframe_live", protocol._protoframe_live + 1)
    _set(protocol, "_protoframe_connection", connection)


def end_conversation(protocol: Protocol[Any]) -> None:
    """An instance serves a conversation no longer."""
    _set(protocol, "_protoframe_live", protocol._protoframe_live - 1)


def peer_class(cls: type[Protocol[Any]]) -> type[Any]:
    """The class X of ``class Y(Protocol[X])``.

    :raises LocalProtocolError: the class does not say, or names something that is no Protocol.
    """
    for base in cls.__mro__:
        for generic in base.__dict__.get("__orig_bases__", ()):
            if typing.get_origin(generic) is Protocol:
                (peer,) = typing.get_args(generic)
                if isinstance(peer, typing.ForwardRef):
                    names = vars(sys.modules[base.__module__])
                    peer = names.get(peer.__forward_arg__, peer)
                if isinstance(peer, type) and issubclass(peer, Protocol):
                    return peer
                raise LocalProtocolError(f"{base.__name__}: Protocol[{peer}] names no Protocol")
    raise LocalProtocolError(f"{cls.__name__} does not say what its peer answers; write Protocol[...]")


@overload
def request(function: F, /) -> F: ...
@overload
def request(
    *,
    idempotent: bool = False,
    timeout: float | None = None,
    raises: Iterable[type[Error]] = (),
    max_size: int | None = None,
    oneway: bool = False,
    permission: str | None = None,
) -> Callable[[F], F]: ...
def request(
    function: Any = None,
    /,
    *,
    idempotent: bool = False,
    timeout: float | None = None,
    raises: Iterable[type[Error]] = (),
    max_size: int | None = None,
    oneway: bool = False,
    permission: str | None = None,
) -> Any:
    """Makes a method of a `Protocol` one that the other end can call.

    Parameters and result are annotated with types that msgspec knows.  The method may be ``async def``, return a
    Deferred, or return its result at once.  A body of ``...`` or ``raise NotImplementedError`` declares the method
    without serving it.

    A result annotated as `AsyncIterator` is a stream: the method is an async generator, or returns an async iterator,
    and is called in ``async for``.  One parameter may be an `AsyncIterator` too, which the caller sends.  A declaration
    of a stream without a body uses ``def``, not ``async def``: ``def steps(self) -> AsyncIterator[str]: ...``

    :param idempotent: running it twice does what running it once does, so a retry is safe.
    :param timeout: seconds that a call may take where its caller sets no deadline; without it that is
        `Limits.default_timeout`, or as long as it takes where there is a stream.
    :param raises: the errors that travel as themselves; whatever else is raised reaches the caller as `Internal`.
    :param max_size: bytes that the encoded arguments, the encoded result, and each item of a stream, may have; at most,
        and by default, what `Limits.max_message` of both ends allows.
    :param oneway: the caller wants no answer, and the call may get lost: when the connection is lost, or where too many
        calls run already.  The result is ``None``; awaiting it waits until the call is on its way, which a peer that
        does not read holds up.
    :param permission: what the peer's `Identity` must be permitted; that of the Protocol is asked for as well.
    :raises TypeError: ``raises`` holds something that is no `Error` class, or two of one name, or a oneway request has
        any.
    :raises ValueError: ``timeout`` or ``max_size`` is out of bounds.
    """
    if isinstance(raises, type):
        raise TypeError(f"raises: expected a list of errors, got {raises.__name__}")
    options = RequestOptions(
        idempotent=idempotent,
        timeout=timeout,
        raises=tuple(raises),
        max_size=max_size,
        oneway=oneway,
        permission=permission,
    )

    def mark(function: F) -> F:
        if not callable(function) or isinstance(function, type | staticmethod | classmethod):
            raise TypeError(f"@request decorates plain methods, not {function!r}")
        setattr(function, MARK, options)
        return function

    return mark if function is None else mark(function)
