"""The request layer: one end of a conversation, over whatever carries frames.

Knows call ids, deadlines, cancellation, the slots that calls take, streams, large messages and how a conversation
opens, stays alive and ends.  It does not know where frames come from, what a method is, or what its arguments say:
frames and the time go in through ``handle_*``, what this end does through the verbs (`request`, `respond`, `refuse`,
`cancel`, ...), and events, frames and the next timer come out through `poll_events`, `outbox` and `next_timer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from protoframe.core.credit import Granted, Received, cost_of
from protoframe.core.deadlines import Deadlines
from protoframe.core.events import (
    CallFailed,
    CreditReceived,
    Drained,
    Ended,
    EndReceived,
    ErrorReceived,
    Event,
    Greeted,
    ItemsReceived,
    Opened,
    PongReceived,
    RequestCancelled,
    RequestDropped,
    RequestReceived,
    ResponseReceived,
)
from protoframe.core.floods import Allowance
from protoframe.core.frames import (
    ARRAY_HEAD,
    COUNT,
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
    parse_count,
    parse_credit,
    parse_first_part,
    parse_request,
    parse_total,
    serialize_credit,
)
from protoframe.core.limits import Limits
from protoframe.core.messages import SLACK, Assembler, Outbox
from protoframe.core.state import TRANSITIONS, Input, Role, State
from protoframe.errors import (
    BY_STATUS,
    CancelFlood,
    Cancelled,
    ConnectionLost,
    DeadlineExceeded,
    Error,
    GoingAway,
    HandshakeTimeout,
    KeepaliveTimeout,
    LocalProtocolError,
    MessageTooLarge,
    PingFlood,
    RemoteProtocolError,
    Status,
    TooManyCalls,
    Unimplemented,
    WriteTimeout,
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
_ITEM = int(Kind.ITEM)
_MORE = int(Flag.MORE)
_NOT_PROCESSED = int(Flag.NOT_PROCESSED)
_ITEMS = int(Flag.ITEMS)
_STREAM = int(Flag.STREAM)
_ONEWAY = int(Flag.ONEWAY)
_STREAMS = _ITEMS | _STREAM
_KINDS = frozenset(int(kind) for kind in Kind)
_MESSAGE_KINDS = (_REQUEST, _RESPONSE, _ERROR, _ITEM)

# What a HELLO has room for beside the numbers.
LONGEST_AGENT_AND_TOKEN = 1850

# Under these ids, which no call has, stand deadlines of the conversation itself.
_HANDSHAKE = 0
_KEEPALIVE = -1
_BLOCKED = -2

_KEEPALIVE_PAYLOAD = bytes(8)

#: PINGs above what `Limits` allow, of which the last ends the conversation.
_STRIKES = 2

# How often this end tells the peer of a deadline that passed: less often than a peer takes for a flood.  The peer
# knows the deadline too; that it is told only saves it some work.
_EXPIRED_BURST = 500
_EXPIRED_RATE = 16.0


def _unbounded(_: Any) -> int | None:
    return None


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
    :param token: shows the peer who this end is.
    :param max_arguments: gives the octets that the arguments of a method of this end may have, where they are bounded.
    :param max_result: gives those of the result, or of one item, of a call of this end, by its token.
    :param asks_first: whether the peer's greeting is looked at before this end greets: `Greeted` comes, and `greet`
        opens the conversation.
    """

    def __init__(
        self,
        role: Role,
        limits: Limits,
        now: float,
        agent: str = "",
        token: str = "",
        max_arguments: Callable[[bytes], int | None] = _unbounded,
        max_result: Callable[[Any], int | None] = _unbounded,
        asks_first: bool = False,
    ) -> None:
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
        # The highest of those that came after that: items of theirs may follow.
        self._last_late = 0
        # Calls of this end whose outcome is open: by id, what the caller knows them by; None once the caller gave up.
        self._outgoing: dict[int, Any] = {}
        # Of these, the ones that wait for a slot at the peer.
        self._waiting: dict[int, _Waiting] = {}
        # Calls of the peer that take a slot here.
        self._incoming: set[int] = set()
        # Of these, the ones that have a deadline to watch.
        self._suspended: set[int] = set()
        # And those that want no answer.
        self._oneway: set[int] = set()
        # And those of whose answer items were sent.
        self._streaming: set[int] = set()
        self._granted = Granted(limits.stream_credit, limits.connection_credit)
        self._credit = Received()
        self._max_arguments = max_arguments
        self._max_result = max_result
        self._assembler = Assembler(limits.max_unfinished)
        self.outbox = Outbox(limits.max_frame)
        self._deadlines = Deadlines(self._is_awaited)
        self.next_timer = self._deadlines.earliest
        self._deadlines.add(_HANDSHAKE, now + limits.handshake_timeout)
        self.events: list[Event] = []
        self._peer_slots = 0
        self._peer_max_message = 0
        self._cancels = Allowance(max(limits.cancel_burst, limits.max_calls), limits.cancel_rate, now)
        self._expiries = Allowance(_EXPIRED_BURST, _EXPIRED_RATE, now)
        self._pings = Allowance(limits.ping_burst, limits.ping_rate, now)
        self._strikes = 0
        # When the peer was heard last; None where it was asked for a sign of life, and has given none.
        self._heard: float | None = now
        # Since when the carrier takes no more; None where it does.
        self._blocked: float | None = None
        self._blocked_is_watched = False
        agent = cut(agent)[: LONGEST_AGENT_AND_TOKEN - len(token)].decode("utf-8", "ignore")
        hello = Hello(
            max_frame=limits.max_frame,
            max_message=limits.max_message,
            max_unfinished=limits.max_unfinished,
            max_calls=limits.max_calls,
            agent=agent,
            stream_credit=limits.stream_credit,
            connection_credit=limits.connection_credit,
            token=token,
        )
        self._hello = hello
        self._asks_first = asks_first
        if not asks_first:
            self.outbox.put_control(Kind.HELLO, 0, hello.serialize())

    # What goes in from below.

    def handle_frames(self, frames: Iterable[Frame], now: float) -> None:
        """Takes frames from the carrier, in the order in which they came.

        A fault of the peer's ends the conversation: GOAWAY says why, and `Ended` follows.
        """
        self._now = self._heard = now
        try:
            for frame in frames:
                kind, flags, call_id, payload = frame
                if kind == _RESPONSE and not flags & _MORE:
                    self._handle_response(call_id, payload)
                elif kind == _REQUEST and not flags & _MORE and self._serves:
                    self._handle_request(flags, call_id, payload, now)
                elif kind == _ITEM and not flags & _MORE and self.state is not State.GREETING:
                    count = parse_count(payload)
                    self._handle_items(call_id, count, payload, cost_of(len(payload), count))
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
            if call_id <= _HANDSHAKE:
                self._handle_own_timer(call_id, now)
                if self.state is State.CLOSED:
                    return
                continue
            if self._assembler.is_on_the_way(call_id, Kind.REQUEST):
                self._stop_holding(call_id)
                text = "the deadline passed before the request was here"
                body = ErrorBody(Status.DEADLINE_EXCEEDED, DeadlineExceeded.__name__, text)
                self.refuse(call_id, body, processed=False)
            elif call_id in self._suspended:
                self._suspended.discard(call_id)
                self.events.append(RequestCancelled(call_id, True))
            else:
                error = DeadlineExceeded("the deadline passed before the answer came")
                self._give_up(call_id, error, untold=not self._expiries.take(now))

    def handle_blocked(self, now: float) -> None:
        """The carrier takes no more for now: the peer does not read.  Nor is it read from meanwhile."""
        self._blocked = now
        if self.state is State.CLOSED:
            return
        if not self._blocked_is_watched:
            self._blocked_is_watched = True
            self._deadlines.add(_BLOCKED, now + self._limits.write_timeout)

    def handle_unblocked(self, now: float) -> None:
        """The carrier takes more."""
        self._blocked = None
        self._heard = now

    def _handle_own_timer(self, identifier: int, now: float) -> None:
        limits = self._limits
        if identifier == _HANDSHAKE:
            what = "no HELLO" if self.peer is None else "no conversation"
            self.end(HandshakeTimeout(f"{what} within {limits.handshake_timeout:g} s"))
        elif identifier == _BLOCKED:
            self._blocked_is_watched = False
            if self._blocked is None:
                return
            if now < self._blocked + limits.write_timeout:
                self._blocked_is_watched = True
                self._deadlines.add(_BLOCKED, self._blocked + limits.write_timeout)
                return
            self.end(WriteTimeout(f"the peer read nothing for {limits.write_timeout:g} s"))
        elif self._blocked is not None:
            self._deadlines.add(_KEEPALIVE, now + limits.keepalive_idle)
        elif self._heard is None:
            silent = limits.keepalive_idle + limits.keepalive_timeout
            self.end(KeepaliveTimeout(f"the peer gave no sign of life for {silent:g} s"))
        elif now < self._heard + limits.keepalive_idle:
            self._deadlines.add(_KEEPALIVE, self._heard + limits.keepalive_idle)
        else:
            self._heard = None
            self.outbox.put_control(Kind.PING, 0, _KEEPALIVE_PAYLOAD)
            self._deadlines.add(_KEEPALIVE, now + limits.keepalive_timeout)

    # What goes in from above.

    def request(
        self,
        method: bytes,
        arguments: bytes,
        token: Any,
        deadline: float,
        now: float,
        metadata: bytes = b"",
        flags: int = 0,
    ) -> int:
        """Calls the peer, or lines the call up where all its slots are taken; returns the call's id.

        Exactly one of `ResponseReceived`, `ErrorReceived`, `EndReceived` and `CallFailed` with the token follows, or,
        with ONEWAY among the flags, nothing does.  With ITEMS, `send_items` and `end_items` are to follow; with STREAM,
        `ItemsReceived` may come before the outcome.

        :param deadline: when the call fails if it has no answer by then, in this conversation's time; infinity: never.
        :param flags: JSON, ITEMS, STREAM, ONEWAY.
        :raises Unimplemented: the call has streams, and the peer takes none.
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
        if flags & _ONEWAY:
            if flags & _STREAMS:
                raise LocalProtocolError("a call without an answer has no streams")
            self._next_call_id = call_id + 2
            self.outbox.put_request(call_id, flags, deadline - now, method, metadata, arguments)
            return call_id
        if flags & _STREAMS and (self.peer is None or not self.peer.stream_credit):
            raise _not_run(Unimplemented("the peer takes no streams"))
        if len(self._outgoing) >= self._peer_slots:
            if len(self._waiting) >= self._limits.max_waiting:
                raise _not_run(TooManyCalls(f"{len(self._waiting)} calls wait for a slot already"))
            self._waiting[call_id] = _Waiting(call_id, method, metadata, arguments, deadline, flags)
        else:
            self.outbox.put_request(call_id, flags, deadline - now, method, metadata, arguments)
        self._next_call_id = call_id + 2
        self._outgoing[call_id] = token
        if flags & _STREAMS:
            self._open_streams(call_id, ours=flags & _ITEMS, theirs=flags & _STREAM)
        if deadline != math.inf:
            self._deadlines.add(call_id, deadline)
        return call_id

    def _open_streams(self, call_id: int, *, ours: int, theirs: int) -> None:
        if ours:
            self._credit.open(call_id)
        if theirs:
            self._granted.open(call_id)

    def room(self, call_id: int) -> int:
        """What the items of a stream may cost that are sent now; 0 where they have to wait.

        `CreditReceived`, or the call's id among `Outbox.departed`, tells when to ask again.
        """
        if not self.may_end(call_id):
            return 0
        return max(0, self._credit.left(call_id))

    def send_items(self, call_id: int, count: int, octets: bytes) -> None:
        """Sends items of a stream: of a call of this end with ITEMS, or of the answer to one of the peer's with STREAM.

        :param octets: an array of them, encoded; of several items no more than a frame takes.
        :raises MessageTooLarge: it is more than the peer takes.
        :raises LocalProtocolError: there is no such stream, or `room` is 0.
        """
        if self.room(call_id) <= 0:
            raise LocalProtocolError(f"call {call_id} has no stream to send, or no credit")
        if len(octets) > self._peer_max_message + ARRAY_HEAD:
            raise MessageTooLarge(f"an item is {len(octets)} bytes, and the peer takes {self._peer_max_message}")
        if call_id & 1 != self._own_parity:
            self._streaming.add(call_id)
        message = COUNT.pack(count) + octets
        self._credit.spend(call_id, cost_of(len(message), count))
        self.outbox.put(_ITEM, 0, call_id, message)

    def may_end(self, call_id: int) -> bool:
        """Whether nothing of a stream waits that its end would overtake; where something does, ask as for `room`."""
        return call_id not in self.outbox.cut and call_id not in self._waiting

    def end_items(self, call_id: int) -> None:
        """Ends a stream; of a call of the peer's, that is its answer.

        :raises LocalProtocolError: there is no such stream.
        """
        if call_id not in self._credit.streams:
            raise LocalProtocolError(f"call {call_id} has no stream to end")
        if not self.may_end(call_id):
            raise LocalProtocolError(f"a message of call {call_id} is on the way")
        if call_id & 1 == self._own_parity:
            self._credit.close(call_id)
        else:
            self._leave_slot(call_id)
        self.outbox.put_control(Kind.END, call_id)
        if self._ends:
            self._check_drained()

    def give_back(self, call_id: int, cost: int) -> None:
        """Items that came are taken, or nobody wants them: the peer may send more."""
        self._granted.give_back(call_id, cost)
        self._grant(call_id)

    def _grant(self, call_id: int) -> None:
        """Lets the peer send more, where that is worth a frame."""
        if self.state is not State.CLOSED:
            for grant, octets in self._granted.grants(call_id):
                self.outbox.put_control(Kind.CREDIT, grant, serialize_credit(octets))

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
        if call_id in self._streaming:
            raise LocalProtocolError(f"the answer to call {call_id} is a stream")
        oneway = call_id in self._oneway
        self._leave_slot(call_id)
        if not oneway:
            self.outbox.put(_RESPONSE, 0, call_id, result)
        if self._ends:
            self._check_drained()

    def refuse(self, call_id: int, body: ErrorBody, *, processed: bool = True) -> None:
        """Answers a call of the peer with an error; ``processed=False`` promises that nothing was done."""
        message = body.serialize()
        oneway = call_id in self._oneway
        self._leave_slot(call_id)
        if not oneway:
            # Of a stream part of an item may be on its way; no more of it comes.
            self._drop(call_id)
            self.outbox.put(_ERROR, 0 if processed else _NOT_PROCESSED, call_id, message)
        if self._ends:
            self._check_drained()

    def suspend(self, call_id: int, deadline: float) -> None:
        """Says that a call of the peer goes on: at its deadline `RequestCancelled` asks for its end."""
        if call_id in self._incoming and deadline != math.inf:
            self._suspended.add(call_id)
            self._deadlines.add(call_id, deadline)

    def ping(self, payload: bytes) -> None:
        """Sends a PING; `PongReceived` with the same 8 octets follows.

        :raises LocalProtocolError: the payload is not 8 octets.
        """
        if len(payload) != 8:
            raise LocalProtocolError(f"a PING carries 8 octets, not {len(payload)}")
        if self.state is State.GREETING:
            raise self._not_open()
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
        unsent = {one.call_id for one in self.outbox.cut.values() if one.kind == _REQUEST} | self._waiting.keys()
        self.outbox.drop_all()
        why = error.message if error is not None else "the connection was closed"
        for call_id, token in self._outgoing.items():
            if token is not None:
                lost = type(error)(why) if isinstance(error, ConnectionLost) else ConnectionLost(why)
                lost.__cause__ = error.__cause__ if isinstance(error, ConnectionLost) else error
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
        self._oneway.clear()
        self._streaming.clear()
        self._credit = Received()
        self._granted = Granted(self._limits.stream_credit, self._limits.connection_credit)
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
        if flags & _ONEWAY and flags & _STREAMS:
            raise RemoteProtocolError(f"REQUEST: ONEWAY, and streams, of call {call_id}")
        remaining, method, metadata, arguments = parse_request(message)
        if call_id > self._last_incoming:
            self._last_incoming = call_id
        self._incoming.add(call_id)
        if flags & _ONEWAY:
            self._oneway.add(call_id)
        if len(self._incoming) > self._limits.max_calls:
            self._refuse_one_too_many(call_id, method)
            return
        if len(arguments) > self._limits.max_message:
            self._refuse_too_large(call_id, len(arguments), self._limits.max_message)
            return
        if not remaining:
            text = "the deadline passed before the request was here"
            body = ErrorBody(Status.DEADLINE_EXCEEDED, DeadlineExceeded.__name__, text)
            self.refuse(call_id, body, processed=False)
            return
        if flags & _STREAMS:
            self._open_streams(call_id, ours=flags & _STREAM, theirs=flags & _ITEMS)
        self.events.append(RequestReceived(call_id, method, begun + remaining, metadata, arguments, flags))

    def _refuse_one_too_many(self, call_id: int, method: bytes) -> None:
        if call_id in self._oneway:
            # Its caller does not keep count, for it is not told when a slot is free.
            self.events.append(RequestDropped(method))
        elif len(self._incoming) - len(self._oneway) > self._limits.max_calls and not self._cancels.take(self._now):
            raise CancelFlood(f"more calls are opened than {self._limits.max_calls} at once, again and again")
        text = f"{self._limits.max_calls} calls are in flight on this connection already"
        self.refuse(call_id, ErrorBody(Status.RESOURCE_EXHAUSTED, TooManyCalls.__name__, text), processed=False)

    def _handle_response(self, call_id: int, message: bytes) -> None:
        if (
            self._waiting
            or self._assembler.messages
            or self._credit.streams
            or self._granted.streams
            or self.outbox.large
        ):
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
        elif self.state is State.GREETING:
            raise RemoteProtocolError(f"{Kind(kind).name} before HELLO")
        elif kind in _MESSAGE_KINDS and flags & _MORE:
            self._begin_message(frame)
        elif kind == _CHUNK:
            self._continue_message(frame)
        elif kind == _REQUEST:
            self._handle_late_request(flags, call_id)
        elif kind == _ERROR:
            self._handle_error(flags, call_id, payload)
        elif kind == Kind.CANCEL:
            self._handle_cancel(call_id)
        elif kind == Kind.END:
            self._handle_end(call_id)
        elif kind == Kind.CREDIT:
            if self._credit.add(call_id, parse_credit(payload)):
                self.events.append(CreditReceived(call_id))
        elif len(payload) != 8:
            raise RemoteProtocolError(f"{Kind(kind).name}: {len(payload)} octets, not 8")
        elif kind == Kind.PING:
            if self._pings.is_full(self._now):
                self._strikes = 0
            if not self._pings.take(self._now):
                self._strikes += 1
                if self._strikes >= _STRIKES:
                    raise PingFlood(f"more than {self._limits.ping_burst} PINGs at once")
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
        self._credit.begin(hello.stream_credit, hello.connection_credit)
        if self._asks_first:
            self.events.append(Greeted(hello))
        else:
            self._open(hello)

    def greet(self) -> None:
        """The peer is welcome: greets it, and opens the conversation."""
        if self.state is State.GREETING and self.peer is not None and self._asks_first:
            self.outbox.put_control(Kind.HELLO, 0, self._hello.serialize())
            self._open(self.peer)

    def _open(self, hello: Hello) -> None:
        self._move(Input.HELLO_RECEIVED)
        self._deadlines.add(_KEEPALIVE, self._now + self._limits.keepalive_idle)
        self.events.append(Opened(hello))

    def _handle_goaway(self, goaway: GoAway) -> None:
        if goaway.status:
            self._fail_unprocessed(goaway.last_call_id, ConnectionLost, goaway.text)
            lost = ConnectionLost(f"the peer ended the conversation: {goaway.text}")
            lost.__cause__ = BY_STATUS.get(goaway.status, Error)(goaway.text)
            self.end(lost)
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

    def _handle_late_request(self, flags: int, call_id: int) -> None:
        """A request that was on the way when GOAWAY was sent.

        Requests may overtake each other, so its id may be one of those that GOAWAY said would be answered; to a later
        one the caller expects no answer.
        """
        if call_id & 1 == self._own_parity or not call_id:
            raise RemoteProtocolError(f"REQUEST: {call_id} is no call id of the peer's")
        self._last_late = max(self._last_late, call_id)
        if call_id <= self._last_promised and not flags & _ONEWAY:
            body = ErrorBody(Status.UNAVAILABLE, GoingAway.__name__, "this end takes no new calls")
            self.outbox.put(_ERROR, _NOT_PROCESSED, call_id, body.serialize())

    def _handle_cancel(self, call_id: int) -> None:
        if call_id & 1 == self._own_parity or not call_id:
            raise RemoteProtocolError(f"CANCEL: {call_id} is no call id of the peer's")
        if call_id in self._incoming and call_id not in self._streaming and not self._cancels.take(self._now):
            limits = self._limits
            text = f"more than {max(limits.cancel_burst, limits.max_calls)} calls are cancelled at once"
            raise CancelFlood(text)
        if self._assembler.is_on_the_way(call_id, Kind.ITEM):
            self._discard(call_id)
        if self._assembler.is_on_the_way(call_id, Kind.REQUEST):
            # Its rest will not come.  Where it was refused already, nobody waits for an answer.
            self._assembler.discard(call_id)
            if call_id in self._incoming:
                self.refuse(call_id, ErrorBody(Status.CANCELLED, "Cancelled", ""), processed=False)
        elif call_id in self._incoming:
            self.events.append(RequestCancelled(call_id, False))
        elif self._drop(call_id) is not None:
            # The result is half sent, or not yet: the caller hears at once that no more of it comes.
            self.outbox.put(_ERROR, 0, call_id, ErrorBody(Status.CANCELLED, "Cancelled", "").serialize())

    def _refuse_too_large(self, call_id: int, length: int, most: int) -> None:
        text = f"the arguments are {length} bytes, and this end takes {most}"
        self.refuse(call_id, ErrorBody(Status.RESOURCE_EXHAUSTED, MessageTooLarge.__name__, text), processed=False)

    # Streams.

    def _handle_items(self, call_id: int, count: int, message: bytes, cost: int) -> None:
        self._check_stream(Kind.ITEM, call_id)
        if self._assembler.messages and call_id in self._assembler.messages:
            raise RemoteProtocolError(f"ITEM: a message of call {call_id} is on the way already")
        self._granted.spend(call_id, cost)
        if self._granted.is_open(call_id):
            self.events.append(ItemsReceived(call_id, count, message, cost))
            self._grant(call_id)
        else:
            self.give_back(call_id, cost)

    def _check_stream(self, kind: Kind, call_id: int) -> None:
        """Refuses what belongs to no stream.

        One that this end does not want any more is none of the peer's faults.
        """
        if self._granted.is_open(call_id):
            return
        if call_id & 1 == self._own_parity:
            if self._outgoing.get(call_id, self) is not None:
                raise RemoteProtocolError(f"{kind.name}: call {call_id} is not open, or has no stream")
        elif not call_id or call_id > max(self._last_incoming, self._last_late):
            raise RemoteProtocolError(f"{kind.name}: there is no call {call_id}")

    def _handle_end(self, call_id: int) -> None:
        self._check_stream(Kind.END, call_id)
        wanted = self._granted.is_open(call_id)
        if call_id in self._assembler.messages:
            raise RemoteProtocolError(f"END: a message of call {call_id} is on the way")
        self._granted.close(call_id)
        if call_id & 1 != self._own_parity:
            if wanted:
                self.events.append(EndReceived(call_id, None))
            return
        token = self._settle(call_id)
        if token is not None:
            self.events.append(EndReceived(call_id, token))
        if self._ends:
            self._check_drained()

    # Messages in several frames.

    def _discard(self, call_id: int) -> None:
        """Forgets what came of a message, if there is one; its rest will not come."""
        self._stop_holding(call_id)
        self._assembler.discard(call_id)

    def _stop_holding(self, call_id: int) -> None:
        """Forgets what came of a message, if there is one, and only counts the rest."""
        message = self._assembler.messages.get(call_id)
        if message is not None and message.parts is not None:
            self._assembler.stop_holding(call_id)
            if message.kind == _ITEM:
                self.give_back(call_id, cost_of(message.total, 1))

    def _begin_message(self, frame: Frame) -> None:
        kind, _, call_id, payload = frame
        total, part = parse_total(payload)
        if kind != _ERROR and call_id in self._assembler.messages:
            raise RemoteProtocolError(f"{Kind(kind).name}: a message of call {call_id} is on the way already")
        wanted = True
        if kind == _REQUEST:
            wanted = self._begin_request(frame[1], call_id, total, part)
        elif kind == _ITEM:
            wanted = self._begin_item(call_id, total, part)
        elif call_id not in self._outgoing:
            raise RemoteProtocolError(f"{Kind(kind).name}: call {call_id} is not open")
        elif total > (most := self._most(self._outgoing[call_id])) + (SLACK if kind == _ERROR else 0):
            wanted = False
            self._give_up(call_id, MessageTooLarge(f"the answer is {total} bytes, and this end takes {most}"))
        elif self._outgoing[call_id] is None:
            wanted = False
        self._discard(call_id)
        self._assembler.begin(frame, total, part, self._now, wanted=wanted)
        limits = self._limits
        if len(self._assembler) > max(
            2 * limits.max_calls + len(self._outgoing), limits.max_unfinished // (limits.max_frame - 12) + 1
        ):
            raise RemoteProtocolError(f"{len(self._assembler)} messages are on the way at once")

    def _most(self, token: Any) -> int:
        """The octets that the result, or an item, of a call of this end may have."""
        asked = self._max_result(token) if token is not None else None
        return self._limits.max_message if asked is None else min(asked, self._limits.max_message)

    def _begin_item(self, call_id: int, total: int, part: bytes) -> bool:
        """Whether the rest of a large item is wanted; it is paid for now."""
        self._check_stream(Kind.ITEM, call_id)
        if parse_count(part) != 1:
            raise RemoteProtocolError("ITEM: several items in several frames")
        cost = cost_of(total, 1)
        self._granted.spend(call_id, cost)
        length = total - COUNT.size - ARRAY_HEAD
        if call_id & 1 != self._own_parity:
            if length > self._limits.max_message:
                raise RemoteProtocolError(f"ITEM: {length} octets, and this end takes {self._limits.max_message}")
        elif self._granted.is_open(call_id) and length > (most := self._most(self._outgoing[call_id])):
            self._give_up(call_id, MessageTooLarge(f"an item is {length} bytes, and this end takes {most}"))
        if self._granted.is_open(call_id):
            self._grant(call_id)
            return True
        self.give_back(call_id, cost)
        return False

    def _begin_request(self, flags: int, call_id: int, total: int, part: bytes) -> bool:
        """Whether the rest of a large request is wanted; where it is not, the refusal is sent."""
        if call_id & 1 == self._own_parity or not call_id:
            raise RemoteProtocolError(f"REQUEST: {call_id} is no call id of the peer's")
        if call_id in self._incoming:
            raise RemoteProtocolError(f"REQUEST: call {call_id} is open already")
        if flags & _ONEWAY and flags & _STREAMS:
            raise RemoteProtocolError(f"REQUEST: ONEWAY, and streams, of call {call_id}")
        remaining, method, length = parse_first_part(part, total)
        if not self._serves:
            self._handle_late_request(flags, call_id)
            return False
        self._last_incoming = max(self._last_incoming, call_id)
        self._incoming.add(call_id)
        if flags & _ONEWAY:
            self._oneway.add(call_id)
        if len(self._incoming) > self._limits.max_calls:
            self._refuse_one_too_many(call_id, method)
            return False
        asked = self._max_arguments(method)
        most = self._limits.max_message if asked is None else min(asked, self._limits.max_message)
        if length > most:
            self._refuse_too_large(call_id, length, most)
            return False
        if not remaining:
            text = "the deadline passed before the request was here"
            body = ErrorBody(Status.DEADLINE_EXCEEDED, DeadlineExceeded.__name__, text)
            self.refuse(call_id, body, processed=False)
            return False
        self.suspend(call_id, self._now + remaining)
        return True

    def _continue_message(self, frame: Frame) -> None:
        message = self._assembler.go_on(frame)
        if message is None:
            return
        call_id = frame[2]
        if message.parts is None:
            if message.kind in (_RESPONSE, _ERROR):
                self._settle(call_id)
                self._check_drained()
            return
        whole = message.whole()
        if message.kind == _ITEM:
            self.events.append(ItemsReceived(call_id, 1, whole, cost_of(message.total, 1)))
        elif message.kind == _RESPONSE:
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
        self._granted.close(call_id)
        self._credit.close(call_id)
        if self._assembler.messages:
            self._discard(call_id)
        if self.outbox.cut and self._drop(call_id):
            # Answered, that is refused, before it was all sent: the peer is told that no more of it comes.
            self.outbox.put_control(Kind.CANCEL, call_id)
        if self._waiting:
            self._start_waiting()
        return token

    def _drop(self, call_id: int) -> bool | None:
        """Takes a large message out of the line as `Outbox.drop` does; an item that was not begun costs nothing."""
        message = self.outbox.cut.get(call_id)
        if message is None:
            return None
        begun = self.outbox.drop(call_id)
        if message.kind == _ITEM and not begun and self._credit.refund(call_id, cost_of(message.total, 1)):
            self.events.append(CreditReceived(0))
        return begun

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
            if call.flags & _ITEMS:
                self.events.append(CreditReceived(call.call_id))

    def _give_up(self, call_id: int, error: Error, *, untold: bool = False) -> None:
        """The caller stops waiting; the slot is free when the peer has answered.

        :param untold: the peer knows already that nobody waits.
        """
        token = self._outgoing.get(call_id)
        if token is None:
            return
        message = self.outbox.cut.get(call_id)
        begun = self._drop(call_id)
        asked = message is None or message.kind != _REQUEST
        if self._waiting.pop(call_id, None) is not None or not (begun or asked):
            # Nothing of it was sent.
            self._settle(call_id)
            self.events.append(CallFailed(token, _not_run(error)))
            self._check_drained()
            return
        if not asked:
            # The peer has no use for half a request.
            error.may_have_run = False
        self._stop_holding(call_id)
        self._granted.close(call_id)
        self._credit.close(call_id)
        self._outgoing[call_id] = None
        self.events.append(CallFailed(token, error))
        if begun or not untold:
            self.outbox.put_control(Kind.CANCEL, call_id)

    def _is_awaited(self, call_id: int) -> bool:
        """Whether a deadline, of a call of this end or of the peer's or of the handshake, still means something."""
        if call_id <= _HANDSHAKE:
            return call_id != _HANDSHAKE or self.state is State.GREETING
        return self._outgoing.get(call_id) is not None or call_id in self._suspended

    def _leave_slot(self, call_id: int) -> None:
        try:
            self._incoming.remove(call_id)
        except KeyError:
            raise LocalProtocolError(f"call {call_id} is not open") from None
        if self._assembler.messages:
            self._stop_holding(call_id)
        if self._suspended:
            self._suspended.discard(call_id)
        if self._oneway:
            self._oneway.discard(call_id)
        if self._credit.streams:
            self._credit.close(call_id)
            self._streaming.discard(call_id)
        if self._granted.streams:
            self._granted.close(call_id)

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
