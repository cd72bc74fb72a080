"""Frames put into segments: which of them keep their order, what goes first, and what is sent again.

Knows the kinds of frames, and which frame of a call is the last of its end; not what any of them means, nor packets
and when they leave.  A *channel* is what keeps its order.  A frame that stands alone, as most do, is a channel of its
own; so nothing that is lost holds up another call.  The frames of a large message and of a stream share one, a `Lane`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import msgspec

from protoframe.core.datagram.packets import (
    MOST_FRAMES,
    ONCE_OVERHEAD,
    PART_OVERHEAD,
    RUN_OVERHEAD,
    Part,
    Run,
    parse_segments,
    serialize_once,
    serialize_run,
)
from protoframe.core.datagram.ranges import RangeSet
from protoframe.core.frames import HEADER, Flag, Kind, parse_total, serialize_frame

__all__ = ["PLAIN", "Item", "Outflow"]

_REQUEST = int(Kind.REQUEST)
_RESPONSE = int(Kind.RESPONSE)
_ERROR = int(Kind.ERROR)
_CHUNK = int(Kind.CHUNK)
_CANCEL = int(Kind.CANCEL)
_GOAWAY = int(Kind.GOAWAY)
_ITEM = int(Kind.ITEM)
_END = int(Kind.END)
_MORE = int(Flag.MORE)
_ITEMS = int(Flag.ITEMS)
_ONEWAY = int(Flag.ONEWAY)
_REQUEST_FLAGS = _MORE | _ITEMS | _ONEWAY
#: Answers in one message, and frames that are to come after what was sent before them.
_ANSWERS = frozenset((_RESPONSE, _ERROR))
#: How a whole call, or the answer to one, has its kind and its flags.
PLAIN = frozenset(
    bytes((kind, flags)) for kind in (_REQUEST, _RESPONSE) for flags in range(256) if not flags & _REQUEST_FLAGS
)
_AFTER_ALL = frozenset((_CANCEL, _GOAWAY))

#: Octets of a channel that are cut into one PART at the least, unless they are its last: smaller ones cost more than
#: they bring.
_LEAST_PART = 64


class Item(msgspec.Struct, eq=False, gc=False):
    """A segment that is sent until it has come.

    :ivar octets: the segment.
    :ivar serial: which comes first of two is the one that was made first.
    :ivar lane: the lane that it is of, where the lane keeps account.
    :ivar start: where in the lane it starts.
    :ivar end: and ends.
    :ivar has_come: whether the peer has acknowledged it.
    :ivar is_waiting: whether it is to be sent again.
    """

    octets: bytes
    serial: int
    lane: Lane | None = None
    start: int = 0
    end: int = 0
    has_come: bool = False
    is_waiting: bool = False


class Lane:
    """A channel of several frames.

    :ivar channel: its number.
    :ivar call: the id of its call, as it stands in a frame.
    :ivar offset: where its next octet goes.
    :ivar is_single: whether the message that is under way is all that it carries.
    :ivar total: the length of the large message that is under way; 0 where none is.
    :ivar come: which of its octets have come.
    :ivar marks: where large messages end in it, and their lengths; those of which not all has come.
    """

    __slots__ = ("call", "channel", "come", "is_single", "marks", "offset", "total")

    def __init__(self, channel: int, call: bytes) -> None:
        self.channel = channel
        self.call = call
        self.offset = 0
        self.is_single = False
        self.total = 0
        self.come = RangeSet()
        self.marks: deque[tuple[int, int]] = deque()


class _Bulk:
    """Octets of a channel that wait to be sent, or a frame that waits for all before it (``lane`` is ``None``)."""

    __slots__ = ("channel", "is_last", "lane", "octets", "offset", "taken")

    def __init__(self, octets: bytes, channel: int, offset: int, lane: Lane | None, *, is_last: bool) -> None:
        self.octets = octets
        self.channel = channel
        self.offset = offset
        self.lane = lane
        self.is_last = is_last
        self.taken = 0


class Outflow:
    """What one end sends.

    :param confirm: told the length of a large message when all of it has come.
    :ivar lost: items to send again.
    :ivar unacknowledged: items that were sent and have not come.
    :ivar queued: octets of frames that wait to be sent for the first time.
    :ivar asks: whether something waits until what was sent before it has come, and nobody was asked for an ACK yet.
    :ivar channel: the number of the next channel.
    :ivar lanes: channels of several frames that are open, by the ids of their calls.
    """

    def __init__(self, confirm: Callable[[int], None]) -> None:
        self._confirm = confirm
        self.lost: deque[Item] = deque()
        self.unacknowledged: set[Item] = set()
        self.queued = 0
        self.asks = False
        self._small: deque[bytes] = deque()
        self._once: deque[bytes] = deque()
        self._bulk: deque[_Bulk] = deque()
        # CANCEL and GOAWAY, until what was sent before them has come, and the first serial after that.
        self._held: deque[tuple[int, bytes]] = deque()
        self.lanes: dict[int, Lane] = {}
        self.channel = 0
        self._serial = 0
        # The first frame is HELLO, and goes before all others.
        self._is_bulks_turn = True

    def has_more(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._small or self._bulk or self._once or self.lost)

    @property
    def is_settled(self) -> bool:
        """Whether all that there was to send has come."""
        return not (self.unacknowledged or self._small or self._bulk or self._once or self._held)

    # What goes in.

    def put(self, frames: list[bytes], room: int) -> None:
        """Lines frames up.

        :param room: octets that the segments of a packet can have.
        """
        lanes = self.lanes
        largest = room - RUN_OVERHEAD
        small = self._small
        for frame in frames:
            self.queued += len(frame)
            kind = frame[2]
            if not self.channel:
                # The peer takes nothing before channel 0: there is what greets it.
                self._put_whole(frame)
            elif kind == _REQUEST:
                if frame[3] & _REQUEST_FLAGS:
                    self._put_request(frame, room)
                elif len(frame) <= largest:
                    small.append(frame)
                else:
                    self._put_whole(frame)
            elif kind in _AFTER_ALL or (lanes and self._call_of(frame) in lanes):
                self._put_ordered(kind, frame)
            elif kind == _ITEM or (frame[3] & _MORE and kind in _ANSWERS):
                self._put_in_lane(frame, self._open_lane(frame))
            elif len(frame) <= largest:
                small.append(frame)
            else:
                self._put_whole(frame)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is to be sent before, or in the order of, what comes next."""
        return not (self._small or self._bulk or self._once or self.lost or self.lanes) and self.channel > 0

    def sent_plain(self, segment: bytes) -> Item:
        """The item of a RUN that was sent: of frames in `PLAIN`, each in a channel of its own."""
        item = Item(segment, self._serial)
        self._serial += 1
        self.unacknowledged.add(item)
        return item

    def _put_request(self, frame: bytes, room: int) -> None:
        flags = frame[3]
        if flags & (_MORE | _ITEMS):
            self._put_in_lane(frame, self._open_lane(frame))
        elif len(frame) <= room - ONCE_OVERHEAD:
            self._once.append(frame)
        else:
            # Of one that takes several packets parts would be left behind.
            self._put_whole(frame)

    def _put_ordered(self, kind: int, frame: bytes) -> None:
        """A frame that comes after others, of its call or of all."""
        lane = self.lanes.get(self._call_of(frame)) if kind != _GOAWAY else None
        if lane is None:
            self._bulk.append(_Bulk(frame, 0, 0, None, is_last=True))
        elif kind in (_RESPONSE, _ERROR, _CHUNK, _ITEM, _END, _CANCEL):
            self._put_in_lane(frame, lane)
        else:
            # CREDIT and STOP: it does not matter what they overtake.
            self._small.append(frame)

    def _open_lane(self, frame: bytes) -> Lane:
        lane = self.lanes[self._call_of(frame)] = Lane(self._next_channel(), frame[4:12])
        lane.is_single = frame[2] != _ITEM and not (frame[2] == _REQUEST and frame[3] & _ITEMS)
        return lane

    def _put_in_lane(self, frame: bytes, lane: Lane) -> None:
        kind, more = frame[2], frame[3] & _MORE
        if kind in _ANSWERS:
            lane.is_single = True
        is_last = kind in (_END, _CANCEL) or (not more and lane.is_single)
        if kind != _CHUNK and more:
            self._begin_large(lane, parse_total(frame[HEADER.size : HEADER.size + 8])[0])
        start = lane.offset
        lane.offset += len(frame)
        if lane.total and (is_last or not more):
            lane.marks.append((lane.offset, lane.total))
            lane.total = 0
        if is_last:
            del self.lanes[self._call_of(frame)]
        self._bulk.append(_Bulk(frame, lane.channel, start, lane, is_last=is_last))

    def _begin_large(self, lane: Lane, total: int) -> None:
        if lane.total:
            # An ERROR in the place of an answer that was on its way.
            lane.marks.append((lane.offset, lane.total))
        lane.total = total

    def _put_whole(self, frame: bytes) -> None:
        self._bulk.append(_Bulk(frame, self._next_channel(), 0, _NO_LANE, is_last=True))

    def end_lane(self, call_id: int) -> None:
        """A call of this end is answered: nothing follows in its lane, but that the rest of a message is called off."""
        lane = self.lanes.get(call_id)
        if lane is not None and not lane.total:
            del self.lanes[call_id]
            self._bulk.append(_Bulk(b"", lane.channel, lane.offset, lane, is_last=True))

    @staticmethod
    def _call_of(frame: bytes) -> int:
        return int.from_bytes(frame[4:12])

    def _next_channel(self) -> int:
        channel = self.channel
        self.channel = channel + 1
        return channel

    # What comes out.

    def fill(self, room: int, *, is_empty: bool) -> tuple[list[bytes], list[Item]]:
        """Segments for a packet, and the items among them.

        :param room: octets that they may have.
        :param is_empty: whether the packet has nothing else, so that what does not fit is to be cut.
        """
        segments: list[bytes] = []
        items: list[Item] = []
        if self.lost:
            room = self._fill_lost(room, segments, items, is_empty=is_empty)
        is_bulks_turn = self._is_bulks_turn
        if self._bulk and is_bulks_turn:
            room = self._fill_bulk(room, segments, items)
        if self._small:
            room = self._fill_small(room, segments, items)
        if self._once:
            room = self._fill_once(room, segments)
        if self._bulk:
            if not (is_bulks_turn and segments):
                self._fill_bulk(room, segments, items)
            self._is_bulks_turn = not is_bulks_turn
        if self._small and not segments:
            # What waited for all before it, all of which has come.
            self._fill_small(room, segments, items)
        return segments, items

    def _fill_lost(self, room: int, segments: list[bytes], items: list[Item], *, is_empty: bool) -> int:
        lost = self.lost
        while lost:
            item = lost[0]
            if item.has_come:
                lost.popleft()
                continue
            if len(item.octets) > room:
                if segments or not is_empty:
                    break
                lost.popleft()
                self.unacknowledged.discard(item)
                parts = self._cut(item, room)
                self.unacknowledged.update(parts)
                lost.extendleft(reversed(parts))
                continue
            lost.popleft()
            item.is_waiting = False
            segments.append(item.octets)
            items.append(item)
            room -= len(item.octets)
        return room

    def _cut(self, item: Item, room: int) -> list[Item]:
        """An item that does not fit a packet any more, as several."""
        (segment,) = parse_segments(item.octets, 0)
        if isinstance(segment, Part):
            return self._cut_part(segment, item, room)
        cut: list[Item] = []
        if isinstance(segment, Run):
            for number, (kind, flags, call_id, payload) in enumerate(segment.frames, segment.first):
                frame = serialize_frame(kind, flags, call_id, payload)
                if len(frame) + RUN_OVERHEAD <= room:
                    cut.append(Item(serialize_run(number, 1, frame), item.serial))
                else:
                    cut += self._cut_part(Part(number, 0, frame, True), item, room)
        for one in cut:
            one.is_waiting = True
        return cut

    def _cut_part(self, part: Part, item: Item, room: int) -> list[Item]:
        size = room - PART_OVERHEAD
        cut = []
        for at in range(0, len(part.octets), size):
            octets = part.octets[at : at + size]
            is_last = part.is_last and at + size >= len(part.octets)
            start = part.offset + at
            segment = Part(part.channel, start, octets, is_last).serialize()
            one = Item(segment, item.serial, item.lane, start, start + len(octets))
            one.is_waiting = True
            cut.append(one)
        return cut

    def _fill_small(self, room: int, segments: list[bytes], items: list[Item]) -> int:
        small = self._small
        left = room - RUN_OVERHEAD
        frames: list[bytes] = []
        while small and len(small[0]) <= left and len(frames) < MOST_FRAMES:
            frame = small.popleft()
            left -= len(frame)
            frames.append(frame)
        if not frames:
            if small and not segments:
                # It fitted a packet when it was lined up, and does not now, beside an ACK, say: parts of it do.
                self._put_whole(small.popleft())
            return room
        octets = b"".join(frames) if len(frames) > 1 else frames[0]
        self.queued -= len(octets)
        segment = serialize_run(self.channel, len(frames), octets)
        self.channel += len(frames)
        self._add(Item(segment, self._serial), segments, items)
        return left

    def _fill_once(self, room: int, segments: list[bytes]) -> int:
        once = self._once
        left = room - ONCE_OVERHEAD
        frames: list[bytes] = []
        while once and len(once[0]) <= left and len(frames) < MOST_FRAMES:
            frame = once.popleft()
            left -= len(frame)
            frames.append(frame)
        if not frames:
            if once and not segments:
                self._put_whole(once.popleft())
            return room
        octets = b"".join(frames)
        self.queued -= len(octets)
        segments.append(serialize_once(len(frames), octets))
        return left

    def _fill_bulk(self, room: int, segments: list[bytes], items: list[Item]) -> int:
        while self._bulk:
            bulk = self._bulk[0]
            if bulk.lane is None:
                # All that was lined up before it has been sent by now, for what is small goes first.
                if self._small:
                    break
                self._bulk.popleft()
                self._hold(bulk.octets)
                continue
            left = len(bulk.octets) - bulk.taken
            size = min(left, room - PART_OVERHEAD)
            if size < min(left, _LEAST_PART) or size < 0:
                break
            octets = bulk.octets[bulk.taken : bulk.taken + size]
            start = bulk.offset + bulk.taken
            bulk.taken += size
            is_whole = bulk.taken == len(bulk.octets)
            if is_whole:
                self._bulk.popleft()
            self.queued -= size
            segment = Part(bulk.channel, start, octets, bulk.is_last and is_whole).serialize()
            lane = bulk.lane if bulk.lane is not _NO_LANE else None
            self._add(Item(segment, self._serial, lane, start, start + size), segments, items)
            room -= len(segment)
        return room

    def _add(self, item: Item, segments: list[bytes], items: list[Item]) -> None:
        self._serial += 1
        self.unacknowledged.add(item)
        segments.append(item.octets)
        items.append(item)

    def add(self, octets: bytes) -> None:
        """Lines a segment of the carrier's own up, to be sent until it has come."""
        item = Item(octets, self._serial)
        self._serial += 1
        item.is_waiting = True
        self.unacknowledged.add(item)
        self.lost.append(item)

    # What comes of it.

    def come(self, items: list[Item]) -> None:
        """Items have come."""
        for item in items:
            if item.has_come:
                continue
            item.has_come = True
            self.unacknowledged.discard(item)
            lane = item.lane
            if lane is not None:
                lane.come.add(item.start, item.end)
                while lane.marks and lane.come.prefix >= lane.marks[0][0]:
                    self._confirm(lane.marks.popleft()[1])
        if self._held:
            self._release()

    def send_again(self, items: list[Item]) -> None:
        """Items are lost, or may be."""
        for item in items:
            if not (item.has_come or item.is_waiting):
                item.is_waiting = True
                self.lost.append(item)

    def _hold(self, frame: bytes) -> None:
        self.queued -= len(frame)
        self._held.append((self._serial, frame))
        self._release()
        self.asks = bool(self._held)

    def _release(self) -> None:
        while self._held:
            serial, frame = self._held[0]
            call = frame[4:12] if frame[2] == _CANCEL else b""
            if any(item.serial < serial and (not call or _requests(item, call)) for item in self.unacknowledged):
                return
            self._held.popleft()
            self.queued += len(frame)
            self._small.append(frame)
            if self._held and self._held[-1][1][2] == _GOAWAY:
                # That waits for this too, which will be in the next segment, or in the one after.
                self._held[-1] = (self._serial + 2, self._held[-1][1])


def _requests(item: Item, call: bytes) -> bool:
    """Whether a segment has the REQUEST of a call, or part of what goes with it."""
    if item.lane is not None:
        return item.lane.call == call
    at = item.octets.find(call)
    while at >= 0:
        if item.octets[at - 2] == _REQUEST:
            return True
        at = item.octets.find(call, at + 1)
    return False


#: That of a frame that is the only one of its channel.
_NO_LANE = Lane(-1, b"")
