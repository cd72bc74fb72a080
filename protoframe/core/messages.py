"""Messages and the frames that they travel in: an `Outbox` cuts large ones, an `Assembler` puts them together.

Knows frames and their order; not what a call is.  Large messages take turns, a frame each, so that none holds up
another, nor a small one, for long; both ends bound how much of them is on the way at once.
"""

from __future__ import annotations

import typing
from collections import deque
from collections.abc import Iterator

import msgspec

from protoframe.core.frames import (
    HEADER,
    LONGEST_REMAINING,
    REQUEST_FRAME,
    Flag,
    Frame,
    Kind,
    count_frames,
    cut_message,
    milliseconds_of,
    serialize_frame,
    serialize_request,
)
from protoframe.core.limits import LARGEST_FRAME
from protoframe.errors import RemoteProtocolError, TooMuchUnfinished

__all__ = ["BACKLOG", "Assembler", "Message", "Outbox"]

_MORE = int(Flag.MORE)
_REQUEST = int(Kind.REQUEST)
_pack_header = HEADER.pack
_pack_request = REQUEST_FRAME.pack

#: Octets that may wait to be sent while more is served, or asked of generators.
BACKLOG = 1024 * 1024

#: Octets that may stand beside the arguments in a REQUEST, or beside the detail in an ERROR.
SLACK = 2 * LARGEST_FRAME

#: Octets of the room that is kept, of how many messages it may be, and how many of each.
_KEPT_ROOM = 8 * 1024 * 1024 + 2 * SLACK
_KEPT_ROOMS = 32
_MOST_ROOM = 4 * 1024 * 1024 + SLACK


class _Large(msgspec.Struct):
    """A message that takes several frames.

    :ivar frames: those that are not sent, each made when its turn has come.
    :ivar left: how many they are.
    """

    kind: int
    call_id: int
    total: int
    frames: Iterator[tuple[bytes, memoryview]]
    left: int
    begun: bool = False


#: In place of a line that nothing was ever in: a deque takes 760 bytes, and most connections send nothing large.
_NO_LINE: deque[_Large] = typing.cast("deque[_Large]", ())


