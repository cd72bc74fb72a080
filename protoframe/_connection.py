"""One end of a conversation, bound to Twisted: calls become Deferreds, requests run handlers, one timer is kept.

Knows Protocols, handlers and the request layer, but not what carries the frames: that is a `Carrier`, such as
`protoframe._stream.StreamCarrier`.
"""

from __future__ import annotations

import math
import secrets
import typing
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from types import CoroutineType
from typing import Any

import msgspec
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from protoframe._clock import clock_of
from protoframe._context import Scope, scope
from protoframe._handler import RunningHandler
from protoframe._protocol import Protocol
from protoframe._proxy import proxy_class
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
from protoframe.core.frames import ErrorBody, Frame
from protoframe.core.limits import Limits
from protoframe.core.schema import (
    ErrorType,
    Method,
    RequestOptions,
    encode_json,
    encode_msgpack,
    error_type,
    invalid_value,
)
from protoframe.core.state import Role, State
from protoframe.core.untrusted import Bounds, check_json, check_msgpack
from protoframe.errors import (
    BY_NAME,
    Cancelled,
    ConnectionLost,
    DeadlineExceeded,
    Error,
    Internal,
    InvalidArgument,
    InvalidResponse,
    LocalProtocolError,
    MessageTooLarge,
    ProtocolError,
    Status,
    UnknownMethod,
    unknown_error,
)

__all__ = ["Callee", "Carrier", "Connection", "JSONMethod", "MethodTable"]

P = typing.TypeVar("P", bound=Protocol[Any])

#: What is served: by the name on the wire, the method and which of the connection's Protocols has it.
MethodTable = Mapping[bytes, tuple[Method, int]]

_CLOSED = State.CLOSED

#: Events after which what is ready is sent, so that the peer works on it while this end works on the rest.
_TURN = 16

#: Octets of answers that may wait to be sent while more requests are served.
_BACKLOG = 1024 * 1024

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


class Callee(typing.Protocol):
    """What a call needs to know of the method that it calls; a `Method` knows it."""

    wire_name: bytes
    options: RequestOptions
    errors: Mapping[str, ErrorType]
    json: bool

    def decode_result(self, octets: bytes, max_nesting: int) -> Any:
        """
        :raises InvalidResponse: this is not the result of such a method.
        """


class JSONMethod:
    """A method of the other end whose declaration is not at hand: arguments and result are JSON texts.

    :param name: ``Protocol.method``.
    """

    json = True
    options = RequestOptions()
    errors: Mapping[str, ErrorType] = {}

    def __init__(self, name: str) -> None:
        self.wire_name = name.encode()

    def decode_result(self, octets: bytes, max_nesting: int) -> bytes:
        """The JSON text."""
        del max_nesting
        return octets


