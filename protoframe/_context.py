"""What surrounds a call: its deadline, its metadata, and inside a handler the call that is served.

Knows a context variable alone, so that a deadline reaches every call made below it, across coroutines and Deferreds;
the connection reads it when a call is made and sets it when one is served.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from types import MappingProxyType
from typing import Any

import msgspec

from protoframe.errors import InvalidArgument, LocalProtocolError

__all__ = ["Call", "current_call", "current_metadata", "metadata", "remaining", "timeout"]


class Scope(msgspec.Struct, frozen=True):
    """All that surrounds a call, in one variable: it is read at each call, and set for each that is served.

    :ivar clock: what ``deadline`` is in the time of.
    :ivar deadline: when calls made here expire; ``None`` where nobody said.
    :ivar metadata: what goes with calls made here, as it travels.
    :ivar method: ``Protocol.method`` of the call that is being served; empty where none is.
    :ivar address: whose call that is.
    :ivar received: the metadata that came with it.
    :ivar identity: who called.
    """

    clock: Callable[[], float] = time.monotonic
    deadline: float | None = None
    metadata: bytes = b""
    method: str = ""
    address: Any = None
    received: Mapping[str, str] = MappingProxyType({})
    identity: Any = None

    def remaining(self) -> float | None:
        """Seconds until the deadline; ``None`` where there is none."""
        return None if self.deadline is None else self.deadline - self.clock()


class Call(msgspec.Struct, frozen=True):
    """A call that is being served, for the handler to look at.

    :ivar method: ``Protocol.method``.
    :ivar address: the peer's, as Twisted's transport gives it.
    :ivar metadata: what the caller sent with ``with metadata(...)``.
    :ivar identity: who the peer has shown to be, a `protoframe.Identity`; ``None`` for one that has shown nothing.
    """

    method: str
    address: Any
    metadata: Mapping[str, str]
    _scope: Scope
    identity: Any = None

    @property
    def remaining(self) -> float:
        """Seconds until the deadline of what is done here; below 0 when it has passed, infinity where there is none."""
        remaining = self._scope.remaining()
        return math.inf if remaining is None else remaining


scope: ContextVar[Scope] = ContextVar("protoframe.scope", default=Scope())  # noqa: B039 - it is frozen

# Looked up once: a method of a variable that was imported is looked up anew by each call.
get_scope, set_scope = scope.get, scope.set

#: What surrounds a call where nobody has said anything.
NOWHERE = get_scope()
NO_METADATA: Mapping[str, str] = NOWHERE.received

_decode_metadata = msgspec.msgpack.Decoder(dict[str, str]).decode
_LONGEST_METADATA = 8192


def run_nowhere(function: Callable[[], None]) -> None:
    """Calls a function where nobody's deadline and metadata surround it, and all else is as it was."""
    if scope.get() is NOWHERE:
        function()
    else:
        context = copy_context()
        context.run(scope.set, NOWHERE)
        context.run(function)


def fire_in(around: Scope, fire: Callable[[Any], None], outcome: Any) -> None:
    """Fires a Deferred where what surrounded its call surrounds its callbacks too."""
    token = scope.set(around)
    try:
        fire(outcome)
    finally:
        scope.reset(token)


def decode_metadata(octets: bytes) -> Mapping[str, str]:
    """Metadata, as a handler sees it.

    :raises InvalidArgument: this is no map of texts.
    """
    try:
        return MappingProxyType(_decode_metadata(octets))
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"metadata: {error}") from None


@contextmanager
def timeout(seconds: float) -> Iterator[None]:
    """Gives all calls made in the block ``seconds`` from now, together.

    The deadline goes with each call to the other end, and from there with each call that its handler makes.  A block
    within another can only shorten it.  A call that has no answer by then fails with `DeadlineExceeded`.

    :raises ValueError: ``seconds`` is not a finite number of 0 or more.
    """
    if not (seconds >= 0 and math.isfinite(seconds)):
        raise ValueError(f"timeout: expected a finite number of seconds, 0 or more, got {seconds}")
    outer = scope.get()
    deadline = outer.clock() + seconds
    if outer.deadline is not None and outer.deadline < deadline:
        deadline = outer.deadline
    token = scope.set(msgspec.structs.replace(outer, deadline=deadline))
    try:
        yield
    finally:
        # A generator, such as a fixture of pytest, may end in another context than it began in, which keeps its own.
        with suppress(ValueError):
            scope.reset(token)


def current_metadata() -> Mapping[str, str]:
    """What goes with calls that are made here: the entries of the blocks ``with metadata(...)`` that surround it."""
    octets = scope.get().metadata
    return decode_metadata(octets) if octets else NO_METADATA


def remaining() -> float | None:
    """Seconds until the deadline of calls that are made here: that of ``with timeout(...)``, or of the call served.

    Below 0 where it has passed; ``None`` where there is none.
    """
    return scope.get().remaining()


@contextmanager
def ask_for(seconds: float, clock: Callable[[], float]) -> Iterator[None]:
    """Gives calls made in the block so many seconds, by a clock, whatever surrounds it."""
    token = scope.set(Scope(clock, clock() + seconds))
    try:
        yield
    finally:
        scope.reset(token)


@contextmanager
def metadata(**entries: str) -> Iterator[None]:
    """Sends entries, names and texts, with every call made in the block; a block within another adds to them.

    :raises TypeError: a value is not a string.
    :raises ValueError: the entries are more than 8 KiB.
    """
    for name, value in entries.items():
        if not isinstance(value, str):
            raise TypeError(f"metadata: {name}: expected str, got {type(value).__name__}")
    outer = scope.get()
    octets = msgspec.msgpack.encode((_decode_metadata(outer.metadata) if outer.metadata else {}) | entries)
    if len(octets) > _LONGEST_METADATA:
        raise ValueError(f"metadata: {len(octets)} bytes are more than {_LONGEST_METADATA}")
    token = scope.set(msgspec.structs.replace(outer, metadata=octets))
    try:
        yield
    finally:
        # A generator, such as a fixture of pytest, may end in another context than it began in, which keeps its own.
        with suppress(ValueError):
            scope.reset(token)


def current_call() -> Call:
    """The call that is being served.

    :raises LocalProtocolError: no call is: this is not inside a handler.
    """
    around = scope.get()
    if not around.method:
        raise LocalProtocolError("current_call() is for handlers, while they serve a call")
    return Call(around.method, around.address, around.received, around, around.identity)
