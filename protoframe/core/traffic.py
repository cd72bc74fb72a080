"""What goes over a conversation: messages, the parts of large ones, and streams with their credit.

Knows octets, call ids and events; not which end makes a call, nor what becomes of it: that is for
`protoframe.core.outgoing` and `protoframe.core.incoming`, which share this.
"""

from __future__ import annotations

from collections.abc import Sized

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
    :ivar unusual: what all of this keeps of messages in parts and of streams: all empty where calls and answers are
        whole frames.  What was not made yet is not among them.
    :ivar deadlines: of calls in either direction, and of the conversation itself; ``None`` while there is no more than
        one of the conversation.
    :ivar max_message: octets of the arguments, of a result or of an item that the peer takes.
    :ivar is_ending: whether a GOAWAY went one way or the other.
    :ivar is_closed: whether the conversation is over.
    """

    __slots__ = (
        "_assembler",
        "_credit",
        "_granted",
        "_limits",
        "_peer",
        "deadlines",
        "events",
        "is_closed",
        "is_ending",
        "max_message",
        "now",
        "outbox",
        "unusual",
    )

    def __init__(self, limits: Limits, now: float) -> None:
        self.now = now
        self.events: list[Event] = []
        self.outbox = Outbox(limits.max_frame)
        # Made when first needed: a connection that is idle has none of them.
        self._assembler: Assembler | None = None
        self._credit: Received | None = None
        self._granted: Granted | None = None
        self.unusual: tuple[Sized, ...] = (self.outbox.cut,)
        self.deadlines: Deadlines | None = None
        self.max_message = 0
        self.is_ending = False
        self.is_closed = False
        self._limits = limits
        self._peer: Hello | None = None

    @property
    def assembler(self) -> Assembler:
        """Messages whose rest is on the way here."""
        assembler = self._assembler
        if assembler is None:
            assembler = self._assembler = Assembler(self._limits.max_unfinished)
            self.unusual += (assembler.messages,)
        return assembler

    @property
    def credit(self) -> Received:
        """What the peer lets this end send of streams."""
        credit = self._credit
        if credit is None:
            peer = self._peer
            credit = Received(peer.stream_credit, peer.connection_credit) if peer is not None else Received(0, 0)
            self._credit = credit
            self.unusual += (credit.streams,)
        return credit

    @property
    def granted(self) -> Granted:
        """What this end lets the peer send."""
        granted = self._granted
        if granted is None:
            granted = self._granted = Granted(self._limits)
            self.unusual += (granted.streams,)
        return granted

    def begin(self, peer: Hello) -> None:
        """Takes what the peer has told of itself."""
        self._peer = peer
        self.max_message = peer.max_message
        self.outbox.begin(peer.max_frame, peer.max_unfinished)

    def end(self) -> None:
        """The conversation is over."""
        self.outbox.drop_all()
        if self.deadlines is not None:
            self.deadlines.clear()
        if self._assembler is not None:
            self._assembler.clear()
        if self._credit is not None:
            self._credit.streams.clear()
        if self._granted is not None:
            self._granted.streams.clear()

    def is_on_the_way(self, call_id: int, kind: Kind | None = None) -> bool:
        """Whether a message of a call, of some kind or of any, is unfinished."""
        assembler = self._assembler
        if assembler is None:
            return False
        return call_id in assembler.messages if kind is None else assembler.is_on_the_way(call_id, kind)

    # Messages.

    def discard(self, call_id: int) -> None:
        """Forgets what came of a message, if there is one; its rest will not come."""
        if self._assembler is not None:
            self.stop_holding(call_id)
            self._assembler.discard(call_id)

    def stop_holding(self, call_id: int) -> None:
        """Forgets what came of a message, if there is one, and only counts the rest."""
        if self._assembler is None:
            return
        message = self._assembler.messages.get(call_id)
        if message is not None and message.room is not None:
            self._assembler.stop_holding(call_id)
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
        if self._credit is not None:
            self._credit.close(call_id)
        if self._granted is not None:
            self._granted.close(call_id)

    def send_items(self, call_id: int, count: int, octets: bytes | bytearray) -> None:
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