class _PendingCall(msgspec.Struct):
    """A call of this end: who waits for it, and what reads its answer."""

    deferred: Deferred[Any]
    method: Callee


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
        self._table = table
        self._carrier = carrier
        self._conversation = Conversation(role, limits, self._clock(), agent)
        self._running: dict[int, RunningHandler] = {}
        # Requests that wait until answers have been sent.
        self._held: deque[RequestReceived] = deque()
        # Calls that were cancelled while they ran, and the error that they end with whatever their handler says.
        self._verdicts: dict[int, Error] = {}
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
                _PendingCall(deferred, method),
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
            timer.cancel()
            self._pings.pop(payload, None)

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

    def leave(self) -> Deferred[None]:
        """Takes no new calls of the peer, and closes when those that run have ended."""
        done: Deferred[None] = Deferred()
        self.closed.addBoth(_also(done))
        self._conversation.go_away("this end is going away")
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
        for ping in list(self._pings.values()):
            ping.timer.cancel()
            ping.deferred.errback(ConnectionLost("the connection was lost"))
        self._pings.clear()
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
        self._busy = True
        try:
            conversation = self._conversation
            outbox = conversation.outbox
            while True:
                while events := conversation.poll_events():
                    for number, event in enumerate(events, 1):
                        try:
                            _REACTIONS[type(event)](self, event)
                        except Exception:
                            self._failed_to_react(event)
                        if not number % _TURN and not self._paused:
                            self._send(0)
                if self._over:
                    return
                if not self._paused:
                    self._send(_ALLOWANCE)
                    while outbox.large and not self._paused:
                        self._send(_ALLOWANCE)
                if self._over:
                    # The carrier was lost while it sent: what that means is among the events now.
                    continue
                if not self._held or self._paused or outbox.octets > _BACKLOG:
                    break
                self._serve_held()
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
        token: _PendingCall | None = getattr(event, "token", None)
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
        self._held.clear()
        if isinstance(event.error, ConnectionLost):
            return
        if event.error is not None:
            self.log.warn("{where}: {error}", where=self.where, error=event.error.message)

    def _ponged(self, event: PongReceived) -> None:
        ping = self._pings.pop(event.payload, None)
        if ping is not None:
            ping.timer.cancel()
            ping.deferred.callback(self._clock() - ping.sent)

    # Calls of this end.

    def _answered(self, event: ResponseReceived) -> None:
        call: _PendingCall = event.token
        try:
            result = call.method.decode_result(event.message, self._limits.max_nesting)
        except Error as error:
            call.deferred.errback(error)
        else:
            call.deferred.callback(result)

    def _refused(self, event: ErrorReceived) -> None:
        call: _PendingCall = event.token
        error = self._read_error(call.method, event.body)
        error.may_have_run = event.may_have_run
        call.deferred.errback(error)

    def _failed(self, event: CallFailed) -> None:
        event.token.deferred.errback(event.error)

    def _cancel(self, deferred: Deferred[Any]) -> None:
        # `CallFailed` fires the Deferred: at once, for whoever cancels expects it to have fired.
        self._conversation.cancel(deferred.call_id)  # type: ignore[attr-defined]
        if self._busy:
            for event in self._conversation.poll_events():
                _REACTIONS[type(event)](self, event)
        else:
            self._transmit()

    def _read_error(self, method: Callee, body: ErrorBody) -> Error:
        status, name, text, detail = body
        known = method.errors.get(name)
        if known is None and (cls := BY_NAME.get(name)) is not None:
            known = error_type(cls)
        try:
            if known is not None:
                return (
                    known.decode(text, detail, self._limits.max_nesting, json=method.json)
                    if detail
                    else known.cls(text)
                )
            if not detail:
                fields = {}
            elif method.json:
                check_json(detail, self._limits.max_nesting, Bounds.UNTYPED)
                fields = msgspec.json.decode(detail, type=dict[str, Any])
            else:
                check_msgpack(detail, self._limits.max_nesting, Bounds.UNTYPED)
                fields = msgspec.msgpack.decode(detail, type=dict[str, Any])
        except InvalidResponse as error:
            return error
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            return InvalidResponse(f"{name}: {invalid_value(error)}")
        return unknown_error(status, name, text, fields)

    # Calls of the peer.

    def _serve(self, event: RequestReceived) -> None:
        if self._conversation.state is _CLOSED:
            # What came after it ended the conversation.
            return
        if self._held or self._conversation.outbox.octets > _BACKLOG:
            self._held.append(event)
        else:
            self._serve_now(event)

    def _serve_held(self) -> None:
        now = self._clock()
        while self._held and self._conversation.outbox.octets <= _BACKLOG:
            event = self._held.popleft()
            if event.deadline > now:
                self._serve_now(event)
            else:
                body = ErrorBody(
                    Status.DEADLINE_EXCEEDED,
                    DeadlineExceeded.__name__,
                    "the deadline passed before the call was served",
                )
                self._conversation.refuse(event.call_id, body, processed=False)

    def _serve_now(self, event: RequestReceived) -> None:
        entry = self._table.get(event.method)
        if entry is None or entry[0].function is None:
            self._refuse_unknown(event, entry is not None)
            return
        method, index = entry
        max_size = method.options.max_size
        if max_size is not None and len(event.arguments) > max_size:
            text = f"the arguments are {len(event.arguments)} bytes, and {max_size} are allowed"
            body = ErrorBody(Status.RESOURCE_EXHAUSTED, MessageTooLarge.__name__, text)
            self._conversation.refuse(event.call_id, body, processed=False)
            return
        try:
            arguments = method.decode_arguments(event.arguments, self._limits.max_nesting, json=event.json)
        except InvalidArgument as error:
            body = ErrorBody(Status.INVALID_ARGUMENT, InvalidArgument.__name__, error.message)
            self._conversation.refuse(event.call_id, body, processed=False)
            return
        context = copy_context()
        context.run(self._begin, context, event, method, self.protocols[index], arguments)

    def _begin(
        self,
        context: Any,
        event: RequestReceived,
        method: Method,
        protocol: Protocol[Any],
        arguments: tuple[Any, ...],
    ) -> None:
        clock = self._clock
        scope.set(Scope(clock, event.deadline, b"", method.full_name, self.address, event.metadata))
        try:
            result = method.invoke(protocol, *arguments)
            if isinstance(result, CoroutineType):
                try:
                    awaited = result.send(None)
                except StopIteration as stop:
                    result = stop.value
                else:
                    self._run(context, event, method).drive(result, awaited)
                    return
            elif isinstance(result, Deferred):
                self._run(context, event, method).follow(result)
                return
        except BaseException as error:
            self._handler_failed(event.call_id, method, error, event.json)
        else:
            self._handler_returned(event.call_id, method, result, event.json)

    def _run(self, context: Any, event: RequestReceived, method: Method) -> RunningHandler:
        call_id, json = event.call_id, event.json

        def done(result: Any, error: BaseException | None) -> None:
            self._running.pop(call_id, None)
            verdict = self._verdicts.pop(call_id, None)
            if verdict is not None and self._conversation.state is _CLOSED:
                pass
            elif verdict is not None:
                body = ErrorBody(verdict.status, verdict.type_name, verdict.message)
                self._conversation.refuse(call_id, body)
            elif error is not None:
                self._handler_failed(call_id, method, error, json)
            else:
                self._handler_returned(call_id, method, result, json)
            self._schedule()

        running = self._running[call_id] = RunningHandler(context, done)
        self._conversation.suspend(call_id, event.deadline)
        return running

    def _handler_returned(self, call_id: int, method: Method, result: Any, json: bool) -> None:
        if self._conversation.state is _CLOSED:
            return
        try:
            octets = encode_json(result) if json else encode_msgpack(result)
            max_size = method.options.max_size
            if max_size is not None and len(octets) > max_size:
                raise MessageTooLarge(f"the result is {len(octets)} bytes, and {max_size} are allowed")
            self._conversation.respond(call_id, octets)
        except MessageTooLarge as error:
            self.log.error("{method}: {error}", method=method.full_name, error=error.message)
            self._conversation.refuse(call_id, ErrorBody(error.status, error.type_name, error.message))
        except Exception as error:
            self._handler_failed(call_id, method, error, json)

    def _handler_failed(self, call_id: int, method: Method, error: BaseException, json: bool) -> None:
        if self._conversation.state is _CLOSED:
            # Nobody waits for the answer; what went wrong is still worth a line.
            self._log_failure(method, error, "")
            return
        declared = method.error_for(error)
        if declared is not None and isinstance(error, Error):
            try:
                detail = declared.encode(error, json) if declared.fields.__struct_fields__ else b""
                self._conversation.refuse(call_id, ErrorBody(error.status, declared.name, error.message, detail))
            except Exception as unsendable:
                error = unsendable
            else:
                return
        incident = secrets.token_hex(6)
        self._log_failure(method, error, incident)
        text = f"internal error; the server's log has it as incident {incident}"
        fields = {"incident": incident}
        detail = msgspec.json.encode(fields) if json else msgspec.msgpack.encode(fields)
        self._conversation.refuse(call_id, ErrorBody(Status.INTERNAL, Internal.__name__, text, detail))

    def _log_failure(self, method: Method, error: BaseException, incident: str) -> None:
        failure = Failure(error, type(error), error.__traceback__)
        self.log.failure(
            "{method} failed (incident {incident})",
            failure=failure,
            method=method.full_name,
            incident=incident or "-",
        )

    def _refuse_unknown(self, event: RequestReceived, declared: bool) -> None:
        name = event.method.decode("utf-8", "replace")
        text = f"{name} is declared here, but not served" if declared else f"there is no method {name}"
        body = ErrorBody(Status.UNIMPLEMENTED, UnknownMethod.__name__, text)
        self._conversation.refuse(event.call_id, body, processed=False)

    def _cancelled(self, event: RequestCancelled) -> None:
        running = self._running.get(event.call_id)
        if running is None:
            for held in self._held:
                if held.call_id == event.call_id:
                    self._held.remove(held)
                    body = ErrorBody(Status.CANCELLED, Cancelled.__name__, "")
                    self._conversation.refuse(event.call_id, body, processed=False)
                    break
            return
        self._verdicts[event.call_id] = (
            DeadlineExceeded("the deadline passed while the call was served") if event.expired else Cancelled("")
        )
        running.cancel()


#: What a connection does about each event.
_REACTIONS: Mapping[type, Callable[[Connection, Any], None]] = {
    RequestReceived: Connection._serve,
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
