"""Streams: what sends the items of one, and what whoever takes them iterates over.

Knows async iterators, encoded items and credit; not whose call a stream belongs to, nor what carries it.  An iterator
is asked for its next item only while the other end has room for it, so a slow reader slows the generator down, and
what is held at either end is bounded by the credit.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Any, TypeVar

import msgspec
from twisted.internet.defer import CancelledError, Deferred

from protoframe.core.conversation import Conversation
from protoframe.core.events import CreditReceived, ItemsReceived
from protoframe.core.frames import COUNT, HEADER, ITEM_OVERHEAD
from protoframe.core.messages import BACKLOG
from protoframe.core.state import State
from protoframe.errors import Cancelled, Error, LocalProtocolError, MessageTooLarge

__all__ = ["Inlet", "Inlets", "Outlet", "Outlets", "Stream", "ended_inlet", "travelling"]

E = TypeVar("E", bound=Error)

_CLOSED = State.CLOSED

#: What the items of one ITEM may cost, unless it is a single one.
_BATCH = 32 * 1024
#: Seconds for which one stream is asked for items before what there is goes, and others have their turn.
_SLICE = 0.002
#: Items between two looks at the clock.
_LOOK = 15
#: But after each of the first few: they may take long.
_FIRST = 4

_encode_msgpack = msgspec.msgpack.Encoder().encode_into
_encode_json = msgspec.json.Encoder().encode_into

_ONE_READER = "a stream is read by one reader at a time"

#: What precedes the items in msgpack: array 32, and how many there are.
_ARRAY = b"\xdd\0\0\0\0"


def travelling(error: E) -> E:
    """Marks an error as the framework's own words: where it ends a call, it reaches the caller as it is."""
    error.__dict__["_travels"] = True
    return error


class Outlets:
    """The streams that one end of a conversation sends.

    :param conversation: where the items go.
    :param clock: gives the time.
    :param wake: called when there is something to send, or to go on with, that nothing else led to.
    :ivar ready: those that wait for their turn.
    :ivar is_paused: whether what carries the conversation has enough to send.
    """

    def __init__(self, conversation: Conversation, clock: Callable[[], float], wake: Callable[[], None]) -> None:
        self.conversation = conversation
        self.clock = clock
        self.wake = wake
        self.ready: deque[Outlet] = deque()
        self._without_credit: dict[int, Outlet] = {}
        self.is_paused = False

    def may_go_on(self) -> bool:
        """Whether what carries the conversation takes more."""
        return not self.is_paused and self.conversation.outbox.octets <= BACKLOG

    def await_credit(self, outlet: Outlet) -> None:
        """A stream waits until the peer takes more of it."""
        self._without_credit[outlet.call_id] = outlet

    def await_turn(self, outlet: Outlet) -> None:
        """A stream waits until others have had their turn."""
        if not outlet.is_queued:
            outlet.is_queued = True
            self.ready.append(outlet)
            self.wake()

    def credit_came(self, event: CreditReceived) -> None:
        """The peer takes more."""
        self.go_on_with(event.call_id)

    def go_on_with(self, call_id: int) -> None:
        """What held up a stream, or (call id 0) any, may be gone."""
        waiting = self._without_credit
        if not call_id:
            self._without_credit = {}
            for outlet in waiting.values():
                self.await_turn(outlet)
        elif call_id in waiting:
            self.await_turn(waiting.pop(call_id))

    def go_on(self) -> None:
        """Gives each stream that is ready its turn, while what carries the conversation takes more."""
        until = self.clock() + 2 * _SLICE
        for _ in range(len(self.ready)):
            if not self.ready or not self.may_go_on() or self.clock() > until:
                return
            outlet = self.ready.popleft()
            outlet.is_queued = False
            outlet.go_on()

    def forget(self, outlet: Outlet) -> None:
        """A stream is over."""
        self._without_credit.pop(outlet.call_id, None)
        if outlet.is_queued:
            outlet.is_queued = False
            self.ready.remove(outlet)