class Outbox:
    """What is to be sent: whole messages in order, and large ones in turns.

    :ivar max_frame: octets of a frame that the peer takes.
    :ivar max_unfinished: octets of large messages that the peer holds at once.
    :ivar frames: what waits that is whole.
    :ivar large: large messages that take turns; empty when there is none.
    :ivar cut: large messages that are not all sent, by call id.
    :ivar departed: the call ids of those that are, since whoever waits for them last emptied it.
    :ivar octets: what waits to be sent, headers not counted.
    :ivar is_left: whether something waited on when `poll` was called last.
    :ivar is_confirmed: whether the carrier tells by `confirm` when a large message has come.  One that keeps frames in
        order, a stream of bytes, need not: what it sends later comes later.  Nor does such a one need frames of large
        messages in one piece.
    """

    __slots__ = (
        "_large_octets",
        "_longest",
        "_unconfirmed",
        "_waiting",
        "_waiting_octets",
        "cut",
        "departed",
        "frames",
        "is_confirmed",
        "is_left",
        "large",
        "max_frame",
        "max_unfinished",
        "octets",
    )

    def __init__(self, max_frame: int) -> None:
        self.max_frame = max_frame
        self.max_unfinished = 0
        self._longest = max_frame - HEADER.size
        self.frames: list[bytes] = []
        self.large = _NO_LINE
        self.cut: dict[int, _Large] = {}
        self.departed: tuple[int, ...] = ()
        self.octets = 0
        self.is_left = False
        self.is_confirmed = False
        # Of large messages that are all sent, or dropped, and of which the peer may not know that yet.
        self._unconfirmed = 0
        self._large_octets = 0
        self._waiting = _NO_LINE
        self._waiting_octets = 0

    def __bool__(self) -> bool:
        return bool(self.frames or self.large)

    def begin(self, max_frame: int, max_unfinished: int) -> None:
        """Takes what the peer has told of itself."""
        self.max_frame = max_frame
        self.max_unfinished = max_unfinished
        self._longest = max_frame - HEADER.size

    def put(self, kind: int, flags: int, call_id: int, message: bytes) -> None:
        """Lines a message up."""
        length = len(message)
        if length <= self._longest:
            self.frames.append(_pack_header(length, kind, flags, call_id) + message)
            self.octets += length
        else:
            self._put_large(kind, flags, call_id, b"", message)

    def put_request(
        self,
        call_id: int,
        flags: int,
        remaining: float,
        method: bytes,
        metadata: bytes,
        arguments: bytes,
    ) -> None:
        """Lines a REQUEST up."""
        name = len(method)
        length = 8 + name + len(arguments)
        if metadata:
            length += len(metadata)
        if length <= self._longest:
            # What `serialize_request` and `serialize_frame` would do, in one step: every call comes by here.
            milliseconds = int(remaining * 1000) if 0 < remaining < LONGEST_REMAINING else milliseconds_of(remaining)
            head = _pack_request(length, _REQUEST, flags, call_id, milliseconds, name, len(metadata))
            self.frames.append(head + method + metadata + arguments if metadata else head + method + arguments)
            self.octets += length
        else:
            head = serialize_request(remaining, method, metadata, b"")
            self._put_large(_REQUEST, flags, call_id, head, arguments)

    def put_parts(self, kind: int, flags: int, call_id: int, head: bytes, body: bytes | bytearray) -> None:
        """Lines a message up of two parts."""
        if len(head) + len(body) <= self._longest:
            self.put(kind, flags, call_id, head + body)
        else:
            self._put_large(kind, flags, call_id, head, body)

    def _put_large(self, kind: int, flags: int, call_id: int, head: bytes, body: bytes | bytearray) -> None:
        """Lines a message up that takes several frames; its body is not copied before these are made."""
        if self.large is _NO_LINE:
            self.large, self._waiting = deque(), deque()
        if len(head) > self._longest // 2:
            head, body = b"", head + body
        total = len(head) + len(body)
        frames = cut_message(kind, flags, call_id, head, body, self.max_frame)
        message = _Large(kind, call_id, total, frames, count_frames(total, self.max_frame))
        self.cut[call_id] = message
        self._waiting.append(message)
        self._waiting_octets += total
        self.octets += total
        self._start()

    def put_control(self, kind: int, call_id: int, payload: bytes = b"") -> None:
        """Lines a frame up that is no message."""
        self.octets += len(payload)
        self.frames.append(serialize_frame(kind, 0, call_id, payload))

    def drop(self, call_id: int) -> bool | None:
        """Takes a large message that is not all sent out of the line.

        :return: whether its first frame was sent already; ``None`` where there is no such message.
        """
        if call_id not in self.cut:
            return None
        del self.cut[call_id]
        for line in (self.large, self._waiting):
            for message in line:
                if message.call_id == call_id:
                    line.remove(message)
                    self.octets -= message.total
                    if line is self.large:
                        self._large_octets -= message.total
                        if message.begun and self.is_confirmed:
                            self._unconfirmed += message.total
                        self._start()
                    else:
                        self._waiting_octets -= message.total
                    return message.begun
        return None

    def drop_all(self) -> None:
        """Takes all large messages that are not all sent out of the line."""
        self.cut.clear()
        self.large = self._waiting = _NO_LINE
        self.octets -= self._large_octets + self._waiting_octets
        self._large_octets = self._waiting_octets = 0

    def poll(self, allowance: int, *, large: bool = True) -> list[bytes]:
        """Takes out frames of about ``allowance`` octets: those that are whole messages, then large ones in turns.

        One of a large message is two entries, its header (with what else is short) and a view of a part of the message,
        unless the carrier is one that confirms.

        :param large: whether any of the latter.
        """
        if not self.cut and self.octets <= allowance:
            # Most often there is nothing else to look at.
            frames = self.frames
            self.frames = []
            self.octets = 0
            self.is_left = False
            return frames
        frames = self.frames
        whole = self.octets - self._large_octets - self._waiting_octets
        if whole <= allowance:
            self.frames = []
            allowance -= whole
            whole = 0
        else:
            whole -= allowance
            taken = 0
            while allowance > 0:
                allowance -= len(frames[taken]) - HEADER.size
                taken += 1
            whole += allowance
            self.frames = frames[taken:]
            frames = frames[:taken]
            large = False
        while large and self.large and allowance > 0:
            message = self.large.popleft()
            message.begun = True
            message.left -= 1
            head, part = next(message.frames)
            if self.is_confirmed:
                frames.append(b"".join((head, part)))
            else:
                # Not copied, but sent from where it is.
                frames += head, typing.cast("bytes", part)
            allowance -= len(head) + len(part)
            if message.left:
                self.large.append(message)
            else:
                self._large_octets -= message.total
                if self.is_confirmed:
                    self._unconfirmed += message.total
                del self.cut[message.call_id]
                self.departed += (message.call_id,)
                self._start()
        self.octets = whole + self._large_octets + self._waiting_octets
        self.is_left = bool(self.frames or self.large)
        return frames

    def confirm(self, total: int) -> None:
        """The peer has all of a large message of that length, or knows that no more of it comes."""
        self._unconfirmed -= total
        self._start()

    def _start(self) -> None:
        """Starts as many of the large messages that wait as the peer holds at once."""
        while self._waiting:
            message = self._waiting[0]
            held = self._large_octets + self._unconfirmed
            if (self.large or self._unconfirmed) and held + message.total > self.max_unfinished:
                return
            self._large_octets += message.total
            self._waiting_octets -= message.total
            self.large.append(self._waiting.popleft())


class _Octets(bytearray):
    """Octets, a view of which that is read only can be hashed, as one of `bytes` can."""

    __hash__ = object.__hash__  # type: ignore[assignment]


