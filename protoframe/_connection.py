"""One end of a conversation, bound to Twisted: calls become Deferreds, requests are served, one timer is kept.

Knows the request layer and when to send what; not how a request is served (`protoframe._serving`), nor what carries the
frames: that is a `Carrier`, such as `protoframe._stream.StreamCarrier`.
"""

from __future__ import annotations

import math
import secrets
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from protoframe._calling import CallCancelled, Callee, JSONMethod, PendingCall, read_error
from protoframe._clock import clock_of
from protoframe._context import NOWHERE, run_nowhere, scope
from protoframe._protocol import Protocol
from protoframe._proxy import proxy_class
from protoframe._serving import BACKLOG, MethodTable, Server
from protoframe.core.conversation import Conversation
from protoframe.core.events import (
    CallFailed,
    Drained,
    Ended,
    ErrorReceived,
    Opened,
    PongReceived,
    RequestCancelled,
    RequestReceived,
    ResponseReceived,
)
from protoframe.core.frames import Frame
from protoframe.core.limits import Limits
from protoframe.core.state import Role, State
from protoframe.errors import (
    ConnectionLost,
    DeadlineExceeded,
    Error,
    InvalidResponse,
    LocalProtocolError,
    MessageTooLarge,
    ProtocolError,
)

__all__ = ["Carrier", "Connection"]

P = typing.TypeVar("P", bound=Protocol[Any])

_CLOSED = State.CLOSED

#: Events after which what is ready is sent, so that the peer works on it while this end works on the rest.
_TURN = 16

#: Octets of large messages that are handed to the carrier at a time.
_ALLOWANCE = 128 * 1024


class Carrier(typing.Protocol):
    """What brings frames to the peer."""

    def send(self, frames: list[bytes]) -> None:
        """Sends frames, in order."""

    def close(self) -> None:
        """Closes once everything is sent; `Connection.lost` follows."""

    def abort(self) -> None:
        """Closes at once; `Connection.lost` follows."""

    def next_timer(self) -> float:
        """When the carrier wants `handle_timer`; infinity for never.

        Where that moves, it calls `Connection.wake_at`.
        """

    def handle_timer(self, now: float) -> None:
        """
        :raises ProtocolError: the peer was too slow.
        """


class _Ping(msgspec.Struct):
    """A PING whose PONG is awaited."""

    deferred: Deferred[float]
    sent: float
    timer: IDelayedCall


