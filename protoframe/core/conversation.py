"""One end of a conversation, over whatever carries frames.

Knows how a conversation opens, stays alive and ends, and which frame is whose: calls of this end are
`protoframe.core.outgoing`'s, calls of the peer `protoframe.core.incoming`'s.  It does not know where frames come from,
what a method is, or what its arguments say: frames and the time go in through ``handle_*``, what this end does through
the verbs (`request`, `respond`, `refuse`, `cancel`, ...), and events, frames and the next timer come out through
`poll_events`, `outbox` and `next_timer`.
"""

from __future__ import annotations

import functools
import math
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from protoframe.core.credit import cost_of
from protoframe.core.deadlines import Deadlines, Entry
from protoframe.core.events import (
    CreditReceived,
    Drained,
    Ended,
    EndReceived,
    Event,
    Greeted,
    ItemsReceived,
    Opened,
    PongReceived,
    StopReceived,
)
from protoframe.core.floods import Allowance
from protoframe.core.frames import (
    ARRAY_HEAD,
    COUNT,
    FIRST_SKIPPED_KIND,
    LONGEST_AGENT_AND_TOKEN,
    ErrorBody,
    Flag,
    Frame,
    GoAway,
    Hello,
    Key,
    Kind,
    cut,
    parse_count,
    parse_credit,
    parse_total,
)
from protoframe.core.incoming import IncomingCalls
from protoframe.core.limits import Limits
from protoframe.core.messages import SLACK
from protoframe.core.outgoing import TELLING, OutgoingCalls
from protoframe.core.state import TRANSITIONS, Input, Role, State
from protoframe.core.traffic import Traffic
from protoframe.errors import (
    BY_STATUS,
    Cancelled,
    ConnectionLost,
    Error,
    GoingAway,
    HandshakeTimeout,
    KeepaliveTimeout,
    LocalProtocolError,
    MessageTooLarge,
    PingFlood,
    RemoteProtocolError,
    WriteTimeout,
)

__all__ = ["Conversation"]

_CALLS = frozenset({State.OPEN, State.LEAVING})
_SERVES = frozenset({State.OPEN, State.LEFT})
_ENDS = frozenset({State.LEAVING, State.LEFT, State.DRAINING})

_REQUEST = int(Kind.REQUEST)
_RESPONSE = int(Kind.RESPONSE)
_ERROR = int(Kind.ERROR)
_CHUNK = int(Kind.CHUNK)
_ITEM = int(Kind.ITEM)
_MORE = int(Flag.MORE)
_KINDS = frozenset(int(kind) for kind in Kind)
_MESSAGE_KINDS = (_REQUEST, _RESPONSE, _ERROR, _ITEM)

# Under these ids, which no call has, stand deadlines of the conversation itself.
_HANDSHAKE = 0
_KEEPALIVE = -1
_BLOCKED = -2
_TELLING = -3

_KEEPALIVE_PAYLOAD = bytes(8)

#: PINGs above what `Limits` allow, of which the last ends the conversation.
_STRIKES = 2


def _unbounded(_: Any) -> int | None:
    return None


class Request(typing.Protocol):
    """`OutgoingCalls.request`."""

    def __call__(
        self,
        method: bytes,
        arguments: bytes,
        token: Any,
        deadline: float,
        now: float,
        metadata: bytes = b"",
        flags: int = 0,
        key: Key | None = None,
    ) -> int: ...


