"""The layout of every frame, read and written; ``docs/wire-format.md`` specifies it.

Knows octets alone: not which frame may come when (`protoframe.core.conversation`), nor where a frame ends in a stream
of bytes (`protoframe.core.stream`).  All integers are in network byte order.

A frame is a header of 12 octets and a payload::

    u16  length of the payload
    u8   kind
    u8   flags
    u64  call id; 0 in a frame that concerns the whole conversation

A message (REQUEST, RESPONSE, ERROR, ITEM) that is longer than a frame is cut: its first frame has the flag MORE and
opens with the length of the whole message (u32), and CHUNK frames with the same call id carry the rest, all but the
last with MORE.
"""

from __future__ import annotations

import enum
import math
import struct
import typing
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from protoframe.core.limits import LARGEST_FRAME, SMALLEST_FRAME
from protoframe.errors import RemoteProtocolError, VersionMismatch

__all__ = [
    "FIRST_VERSION",
    "HEADER",
    "LAST_VERSION",
    "PREFACE_LENGTH",
    "ErrorBody",
    "Flag",
    "Frame",
    "GoAway",
    "Hello",
    "Key",
    "Kind",
    "agree_on_version",
    "behind",
    "count_frames",
    "cut_message",
    "parse_count",
    "parse_credit",
    "parse_preface",
    "parse_request",
    "serialize_credit",
    "serialize_frame",
    "serialize_key",
    "serialize_preface",
    "serialize_request",
    "split_key",
]

MAGIC = b"\x89PF\n"
FIRST_VERSION = 1
LAST_VERSION = 1

_PREFACE = struct.Struct("!4sBBH")
PREFACE_LENGTH = _PREFACE.size

HEADER = struct.Struct("!HBBQ")
_TOTAL = struct.Struct("!I")
_REQUEST = struct.Struct("!IHH")
#: A header and what opens a REQUEST, in one.
REQUEST_FRAME = struct.Struct("!HBBQIHH")
_unpack_request = _REQUEST.unpack_from
_ERROR = struct.Struct("!HBH")
_GOAWAY = struct.Struct("!HQ")
COUNT = struct.Struct("!H")
_CREDIT = struct.Struct("!I")
_KEY = struct.Struct("!QI")
#: What a key takes in front of the arguments.
KEY_LENGTH = _KEY.size

#: A deadline is told in milliseconds; the longest is some 49 days.
LONGEST_REMAINING = 0xFFFFFFFE / 1000
#: What is told where there is no deadline.
NO_DEADLINE = 0xFFFFFFFF
#: Octets around a single item that are no part of it: the head of an array of msgpack, or the brackets of one of JSON.
ARRAY_HEAD = 5
#: What an item costs of the credit beside its octets, for memory holds more of it than those; RFC 9113, section 6.5.2,
#: counts fields of a header so.
ITEM_OVERHEAD = 32
LONGEST_METHOD = 255
LONGEST_METADATA = 0xFFFF
#: Octets of the text of an ERROR or a GOAWAY.
LONGEST_TEXT = 1024
#: It is sent before the peer has said which frames it takes.
LONGEST_HELLO = SMALLEST_FRAME - HEADER.size
#: What it has room for beside the numbers.
LONGEST_AGENT_AND_TOKEN = 1780
#: Octets of the secret by which a session is known.
SESSION_LENGTH = 32


class Kind(enum.IntEnum):
    """What a frame is.  A receiver skips kinds from 0x80 on that it does not know, and refuses other unknown ones."""

    HELLO = 0x01
    REQUEST = 0x02
    RESPONSE = 0x03
    ERROR = 0x04
    CHUNK = 0x05
    CANCEL = 0x06
    PING = 0x07
    PONG = 0x08
    GOAWAY = 0x09
    ITEM = 0x0A
    END = 0x0B
    CREDIT = 0x0C
    STOP = 0x0D


FIRST_SKIPPED_KIND = 0x80


