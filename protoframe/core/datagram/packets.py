"""The layout of every packet and of the segments in it, read and written; ``docs/wire-datagrams.md`` specifies it.

Knows octets alone: not which packet may come when, nor what becomes of what is in it.  All integers are in network byte
order.  Every packet opens with a checksum (CRC-32, as in IEEE 802.3, over all that follows it) and its kind; a packet
that does not keep to the layout, or has octets left over, is `Malformed` as a whole.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import NamedTuple
from zlib import crc32

import msgspec

from protoframe.core.frames import HEADER, Frame

__all__ = [
    "ACK_UNIT",
    "BASE_SIZE",
    "DATA_OVERHEAD",
    "LARGEST_SIZE",
    "LONGEST_TOKEN",
    "MOST_RANGES",
    "PART_OVERHEAD",
    "RUN_OVERHEAD",
    "Accept",
    "Ack",
    "Data",
    "Initial",
    "Kind",
    "Malformed",
    "Once",
    "Part",
    "Refused",
    "Reset",
    "Retry",
    "Run",
    "SegmentKind",
    "Versions",
    "parse_segments",
    "read_kind",
]

#: Octets of a datagram that every path is taken to carry (RFC 9000, section 14).
BASE_SIZE = 1200
#: What the payload of a UDP datagram can have over IPv4.
LARGEST_SIZE = 65_507
MAGIC = b"\x89PFU"

#: The checksum begins here, so that octets of something else with a CRC of their own do not pass.
_SEED = crc32(MAGIC)
_CHECKSUM = struct.Struct("!I")
_CHECKSUM_SIZE = _CHECKSUM.size
_pack_checksum = _CHECKSUM.pack
_PREFIX = struct.Struct("!IBQ")
_PREFIX_SIZE = _PREFIX.size
_unpack_prefix = _PREFIX.unpack_from

_INITIAL = struct.Struct("!B4sBBQH")
_ID = struct.Struct("!BQ")
_DATA = struct.Struct("!BQQ")
_ACCEPT = struct.Struct("!BQQQB")
_VERSIONS = struct.Struct("!BQBB")
_unpack_data = _DATA.unpack_from
_pack_data = _DATA.pack

#: What stands around the segments of a packet.
DATA_OVERHEAD = _CHECKSUM_SIZE + _DATA.size
ACCEPT_OVERHEAD = _CHECKSUM_SIZE + _ACCEPT.size
LONGEST_TOKEN = 255


class Malformed(ValueError):
    """A packet does not keep to the layout: it is dropped, and nobody is told."""


class Kind(enum.IntEnum):
    """What a packet is: what a server sends is of other kinds than what a client sends, so neither answers its like."""

    INITIAL = 0x01
    """Client: may I?"""
    RETRY = 0x02
    """Server: say so again, with this, to show that you are where you say."""
    ACCEPT = 0x03
    """Server: yes; with segments."""
    TO_SERVER = 0x04
    """Client: segments."""
    TO_CLIENT = 0x05
    """Server: segments."""
    VERSIONS = 0x06
    """Server: there is no common version."""
    REFUSED = 0x07
    """Server: no."""
    RESET = 0x08
    """Server: there is no such connection."""


_KINDS = frozenset(int(kind) for kind in Kind)


def seal(body: bytes) -> bytes:
    """A packet, from what follows the checksum."""
    return _pack_checksum(crc32(body, _SEED)) + body


def read_kind(datagram: bytes) -> tuple[int, int]:
    """The kind of a packet and the connection id that it names, once its checksum is found right.

    What an INITIAL has in the place of the id means nothing.

    :raises Malformed: it is no packet.
    """
    if len(datagram) < _PREFIX_SIZE:
        raise Malformed("too short")
    checksum, kind, identifier = _unpack_prefix(datagram)
    # A slice of the octets is copied, which costs less than a view does.
    if crc32(datagram[_CHECKSUM_SIZE:], _SEED) != checksum:
        raise Malformed("the checksum is wrong")
    if kind not in _KINDS:
        raise Malformed(f"kind 0x{kind:02x}")
    return kind, identifier


class Initial(NamedTuple):
    """INITIAL: a client asks for a connection.

    :ivar client_id: what packets to the client are to name: octets that nobody can guess.
    :ivar token: what a RETRY gave, or an earlier connection; empty where there is none.
    """

    first_version: int
    last_version: int
    client_id: int
    token: bytes

    def serialize(self) -> bytes:
        """The packet; as long as a server's first answers may be together, up to a third."""
        body = _INITIAL.pack(
            Kind.INITIAL, MAGIC, self.first_version, self.last_version, self.client_id, len(self.token)
        )
        return seal((body + self.token).ljust(BASE_SIZE - _CHECKSUM_SIZE, b"\0"))

    @classmethod
    def parse(cls, datagram: bytes) -> Initial:
        """
        :raises Malformed: it is shorter than it must be, or no INITIAL.
        """
        if len(datagram) < BASE_SIZE:
            raise Malformed(f"INITIAL: {len(datagram)} octets")
        _, magic, first, last, client_id, length = _INITIAL.unpack_from(datagram, _CHECKSUM_SIZE)
        after = _CHECKSUM_SIZE + _INITIAL.size
        if magic != MAGIC or length > LONGEST_TOKEN or not 0 < first <= last:
            raise Malformed("INITIAL")
        return cls(first, last, client_id, datagram[after : after + length])


