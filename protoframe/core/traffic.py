"""What goes over a conversation: messages, the parts of large ones, and streams with their credit.

Knows octets, call ids and events; not which end makes a call, nor what becomes of it: that is for
`protoframe.core.outgoing` and `protoframe.core.incoming`, which share this.
"""

from __future__ import annotations

from protoframe.core.credit import Granted, Received, cost_of
from protoframe.core.deadlines import Deadlines
from protoframe.core.events import CreditReceived, Event
from protoframe.core.frames import ARRAY_HEAD, COUNT, Hello, Kind, serialize_credit
from protoframe.core.limits import Limits
from protoframe.core.messages import Assembler, Outbox
from protoframe.errors import MessageTooLarge

__all__ = ["Traffic"]

_ITEM = int(Kind.ITEM)


class Traffic:
    """What both directions of calls share.

    :ivar now: the time, as it was told last.
    :ivar events: what happened and was not polled yet.
    :ivar outbox: what is to be sent.
    :ivar assembler: messages whose rest is on the way here.
    :ivar credit: what the peer lets this end send of streams.
    :ivar granted: what this end lets the peer send.
    :ivar unusual: what all of this keeps of messages in parts and of streams: all empty where calls and answers are
        whole frames.
    :ivar deadlines: of calls in either direction, and of the conversation itself.
    :ivar max_message: octets of the arguments, of a result or of an item that the peer takes.
    :ivar is_ending: whether a GOAWAY went one way or the other.
    :ivar is_closed: whether the conversation is over.
    """

    def __init__(self, limits: Limits, now: float, deadlines: Deadlines) -> None:
        self.now = now
        self.events: list[Event] = []
        self.outbox = Outbox(limits.max_frame)
        self.assembler = Assembler(limits.max_unfinished)
        self.credit = Received()
        self.granted = Granted(limits)
        self.unusual = (self.assembler.messages, self.outbox.cut, self.credit.streams, self.granted.streams)
        self.deadlines = deadlines
        self.max_message = 0
        self.is_ending = False
        self.is_closed = False

    def begin(self, peer: Hello) -> None:
        """Takes what the peer has told of itself."""
        self.max_message = peer.max_message
        self.outbox.begin(peer.max_frame, peer.max_unfinished)
        self.credit.begin(peer.stream_credit, peer.connection_credit)

    def end(self) -> None:
        """The conversation is over."""
        self.outbox.drop_all()
        self.deadlines.clear()
        self.assembler.clear()
        self.credit.streams.clear()
        self.granted.streams.clear()

    # Messages.

    def discard(self, call_id: int) -> None:
        """Forgets what came of a message, if there is one; its rest will not come."""
        self.stop_holding(call_id)
        self.assembler.discard(call_id)

    def stop_holding(self, call_id: int) -> None:
        """Forgets what came of a message, if there is one, and only counts the rest."""
        message = self.assembler.messages.get(call_id)
        if message is not None and message.room is not None:
            self.assembler.stop_holding(call_id)
            if message.kind == _ITEM:
                self.give_back(call_id, cost_of(message.total, 1))

    def drop(self, call_id: int) -> bool | None:
        """Takes a large message out of the line as `Outbox.drop` does; an item that was not begun costs nothing."""
        message = self.outbox.cut.get(call_id)
        if message is None:
            return None
        begun = self.outbox.drop(call_id)
        if message.kind == _ITEM and not begun and self.credit.refund(call_id, cost_of(message.total, 1)):
            self.events.append(CreditReceived(0))
        return begun

    # Streams.

    def open_streams(self, call_id: int, *, ours: int, theirs: int) -> None:
        """The streams of a call begin."""
        if ours:
            self.credit.open(call_id)
        if theirs:
            self.granted.open(call_id)

    def close_streams(self, call_id: int) -> None:
        """Nothing more of a call's streams is sent or wanted."""
        if self.credit.streams:
            self.credit.close(call_id)
        if self.granted.streams:
            self.granted.close(call_id)

    def send_items(self, call_id: int, count: int, octets: bytes) -> None:
        """Sends items, an encoded array of them; there must be credit.

        :raises MessageTooLarge: it is more than the peer takes.
        """
        if len(octets) > self.max_message + ARRAY_HEAD:
            raise MessageTooLarge(f"an item is {len(octets)} bytes, and the peer takes {self.max_message}")
        head = COUNT.pack(count)
        self.credit.spend(call_id, cost_of(len(head) + len(octets), count))
        self.outbox.put_parts(_ITEM, 0, call_id, head, octets)

    def stop_items(self, call_id: int) -> None:
        """Sends no more of a stream; an item that was begun is finished, for it is no message of its own."""
        message = self.outbox.cut.get(call_id)
        if message is not None and message.kind == _ITEM and not message.begun:
            self.drop(call_id)
        self.credit.close(call_id)

    def give_back(self, call_id: int, cost: int) -> None:
        """Items that came are taken, or nobody wants them: the peer may send more."""
        self.granted.give_back(call_id, cost)
        self.grant(call_id)

    def grant(self, call_id: int) -> None:
        """Lets the peer send more, where that is worth a frame."""
        if not self.is_closed:
            for grant, octets in self.granted.grants(call_id):
                self.outbox.put_control(Kind.CREDIT, grant, serialize_credit(octets))
