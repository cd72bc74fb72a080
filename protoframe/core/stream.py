"""A byte stream cut into frames: the carrier for TCP, TLS and UNIX sockets.

Knows where a frame ends and no more: what a frame means is the request layer's (`protoframe.core.conversation`).  At
most one unfinished frame is held, and a length is checked before the octets behind it are waited for.
"""

from __future__ import annotations

import math
import typing

from protoframe.core.frames import (
    HEADER,
    PREFACE_LENGTH,
    Frame,
    Kind,
    agree_on_version,
    describe,
    opens_like_a_preface,
    parse_preface,
)
from protoframe.errors import FrameTimeout, FrameTooLarge, RemoteProtocolError

__all__ = ["FrameReader"]

_CHUNK = int(Kind.CHUNK)
_HEADER_LENGTH = HEADER.size
_unpack_header = HEADER.unpack_from


class FrameReader:
    """Reads the preface and then frames from a stream.

    :param max_frame: octets of a frame that are taken, header included.
    :param frame_timeout: seconds from the first octet of a frame to its last.
    :ivar version: the version agreed on; 0 until the peer's preface has come.
    :ivar fault: what is wrong behind the frames that `feed` gave last.
    """

    __slots__ = ("_begun", "_frame_timeout", "_held", "_max_payload", "_needed", "_stopped", "fault", "version")

    def __init__(self, max_frame: int, frame_timeout: float) -> None:
        self.version = 0
        self.fault: RemoteProtocolError | None = None
        self._frame_timeout = frame_timeout
        self._begun: float | None = None
        self._stopped = False
        self._max_payload = max_frame - _HEADER_LENGTH
        self._held = bytearray()
        self._needed = PREFACE_LENGTH

    def feed(self, data: bytes, now: float) -> list[Frame]:
        """The frames that the next octets complete.

        Frames that stand before a fault in the same octets are given, and `fault` is set: what happens does not
        depend on how the stream was cut.  After a fault nothing more is to be fed: where the next frame would begin
        is not known.

        :raises RemoteProtocolError: the peer does not open with the magic, or a frame is longer than it may be.
        :raises VersionMismatch: the peer speaks no version that this end does.
        """
        at = 0
        frames: list[Frame] = []
        if self._held or not self.version:
            at = self._complete(data, now, frames)
            if at < 0:
                return frames
        elif len(data) >= _HEADER_LENGTH:
            length, kind, flags, call_id = _unpack_header(data)
            if length + _HEADER_LENGTH == len(data) and length <= self._max_payload:
                # Most often it is one frame, whole.
                return [(kind, flags, call_id, data[_HEADER_LENGTH:])]
        end = len(data)
        max_payload = self._max_payload
        last = end - _HEADER_LENGTH
        while at <= last:
            length, kind, flags, call_id = _unpack_header(data, at)
            body = at + _HEADER_LENGTH
            after = body + length
            if after > end or length > max_payload:
                if length > max_payload:
                    fault = self._too_large(length)
                    if not frames:
                        raise fault
                    return frames
                self._needed = _HEADER_LENGTH + length
                break
            # That of a chunk is copied once, to where its message is put together.
            payload = typing.cast("bytes", memoryview(data)[body:after]) if kind == _CHUNK else data[body:after]
            frames.append((kind, flags, call_id, payload))
            at = after
        if at < end:
            self._held += memoryview(data)[at:]
            if at or self._begun is None:
                self._begun = now
        else:
            self._begun = None
        return frames

    def _complete(self, data: bytes, now: float, frames: list[Frame]) -> int:
        """Adds to what is held what it lacks, and if that makes a frame whole, the frame to others.

        :return: how many octets that took; -1 where it took all, and something is lacking still.
        """
        held = self._held
        taken = 0
        while True:
            # Appended to, not built anew: a peer that sends octet by octet costs no more than another.
            lacking = self._needed - len(held)
            held += memoryview(data)[taken : taken + lacking]
            taken += lacking
            if not self.version and not opens_like_a_preface(bytes(held)):
                opening = describe(bytes(held + data[taken : taken + 16])[:16])
                held.clear()
                raise RemoteProtocolError(f"the peer does not speak protoframe: it opened with {opening}")
            if taken > len(data):
                if self._begun is None:
                    self._begun = now
                return -1
            if not self.version:
                self.version = agree_on_version(*parse_preface(bytes(held)))
                break
            length, kind, flags, call_id = _unpack_header(held)
            if length > self._max_payload:
                raise self._too_large(length)
            if len(held) == _HEADER_LENGTH + length:
                # That of a chunk is copied to where its message is put together, and not here as well.
                payload = memoryview(held)[_HEADER_LENGTH:]
                frames.append((kind, flags, call_id, payload if kind == _CHUNK else bytes(payload)))  # type: ignore[arg-type]
                break
            self._needed = _HEADER_LENGTH + length
        self._held = bytearray()
        self._needed = _HEADER_LENGTH
        self._begun = None
        return taken

    def _too_large(self, length: int) -> FrameTooLarge:
        self.fault = FrameTooLarge(
            f"a frame of {length + _HEADER_LENGTH} octets is longer than {self._max_payload + _HEADER_LENGTH}",
        )
        return self.fault

    @property
    def unfinished(self) -> bool:
        """Whether part of a frame, or of the preface, waits for its rest."""
        return self._begun is not None

    def stop_clock(self) -> None:
        """Says that this end reads no more for now: what is on the way cannot come."""
        self._stopped = True

    def start_clock(self, now: float) -> None:
        """Says that this end reads again: what is on the way has its time anew."""
        self._stopped = False
        if self._begun is not None:
            self._begun = now

    def next_timer(self) -> float:
        """When `handle_timer` wants to be called; infinity for never."""
        if self._begun is None or self._stopped:
            return math.inf
        return self._begun + self._frame_timeout

    def handle_timer(self, now: float) -> None:
        """
        :raises FrameTimeout: a frame has been on the way for too long.
        """
        if self.next_timer() <= now:
            raise FrameTimeout(f"a frame did not come whole within {self._frame_timeout:g} s")
