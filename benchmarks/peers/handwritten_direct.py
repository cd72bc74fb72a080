"""The hand-written loop, with what is unsent given to the socket at once: after every 16 frames, and at the end.

`handwritten` writes once a turn, through the transport.  The loops over frames are repeated here, since a way to hook
into them would make that one slower.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory

from benchmarks.loads import Task, serve_until_ended
from benchmarks.peers import handwritten
from benchmarks.peers.direct import give
from benchmarks.peers.handwritten import METHODS, REQUEST, RESPONSE, encode, rest_of

__all__ = ["serve", "take"]

#: Frames after which what is unsent goes out, as many as in protoframe.
EVERY = 16


class Direct(handwritten.Frames):
    def give(self) -> None:
        """Sends what is unsent."""
        if self.unsent:
            give(self.transport, b"".join(self.unsent))
            self.unsent.clear()

    def flush(self) -> None:
        self._is_scheduled = False
        self.give()


class Server(Direct, handwritten.Server):
    def framesReceived(self, data: bytes) -> int:
        view = memoryview(data)
        unsent = self.unsent
        offset, size, left = 0, len(data), EVERY
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
            left -= 1
            if not left:
                left = EVERY
                self.give()
        return offset


class Client(Direct, handwritten.Client):
    def framesReceived(self, data: bytes) -> int:
        view = memoryview(data)
        calls = self._calls
        offset, size, left = 0, len(data), EVERY
        while size - offset >= RESPONSE.size:
            length, number = RESPONSE.unpack_from(data, offset)
            end = offset + 4 + length
            if end > size:
                break
            done, decode, _ = calls.pop(number)
            done.callback(decode(view[offset + RESPONSE.size : end]))
            offset = end
            left -= 1
            if not left:
                left = EVERY
                self.give()
        return offset


def make_server() -> Any:
    from twisted.internet import reactor

    return Server(reactor)


def serve() -> None:
    serve_until_ended(Factory.forProtocol(make_server))


def take(task: Task, port: int) -> float:
    return handwritten.take_with(Client, task, port)
