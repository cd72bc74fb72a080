"""One end of an association: what two ends share once a server has let a client in, and until one of them closes.

Knows packets, when they leave, where to, and what becomes of them; not what the frames in them mean, nor sockets.
Datagrams, frames and the time go in through `handle_datagram`, `send` and `handle_timer`; frames, datagrams and the
next timer come out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress

from protoframe.core.datagram.inflow import Full, Inflow
from protoframe.core.datagram.mtu import PathMTU
from protoframe.core.datagram.outflow import PLAIN, Item, Outflow
from protoframe.core.datagram.packets import (
    ACCEPT_OVERHEAD,
    BASE_SIZE,
    CLOSE,
    DATA_OVERHEAD,
    LONGEST_ACK,
    MOST_FRAMES,
    MOST_RANGES,
    PING,
    RUN_OVERHEAD,
    Accept,
    Ack,
    Challenge,
    Close,
    Data,
    Kind,
    Malformed,
    Once,
    Part,
    Ping,
    Plain,
    Run,
    Token,
    parse_segments,
    serialize_data,
    serialize_plain,
)
from protoframe.core.datagram.ranges import RangeSet
from protoframe.core.datagram.recovery import MAX_ACK_DELAY, UNPACED, Recovery, SentPacket
from protoframe.core.frames import LAST_VERSION, Frame
from protoframe.core.limits import Limits

__all__ = ["Address", "Association", "Path"]

#: Where a peer is: its address as a text, and its port.
Address = tuple[str, int]

#: Octets of the largest datagram; RFC 768.
LARGEST_DATAGRAM = 65_507
#: Octets that may be held because something before them is missing.
MOST_HELD = 4 * 1024 * 1024
#: Packets that may be acknowledged together, once a few have been; the peer asks where it is in a hurry.
ACK_EVERY = 40
EARLY = 64
#: Packets that wait to be acknowledged for which an ACK rides along with what is sent anyway.
RIDE_ALONG = 32
#: Ranges of packets that have come of which account is kept.
_RANGES_KEPT = 2 * MOST_RANGES
#: What is sent to an address that has not shown that it wants it, for each octet that came from there; RFC 9000,
#: section 8.1.
AMPLIFICATION = 3
#: Packets that are sent where it is asked whether anything comes.
_PROBES = 2
#: What stands around the frames of a packet that has nothing else.
_PLAIN_OVERHEAD = DATA_OVERHEAD + RUN_OVERHEAD
#: Probes in vain after which it may be for the size of packets that nothing comes.
_VAIN_PROBES = 3
#: Seconds of silence after which a client that waits for something asks whether it is still found, and each time
#: longer, where nothing but an answer to that comes.
SILENCE, LONGEST_SILENCE = 1.0, 15.0
#: How often a new address is asked to show itself.
_CHALLENGES = 6


class Path:
    """An address of the peer.

    :param is_proven: whether it was seen to receive what is sent to it.
    """

    __slots__ = ("address", "challenge", "due", "is_proven", "received", "sent", "tries")

    def __init__(self, address: Address, *, is_proven: bool) -> None:
        self.address = address
        self.is_proven = is_proven
        self.received = 0
        self.sent = 0
        self.challenge = b""
        self.due = math.inf
        self.tries = 0

    def takes(self, size: int) -> bool:
        """Whether so many octets may be sent there."""
        return self.is_proven or self.sent + size <= AMPLIFICATION * self.received


class Association:
    """One end of an association.

    :param is_server: which end.
    :param own_id: what packets to this end name.
    :param peer_id: what packets to the peer name.
    :param path: where the peer is.
    :param limits: what this end takes.
    :param now: the time.
    :param random: gives random octets.
    :param confirm: told the length of a large message when all of it has come.
    :param awaits: of a client, whether it waits for something from the server, which may not know where it is now.
    :ivar own_id: see above.
    :ivar path: where the peer is.
    :ivar parity: that of the ids of this end's calls.
    :ivar outflow: what is to be sent, and what is on the way.
    :ivar recovery: which packets are.
    :ivar is_closed: whether either end has closed it.
    :ivar token: what the peer, a server, gave to be shown at the next connection.
    """

    # More attributes than the dictionaries of instances share the names of.
    __slots__ = (
        "_ack_at",
        "_acks",
        "_answers",
        "_asks",
        "_awaits",
        "_candidate",
        "_fits",
        "_inflow",
        "_is_closing",
        "_is_introduced",
        "_is_lossy",
        "_is_server",
        "_kind",
        "_newest_at",
        "_peer_id",
        "_plain_room",
        "_probes",
        "_random",
        "_received",
        "_send_at",
        "_sends_plain",
        "_silent",
        "_silent_due",
        "_takes_plain",
        "_unacknowledged",
        "is_closed",
        "mtu",
        "outflow",
        "own_id",
        "parity",
        "path",
        "recovery",
        "token",
    )

    def __init__(
        self,
        *,
        is_server: bool,
        own_id: int,
        peer_id: int,
        path: Path,
        limits: Limits,
        now: float,
        random: Callable[[int], bytes],
        confirm: Callable[[int], None],
        awaits: Callable[[], bool] | None = None,
    ) -> None:
        self.own_id = own_id
        self.path = path
        self.is_closed = False
        self.token = b""
        self.mtu = PathMTU()
        self.outflow = Outflow(confirm)
        self.recovery = Recovery(now, self.mtu.size)
        self._inflow = Inflow(limits.max_frame, MOST_HELD)
        self._is_server = is_server
        self.parity = 0 if is_server else 1
        self._peer_id = peer_id
        self._random = random
        self._kind = Kind.TO_CLIENT if is_server else Kind.TO_SERVER
        # A server names itself until the client has used the name.
        self._is_introduced = not is_server
        self._candidate: Path | None = None
        self._answers: list[bytes] = []
        self._received = RangeSet()
        self._newest_at = now
        self._unacknowledged = 0
        self._ack_at = math.inf
        # Whether the network loses packets, as far as can be seen just now: then each packet has an ACK.
        self._is_lossy = False
        # ACKs that came, and when: what they say is taken in by `poll`, which has something more urgent first.
        self._acks: list[tuple[Ack, float]] = []
        # Whether the peer is to be asked for an ACK; and how many packets may leave whatever the window says.
        self._asks = is_server
        self._probes = 0
        self._is_closing = False
        self._awaits = awaits
        # When a client asks whether the server still finds it, and how often it has in vain.
        self._silent_due = math.inf
        self._silent = 0
        self._send_at = -math.inf
        # Whether nothing is out of the ordinary, so that packets may come and leave by the short ways.
        self._takes_plain = False
        self._sends_plain = False
        self._plain_room = 0
        # No frame in a packet is longer than it may be.
        self._fits = limits.max_frame >= LARGEST_DATAGRAM

    # What goes in from above.

    def send(self, frames: list[bytes]) -> None:
        """Lines frames up; `poll` is to follow."""
        self._sends_plain = False
        self.outflow.put(frames, self._room())

    def send_plain(self, frames: list[bytes]) -> bytes | None:
        """The datagram, for the address of `path`, that frames fit, where nothing keeps it from leaving at once.

        `sent_plain` is to follow.  Where there is anything out of the ordinary it is ``None``; then `send` and `poll`
        do the same.
        """
        if not self._sends_plain:
            return None
        count = len(frames)
        if count == 1:
            octets = frames[0]
            if octets[2:4] not in PLAIN:
                return None
        else:
            for frame in frames:
                if frame[2:4] not in PLAIN:
                    return None
            octets = b"".join(frames)
        if len(octets) > self._plain_room or count > MOST_FRAMES:
            return None
        outflow, recovery = self.outflow, self.recovery
        first = outflow.channel
        outflow.channel = first + count
        number = recovery.next_number
        recovery.next_number = number + 1
        return serialize_plain(self._kind, self._peer_id, number, first, count, octets)

    def sent_plain(self, datagram: bytes, now: float) -> None:
        """What `send_plain` gave has left: takes account of it, which the peer need not wait for."""
        recovery = self.recovery
        size = len(datagram)
        item = self.outflow.sent_plain(datagram[DATA_OVERHEAD:])
        recovery.sent(SentPacket(recovery.next_number - 1, now, size, [item], -1))
        if not self._has_room():
            self._sends_plain = False
        if self._silent_due == math.inf and self._awaits is not None:
            self._silent_due = now + SILENCE
        if size > self.mtu.nearly:
            self.mtu.filled()

    def _has_room(self) -> bool:
        """Whether a packet may leave at once, and need not ask for an ACK."""
        congestion = self.recovery.congestion
        in_flight, size = congestion.in_flight, self.mtu.size
        return in_flight + 2 * size <= congestion.window and in_flight < UNPACED * size

    def _find_short_ways(self) -> None:
        """Finds out whether anything is out of the ordinary."""
        self._takes_plain = self._is_introduced and self._fits and self._inflow.is_idle and not self.recovery.probes
        self._plain_room = self.mtu.size - _PLAIN_OVERHEAD
        self._sends_plain = (
            self._takes_plain
            and self._unacknowledged < RIDE_ALONG
            and self.path.is_proven
            and self.outflow.is_idle
            and self._has_room()
            and not (self._is_lossy or self._asks or self._answers)
        )

    def _leave_short_ways(self) -> None:
        self._takes_plain = self._sends_plain = False

    def close(self) -> None:
        """Closes, once all that was sent has come."""
        self._leave_short_ways()
        if not self._is_closing:
            self._is_closing = True
            self._asks = not self.outflow.is_settled

    def lose(self) -> None:
        """Closes, without a word to the peer, which is gone."""
        self.is_closed = True
        self._leave_short_ways()

    def abort(self) -> list[tuple[bytes, Address]]:
        """Closes at once; what is to be sent."""
        if self.is_closed:
            return []
        self.is_closed = True
        self._leave_short_ways()
        return self._sendable(self._seal(CLOSE))

    # What goes in from below.

    def handle_plain(self, plain: Plain, address: Address, now: float) -> bool:
        """Takes a packet that has nothing but a run of frames, where it comes in order; whether it does.

        Otherwise it is for `handle_datagram`, which would do the same with this one.  When the frames are dealt with,
        `handled_plain` is to follow.
        """
        _, number, first, frames = plain
        received, done = self._received, self._inflow.done
        if number != received.end or first != done.end or address != self.path.address or not self._takes_plain:
            return False
        received.end = number + 1
        done.end = first + len(frames)
        self._newest_at = now
        return True

    def handled_plain(self, plain: Plain, datagram: bytes, now: float) -> None:
        """Takes account of what `handle_plain` took, which the answer need not wait for."""
        _, number, first, frames = plain
        self._inflow.remember(first, len(frames), datagram[_PLAIN_OVERHEAD:])
        self._silent = 0
        self._unacknowledged += 1
        if self._unacknowledged >= RIDE_ALONG:
            self._sends_plain = False
        self._acknowledge(number, now)

    def _acknowledge(self, number: int, now: float) -> None:
        """A packet is to be acknowledged, if not at once."""
        if self._unacknowledged >= (ACK_EVERY if number > EARLY else 2):
            self._ack_at = now
        elif self._ack_at == math.inf:
            self._ack_at = now + MAX_ACK_DELAY

    def handle_datagram(self, datagram: bytes, packet: Data | Accept, address: Address, now: float) -> list[Frame]:
        """Takes a packet that names this end; the frames that it completes.  `poll` is to follow.

        :raises Malformed: it does not keep to the layout; it is as if it had not come.
        :raises RemoteProtocolError: the peer breaks a rule.
        """
        number = packet.number
        received = self._received
        is_next = number == received.end
        self._leave_short_ways()
        if self.is_closed:
            return []
        if not is_next and number in received:
            self._repeat(now)
            return []
        segments = parse_segments(datagram, packet.segments)
        if address == self.path.address:
            self.path.received += len(datagram)
        elif self._is_server:
            self._handle_move(address, len(datagram), is_newest=number >= received.end)
        else:
            return []
        if self._is_server and not self._is_introduced:
            # Nobody can guess the id that the packet names: who sends it has got what was sent to that address.
            self._is_introduced = True
            if address == self.path.address:
                self.path.is_proven = True
        elicits = asks = False
        frames: list[Frame] = []
        inflow = self._inflow
        try:
            for segment in segments:
                of = type(segment)
                if of is Ack:
                    self._acks.append((segment, now))  # type: ignore[arg-type]
                elif of is Run:
                    news = inflow.take_run(segment)  # type: ignore[arg-type]
                    frames = frames + news if frames else news
                    elicits = True
                elif of is Part:
                    frames += inflow.take_part(segment)  # type: ignore[arg-type]
                    elicits = True
                elif isinstance(segment, Once):
                    elicits = True
                    frames += inflow.take_once(segment)
                elif isinstance(segment, Ping):
                    elicits = asks = True
                elif isinstance(segment, Challenge):
                    self._handle_challenge(segment, address, now)
                elif isinstance(segment, Token):
                    elicits = True
                    if not self._is_server:
                        self.token = segment.token
                elif isinstance(segment, Close):
                    self.is_closed = True
        except Full:
            return frames
        if number >= received.end:
            self._newest_at = now
        received.add(number, number + 1)
        received.keep(_RANGES_KEPT)
        self._is_lossy = len(received) > 1
        if self.recovery.probes > 1:
            # The peer is there after all: what it was asked in vain it is asked now.
            self._repeat(now)
        if frames:
            self._silent = 0
        if elicits:
            self._unacknowledged += 1
            if asks or not is_next:
                self._ack_at = now
            else:
                self._acknowledge(number, now)
        if inflow.has_repeated:
            inflow.has_repeated = False
            self._repeat(now)
        if not self.is_closed:
            self._find_short_ways()
        return frames

    def _handle_acks(self) -> None:
        acks, self._acks = self._acks, []
        for ack, now in acks:
            # Of what was never sent an ACK says nothing.
            with suppress(Malformed):
                self._handle_ack(ack, now)

    def _handle_ack(self, ack: Ack, now: float) -> None:
        recovery = self.recovery
        came, lost = recovery.handle_ack(ack, now)
        for packet in came:
            if packet.is_probe:
                self.mtu.probe_came(packet.size)
                recovery.congestion.size = self.mtu.size
            else:
                self.mtu.came(packet.size)
            if packet.items:
                self.outflow.come(packet.items)
            if packet.acknowledges >= 0:
                # The peer knows that these have come: it need not be told any more.
                self._received.drop_below(packet.acknowledges)
        self._handle_lost(lost, now)

    def _handle_lost(self, lost: list[SentPacket], now: float) -> None:
        for packet in lost:
            if packet.is_probe:
                self.mtu.probe_lost(packet.size, now)
            else:
                self.mtu.vanished(packet.size, now)
                self.outflow.send_again(packet.items)
        if lost:
            self.recovery.congestion.size = self.mtu.size

    def _repeat(self, now: float) -> None:
        """Something came again: what the peer lacks may be the answer, so that is sent again, before its time."""
        self._handle_acks()
        if self.recovery.may_be_nudged(now):
            self._send_oldest_again()

    def nudge(self, now: float) -> None:
        """The client asks to be let in again: it has not heard that it is.  `poll` is to follow."""
        self._leave_short_ways()
        self._repeat(now)

    def _send_oldest_again(self) -> None:
        """Has what is on the way sent again, the oldest first, as far as two packets have room for it.

        They leave whatever the window says (RFC 9002, section 7.5), and where there is too little for two, each has it
        all: that one of them gets through, and an answer to it, is what everything else waits for.
        """
        room = 2 * self._room()
        for packet in self.recovery.packets.values():
            self.outflow.send_again(packet.items)
            room -= packet.size
            if room <= 0:
                break
        self._probes = _PROBES
        self._asks = True

    def _handle_silence(self, now: float) -> None:
        """Nothing came for a while: a client that waits asks whether it is still found where it is."""
        wait = min(SILENCE * 2.0**self._silent, LONGEST_SILENCE)
        if self._newest_at + wait > now:
            self._silent_due = self._newest_at + wait
        elif self._awaits is None or not self._awaits():
            self._silent_due = math.inf
        else:
            self._asks = True
            self._silent += 1
            self._silent_due = now + min(SILENCE * 2.0**self._silent, LONGEST_SILENCE)

    # Where the peer is.

    def _handle_move(self, address: Address, size: int, *, is_newest: bool) -> None:
        """Something came from another address: it is asked to show that it is the peer's; RFC 9000, section 9."""
        candidate = self._candidate
        if candidate is None or candidate.address != address:
            if not is_newest:
                # Late, or a replay.
                return
            candidate = self._candidate = Path(address, is_proven=False)
            candidate.challenge = self._random(8)
            candidate.due = -math.inf
        candidate.received += size
        if candidate.due == math.inf:
            # Now there may be enough for a challenge again.
            candidate.due = -math.inf

    def _handle_challenge(self, challenge: Challenge, address: Address, now: float) -> None:
        if not challenge.is_answer:
            self._answers = [*self._answers[-3:], Challenge(challenge.octets, True).serialize()]
            return
        candidate = self._candidate
        if candidate is None or candidate.address != address or candidate.challenge != challenge.octets:
            return
        is_new_host = address[0] != self.path.address[0]
        candidate.is_proven = True
        self._handle_acks()
        self.path, self._candidate = candidate, None
        self.mtu = PathMTU()
        for packet in self.recovery.change_path(now, self.mtu.size, is_new_host=is_new_host):
            self.outflow.send_again(packet.items)
        self._asks = True

    # What comes out.

    def wants_poll(self, now: float) -> bool:
        """Whether `poll` has something to do."""
        outflow = self.outflow
        return bool(
            self._acks
            or outflow.has_more()
            or self._ack_at <= now
            or self._asks
            or self._answers
            or self._is_closing
            or self.is_closed
            or self._candidate is not None
        )

    def poll(self, now: float) -> list[tuple[bytes, Address]]:
        """The datagrams to send now, and where to."""
        out: list[tuple[bytes, Address]] = []
        self._leave_short_ways()
        if self.is_closed:
            return out
        if self._candidate is not None:
            self._poll_candidate(self._candidate, now, out)
        recovery, outflow, path = self.recovery, self.outflow, self.path
        if self._acks:
            congestion = recovery.congestion
            if (
                len(self._acks) > 1
                or not outflow.has_more()
                or congestion.in_flight + 2 * self.mtu.size > congestion.window
            ):
                self._handle_acks()
        self._send_at = -math.inf
        if path.is_proven and self._is_introduced and (probe := self.mtu.probe(now)):
            # Before everything else: afterwards there may never be room for it.
            if recovery.may_send(probe):
                out.append((self._build_probe(probe, now), path.address))
            else:
                self.mtu.probing = 0
        size = self.mtu.size
        while True:
            has_data = outflow.has_more() or self._asks
            if not (has_data or self._answers or self._ack_at <= now) or not (path.is_proven or path.takes(size)):
                break
            is_free = self._probes > 0
            if has_data and not is_free:
                may = recovery.may_send(size)
                if may:
                    at = recovery.send_at(now)
                    if at > now:
                        self._send_at = at
                        may = False
                if not may and not (self._answers or self._ack_at <= now):
                    break
                is_free = may
            datagram = self._build(now, with_data=is_free)
            if datagram is None:
                break
            path.sent += len(datagram)
            out.append((datagram, path.address))
        self._probes = 0
        if self._is_closing and outflow.is_settled:
            self.is_closed = True
            out += self._sendable(self._seal(self._take_ack(now) + CLOSE))
        else:
            self._find_short_ways()
        return out

    def _build(self, now: float, *, with_data: bool) -> bytes | None:
        """A packet of what is most urgent; ``None`` where nothing is."""
        room = self._room()
        segments: list[bytes] = []
        items: list[Item] = []
        acknowledges = -1
        outflow = self.outflow
        if self._unacknowledged >= RIDE_ALONG or self._ack_at <= now or self._is_lossy or self._asks:
            lost = outflow.lost
            if not with_data or not lost or len(lost[0].octets) + LONGEST_ACK <= room:
                acknowledges = self._received.end - 1
                segments.append(self._take_ack(now))
                room -= len(segments[0])
        if self._answers:
            segments += self._answers
            room -= sum(map(len, self._answers))
            self._answers = []
        elicits = False
        if with_data:
            # What may be the last for now says so, and is answered at once.
            recovery = self.recovery
            asks = self._asks or recovery.congestion.in_flight + 2 * self.mtu.size > recovery.congestion.window
            filled, items = outflow.fill(room - 1, is_empty=not segments)
            if filled:
                segments += filled
                elicits = True
            if outflow.asks:
                outflow.asks = False
                self._asks = True
            if self._asks or (filled and asks):
                self._asks = False
                segments.append(PING)
                elicits = True
        if not segments:
            return None
        recovery = self.recovery
        number = recovery.next_number
        datagram = self._seal(b"".join(segments) if len(segments) > 1 else segments[0])
        if elicits:
            size = len(datagram)
            recovery.sent(SentPacket(number, now, size, items, acknowledges))
            if self._silent_due == math.inf and self._awaits is not None and items:
                self._silent_due = now + SILENCE
            if self._probes:
                self._probes -= 1
                if self._probes and not outflow.has_more():
                    outflow.send_again(items)
                    self._asks = True
            if size > self.mtu.nearly:
                self.mtu.filled()
        return datagram

    def _build_probe(self, size: int, now: float) -> bytes:
        """A packet of a size that is not known to get through."""
        number = self.recovery.next_number
        datagram = self._seal(PING.ljust(size - self._overhead(), b"\0"))
        self.recovery.sent(SentPacket(number, now, size, [], -1, is_probe=True))
        return datagram

    def _poll_candidate(self, candidate: Path, now: float, out: list[tuple[bytes, Address]]) -> None:
        if now < candidate.due:
            return
        if candidate.tries == _CHALLENGES:
            self._candidate = None
            return
        datagram = self._seal(Challenge(candidate.challenge, False).serialize())
        if not candidate.takes(len(datagram)):
            candidate.due = math.inf
            return
        candidate.sent += len(datagram)
        candidate.tries += 1
        candidate.due = now + self.recovery.round_trip.probe_after() * candidate.tries
        out.append((datagram, candidate.address))

    def _take_ack(self, now: float) -> bytes:
        """The ACK that is due, or nothing."""
        ranges = self._received.newest_first(MOST_RANGES + 1)
        self._unacknowledged = 0
        self._ack_at = math.inf
        return Ack(now - self._newest_at, ranges).serialize() if ranges else b""

    def _overhead(self) -> int:
        return DATA_OVERHEAD if self._is_introduced else ACCEPT_OVERHEAD

    def _room(self) -> int:
        return self.mtu.size - self._overhead()

    def _seal(self, segments: bytes) -> bytes:
        """The next packet."""
        recovery = self.recovery
        number = recovery.next_number
        recovery.next_number = number + 1
        if self._is_introduced:
            return serialize_data(self._kind, self._peer_id, number, segments)
        return Accept(self._peer_id, number, self.own_id, LAST_VERSION).serialize(segments)

    def _sendable(self, datagram: bytes) -> list[tuple[bytes, Address]]:
        if not self.path.takes(len(datagram)):
            return []
        return [(datagram, self.path.address)]

    def handle_too_large(self, size: int, now: float) -> None:
        """The machine itself did not take a datagram of this size."""
        self._leave_short_ways()
        self.mtu.too_large(size, now)
        self.recovery.congestion.size = self.mtu.size

    # Timers.

    def next_timer(self) -> float:
        """When `handle_timer` wants to be called; infinity for never."""
        if self.is_closed:
            return math.inf
        due = min(self._ack_at, self.recovery.next_timer(), self._silent_due)
        if self._send_at > -math.inf:
            due = min(due, self._send_at)
        if self._candidate is not None:
            due = min(due, self._candidate.due)
        return due

    def handle_timer(self, now: float) -> None:
        """Does what is due by now; `poll` is to follow."""
        self._leave_short_ways()
        if self.is_closed:
            return
        self._handle_acks()
        if now >= self._silent_due:
            self._handle_silence(now)
        lost, is_time_to_ask = self.recovery.handle_timer(now)
        self._handle_lost(lost, now)
        if is_time_to_ask and not self.outflow.unacknowledged:
            # What is out only asked; nobody waits for the answer any more.
            for packet in self.recovery.forget():
                if packet.is_probe:
                    self.mtu.probe_lost(packet.size, now)
        elif is_time_to_ask:
            if self.recovery.probes >= _VAIN_PROBES and self.mtu.size > BASE_SIZE:
                # It may be that large packets vanish.
                self.mtu.fall_back(now)
                self.recovery.congestion.size = self.mtu.size
            self._send_oldest_again()
