"""Calls of the peer: each request finds its method, runs its handler, and gets one answer.

Knows Protocols, handlers and what their results and errors become; not what carries the answers, nor when they are
sent.
"""

from __future__ import annotations

import math
import secrets
import struct
import typing
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextvars import Context, copy_context
from hashlib import blake2b
from types import CoroutineType
from typing import Any

import msgspec
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from protoframe._context import NO_METADATA, Scope, decode_metadata, set_scope
from protoframe._handler import RunningHandler
from protoframe._inlets import Inlets, Stream
from protoframe._outlets import Outlet, Outlets, travelling
from protoframe._protocol import Protocol
from protoframe._sessions import Keeper, Run
from protoframe.core.conversation import Conversation
from protoframe.core.events import RequestCancelled, RequestReceived
from protoframe.core.frames import ErrorBody, Flag
from protoframe.core.limits import Limits
from protoframe.core.messages import BACKLOG
from protoframe.core.replies import KeptCall, Reply, Session
from protoframe.core.schema import ErrorType, ItemType, Method, encode_json, encode_msgpack, error_type
from protoframe.core.state import State
from protoframe.errors import (
    BY_NAME,
    Cancelled,
    ConnectionLost,
    DeadlineExceeded,
    Error,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    LocalProtocolError,
    MessageTooLarge,
    PermissionDenied,
    Status,
    TooManyCalls,
    TryLater,
    Unauthenticated,
    UnknownMethod,
)
from protoframe.interceptors import Chain, InterceptedCall, Interceptor

__all__ = ["MethodTable", "Server"]

_log = Logger(namespace="protoframe.server")

#: What is served: by the name on the wire, the method and which of the connection's Protocols has it.
MethodTable = Mapping[bytes, tuple[Method, int]]

_CLOSED = State.CLOSED

#: How a handler ends that was cancelled.
_ENDINGS = (CancelledError, Cancelled, DeadlineExceeded, ConnectionLost, GeneratorExit)

#: Seconds by which a deadline passes earlier at the next hop, for it is rounded down on the way.
_ROUNDING = 0.005
_JSON = int(Flag.JSON)
_ITEMS = int(Flag.ITEMS)
_STREAM = int(Flag.STREAM)
_STREAMS = _ITEMS | _STREAM
_ONEWAY = int(Flag.ONEWAY)
_KEYED = int(Flag.KEYED)
# Where the parts of a call end that its digest is of, and its flags.
_DIGEST_SALT = struct.Struct("!HIB")


#: In place of requests that wait, while none has: a deque takes 760 bytes.
_NONE_HELD: deque[RequestReceived] = typing.cast("deque[RequestReceived]", ())


class Streams(typing.Protocol):
    """Has the streams of a conversation."""

    @property
    def outlets(self) -> Outlets:
        """Those that this end sends."""
        ...

    @property
    def inlets(self) -> Inlets:
        """Those that come."""
        ...