class Retry(NamedTuple):
    """RETRY: a client is to ask again, with the token."""

    client_id: int
    token: bytes

    def serialize(self) -> bytes:
        """The packet."""
        return seal(_ID.pack(Kind.RETRY, self.client_id) + self.token)

    @classmethod
    def parse(cls, datagram: bytes) -> Retry:
        """
        :raises Malformed: it has no token, or one that is too long.
        """
        _, client_id = _ID.unpack_from(datagram, _CHECKSUM_SIZE)
        token = datagram[_CHECKSUM_SIZE + _ID.size :]
        if not 0 < len(token) <= LONGEST_TOKEN:
            raise Malformed("RETRY")
        return cls(client_id, token)


class Versions(NamedTuple):
    """VERSIONS: the server speaks these, and none of the client's."""

    client_id: int
    first_version: int
    last_version: int

    def serialize(self) -> bytes:
        """The packet."""
        return seal(_VERSIONS.pack(Kind.VERSIONS, *self))

    @classmethod
    def parse(cls, datagram: bytes) -> Versions:
        """
        :raises Malformed: it is too short or too long, or no range.
        """
        if len(datagram) != _CHECKSUM_SIZE + _VERSIONS.size:
            raise Malformed("VERSIONS")
        versions = cls(*_VERSIONS.unpack_from(datagram, _CHECKSUM_SIZE)[1:])
        if not 0 < versions.first_version <= versions.last_version:
            raise Malformed("VERSIONS")
        return versions


class Refused(NamedTuple):
    """REFUSED: the server does not want the connection; the payload of a GOAWAY says why."""

    client_id: int
    reason: bytes

    def serialize(self) -> bytes:
        """The packet."""
        return seal(_ID.pack(Kind.REFUSED, self.client_id) + self.reason)

    @classmethod
    def parse(cls, datagram: bytes) -> Refused:
        """Takes any that `read_kind` has taken."""
        _, client_id = _ID.unpack_from(datagram, _CHECKSUM_SIZE)
        return cls(client_id, datagram[_CHECKSUM_SIZE + _ID.size :])


class Reset(NamedTuple):
    """RESET: the server has no connection of this id; the number of the packet shows that it has seen one."""

    server_id: int
    number: int

    def serialize(self) -> bytes:
        """The packet."""
        return seal(_DATA.pack(Kind.RESET, *self))

    @classmethod
    def parse(cls, datagram: bytes) -> Reset:
        """
        :raises Malformed: it is too short or too long.
        """
        if len(datagram) != DATA_OVERHEAD:
            raise Malformed("RESET")
        return cls(*_DATA.unpack_from(datagram, _CHECKSUM_SIZE)[1:])


