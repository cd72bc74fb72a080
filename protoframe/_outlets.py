"""Streams that go: what asks an async iterator for its items, and sends them.

Knows async iterators, encoding and credit; not whose call a stream belongs to, nor what carries it.  An iterator is
asked for its next item only while the other end has room for it, so a slow reader slows the generator down.
"""

from __future__ import annotations

import typing
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import msgspec
from twisted.internet.defer import CancelledError, Deferred

from protoframe.core.conversation import Conversation
from protoframe.core.events import CreditReceived
from protoframe.core.frames import COUNT, HEADER, ITEM_OVERHEAD
from protoframe.core.messages import BACKLOG
from protoframe.errors import Error, LocalProtocolError, MessageTooLarge

__all__ = ["Outlet", "Outlets", "travelling"]

E = TypeVar("E", bound=Error)

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

#: What precedes the items in msgpack: array 32, and how many there are.
_ARRAY = b"\xdd\0\0\0\0"


def travelling(error: E) -> E:
    """Marks an error as the framework's own words: where it ends a call, it reaches the caller as it is."""
    error.__dict__["_travels"] = True
    return error


#: In place of streams that wait for their turn, while none has: a deque takes 760 bytes.
_NONE_READY: deque[Outlet] = typing.cast("deque[Outlet]", ())


class Outlets:
    """The streams that one end of a conversation sends.

    :param conversation: where the items go.
    :param clock: gives the time.
    :param wake: called when there is something to send, or to go on with, that nothing else led to.
    :ivar ready: those that wait for their turn.
    :ivar is_paused: whether what carries the conversation has enough to send.
    """

    __slots__ = ("_without_credit", "clock", "conversation", "is_paused", "ready", "wake")

    def __init__(self, conversation: Conversation, clock: Callable[[], float], wake: Callable[[], None]) -> None:
        self.conversation = conversation
        self.clock = clock
        self.wake = wake
        self.ready = _NONE_READY
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
            if self.ready is _NONE_READY:
                self.ready = deque()
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
        clock = self._outlets.clock
        encode = _encode_json if self._json else _encode_msgpack
        await self._has_room()
        until = clock() + _SLICE
        async for item in iterator:
            # Another one each time that it was sent as it was.
            buffer = self._buffer
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
                await self._set_apart(before)
            elif size + ITEM_OVERHEAD * count >= self._room or (
                (not count & _LOOK or count < _FIRST) and clock() >= until
            ):
                pass
            else:
                continue
            self.flush()
            await self._has_room()
            until = clock() + _SLICE

    async def _set_apart(self, before: int) -> None:
        """Leaves an item, the last in the buffer, that goes alone, alone in it: those before it are sent."""
        buffer = self._buffer
        start = before + (1 if self._json and self._count > 1 else 0)
        size = len(buffer) - start
        if size > self._max_size:
            del buffer[before:]
            self._count -= 1
            raise travelling(MessageTooLarge(f"an item is {size} bytes, and {self._max_size} are allowed"))
        if self._count == 1:
            return
        item = buffer[start:]
        del buffer[before:]
        self._count -= 1
        while self._count:
            # Where others have used the room meanwhile, it has to be waited for first.
            self.flush()
            await self._has_room()
        self._buffer += item
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
        octets: bytes | bytearray
        if len(buffer) > self._most:
            # A large item: it is sent from where it was encoded.
            octets, self._buffer = buffer, bytearray(self._head)
        else:
            octets = bytes(buffer)
            del buffer[len(self._head) :]
        self._count = 0
        outlets.conversation.send_items(self.call_id, count, octets)
        outlets.wake()

    def abandon(self) -> None:
        """Nothing more is sent: nobody wants it, or the call has its outcome."""
        self._is_over = True
        self._count = self._room = 0
        self._outlets.forget(self)
