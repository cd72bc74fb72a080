"""What a network does to packets on the way from one host to another.

Knows sizes, times and chance; not what a packet is for.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

from protoframe.testing._timeline import Timeline

__all__ = ["Conditions", "Link", "Packet"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a network does to packets, in one direction between two hosts.

    Probabilities are from 0 to 1, and of each packet alone.

    :param delay: seconds that each packet takes.
    :param jitter: seconds that it may take longer; evenly distributed, so that packets may overtake each other.
    :param loss: the probability that it is lost.
    :param duplicate: that it comes twice.
    :param reorder: that it is held up for one to three times ``delay``, or a millisecond where that is longer, and so
        is overtaken.
    :param corrupt: that some of its bits are changed.  A segment of TCP is dropped then, for its checksum shows it.
    :param bandwidth: octets a second; ``None`` for no bound.
    :param queue: octets that wait for their turn where there is a bound; what does not fit is dropped.
    :param mtu: octets that a packet may have, headers included; a larger one is dropped without a word.
    :raises ValueError: a value is out of its bounds.
    :raises TypeError: a value is no number.
    """

    delay: float = 0.001
    jitter: float = 0.0
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    corrupt: float = 0.0
    bandwidth: float | None = None
    queue: int = 65536
    mtu: int = 1500

    def __post_init__(self) -> None:
        for name in ("loss", "duplicate", "reorder", "corrupt"):
            if not 0 <= _number(name, getattr(self, name)) <= 1:
                raise ValueError(f"{name}: expected a probability, 0 to 1, got {getattr(self, name)}")
        for name in ("delay", "jitter"):
            if not (_number(name, getattr(self, name)) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name}: expected seconds, 0 or more, got {getattr(self, name)}")
        if self.bandwidth is not None and not self.bandwidth > 0:
            raise ValueError(f"bandwidth: expected octets a second, above 0, or None, got {self.bandwidth}")
        if self.queue < 0:
            raise ValueError(f"queue: expected octets, 0 or more, got {self.queue}")
        if self.mtu < 68:
            # RFC 791: what every host must take.
            raise ValueError(f"mtu: expected 68 octets or more, got {self.mtu}")


def _number(name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    return value


@dataclasses.dataclass(slots=True)
class Packet:
    """What travels.

    :ivar kind: ``udp``, ``tcp`` or ``icmp``.
    :ivar source: the address and the port that it comes from, as those who get it see it.
    :ivar destination: where it goes.
    :ivar size: octets, headers included.
    :ivar payload: octets of a datagram, or a segment.
    """

    kind: str
    source: tuple[str, int]
    destination: tuple[str, int]
    size: int
    payload: Any


class Link:
    """One direction between two hosts.

    :param timeline: the time.
    :param random: chance.
    :param conditions: gives what the network does.
    :param deliver: takes what arrives.
    :param note: told what became of each packet.
    :ivar is_cut: whether nothing gets through.
    :ivar travelling: how many packets are on their way.
    """

    def __init__(
        self,
        timeline: Timeline,
        random: random.Random,
        conditions: Callable[[], Conditions],
        deliver: Callable[[Packet], None],
        note: Callable[[str, Packet], None],
    ) -> None:
        self.is_cut = False
        self.travelling = 0
        self._timeline = timeline
        self._random = random
        self._conditions = conditions
        self._deliver = deliver
        self._note = note
        self._free_at = 0.0

    def send(self, packet: Packet) -> None:
        """Sends a packet, or loses it."""
        conditions = self._conditions()
        chance = self._random.random
        now = self._timeline.now
        if self.is_cut:
            self._note("cut off", packet)
            return
        if packet.size > conditions.mtu:
            self._note("too large", packet)
            return
        leaves = now
        if conditions.bandwidth is not None:
            waits = max(0.0, self._free_at - now) * conditions.bandwidth
            if waits + packet.size > conditions.queue + packet.size and waits > 0:
                self._note("queue full", packet)
                return
            self._free_at = leaves = max(now, self._free_at) + packet.size / conditions.bandwidth
        if conditions.loss and chance() < conditions.loss:
            self._note("lost", packet)
            return
        if conditions.corrupt and chance() < conditions.corrupt:
            self._note("corrupted", packet)
            if packet.kind != "udp":
                return
            packet = dataclasses.replace(packet, payload=self._corrupted(packet.payload))
        self._arrive_later(packet, conditions, leaves - now)
        if conditions.duplicate and chance() < conditions.duplicate:
            self._note("doubled", packet)
            self._arrive_later(packet, conditions, leaves - now)

    def _arrive_later(self, packet: Packet, conditions: Conditions, seconds: float) -> None:
        chance = self._random.random
        seconds += conditions.delay
        if conditions.jitter:
            seconds += chance() * conditions.jitter
        if conditions.reorder and chance() < conditions.reorder:
            seconds += (1 + 2 * chance()) * max(conditions.delay, 0.001)
        self.travelling += 1
        self._timeline.call_later(seconds, self._arrive, packet)

    def _arrive(self, packet: Packet) -> None:
        self.travelling -= 1
        if self.is_cut:
            self._note("cut off", packet)
        else:
            self._deliver(packet)

    def _corrupted(self, octets: bytes) -> bytes:
        if not octets:
            return octets
        changed = bytearray(octets)
        for _ in range(self._random.randint(1, 3)):
            changed[self._random.randrange(len(changed))] ^= 1 << self._random.randrange(8)
        return bytes(changed)