class Flag(enum.IntFlag):
    """Bits of a frame's flags; a receiver ignores those that it does not know."""

    MORE = 0x01
    """REQUEST, RESPONSE, ERROR, ITEM, CHUNK: the message goes on in a CHUNK."""
    NOT_PROCESSED = 0x02
    """ERROR: the call certainly did not run."""
    JSON = 0x04
    """REQUEST: arguments, result, items and the detail of an error are JSON (RFC 8259), not msgpack."""
    ITEMS = 0x08
    """REQUEST: the caller sends a stream of items."""
    STREAM = 0x10
    """REQUEST: the caller takes a stream of items as the answer."""
    ONEWAY = 0x20
    """REQUEST: no answer is wanted."""
    KEYED = 0x40
    """REQUEST: it has a key, under which its outcome is kept for a caller that has lost the connection."""


# The hot paths compare and combine plain integers.
_MORE = int(Flag.MORE)


#: One frame: kind, flags, call id, payload.  A plain tuple, for there is one for each call and each answer.  That of a
#: CHUNK may have a view for its payload.
Frame = tuple[int, int, int, bytes]


def serialize_frame(kind: int, flags: int, call_id: int, payload: bytes) -> bytes:
    """The octets of one frame; the payload is at most 65,524 octets."""
    return HEADER.pack(len(payload), kind, flags, call_id) + payload


def cut_message(
    kind: int, flags: int, call_id: int, head: bytes, body: bytes | bytearray, max_frame: int
) -> Iterator[tuple[bytes, memoryview]]:
    """The frames, as many as `count_frames`, of a message that does not fit one, each made when it is asked for.

    Each is of two parts, the second of which is a view of the body.

    :param head: the first octets of the message; they must fit the first frame.
    :param body: the rest, of which nothing is copied before its frame is made.
    """
    rest = memoryview(body)
    room = max_frame - HEADER.size
    total = len(head) + len(body)
    at = room - _TOTAL.size - len(head)
    yield b"".join((HEADER.pack(room, kind, flags | _MORE, call_id), _TOTAL.pack(total), head)), rest[:at]
    while at < len(body):
        part = rest[at : at + room]
        at += len(part)
        yield HEADER.pack(len(part), Kind.CHUNK, _MORE if at < len(body) else 0, call_id), part


