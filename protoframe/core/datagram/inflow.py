"""Segments put together again to frames: each once, those of a channel in order, and no channel waits for another.

Knows channels and where a frame ends; not what a frame means, nor packets.  What came and cannot be given yet, because
something before it is missing, is bounded.
"""

from __future__ import annotations

from heapq import heappop, heappush
from zlib import crc32

from protoframe.core.datagram.packets import Once, Part, Run
from protoframe.core.datagram.ranges import RangeSet
from protoframe.core.frames import HEADER, Frame
from protoframe.errors import FrameTooLarge, RemoteProtocolError

__all__ = ["Full", "Inflow"]

#: What a piece that is held, or a channel that is open, counts for beside its octets.
_PIECE = 128
_CHANNEL = 512
#: Runs of which it is remembered what was in them.
_REMEMBERED = 64
_HEADER_SIZE = HEADER.size
_unpack_header = HEADER.unpack_from


class Full(Exception):
    """There is no room for what came: it is to count as lost, and will be sent again."""


class _Channel:
    """A channel of which not all has come.

    :ivar offset: up to where all has come.
    :ivar end: where it ends; -1 while that is not known.
    :ivar held: what came from behind a gap, by its offset.
    :ivar order: a heap of these offsets.
    :ivar buffer: what came in order, and is no whole frame yet.
    """

    __slots__ = ("buffer", "end", "held", "offset", "order")

    def __init__(self) -> None:
        self.offset = 0
        self.end = -1
        self.held: dict[int, bytes] = {}
        self.order: list[int] = []
        self.buffer = bytearray()