class Server:
    """Serves the requests of one conversation.

    :param conversation: where the requests come from, and the answers go.
    :param table: the methods that are served.
    :param protocols: the instances that serve them.
    :param limits: what this end takes.
    :param clock: gives the time.
    :param address: the peer's.
    :param where: the same, as a text.
    :param streams: has those of the conversation, made when there is the first.
    :param interceptors: what runs around each call, the outermost first.
    :param wake: called when there is something to send that no event of the conversation led to.
    :param keeper: keeps the sessions of clients that have one.
    :ivar session: that of this conversation.
    :ivar held: requests that wait until answers have been sent.
    :ivar identity: who the peer has shown to be.
    """

    __slots__ = (
        "_address",
        "_beginning",
        "_clock",
        "_conversation",
        "_interceptors",
        "_joined",
        "_keeper",
        "_kept",
        "_max_calls",
        "_max_nesting",
        "_protocols",
        "_refused",
        "_respond",
        "_running",
        "_streaming",
        "_streams",
        "_table",
        "_traffic",
        "_verdicts",
        "_wake",
        "_where",
        "held",
        "identity",
        "session",
    )

    def __init__(
        self,
        conversation: Conversation,
        table: MethodTable,
        protocols: Sequence[Protocol[Any]],
        limits: Limits,
        clock: Callable[[], float],
        address: Any,
        where: str,
        streams: Streams,
        interceptors: Sequence[Interceptor],
        wake: Callable[[], None],
        keeper: Keeper | None = None,
    ) -> None:
        self._conversation = conversation
        self._traffic = conversation.traffic
        # A method, or what an attribute has, is looked up anew each time that it is called as an attribute.
        self._respond = conversation.respond
        self._beginning = self._begin
        self._table = table
        self._protocols = protocols
        self._max_nesting = limits.max_nesting
        self._max_calls = limits.max_calls
        self._clock = clock
        self._address = address
        self._where = where
        self._streams = streams
        self._interceptors = interceptors
        self.identity: Any = None
        self._streaming: dict[int, Outlet] = {}
        self._refused = 0
        self._wake = wake
        self._running: dict[int, RunningHandler] = {}
        self.held = _NONE_HELD
        # Calls that were cancelled while they ran, and the error that they end with whatever their handler says.
        self._verdicts: dict[int, Error] = {}
        self._keeper = keeper
        self.session: Session | None = None
        # Calls of the session: those that run here, and those that run for an earlier connection, by their ids here.
        self._kept: dict[int, KeptCall] = {}
        self._joined: dict[int, KeptCall] = {}

    def hold(self, event: RequestReceived) -> None:
        """Keeps a request until the answers that wait have been sent."""
        if self.held is _NONE_HELD:
            self.held = deque()
        self.held.append(event)

    def go_on(self) -> bool:
        """Serves requests that wait, as far as may be now; whether there were any."""
        before = len(self.held)
        now = self._clock()
        while self.held and self._conversation.outbox.octets <= BACKLOG:
            event = self.held.popleft()
            if event.deadline > now:
                self.serve(event)
            else:
                self._refuse(event, DeadlineExceeded("the deadline passed before the call was served"))
        return len(self.held) < before

    def cancel(self, event: RequestCancelled) -> None:
        """Asks a handler to end; a request that waits is not served."""
        if self._conversation.state is _CLOSED:
            self.held = _NONE_HELD
            if event.call_id in self._kept or event.call_id in self._joined:
                # It goes on: its caller may come again.
                return
        if self._stop(event.call_id, expired=event.expired):
            return
        joined = self._joined.get(event.call_id)
        if joined is not None:
            joined.runner.cancel(event.expired)
            return
        for held in self.held:
            if held.call_id == event.call_id:
                self.held.remove(held)
                self._refuse(held, Cancelled())
                return

    def _stop(self, call_id: int, *, expired: bool) -> bool:
        """Asks the handler of a call to end; whether one runs."""
        running = self._running.get(call_id)
        if running is None:
            return False
        self._verdicts[call_id] = (
            DeadlineExceeded("the deadline passed while the call was served") if expired else Cancelled()
        )
        outlet = self._streaming.get(call_id)
        if outlet is not None:
            outlet.abandon()
        running.cancel()
        return True

    def _refuse(self, event: RequestReceived, error: Error) -> None:
        """Answers a call that certainly did not run."""
        if self._keeper is not None and event.call_id in self._kept:
            self._keeper.sessions.drop(self._kept.pop(event.call_id))
        if event.flags & _ONEWAY or isinstance(error, PermissionDenied | Unauthenticated):
            self._note_refused(event.method, error)
        body = ErrorBody(error.status, error.type_name, error.message)
        self._conversation.refuse(event.call_id, body, processed=False)

    def _note_refused(self, method: bytes, error: Error) -> None:
        """Notes that a call does not run which wants no answer, so that nobody else is told, or is not permitted."""
        self._refused += 1
        if self._refused & (self._refused - 1) == 0:
            # The first, the second, the fourth...: a flood of them is no flood of lines.
            _log.warn(
                "{where} ({identity}): {refused} calls were refused, the last of {method}: {kind}: {error}",
                where=self._where,
                identity=getattr(self.identity, "name", None),
                refused=self._refused,
                method=_escaped(method.decode("utf-8", "replace")),
                kind=error.type_name,
                error=_escaped(error.message),
            )

    def serve(self, event: RequestReceived) -> None:
        """Serves a request."""
        entry = self._table.get(event.method)
        if entry is None:
            name = event.method.decode("utf-8", "replace")
            self._refuse(event, UnknownMethod(f"there is no method {name}"))
            return
        method, index = entry
        try:
            if method.is_plain and not event.flags:
                arguments = method.decode_arguments(event.arguments, self._max_nesting)
            elif self._is_admitted(event, method):
                arguments = method.decode_arguments(event.arguments, self._max_nesting, json=event.flags & _JSON != 0)
                if method.sent_items is not None:
                    arguments += (self._take_stream(event, method.full_name, method.sent_items),)
            else:
                return
            received = decode_metadata(event.metadata) if event.metadata else NO_METADATA
        except InvalidArgument as error:
            self._refuse(event, error)
            return
        except Exception as error:
            # A type of the user's that fails in a way of its own, in ``__post_init__``, say.
            self._handler_failed(event.call_id, method, error, event.flags, event.deadline)
            return
        context = copy_context()
        context.run(self._beginning, context, event, method, self._protocols[index], arguments, received)

    def _begin(
        self,
        context: Context,
        event: RequestReceived,
        method: Method,
        protocol: Protocol[Any],
        arguments: tuple[Any, ...],
        received: Mapping[str, str],
    ) -> None:
        deadline = event.deadline if event.deadline != math.inf else None
        set_scope(Scope(self._clock, deadline, b"", method.full_name, self._address, received, self.identity))
        try:
            if self._interceptors:
                result: Any = self._intercepted(event, method, protocol, arguments, received)
            else:
                result = method.invoke(protocol, *arguments)
            if method.items is not None:
                self._stream(context, event, method, result)
                return
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
            self._handler_failed(event.call_id, method, error, event.flags, event.deadline)
        else:
            self._handler_returned(event.call_id, method, result, event.flags, event.deadline)

    def _run(
        self,
        context: Context,
        event: RequestReceived,
        method: Method,
        outlet: Outlet | None = None,
    ) -> RunningHandler:
        # Not the event: it has the arguments, which the handler may be done with.
        call_id, flags, deadline = event.call_id, event.flags, event.deadline

        def done(result: Any, error: BaseException | None) -> None:
            self._running.pop(call_id, None)
            if outlet is not None:
                outlet.abandon()
                del self._streaming[call_id]
            verdict = self._verdicts.pop(call_id, None)
            if verdict is not None and error is not None and not isinstance(error, _ENDINGS):
                # Nobody is told of it otherwise.
                self._log_failure(method, error, "")
            if verdict is not None and self._is_unwanted(call_id):
                pass
            elif verdict is not None:
                self._forget(call_id)
                self._answer_error(call_id, ErrorBody(verdict.status, verdict.type_name, verdict.message))
            elif error is not None:
                self._handler_failed(call_id, method, error, flags, deadline)
            elif outlet is None:
                self._handler_returned(call_id, method, result, flags, deadline)
            elif self._conversation.state is not _CLOSED:
                self._conversation.end_items(call_id)
                self._forget(call_id)
            self._wake()

        running = self._running[call_id] = RunningHandler(context, done, outlet.flush if outlet is not None else None)
        self._conversation.suspend(call_id, deadline)
        return running

    # Streams.

    def _streams_fit(self, event: RequestReceived, method: Method) -> bool:
        """Whether the call sends a stream where the method takes one, and takes one where it gives one.

        One that takes a stream and gets a value sees so itself.
        """
        if method.flags & _STREAM and not event.flags & _STREAM:
            text = "answers with a stream, and the call takes none"
        elif method.flags & _ITEMS and not event.flags & _ITEMS:
            text = f"takes a stream ({method.sends}), and the call sends none"
        elif event.flags & _ITEMS and not method.flags & _ITEMS:
            text = "takes no stream, and the call sends one"
        else:
            return True
        self._refuse(event, FailedPrecondition(f"{method.full_name} {text}"))
        return False

    def _take_stream(self, event: RequestReceived, name: str, items: ItemType) -> Stream:
        """The stream that comes with a call."""
        call_id, json = event.call_id, event.flags & _JSON != 0

        def decode(message: bytes, count: int) -> list[Any]:
            try:
                return items.decode(message, count, self._max_nesting, json=json)
            except InvalidArgument as error:
                # The caller's fault, though the handler is where it shows.
                raise travelling(error) from None

        return Stream(self._streams.inlets.open(call_id, decode))

    def _stream(self, context: Context, event: RequestReceived, method: Method, result: Any) -> None:
        """Sends the stream that a handler gave."""
        outlets, is_json = self._streams.outlets, event.flags & _JSON != 0
        outlet = Outlet(outlets, event.call_id, json=is_json, max_size=method.options.max_size)
        self._streaming[event.call_id] = outlet
        self._run(context, event, method, outlet).start_inside(_send_stream(outlet, result))

    def _forget(self, call_id: int) -> None:
        """The call is answered: nobody takes any more of what comes with it, if anything does."""
        over = LocalProtocolError("the call is over, and so is the stream that came with it")
        self._streams.inlets.fail(call_id, over)

    # Who may call what.

    def _is_admitted(self, event: RequestReceived, method: Method) -> bool:
        """Whether a call is to run, by all that may be said against it; where it is not, the answer is sent."""
        if method.function is None:
            self._refuse(event, UnknownMethod(f"{method.full_name} is declared here, but not served"))
            return False
        if event.flags & _KEYED and not self._is_news(event):
            return False
        if method.permissions and not self._is_permitted(event, method):
            return False
        if event.flags & _ONEWAY and len(self._running) >= self._max_calls:
            # Its caller does not keep count of the slots, for it is not told when one is free.
            self._refuse(event, TooManyCalls(f"{self._max_calls} calls run on this connection already"))
            return False
        if (event.flags ^ method.flags) & _STREAMS and not self._streams_fit(event, method):
            return False
        max_size = method.options.max_size
        if max_size is not None and len(event.arguments) > max_size:
            text = f"the arguments are {len(event.arguments)} bytes, and {max_size} are allowed"
            self._refuse(event, MessageTooLarge(text))
            return False
        return True

    def _is_permitted(self, event: RequestReceived, method: Method) -> bool:
        if self.identity is None:
            self._refuse(event, Unauthenticated(f"{method.full_name} asks who calls"))
            return False
        missing = method.permissions - self.identity.permissions
        if missing:
            text = f"{method.full_name} takes the permission {', '.join(sorted(missing))}"
            self._refuse(event, PermissionDenied(text))
            return False
        return True

    def _intercepted(
        self,
        event: RequestReceived,
        method: Method,
        protocol: Protocol[Any],
        arguments: tuple[Any, ...],
        received: Mapping[str, str],
    ) -> Coroutine[Any, Any, Any]:
        call = InterceptedCall(
            method=method.full_name,
            incoming=True,
            arguments=method.parameters(*arguments[: len(method.parameters.__struct_fields__)]),
            address=self._address,
            identity=self.identity,
            metadata=received,
            where=self._where,
            streams=method.items is not None,
        )
        chain = Chain(self._interceptors, call, lambda: method.invoke(protocol, *arguments))
        return _run_chain(chain)

    # Calls that outlive the connection.

    def _is_news(self, event: RequestReceived) -> bool:
        """Whether a call of the session comes for the first time.

        Where it has come before, its reply is given again, or is waited for together with who waits for it already.
        """
        call_id = event.call_id
        if self.session is None or self._keeper is None or event.key is None:
            self._refuse(event, FailedPrecondition("the call has a key, and the conversation no session"))
            return False
        parts = (event.method, event.metadata, event.arguments)
        digest = blake2b(b"".join(parts), digest_size=16, salt=_DIGEST_SALT.pack(*map(len, parts[:2]), event.flags))
        try:
            call, is_new = self._keeper.sessions.take(self.session, event.key, digest.digest())
        except Error as error:
            body = ErrorBody(error.status, error.type_name, error.message)
            self._conversation.refuse(call_id, body, processed=error.may_have_run)
            return False
        if is_new:
            call.runner = Run(event.deadline, lambda expired: self._cancel_kept(call_id, expired))
            call.runner.join(self, call_id)
            self._kept[call_id] = call
        elif call.reply is not None:
            self._give(call_id, call.reply)
        else:
            self._joined[call_id] = call
            call.runner.join(self, call_id)
            self._conversation.suspend(call_id, event.deadline)
        return is_new

    def _cancel_kept(self, call_id: int, expired: bool) -> None:
        self._stop(call_id, expired=expired)

    def _is_unwanted(self, call_id: int) -> bool:
        """Whether nobody can be told the outcome of a call any more."""
        return self._conversation.state is _CLOSED and call_id not in self._kept

    def _finish(self, call_id: int, reply: Reply) -> None:
        """A call of the session has its reply."""
        if self._keeper is not None:
            self._keeper.finish(self._kept.pop(call_id), reply)

    def deliver(self, call_id: int, reply: Reply) -> None:
        """Gives the reply of a call of the session, which may have run for an earlier connection."""
        self._joined.pop(call_id, None)
        if self._conversation.state is not _CLOSED:
            self._give(call_id, reply)
            self._wake()

    def _give(self, call_id: int, reply: Reply) -> None:
        if reply.result is None:
            self._conversation.refuse(call_id, reply.error or ErrorBody(Status.INTERNAL, Internal.__name__, ""))
            return
        try:
            self._conversation.respond(call_id, reply.result)
        except MessageTooLarge as error:
            self._conversation.refuse(call_id, ErrorBody(error.status, error.type_name, error.message))

    # Outcomes.

    def _answer_error(self, call_id: int, body: ErrorBody) -> None:
        """Answers a call that may have run with an error."""
        if call_id in self._kept:
            self._finish(call_id, Reply(error=body))
        else:
            self._conversation.refuse(call_id, body)

    def _handler_returned(self, call_id: int, method: Method, result: Any, flags: int, deadline: float) -> None:
        if self._traffic.is_closed and self._is_unwanted(call_id):
            return
        if flags & _ITEMS:
            self._forget(call_id)
        try:
            octets = encode_json(result) if flags & _JSON else encode_msgpack(result)
            max_size = method.options.max_size
            if max_size is not None and len(octets) > max_size:
                raise MessageTooLarge(f"the result is {len(octets)} bytes, and {max_size} are allowed")
            if self._kept and call_id in self._kept:
                self._finish(call_id, Reply(octets))
            else:
                respond = self._respond
                respond(call_id, octets)
        except MessageTooLarge as error:
            _log.error("{method}: {error}", method=method.full_name, error=error.message)
            self._answer_error(call_id, ErrorBody(error.status, error.type_name, error.message))
        except Exception as error:
            self._handler_failed(call_id, method, error, flags, deadline)

    def _handler_failed(self, call_id: int, method: Method, error: BaseException, flags: int, deadline: float) -> None:
        if self._is_unwanted(call_id):
            # Nobody waits for the answer; what went wrong is still worth a line, unless it is this very end.
            if not isinstance(error, _ENDINGS):
                self._log_failure(method, error, "")
            return
        if flags & _ITEMS:
            self._forget(call_id)
        json = flags & _JSON != 0
        if isinstance(error, Error) and "_travels" in error.__dict__:
            if isinstance(error, MessageTooLarge):
                _log.error("{method}: {error}", method=method.full_name, error=error.message)
            self._answer_error(call_id, ErrorBody(error.status, error.type_name, error.message))
            return
        declared = method.error_for(error)
        if isinstance(error, TryLater):
            self._put_off(call_id, declared or error_type(TryLater), error, json=json)
            return
        if declared is None and isinstance(error, DeadlineExceeded) and deadline - self._clock() < _ROUNDING:
            # The call's own, which a call that the handler made has seen first.
            body = ErrorBody(Status.DEADLINE_EXCEEDED, DeadlineExceeded.__name__, "the deadline passed in a call below")
            self._answer_error(call_id, body)
            return
        if declared is not None and isinstance(error, Error):
            try:
                detail = declared.encode(error, json) if declared.fields.__struct_fields__ else b""
                self._answer_error(call_id, ErrorBody(error.status, declared.name, str(error.message), detail))
            except Exception as unsendable:
                error = unsendable
            else:
                return
        incident = secrets.token_hex(6)
        self._log_failure(method, error, incident)
        text = f"internal error; the server's log has it as incident {incident}"
        fields = {"incident": incident}
        detail = msgspec.json.encode(fields) if json else msgspec.msgpack.encode(fields)
        self._answer_error(call_id, ErrorBody(Status.INTERNAL, Internal.__name__, text, detail))

    def _put_off(self, call_id: int, declared: ErrorType, error: TryLater, *, json: bool) -> None:
        """Answers a call that the handler has not begun with, so that it may be made again."""
        kept = self._kept.pop(call_id, None)
        if kept is not None and self._keeper is not None:
            self._keeper.sessions.drop(kept)
        if self._conversation.state is not _CLOSED:
            body = ErrorBody(error.status, declared.name, str(error.message), declared.encode(error, json))
            self._conversation.refuse(call_id, body, processed=False)

    def _log_failure(self, method: Method, error: BaseException, incident: str) -> None:
        failure = Failure(error, type(error), error.__traceback__)
        _log.failure(
            "{method} failed (incident {incident})",
            failure=failure,
            method=method.full_name,
            incident=incident or "-",
        )


def _escaped(text: str) -> str:
    """A text that whoever calls may have made up, fit for one line of a log."""
    return text.encode("unicode_escape").decode()


async def _run_chain(chain: Chain) -> Any:
    try:
        return await chain.run()
    except Error as error:
        if error is not chain.innermost_error and type(error) is BY_NAME.get(type(error).__name__):
            # An interceptor refused the call, with an error of the framework's.
            travelling(error)
        raise


async def _send_stream(outlet: Outlet, result: Any) -> None:
    if isinstance(result, CoroutineType | Deferred):
        result = await result
    await outlet.run(result)
