"""One server of a `Client`: its connection, or the next one, and the calls that outlive either.

Knows one place, how to connect to it again and again, and which calls have no outcome yet; not which calls are made
there, nor whether they are made again elsewhere: that is `protoframe._attempts`'s.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from twisted.application.internet import ClientService
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.protocol import Factory as TwistedFactory
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from protoframe._calling import CallCancelled, Callee, PendingCall
from protoframe._clock import Timer, call_later, clock_of
from protoframe._connection import Connection
from protoframe._context import ask_for, run_nowhere
from protoframe._endpoints import Connecting, Opening
from protoframe._protocol import Protocol
from protoframe._srv import Place
from protoframe.core.frames import SESSION_LENGTH, Key
from protoframe.core.retry import Backoff
from protoframe.errors import ConnectionLost, DeadlineExceeded, Error, GoingAway
from protoframe.health import Health

__all__ = ["KeptCall", "Link"]

_log = Logger(namespace="protoframe.client")

P = TypeVar("P", bound=Protocol[Any])

#: Seconds that a server is left alone at the most while somebody waits for it.
_HURRY = 2.0
#: Seconds that a server has to say how it is.
_HEALTH_TIMEOUT = 5.0


class KeptCall(PendingCall):
    """A call that outlives its connection.

    :ivar link: where it is made.
    :ivar key: what it is known by in the session.
    :ivar arguments: encoded.
    :ivar metadata: what goes with it.
    :ivar deadline: when it fails if it has no answer by then.
    :ivar timer: watches that while there is no connection.
    :ivar times: how often it was sent.
    :ivar may_move: whether it is rather made elsewhere than here again, after an error.
    """

    link: Any = None
    key: int = 0
    arguments: bytes = b""
    metadata: bytes = b""
    deadline: float = math.inf
    timer: Timer | None = None
    times: int = 0
    may_move: Callable[[Any], bool] | None = None

    def succeed(self, result: Any) -> None:
        """The call has its result."""
        self.link.settled(self)
        PendingCall.succeed(self, result)

    def fail(self, error: BaseException) -> None:
        """The call has none."""
        if self.times > 1 and isinstance(error, Error) and not error.may_have_run:
            # That is said of the last time that it was sent; of those before it is not known.
            if isinstance(error, GoingAway) and self.link.keeps(self):
                return
            error.may_have_run = True
        self.link.settled(self)
        PendingCall.fail(self, error)

    def lost(self, error: BaseException) -> None:
        """The connection is lost; the call goes on, here or elsewhere."""
        if (self.may_move is not None and self.may_move(error)) or not self.link.keeps(self):
            self.fail(error)


@implementer(IStreamClientEndpoint)
class Link(Generic[P]):
    """One server.

    :param reactor: for the time.
    :param opening: what is asked of its conversations.
    :param place: which server it is.
    :param random: gives random octets.
    :param chance: a number from 0 to 1, for the backoff.
    :param backoff: how long to wait before the next attempt.
    :param is_wanted: whether somebody waits for it; then it is not left alone for long.
    :param changed: called when it is connected, or not any more, or an attempt has failed.
    :ivar where: the server.
    :ivar place: the same, and how it stands to the others.
    :ivar connection: the open one; ``None`` while there is none.
    :ivar calls: those that have no outcome yet, by their keys.
    :ivar is_ready: whether the server has not said that it takes no calls.
    :ivar was_up: whether it was connected once.
    :ivar error: why the last attempt to connect has failed; ``None`` where it has not.
    """

    def __init__(
        self,
        reactor: Any,
        opening: Opening[P],
        place: Place,
        random: Callable[[int], bytes],
        chance: Callable[[], float],
        backoff: Backoff,
        is_wanted: Callable[[], bool],
        changed: Callable[[Link[P]], None],
    ) -> None:
        self.where = opening.where
        self.place = place
        self.connection: Connection | None = None
        self.calls: dict[int, KeptCall] = {}
        self.error: Error | None = None
        self.was_up = False
        self.is_ready = True
        self._reactor = reactor
        self._clock = clock_of(reactor)
        self._opening = opening
        self._session = random(SESSION_LENGTH)
        self._next_key = 0
        self._chance = chance
        self._backoff = backoff
        self._is_wanted = is_wanted
        self._changed = changed
        self._failures = 0
        self._is_running = False
        self._is_retired = False
        # When the last attempt began, and when the next one will; infinity while there is one, or a connection.
        self._attempted = -math.inf
        self._due = math.inf
        self._hurrying: Timer | None = None
        self._service = ClientService(self, _ShellFactory(), retryPolicy=self._wait, clock=reactor)

    def __repr__(self) -> str:
        return f"<Link to {self.where}>"

    @property
    def is_up(self) -> bool:
        """Whether calls can go at once, and the server has not said that it wants none."""
        return self.is_ready and self.connection is not None and self.connection.takes_calls

    def check_health(self, protocol: str) -> None:
        """Asks the server whether it takes calls of a Protocol."""
        connection = self.connection
        if connection is None or not connection.takes_calls:
            return
        with ask_for(_HEALTH_TIMEOUT, self._clock):
            answer = connection.proxy(Health).check(protocol)
        typing.cast("Deferred[bool]", answer).addCallbacks(self._is_healthy, self._unhealthy)

    def _is_healthy(self, is_ready: bool) -> None:
        if is_ready is not self.is_ready:
            self.is_ready = is_ready
            self._changed(self)

    def _unhealthy(self, failure: Failure) -> None:
        # One that has no such Protocol, or does not let this client ask, may be called all the same.
        if failure.check(DeadlineExceeded):
            self._is_healthy(False)

    def start(self) -> None:
        """Connects, and whenever the connection is lost, again."""
        self._is_running = True
        self._failures = 0
        self.error = None
        self.was_up = False
        self._service.startService()

    def stop(self) -> Deferred[None]:
        """Closes in order; fires when the connection is gone.  Calls that have no outcome fail."""
        self._is_running = False
        if self._hurrying is not None:
            self._hurrying.cancel()
            self._hurrying = None
        for call in list(self.calls.values()):
            if call.timer is not None or self.connection is None:
                call.fail(ConnectionLost("the client was stopped"))
        stopped: Deferred[None] = self._service.stopService()
        return stopped

    def retire(self) -> None:
        """No more calls will come: ends when those that there are have their outcome."""
        self._is_retired = True
        if self.connection is not None:
            self.connection.drain()
        elif not self.calls:
            self.stop()

    @property
    def is_running(self) -> bool:
        """Whether it is connected, or will be."""
        return self._is_running

    def hurry(self) -> None:
        """Somebody waits: a long wait for the next attempt is cut short."""
        soon = max(self._clock(), self._attempted + _HURRY)
        if self._is_running and self._hurrying is None and soon < self._due < math.inf:
            self._hurrying = call_later(self._reactor, soon - self._clock(), self._try_now)

    def _try_now(self) -> None:
        self._hurrying = None
        if self._is_running and self._due != math.inf:
            # The service has no other way to be woken.
            self._service.stopService()
            self._service.startService()

    def _wait(self, _: int) -> float:
        seconds = self._backoff.seconds(max(1, self._failures), self._chance())
        if self.calls or self._is_wanted():
            seconds = min(seconds, _HURRY)
        self._due = self._clock() + seconds
        return seconds

    # IStreamClientEndpoint, for the ClientService.

    def connect(self, factory: Any) -> Deferred[Any]:
        """Opens a conversation, and gives the service something that stands for it."""
        opening: list[Deferred[Any]] = []
        # A reactor that keeps contexts, as asyncio's does, has that of whoever came by here first.
        run_nowhere(lambda: opening.append(Deferred.fromCoroutine(self._connect(factory))))
        return opening[0]

    async def _connect(self, factory: Any) -> Any:
        self._attempted = self._clock()
        self._due = math.inf
        connecting: Connecting[P] = self._opening.begin(self._session, self._next_key)
        try:
            await connecting
        except Error as error:
            self._failures += 1
            self.error = error
            if self._failures & (self._failures - 1) == 0:
                _log.info("{where}: {error}", where=self.where, error=error)
            # When the service knows, too.
            self._reactor.callLater(0, self._failed, error)
            raise
        connection = connecting.connection
        shell = factory.buildProtocol(connection.address)
        shell.makeConnection(_Transport(connection))
        self._up(connection)
        connection.closed.addCallback(lambda _: self._down(connection, shell))
        return shell

    def _failed(self, error: Error) -> None:
        """It could not be reached: calls that may be made elsewhere are."""
        for call in list(self.calls.values()):
            if call.may_move is not None and call.may_move(error):
                lost = ConnectionLost(f"the connection was lost, and {error.message}")
                call.fail(lost)
        self._changed(self)

    def _up(self, connection: Connection) -> None:
        self.connection = connection
        self.was_up = True
        self.is_ready = True
        self._failures = 0
        self.error = None
        # What has no outcome yet may have come, or not: the server knows.
        for call in list(self.calls.values()):
            if call.key not in self.calls:
                # Given up by whoever was told of another.
                continue
            if call.timer is not None:
                call.timer.cancel()
                call.timer = None
            self._send(call)
        self._reactor.callLater(0, self._changed, self)

    def _down(self, connection: Connection, shell: Any) -> None:
        if self.connection is connection:
            self.connection = None
        # An address that lets in and hangs up at once is not tried in a tight loop.
        self._failures += 1
        shell.connectionLost(Failure(ConnectionDone()))
        if self._is_retired and not self.calls:
            self.stop()
        self._changed(self)

    # Calls.

    def call(
        self,
        method: Callee,
        arguments: bytes,
        metadata: bytes,
        deadline: float,
        may_move: Callable[[Error], bool] | None = None,
    ) -> Deferred[Any]:
        """Makes a call, over the connection that there must be."""
        deferred: Deferred[Any] = Deferred(lambda _: self._cancel(call))
        call = KeptCall(
            deferred, method, link=self, key=self._next_key, arguments=arguments, metadata=metadata, deadline=deadline
        )
        call.may_move = may_move
        self._next_key += 1
        self.calls[call.key] = call
        self._send(call)
        return deferred

    def _send(self, call: KeptCall) -> None:
        if call.deadline <= self._clock():
            call.fail(DeadlineExceeded("the deadline passed before the answer came"))
        elif self.connection is not None:
            call.times += 1
            key = Key(call.key, next(iter(self.calls)))
            try:
                self.connection.calls.make_kept(call, call.arguments, call.metadata, call.deadline, key)
            except ConnectionLost as error:
                call.lost(error)
            except Error as error:
                call.fail(error)

    def keeps(self, call: KeptCall) -> bool:
        """Whether a call waits for the next connection, now that it has lost its own."""
        if not self._is_running or call.deferred.called:
            return False
        seconds = call.deadline - self._clock()
        if seconds <= 0:
            return False
        if call.timer is None and seconds != math.inf:
            call.timer = call_later(self._reactor, seconds, lambda: self._expired(call))
        return True

    def _expired(self, call: KeptCall) -> None:
        call.timer = None
        call.fail(DeadlineExceeded(f"the deadline passed while {self.where} could not be reached"))

    def _cancel(self, call: KeptCall) -> None:
        error = CallCancelled("cancelled by the caller")
        if self.connection is not None and call.timer is None:
            self.connection.calls.give_up(call, error)
        if not call.deferred.called:
            call.fail(error)

    def settled(self, call: KeptCall) -> None:
        """A call has its outcome, or nobody cares for it."""
        self.calls.pop(call.key, None)
        if call.timer is not None:
            call.timer.cancel()
            call.timer = None
        if self._is_retired and self.connection is None and not self.calls and self._is_running:
            self.stop()


class _ShellFactory(TwistedFactory):
    """Makes what the ClientService takes for a connection."""

    noisy = False
    protocol = TwistedProtocol


class _Transport:
    """What the ClientService takes for a transport: it closes in order."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def loseConnection(self) -> None:
        """Closes."""
        self._connection.close()

    abortConnection = loseConnection
