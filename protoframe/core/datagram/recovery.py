"""Which packets are on the way, which are lost, and when to ask: RFC 9002, section 6 and appendix A.

Knows numbers, sizes and times of packets; what is in them it hands back, to be sent again or forgotten.
"""

from __future__ import annotations

import math

import msgspec

from protoframe.core.datagram.congestion import NewReno, Pacer
from protoframe.core.datagram.outflow import Item
from protoframe.core.datagram.packets import Ack, Malformed
from protoframe.core.datagram.rtt import RoundTrip

__all__ = ["MAX_ACK_DELAY", "Recovery", "SentPacket"]

#: Seconds for which a receiver may keep an ACK to itself; RFC 9000, section 18.2.
MAX_ACK_DELAY = 0.025
#: How many later packets have come where one is lost; RFC 9002, section 6.1.1.
REORDERING = 3
#: Packets that may be on the way before the pacer is asked: as many have never harmed a network.
UNPACED = 4
#: Seconds between two probes at most, unless the round trip takes longer.  Backing off without an end would have half
#: a minute go by until an answer gets through a network that loses every second packet.
LONGEST_PROBE = 2.0
#: How many times the time of a probe must pass without anything that came, for the window to collapse; RFC 9002,
#: section 7.6.1.
PERSISTENT = 3


class SentPacket(msgspec.Struct, eq=False, gc=False):
    """A packet on the way that is to be acknowledged.

    :ivar sent: when it left.
    :ivar items: what is in it.
    :ivar acknowledges: the newest packet that it acknowledges; -1 for none.
    :ivar is_probe: whether it only asks whether a packet of its size gets through.
    """

    number: int
    sent: float
    size: int
    items: list[Item]
    acknowledges: int
    is_probe: bool = False