class Outlet:
    """Sends the items of an async iterator.

    `run` is a coroutine, so that whoever drives it decides in which context the iterator runs, and how it is cancelled.

    :param outlets: its end's.
    :param call_id: the call whose stream it is.
    :param json: whether items are encoded as JSON.
    :param max_size: octets of one item that are allowed, where they are bounded.
    :ivar is_queued: whether it is among those that wait for their turn.
    """

    __slots__ = (
        "_buffer",
        "_count",
        "_head",
        "_is_over",
        "_json",
        "_max_size",
        "_most",
        "_outlets",
        "_room",
        "_waits_for",
        "call_id",
        "is_queued",
    )

    def __init__(self, outlets: Outlets, call_id: int, *, json: bool, max_size: int | None) -> None:
        self.call_id = call_id
        self._outlets = outlets
        self._json = json
        self._head = b"[" if json else _ARRAY
        self._buffer = bytearray(self._head)
        self._count = 0
        self._room = 0
        self._is_over = False
        self.is_queued = False
        peer = outlets.conversation.peer
        if peer is None:
            raise LocalProtocolError("the conversation is not open yet")
        self._max_size = peer.max_message if max_size is None else min(max_size, peer.max_message)
        # What fits one frame, with what surrounds the items.
        self._most = min(peer.max_message, peer.max_frame - HEADER.size - COUNT.size - len(b"]"))
        self._waits_for: Deferred[None] | None = None

    async def run(self, iterator: Any) -> None:
        """Sends everything that the iterator gives; returns when all is sent.

        Whatever ends it, the iterator is closed.

        :raises MessageTooLarge: an item is more than is allowed.
        :raises Exception: what the iterator raises, when the items before are sent.
        """
        try:
            try:
                await self._send_all(iterator)
            finally:
                close = getattr(iterator, "aclose", None)
                if close is not None:
                    await close()
        except GeneratorExit:
            raise
        except BaseException:
            await self._send_rest()
            raise
        else:
            await self._send_rest()

    async def _send_all(self, iterator: AsyncIterator[Any]) -> None:
        buffer = self._buffer
        clock = self._outlets.clock
        encode = _encode_json if self._json else _encode_msgpack
        await self._has_room()
        until = clock() + _SLICE
        async for item in iterator:
            before = len(buffer)
            if self._count and self._json:
                buffer += b","
            try:
                encode(item, buffer, -1)
            except BaseException:
                del buffer[before:]
                raise
            self._count = count = self._count + 1
            size = len(buffer)
            if size > self._most or size - before > self._max_size:
                await self._send_large(before)
            elif size + ITEM_OVERHEAD * count >= self._room or (
                (not count & _LOOK or count < _FIRST) and clock() >= until
            ):
                pass
            else:
                continue
            self.flush()
            await self._has_room()
            until = clock() + _SLICE

    async def _send_large(self, before: int) -> None:
        """Sends an item, the last in the buffer, that goes alone, after those before it."""
        buffer = self._buffer
        item = bytes(buffer[before:]).removeprefix(b"," if self._json and self._count > 1 else b"")
        del buffer[before:]
        self._count -= 1
        if len(item) > self._max_size:
            raise travelling(MessageTooLarge(f"an item is {len(item)} bytes, and {self._max_size} are allowed"))
        if self._count:
            self.flush()
            await self._has_room()
        buffer += item
        self._count = 1

    async def _send_rest(self) -> None:
        """Sends what is encoded; a large item is sent when this returns, so that nothing overtakes it."""
        while self._count and not self._is_over:
            await self._has_room()
            self.flush()
        while not self._is_over and not self._outlets.conversation.may_end(self.call_id):
            await self._wait()

    async def _has_room(self) -> None:
        """Waits until the peer, and what carries the conversation, take more."""
        turn = self._count == 0 and self._room > 0
        while True:
            if self._is_over:
                raise CancelledError
            self._room = 0
            room = self._outlets.conversation.room(self.call_id)
            if room > 0 and self._outlets.may_go_on() and not turn:
                self._room = min(room, _BATCH)
                return
            turn = False
            await self._wait()

    async def _wait(self) -> None:
        outlets = self._outlets
        waiting: Deferred[None] = Deferred()
        self._waits_for = waiting
        if outlets.conversation.room(self.call_id) > 0:
            outlets.await_turn(self)
        else:
            outlets.await_credit(self)
        try:
            await waiting
        finally:
            self._waits_for = None

    def go_on(self) -> None:
        """It has its turn."""
        waiting = self._waits_for
        if waiting is not None:
            waiting.callback(None)
        else:
            self.flush()

    def flush(self) -> None:
        """Sends what is encoded, as far as there is room: while the iterator waits for something, say."""
        if not self._count or self._is_over:
            return
        outlets = self._outlets
        if outlets.conversation.room(self.call_id) <= 0 or not outlets.may_go_on():
            if self._waits_for is None:
                # The iterator is what is waited for: it is for the other end to let this go.
                if outlets.conversation.room(self.call_id) > 0:
                    outlets.await_turn(self)
                else:
                    outlets.await_credit(self)
            return
        buffer, count = self._buffer, self._count
        if self._json:
            buffer += b"]"
        else:
            buffer[1:5] = count.to_bytes(4)
        octets = bytes(buffer)
        self._count = 0
        del buffer[len(self._head) :]
        outlets.conversation.send_items(self.call_id, count, octets)
        outlets.wake()

    def abandon(self) -> None:
        """Nothing more is sent: nobody wants it, or the call has its outcome."""
        self._is_over = True
        self._count = self._room = 0
        self._outlets.forget(self)


class Inlets:
    """The streams that come to one end of a conversation, of calls of either end.

    :param conversation: where the items come from.
    :param reactor: whose thread all this happens in.
    :param wake: called when there is something to send that nothing else led to.
    """

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
