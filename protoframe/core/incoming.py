"""The calls that the peer makes: the slots they take, their deadlines, how they are cancelled, and their answers.

Knows how many of them there may be, and how often they may be cancelled; not what runs for them, nor how a conversation
opens and ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from protoframe.core.events import RequestCancelled, RequestReceived
from protoframe.core.floods import Allowance
from protoframe.core.frames import KEY_LENGTH, ErrorBody, Flag, Key, Kind, parse_first_part, parse_request, split_key
from protoframe.core.limits import Limits
from protoframe.core.traffic import Traffic
from protoframe.errors import (
    CancelFlood,
    Cancelled,
    DeadlineExceeded,
    Error,
    GoingAway,
    LocalProtocolError,
    MessageTooLarge,
    RemoteProtocolError,
    TooManyCalls,
)

__all__ = ["IncomingCalls"]

_RESPONSE = int(Kind.RESPONSE)
_ERROR = int(Kind.ERROR)
_NOT_PROCESSED = int(Flag.NOT_PROCESSED)
_ITEMS = int(Flag.ITEMS)
_STREAM = int(Flag.STREAM)
_STREAMS = _ITEMS | _STREAM
_ONEWAY = int(Flag.ONEWAY)
_KEYED = int(Flag.KEYED)
_SPECIAL = _ONEWAY | _KEYED


class IncomingCalls:
    """The calls that the peer makes.

    :param traffic: what they come over.
    :param limits: what this end takes.
    :param parity: that of the peer's call ids.
    :param now: the time.
    :param max_arguments: gives the octets that the arguments of a method may have, where they are bounded.
    :param settled: called when a call is answered.
    :param watch: called to have `expire` called with an id at a time.
    :ivar is_open: whether calls are taken.
    :ivar running: those that are not answered yet.  Each takes a slot but those that want no answer: their caller is
        not told when one is free, so it is for whoever serves them to bound them.
    :ivar last: the highest id that was seen.
    :ivar last_late: the highest of those that came after the last GOAWAY: items of theirs may follow.
    :ivar streaming: those of whose answer items were sent.
    :ivar suspended: those that have a deadline to watch.
    """

    __slots__ = (
        "_cancels",
        "_last_promised",
        "_limits",
        "_max_arguments",
        "_max_calls",
        "_max_message",
        "_oneway",
        "_parity",
        "_settled",
        "_traffic",
        "_watch",
        "is_open",
        "last",
        "last_late",
        "running",
        "streaming",
        "suspended",
    )

    def __init__(
        self,
        traffic: Traffic,
        limits: Limits,
        parity: int,
        now: float,
        max_arguments: Callable[[bytes], int | None],
        settled: Callable[[], None],
        watch: Callable[[int, float], None],
    ) -> None:
        self.is_open = False
        self.running: set[int] = set()
        self.last = 0
        self.last_late = 0
        # Sets of ids, but an empty dictionary takes a third of an empty set.
        self.streaming: dict[int, None] = {}
        self.suspended: dict[int, None] = {}
        self._traffic = traffic
        self._limits = limits
        self._max_calls = limits.max_calls
        self._max_message = limits.max_message
        self._parity = parity
        self._max_arguments = max_arguments
        self._settled = settled
        self._watch = watch
        # What a GOAWAY said of it: the calls up to this one are answered in any case.
        self._last_promised = 0
        # Of those that run, the ones that want no answer.
        self._oneway: dict[int, None] = {}
        self._cancels = Allowance(max(limits.cancel_burst, limits.max_calls), limits.cancel_rate, now)

    # What is done about them.

    def respond(self, call_id: int, result: bytes) -> None:
        """Answers a call with its encoded result.

        :raises MessageTooLarge: the result is more than the peer takes; the call still wants its answer.
        :raises LocalProtocolError: there is no such call, or its answer is a stream.
        """
        traffic = self._traffic
        if len(result) > traffic.max_message:
            raise MessageTooLarge(f"the result is {len(result)} bytes, and the peer takes {traffic.max_message}")
        is_wanted = True
        # All empty where nothing of any call is out of the ordinary.
        if self.suspended or self.streaming or self._oneway or any(traffic.unusual):
            if call_id in self.streaming:
                raise LocalProtocolError(f"the answer to call {call_id} is a stream")
            is_wanted = call_id not in self._oneway
            self.leave_slot(call_id)
        else:
            # What is left of `leave_slot`.
            try:
                self.running.remove(call_id)
            except KeyError:
                raise self._not_open(call_id) from None
        if is_wanted:
            traffic.outbox.put(_RESPONSE, 0, call_id, result)
        if traffic.is_ending:
            self._settled()

    def refuse(self, call_id: int, body: ErrorBody, *, processed: bool = True) -> None:
        """Answers a call with an error; ``processed=False`` promises that nothing was done.

        :raises LocalProtocolError: there is no such call.
        """
        message = body.serialize()
        oneway = call_id in self._oneway
        self.leave_slot(call_id)
        if not oneway:
            # Of a stream part of an item may be on its way; no more of it comes.
            self._traffic.drop(call_id)
            self._traffic.outbox.put(_ERROR, 0 if processed else _NOT_PROCESSED, call_id, message)
        if self._traffic.is_ending:
            self._settled()

    def suspend(self, call_id: int, deadline: float) -> None:
        """Says that a call goes on: at its deadline `RequestCancelled` asks for its end."""
        if call_id in self.running and deadline != math.inf:
            self.suspended[call_id] = None
            self._watch(call_id, deadline)

    def leave_slot(self, call_id: int) -> None:
        """A call is over.

        :raises LocalProtocolError: there is no such call.
        """
        try:
            self.running.remove(call_id)
        except KeyError:
            raise self._not_open(call_id) from None
        self.suspended.pop(call_id, None)
        self._oneway.pop(call_id, None)
        self.streaming.pop(call_id, None)
        self._traffic.stop_holding(call_id)
        self._traffic.close_streams(call_id)

    def stop(self) -> None:
        """No new calls are taken from now on: those up to `last` are answered."""
        self._last_promised = self.last

    def end(self) -> None:
        """The conversation is over: what runs is to end; to be called while what came of messages is still held."""
        for call_id in sorted(self.running):
            if not self._traffic.is_on_the_way(call_id, Kind.REQUEST):
                self._traffic.events.append(RequestCancelled(call_id, False))
        self.running.clear()
        self.streaming.clear()
        self.suspended.clear()
        self._oneway.clear()

    # What comes.

    def expire(self, call_id: int) -> None:
        """The deadline of a call has passed."""
        if call_id not in self.running:
            # It was cancelled while it came, and another with its id came since.
            return
        if self._traffic.is_on_the_way(call_id, Kind.REQUEST):
            self._traffic.stop_holding(call_id)
            self._refuse(call_id, DeadlineExceeded("the deadline passed before the request was here"))
        elif call_id in self.suspended:
            # One whose REQUEST came in parts was suspended twice.
            del self.suspended[call_id]
            self._traffic.events.append(RequestCancelled(call_id, True))

    def handle_request(self, flags: int, call_id: int, message: bytes, begun: float) -> None:
        """A call came, whole.

        :param begun: when its first frame came.
        """
        if call_id & 1 != self._parity or not call_id:
            raise RemoteProtocolError(f"REQUEST: {call_id} is no call id of the peer's")
        if call_id in self.running:
            raise RemoteProtocolError(f"REQUEST: call {call_id} is open already")
        remaining, method, metadata, arguments = parse_request(message)
        key: Key | None = None
        if flags or not remaining or len(arguments) > self._max_message or len(self.running) >= self._max_calls:
            if flags & _SPECIAL:
                self._check_flags(flags, call_id)
                if flags & _KEYED:
                    key, arguments = split_key(arguments)
            if not self._take_slot(flags, call_id, remaining, len(arguments), self._max_message):
                return
            if flags & _STREAMS:
                self._traffic.open_streams(call_id, ours=flags & _STREAM, theirs=flags & _ITEMS)
        else:
            # What is left of `_take_slot` where there is nothing out of the ordinary.
            self.running.add(call_id)
            if call_id > self.last:
                self.last = call_id
        self._traffic.events.append(
            RequestReceived(call_id, method, begun + remaining, metadata, arguments, flags, key)
        )

    def begin_request(self, flags: int, call_id: int, total: int, part: bytes) -> bool:
        """The first part of a call came; whether the rest is wanted.  Where it is not, the refusal is sent."""
        self._check_id("REQUEST", call_id)
        if call_id in self.running:
            raise RemoteProtocolError(f"REQUEST: call {call_id} is open already")
        self._check_flags(flags, call_id)
        remaining, method, length = parse_first_part(part, total)
        if flags & _KEYED:
            length = max(0, length - KEY_LENGTH)
        if not self.is_open:
            self.handle_late_request(flags, call_id)
            return False
        asked = self._max_arguments(method)
        most = self._max_message if asked is None else min(asked, self._max_message)
        if not self._take_slot(flags, call_id, remaining, length, most):
            return False
        self.suspend(call_id, self._traffic.now + remaining)
        return True

    def _check_flags(self, flags: int, call_id: int) -> None:
        """Whether flags go together."""
        if flags & _ONEWAY and flags & _STREAMS:
            raise RemoteProtocolError(f"REQUEST: ONEWAY, and streams, of call {call_id}")
        if flags & _KEYED and flags & (_ONEWAY | _STREAMS):
            raise RemoteProtocolError(f"REQUEST: a key, and streams or ONEWAY, of call {call_id}")

    def _take_slot(self, flags: int, call_id: int, remaining: float, length: int, most: int) -> bool:
        """Whether a call may be served; where it may not, the refusal is sent."""
        if call_id > self.last:
            self.last = call_id
        self.running.add(call_id)
        if flags & _ONEWAY:
            self._oneway[call_id] = None
        elif len(self.running) - len(self._oneway) > self._max_calls:
            if not self._cancels.take(self._traffic.now):
                raise CancelFlood(f"more calls are opened than {self._max_calls} at once, again and again")
            self._refuse(call_id, TooManyCalls(f"{self._max_calls} calls are in flight on this connection already"))
            return False
        if length > most:
            self._refuse(call_id, MessageTooLarge(f"the arguments are {length} bytes, and this end takes {most}"))
        elif not remaining:
            self._refuse(call_id, DeadlineExceeded("the deadline passed before the request was here"))
        else:
            return True
        return False

    def handle_late_request(self, flags: int, call_id: int) -> None:
        """A call came that was on the way when GOAWAY was sent.

        Requests may overtake each other, so its id may be one of those that GOAWAY said would be answered; to a later
        one the caller expects no answer.
        """
        self._check_id("REQUEST", call_id)
        self.last_late = max(self.last_late, call_id)
        if call_id <= self._last_promised and not flags & _ONEWAY:
            body = _body_of(GoingAway("this end takes no new calls"))
            self._traffic.outbox.put(_ERROR, _NOT_PROCESSED, call_id, body.serialize())

    def handle_cancel(self, call_id: int) -> None:
        """The caller does not wait any more."""
        self._check_id("CANCEL", call_id)
        traffic = self._traffic
        half = traffic.is_on_the_way(call_id, Kind.REQUEST)
        counts = call_id in self.running and call_id not in self.streaming and not half
        if counts and not self._cancels.take(traffic.now):
            most = max(self._limits.cancel_burst, self._limits.max_calls)
            raise CancelFlood(f"more than {most} calls are cancelled at once")
        if traffic.is_on_the_way(call_id, Kind.ITEM):
            traffic.discard(call_id)
        if half:
            # Its rest will not come.  Where it was refused already, nobody waits for an answer.
            traffic.assembler.discard(call_id)
            if call_id in self.running:
                self._refuse(call_id, Cancelled())
        elif call_id in self.running:
            traffic.events.append(RequestCancelled(call_id, False))
        elif traffic.drop(call_id) is not None:
            # The result is half sent, or not yet: the caller hears at once that no more of it comes.
            traffic.outbox.put(_ERROR, 0, call_id, _body_of(Cancelled()).serialize())

    def _check_id(self, kind: str, call_id: int) -> None:
        if call_id & 1 != self._parity or not call_id:
            raise RemoteProtocolError(f"{kind}: {call_id} is no call id of the peer's")

    def _not_open(self, call_id: int) -> LocalProtocolError:
        return LocalProtocolError(f"call {call_id} is not open")

    def _refuse(self, call_id: int, error: Error) -> None:
        """Answers a call that certainly did not run."""
        self.refuse(call_id, _body_of(error), processed=False)


def _body_of(error: Error) -> ErrorBody:
    return ErrorBody(error.status, error.type_name, error.message)