class Inflow:
    """What comes to one end.

    :param max_frame: octets of a frame that this end takes, header included.
    :param most: octets that may be held because something before them is missing.
    :ivar is_greeted: whether the first channel, which has the peer's HELLO, has come: before it nothing is given.
    :ivar done: the channels that have come.
    :ivar has_repeated: whether something came again since this was last set to False.
    """

    def __init__(self, max_frame: int, most: int) -> None:
        self.is_greeted = False
        self.has_repeated = False
        self._max_payload = max_frame - _HEADER_SIZE
        self._most = most
        self._held = 0
        self.done = RangeSet()
        self._channels: dict[int, _Channel] = {}
        # What came before the first channel.
        self._early: list[Frame] = []
        self._seen: list[tuple[int, int, int]] = [(-1, 0, 0)] * _REMEMBERED

    def take_run(self, run: Run) -> list[Frame]:
        """The frames of a run that have not come before.

        :raises RemoteProtocolError: a frame is longer than it may be, or is another than came with its number before.
        :raises Full: there is no room.
        """
        first, frames, octets = run.first, run.frames, run.octets
        end = first + len(frames)
        for frame in frames:
            if len(frame[3]) > self._max_payload:
                raise self._too_large(len(frame[3]))
        if self.done.misses(first, end) and not (self._channels and self._is_open(first, end)):
            self._check_room(0)
            self.done.add(first, end)
            self.remember(first, len(frames), octets)
            return frames if self.is_greeted else self._give(first, frames)
        self._compare(first, len(frames), octets)
        self.has_repeated = True
        news: list[Frame] = []
        for number, frame in enumerate(frames, first):
            if number not in self.done:
                self._close(number)
                news += self._give(number, [frame])
        return news

    @property
    def is_idle(self) -> bool:
        """Whether a run whose channels go on from the last that came has only to be added to `done`, and remembered."""
        return self.is_greeted and not self._channels

    def take_part(self, part: Part) -> list[Frame]:
        """The frames that octets of a channel complete.

        :raises RemoteProtocolError: a frame is longer than it may be, or the channel ends where it does not.
        :raises Full: there is no room.
        """
        number, offset, octets, is_last = part.channel, part.offset, part.octets, part.is_last
        if number in self.done:
            self.has_repeated = True
            return []
        channel = self._channels.get(number)
        if channel is None:
            if not offset and is_last and len(octets) >= _HEADER_SIZE:
                length = int.from_bytes(octets[:2]) + _HEADER_SIZE
                if length == len(octets):
                    return self._take_single(number, octets)
            self._check_room(_CHANNEL + len(octets), number)
            channel = self._channels[number] = _Channel()
            self._held += _CHANNEL
        end = offset + len(octets)
        if (is_last and channel.end not in (-1, end)) or (channel.end >= 0 and end > channel.end):
            raise RemoteProtocolError(f"channel {number}: it ends at {channel.end}, and at {end}")
        if is_last and channel.end < 0:
            channel.end = end
            if channel.offset > end or any(at + len(piece) > end for at, piece in channel.held.items()):
                raise RemoteProtocolError(f"channel {number}: more came than its {end} octets")
        if end <= channel.offset and not (is_last and end == channel.offset):
            self.has_repeated = True
            return []
        if offset > channel.offset:
            self._hold(channel, offset, octets)
            return []
        self._check_room(end - channel.offset, number)
        self._append(channel, octets[channel.offset - offset :])
        while channel.order and channel.order[0] <= channel.offset:
            at = heappop(channel.order)
            piece = channel.held.pop(at)
            self._held -= len(piece) + _PIECE
            if at + len(piece) > channel.offset:
                self._append(channel, piece[channel.offset - at :])
        frames = self._cut(channel)
        if channel.offset == channel.end:
            if channel.buffer:
                raise RemoteProtocolError(f"channel {number}: it ends within a frame")
            self._close(number)
        return frames if self.is_greeted and number else self._give(number, frames)

    def take_once(self, once: Once) -> list[Frame]:
        """Frames that are sent once: they get lost where nothing may be given yet.

        :raises RemoteProtocolError: one is longer than it may be.
        """
        for frame in once.frames:
            if len(frame[3]) > self._max_payload:
                raise self._too_large(len(frame[3]))
        return once.frames if self.is_greeted else []

    def _take_single(self, number: int, octets: bytes) -> list[Frame]:
        length, kind, flags, call_id = _unpack_header(octets)
        if length > self._max_payload:
            raise self._too_large(length)
        self._check_room(0)
        self.done.add(number, number + 1)
        return self._give(number, [(kind, flags, call_id, octets[_HEADER_SIZE:])])

    def _too_large(self, length: int) -> FrameTooLarge:
        return FrameTooLarge(
            f"a frame of {length + _HEADER_SIZE} octets is longer than {self._max_payload + _HEADER_SIZE}"
        )

    def _check_room(self, more: int, number: int = -1) -> None:
        """Makes sure that there is room for so many octets more.

        :param number: the channel that they are of, where they come in its order.  There is always room for the lowest,
            or nothing would ever free any.
        :raises Full: there is none.
        """
        if self._held + more + _PIECE * len(self.done) > self._most and (
            number < 0 or number > min(self._channels, default=number)
        ):
            raise Full

    def _is_open(self, first: int, end: int) -> bool:
        return any(number in self._channels for number in range(first, end))

    def _hold(self, channel: _Channel, offset: int, octets: bytes) -> None:
        known = channel.held.get(offset)
        if known is not None and len(known) >= len(octets):
            self.has_repeated = True
            if known[: len(octets)] != octets:
                raise RemoteProtocolError("other octets came in the place of some that came before")
            return
        self._check_room(len(octets) + _PIECE)
        if known is not None:
            self._held -= len(known) + _PIECE
        else:
            heappush(channel.order, offset)
        channel.held[offset] = octets
        self._held += len(octets) + _PIECE

    def _append(self, channel: _Channel, octets: bytes) -> None:
        channel.buffer += octets
        channel.offset += len(octets)
        self._held += len(octets)

    def _cut(self, channel: _Channel) -> list[Frame]:
        """The whole frames at the start of what came in order."""
        buffer = channel.buffer
        frames: list[Frame] = []
        at = 0
        while len(buffer) - at >= _HEADER_SIZE:
            length, kind, flags, call_id = _unpack_header(buffer, at)
            if length > self._max_payload:
                raise self._too_large(length)
            after = at + _HEADER_SIZE + length
            if after > len(buffer):
                break
            frames.append((kind, flags, call_id, bytes(buffer[at + _HEADER_SIZE : after])))
            at = after
        if at:
            del buffer[:at]
            self._held -= at
        return frames

    def _close(self, number: int) -> None:
        """All of a channel has come."""
        channel = self._channels.pop(number, None)
        if channel is not None:
            self._held -= _CHANNEL + len(channel.buffer)
            self._held -= sum(len(piece) + _PIECE for piece in channel.held.values())
        self.done.add(number, number + 1)

    def _give(self, number: int, frames: list[Frame]) -> list[Frame]:
        """Frames, unless the first channel has not come yet: then they wait for it."""
        if self.is_greeted:
            return frames
        if not number:
            if frames:
                self.is_greeted = True
                self._held -= sum(len(frame[3]) + _PIECE for frame in self._early)
                frames, self._early = frames + self._early, []
            return frames
        self._early += frames
        self._held += sum(len(frame[3]) + _PIECE for frame in frames)
        return []

    def remember(self, first: int, count: int, octets: bytes) -> None:
        """Keeps what tells a run from another with its channels."""
        self._seen[first % _REMEMBERED] = (first, count, crc32(octets))

    def _compare(self, first: int, count: int, octets: bytes) -> None:
        known, counted, checksum = self._seen[first % _REMEMBERED]
        if known == first and counted == count and checksum != crc32(octets):
            raise RemoteProtocolError(f"channel {first}: other frames than came with this number before")