class Conversation:
    """One end of a conversation.

    :ivar state: where the conversation stands.
    :ivar peer: the peer's settings, once its HELLO has come; when the conversation is open, without its secrets.
    :ivar was_left: whether the peer has said that it is leaving.
    :ivar traffic: what goes over it; its `events` are what happened and was not polled yet.
    :ivar own_due: when the one deadline of the conversation itself is due, while `Traffic.deadlines` is ``None``.
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
    :param session: the secret by which the peer knows this end again, over another connection.
    :param next_key: see `Hello.next_key`.
    """

    # Most connections are idle, so what calls of either end need is made when there is one.  What begins with ``_made``
    # is None until then, for paths that every call takes; the property of that name makes it.
    __slots__ = (
        "_asks_first",
        "_blocked",
        "_blocked_is_watched",
        "_heard",
        "_hello",
        "_limits",
        "_made_incoming",
        "_made_outgoing",
        "_max_arguments",
        "_max_result",
        "_own_parity",
        "_pings",
        "_strikes",
        "outbox",
        "own_due",
        "peer",
        "state",
        "traffic",
        "was_left",
    )

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
        session: bytes = b"",
        next_key: int = 0,
    ) -> None:
        self.state = State.GREETING
        self.peer: Hello | None = None
        self._limits = limits
        self._own_parity = role.value
        self.own_due = now + limits.handshake_timeout
        self.traffic = traffic = Traffic(limits, now)
        self.outbox = traffic.outbox
        self._max_arguments = max_arguments
        self._max_result = max_result
        self._made_outgoing: OutgoingCalls | None = None
        self._made_incoming: IncomingCalls | None = None
        # Made at the first PING.
        self._pings: Allowance | None = None
        self._strikes = 0
        # When the peer was heard last; None where it was asked for a sign of life, and has given none.
        self._heard: float | None = now
        # Since when the carrier takes no more; None where it does.
        self._blocked: float | None = None
        self._blocked_is_watched = False
        self.was_left = False
        hello = Hello(
            max_frame=limits.max_frame,
            max_message=limits.max_message,
            max_unfinished=limits.max_unfinished,
            max_calls=limits.max_calls,
            agent=cut(agent)[: LONGEST_AGENT_AND_TOKEN - len(token)].decode("utf-8", "ignore"),
            stream_credit=limits.stream_credit,
            connection_credit=limits.connection_credit,
            token=token,
            session=session,
            next_key=next_key,
        )
        # That is not sent yet.
        self._hello = hello if asks_first else None
        self._asks_first = asks_first
        if not asks_first:
            self.outbox.put_control(Kind.HELLO, 0, hello.serialize())

    @property
    def _outgoing(self) -> OutgoingCalls:
        outgoing = self._made_outgoing
        if outgoing is None:
            traffic = self.traffic
            outgoing = OutgoingCalls(
                traffic,
                self._watched(),
                self._limits,
                2 - self._own_parity,
                traffic.now,
                self._max_result,
                self._check_drained,
                self._tell_later,
            )
            outgoing.is_open = self.state in _CALLS
            if self.peer is not None:
                outgoing.begin(self.peer)
            self._made_outgoing = outgoing
        return outgoing

    @property
    def _incoming(self) -> IncomingCalls:
        incoming = self._made_incoming
        if incoming is None:
            traffic = self.traffic
            incoming = IncomingCalls(
                traffic,
                self._limits,
                1 - self._own_parity,
                traffic.now,
                self._max_arguments,
                self._check_drained,
                self._watch,
            )
            incoming.is_open = self.state in _SERVES
            self._made_incoming = incoming
        return incoming

    def _watched(self) -> Deadlines:
        """What watches deadlines, from now on that of the conversation itself too."""
        deadlines = self.traffic.deadlines
        if deadlines is None:
            deadlines = self.traffic.deadlines = Deadlines(self._awaited)
            deadlines.add(_HANDSHAKE if self.state is State.GREETING else _KEEPALIVE, self.own_due)
        return deadlines

    def _watch(self, identifier: int, due: float) -> None:
        self._watched().add(identifier, due)

    # What goes in from below.

    def handle_frames(self, frames: Iterable[Frame], now: float) -> None:
        """Takes frames from the carrier, in the order in which they came.

        A fault of the peer's ends the conversation: GOAWAY says why, and `Ended` follows.
        """
        self.traffic.now = self._heard = now
        try:
            for kind, flags, call_id, payload in frames:
                if kind == _RESPONSE and not flags & _MORE:
                    outgoing = self._made_outgoing or self._outgoing
                    outgoing.handle_response(call_id, payload)
                elif (
                    kind == _REQUEST
                    and not flags & _MORE
                    and (incoming := self._made_incoming or self._incoming).is_open
                ):
                    incoming.handle_request(flags, call_id, payload, now)
                elif kind == _ITEM and not flags & _MORE and self.state is not State.GREETING:
                    count = parse_count(payload)
                    self._handle_items(call_id, count, payload, cost_of(len(payload), count))
                else:
                    self._handle_other((kind, flags, call_id, payload))
                    if self.state is State.CLOSED:
                        return
        except RemoteProtocolError as error:
            self.end(error)

    def handle_timer(self, now: float) -> None:
        """Does what is due by now; to be called at `next_timer`, or later."""
        self.traffic.now = now
        if self.traffic.deadlines is None:
            if self.own_due <= now and self.state is not State.CLOSED:
                self._handle_own_timer(_HANDSHAKE if self.state is State.GREETING else _KEEPALIVE, now)
            return
        for call_id in self.traffic.deadlines.pop_due(now):
            if call_id <= _HANDSHAKE:
                self._handle_own_timer(call_id, now)
                if self.state is State.CLOSED:
                    return
                continue
            if call_id & 1 == self._own_parity:
                self._outgoing.expire(call_id)
            else:
                self._incoming.expire(call_id)

    def handle_heard(self, now: float) -> None:
        """Part of a frame came: the peer is alive."""
        self._heard = now

    def handle_blocked(self, now: float) -> None:
        """The carrier takes no more for now: the peer does not read.  Nor is it read from meanwhile."""
        self._blocked = now
        if self.state is State.CLOSED:
            return
        if not self._blocked_is_watched:
            self._blocked_is_watched = True
            self._watch(_BLOCKED, now + self._limits.write_timeout)

    def handle_unblocked(self, now: float) -> None:
        """The carrier takes more."""
        self._blocked = None
        self._heard = now

    def _handle_own_timer(self, identifier: int, now: float) -> None:
        limits = self._limits
        if identifier == _HANDSHAKE and self.state is not State.GREETING:
            # It was made in time.
            pass
        elif identifier == _HANDSHAKE:
            what = "no HELLO" if self.peer is None else "no conversation"
            self.end(HandshakeTimeout(f"{what} within {limits.handshake_timeout:g} s"))
        elif identifier == _TELLING:
            self._outgoing.tell()
        elif identifier == _BLOCKED:
            self._blocked_is_watched = False
            if self._blocked is None:
                return
            if now < self._blocked + limits.write_timeout:
                self._blocked_is_watched = True
                self._watch(_BLOCKED, self._blocked + limits.write_timeout)
                return
            self.end(WriteTimeout(f"the peer read nothing for {limits.write_timeout:g} s"))
        elif self._blocked is not None:
            self._keep_alive(now + limits.keepalive_idle)
        elif self._heard is None:
            silent = limits.keepalive_idle + limits.keepalive_timeout
            self.end(KeepaliveTimeout(f"the peer gave no sign of life for {silent:g} s"))
        elif now < self._heard + limits.keepalive_idle:
            self._keep_alive(self._heard + limits.keepalive_idle)
        else:
            self._heard = None
            self.outbox.put_control(Kind.PING, 0, _KEEPALIVE_PAYLOAD)
            self._keep_alive(now + limits.keepalive_timeout)

    def _keep_alive(self, due: float) -> None:
        """The peer is to be heard, or asked for a sign of life, by then."""
        if self.traffic.deadlines is None:
            self.own_due = due
        else:
            self.traffic.deadlines.add(_KEEPALIVE, due)

    # What goes in from above.

    def cancel(self, call_id: int, error: Error | None = None) -> None:
        """See `OutgoingCalls.cancel`."""
        self._outgoing.cancel(call_id, error)

    def refuse(self, call_id: int, body: ErrorBody, *, processed: bool = True) -> None:
        """See `IncomingCalls.refuse`."""
        self._incoming.refuse(call_id, body, processed=processed)

    def give_back(self, call_id: int, cost: int) -> None:
        """See `Traffic.give_back`."""
        self.traffic.give_back(call_id, cost)

    # Of these the method itself is wanted, by who calls it often.

    @property
    def request(self) -> Request:
        """See `OutgoingCalls.request`."""
        return self._outgoing.request

    @property
    def respond(self) -> Callable[[int, bytes], None]:
        """See `IncomingCalls.respond`."""
        return self._incoming.respond

    @property
    def suspend(self) -> Callable[[int, float], None]:
        """See `IncomingCalls.suspend`."""
        return self._incoming.suspend

    def room(self, call_id: int) -> int:
        """What the items of a stream may cost that are sent now; 0 where they have to wait.

        `CreditReceived`, or the call's id among `Outbox.departed`, tells when to ask again.
        """
        if not self.may_end(call_id):
            return 0
        return max(0, self.traffic.credit.left(call_id))

    def send_items(self, call_id: int, count: int, octets: bytes | bytearray) -> None:
        """Sends items of a stream: of a call of this end with ITEMS, or of the answer to one of the peer's with STREAM.

        :param octets: an array of them, encoded; of several items no more than a frame takes.  It is not changed any
            more.
        :raises MessageTooLarge: it is more than the peer takes.
        :raises LocalProtocolError: there is no such stream, or `room` is 0.
        """
        if self.room(call_id) <= 0:
            raise LocalProtocolError(f"call {call_id} has no stream to send, or no credit")
        self.traffic.send_items(call_id, count, octets)
        if call_id & 1 != self._own_parity:
            self._incoming.streaming[call_id] = None

    def may_end(self, call_id: int) -> bool:
        """Whether nothing of a stream waits that its end would overtake; where something does, ask as for `room`."""
        outgoing = self._made_outgoing
        return call_id not in self.outbox.cut and (outgoing is None or call_id not in outgoing.waiting)

    def end_items(self, call_id: int) -> None:
        """Ends a stream; of a call of the peer's, that is its answer.

        :raises LocalProtocolError: there is no such stream.
        """
        if call_id not in self.traffic.credit.streams:
            raise LocalProtocolError(f"call {call_id} has no stream to end")
        if not self.may_end(call_id):
            raise LocalProtocolError(f"a message of call {call_id} is on the way")
        if call_id & 1 == self._own_parity:
            self.traffic.credit.close(call_id)
        else:
            self._incoming.leave_slot(call_id)
        self.outbox.put_control(Kind.END, call_id)
        self._check_drained()

    def leave(self, call_id: int) -> None:
        """Takes no more of a stream: gives a call of this end up; tells the caller of one of the peer's to stop."""
        if call_id & 1 == self._own_parity:
            self.cancel(call_id, Cancelled("the loop over the stream was left"))
        elif self.traffic.granted.is_open(call_id):
            self.traffic.granted.close(call_id)
            self.traffic.stop_holding(call_id)
            self.outbox.put_control(Kind.STOP, call_id)

    def ping(self, payload: bytes) -> None:
        """Sends a PING; `PongReceived` with the same 8 octets follows.

        :raises LocalProtocolError: the payload is not 8 octets, or the conversation is not open yet.
        """
        if len(payload) != 8:
            raise LocalProtocolError(f"a PING carries 8 octets, not {len(payload)}")
        if self.state is State.GREETING:
            raise LocalProtocolError("the conversation is not open yet")
        self.outbox.put_control(Kind.PING, 0, payload)

    def go_away(self, text: str = "") -> None:
        """Says that no new call will be taken; what runs goes on, and `Drained` tells when it ended."""
        if self.state is State.GREETING:
            self.end(None)
            return
        if self.state not in _SERVES:
            return
        self._incoming.stop()
        self.outbox.put_control(Kind.GOAWAY, 0, GoAway(0, self._incoming.last, text).serialize())
        self._move(Input.GOAWAY_SENT)
        self._check_drained()

    def end(self, error: Error | None = None) -> None:
        """Ends the conversation: every call of this end fails, every call of the peer is cancelled.

        Where the peer is at fault (a `RemoteProtocolError`, a `VersionMismatch`), GOAWAY tells it so.
        """
        if self.state is State.CLOSED:
            return
        outgoing, incoming = self._made_outgoing, self._made_incoming
        if error is not None and not isinstance(error, ConnectionLost):
            goaway = GoAway(error.status, incoming.last if incoming is not None else 0, error.message)
            self.outbox.put_control(Kind.GOAWAY, 0, goaway.serialize())
        self._move(Input.ENDED)
        if outgoing is not None:
            outgoing.end(error)
        if incoming is not None:
            incoming.end()
        self.traffic.end()
        self.own_due = math.inf
        self.traffic.events.append(Ended(error))

    # What comes out.

    def next_timer(self) -> float:
        """The time at which `handle_timer` wants to be called; infinity for never.

        It may be earlier than anything is due: a timer that finds nothing to do is cheaper than one that is moved at
        each call.
        """
        deadlines = self.traffic.deadlines
        return self.own_due if deadlines is None else deadlines.earliest()

    def poll_events(self) -> list[Event]:
        """What happened since the last time."""
        events = self.traffic.events
        if events:
            self.traffic.events = []
        return events

    @property
    def running(self) -> int:
        """Calls of the peer that take a slot here."""
        return len(self._made_incoming.running) if self._made_incoming is not None else 0

    @property
    def pending(self) -> int:
        """Calls of this end whose slot, here or at the peer, is not free yet."""
        return len(self._made_outgoing.pending) if self._made_outgoing is not None else 0

    # Frames of the peer.

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
            self._incoming.handle_late_request(flags, call_id)
        elif kind == _ERROR:
            self._outgoing.handle_error(flags, call_id, payload)
        elif kind == Kind.CANCEL:
            self._incoming.handle_cancel(call_id)
        elif kind == Kind.END:
            self._handle_end(call_id)
        elif kind == Kind.STOP:
            self._handle_stop(call_id)
        elif kind == Kind.CREDIT:
            if self.traffic.credit.add(call_id, parse_credit(payload)):
                self.traffic.events.append(CreditReceived(call_id))
        elif len(payload) != 8:
            raise RemoteProtocolError(f"{Kind(kind).name}: {len(payload)} octets, not 8")
        elif kind == Kind.PING:
            pings = self._pings
            if pings is None:
                limits = self._limits
                pings = self._pings = Allowance(limits.ping_burst, limits.ping_rate, self.traffic.now)
            if pings.is_full(self.traffic.now):
                self._strikes = 0
            if not pings.take(self.traffic.now):
                self._strikes += 1
                if self._strikes >= _STRIKES:
                    raise PingFlood(f"more than {self._limits.ping_burst} PINGs at once")
            self.outbox.put_control(Kind.PONG, 0, payload)
        else:
            self.traffic.events.append(PongReceived(payload))

    def _handle_hello(self, hello: Hello) -> None:
        if self.peer is not None:
            raise RemoteProtocolError("a second HELLO")
        self.peer = hello
        self.traffic.begin(_without_secrets(hello))
        if self._made_outgoing is not None:
            self._made_outgoing.begin(hello)
        if self._asks_first:
            self.traffic.events.append(Greeted(hello))
        else:
            self._open(hello)

    def greet(self) -> None:
        """The peer is welcome: greets it, and opens the conversation."""
        if self.state is State.GREETING and self.peer is not None and self._hello is not None:
            self.outbox.put_control(Kind.HELLO, 0, self._hello.serialize())
            self._hello = None
            self._open(self.peer)

    def _open(self, hello: Hello) -> None:
        self._move(Input.HELLO_RECEIVED)
        self.peer = _without_secrets(hello)
        self._keep_alive(self.traffic.now + self._limits.keepalive_idle)
        self.traffic.events.append(Opened(hello))

    def _handle_goaway(self, goaway: GoAway) -> None:
        self.was_left = True
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
        if self._made_outgoing is not None:
            self._made_outgoing.fail_unprocessed(last_call_id, error, text)

    # Streams.

    def _handle_items(self, call_id: int, count: int, message: bytes, cost: int) -> None:
        self._check_stream(Kind.ITEM, call_id)
        traffic = self.traffic
        if traffic.is_on_the_way(call_id):
            raise RemoteProtocolError(f"ITEM: a message of call {call_id} is on the way already")
        granted = traffic.granted
        granted.spend(call_id, cost)
        if granted.is_open(call_id):
            traffic.events.append(ItemsReceived(call_id, count, message, cost))
            traffic.grant(call_id)
        else:
            traffic.give_back(call_id, cost)

    def _check_stream(self, kind: Kind, call_id: int) -> None:
        """Refuses what belongs to no stream.

        One that this end does not want any more is none of the peer's faults.
        """
        if self.traffic.granted.is_open(call_id):
            return
        if call_id & 1 == self._own_parity:
            if self._outgoing.pending.get(call_id, self) is not None:
                raise RemoteProtocolError(f"{kind.name}: call {call_id} is not open, or has no stream")
        elif not call_id or call_id > max(self._incoming.last, self._incoming.last_late):
            raise RemoteProtocolError(f"{kind.name}: there is no call {call_id}")

    def _handle_end(self, call_id: int) -> None:
        self._check_stream(Kind.END, call_id)
        wanted = self.traffic.granted.is_open(call_id)
        if self.traffic.is_on_the_way(call_id):
            raise RemoteProtocolError(f"END: a message of call {call_id} is on the way")
        self.traffic.granted.close(call_id)
        if call_id & 1 != self._own_parity:
            if wanted:
                self.traffic.events.append(EndReceived(call_id, None))
            return
        token = self._outgoing.settle(call_id)
        if token is not None:
            self.traffic.events.append(EndReceived(call_id, token))
        self._check_drained()

    def _handle_stop(self, call_id: int) -> None:
        if call_id & 1 != self._own_parity or not call_id:
            raise RemoteProtocolError(f"STOP: {call_id} is no call of this end's")
        if call_id in self.traffic.credit.streams and call_id not in self._outgoing.waiting:
            self.traffic.stop_items(call_id)
            self.traffic.events.append(StopReceived(call_id))

    # Messages in several frames.

    def _begin_message(self, frame: Frame) -> None:
        kind, _, call_id, payload = frame
        total, part = parse_total(payload)
        if kind != _ERROR and self.traffic.is_on_the_way(call_id):
            raise RemoteProtocolError(f"{Kind(kind).name}: a message of call {call_id} is on the way already")
        wanted = True
        if kind == _REQUEST:
            wanted = self._incoming.begin_request(frame[1], call_id, total, part)
        elif kind == _ITEM:
            wanted = self._begin_item(call_id, total, part)
        elif call_id not in self._outgoing.pending:
            raise RemoteProtocolError(f"{Kind(kind).name}: call {call_id} is not open")
        elif total > (most := self._outgoing.most(call_id)) + (SLACK if kind == _ERROR else 0):
            wanted = False
            error = MessageTooLarge(f"the answer is {total} bytes, and this end takes {most}")
            self._outgoing.give_up(call_id, error)
        elif self._outgoing.pending[call_id] is None:
            wanted = False
        assembler = self.traffic.assembler
        self.traffic.discard(call_id)
        assembler.begin(frame, total, part, self.traffic.now, wanted=wanted)
        limits = self._limits
        most = max(2 * limits.max_calls + self.pending, limits.max_unfinished // (limits.max_frame - 12) + 1)
        if len(assembler) > most:
            raise RemoteProtocolError(f"{len(assembler)} messages are on the way at once")

    def _begin_item(self, call_id: int, total: int, part: bytes) -> bool:
        """Whether the rest of a large item is wanted; it is paid for now."""
        self._check_stream(Kind.ITEM, call_id)
        if parse_count(part) != 1:
            raise RemoteProtocolError("ITEM: several items in several frames")
        cost = cost_of(total, 1)
        self.traffic.granted.spend(call_id, cost)
        length = total - COUNT.size - ARRAY_HEAD
        if call_id & 1 != self._own_parity:
            if length > self._limits.max_message:
                raise RemoteProtocolError(f"ITEM: {length} octets, and this end takes {self._limits.max_message}")
        elif self.traffic.granted.is_open(call_id) and length > (most := self._outgoing.most(call_id)):
            error = MessageTooLarge(f"an item is {length} bytes, and this end takes {most}")
            self._outgoing.give_up(call_id, error)
        if self.traffic.granted.is_open(call_id):
            self.traffic.grant(call_id)
            return True
        self.give_back(call_id, cost)
        return False

    def _continue_message(self, frame: Frame) -> None:
        message = self.traffic.assembler.go_on(frame)
        if message is None:
            return
        call_id = frame[2]
        if message.room is None:
            if message.kind in (_RESPONSE, _ERROR):
                self._outgoing.settle(call_id)
                self._check_drained()
            return
        whole = message.whole()
        if message.kind == _ITEM:
            self.traffic.events.append(ItemsReceived(call_id, 1, whole, cost_of(message.total, 1)))
        elif message.kind == _RESPONSE:
            self._outgoing.handle_response(call_id, whole)
        elif message.kind == _ERROR:
            self._outgoing.handle_error(message.flags, call_id, bytes(whole))
        else:
            # The slot was taken by the first frame, and the time runs from there.
            self._incoming.leave_slot(call_id)
            self._incoming.handle_request(message.flags, call_id, whole, message.begun)

    # The end.

    def _move(self, happened: Input) -> None:
        try:
            self.state = TRANSITIONS[self.state, happened]
        except KeyError:
            raise LocalProtocolError(f"{happened.value} in state {self.state.value}") from None
        # For the paths that every call takes.
        if self._made_outgoing is not None:
            self._made_outgoing.is_open = self.state in _CALLS
        if self._made_incoming is not None:
            self._made_incoming.is_open = self.state in _SERVES
        self.traffic.is_ending = self.state in _ENDS
        self.traffic.is_closed = self.state is State.CLOSED

    def _check_drained(self) -> None:
        if self.traffic.is_ending and not self.pending and not self.running:
            self.traffic.events.append(Drained())

    def _tell_later(self) -> None:
        self._watch(_TELLING, self.traffic.now + TELLING)

    def _awaited(self, entries: list[Entry]) -> list[Entry]:
        """The deadlines, of calls and of the conversation itself, that may still mean something."""
        outgoing, incoming = self._made_outgoing, self._made_incoming
        pending: Mapping[int, Any] = outgoing.pending if outgoing is not None else {}
        suspended: Mapping[int, Any] = incoming.suspended if incoming is not None else {}
        if pending and suspended:
            return [
                entry for entry in entries if entry[1] in pending or entry[1] in suspended or entry[1] <= _HANDSHAKE
            ]
        awaited = pending or suspended
        return [entry for entry in entries if entry[1] in awaited or entry[1] <= _HANDSHAKE]


@functools.lru_cache(maxsize=64)
def _shared(hello: Hello) -> Hello:
    """The same settings, which most peers of a server have: one object for all of them."""
    return hello


def _without_secrets(hello: Hello) -> Hello:
    if hello.token or hello.session:
        # Neither is kept for longer than it is needed.
        hello = msgspec.structs.replace(hello, token="", session=b"", next_key=0)
    return _shared(hello)
