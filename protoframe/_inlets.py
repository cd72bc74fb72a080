"""Streams that come: what keeps their items, and what whoever takes them iterates over.

Knows encoded items, what they cost and who waits for them; not whose call a stream belongs to, nor what carries it.
What is held is bounded by the credit that the other end was granted.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Any

from twisted.internet.defer import Deferred

from protoframe.core.conversation import Conversation
from protoframe.core.events import ItemsReceived
from protoframe.core.state import State
from protoframe.errors import Cancelled, LocalProtocolError

__all__ = ["Inlet", "Inlets", "Stream", "ended_inlet"]

_CLOSED = State.CLOSED

_ONE_READER = "a stream is read by one reader at a time"


class Inlets:
    """The streams that come to one end of a conversation, of calls of either end.

    :param conversation: where the items come from.
    :param reactor: whose thread all this happens in.
    :param wake: called when there is something to send that nothing else led to.
    """

    __slots__ = ("_conversation", "_inlets", "_reactor", "_thread", "_wake", "left")

    def __init__(self, conversation: Conversation, reactor: Any, wake: Callable[[], None]) -> None:
        self._conversation = conversation
        self._reactor = reactor
        self._wake = wake
        self._thread = threading.get_ident()
        self._inlets: dict[int, Inlet] = {}
        self.left: list[tuple[int, int]] = []

    def open(self, call_id: int, decode: Callable[[bytes, int], list[Any]]) -> Inlet:
        """A stream begins.

        :param decode: decodes an ITEM that has so many items.
        """

        def give_back(cost: int) -> None:
            self._conversation.give_back(call_id, cost)
            self._wake()

        inlet = self._inlets[call_id] = Inlet(decode, give_back, lambda cost: self._leave(call_id, cost))
        return inlet

    def receive(self, event: ItemsReceived) -> None:
        """Items came."""
        inlet = self._inlets.get(event.call_id)
        if inlet is None:
            self._conversation.give_back(event.call_id, event.cost)
        else:
            inlet.receive(event.message, event.count, event.cost)

    def end(self, call_id: int, error: BaseException | None = None) -> None:
        """Nothing more comes of a stream, if there is one."""
        inlet = self._inlets.pop(call_id, None)
        if inlet is not None:
            inlet.end(error)

    def fail(self, call_id: int, error: BaseException) -> None:
        """The same, and what came and was not taken is not given to anybody."""
        inlet = self._inlets.pop(call_id, None)
        if inlet is not None:
            inlet.fail(error)

    def end_all(self, error: BaseException) -> None:
        """The conversation is over."""
        while self._inlets:
            self._inlets.popitem()[1].end(error)

    def _leave(self, call_id: int, cost: int) -> None:
        # Streams are left wherever their last reference goes: in the midst of anything, and in any thread.  What
        # follows waits until it is in order.
        if self._conversation.state is _CLOSED:
            return
        self.left.append((call_id, cost))
        if threading.get_ident() == self._thread:
            self._wake()
        else:
            self._reactor.callFromThread(self._wake)

    def settle(self) -> None:
        """Does what follows of streams that were left."""
        left, self.left = self.left, []
        for call_id, cost in left:
            if cost:
                self._conversation.give_back(call_id, cost)
            if self._inlets.pop(call_id, None) is not None:
                # What comes of it from now on is only counted.
                self._conversation.leave(call_id)


class Inlet:
    """What comes of a stream, until it is taken.

    :param decode: decodes what came: an ITEM and how many items it has.
    :param give_back: tells the other end that so much was taken.
    :param leave: called once, when nobody takes any more, with what came and was not taken.
    """

    def __init__(
        self,
        decode: Callable[[bytes, int], list[Any]],
        give_back: Callable[[int], None],
        leave: Callable[[int], None],
    ) -> None:
        self._decode = decode
        self._give_back = give_back
        self._leave = leave
        self._came: deque[tuple[bytes, int, int]] = deque()
        self._cost = 0
        self._waiting: Deferred[None] | None = None
        self._has_ended = False
        self._is_left = False
        self._error: BaseException | None = None
        #: Of what was taken last, what was not given to anybody yet.
        self.items: Iterator[Any] = iter(())

    def receive(self, message: bytes, count: int, cost: int) -> None:
        """Items came."""
        if self._is_left:
            self._give_back(cost)
        else:
            self._came.append((message, count, cost))
            self._wake()

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more comes; after what has come, whoever takes it is told so, or gets an error."""
        if not self._has_ended:
            self._has_ended = True
            self._error = error
            self._wake()

    def fail(self, error: BaseException) -> None:
        """Nothing more comes, and what came and was not taken is not given to anybody."""
        if cost := self._forget():
            self._give_back(cost)
        self.end(error)

    def leave(self) -> None:
        """Nobody takes any more."""
        if not self._is_left:
            self._is_left = True
            self._leave(self._forget())
            self._wake()

    @property
    def has_reader(self) -> bool:
        """Whether somebody waits for items."""
        return self._waiting is not None

    async def take(self) -> bool:
        """Fills `items`, when some come; ``False`` where none will.

        :raises LocalProtocolError: somebody waits for them already.
        :raises Exception: that the stream ended with, or that the items could not be decoded with.
        """
        if self.has_reader:
            raise LocalProtocolError(_ONE_READER)
        cost, self._cost = self._cost, 0
        if cost:
            self._give_back(cost)
        while not self._came:
            if self._has_ended or self._is_left:
                error, self._error = self._error, None
                if error is not None:
                    raise error
                return False
            waiting: Deferred[None] = Deferred()
            self._waiting = waiting
            try:
                await waiting
            finally:
                self._waiting = None
            if self._is_left:
                raise Cancelled("the stream was closed while it was read")
        message, count, self._cost = self._came.popleft()
        try:
            self.items = iter(self._decode(message, count))
        except BaseException:
            self.leave()
            raise
        return True

    def _wake(self) -> None:
        waiting = self._waiting
        if waiting is not None:
            self._waiting = None
            waiting.callback(None)

    def _forget(self) -> int:
        """Forgets what was not taken; what it costs."""
        self.items = iter(())
        cost = self._cost + sum(entry[2] for entry in self._came)
        self._cost = 0
        self._came.clear()
        return cost