class Data(msgspec.Struct, gc=False):
    """TO_SERVER and TO_CLIENT: segments.

    :ivar identifier: the connection id of whoever it is for.
    :ivar number: that of the packet; no two packets of one end have the same.
    :ivar segments: where the segments begin.
    """

    kind: int
    identifier: int
    number: int
    segments: int = DATA_OVERHEAD

    @classmethod
    def parse(cls, datagram: bytes) -> Data:
        """
        :raises Malformed: it is too short.
        """
        if len(datagram) < DATA_OVERHEAD:
            raise Malformed("too short for its kind")
        return cls(*_unpack_data(datagram, _CHECKSUM_SIZE))


def serialize_data(kind: int, identifier: int, number: int, segments: bytes) -> bytes:
    """A packet TO_SERVER or TO_CLIENT."""
    return seal(_pack_data(kind, identifier, number) + segments)


class Accept(msgspec.Struct, gc=False):
    """ACCEPT: what a server sends until the client has shown that it knows the server's id; with segments.

    :ivar server_id: what packets to the server are to name.
    :ivar version: the one that is spoken.
    """

    client_id: int
    number: int
    server_id: int
    version: int
    segments: int = ACCEPT_OVERHEAD

    def serialize(self, segments: bytes) -> bytes:
        """The packet."""
        return seal(_ACCEPT.pack(Kind.ACCEPT, self.client_id, self.number, self.server_id, self.version) + segments)

    @classmethod
    def parse(cls, datagram: bytes) -> Accept:
        """
        :raises Malformed: it is too short.
        """
        if len(datagram) < ACCEPT_OVERHEAD:
            raise Malformed("ACCEPT")
        return cls(*_ACCEPT.unpack_from(datagram, _CHECKSUM_SIZE)[1:])


# Segments.


class SegmentKind(enum.IntEnum):
    """What a segment of a packet is."""

    PADDING = 0x00
    """Zeros to the end of the packet."""
    PING = 0x01
    """Nothing, but that an ACK is wanted at once."""
    ACK = 0x02
    """Which packets have come."""
    RUN = 0x03
    """Whole frames, each of which is a channel of its own."""
    PART = 0x04
    """Part of the frames of one channel."""
    LAST_PART = 0x05
    """The same, and nothing follows it in this channel."""
    ONCE = 0x06
    """Whole frames that are not sent again if they are lost."""
    CHALLENGE = 0x07
    """Whoever is at this address is to send the 8 octets back."""
    CHALLENGE_ANSWER = 0x08
    """They are these."""
    TOKEN = 0x09
    """What to show at the next connection."""
    CLOSE = 0x0A
    """The connection is over."""


_PADDING, _PING, _ACK, _RUN, _PART, _LAST_PART, _ONCE, _CHALLENGE, _CHALLENGE_ANSWER, _TOKEN, _CLOSE = map(
    int, SegmentKind
)

_RUN_HEAD = struct.Struct("!BQB")
_PART_HEAD = struct.Struct("!BQQH")
_ACK_HEAD = struct.Struct("!BQIBH")
_ACK_RANGE = struct.Struct("!HH")
_HEADER_SIZE = HEADER.size
_unpack_frame = HEADER.unpack_from
# A packet with one RUN, as far as the octets of its first frame.
_PLAIN = struct.Struct("!IBQQBQB" + HEADER.format.lstrip("!"))
_PLAIN_SIZE = _PLAIN.size
_unpack_plain = _PLAIN.unpack_from
_pack_plain = struct.Struct("!BQQBQB").pack

#: The connection id that such a packet names, its number, the number of its first channel, its frames.
Plain = tuple[int, int, int, list[Frame]]

RUN_OVERHEAD = _RUN_HEAD.size
#: Frames in one RUN, or in one ONCE.
MOST_FRAMES = 255
ONCE_OVERHEAD = 2
PART_OVERHEAD = _PART_HEAD.size
#: The delay of an ACK is told in these, in seconds; and what can be told.
ACK_UNIT = 1e-6
_MOST_UNITS = 0xFFFFFFFF
#: Ranges of an ACK beside the first.
MOST_RANGES = 32
LONGEST_ACK = _ACK_HEAD.size + MOST_RANGES * _ACK_RANGE.size
_MOST_OF_RANGE = 0xFFFF