class Recovery:
    """The packets of one end that are on the way.

    :param now: the time.
    :param size: octets of a full packet.
    :ivar round_trip: how long one takes.
    :ivar congestion: how much may be on the way.
    :ivar packets: those that are, by their numbers, in order.
    :ivar next_number: that of the next packet.
    :ivar probes: how often it was asked in vain whether anything comes.
    """

    def __init__(self, now: float, size: int) -> None:
        self.round_trip = RoundTrip()
        self.congestion = NewReno(size)
        self.pacer = Pacer(now)
        self.packets: dict[int, SentPacket] = {}
        self.next_number = 0
        self.probes = 0
        self._largest = -1
        self._lost_at = math.inf
        self._sent_at = now
        # When the newest packet was sent of those that have come.
        self._came_of = -math.inf

    def sent(self, packet: SentPacket) -> None:
        """A packet has left."""
        self.packets[packet.number] = packet
        self._sent_at = packet.sent
        self.congestion.in_flight += packet.size
        self.pacer.left -= packet.size

    def may_send(self, size: int) -> bool:
        """Whether the window has room."""
        congestion = self.congestion
        if congestion.in_flight + size <= congestion.window:
            return True
        congestion.is_full = True
        return False

    def send_at(self, now: float) -> float:
        """When the pacer lets the next packet leave; ``now`` or earlier for at once."""
        congestion = self.congestion
        if congestion.in_flight < UNPACED * congestion.size:
            return now
        return self.pacer.allows(now, congestion.window, congestion.size, self.round_trip.smoothed)

    def handle_ack(self, ack: Ack, now: float) -> tuple[list[SentPacket], list[SentPacket]]:
        """Packets have come: those of which that is news, and those that are lost, going by it.

        :raises Malformed: it acknowledges what was never sent.
        """
        largest = ack.ranges[0][1]
        if largest >= self.next_number:
            raise Malformed("ACK of what was not sent")
        packets = self.packets
        came: list[SentPacket] = []
        if packets:
            oldest = next(iter(packets))
            for first, last in ack.ranges:
                if last < oldest:
                    break
                if last - first < len(packets):
                    for number in range(first, last + 1):
                        packet = packets.pop(number, None)
                        if packet is not None:
                            came.append(packet)
                else:
                    for number in [number for number in packets if first <= number <= last]:
                        came.append(packets.pop(number))
        if not came:
            return came, []
        congestion = self.congestion
        newest = max(came, key=_number_of) if len(came) > 1 else came[0]
        self._largest = max(self._largest, largest)
        if newest.number == largest:
            # Not the lesser of this and `MAX_ACK_DELAY`, as RFC 9002, section 5.3, has it: where ACKs are lost, the one
            # that gets through tells of a packet that came long ago.
            self.round_trip.measure(now - newest.sent, ack.delay)
        for packet in came:
            congestion.acknowledged(packet.size, packet.sent)
        if congestion.is_full and congestion.in_flight < congestion.window // 2:
            # There is little to send: a window that is not used says nothing of the network.
            congestion.is_full = False
        self.probes = 0
        lost = self._find_lost(now) if packets else []
        if not packets:
            self._lost_at = math.inf
        self._came_of = max(self._came_of, newest.sent)
        return came, lost

    def _find_lost(self, now: float) -> list[SentPacket]:
        largest = self._largest
        after = self.round_trip.lost_after()
        self._lost_at = math.inf
        lost = []
        for packet in self.packets.values():
            if packet.number > largest:
                break
            if packet.number <= largest - REORDERING or packet.sent + after <= now:
                lost.append(packet)
            elif packet.sent + after < self._lost_at:
                self._lost_at = packet.sent + after
        if not lost:
            return lost
        congestion = self.congestion
        heeded = None
        for packet in lost:
            del self.packets[packet.number]
            congestion.lost(packet.size)
            # One that was too large says nothing of congestion; RFC 8899, section 3.
            if not packet.is_probe:
                heeded = packet
        if heeded is not None:
            congestion.congested(heeded.sent, now)
            first = next(packet for packet in lost if not packet.is_probe)
            period = PERSISTENT * (self.round_trip.probe_after() + MAX_ACK_DELAY)
            if self.round_trip.latest and heeded.sent - first.sent > period and first.sent > self._came_of:
                congestion.collapsed()
        return lost

    # The timer.

    def next_timer(self) -> float:
        """When `handle_timer` wants to be called; infinity for never."""
        if self._lost_at != math.inf:
            return self._lost_at
        if not self.packets:
            return math.inf
        return self._sent_at + self._probe_after()

    def _probe_after(self) -> float:
        after = self.round_trip.probe_after() + MAX_ACK_DELAY
        return after if not self.probes else max(after, min(after * 2.0 ** min(self.probes, 16), LONGEST_PROBE))

    def handle_timer(self, now: float) -> tuple[list[SentPacket], bool]:
        """The packets that are lost by now, or whether it is time to ask; RFC 9002, appendix A.9."""
        if self.next_timer() > now:
            return [], False
        if self._lost_at != math.inf:
            return self._find_lost(now), False
        self.probes += 1
        self._sent_at = now
        return [], True

    def forget(self) -> list[SentPacket]:
        """Waits for none of the packets any more; those that there were."""
        packets = list(self.packets.values())
        self.packets.clear()
        for packet in packets:
            self.congestion.in_flight -= packet.size
        self.probes = 0
        self._lost_at = math.inf
        return packets

    def may_be_nudged(self, now: float) -> bool:
        """Whether what is on the way was sent long enough ago to be sent again, where the peer seems to miss it."""
        if not self.packets or now - self._sent_at < max(self.round_trip.smoothed, 0.001):
            return False
        self._sent_at = now
        return True

    def change_path(self, now: float, size: int, *, is_new_host: bool) -> list[SentPacket]:
        """The peer is elsewhere: begins anew, and gives what was on the way; RFC 9002, section 9.4 of RFC 9000."""
        packets = list(self.packets.values())
        self.packets.clear()
        self.congestion = NewReno(size)
        self.pacer = Pacer(now)
        self.probes = 0
        self._lost_at = math.inf
        if is_new_host:
            self.round_trip.reset()
        return packets


def _number_of(packet: SentPacket) -> int:
    return packet.number