def count_frames(total: int, max_frame: int) -> int:
    """How many frames a message of so many octets takes that does not fit one."""
    room = max_frame - HEADER.size
    return 1 + -(-(total - room + _TOTAL.size) // room)


def parse_total(payload: bytes) -> tuple[int, bytes]:
    """The length of a whole message and its first part, from the payload of a first frame with MORE.

    :raises RemoteProtocolError: the payload is too short, or the first part is the whole message or more.
    """
    if len(payload) < _TOTAL.size:
        raise RemoteProtocolError(f"a first frame with MORE has at least 4 octets, not {len(payload)}")
    (total,) = _TOTAL.unpack_from(payload)
    part = payload[_TOTAL.size :]
    if len(part) >= total:
        raise RemoteProtocolError(f"a message of {total} octets has no use for MORE after {len(part)}")
    return total, part


# The preface.


def serialize_preface(first: int = FIRST_VERSION, last: int = LAST_VERSION) -> bytes:
    """What opens a conversation: the magic and the range of versions that this end speaks."""
    return _PREFACE.pack(MAGIC, first, last, 0)


def parse_preface(data: bytes) -> tuple[int, int]:
    """The first and the last version that the peer speaks, from its 8 octets.

    :raises RemoteProtocolError: this is not the magic; the text says what it looks like.
    """
    magic, first, last, _ = _PREFACE.unpack(data)
    if magic != MAGIC:
        raise RemoteProtocolError(f"the peer does not speak protoframe: it opened with {describe(data)}")
    if not 0 < first <= last:
        raise RemoteProtocolError(f"the peer speaks versions {first} to {last}, which is no range")
    return first, last


def opens_like_a_preface(data: bytes) -> bool:
    """Whether the first octets of a conversation, however few, may become a preface."""
    return data[: len(MAGIC)] == MAGIC[: len(data)]


def agree_on_version(first: int, last: int) -> int:
    """The version to speak with a peer that speaks ``first`` to ``last``: the latest that both do.

    :raises VersionMismatch: there is none.
    """
    if first > LAST_VERSION or last < FIRST_VERSION:
        ours = _range(FIRST_VERSION, LAST_VERSION)
        raise VersionMismatch(f"no version in common: the peer speaks {_range(first, last)}, this end {ours}")
    return min(last, LAST_VERSION)


def _range(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first} to {last}"


def describe(data: bytes) -> str:
    """The first octets of what came, fit for one line of a log."""
    return repr(data[:16])[1:]


# Payloads.


class Hello(msgspec.Struct, frozen=True):
    """HELLO: the settings of the end that sends it, as a msgpack map.  Unknown keys are ignored.

    :ivar max_frame: octets of a frame that it takes, header included.
    :ivar max_message: octets of a message that it takes.
    :ivar max_unfinished: octets of messages that it holds while their rest is on the way, of all calls together.
    :ivar max_calls: calls that it serves at once.
    :ivar agent: what it is, for people who read captures.
    :ivar stream_credit: what items of one stream may cost before it has asked for more; 0: it takes no streams.
    :ivar connection_credit: the same, of all streams together.
    :ivar token: a secret that shows who sends it.
    :ivar session: a secret by which whoever takes calls knows the sender again, over another connection; or nothing.
    :ivar next_key: no call of the session that was sent has this key, or one above it.
    """

    max_frame: int
    max_message: int
    max_unfinished: int
    max_calls: int
    agent: str = ""
    stream_credit: int = 0
    connection_credit: int = 0
    token: str = ""
    session: bytes = b""
    next_key: int = 0

    def __repr__(self) -> str:
        # What is logged, or shown by a failing test, must not have the secrets.
        return f"<Hello of {self.agent or 'a peer'}>"

    def check(self) -> None:
        """Holds the settings to their bounds.

        :raises RemoteProtocolError: one is out of them.
        """
        if not SMALLEST_FRAME <= self.max_frame <= LARGEST_FRAME:
            raise RemoteProtocolError(f"HELLO: max_frame is {self.max_frame}, not {SMALLEST_FRAME} to {LARGEST_FRAME}")
        if not 0 < self.max_message < 1 << 31:
            # Of the u32 that tells a message's length, what stands beside the arguments takes its share.
            raise RemoteProtocolError(f"HELLO: max_message is {self.max_message}, not 1 to {(1 << 31) - 1}")
        if self.max_unfinished < self.max_message:
            raise RemoteProtocolError(f"HELLO: max_unfinished is {self.max_unfinished}, below max_message")
        if not 0 <= self.max_calls < 1 << 32:
            raise RemoteProtocolError(f"HELLO: max_calls is {self.max_calls}, not 0 to {(1 << 32) - 1}")
        for name in ("stream_credit", "connection_credit"):
            credit = getattr(self, name)
            if not 0 <= credit < 1 << 31:
                raise RemoteProtocolError(f"HELLO: {name} is {credit}, not 0 to {(1 << 31) - 1}")
        if len(self.session) not in (0, SESSION_LENGTH):
            raise RemoteProtocolError(f"HELLO: session has {len(self.session)} octets, not {SESSION_LENGTH}")
        if not 0 <= self.next_key < 1 << 63:
            raise RemoteProtocolError(f"HELLO: next_key is {self.next_key}, not 0 to {(1 << 63) - 1}")

    def serialize(self) -> bytes:
        """The payload of a HELLO frame."""
        settings = msgspec.structs.asdict(self)
        if not self.session:
            del settings["session"], settings["next_key"]
        return msgspec.msgpack.encode(settings)

    @classmethod
    def parse(cls, payload: bytes) -> Hello:
        """
        :raises RemoteProtocolError: the payload is longer than any HELLO, or no map of settings in their bounds.
        """
        if len(payload) > LONGEST_HELLO:
            raise RemoteProtocolError(f"HELLO: {len(payload)} octets are more than {LONGEST_HELLO}")
        try:
            hello = _decode_hello(payload)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise RemoteProtocolError(f"HELLO: {error}") from None
        hello.check()
        return hello


_decode_hello = msgspec.msgpack.Decoder(Hello).decode


# REQUEST: u32 remaining time in milliseconds, u16 length of the method's name, u16 length of the metadata, the name
# (UTF-8), the metadata (a msgpack map of strings, or nothing), and up to the end the arguments (a map by name).


def serialize_request(remaining: float, method: bytes, metadata: bytes, arguments: bytes) -> bytes:
    """The message of a REQUEST; ``remaining`` seconds are rounded down, so that no hop extends a deadline."""
    return _REQUEST.pack(milliseconds_of(remaining), len(method), len(metadata)) + method + metadata + arguments


def milliseconds_of(remaining: float) -> int:
    """A time until a deadline, as it travels; infinity where there is none."""
    if remaining == math.inf:
        return NO_DEADLINE
    return min(int(remaining * 1000), NO_DEADLINE - 1) if remaining > 0 else 0


def parse_request(message: bytes) -> tuple[float, bytes, bytes, bytes]:
    """The remaining seconds, the method's name, the metadata and the arguments of a REQUEST.

    :raises RemoteProtocolError: the lengths do not fit the message.
    """
    try:
        milliseconds, name, metadata = _unpack_request(message)
    except struct.error:
        raise RemoteProtocolError(f"REQUEST: {len(message)} octets are too few") from None
    after_name = 8 + name
    after_metadata = after_name + metadata
    if after_metadata > len(message) or not 0 < name <= LONGEST_METHOD:
        raise RemoteProtocolError(f"REQUEST: {name} octets of name and {metadata} of metadata in {len(message)}")
    remaining = milliseconds / 1000 if milliseconds != NO_DEADLINE else math.inf
    if len(message) > LARGEST_FRAME:
        name_and_metadata = bytes(message[8:after_metadata])
        return remaining, name_and_metadata[:name], name_and_metadata[name:], behind(message, after_metadata)
    return (
        remaining,
        message[8:after_name],
        message[after_name:after_metadata] if metadata else b"",
        message[after_metadata:],
    )


def behind(message: bytes, at: int) -> bytes:
    """What stands behind a place in a message; of a large one a view, which a decoder takes as well."""
    return message[at:] if len(message) <= LARGEST_FRAME else typing.cast("bytes", memoryview(message)[at:])


class Key(NamedTuple):
    """What a call with KEYED is known by in its session.

    :ivar number: given to no other call of the session.
    :ivar unsettled: the lowest number of a call of which the caller still wants to know the outcome.
    """

    number: int
    unsettled: int


def serialize_key(key: Key) -> bytes:
    """What stands in front of the arguments of a REQUEST with KEYED: u64 number, u32 how far below `unsettled` is."""
    return _KEY.pack(key.number, min(key.number - key.unsettled, 0xFFFFFFFF))


def split_key(arguments: bytes) -> tuple[Key, bytes]:
    """The key, and what the method is given.

    :raises RemoteProtocolError: there is no key.
    """
    if len(arguments) < KEY_LENGTH:
        raise RemoteProtocolError(f"REQUEST: {len(arguments)} octets are too few for a key")
    number, back = _KEY.unpack_from(arguments)
    if back > number:
        raise RemoteProtocolError(f"REQUEST: key {number} has no {back} before it")
    return Key(number, number - back), arguments[KEY_LENGTH:]


def parse_first_part(part: bytes, total: int) -> tuple[float, bytes, int]:
    """The remaining seconds, the method's name and the length of the arguments of a REQUEST of several frames.

    :param part: its first part, which has the name.
    :param total: the length of the whole.
    :raises RemoteProtocolError: the part is too short, or the lengths do not fit the message.
    """
    try:
        milliseconds, name, metadata = _unpack_request(part)
    except struct.error:
        raise RemoteProtocolError(f"REQUEST: {len(part)} octets are too few") from None
    length = total - 8 - name - metadata
    if length < 0 or not 0 < name <= min(LONGEST_METHOD, len(part) - 8):
        raise RemoteProtocolError(f"REQUEST: {name} octets of name and {metadata} of metadata in {total}")
    remaining = milliseconds / 1000 if milliseconds != NO_DEADLINE else math.inf
    return remaining, part[8 : 8 + name], length


# ITEM: u16 number of items, and up to the end an array of them, in the encoding of the call.


def parse_count(message: bytes) -> int:
    """How many items an ITEM, or its first part, says that it has.

    :raises RemoteProtocolError: it is too short to say, or says none.
    """
    if len(message) < COUNT.size:
        raise RemoteProtocolError(f"ITEM: {len(message)} octets are too few")
    (count,) = COUNT.unpack_from(message)
    if not count:
        raise RemoteProtocolError("ITEM: no items")
    return int(count)


# CREDIT: u32 octets.


def serialize_credit(octets: int) -> bytes:
    """The payload of a CREDIT frame."""
    return _CREDIT.pack(octets)


def parse_credit(payload: bytes) -> int:
    """What a CREDIT frame adds.

    :raises RemoteProtocolError: the payload is not 4 octets, or adds nothing.
    """
    if len(payload) != _CREDIT.size:
        raise RemoteProtocolError(f"CREDIT: {len(payload)} octets, not {_CREDIT.size}")
    (octets,) = _CREDIT.unpack(payload)
    if not octets:
        raise RemoteProtocolError("CREDIT: of nothing")
    return int(octets)


class ErrorBody(NamedTuple):
    """The message of an ERROR.

    ``u16`` status, ``u8`` length of the type's name, ``u16`` length of the text, the name, the text (both UTF-8), and
    up to the end the typed detail (a map by name, in the encoding of the call; may be empty).
    """

    status: int
    name: str
    text: str
    detail: bytes = b""

    def serialize(self) -> bytes:
        """The message of an ERROR; a longer text is cut to 1,024 octets."""
        name = self.name.encode("utf-8", "replace")[:255]
        text = cut(self.text)
        return _ERROR.pack(self.status, len(name), len(text)) + name + text + self.detail

    @classmethod
    def parse(cls, message: bytes) -> ErrorBody:
        """
        :raises RemoteProtocolError: the lengths do not fit the message.
        """
        try:
            status, name_length, text_length = _ERROR.unpack_from(message)
        except struct.error:
            raise RemoteProtocolError(f"ERROR: {len(message)} octets are too few") from None
        after_name = _ERROR.size + name_length
        after_text = after_name + text_length
        if after_text > len(message):
            raise RemoteProtocolError(f"ERROR: {name_length} and {text_length} octets of text in {len(message)}")
        return cls(
            status,
            message[_ERROR.size : after_name].decode("utf-8", "replace"),
            message[after_name:after_text].decode("utf-8", "replace"),
            message[after_text:],
        )


class GoAway(NamedTuple):
    """The payload of a GOAWAY.

    ``u16`` status (0: an orderly end), ``u64`` the highest call id of the receiver that was or will be processed (0:
    none), and up to the end a text (UTF-8).
    """

    status: int
    last_call_id: int
    text: str

    def serialize(self) -> bytes:
        """The payload of a GOAWAY frame; a longer text is cut to 1,024 octets."""
        return _GOAWAY.pack(self.status, self.last_call_id) + cut(self.text)

    @classmethod
    def parse(cls, payload: bytes) -> GoAway:
        """
        :raises RemoteProtocolError: the payload is too short.
        """
        if len(payload) < _GOAWAY.size:
            raise RemoteProtocolError(f"GOAWAY: {len(payload)} octets are too few")
        status, last_call_id = _GOAWAY.unpack_from(payload)
        return cls(status, last_call_id, payload[_GOAWAY.size :].decode("utf-8", "replace"))


def cut(text: str) -> bytes:
    """The UTF-8 of a text, cut at a character where it is longer than a frame should carry."""
    octets = text.encode("utf-8", "replace")
    if len(octets) > LONGEST_TEXT:
        octets = octets[:LONGEST_TEXT].decode("utf-8", "ignore").encode()
    return octets
