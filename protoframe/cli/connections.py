"""Several connections to one server, over which calls are spread, and which are opened again when they are lost.

Knows how one call is made, and how often a server may be asked to take a connection.  Not why calls are made, nor when.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, gatherResults

from protoframe import timeout
from protoframe._clock import call_later, clock_of
from protoframe.cli.options import Settings
from protoframe.cli.running import Target, not_opened, unopened
from protoframe.errors import Error

if TYPE_CHECKING:
    from protoframe import Connecting
    from protoframe.reflection import Reflection

__all__ = ["Connections"]

#: Seconds from an attempt to open a connection to the next.
_BETWEEN = 1.0


class Connections:
    """Connections to one server.

    :param count: how many.
    """

    def __init__(self, reactor: Any, target: Target, settings: Settings, count: int) -> None:
        self._target = target
        self._settings = settings
        self._lanes = [_Lane(reactor, target, settings) for _ in range(count)]
        self._turn = 0

    @property
    def first(self) -> Connecting[Reflection]:
        """One of them, for other calls."""
        return self._lanes[0].connecting

    async def open(self) -> None:
        """Opens all of them.

        :raises Problem: one could not be opened.
        """
        try:
            for lane in self._lanes:
                await lane.open()
        except Error as error:
            raise not_opened(error, self._target, self._settings) from None

    async def close(self) -> None:
        """Ends all of them."""
        await gatherResults([lane.close() for lane in self._lanes], consumeErrors=True)

    def caller(self, name: str, arguments: bytes, *, streams: bool) -> Callable[[], Deferred[Any]]:
        """A function that makes a call, over the next connection that takes one; where none does, when one does again.

        The call fails where no connection could be opened.

        :param streams: whether the answer may be a stream; then the Deferred fires with the number of its items.
        """
        seconds = self._settings.timeout
        lanes = self._lanes

        def call_over(lane: _Lane) -> Deferred[Any]:
            connection = lane.connecting.connection
            if not streams:
                # Its deadline is the default one of the connection.
                return connection.call_json(name, arguments)
            with timeout(seconds):
                return Deferred.fromCoroutine(_count(connection.stream_json(name, arguments)))

        def call() -> Deferred[Any]:
            turn = self._turn
            for _ in lanes:
                turn = (turn + 1) % len(lanes)
                lane = lanes[turn]
                if lane.is_up:
                    self._turn = turn
                    return call_over(lane)
                lane.reopen()
            self._turn = turn
            return lanes[turn].waited_for().addCallback(lambda _: call_over(lanes[turn]))

        return call


async def _count(stream: Any) -> int:
    count = 0
    async for _ in stream:
        count += 1
    return count


class _Lane:
    """One connection, and after it the next."""

    def __init__(self, reactor: Any, target: Target, settings: Settings) -> None:
        self._reactor = reactor
        self._clock = clock_of(reactor)
        self._target = target
        self._settings = settings
        self._waiting: list[Deferred[None]] = []
        self._is_opening = False
        self._is_closed = False
        self._tried = 0.0
        self.connecting = unopened(reactor, target, settings)
        self._is_open = False

    @property
    def is_up(self) -> bool:
        """Whether it takes calls."""
        return self._is_open and self.connecting.connection.takes_calls

    async def open(self) -> None:
        """
        :raises Error: the connection could not be opened.
        """
        self._tried = self._clock()
        await self.connecting
        self._is_open = True

    def reopen(self) -> None:
        """Opens it again, not at once where that was tried a moment ago."""
        if not self._is_opening and not self._is_closed:
            self._is_opening = True
            call_later(self._reactor, self._tried + _BETWEEN - self._clock(), self._open_again)

    def waited_for(self) -> Deferred[None]:
        """Fires when it is open again, or fails when it could not be opened."""
        waiting: Deferred[None] = Deferred()
        self._waiting.append(waiting)
        return waiting

    def close(self) -> Deferred[None]:
        """Ends it for good."""
        self._is_closed = True
        return self.connecting.close()

    def _open_again(self) -> None:
        if self._is_closed:
            return
        self._is_open = False
        self.connecting = unopened(self._reactor, self._target, self._settings)
        opening: Deferred[None] = Deferred.fromCoroutine(self.open())
        opening.addCallbacks(lambda _: self._tell(None), lambda failure: self._tell(failure.value))

    def _tell(self, error: BaseException | None) -> None:
        self._is_opening = False
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if error is None:
                one.callback(None)
            else:
                one.errback(error)
