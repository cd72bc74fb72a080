"""The specification of datagrams: its tables and numbers are the code's, and the vectors are read and written."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from protoframe.core.datagram import association, congestion, gate, inflow, knock, mtu, outflow, packets, recovery, rtt
from protoframe.core.datagram.packets import (
    Accept,
    Ack,
    Challenge,
    Close,
    Data,
    Initial,
    Kind,
    Malformed,
    Once,
    Part,
    Ping,
    Refused,
    Reset,
    Retry,
    Run,
    SegmentKind,
    Token,
    Versions,
    parse_segments,
    read_kind,
    serialize_data,
    serialize_once,
    serialize_run,
)
from protoframe.core.frames import Flag, GoAway, serialize_frame
from protoframe.core.frames import Kind as FrameKind

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "wire-datagrams.md").read_text("utf-8")
#: A sentence may break anywhere.
FLAT = " ".join(TEXT.split())


def vectors() -> list[dict[str, Any]]:
    return json.loads((ROOT / "tests" / "vectors" / "packets.json").read_text("utf-8"))


def rows(heading: str) -> list[list[str]]:
    _, _, rest = TEXT.partition(f"{heading}\n")
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in rest.partition("\n\n")[0].splitlines()[1:]
    ]


def write_frame(meaning: dict[str, Any]) -> bytes:
    flags = sum(Flag[name] for name in meaning["flags"])
    return serialize_frame(FrameKind[meaning["kind"]], flags, meaning["call_id"], bytes.fromhex(meaning["payload"]))


def write_segment(meaning: dict[str, Any]) -> bytes:
    """The segment that says this."""
    match meaning["segment"]:
        case "PADDING":
            return bytes(meaning["octets"])
        case "PING":
            return packets.PING
        case "CLOSE":
            return packets.CLOSE
        case "ACK":
            return Ack(meaning["delay"], [tuple(one) for one in meaning["ranges"]]).serialize()
        case "RUN":
            frames = [write_frame(one) for one in meaning["frames"]]
            return serialize_run(meaning["first"], len(frames), b"".join(frames))
        case "ONCE":
            frames = [write_frame(one) for one in meaning["frames"]]
            return serialize_once(len(frames), b"".join(frames))
        case "PART" | "LAST_PART" as kind:
            octets = bytes.fromhex(meaning["octets"])
            return Part(meaning["channel"], meaning["offset"], octets, kind == "LAST_PART").serialize()
        case "CHALLENGE" | "CHALLENGE_ANSWER" as kind:
            return Challenge(bytes.fromhex(meaning["octets"]), kind == "CHALLENGE_ANSWER").serialize()
        case "TOKEN":
            return Token(bytes.fromhex(meaning["token"])).serialize()
    raise AssertionError(meaning)


def write(meaning: dict[str, Any]) -> bytes:
    """The packet that says this."""
    segments = b"".join(write_segment(one) for one in meaning.get("segments", []))
    match meaning["packet"]:
        case "INITIAL":
            first, last = meaning["versions"]
            return Initial(first, last, meaning["client_id"], bytes.fromhex(meaning["token"])).serialize()
        case "RETRY":
            return Retry(meaning["client_id"], bytes.fromhex(meaning["token"])).serialize()
        case "ACCEPT":
            return Accept(meaning["client_id"], meaning["number"], meaning["server_id"], meaning["version"]).serialize(
                segments
            )
        case "TO_SERVER" | "TO_CLIENT" as kind:
            return serialize_data(Kind[kind], meaning["id"], meaning["number"], segments)
        case "VERSIONS":
            return Versions(meaning["client_id"], *meaning["versions"]).serialize()
        case "REFUSED":
            reason = GoAway(meaning["status"], 0, meaning["text"]).serialize()
            return Refused(meaning["client_id"], reason).serialize()
        case "RESET":
            return Reset(meaning["server_id"], meaning["number"]).serialize()
    raise AssertionError(meaning)


def read_frames(frames: list[Any]) -> list[dict[str, Any]]:
    return [
        {
            "kind": FrameKind(kind).name,
            "flags": [flag.name for flag in Flag if flags & flag],
            "call_id": call_id,
            "payload": payload.hex(),
        }
        for kind, flags, call_id, payload in frames
    ]


def read_segment(segment: Any) -> dict[str, Any]:
    """What a segment says."""
    match segment:
        case Ping():
            return {"segment": "PING"}
        case Close():
            return {"segment": "CLOSE"}
        case Ack(delay, ranges):
            return {"segment": "ACK", "delay": round(delay, 6), "ranges": [list(one) for one in ranges]}
        case Run(first, frames, _):
            return {"segment": "RUN", "first": first, "frames": read_frames(frames)}
        case Once(frames):
            return {"segment": "ONCE", "frames": read_frames(frames)}
        case Part(channel, offset, octets, is_last):
            kind = "LAST_PART" if is_last else "PART"
            return {"segment": kind, "channel": channel, "offset": offset, "octets": octets.hex()}
        case Challenge(octets, is_answer):
            return {"segment": "CHALLENGE_ANSWER" if is_answer else "CHALLENGE", "octets": octets.hex()}
        case Token(token):
            return {"segment": "TOKEN", "token": token.hex()}
    raise AssertionError(segment)


def read(datagram: bytes) -> dict[str, Any]:
    """What a packet says."""
    kind, identifier = read_kind(datagram)
    match Kind(kind):
        case Kind.INITIAL:
            first, last, client_id, token = Initial.parse(datagram)
            return {"packet": "INITIAL", "versions": [first, last], "client_id": client_id, "token": token.hex()}
        case Kind.RETRY:
            return {"packet": "RETRY", "client_id": identifier, "token": Retry.parse(datagram).token.hex()}
        case Kind.ACCEPT:
            accept = Accept.parse(datagram)
            return {
                "packet": "ACCEPT",
                "client_id": accept.client_id,
                "number": accept.number,
                "server_id": accept.server_id,
                "version": accept.version,
                "segments": [read_segment(one) for one in parse_segments(datagram, accept.segments)],
            }
        case Kind.TO_SERVER | Kind.TO_CLIENT:
            data = Data.parse(datagram)
            return {
                "packet": Kind(kind).name,
                "id": data.identifier,
                "number": data.number,
                "segments": [read_segment(one) for one in parse_segments(datagram, data.segments)],
            }
        case Kind.VERSIONS:
            client_id, first, last = Versions.parse(datagram)
            return {"packet": "VERSIONS", "client_id": client_id, "versions": [first, last]}
        case Kind.REFUSED:
            goaway = GoAway.parse(Refused.parse(datagram).reason)
            return {"packet": "REFUSED", "client_id": identifier, "status": goaway.status, "text": goaway.text}
        case Kind.RESET:
            server_id, number = Reset.parse(datagram)
            return {"packet": "RESET", "server_id": server_id, "number": number}


class Vectors(SynchronousTestCase):
    def test_each_is_written_as_it_stands(self):
        for vector in vectors():
            if "meaning" in vector:
                self.assertEqual(write(vector["meaning"]).hex(), vector["hex"], vector["name"])

    def test_each_is_read_as_what_it_means(self):
        for vector in vectors():
            if "meaning" in vector:
                meaning = dict(vector["meaning"])
                # PADDING says nothing.
                if "segments" in meaning:
                    meaning["segments"] = [one for one in meaning["segments"] if one["segment"] != "PADDING"]
                self.assertEqual(read(bytes.fromhex(vector["hex"])), meaning, vector["name"])

    def test_what_is_malformed_is_dropped(self):
        malformed = [vector for vector in vectors() if "malformed" in vector]
        self.assertGreater(len(malformed), 5)
        for vector in malformed:
            with self.assertRaises(Malformed, msg=vector["name"]):
                read(bytes.fromhex(vector["hex"]))

    def test_there_is_one_of_each_kind(self):
        meanings = [vector["meaning"] for vector in vectors() if "meaning" in vector]
        self.assertEqual({meaning["packet"] for meaning in meanings}, {kind.name for kind in Kind})
        segments = {segment["segment"] for meaning in meanings for segment in meaning.get("segments", [])}
        self.assertEqual(segments, {kind.name for kind in SegmentKind})


class Document(SynchronousTestCase):
    def test_packets_and_segments_are_the_codes(self):
        written = {row[1]: int(row[0].strip("`"), 16) for row in rows("| packet | name | sent by | after the kind |")}
        self.assertEqual(written, {kind.name: int(kind) for kind in Kind})
        written = {
            row[1]: int(row[0].strip("`"), 16)
            for row in rows("| segment | name | after the kind (`u8`) | asks for an ACK |")
        }
        self.assertEqual(written, {kind.name: int(kind) for kind in SegmentKind})

    def test_the_numbers_are_the_codes(self):
        self.assertIn(f"over `{packets.MAGIC.hex(' ')}` and all octets", FLAT)
        self.assertIn(f"INITIAL, of at least {packets.BASE_SIZE:,} octets", FLAT)
        self.assertIn(f"a token of 1 to {packets.LONGEST_TOKEN} octets", FLAT)
        self.assertIn(f"and for {gate.COOKIE_LIFETIME:g} s; so only", FLAT)
        self.assertEqual(gate.TOKEN_LIFETIME, 24 * 3600)
        self.assertIn(f"after {rtt.INITIAL_RTT * 1000:g} ms, or three round trips", FLAT)
        self.assertEqual((knock._ROUND_TRIPS, knock._SHORTEST, knock._BACKOFF, knock._LONGEST), (3, 0.02, 1.5, 2))
        self.assertEqual((knock._COPIES, association.AMPLIFICATION), (2, 3))
        self.assertIn(f"There are at most {packets.MOST_RANGES} of them", FLAT)
        self.assertIn(f"({association.MOST_HELD >> 20} MiB, where each piece behind a gap counts {inflow._PIECE}", FLAT)
        self.assertIn(f"each unfinished channel {inflow._CHANNEL})", FLAT)
        self.assertIn(f"after {recovery.MAX_ACK_DELAY * 1000:g} ms at the latest", FLAT)
        self.assertIn(f"{association.ACK_EVERY} packets wait for it (2 among the first {association.EARLY},", FLAT)
        self.assertIn(f"where {association.RIDE_ALONG} packets wait for it", FLAT)
        self.assertIn(f"says: {recovery.REORDERING} packets, or 9/8 of a round trip", FLAT)
        self.assertIn(f"after twice as long, up to {recovery.LONGEST_PROBE:g} s", FLAT)
        self.assertEqual(association._PROBES, 2)
        self.assertIn(
            f"The window is {congestion.INITIAL_PACKETS} packets at first and {congestion.LEAST_PACKETS} at", FLAT
        )
        self.assertEqual((congestion.REDUCTION, recovery.PERSISTENT), (0.5, 3))
        self.assertIn(f"to no more than {congestion.LARGEST_WINDOW >> 20} MiB", FLAT)
        self.assertIn(f"More than {recovery.UNPACED} packets on the way", FLAT)
        self.assertIn(f"at 5/4 of the window a round trip, {congestion.BURST} at a time", FLAT)
        self.assertEqual(congestion.PACE, 1.25)
        sizes = [f"{size:,}" for size in mtu.LADDER[1:]]
        self.assertIn(f"{', '.join(sizes[:-1])} and {sizes[-1]} octets", FLAT)
        self.assertIn(f"When {mtu.WARM_UP} of them were nearly full", FLAT)
        self.assertIn(f"After {mtu.MOST_PROBES} of one size that were lost", FLAT)
        self.assertEqual(mtu.RAISE_AFTER, 600)
        self.assertIn(f"When {mtu.BLACK_HOLE} packets above {packets.BASE_SIZE:,} octets were lost", FLAT)
        self.assertIn(f"or {association._VAIN_PROBES} probes for an answer were in vain", FLAT)
        self.assertIn(f"sends CHALLENGE there, {association._CHALLENGES} times at most", FLAT)
        self.assertEqual((association.SILENCE, association.LONGEST_SILENCE), (1, 15))
        self.assertGreater(outflow._LEAST_PART, 0)