class Connection:
    """One end of a conversation.

    :param role: which end.
    :param reactor: for its timers.
    :param limits: what this end takes.
    :param table: the methods that this end serves.
    :param protocols: the instances that serve them.
    :param address: the peer's.
    :param agent: what this end is called in HELLO.
    :ivar opened: fires when the conversation is open, or fails with why it will not be.
    :ivar closed: fires with ``None`` when the connection is gone.
    """

    log = Logger(namespace="protoframe.connection")

    def __init__(
        self,
        role: Role,
        reactor: IReactorTime,
        limits: Limits,
        table: MethodTable,
        protocols: Sequence[Protocol[Any]],
        carrier: Carrier,
        address: Any,
        agent: str,
    ) -> None:
        self.address = address
        self.where = _where(address)
        self.protocols = protocols
        self.opened: Deferred[None] = Deferred(self._give_up_opening)
        self.closed: Deferred[None] = Deferred()
        self._reactor = reactor
        self._clock = clock_of(reactor)
        self._limits = limits
        self._carrier = carrier
        self._conversation = Conversation(role, limits, self._clock(), agent)
        self._server = Server(
            self._conversation,
            table,
            protocols,
            limits.max_nesting,
            self._clock,
            address,
            self._schedule,
        )
        self._pings: dict[bytes, _Ping] = {}
        self._paused = False
        self._busy = False
        self._closing = False
        self._over = False
        self._made = False
        self._end_error: Error | None = None
        self._wake: IDelayedCall | None = None
        self._timer: IDelayedCall | None = None
        self._timer_due = math.inf
        self._close_timer: IDelayedCall | None = None
        for protocol in protocols:
            # One that has served a conversation before had another peer then.
            protocol.__dict__.pop("_protoframe_peer", None)
            protocol.__dict__["_protoframe_make_peer"] = self.proxy

    @property
    def is_open(self) -> bool:
        """Whether the peer has greeted, and the conversation is not over."""
        return self._made and self._conversation.state is not _CLOSED

    # For whoever calls.

    def proxy(self, protocol: type[P]) -> P:
        """A proxy of the other end, typed as the Protocol that it answers."""
        return typing.cast("P", proxy_class(protocol)(self))

    def call(self, method: Callee, arguments: bytes) -> Deferred[Any]:
        """Calls a method of the other end, with its encoded arguments."""
        options = method.options
        if options.max_size is not None and len(arguments) > options.max_size:
            return _failed(
                _not_run(
                    MessageTooLarge(f"the arguments are {len(arguments)} bytes, and max_size is {options.max_size}")
                ),
            )
        now = self._clock()
        around = scope.get()
        if around.deadline is None:
            seconds = options.timeout or self._limits.default_timeout
        else:
            seconds = around.deadline - around.clock()
            if seconds <= 0:
                return _failed(_not_run(DeadlineExceeded("the deadline had passed before the call was made")))
        deferred: Deferred[Any] = Deferred(self._cancel)
        try:
            deferred.call_id = self._conversation.request(  # type: ignore[attr-defined]
                method.wire_name,
                arguments,
                PendingCall(deferred, method),
                now + seconds,
                now,
                around.metadata,
                method.json,
            )
        except Error as error:
            return _failed(error)
        if not self._busy:
            self._schedule()
        return deferred

    def call_json(self, name: str, arguments: bytes) -> Deferred[bytes]:
        """Calls ``Protocol.method``, whose declaration is not at hand, with a JSON object; the answer is JSON too."""
        return self.call(JSONMethod(name), arguments)

    def ping(self) -> Deferred[float]:
        """Asks the other end for a sign of life; fires with the seconds that it took.

        Fails with `DeadlineExceeded` after what is left of `timeout`, or else `Limits.default_timeout`.
        """
        if not self.is_open:
            return _failed(_not_run(ConnectionLost("the connection is closed")))
        remaining = scope.get().remaining()
        payload = secrets.token_bytes(8)

        def forget(_: Any) -> None:
            if self._pings.pop(payload, None) is not None:
                timer.cancel()

        def expire() -> None:
            del self._pings[payload]
            deferred.errback(DeadlineExceeded("the other end gave no sign of life in time"))

        deferred: Deferred[float] = Deferred(forget)
        seconds = self._limits.default_timeout if remaining is None else max(0.0, remaining)
        timer = self._reactor.callLater(seconds, expire)
        self._pings[payload] = _Ping(deferred, self._clock(), timer)
        self._conversation.ping(payload)
        self._schedule()
        return deferred

    def close(self) -> Deferred[None]:
        """Ends the conversation in order: calls of this end that have no answer yet fail, what is sent arrives.

        The Deferred fires when the connection is gone; where the peer does not close its end in time
        (`Limits.close_timeout`), it is cut off.
        """
        done: Deferred[None] = Deferred()
        self.closed.addBoth(_also(done))
        if not self._over and not self._closing:
            self._conversation.go_away()
            self._conversation.end(None)
            self._schedule()
        return done

    # For the carrier.

    def start(self) -> None:
        """The carrier is connected: greets the peer."""
        self._transmit()

    def frames_received(self, frames: list[Frame], now: float) -> None:
        """Takes frames from the carrier, that came at a time of `clock_of` its reactor."""
        self._conversation.handle_frames(frames, now)
        self._transmit()

    def violated(self, error: Error) -> None:
        """The carrier cannot read what the peer sends: the conversation is over."""
        self._conversation.end(error)
        self._transmit()

    def pause(self) -> None:
        """The carrier has enough to send."""
        self._paused = True

    def resume(self) -> None:
        """The carrier can send more."""
        self._paused = False
        self._transmit()

    def lost(self, reason: Failure) -> None:
        """The carrier is gone."""
        if self._over:
            return
        self._conversation.end(ConnectionLost(_reason(reason)))
        self._over = True
        self._transmit()
        for delayed in (self._wake, self._timer, self._close_timer):
            if delayed is not None and delayed.active():
                delayed.cancel()
        while self._pings:
            _, ping = self._pings.popitem()
            ping.timer.cancel()
            ping.deferred.errback(ConnectionLost("the connection was lost"))
        if not self.opened.called:
            self.opened.errback(self._end_error or ConnectionLost(_reason(reason)))
        if self._made:
            for protocol in self.protocols:
                try:
                    protocol.connectionLost(reason)
                except Exception:
                    self.log.failure("connectionLost of {protocol} failed", protocol=protocol)
        self.closed.callback(None)

    # The heart.

    def _schedule(self) -> None:
        """Has `_transmit` called once in this turn of the reactor, after what else is called in it."""
        if self._wake is None and not self._busy and not self._over:
            self._wake = self._reactor.callLater(0, self._woken)

    def _woken(self) -> None:
        self._wake = None
        self._transmit()

    def _transmit(self) -> None:
        """Acts on what happened, sends what there is to send, and sets the timer."""
        if self._busy:
            return
        if scope.get() is not NOWHERE:
            # Somebody's deadline surrounds this: that of who made the call, or, where the reactor keeps contexts as
            # asyncio's does, of who was there when a timer was set.  It is not that of the callbacks that run here.
            run_nowhere(self._transmit)
            return
        self._busy = True
        try:
            conversation = self._conversation
            outbox = conversation.outbox
            server = self._server
            serve = server.serve
            while True:
                while conversation.events:
                    for number, event in enumerate(conversation.poll_events(), 1):
                        try:
                            if type(event) is not RequestReceived:
                                _REACTIONS[type(event)](self, event)
                            elif conversation.state is _CLOSED:
                                # What came after it ended the conversation.
                                pass
                            elif server.held or outbox.octets > BACKLOG:
                                server.hold(event)
                            else:
                                serve(event)
                        except Exception:
                            self._failed_to_react(event)
                        if not number % _TURN and not self._paused:
                            self._send(0)
                if self._over:
                    return
                if not self._paused:
                    frames = outbox.poll(_ALLOWANCE)
                    if frames:
                        self._carrier.send(frames)
                    while outbox.large and not self._paused:
                        self._send(_ALLOWANCE)
                if self._over:
                    # The carrier was lost while it sent: what that means is among the events now.
                    continue
                if self._paused or not server.held or not server.go_on():
                    break
            if conversation.state is _CLOSED:
                self._close()
            else:
                due = conversation.next_timer()
                if due < self._timer_due:
                    self.wake_at(due)
        finally:
            self._busy = False

    def _failed_to_react(self, event: Any) -> None:
        """An event met a fault of this package: nobody is left waiting for what it would have brought."""
        self.log.failure(
            "{where}: a fault of protoframe itself, at {event}", where=self.where, event=type(event).__name__
        )
        token: PendingCall | None = getattr(event, "token", None)
        if token is not None and not token.deferred.called:
            token.deferred.errback(InvalidResponse("the answer could not be read; the log has the details"))
        self._conversation.end(LocalProtocolError("this end met a fault of its own"))

    def _send(self, allowance: int) -> None:
        """Sends what is ready, and of large messages about so many octets."""
        frames = self._conversation.outbox.poll(allowance)
        if frames and not self._over:
            self._carrier.send(frames)

    def wake_at(self, due: float) -> None:
        """Has the timer go off by then, for the conversation or for the carrier.

        A timer that goes off early finds nothing due and is set anew: cheaper than to move it at each call.
        """
        if due < self._timer_due:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_due = due
            self._timer = self._reactor.callLater(max(0.0, due - self._clock()), self._timer_fired)

    def _timer_fired(self) -> None:
        self._timer = None
        self._timer_due = math.inf
        now = self._clock()
        try:
            self._carrier.handle_timer(now)
        except ProtocolError as error:
            self._conversation.end(error)
        self._conversation.handle_timer(now)
        self._transmit()
        if self._conversation.state is not _CLOSED:
            self.wake_at(self._carrier.next_timer())

    def _close(self) -> None:
        if not self._closing:
            self._closing = True
            self._close_timer = self._reactor.callLater(self._limits.close_timeout, self._carrier.abort)
            self._carrier.close()

    def _give_up_opening(self, _: Deferred[None]) -> None:
        self._carrier.abort()

    # Events of the conversation.

    def _open(self, _: Opened) -> None:
        self._made = True
        for protocol in self.protocols:
            try:
                protocol.connectionMade()
            except Exception:
                self.log.failure("connectionMade of {protocol} failed", protocol=protocol)
        self.opened.callback(None)

    def _drained(self, _: Drained) -> None:
        self._conversation.end(None)

    def _ended(self, event: Ended) -> None:
        self._end_error = event.error
        if isinstance(event.error, ConnectionLost):
            return
        if event.error is not None:
            self.log.warn("{where}: {error}", where=self.where, error=event.error.message)

    def _ponged(self, event: PongReceived) -> None:
        ping = self._pings.pop(event.payload, None)
        if ping is not None:
            ping.timer.cancel()
            ping.deferred.callback(self._clock() - ping.sent)

    def _cancelled(self, event: RequestCancelled) -> None:
        self._server.cancel(event)

    # Calls of this end.

    def _answered(self, event: ResponseReceived) -> None:
        call: PendingCall = event.token
        try:
            result = call.method.decode_result(event.message, self._limits.max_nesting)
        except Error as error:
            call.deferred.errback(error)
        else:
            call.deferred.callback(result)

    def _refused(self, event: ErrorReceived) -> None:
        call: PendingCall = event.token
        error = read_error(call.method, event.body, self._limits.max_nesting)
        error.may_have_run = event.may_have_run
        call.deferred.errback(error)

    def _failed(self, event: CallFailed) -> None:
        event.token.deferred.errback(event.error)

    def _cancel(self, deferred: Deferred[Any]) -> None:
        # `CallFailed` fires the Deferred: at once, for whoever cancels expects it to have fired.
        cancelled = CallCancelled("cancelled by the caller")
        self._conversation.cancel(deferred.call_id, cancelled)  # type: ignore[attr-defined]
        if self._busy:
            run_nowhere(self._react)
        else:
            self._transmit()

    def _react(self) -> None:
        for event in self._conversation.poll_events():
            _REACTIONS[type(event)](self, event)


