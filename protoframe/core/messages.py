"""Messages and the frames that they travel in: an `Outbox` cuts large ones, an `Assembler` puts them together.

Knows frames and their order; not what a call is.  Large messages take turns, a frame each, so that none holds up another,
nor a small one, for long; both ends bound how much of them is on the way at once.
"""

from __future__ import annotations

from collections import deque

import msgspec

from protoframe.core.frames import Flag, Frame, Kind, serialize_frame, serialize_message
from protoframe.core.limits import LARGEST_FRAME
from protoframe.errors import RemoteProtocolError

__all__ = ["Assembler", "Message", "Outbox"]

_MORE = int(Flag.MORE)

#: Octets that may stand beside the arguments in a REQUEST, or beside the detail in an ERROR.
SLACK = 2 * LARGEST_FRAME


class _Large(msgspec.Struct):
    """A message that takes several frames, the next one last."""

    call_id: int
    total: int
    frames: list[bytes]
    begun: bool = False


class Outbox:
    """What is to be sent: whole messages in order, and large ones in turns.

    :ivar max_frame: octets of a frame that the peer takes.
    :ivar max_unfinished: octets of large messages that the peer holds at once.
    """

    def __init__(self, max_frame: int) -> None:
        self.max_frame = max_frame
        self.max_unfinished = 0
        self._frames: list[bytes] = []
        self._large: deque[_Large] = deque()
        self._large_octets = 0
        self._waiting: deque[_Large] = deque()

    def __bool__(self) -> bool:
        return bool(self._frames or self._large)

    def put(self, kind: int, flags: int, call_id: int, message: bytes) -> None:
        """Lines a message up."""
        frames = serialize_message(kind, flags, call_id, message, self.max_frame)
        if len(frames) == 1:
            self._frames.append(frames[0])
        else:
            frames.reverse()
            self._waiting.append(_Large(call_id, len(message), frames))
            self._start()

    def put_control(self, kind: int, call_id: int, payload: bytes = b"") -> None:
        """Lines a frame up that is no message."""
        self._frames.append(serialize_frame(kind, 0, call_id, payload))

    def drop(self, call_id: int) -> bool | None:
        """Takes a large message that is not all sent out of the line.

        :return: whether its first frame was sent already; ``None`` where there is no such message.
        """
        for line in (self._large, self._waiting):
            for message in line:
                if message.call_id == call_id:
                    line.remove(message)
                    if line is self._large:
                        self._large_octets -= message.total
                        self._start()
                    return message.begun
        return None

    def drop_all(self) -> None:
        """Takes all large messages out."""
        self._large.clear()
        self._waiting.clear()
        self._large_octets = 0

    def poll(self, allowance: int) -> list[bytes]:
        """Takes frames out: all that are whole messages, then of large ones about ``allowance`` octets."""
        frames, self._frames = self._frames, []
        while self._large and allowance > 0:
            message = self._large.popleft()
            message.begun = True
            frame = message.frames.pop()
            frames.append(frame)
            allowance -= len(frame)
            if message.frames:
                self._large.append(message)
            else:
                self._large_octets -= message.total
                self._start()
        return frames

    def _start(self) -> None:
        """Starts as many of the large messages that wait as the peer holds at once."""
        while self._waiting:
            message = self._waiting[0]
            if self._large and self._large_octets + message.total > self.max_unfinished:
                return
            self._large_octets += message.total
            self._large.append(self._waiting.popleft())


class Message(msgspec.Struct):
    """A message of several frames.

    :ivar parts: what came of it; ``None`` where nobody wants it, and its frames are only counted.
    """

    kind: int
    flags: int
    total: int
    parts: list[bytes] | None
    received: int = 0

    def whole(self) -> bytes:
        """The message."""
        return b"".join(self.parts or ())


class Assembler:
    """Messages whose rest is on the way.

    :param max_unfinished: octets of them that are held at once.
    """

    def __init__(self, max_unfinished: int) -> None:
        self._max_octets = max_unfinished + SLACK
        self._octets = 0
        self._messages: dict[int, Message] = {}

    def __len__(self) -> int:
        return len(self._messages)

    def begin(self, frame: Frame, total: int, part: bytes, *, wanted: bool) -> None:
        """Takes the first frame of a message, from which `~protoframe.core.frames.parse_total` gave ``total`` and ``part``.

        :raises RemoteProtocolError: the peer sends more at once than it was told that this end holds.
        """
        self.discard(frame.call_id)
        message = Message(frame.kind, frame.flags, total, [part] if wanted else None, len(part))
        if wanted:
            self._octets += total
            if self._octets > self._max_octets:
                raise RemoteProtocolError(f"messages of {self._octets} octets are on the way at once")
        self._messages[frame.call_id] = message

    def go_on(self, frame: Frame) -> Message | None:
        """Takes a CHUNK; the message, where that was its last.

        :raises RemoteProtocolError: no message of this call is on the way, or it is longer or shorter than was said.
        """
        _, flags, call_id, payload = frame
        message = self._messages.get(call_id)
        if message is None:
            raise RemoteProtocolError(f"CHUNK: no message of call {call_id} is on the way")
        message.received += len(payload)
        more = flags & _MORE
        if message.received > message.total or bool(more) != (message.received < message.total):
            raise RemoteProtocolError(
                f"CHUNK: {message.received} octets of {message.total}, and {'more' if more else 'no more'} to come",
            )
        if more and not payload:
            raise RemoteProtocolError("CHUNK: no octets, and more to come")
        if message.parts is not None:
            message.parts.append(payload)
        if more:
            return None
        self.discard(call_id)
        return message

    def is_on_the_way(self, call_id: int, kind: Kind) -> bool:
        """Whether a message of this kind and call is unfinished."""
        message = self._messages.get(call_id)
        return message is not None and message.kind == kind

    def discard(self, call_id: int) -> None:
        """Forgets what came of a message, if there is one; its rest will not come."""
        message = self._messages.pop(call_id, None)
        if message is not None and message.parts is not None:
            self._octets -= message.total

    def stop_holding(self, call_id: int) -> None:
        """Forgets what came of a message, if there is one, and only counts the rest."""
        message = self._messages.get(call_id)
        if message is not None and message.parts is not None:
            message.parts = None
            self._octets -= message.total

    def clear(self) -> None:
        """Forgets all."""
        self._messages.clear()
        self._octets = 0
