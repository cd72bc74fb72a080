"""The calls that this end makes: their ids, the slots they wait for, their answers, and how they are given up.

Knows who waits for an answer by a token alone; not what a method is, nor how a conversation opens and ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec

from protoframe.core.deadlines import Deadlines
from protoframe.core.events import CallFailed, CreditReceived, ErrorReceived, ResponseReceived
from protoframe.core.floods import Allowance
from protoframe.core.frames import LONGEST_METADATA, LONGEST_METHOD, ErrorBody, Flag, Hello, Key, Kind, serialize_key
from protoframe.core.limits import Limits
from protoframe.core.traffic import Traffic
from protoframe.errors import (
    Cancelled,
    ConnectionLost,
    DeadlineExceeded,
    Error,
    GoingAway,
    LocalProtocolError,
    MessageTooLarge,
    RemoteProtocolError,
    TooManyCalls,
    Unimplemented,
    not_run,
)

__all__ = ["OutgoingCalls"]

_REQUEST = int(Kind.REQUEST)
_NOT_PROCESSED = int(Flag.NOT_PROCESSED)
_ITEMS = int(Flag.ITEMS)
_STREAM = int(Flag.STREAM)
_STREAMS = _ITEMS | _STREAM
_ONEWAY = int(Flag.ONEWAY)
_KEYED = int(Flag.KEYED)
_NOT_PLAIN = _STREAMS | _ONEWAY

# How often this end tells the peer that nobody waits for an answer: less often than a peer takes for a flood
# (`Limits.cancel_burst`).  Of a deadline that passed the peer knows itself: to be told only saves it some work, and
# half of the telling is kept for the rest.
_TOLD_BURST = 900
_TOLD_RATE = 30.0
_EXPIRED_BURST = _TOLD_BURST // 2
_EXPIRED_RATE = _TOLD_RATE / 2
#: Seconds between two rounds of telling, where there is more to tell than that.
TELLING = 0.1


class _Waiting(msgspec.Struct):
    """A call that waits for a slot."""

    call_id: int
    method: bytes
    metadata: bytes
    arguments: bytes
    deadline: float
    flags: int


class OutgoingCalls:
    """The calls that this end makes.

    :param traffic: what they go over.
    :param deadlines: watches theirs.
    :param limits: what this end takes.
    :param first: the first id.
    :param now: the time.
    :param max_result: gives the octets that the result, or an item, of a call may have, by its token.
    :param settled: called when a call has its outcome, or its slot is free.
    :param tell_later: called where `tell` is to be called, after `TELLING` seconds.
    :ivar is_open: whether calls may be made.
    :ivar pending: calls whose slot is not free yet: by id the token; ``None`` once the caller gave up.
    :ivar waiting: of these, the ones that wait for a slot at the peer.
    :ivar slots: calls that the peer serves at once.
    :ivar takes_streams: whether the peer takes any.
    """

    __slots__ = (
        "_deadlines",
        "_expiries",
        "_max_message",
        "_max_result",
        "_max_waiting",
        "_next_id",
        "_settled",
        "_tell_later",
        "_tellings",
        "_traffic",
        "_untold",
        "is_open",
        "pending",
        "slots",
        "takes_streams",
        "waiting",
    )

    def __init__(
        self,
        traffic: Traffic,
        deadlines: Deadlines,
        limits: Limits,
        first: int,
        now: float,
        max_result: Callable[[Any], int | None],
        settled: Callable[[], None],
        tell_later: Callable[[], None],
    ) -> None:
        self.is_open = False
        self.pending: dict[int, Any] = {}
        self.waiting: dict[int, _Waiting] = {}
        self.slots = 0
        self.takes_streams = False
        self._traffic = traffic
        self._deadlines = deadlines
        self._max_message = limits.max_message
        self._max_waiting = limits.max_waiting
        self._next_id = first
        self._max_result = max_result
        self._settled = settled
        self._tell_later = tell_later
        self._tellings = Allowance(_TOLD_BURST, _TOLD_RATE, now)
        self._expiries = Allowance(_EXPIRED_BURST, _EXPIRED_RATE, now)
        # Calls that were given up, and of which the peer is to be told when it may be.
        self._untold: list[int] = []

    def request(
        self,
        method: bytes,
        arguments: bytes,
        token: Any,
        deadline: float,
        now: float,
        metadata: bytes = b"",
        flags: int = 0,
        key: Key | None = None,
    ) -> int:
        """Calls the peer, or lines the call up where all its slots are taken; returns the call's id.

        Exactly one of `ResponseReceived`, `ErrorReceived`, `EndReceived` and `CallFailed` with the token follows, or,
        with ONEWAY among the flags, nothing does.  With ITEMS, `send_items` and `end_items` are to follow; with STREAM,
        `ItemsReceived` may come before the outcome.

        :param deadline: when the call fails if it has no answer by then, in the conversation's time; infinity: never.
        :param flags: JSON, ITEMS, STREAM, ONEWAY.
        :param key: what the call is known by in its session, where it is to outlive the connection.
        :raises Unimplemented: the call has streams, and the peer takes none.
        :raises GoingAway: the conversation takes no new calls.
        :raises MessageTooLarge: the arguments are more than the peer takes.
        :raises TooManyCalls: too many calls wait for a slot.
        :raises LocalProtocolError: the conversation is not open, or the name (1 to 255 octets) or the metadata (65,535
            octets at most) does not fit a REQUEST.
        """
        if not self.is_open:
            raise self._not_open()
        if not method or len(method) > LONGEST_METHOD or (metadata and len(metadata) > LONGEST_METADATA):
            raise LocalProtocolError(
                f"{len(method)} octets of name and {len(metadata)} of metadata do not fit a REQUEST"
            )
        traffic = self._traffic
        traffic.now = now
        if len(arguments) > traffic.max_message:
            text = f"the arguments are {len(arguments)} bytes, and the peer takes {traffic.max_message}"
            raise not_run(MessageTooLarge(text))
        call_id = self._next_id
        if key is not None:
            flags |= _KEYED
            arguments = serialize_key(key) + arguments
        if flags & _NOT_PLAIN:
            if flags & _STREAMS and not self.takes_streams:
                raise not_run(Unimplemented("the peer takes no streams"))
            if flags & _ONEWAY:
                if flags & _STREAMS:
                    raise LocalProtocolError("a call without an answer has no streams")
                self._next_id = call_id + 2
                traffic.outbox.put_request(call_id, flags, deadline - now, method, metadata, arguments)
                return call_id
        if len(self.pending) >= self.slots:
            if len(self.waiting) >= self._max_waiting:
                raise not_run(TooManyCalls(f"{len(self.waiting)} calls wait for a slot already"))
            self.waiting[call_id] = _Waiting(call_id, method, metadata, arguments, deadline, flags)
        else:
            traffic.outbox.put_request(call_id, flags, deadline - now, method, metadata, arguments)
        self._next_id = call_id + 2
        self.pending[call_id] = token
        if flags & _STREAMS:
            traffic.open_streams(call_id, ours=flags & _ITEMS, theirs=flags & _STREAM)
        if deadline != math.inf:
            self._deadlines.add(call_id, deadline)
        return call_id

    def cancel(self, call_id: int, error: Error | None = None) -> None:
        """Gives a call up: `CallFailed` with the error follows, and the peer is told.

        A call that has its outcome already is left as it is.
        """
        self.give_up(call_id, error if error is not None else Cancelled("cancelled by the caller"))

    def most(self, call_id: int) -> int:
        """The octets that the result, or an item, of a call may have."""
        token = self.pending[call_id]
        asked = self._max_result(token) if token is not None else None
        return self._max_message if asked is None else min(asked, self._max_message)

    # What comes of them.

    def handle_response(self, call_id: int, message: bytes) -> None:
        """A call is answered with its result."""
        traffic = self._traffic
        # All empty where nothing of any call is out of the ordinary.
        if self.waiting or any(traffic.unusual):
            token = self.settle(call_id)
        else:
            # What is left of `settle`.
            token = self.pending.pop(call_id, self)
            if token is self:
                raise RemoteProtocolError(f"an answer to call {call_id}, which is not open")
        if token is not None:
            traffic.events.append(ResponseReceived(token, message))
        if traffic.is_ending:
            self._settled()

    def handle_error(self, flags: int, call_id: int, message: bytes) -> None:
        """A call is answered with an error."""
        body = ErrorBody.parse(message)
        token = self.settle(call_id)
        if token is not None:
            self._traffic.events.append(ErrorReceived(token, body, not flags & _NOT_PROCESSED))
        if self._traffic.is_ending:
            self._settled()

    def expire(self, call_id: int) -> None:
        """The deadline of a call has passed."""
        if self.pending.get(call_id) is None:
            # Nobody waits for it any more.
            return
        error = DeadlineExceeded("the deadline passed before the answer came")
        self.give_up(call_id, error, untold=not self._expiries.take(self._traffic.now))

    def settle(self, call_id: int) -> Any:
        """Frees the slot of a call; what its caller knows it by, or ``None`` where nobody waits.

        :raises RemoteProtocolError: there is no such call.
        """
        if call_id in self.waiting:
            raise RemoteProtocolError(f"an answer to call {call_id}, which was not made yet")
        try:
            token = self.pending.pop(call_id)
        except KeyError:
            raise RemoteProtocolError(f"an answer to call {call_id}, which is not open") from None
        traffic = self._traffic
        traffic.close_streams(call_id)
        traffic.discard(call_id)
        if traffic.drop(call_id):
            # Answered, that is refused, before it was all sent: the peer is told that no more of it comes.
            traffic.outbox.put_control(Kind.CANCEL, call_id)
        if self.waiting:
            self._start_waiting()
        return token

    def give_up(self, call_id: int, error: Error, *, untold: bool = False) -> None:
        """The caller stops waiting; the slot is free when the peer has answered.

        :param untold: the peer knows already that nobody waits.
        """
        token = self.pending.get(call_id)
        if token is None:
            return
        traffic = self._traffic
        message = traffic.outbox.cut.get(call_id)
        asked = message is None or message.kind != _REQUEST
        # An item that was begun goes on until the peer is told.
        begun = None if asked and message is not None and message.begun else traffic.drop(call_id)
        if self.waiting.pop(call_id, None) is not None or not (begun or asked):
            # Nothing of it was sent.
            self.settle(call_id)
            traffic.events.append(CallFailed(token, not_run(error)))
            self._settled()
            return
        if not asked:
            # The peer has no use for half a request.
            error.may_have_run = False
        # The peer does not count a request of which it has half, nor one whose items came.
        free = not asked or traffic.granted.is_used(call_id)
        traffic.stop_holding(call_id)
        traffic.close_streams(call_id)
        self.pending[call_id] = None
        traffic.events.append(CallFailed(token, error))
        if free or (not untold and not self._untold and self._tellings.take(traffic.now)):
            traffic.drop(call_id)
            traffic.outbox.put_control(Kind.CANCEL, call_id)
        elif not untold:
            if not self._untold:
                self._tell_later()
            self._untold.append(call_id)

    def begin(self, peer: Hello) -> None:
        """Takes what the peer has told of itself: as many calls as it serves at once may be given up at once."""
        self.slots = slots = peer.max_calls
        self.takes_streams = peer.stream_credit > 0
        self._tellings = Allowance(max(_TOLD_BURST, slots * 9 // 10), _TOLD_RATE, self._traffic.now)

    def tell(self) -> None:
        """Tells the peer of as many calls that were given up as it may be told of now."""
        told = 0
        for call_id in self._untold:
            if call_id in self.pending:
                if not self._tellings.take(self._traffic.now):
                    self._tell_later()
                    break
                self._traffic.drop(call_id)
                self._traffic.outbox.put_control(Kind.CANCEL, call_id)
            told += 1
        del self._untold[:told]

    def fail_unprocessed(self, last_call_id: int, error: type[Error], text: str) -> None:
        """Fails the calls that a GOAWAY with this last call id rules out, and those that were not sent."""
        failed = [call_id for call_id in self.pending if call_id > last_call_id or call_id in self.waiting]
        # First of all: a slot that comes free must not start one of them.
        self.waiting.clear()
        for call_id in failed:
            token = self.settle(call_id)
            if token is not None:
                self._traffic.events.append(CallFailed(token, not_run(error(text))))

    def end(self, error: Error | None) -> None:
        """The conversation is over; to be called while what was not sent is still in line."""
        unsent = {
            one.call_id for one in self._traffic.outbox.cut.values() if one.kind == _REQUEST
        } | self.waiting.keys()
        why = error.message if error is not None else "the connection was closed"
        for call_id, token in self.pending.items():
            if token is not None:
                lost = type(error)(why) if isinstance(error, ConnectionLost) else ConnectionLost(why)
                lost.__cause__ = error.__cause__ if isinstance(error, ConnectionLost) else error
                lost.may_have_run = call_id not in unsent
                self._traffic.events.append(CallFailed(token, lost))
        self.pending.clear()
        self.waiting.clear()
        self._untold.clear()

    def _start_waiting(self) -> None:
        free = self.slots - (len(self.pending) - len(self.waiting))
        traffic = self._traffic
        while free > 0 and self.waiting and self.is_open:
            call = self.waiting.pop(next(iter(self.waiting)))
            free -= 1
            remaining = call.deadline - traffic.now
            traffic.outbox.put_request(call.call_id, call.flags, remaining, call.method, call.metadata, call.arguments)
            if call.flags & _ITEMS:
                traffic.events.append(CreditReceived(call.call_id))

    def _not_open(self) -> Error:
        if self._traffic.is_closed:
            return not_run(ConnectionLost("the connection is closed"))
        if self._traffic.is_ending:
            return not_run(GoingAway("the conversation is ending and takes no new calls"))
        return not_run(LocalProtocolError("the conversation is not open yet"))