#: What a connection does about each event but requests, which `Connection._transmit` looks at itself.
_REACTIONS: Mapping[type, Callable[[Connection, Any], None]] = {
    ResponseReceived: Connection._answered,
    ErrorReceived: Connection._refused,
    CallFailed: Connection._failed,
    RequestCancelled: Connection._cancelled,
    PongReceived: Connection._ponged,
    Opened: Connection._open,
    Drained: Connection._drained,
    Ended: Connection._ended,
}


def _where(address: Any) -> str:
    host = getattr(address, "host", None)
    if host is not None:
        return f"[{host}]:{address.port}" if ":" in host else f"{host}:{address.port}"
    name = getattr(address, "name", None)
    return (
        repr(address) if name is None else f"unix:{name.decode(errors='replace') if isinstance(name, bytes) else name}"
    )


def _reason(reason: Failure) -> str:
    text = reason.getErrorMessage().strip().rstrip(".")
    return f"the connection was lost: {text[:1].lower()}{text[1:]}" if text else "the connection was lost"


def _not_run(error: Error) -> Error:
    error.may_have_run = False
    return error


def _failed(error: Error) -> Deferred[Any]:
    deferred: Deferred[Any] = Deferred()
    deferred.errback(error)
    return deferred


def _also(done: Deferred[None]) -> Callable[[Any], Any]:
    def pass_on(result: Any) -> Any:
        done.callback(None)
        return result

    return pass_on
