"""Calls of this end: what is called, who waits for the answer, and how it is read.

Knows Deferreds, streams and encoded answers; not what carries the calls, nor when they are sent.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from typing import Any

import msgspec
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from protoframe._context import NO_METADATA, NOWHERE, Scope, decode_metadata, fire_in, get_scope, scope
from protoframe._handler import RunningHandler
from protoframe._inlets import Inlets, Stream, ended_inlet
from protoframe._outlets import Outlet, Outlets
from protoframe.core.conversation import Conversation
from protoframe.core.events import (
    CallFailed,
    EndReceived,
    ErrorReceived,
    ItemsReceived,
    ResponseReceived,
    StopReceived,
)
from protoframe.core.frames import COUNT, ErrorBody, Flag, Key, behind
from protoframe.core.limits import Limits
from protoframe.core.schema import ErrorType, RequestOptions, error_type, invalid_value
from protoframe.core.untrusted import Bounds, check_json, check_msgpack
from protoframe.errors import (
    BY_NAME,
    Cancelled,
    ConnectionLost,
    DeadlineExceeded,
    Error,
    InvalidArgument,
    InvalidResponse,
    MessageTooLarge,
    TooManyCalls,
    not_run,
    unknown_error,
)
from protoframe.interceptors import InterceptedCall, Interceptor, run

__all__ = ["Answer", "CallCancelled", "Caller", "JSONMethod", "JSONStream", "PendingCall", "PendingStream", "failed"]

_log = Logger(namespace="protoframe.calling")

_STREAMS = int(Flag.ITEMS | Flag.STREAM)


class Items(typing.Protocol):
    """What reads the items of a stream; an `ItemType` does."""

    def decode(self, message: bytes, count: int, max_nesting: int, *, json: bool = False) -> list[Any]:
        """
        :raises InvalidArgument: these are not the items of such a stream.
        """
        ...


class Callee(typing.Protocol):
    """What a call needs to know of the method that it calls; a `Method` knows it."""

    wire_name: bytes
    options: RequestOptions
    errors: Mapping[str, ErrorType]
    json: bool
    flags: int
    full_name: str
    is_ordinary: bool
    decode_typed: Callable[[bytes], Any] | None

    @property
    def items(self) -> Items | None:
        """What reads the items of its result, where that is a stream."""

    def decode_result(self, octets: bytes, max_nesting: int) -> Any:
        """
        :raises InvalidResponse: this is not the result of such a method.
        """


class JSONMethod:
    """A method of the other end whose declaration is not at hand: arguments and result are JSON texts.

    :param name: ``Protocol.method``.
    """

    json = True
    flags = int(Flag.JSON)
    is_ordinary = False
    decode_typed: Callable[[bytes], Any] | None = None
    items: Items | None = None
    options = RequestOptions()
    errors: Mapping[str, ErrorType] = {}

    def __init__(self, name: str) -> None:
        self.full_name = name
        self.wire_name = name.encode()

    def decode_result(self, octets: bytes, max_nesting: int) -> bytes:
        """The JSON text."""
        del max_nesting
        return bytes(octets)


class _JSONItems:
    """Items as JSON texts."""

    def decode(self, message: bytes, count: int, max_nesting: int, *, json: bool = True) -> list[bytes]:
        """The JSON texts."""
        del count, max_nesting, json
        try:
            return [bytes(item) for item in _decode_raw(behind(message, COUNT.size))]
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise InvalidResponse(f"the items are no JSON: {invalid_value(error)}") from None


_decode_raw = msgspec.json.Decoder(list[msgspec.Raw]).decode


class JSONStream(JSONMethod):
    """The same, where the answer may be a stream, whose items are JSON texts.

    :param sends: whether the call sends a stream too.
    """

    items: Items | None = _JSONItems()

    def __init__(self, name: str, *, sends: bool) -> None:
        super().__init__(name)
        self.flags = int(Flag.JSON | Flag.STREAM | (Flag.ITEMS if sends else 0))


class CallCancelled(Cancelled, CancelledError):
    """What a call fails with that this end cancelled: to Twisted, as for any Deferred, a `CancelledError`."""


class Answer(Deferred[Any]):
    """A call of this end, and what its caller waits for: one object, for each call has one.

    :ivar method: reads the answer.
    :ivar around: what surrounded the call when it was made.
    :ivar call_id: its id.
    """

    __slots__ = ("around", "call_id", "method")
    method: Callee
    around: Scope
    call_id: int

    def succeed(self, result: Any) -> None:
        """The call has its result."""
        fire(self, self.around, self.callback, result)

    def lost(self, error: BaseException) -> None:
        """The connection is lost before there was an answer."""
        self.fail(error)

    def fail(self, error: BaseException) -> None:
        """The call has none."""
        fire(self, self.around, self.errback, error)


class PendingCall(msgspec.Struct):
    """A call whose caller waits for more than this: who that is, what reads the answer, and what surrounded the call.

    :ivar call_id: its id.
    """

    deferred: Deferred[Any]
    method: Callee
    around: Scope = NOWHERE
    call_id: int = 0

    def succeed(self, result: Any) -> None:
        """The call has its result."""
        fire(self.deferred, self.around, self.deferred.callback, result)

    def lost(self, error: BaseException) -> None:
        """The connection is lost before there was an answer."""
        self.fail(error)

    def fail(self, error: BaseException) -> None:
        """The call has none."""
        fire(self.deferred, self.around, self.deferred.errback, error)


def fire(deferred: Deferred[Any], around: Scope, how: Callable[[Any], None], outcome: Any) -> None:
    """Tells an outcome to who waits for it, in what surrounded the call."""
    if deferred.called:
        # Cancelled by the callback of another call, which had its outcome in the same turn.
        pass
    elif around is NOWHERE:
        how(outcome)
    else:
        fire_in(around, how, outcome)


class PendingStream(msgspec.Struct):
    """A call of this end whose answer is a stream."""

    inlets: Inlets
    method: Callee
    call_id: int = 0

    def succeed(self, result: Any) -> None:
        """The call was answered with a value: to one that takes either, that is a stream of one."""
        if self.method.json:
            self.inlets.receive(ItemsReceived(self.call_id, 1, COUNT.pack(1) + b"[" + result + b"]", 0))
            self.inlets.end(self.call_id)
        else:
            self.fail(InvalidResponse(f"{self.method.full_name} answered with a value, and a stream was declared"))

    def lost(self, error: BaseException) -> None:
        """The connection is lost before the stream has ended."""
        self.fail(error)

    def fail(self, error: BaseException) -> None:
        """The stream ends with an error."""
        if isinstance(error, DeadlineExceeded | CancelledError):
            self.inlets.fail(self.call_id, error)
        else:
            self.inlets.end(self.call_id, error)


def read_error(method: Callee, body: ErrorBody, max_nesting: int) -> Error:
    """The error that a call was answered with: of the class that the method declares, where this end knows it."""
    status, name, text, detail = body
    known = method.errors.get(name)
    if known is None and (cls := BY_NAME.get(name)) is not None:
        known = error_type(cls)
    try:
        if known is not None:
            return known.decode(text, detail, max_nesting, json=method.json)
        if not detail:
            fields = {}
        elif method.json:
            check_json(detail, max_nesting, Bounds.UNTYPED)
            fields = msgspec.json.decode(detail, type=dict[str, Any])
        else:
            check_msgpack(detail, max_nesting, Bounds.UNTYPED)
            fields = msgspec.msgpack.decode(detail, type=dict[str, Any])
    except InvalidResponse as error:
        return error
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        return InvalidResponse(f"{name}: {invalid_value(error)}")
    return unknown_error(status, name, text, fields)


class Interceptable:
    """What makes calls, around each of which something may run.

    :ivar is_intercepted: whether anything does: then calls are made by `make_intercepted`.
    """

    def __init__(self) -> None:
        self.is_intercepted = False
        self._interceptors: Sequence[Interceptor] = ()
        self._seen: tuple[Any, str, Callable[[], Any]] = (None, "", lambda: None)

    def intercept(
        self,
        interceptors: Sequence[Interceptor],
        address: Any,
        where: str,
        identity: Callable[[], Any],
    ) -> None:
        """Has something run around each call; it sees who is called."""
        self.is_intercepted = True
        self._interceptors = interceptors
        self._seen = (address, where, identity)

    def make_intercepted(self, method: Callee, arguments: Any, innermost: Callable[[], Any]) -> Deferred[Any]:
        """Makes a call as the interceptors of this end have it.

        :param arguments: what they see of them.
        :param innermost: makes the call itself.
        """
        metadata = scope.get().metadata
        address, where, identity = self._seen
        call = InterceptedCall(
            method=method.full_name,
            incoming=False,
            arguments=arguments,
            address=address,
            identity=identity(),
            metadata=decode_metadata(metadata) if metadata else NO_METADATA,
            where=where,
            streams=method.items is not None,
        )
        return Deferred.fromCoroutine(run(self._interceptors, call, innermost))


def seconds_of(method: Callee, around: Scope, default: float) -> float:
    """The seconds that a call may take; infinity for as long as it likes.

    :param default: where nobody says.
    :raises DeadlineExceeded: there are none left.
    """
    if around.deadline is not None:
        seconds = around.deadline - around.clock()
        if seconds <= 0:
            raise not_run(DeadlineExceeded("the deadline had passed before the call was made"))
        return seconds
    if method.options.timeout is not None:
        return method.options.timeout
    # A stream goes on for as long as somebody takes it.
    return math.inf if method.flags & _STREAMS else default


class Caller(Interceptable):
    """Makes the calls of one end of a conversation.

    :param conversation: where they go, and their answers come from.
    :param limits: of this end.
    :param clock: gives the time.
    :param outlets: the streams that this end sends.
    :param inlets: those that come.
    :param wake: called when there is something to send.
    :param settle: called to have outcomes that are known by now told at once.
    :ivar oneway: calls that want no answer and are not sent yet.
    """

    def __init__(
        self,
        conversation: Conversation,
        limits: Limits,
        clock: Callable[[], float],
        outlets: Outlets,
        inlets: Inlets,
        wake: Callable[[], None],
        settle: Callable[[], None],
    ) -> None:
        super().__init__()
        self._conversation = conversation
        self._request_plain = conversation.request
        self._canceller = self._cancel
        self._max_nesting = limits.max_nesting
        self._default_timeout = limits.default_timeout
        self._max_oneway = limits.max_waiting
        self._clock = clock
        self._outlets = outlets
        self._inlets = inlets
        self._wake = wake
        self._settle = settle
        self._senders: dict[int, tuple[Outlet, RunningHandler]] = {}
        self.oneway: list[tuple[Deferred[None], Scope]] = []

    def call(self, method: Callee, arguments: bytes, sent: Any = None) -> Deferred[Any]:
        """Calls a method of the other end, with its encoded arguments.

        :param sent: the items of the parameter that is a stream, where there is one.
        """
        call = Answer(self._canceller)
        call.method = method
        call.around = around = get_scope()
        try:
            if method.is_ordinary and around is NOWHERE and not self._inlets.left:
                # What is left of `_request` for most calls.
                clock, request, wake = self._clock, self._request_plain, self._wake
                now = clock()
                call_id = request(method.wire_name, arguments, call, now + self._default_timeout, now)
                wake()
            else:
                call_id = self._request(method, arguments, call, around)
        except Error as error:
            return failed(error)
        call.call_id = call_id
        if sent is not None:
            self._send(call_id, method, sent)
        return call

    def call_stream(self, method: Callee, arguments: bytes, sent: Any = None) -> Stream:
        """Calls a method whose answer is a stream.  What goes wrong is raised by the loop over it.

        :param sent: the items of the parameter that is a stream, where there is one.
        """

        def decode(message: bytes, count: int) -> list[Any]:
            if method.items is None:
                raise InvalidResponse(f"{method.full_name} answered with a stream, and none was declared")
            try:
                return method.items.decode(message, count, self._max_nesting, json=method.json)
            except InvalidArgument as error:
                fault = error.message
            except Exception as error:
                # A type of the user's that fails in a way of its own, in ``__post_init__``, say.
                fault = f"{type(error).__name__}: {error}"
            raise InvalidResponse(f"the answer of {method.full_name} is not what was declared: {fault}")

        call = PendingStream(self._inlets, method)
        try:
            call.call_id = self._request(method, arguments, call, scope.get())
        except Error as error:
            return Stream(ended_inlet(error))
        stream = Stream(self._inlets.open(call.call_id, decode))
        if sent is not None:
            self._send(call.call_id, method, sent)
        return stream

    def call_oneway(self, method: Callee, arguments: bytes) -> Deferred[None]:
        """Calls a method that gives no answer; fires when the call is on its way."""
        if len(self.oneway) >= self._max_oneway:
            return failed(not_run(TooManyCalls(f"{len(self.oneway)} calls wait to be sent already")))
        try:
            self._request(method, arguments, None, scope.get())
        except Error as error:
            return failed(error)
        deferred: Deferred[None] = Deferred()
        self.oneway.append((deferred, scope.get()))
        return deferred

    def _request(self, method: Callee, arguments: bytes, call: Any, around: Scope) -> int:
        """Makes a call; its id.

        :raises Error: it cannot be made.
        """
        if self._inlets.left:
            # What was left before this call was made is told before it, too.
            self._inlets.settle()
        max_size = method.options.max_size
        if max_size is not None and len(arguments) > max_size:
            raise not_run(MessageTooLarge(f"the arguments are {len(arguments)} bytes, and max_size is {max_size}"))
        now = self._clock()
        seconds = seconds_of(method, around, self._default_timeout)
        call_id = self._conversation.request(
            method.wire_name, arguments, call, now + seconds, now, around.metadata, method.flags
        )
        self._wake()
        return call_id

    def make_kept(self, call: PendingCall, arguments: bytes, metadata: bytes, deadline: float, key: Key) -> None:
        """Makes a call of the session, for the first time or again.

        :param deadline: in the time of the conversation.
        :raises Error: it cannot be made.
        """
        method = call.method
        max_size = method.options.max_size
        if max_size is not None and len(arguments) > max_size:
            raise not_run(MessageTooLarge(f"the arguments are {len(arguments)} bytes, and max_size is {max_size}"))
        call.call_id = self._conversation.request(
            method.wire_name, arguments, call, deadline, self._clock(), metadata, method.flags, key
        )
        self._wake()

    def give_up(self, call: PendingCall, error: Error) -> None:
        """Ends such a call with an error, unless it has its outcome."""
        self._conversation.cancel(call.call_id, error)
        self._settle()

    def _cancel(self, deferred: Deferred[Any]) -> None:
        # `CallFailed` fires the Deferred, unless the call has an outcome by now that is about to be told.
        call_id = typing.cast("Answer", deferred).call_id
        cancelled = CallCancelled("cancelled by the caller")
        self._conversation.cancel(call_id, cancelled)
        self._settle()
        if not deferred.called:
            deferred.errback(cancelled)

    # What becomes of them.

    def answered(self, event: ResponseReceived) -> None:
        """A call has its result."""
        call: Answer | PendingCall | PendingStream = event.token
        if self._senders:
            self._stop_sending(call.call_id)
        method = call.method
        try:
            decode = method.decode_typed
            if decode is not None:
                result = decode(event.message)
            else:
                result = method.decode_result(event.message, self._max_nesting)
        except Exception:
            # Whatever it is, an error of the caller's own types too: `decode_result` says it as it is to be said.
            self._unreadable(call, event.message)
        else:
            if type(call) is Answer and call.around is NOWHERE and not call.called:
                # What is left of `succeed` for most calls.
                call.callback(result)
            else:
                call.succeed(result)

    def _unreadable(self, call: Answer | PendingCall | PendingStream, message: bytes) -> None:
        """A result could not be decoded: the caller is told what is wrong with it."""
        try:
            call.succeed(call.method.decode_result(message, self._max_nesting))
        except Error as error:
            call.fail(error)

    def refused(self, event: ErrorReceived) -> None:
        """A call was answered with an error."""
        call: Answer | PendingCall | PendingStream = event.token
        self._stop_sending(call.call_id)
        error = read_error(call.method, event.body, self._max_nesting)
        error.may_have_run = event.may_have_run
        call.fail(error)

    def failed(self, event: CallFailed) -> None:
        """A call failed here, without an answer."""
        call: Answer | PendingCall | PendingStream = event.token
        self._stop_sending(call.call_id)
        if isinstance(event.error, ConnectionLost):
            call.lost(event.error)
        else:
            call.fail(event.error)

    def stopped(self, event: StopReceived) -> None:
        """What serves a call takes no more of the stream that goes with it."""
        self._stop_sending(event.call_id)

    def ended(self, event: EndReceived) -> None:
        """A stream has ended that was an answer."""
        self._stop_sending(event.call_id)

    def oneway_sent(self) -> None:
        """All calls that want no answer are on their way."""
        sent, self.oneway = self.oneway, []
        for deferred, around in sent:
            fire_in(around, deferred.callback, None)

    def lost(self) -> None:
        """The connection is gone."""
        unsent, self.oneway = self.oneway, []
        for deferred, around in unsent:
            fire_in(around, deferred.errback, not_run(ConnectionLost("the connection was lost")))

    # Streams that go with them.

    def _send(self, call_id: int, method: Callee, sent: Any) -> None:
        """Sends the items of an async iterator with a call."""
        outlet = Outlet(self._outlets, call_id, json=method.json, max_size=method.options.max_size)

        def done(_: Any, error: BaseException | None) -> None:
            outlet.abandon()
            if self._senders.pop(call_id, None) is None:
                # The call has its outcome, and the iterator was told so.
                if error is not None and not isinstance(error, CancelledError | Error):
                    failure = Failure(error, type(error), error.__traceback__)
                    _log.failure("what sent the stream of {method} failed", failure, method=method.full_name)
            elif error is None:
                # Unless the call has an outcome that is about to be told.
                if call_id in self._conversation.traffic.credit.streams:
                    self._conversation.end_items(call_id)
            else:
                # Whatever it is: the caller gets it.
                self._conversation.cancel(call_id, typing.cast("Error", error))
            self._wake()

        running = RunningHandler(copy_context(), done, outlet.flush)
        self._senders[call_id] = (outlet, running)
        running.start(outlet.run(sent))

    def _stop_sending(self, call_id: int) -> None:
        """The call has its outcome: nobody wants more of what goes with it."""
        sender = self._senders.pop(call_id, None)
        if sender is not None:
            outlet, running = sender
            outlet.abandon()
            running.cancel()


def failed(error: Error) -> Deferred[Any]:
    """A Deferred that has failed already."""
    deferred: Deferred[Any] = Deferred()
    deferred.errback(error)
    return deferred