def ended_inlet(error: BaseException) -> Inlet:
    """What comes of a stream that never began."""

    def nothing(*_: Any) -> Any:
        return []

    inlet = Inlet(nothing, nothing, nothing)
    inlet.end(error)
    return inlet


class Stream(AsyncIterator[Any]):
    """A stream, for whoever takes its items: an async iterator.

    Leaving the loop over it, `aclose`, or dropping it, tells the other end that no more is wanted.
    """

    __slots__ = ("_inlet",)

    def __init__(self, inlet: Inlet) -> None:
        self._inlet = inlet

    def __await__(self) -> Any:
        # A method that is declared with ``async def`` and returns an iterator is a coroutine to type checkers.
        return self
        yield

    def __aiter__(self) -> AsyncIterator[Any]:  # noqa: PYI034 - it is not `self` that gives the items
        return self._iterate()

    async def _iterate(self) -> AsyncGenerator[Any, None]:
        # A generator gives its items at a fraction of what a call of `__anext__` costs; and it is closed when the loop
        # over it is left.
        inlet = self._inlet
        is_reader = True
        try:
            while True:
                for item in inlet.items:
                    yield item
                if inlet.has_reader:
                    # It goes on reading: this loop does not take the stream away from it.
                    is_reader = False
                    raise LocalProtocolError(_ONE_READER)
                if not await inlet.take():
                    return
        finally:
            if is_reader:
                inlet.leave()

    async def __anext__(self) -> Any:
        inlet = self._inlet
        while True:
            for item in inlet.items:
                return item
            if not await inlet.take():
                inlet.leave()
                raise StopAsyncIteration

    async def aclose(self) -> None:
        """Takes no more."""
        self._inlet.leave()

    def __del__(self) -> None:
        self._inlet.leave()
