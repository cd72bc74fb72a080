"""Two conversations and a simulated link between them, in virtual time.

Knows octets and the clock: what one end sends lies in the link until a test delivers it, whole or in parts.
"""

from __future__ import annotations

import itertools
import math
import struct
from typing import Any, TypeVar

from protoframe.core.conversation import Conversation
from protoframe.core.events import (
    CallFailed,
    Ended,
    EndReceived,
    ErrorReceived,
    Event,
    RequestReceived,
    ResponseReceived,
)
from protoframe.core.frames import serialize_preface
from protoframe.core.limits import Limits
from protoframe.core.messages import Outbox
from protoframe.core.state import Role
from protoframe.core.stream import FrameReader
from protoframe.errors import ConnectionLost, RemoteProtocolError, VersionMismatch

E = TypeVar("E")

#: Small enough that a few octets meet every bound.
SMALL = Limits(max_frame=2048, max_message=6000, max_unfinished=12000, max_calls=3, max_waiting=4)

HELLO, REQUEST, RESPONSE, ERROR, CHUNK, CANCEL, PING, PONG, GOAWAY, ITEM, END, CREDIT, STOP = range(1, 14)
MORE, NOT_PROCESSED, JSON, ITEMS, STREAM, ONEWAY = 1, 2, 4, 8, 16, 32

SETTINGS = (
    b"\x85\xa9max_frame\xcd\x08\x00\xabmax_message\xcd\x10\x00\xaemax_unfinished\xcd\x20\x00"
    b"\xa9max_calls\x02\xa5agent\xa0"
)
#: The same of a peer that takes streams: 4,096 octets of each, 8,192 of all.
STREAMING = b"\x87" + SETTINGS[1:] + b"\xadstream_credit\xcd\x10\x00\xb1connection_credit\xcd\x20\x00"


def frame(kind: int, flags: int = 0, call_id: int = 0, payload: bytes = b"") -> bytes:
    """A frame, laid out as the specification says and not as the code does."""
    return struct.pack("!HBBQ", len(payload), kind, flags, call_id) + payload


def serialize_message(kind: int, flags: int, call_id: int, message: bytes, max_frame: int) -> list[bytes]:
    """The frames that a message goes out in."""
    outbox = Outbox(max_frame)
    outbox.is_confirmed = True
    outbox.begin(max_frame, len(message))
    outbox.put(kind, flags, call_id, message)
    return outbox.poll(1 << 32)


def request_message(method: bytes = b"P.m", arguments: bytes = b"\x80", milliseconds: int = 10_000) -> bytes:
    """The message of a REQUEST without metadata."""
    return struct.pack("!IHH", milliseconds, len(method), 0) + method + arguments


def item_message(count: int = 1, octets: int = 100) -> bytes:
    """The message of an ITEM; what is in it no test of the core looks at."""
    return struct.pack("!H", count) + bytes(octets)


def cut(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """The frames in octets that follow a preface: kind, flags, call id, payload."""
    frames = []
    while data:
        length, kind, flags, call_id = struct.unpack_from("!HBBQ", data)
        frames.append((kind, flags, call_id, bytes(data[12 : 12 + length])))
        data = data[12 + length :]
    return frames


class End:
    """One end: a conversation, what reads for it, and what happened there."""

    def __init__(self, role: Role, limits: Limits, now: float) -> None:
        self.now = now
        self.limits = limits
        self.conversation = Conversation(role, limits, now, "test")
        self.reader = FrameReader(limits.max_frame, limits.frame_timeout)
        self.events: list[Event] = []
        self.link = bytearray(serialize_preface())
        self._tokens = itertools.count(1)
        self._prefix = role.name[0]

    def send(self, allowance: int = 1 << 30) -> None:
        """Puts what there is to send into the link: all that is whole, and about so much of large messages."""
        outbox = self.conversation.outbox
        for octets in (*outbox.poll(1 << 30, large=False), *outbox.poll(allowance)):
            self.link += octets

    def receive(self, octets: bytes) -> None:
        """Takes octets from the link."""
        try:
            frames = self.reader.feed(octets, self.now)
        except (RemoteProtocolError, VersionMismatch) as error:
            self.conversation.end(error)
        else:
            self.conversation.handle_frames(frames, self.now)
        self.look()

    def look(self) -> None:
        """Notes what happened."""
        self.events += self.conversation.poll_events()

    def lose(self) -> None:
        """The link is gone."""
        self.conversation.end(ConnectionLost("cut"))
        self.look()

    def call(self, arguments: bytes = b"\x80", timeout: float = 10.0, **options: Any) -> tuple[int, str]:
        """Calls the other end; the call's id and its token."""
        token = f"{self._prefix}{next(self._tokens)}"
        return self.conversation.request(b"P.m", arguments, token, self.now + timeout, self.now, **options), token

    def of(self, kind: type[E]) -> list[E]:
        """The events of one kind so far."""
        return [event for event in self.events if isinstance(event, kind)]

    def outcomes(self, token: str) -> list[Event]:
        """What became of a call."""
        return [
            event
            for event in self.events
            if isinstance(event, ResponseReceived | ErrorReceived | EndReceived | CallFailed) and event.token == token
        ]

    def outcome(self, token: str) -> Any:
        """What became of a call: exactly one event."""
        (event,) = self.outcomes(token)
        return event

    @property
    def request(self) -> RequestReceived:
        """The last request that came."""
        return self.of(RequestReceived)[-1]

    @property
    def ended(self) -> Ended:
        """How the conversation ended: exactly once."""
        (event,) = self.of(Ended)
        return event


class Pair:
    """Two ends.  Time passes only in `advance`."""

    def __init__(self, initiator: Limits | None = None, acceptor: Limits | None = None, *, opened: bool = True) -> None:
        self.now = 1000.0
        self.initiator = End(Role.INITIATOR, initiator or Limits(), self.now)
        self.acceptor = End(Role.ACCEPTOR, acceptor or Limits(), self.now)
        self.ends = (self.initiator, self.acceptor)
        if opened:
            self.settle()

    def other(self, end: End) -> End:
        """The other end."""
        return self.acceptor if end is self.initiator else self.initiator

    def deliver(self, sender: End, octets: int | None = None) -> int:
        """Delivers what is in the link from one end, or its first octets; how many they were."""
        part = bytes(sender.link[:octets])
        del sender.link[: len(part)]
        if part:
            self.other(sender).receive(part)
        return len(part)

    def settle(self) -> None:
        """Sends and delivers until nothing is left to."""
        busy = True
        while busy:
            busy = False
            for end in self.ends:
                end.look()
                end.send()
                busy = bool(self.deliver(end)) or busy

    def advance(self, seconds: float, *, arriving: bool = False) -> None:
        """Lets time pass, timer by timer; what is sent meanwhile stays in the link, or arrives at once."""
        until = self.now + seconds
        while True:
            due = min((end.conversation.next_timer() for end in self.ends), default=math.inf)
            self.now = min(max(due, self.now), until)
            for end in self.ends:
                end.now = self.now
                if end.conversation.next_timer() <= self.now:
                    end.conversation.handle_timer(self.now)
                end.look()
            if arriving:
                self.settle()
            if due > until:
                return


def opened(limits: Limits | None = None, role: Role = Role.ACCEPTOR, settings: bytes = SETTINGS) -> End:
    """One end whose peer is the test: the conversation is open, and what it sent is taken out of the link."""
    end = End(role, limits or Limits(), 1000.0)
    end.receive(serialize_preface() + frame(HELLO, payload=settings))
    end.send()
    end.link.clear()
    end.events.clear()
    return end