class Ack(msgspec.Struct, gc=False):
    """ACK: the packets that have come, as ranges, the newest first.

    :ivar delay: seconds from when the newest of them came.
    :ivar ranges: the first and the last number of each.
    """

    delay: float
    ranges: Sequence[tuple[int, int]]

    def serialize(self) -> bytes:
        """The segment; what cannot be told in it is left out, oldest first."""
        first, last = self.ranges[0]
        delay = min(int(self.delay / ACK_UNIT), _MOST_UNITS) if self.delay > 0 else 0
        if len(self.ranges) == 1 or last - first > _MOST_OF_RANGE:
            return _ACK_HEAD.pack(_ACK, last, delay, 0, min(last - first, _MOST_OF_RANGE))
        told = []
        below = first
        for lower, upper in self.ranges[1 : MOST_RANGES + 1]:
            # Between two ranges there is a packet at least, and in each there is one.
            gap = below - upper - 2
            if gap > _MOST_OF_RANGE:
                break
            told.append(_ACK_RANGE.pack(gap, min(upper - lower, _MOST_OF_RANGE)))
            if upper - lower > _MOST_OF_RANGE:
                break
            below = lower
        return _ACK_HEAD.pack(_ACK, last, delay, len(told), last - first) + b"".join(told)


class Run(msgspec.Struct, gc=False):
    """RUN: frames, each whole and the only one of its channel; the channels' numbers follow each other.

    :ivar first: the number of the first channel.
    :ivar octets: how the frames stand in the packet.
    """

    first: int
    frames: list[Frame]
    octets: bytes


def serialize_run(first: int, count: int, frames: bytes) -> bytes:
    """A RUN of so many frames."""
    return _RUN_HEAD.pack(_RUN, first, count) + frames


class Part(msgspec.Struct, gc=False):
    """PART and LAST_PART: octets of the frames of a channel, which are one after the other.

    :ivar is_last: whether they are the last of the channel.
    """

    channel: int
    offset: int
    octets: bytes
    is_last: bool

    def serialize(self) -> bytes:
        """The segment."""
        kind = _LAST_PART if self.is_last else _PART
        return _PART_HEAD.pack(kind, self.channel, self.offset, len(self.octets)) + self.octets


class Once(msgspec.Struct, gc=False):
    """ONCE: frames that were sent once."""

    frames: list[Frame]


def serialize_once(count: int, frames: bytes) -> bytes:
    """A ONCE of so many frames."""
    return bytes((_ONCE, count)) + frames


class Challenge(msgspec.Struct, gc=False):
    """CHALLENGE, and its answer."""

    octets: bytes
    is_answer: bool

    def serialize(self) -> bytes:
        """The segment."""
        return bytes((_CHALLENGE_ANSWER if self.is_answer else _CHALLENGE,)) + self.octets


class Token(msgspec.Struct, gc=False):
    """TOKEN: shows at the next connection that this one was."""

    token: bytes

    def serialize(self) -> bytes:
        """The segment."""
        return bytes((_TOKEN, len(self.token))) + self.token


class Ping(msgspec.Struct, gc=False):
    """PING."""


class Close(msgspec.Struct, gc=False):
    """CLOSE."""


PING = bytes((_PING,))
CLOSE = bytes((_CLOSE,))

Segment = Ack | Run | Part | Once | Challenge | Token | Ping | Close


