"""Calls by hand on Twisted and msgspec: what one writes for two methods, without what makes a framework.

Frames have a length, an id, the seconds that are left and a method's name, and msgpack in them; what a turn of the
reactor has for a connection is written at once.  There are no limits, errors, cancellation, streams or handshake.
"""

from __future__ import annotations

import struct
import time
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any

import msgspec
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import clientFromString, connectProtocol
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure

from benchmarks.connections import place
from benchmarks.loads import TEXT, Task, check, in_reactor, serve_until_ended, twisted_calls
from benchmarks.workloads import Kind

__all__ = ["Client", "Frames", "Server", "serve", "take", "take_with"]

LENGTH = struct.Struct(">I")
#: The length of what follows, the id, the seconds that are left, and the length of the method's name.
REQUEST = struct.Struct(">IIfB")
#: The length of what follows, and the id.
RESPONSE = struct.Struct(">II")
#: Seconds that a call has, and how often those that are on the way are looked at.
DEADLINE = 10.0
LOOK = 1.0


class Upper(msgspec.Struct):
    text: str


class Put(msgspec.Struct):
    data: bytes


encode = msgspec.msgpack.Encoder().encode


async def upper(arguments: Upper) -> str:
    return arguments.text.upper()


async def put(arguments: Put) -> int:
    return len(arguments.data)


Handler = Callable[[Any], Coroutine[Any, Any, Any]]

#: How each method's arguments are decoded, and what answers it.
METHODS: dict[bytes, tuple[Callable[[Any], Any], Handler]] = {
    b"Speech.upper": (msgspec.msgpack.Decoder(Upper).decode, upper),
    b"Speech.put": (msgspec.msgpack.Decoder(Put).decode, put),
}


class Frames(Protocol):
    """Cuts the stream into frames, and writes once a turn."""

    def __init__(self, reactor: Any) -> None:
        self.reactor = reactor
        self.unsent: list[bytes] = []
        self._rest = bytearray()
        self._is_scheduled = False

    def connectionMade(self) -> None:
        self.transport.setTcpNoDelay(True)

    def dataReceived(self, data: bytes) -> None:
        if self._rest:
            self._rest += data
            if len(self._rest) < 4 or len(self._rest) < 4 + LENGTH.unpack_from(self._rest)[0]:
                return
            data = bytes(self._rest)
            self._rest.clear()
        # What is sent while this turn lasts goes out at its end.
        self._is_scheduled = True
        end = self.framesReceived(data)
        if end < len(data):
            self._rest += memoryview(data)[end:]
        self.flush()

    def framesReceived(self, data: bytes) -> int:
        """Takes the whole frames that there are; where they end."""
        raise NotImplementedError

    def schedule(self) -> None:
        """Has what is unsent written at the end of this turn."""
        if not self._is_scheduled:
            self._is_scheduled = True
            self.reactor.callLater(0, self.flush)

    def flush(self) -> None:
        self._is_scheduled = False
        if self.unsent:
            self.transport.write(b"".join(self.unsent))
            self.unsent.clear()


@types.coroutine
def rest_of(coroutine: Coroutine[Any, Any, Any], awaited: Any) -> Generator[Any, Any, Any]:
    """What is left of a coroutine that waits for something."""
    while True:
        value = yield awaited
        try:
            awaited = coroutine.send(value)
        except StopIteration as done:
            return done.value


class Server(Frames):
    def framesReceived(self, data: bytes) -> int:
        view = memoryview(data)
        unsent = self.unsent
        offset, size = 0, len(data)
        while size - offset >= REQUEST.size:
            length, number, seconds, name_length = REQUEST.unpack_from(data, offset)
            end = offset + 4 + length
            if end > size:
                break
            arguments = offset + REQUEST.size + name_length
            decode, handler = METHODS[data[offset + REQUEST.size : arguments]]
            if seconds > 0:
                coroutine = handler(decode(view[arguments:end]))
                try:
                    awaited = coroutine.send(None)
                except StopIteration as done:
                    body = encode(done.value)
                    unsent += (RESPONSE.pack(4 + len(body), number), body)
                else:
                    Deferred.fromCoroutine(rest_of(coroutine, awaited)).addCallback(self.respond, number)
            offset = end
        return offset

    def respond(self, result: Any, number: int) -> None:
        """Sends what a handler that has waited gives."""
        body = encode(result)
        self.unsent += (RESPONSE.pack(4 + len(body), number), body)
        self.schedule()


class Client(Frames):
    def __init__(self, reactor: Any) -> None:
        super().__init__(reactor)
        self._last = 0
        #: In order of their deadlines, which are all as far off.
        self._calls: dict[int, tuple[Deferred[Any], Callable[[Any], Any], float]] = {}

    def connectionMade(self) -> None:
        super().connectionMade()
        self._looking = self.reactor.callLater(LOOK, self._look)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._looking.cancel()

    def call(self, name: bytes, arguments: Any, decode: Callable[[Any], Any]) -> Deferred[Any]:
        """Fires with the result."""
        self._last = number = self._last + 1
        body = encode(arguments)
        head = REQUEST.pack(REQUEST.size - 4 + len(name) + len(body), number, DEADLINE, len(name))
        self.unsent += (head, name, body)
        if not self._is_scheduled:
            self.schedule()
        done: Deferred[Any] = Deferred()
        self._calls[number] = (done, decode, time.monotonic() + DEADLINE)
        return done

    def framesReceived(self, data: bytes) -> int:
        view = memoryview(data)
        calls = self._calls
        offset, size = 0, len(data)
        while size - offset >= RESPONSE.size:
            length, number = RESPONSE.unpack_from(data, offset)
            end = offset + 4 + length
            if end > size:
                break
            done, decode, _ = calls.pop(number)
            done.callback(decode(view[offset + RESPONSE.size : end]))
            offset = end
        return offset

    def _look(self) -> None:
        """Fails the calls whose time is over."""
        now = time.monotonic()
        while self._calls:
            number, (done, _, deadline) = next(iter(self._calls.items()))
            if deadline > now:
                break
            del self._calls[number]
            done.errback(TimeoutError())
        self._looking = self.reactor.callLater(LOOK, self._look)


decode_text = msgspec.msgpack.Decoder(str).decode
decode_number = msgspec.msgpack.Decoder(int).decode


def serve() -> None:
    from twisted.internet import reactor

    serve_until_ended(Factory.forProtocol(lambda: Server(reactor)))


def take(task: Task, port: int) -> float:
    return take_with(Client, task, port)


def take_with(make: Callable[[Any], Client], task: Task, port: int) -> float:
    """What a client finds whose connection is made by this."""

    async def main(reactor: Any) -> float:
        client = await connectProtocol(clientFromString(reactor, place(port)), make(reactor))
        data = bytes(task.workload.size)

        def call() -> Awaitable[Any]:
            return client.call(b"Speech.upper", Upper(TEXT), decode_text)

        def send() -> Awaitable[Any]:
            return client.call(b"Speech.put", Put(data), decode_number)

        if task.kind is Kind.PAYLOADS:
            check(await send(), len(data))
            return await twisted_calls([send], task)
        check(await call(), TEXT.upper())
        return await twisted_calls([call], task)

    return in_reactor(main)