class _Room:
    """Room in which large messages are put together, kept from one to the next.

    Memory that is fresh from the system costs more, page by page, than all else that is done with a large message.  So
    what the last ones took is kept, of all conversations of the process together, if it is no more than `_KEPT_ROOM`.

    Values that were decoded may be views of it (a `memoryview`, a `msgspec.Raw`), for as long as somebody has them.
    """

    def __init__(self) -> None:
        self._kept: deque[bytearray] = deque()
        self._octets = 0

    def take(self, total: int) -> bytearray:
        """Room for so many octets, or none yet: then it is made as they come, not because they were said to come."""
        kept = self._kept
        for at in range(len(kept) - 1, -1, -1):
            room = kept[at]
            # Not much more than it: what is held is accounted for by the lengths of the messages.
            if total <= len(room) <= total + total // 8 and _is_free(room):
                del kept[at]
                self._octets -= len(room)
                return room
        return _Octets()

    def give_back(self, room: bytearray) -> None:
        """Somebody may read on in it, and it is not taken again before they have ended."""
        if len(room) <= _MOST_ROOM:
            kept = self._kept
            kept.append(room)
            self._octets += len(room)
            while self._octets > _KEPT_ROOM or len(kept) > _KEPT_ROOMS:
                # That which nobody could use for the longest time.
                self._octets -= len(kept.popleft())


def _is_free(room: bytearray) -> bool:
    """Whether nobody has a view of it."""
    try:
        room.append(room.pop())
    except BufferError:
        return False
    return True


_room = _Room()


class Message(msgspec.Struct):
    """A message of several frames.

    :ivar begun: when its first frame came.
    :ivar room: what came of it, and more; ``None`` where nobody wants it, and its frames are only counted.
    """

    kind: int
    flags: int
    total: int
    begun: float
    room: bytearray | None
    received: int = 0

    def add(self, part: bytes) -> None:
        """Takes what comes next of it."""
        before = self.received
        self.received = after = before + len(part)
        room = self.room
        if room is None:
            pass
        elif before == len(room):
            room += part
        else:
            memoryview(room)[before:after] = part

    def whole(self) -> bytes:
        """The message; of a large one a view, which a decoder takes as well."""
        view = memoryview(self.room or b"")[: self.total].toreadonly()
        return bytes(view) if self.total <= LARGEST_FRAME else typing.cast("bytes", view)


class Assembler:
    """Messages whose rest is on the way.

    :param max_unfinished: octets of them that are held at once.
    :ivar messages: they, by call id.
    """

    __slots__ = ("_max_octets", "_octets", "messages")

    def __init__(self, max_unfinished: int) -> None:
        self._max_octets = max_unfinished + SLACK
        self._octets = 0
        self.messages: dict[int, Message] = {}

    def __len__(self) -> int:
        return len(self.messages)

    def begin(self, frame: Frame, total: int, part: bytes, now: float, *, wanted: bool) -> None:
        """Takes the first frame of a message, of which `parse_total` gave ``total`` and ``part``.

        :raises RemoteProtocolError: the peer sends more at once than it was told that this end holds.
        """
        kind, flags, call_id, _ = frame
        self.discard(call_id)
        if wanted:
            self._octets += total
            if self._octets > self._max_octets:
                raise TooMuchUnfinished(f"messages of {self._octets} octets are on the way at once")
        message = Message(kind, flags & ~_MORE, total, now, _room.take(total) if wanted else None)
        message.add(part)
        self.messages[call_id] = message

    def go_on(self, frame: Frame) -> Message | None:
        """Takes a CHUNK; the message, where that was its last.

        :raises RemoteProtocolError: no message of this call is on the way, or it is longer or shorter than was said.
        """
        _, flags, call_id, payload = frame
        message = self.messages.get(call_id)
        if message is None:
            raise RemoteProtocolError(f"CHUNK: no message of call {call_id} is on the way")
        received = message.received + len(payload)
        more = flags & _MORE
        if received > message.total or bool(more) != (received < message.total):
            raise RemoteProtocolError(
                f"CHUNK: {received} octets of {message.total}, and {'more' if more else 'no more'} to come",
            )
        if more and not payload:
            raise RemoteProtocolError("CHUNK: no octets, and more to come")
        message.add(payload)
        if more:
            return None
        self.discard(call_id)
        return message

    def is_on_the_way(self, call_id: int, kind: Kind) -> bool:
        """Whether a message of this kind and call is unfinished."""
        message = self.messages.get(call_id)
        return message is not None and message.kind == kind

    def discard(self, call_id: int) -> None:
        """Forgets what came of a message, if there is one; its rest will not come."""
        message = self.messages.pop(call_id, None)
        if message is not None and message.room is not None:
            self._octets -= message.total
            _room.give_back(message.room)

    def stop_holding(self, call_id: int) -> None:
        """Forgets what came of a message, if there is one, and only counts the rest."""
        message = self.messages.get(call_id)
        if message is not None and message.room is not None:
            message.room = None
            self._octets -= message.total

    def clear(self) -> None:
        """Forgets all."""
        self.messages.clear()
        self._octets = 0