def parse_segments(datagram: bytes, at: int) -> list[Segment]:
    """The segments of a packet, from there to its end.

    :raises Malformed: they do not fill it exactly, or one is none.
    """
    segments: list[Segment] = []
    end = len(datagram)
    try:
        while at < end:
            kind = datagram[at]
            if kind == _RUN:
                _, first, count = _RUN_HEAD.unpack_from(datagram, at)
                start = at + RUN_OVERHEAD
                frames, at = _frames(datagram, start, count)
                segments.append(Run(first, frames, datagram[start:at]))
            elif kind == _ACK:
                ack, at = _parse_ack(datagram, at)
                segments.append(ack)
            elif kind in (_PART, _LAST_PART):
                _, channel, offset, length = _PART_HEAD.unpack_from(datagram, at)
                at += PART_OVERHEAD
                segments.append(Part(channel, offset, datagram[at : at + length], kind == _LAST_PART))
                at += length
            elif kind == _ONCE:
                frames, at = _frames(datagram, at + 2, datagram[at + 1])
                segments.append(Once(frames))
            elif kind == _PING:
                segments.append(Ping())
                at += 1
            elif kind in (_CHALLENGE, _CHALLENGE_ANSWER):
                segments.append(Challenge(datagram[at + 1 : at + 9], kind == _CHALLENGE_ANSWER))
                at += 9
            elif kind == _TOKEN:
                length = datagram[at + 1]
                segments.append(Token(datagram[at + 2 : at + 2 + length]))
                at += 2 + length
            elif kind == _CLOSE:
                segments.append(Close())
                at += 1
            elif kind == _PADDING:
                if datagram.count(0, at) != end - at:
                    raise Malformed("PADDING")
                at = end
            else:
                raise Malformed(f"segment 0x{kind:02x}")
    except (struct.error, IndexError):
        raise Malformed("a segment is cut off") from None
    if at != end:
        raise Malformed("a segment is cut off")
    return segments


def read_plain(datagram: bytes, wanted: int) -> Plain | None:
    """A packet with segments that has one RUN and nothing else, once its checksum is found right.

    Most are like that.  Of any other, or a malformed one, it gives ``None``: `read_kind` has more to say of them.

    :param wanted: the kind of packet: TO_SERVER or TO_CLIENT.
    """
    end = len(datagram)
    if end < _PLAIN_SIZE:
        return None
    checksum, packet, identifier, number, segment, first, count, length, kind, flags, call_id = _unpack_plain(datagram)
    if packet != wanted or segment != _RUN or crc32(datagram[_CHECKSUM_SIZE:], _SEED) != checksum:
        return None
    at = _PLAIN_SIZE + length
    frames: list[Frame] = [(kind, flags, call_id, datagram[_PLAIN_SIZE:at])]
    if at == end and count == 1:
        return identifier, number, first, frames
    while at + _HEADER_SIZE <= end:
        length, kind, flags, call_id = _unpack_frame(datagram, at)
        body = at + _HEADER_SIZE
        at = body + length
        frames.append((kind, flags, call_id, datagram[body:at]))
    return (identifier, number, first, frames) if at == end and len(frames) == count else None


def serialize_plain(kind: int, identifier: int, number: int, first: int, count: int, frames: bytes) -> bytes:
    """Such a packet, of so many frames."""
    body = _pack_plain(kind, identifier, number, _RUN, first, count) + frames
    return _pack_checksum(crc32(body, _SEED)) + body


def _frames(datagram: bytes, at: int, count: int) -> tuple[list[Frame], int]:
    """So many whole frames, and where they end."""
    if not count:
        raise Malformed("no frames")
    frames: list[Frame] = []
    for _ in range(count):
        length, kind, flags, call_id = _unpack_frame(datagram, at)
        body = at + _HEADER_SIZE
        at = body + length
        frames.append((kind, flags, call_id, datagram[body:at]))
    if at > len(datagram):
        raise Malformed("a frame is cut off")
    return frames, at


def _parse_ack(datagram: bytes, at: int) -> tuple[Ack, int]:
    _, last, delay, count, length = _ACK_HEAD.unpack_from(datagram, at)
    at += _ACK_HEAD.size
    first = last - length
    ranges = [(first, last)]
    for _ in range(count):
        gap, length = _ACK_RANGE.unpack_from(datagram, at)
        at += _ACK_RANGE.size
        last = first - gap - 2
        first = last - length
        ranges.append((first, last))
    if first < 0:
        raise Malformed("ACK")
    return Ack(delay * ACK_UNIT, ranges), at
