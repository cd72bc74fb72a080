"""Calls of the peer: each request finds its method, runs its handler, and gets one answer.

Knows Protocols, handlers and what their results and errors become; not what carries the answers, nor when they are
sent.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context, copy_context
from types import CoroutineType
from typing import Any

import msgspec
from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from protoframe._context import NO_METADATA, Scope, decode_metadata, scope
from protoframe._handler import RunningHandler
from protoframe._protocol import Protocol
from protoframe.core.conversation import Conversation
from protoframe.core.events import RequestCancelled, RequestReceived
from protoframe.core.frames import ErrorBody
from protoframe.core.schema import Method, encode_json, encode_msgpack
from protoframe.core.state import State
from protoframe.errors import (
    Cancelled,
    DeadlineExceeded,
    Error,
    Internal,
    InvalidArgument,
    MessageTooLarge,
    Status,
    UnknownMethod,
)

__all__ = ["BACKLOG", "MethodTable", "Server"]

#: What is served: by the name on the wire, the method and which of the connection's Protocols has it.
MethodTable = Mapping[bytes, tuple[Method, int]]

_CLOSED = State.CLOSED

#: Octets of answers that may wait to be sent while more requests are served.
BACKLOG = 1024 * 1024


class Server:
    """Serves the requests of one conversation.

    :param conversation: where the requests come from, and the answers go.
    :param table: the methods that are served.
    :param protocols: the instances that serve them.
    :param max_nesting: of values whose type does not bound it.
    :param clock: gives the time.
    :param address: the peer's.
    :param wake: called when there is something to send that no event of the conversation led to.
    :ivar held: requests that wait until answers have been sent.
    """

    log = Logger(namespace="protoframe.server")

    def __init__(
        self,
        conversation: Conversation,
        table: MethodTable,
        protocols: Sequence[Protocol[Any]],
        max_nesting: int,
        clock: Callable[[], float],
        address: Any,
        wake: Callable[[], None],
    ) -> None:
        self._conversation = conversation
        self._table = table
        self._protocols = protocols
        self._max_nesting = max_nesting
        self._clock = clock
        self._address = address
        self._wake = wake
        self._running: dict[int, RunningHandler] = {}
        self.held: deque[RequestReceived] = deque()
        # Calls that were cancelled while they ran, and the error that they end with whatever their handler says.
        self._verdicts: dict[int, Error] = {}

    def hold(self, event: RequestReceived) -> None:
        """Keeps a request until the answers that wait have been sent."""
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
                self._refuse(event.call_id, DeadlineExceeded("the deadline passed before the call was served"))
        return len(self.held) < before

    def cancel(self, event: RequestCancelled) -> None:
        """Asks a handler to end; a request that waits is not served."""
        if self._conversation.state is _CLOSED:
            self.held.clear()
        running = self._running.get(event.call_id)
        if running is not None:
            self._verdicts[event.call_id] = (
                DeadlineExceeded("the deadline passed while the call was served") if event.expired else Cancelled()
            )
            running.cancel()
            return
        for held in self.held:
            if held.call_id == event.call_id:
                self.held.remove(held)
                self._refuse(event.call_id, Cancelled())
                return

    def _refuse(self, call_id: int, error: Error) -> None:
        """Answers a call that certainly did not run."""
        body = ErrorBody(error.status, error.type_name, error.message)
        self._conversation.refuse(call_id, body, processed=False)

    def serve(self, event: RequestReceived) -> None:
        """Serves a request."""
        entry = self._table.get(event.method)
        if entry is None or entry[0].function is None:
            name = event.method.decode("utf-8", "replace")
            text = f"there is no method {name}" if entry is None else f"{name} is declared here, but not served"
            self._refuse(event.call_id, UnknownMethod(text))
            return
        method, index = entry
        max_size = method.options.max_size
        if max_size is not None and len(event.arguments) > max_size:
            text = f"the arguments are {len(event.arguments)} bytes, and {max_size} are allowed"
            self._refuse(event.call_id, MessageTooLarge(text))
            return
        try:
            arguments = method.decode_arguments(event.arguments, self._max_nesting, json=event.json)
            received = decode_metadata(event.metadata) if event.metadata else NO_METADATA
        except InvalidArgument as error:
            self._refuse(event.call_id, error)
            return
        except Exception as error:
            # A type of the user's that fails in a way of its own, in ``__post_init__``, say.
            self._handler_failed(event.call_id, method, error, event.json)
            return
        context = copy_context()
        context.run(self._begin, context, event, method, self._protocols[index], arguments, received)

    def _begin(
        self,
        context: Context,
        event: RequestReceived,
        method: Method,
        protocol: Protocol[Any],
        arguments: tuple[Any, ...],
        received: Mapping[str, str],
    ) -> None:
        scope.set(Scope(self._clock, event.deadline, b"", method.full_name, self._address, received))
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

    def _run(self, context: Context, event: RequestReceived, method: Method) -> RunningHandler:
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
            self._wake()

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
                self._conversation.refuse(call_id, ErrorBody(error.status, declared.name, str(error.message), detail))
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
