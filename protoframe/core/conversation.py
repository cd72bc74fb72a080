"""The request layer: one end of a conversation, over whatever carries frames.

Knows call ids, deadlines, cancellation, the slots that calls take, large messages and how a conversation opens and
ends. It does not know where frames come from, what a method is, or what its arguments say: frames and the time go in
through ``handle_*``, what this end does through the verbs (`request`, `respond`, `refuse`, `cancel`, ...), and
events, frames and the next timer come out through `poll_events`, `outbox` and `next_timer`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from protoframe.core.deadlines import Deadlines
from protoframe.core.events import (
    CallFailed,
    Drained,
    Ended,
    ErrorReceived,
    Event,
    Opened,
    PongReceived,
    RequestCancelled,
    RequestReceived,
    ResponseReceived,
)
from protoframe.core.frames import (
    FIRST_SKIPPED_KIND,
    LONGEST_METADATA,
    LONGEST_METHOD,
    ErrorBody,
    Flag,
    Frame,
    GoAway,
    Hello,
    Kind,
    cut,
    parse_remaining,
    parse_request,
    parse_total,
)
from protoframe.core.limits import Limits
from protoframe.core.messages import SLACK, Assembler, Outbox
from protoframe.core.state import TRANSITIONS, Input, Role, State
from protoframe.errors import (
    Cancelled,
    ConnectionLost,
    DeadlineExceeded,
    Error,
    GoingAway,
    LocalProtocolError,
    MessageTooLarge,
    RemoteProtocolError,
    Status,
    TooManyCalls,
)

__all__ = ["Conversation"]


class _Waiting(msgspec.Struct):
    """A call of this end that waits for a slot."""

    call_id: int
    method: bytes
    metadata: bytes
    arguments: bytes
    deadline: float
    flags: int


_CALLS = frozenset({State.OPEN, State.LEAVING})
_SERVES = frozenset({State.OPEN, State.LEFT})
_ENDS = frozenset({State.LEAVING, State.LEFT, State.DRAINING})

_REQUEST = int(Kind.REQUEST)
_RESPONSE = int(Kind.RESPONSE)
_ERROR = int(Kind.ERROR)
_CHUNK = int(Kind.CHUNK)
_MORE = int(Flag.MORE)
_JSON = int(Flag.JSON)
_NOT_PROCESSED = int(Flag.NOT_PROCESSED)
_KINDS = frozenset(int(kind) for kind in Kind)
_MESSAGE_KINDS = (_REQUEST, _RESPONSE, _ERROR)

#: PONGs that may wait to be sent.
_MOST_PONGS = 1000

#: Under this id, which no call has, stands the deadline of the handshake.
_HANDSHAKE = 0


class Conversation:
    """One end of a conversation.

    :ivar state: where the conversation stands.
    :ivar peer: the peer's settings, once its HELLO has come.
    :ivar events: what happened and was not polled yet.
    :ivar next_timer: gives the time at which `handle_timer` wants to be called; infinity for never.  It may be earlier
        than anything is due: a timer that finds nothing to do is cheaper than one that is moved at each call.
    :ivar outbox: what the carrier is to send: `Outbox.poll` gives it.
    :param role: which end this is.
    :param limits: what this end takes.
    :param now: the time, in seconds of the clock that all other times given to this object come from.
    :param agent: told to the peer in HELLO.
    """

    def __init__(self, role: Role, limits: Limits, now: float, agent: str = "") -> None:
        self.state = State.GREETING
        # What the state allows, for the paths that every call takes.
        self._calls = False
        self._serves = False
        self._ends = False
        self.peer: Hello | None = None
        self._now = now
        self._limits = limits
        self._own_parity = role.value
        self._next_call_id = 2 - role.value
        self._last_incoming = 0
        # What `go_away` said of it: the calls up to this one are answered in any case.
        self._last_promised = 0
        # Calls of this end whose outcome is open: by id, what the caller knows them by; None once the caller gave up.
        self._outgoing: dict[int, Any] = {}
        # Of these, the ones that wait for a slot at the peer.
        self._waiting: dict[int, _Waiting] = {}
        # Calls of the peer that take a slot here.
        self._incoming: set[int] = set()
        # Of these, the ones that have a deadline to watch.
        self._suspended: set[int] = set()
        self._assembler = Assembler(limits.max_unfinished)
        self.outbox = Outbox(limits.max_frame)
        self._deadlines = Deadlines(self._is_awaited)
        self.next_timer = self._deadlines.earliest
        self._deadlines.add(_HANDSHAKE, now + limits.handshake_timeout)
        self.events: list[Event] = []
        self._peer_slots = 0
        self._pongs = 0
        self._peer_max_message = 0
        hello = Hello(
            max_frame=limits.max_frame,
            max_message=limits.max_message,
            max_unfinished=limits.max_unfinished,
            max_calls=limits.max_calls,
            agent=cut(agent).decode(),
        )
        self.outbox.put_control(Kind.HELLO, 0, hello.serialize())

    # What goes in from below.

    def handle_frames(self, frames: Iterable[Frame], now: float) -> None:
        """Takes frames from the carrier, in the order in which they came.

        A fault of the peer's ends the conversation: GOAWAY says why, and `Ended` follows.
        """
        self._now = now
        try:
            for frame in frames:
                kind, flags, call_id, payload = frame
                if kind == _RESPONSE and not flags & _MORE:
                    self._handle_response(call_id, payload)
                elif kind == _REQUEST and not flags & _MORE and self._serves:
                    self._handle_request(flags, call_id, payload, now)
                else:
                    self._handle_other(frame)
                    if self.state is State.CLOSED:
                        return
        except RemoteProtocolError as error:
            self.end(error)

    def handle_timer(self, now: float) -> None:
        """Does what is due by now; to be called at `next_timer`, or later."""
        self._now = now
        for call_id in self._deadlines.pop_due(now):
            if call_id == _HANDSHAKE:
                self.end(RemoteProtocolError(f"no HELLO within {self._limits.handshake_timeout:g} s"))
                return
            if self._assembler.is_on_the_way(call_id, Kind.REQUEST):
                self._assembler.stop_holding(call_id)
                text = "the deadline passed before the request was here"
                body = ErrorBody(Status.DEADLINE_EXCEEDED, DeadlineExceeded.__name__, text)
                self.refuse(call_id, body, processed=False)
            elif call_id in self._suspended:
                self._suspended.discard(call_id)
                self.events.append(RequestCancelled(call_id, True))
            else:
                self._give_up(call_id, DeadlineExceeded("the deadline passed before the answer came"))

    # What goes in from above.

    def request(
        self,
        method: bytes,
        arguments: bytes,
        token: Any,
        deadline: float,
        now: float,
        metadata: bytes = b"",
        json: bool = False,
    ) -> int:
        """Calls the peer, or lines the call up where all its slots are taken; returns the call's id.

        Exactly one of `ResponseReceived`, `ErrorReceived` and `CallFailed` with the token follows.

        :param deadline: when the call fails if it has no answer by then, in this conversation's time.
        :raises GoingAway: the conversation takes no new calls.
        :raises MessageTooLarge: the arguments are more than the peer takes.
        :raises TooManyCalls: too many calls wait for a slot.
        :raises LocalProtocolError: the conversation is not open, or the name (1 to 255 octets) or the metadata (65,535
            octets at most) does not fit a REQUEST.
        """
        if not self._calls:
            raise self._not_open()
        if not 0 < len(method) <= LONGEST_METHOD or len(metadata) > LONGEST_METADATA:
            raise LocalProtocolError(
                f"{len(method)} octets of name and {len(metadata)} of metadata do not fit a REQUEST"
            )
        self._now = now
        if len(arguments) > self._peer_max_message:
            raise _not_run(
                MessageTooLarge(
                    f"the arguments are {len(arguments)} bytes, and the peer takes {self._peer_max_message}"
                ),
            )
        call_id = self._next_call_id
        flags = _JSON if json else 0
        if len(self._outgoing) >= self._peer_slots:
            if len(self._waiting) >= self._limits.max_waiting:
                raise _not_run(TooManyCalls(f"{len(self._waiting)} calls wait for a slot already"))
            self._waiting[call_id] = _Waiting(call_id, method, metadata, arguments, deadline, flags)
        else:
            self.outbox.put_request(call_id, flags, deadline - now, method, metadata, arguments)
        self._next_call_id = call_id + 2
        self._outgoing[call_id] = token
        self._deadlines.add(call_id, deadline)
        return call_id

    def cancel(self, call_id: int, error: Error | None = None) -> None:
        """Gives a call of this end up: `CallFailed` with the error follows, and the peer is told.

        A call that has its outcome already is left as it is.
        """
        self._give_up(call_id, error if error is not None else Cancelled("cancelled by the caller"))

    def respond(self, call_id: int, result: bytes) -> None:
        """Answers a call of the peer with its encoded result.

        :raises MessageTooLarge: the result is more than the peer takes; the call still wants its answer.
        """
        if len(result) > self._peer_max_message:
            raise MessageTooLarge(f"the result is {len(result)} bytes, and the peer takes {self._peer_max_message}")
        self._leave_slot(call_id)
        self.outbox.put(_RESPONSE, 0, call_id, result)
        if self._ends:
            self._check_drained()

    def refuse(self, call_id: int, body: ErrorBody, *, processed: bool = True) -> None:
        """Answers a call of the peer with an error; ``processed=False`` promises that nothing was done."""
        message = body.serialize()
        self._leave_slot(call_id)
        self.outbox.put(_ERROR, 0 if processed else _NOT_PROCESSED, call_id, message)
        if self._ends:
            self._check_drained()

    def suspend(self, call_id: int, deadline: float) -> None:
        """Says that a call of the peer goes on: at its deadline `RequestCancelled` asks for its end."""
        if call_id in self._incoming:
            self._suspended.add(call_id)
            self._deadlines.add(call_id, deadline)

    def ping(self, payload: bytes) -> None:
        """Sends a PING; `PongReceived` with the same 8 octets follows.

        :raises LocalProtocolError: the payload is not 8 octets.
        """
        if len(payload) != 8:
            raise LocalProtocolError(f"a PING carries 8 octets, not {len(payload)}")
        self.outbox.put_control(Kind.PING, 0, payload)

    def go_away(self, text: str = "") -> None:
        """Says that no new call will be taken; what runs goes on, and `Drained` tells when it ended."""
        if self.state is State.GREETING:
            self.end(None)
            return
        if not self._serves:
            return
        self._last_promised = self._last_incoming
        self.outbox.put_control(Kind.GOAWAY, 0, GoAway(0, self._last_promised, text).serialize())
        self._move(Input.GOAWAY_SENT)
        self._check_drained()

    def end(self, error: Error | None = None) -> None:
        """Ends the conversation: every call of this end fails, every call of the peer is cancelled.

        Where the peer is at fault (a `RemoteProtocolError`, a `VersionMismatch`), GOAWAY tells it so.
        """
        if self.state is State.CLOSED:
            return
        if error is not None and not isinstance(error, ConnectionLost):
            goaway = GoAway(error.status, self._last_incoming, error.message)
            self.outbox.put_control(Kind.GOAWAY, 0, goaway.serialize())
        self._move(Input.ENDED)
        self._deadlines.clear()
        unsent = self.outbox.drop_all() | self._waiting.keys()
        why = error.message if error is not None else "the connection was closed"
        for call_id, token in self._outgoing.items():
            if token is not None:
                lost = ConnectionLost(why)
                lost.may_have_run = call_id not in unsent
                self.events.append(CallFailed(token, lost))
        self._outgoing.clear()
        self._waiting.clear()
        for call_id in sorted(self._incoming):
            if not self._assembler.is_on_the_way(call_id, Kind.REQUEST):
                self.events.append(RequestCancelled(call_id, False))
        self._assembler.clear()
        self._incoming.clear()
        self._suspended.clear()
        self.events.append(Ended(error))

    # What comes out.

    def poll_events(self) -> list[Event]:
        """What happened since the last time."""
        events = self.events
        if events:
            self.events = []
        return events

    @property
    def running(self) -> int:
        """Calls of the peer that take a slot here."""
        return len(self._incoming)

    @property
    def pending(self) -> int:
        """Calls of this end whose slot, here or at the peer, is not free yet."""
        return len(self._outgoing)

    # Frames of the peer.

    def _handle_request(self, flags: int, call_id: int, message: bytes, begun: float) -> None:
        if call_id & 1 == self._own_parity or not call_id:
            raise RemoteProtocolError(f"REQUEST: {call_id} is no call id of the peer's")
        if call_id in self._incoming:
            raise RemoteProtocolError(f"REQUEST: call {call_id} is open already")
        remaining, method, metadata, arguments = parse_request(message)
        if call_id > self._last_incoming:
            self._last_incoming = call_id
        self._incoming.add(call_id)
        if len(self._incoming) > self._limits.max_calls:
            text = f"{self._limits.max_calls} calls are in flight on this connection already"
            self.refuse(call_id, ErrorBody(Status.RESOURCE_EXHAUSTED, TooManyCalls.__name__, text), processed=False)
            return
        if len(arguments) > self._limits.max_message:
            self._refuse_too_large(call_id, len(arguments))
            return
        self.events.append(
            RequestReceived(call_id, method, begun + remaining, metadata, arguments, flags & _JSON != 0),
        )

    def _handle_response(self, call_id: int, message: bytes) -> None:
        if self._waiting or self._assembler.messages or self.outbox.large:
            token = self._settle(call_id)
        else:
            # What is left of `_settle` where there is nothing out of the ordinary.
            token = self._outgoing.pop(call_id, self)
            if token is self:
                raise RemoteProtocolError(f"an answer to call {call_id}, which is not open")
        if token is not None:
            self.events.append(ResponseReceived(token, message))
        if self._ends:
            self._check_drained()

    def _handle_error(self, flags: int, call_id: int, message: bytes) -> None:
        body = ErrorBody.parse(message)
        token = self._settle(call_id)
        if token is not None:
            self.events.append(ErrorReceived(token, body, not flags & _NOT_PROCESSED))
        if self._ends:
            self._check_drained()

    def _handle_other(self, frame: Frame) -> None:
        """Every frame but the common ones: unary, whole, in an open conversation."""
        kind, flags, call_id, payload = frame
        if self.state is State.CLOSED:
            return
        if kind == Kind.GOAWAY:
            self._handle_goaway(GoAway.parse(payload))
        elif kind == Kind.HELLO:
            self._handle_hello(Hello.parse(payload))
        elif kind >= FIRST_SKIPPED_KIND:
            pass
        elif kind not in _KINDS:
            raise RemoteProtocolError(f"a frame of unknown kind 0x{kind:02x}")
        elif self.peer is None and self.state is State.GREETING:
            raise RemoteProtocolError(f"{Kind(kind).name} before HELLO")
        elif kind in _MESSAGE_KINDS and flags & _MORE:
            self._begin_message(frame)
        elif kind == _CHUNK:
            self._continue_message(frame)
        elif kind == _REQUEST:
            self._handle_late_request(call_id)
        elif kind == _ERROR:
            self._handle_error(flags, call_id, payload)
        elif kind == Kind.CANCEL:
            self._handle_cancel(call_id)
        elif len(payload) != 8:
            raise RemoteProtocolError(f"{Kind(kind).name}: {len(payload)} octets, not 8")
        elif kind == Kind.PING:
            self._pongs = self._pongs + 1 if self.outbox else 1
            if self._pongs > _MOST_PONGS:
                raise RemoteProtocolError(f"{_MOST_PONGS} PINGs whose answers are not waited for")
            self.outbox.put_control(Kind.PONG, 0, payload)
        else:
            self.events.append(PongReceived(payload))

    def _handle_hello(self, hello: Hello) -> None:
        if self.peer is not None:
            raise RemoteProtocolError("a second HELLO")
        self.peer = hello
        self.outbox.max_frame = hello.max_frame
        self.outbox.max_unfinished = hello.max_unfinished
        self._peer_slots = hello.max_calls
        self._peer_max_message = hello.max_message
        if self.state is State.GREETING:
            self._move(Input.HELLO_RECEIVED)
            self.events.append(Opened(hello))

    def _handle_goaway(self, goaway: GoAway) -> None:
        if goaway.status:
            self._fail_unprocessed(goaway.last_call_id, ConnectionLost, goaway.text)
            self.end(ConnectionLost(f"the peer ended the conversation: {goaway.text}"))
            return
        if (self.state, Input.GOAWAY_RECEIVED) not in TRANSITIONS:
            raise RemoteProtocolError(f"GOAWAY in state {self.state.value}")
        self._move(Input.GOAWAY_RECEIVED)
        self._fail_unprocessed(goaway.last_call_id, GoingAway, goaway.text or "the peer takes no new calls")
        self._check_drained()

    def _fail_unprocessed(self, last_call_id: int, error: type[Error], text: str) -> None:
        """Fails the calls of this end that a GOAWAY with this last call id rules out, and those that were not sent."""
        failed = [call_id for call_id in self._outgoing if call_id > last_call_id or call_id in self._waiting]
        # First of all: a slot that comes free must not start one of them.
        self._waiting.clear()
        for call_id in failed:
            token = self._settle(call_id)
            if token is not None:
                self.events.append(CallFailed(token, _not_run(error(text))))

    def _handle_late_request(self, call_id: int) -> None:
        """A request that was on the way when GOAWAY was sent.

        Requests may overtake each other, so its id may be one of those that GOAWAY said would be answered; to a later
        one the caller expects no answer.
        """
        if call_id & 1 == self._own_parity or not call_id:
            raise RemoteProtocolError(f"REQUEST: {call_id} is no call id of the peer's")
        if call_id <= self._last_promised:
            body = ErrorBody(Status.UNAVAILABLE, GoingAway.__name__, "this end takes no new calls")
            self.outbox.put(_ERROR, _NOT_PROCESSED, call_id, body.serialize())

    def _handle_cancel(self, call_id: int) -> None:
        if call_id & 1 == self._own_parity or not call_id:
            raise RemoteProtocolError(f"CANCEL: {call_id} is no call id of the peer's")
        if self._assembler.is_on_the_way(call_id, Kind.REQUEST):
            # Its rest will not come.  Where it was refused already, nobody waits for an answer.
            self._assembler.discard(call_id)
            if call_id in self._incoming:
                self.refuse(call_id, ErrorBody(Status.CANCELLED, "Cancelled", ""), processed=False)
        elif call_id in self._incoming:
            self.events.append(RequestCancelled(call_id, False))
        elif self.outbox.drop(call_id) is not None:
            # The result is half sent, or not yet: the caller hears at once that no more of it comes.
            self.outbox.put(_ERROR, 0, call_id, ErrorBody(Status.CANCELLED, "Cancelled", "").serialize())

    def _refuse_too_large(self, call_id: int, length: int) -> None:
        text = f"the arguments are {length} bytes, and this end takes {self._limits.max_message}"
        self.refuse(call_id, ErrorBody(Status.RESOURCE_EXHAUSTED, MessageTooLarge.__name__, text), processed=False)

    # Messages in several frames.

    def _begin_message(self, frame: Frame) -> None:
        kind, _, call_id, payload = frame
        total, part = parse_total(payload)
        if kind != _ERROR and self._assembler.is_on_the_way(call_id, Kind(kind)):
            raise RemoteProtocolError(f"{Kind(kind).name}: a message of call {call_id} is on the way already")
        wanted = True
        if kind == _REQUEST:
            wanted = self._begin_request(call_id, total, part)
        elif call_id not in self._outgoing:
            raise RemoteProtocolError(f"{Kind(kind).name}: call {call_id} is not open")
        elif total > self._limits.max_message + (SLACK if kind == _ERROR else 0):
            wanted = False
            text = f"the answer is {total} bytes, and this end takes {self._limits.max_message}"
            self._give_up(call_id, MessageTooLarge(text))
        elif self._outgoing[call_id] is None:
            wanted = False
        self._assembler.begin(frame, total, part, self._now, wanted=wanted)
        if len(self._assembler) > 2 * self._limits.max_calls + len(self._outgoing):
            raise RemoteProtocolError(f"{len(self._assembler)} messages are on the way at once")

    def _begin_request(self, call_id: int, total: int, part: bytes) -> bool:
        """Whether the rest of a large request is wanted; where it is not, the refusal is sent."""
        if call_id & 1 == self._own_parity or not call_id:
            raise RemoteProtocolError(f"REQUEST: {call_id} is no call id of the peer's")
        if call_id in self._incoming:
            raise RemoteProtocolError(f"REQUEST: call {call_id} is open already")
        remaining = parse_remaining(part)
        if not self._serves:
            self._handle_late_request(call_id)
            return False
        self._last_incoming = max(self._last_incoming, call_id)
        self._incoming.add(call_id)
        if len(self._incoming) > self._limits.max_calls:
            text = f"{self._limits.max_calls} calls are in flight on this connection already"
            self.refuse(call_id, ErrorBody(Status.RESOURCE_EXHAUSTED, TooManyCalls.__name__, text), processed=False)
            return False
        if total > self._limits.max_message + SLACK:
            self._refuse_too_large(call_id, total)
            return False
        self.suspend(call_id, self._now + remaining)
        return True

    def _continue_message(self, frame: Frame) -> None:
        message = self._assembler.go_on(frame)
        if message is None:
            return
        call_id = frame[2]
        if message.parts is None:
            if message.kind != _REQUEST:
                self._settle(call_id)
                self._check_drained()
            return
        whole = message.whole()
        if message.kind == _RESPONSE:
            self._handle_response(call_id, whole)
        elif message.kind == _ERROR:
            self._handle_error(message.flags, call_id, whole)
        else:
            # The slot was taken by the first frame, and the time runs from there.
            self._leave_slot(call_id)
            self._handle_request(message.flags, call_id, whole, message.begun)

    # Outcomes.

    def _settle(self, call_id: int) -> Any:
        """Frees the slot of a call of this end; what its caller knows it by, or ``None`` where nobody waits."""
        if self._waiting and call_id in self._waiting:
            raise RemoteProtocolError(f"an answer to call {call_id}, which was not made yet")
        try:
            token = self._outgoing.pop(call_id)
        except KeyError:
            raise RemoteProtocolError(f"an answer to call {call_id}, which is not open") from None
        if self._assembler.messages:
            self._assembler.discard(call_id)
        if self.outbox.large and self.outbox.drop(call_id):
            # Answered, that is refused, before it was all sent: the peer is told that no more of it comes.
            self.outbox.put_control(Kind.CANCEL, call_id)
        if self._waiting:
            self._start_waiting()
        return token

    def _start_waiting(self) -> None:
        free = self._peer_slots - (len(self._outgoing) - len(self._waiting))
        while free > 0 and self._waiting and self._calls:
            call = self._waiting.pop(next(iter(self._waiting)))
            free -= 1
            self.outbox.put_request(
                call.call_id,
                call.flags,
                call.deadline - self._now,
                call.method,
                call.metadata,
                call.arguments,
            )

    def _give_up(self, call_id: int, error: Error) -> None:
        """The caller stops waiting; the slot is free when the peer has answered."""
        token = self._outgoing.get(call_id)
        if token is None:
            return
        if self._waiting.pop(call_id, None) is not None or (begun := self.outbox.drop(call_id)) is False:
            # Nothing of it was sent.
            self._settle(call_id)
            self.events.append(CallFailed(token, _not_run(error)))
            self._check_drained()
            return
        if begun:
            # The peer has no use for half a request.
            error.may_have_run = False
        self._assembler.stop_holding(call_id)
        self._outgoing[call_id] = None
        self.events.append(CallFailed(token, error))
        self.outbox.put_control(Kind.CANCEL, call_id)

    def _is_awaited(self, call_id: int) -> bool:
        """Whether a deadline, of a call of this end or of the peer's or of the handshake, still means something."""
        if call_id == _HANDSHAKE:
            return self.state is State.GREETING
        return self._outgoing.get(call_id) is not None or call_id in self._suspended

    def _leave_slot(self, call_id: int) -> None:
        try:
            self._incoming.remove(call_id)
        except KeyError:
            raise LocalProtocolError(f"call {call_id} is not open") from None
        if self._suspended:
            self._suspended.discard(call_id)

    # The end.

    def _move(self, happened: Input) -> None:
        try:
            self.state = TRANSITIONS[self.state, happened]
        except KeyError:
            raise LocalProtocolError(f"{happened.value} in state {self.state.value}") from None
        self._calls = self.state in _CALLS
        self._serves = self.state in _SERVES
        self._ends = self.state in _ENDS

    def _check_drained(self) -> None:
        if self._ends and not self._outgoing and not self._incoming:
            self.events.append(Drained())

    def _not_open(self) -> Error:
        if self._ends:
            return _not_run(GoingAway("the conversation is ending and takes no new calls"))
        if self.state is State.CLOSED:
            return _not_run(ConnectionLost("the connection is closed"))
        return _not_run(LocalProtocolError("the conversation is not open yet"))


def _not_run(error: Error) -> Error:
    error.may_have_run = False
    return error
