"""Frames and the preface: octets against what they mean, both ways, from the vectors that the specification names."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from protoframe import errors
from protoframe.core import frames
from protoframe.core.conversation import Conversation
from protoframe.core.events import Ended, ItemsReceived, Opened, RequestReceived, ResponseReceived
from protoframe.core.frames import (
    HEADER,
    LONGEST_HELLO,
    ErrorBody,
    Flag,
    GoAway,
    Hello,
    Kind,
    agree_on_version,
    parse_preface,
    serialize_frame,
    serialize_preface,
    serialize_request,
)
from protoframe.core.limits import Limits
from protoframe.core.messages import Outbox
from protoframe.core.state import Role, State
from protoframe.core.stream import FrameReader
from protoframe.errors import RemoteProtocolError, VersionMismatch
from tests.core.pairs import (
    CHUNK,
    ITEMS,
    MORE,
    ONEWAY,
    RESPONSE,
    STREAM,
    End,
    Pair,
    cut,
    frame,
    opened,
    serialize_message,
)

VECTORS = pathlib.Path(__file__).parent.parent / "vectors"


def vectors(name: str) -> list[dict[str, Any]]:
    """The entries of one file of vectors."""
    return json.loads((VECTORS / name).read_text("utf-8"))


def encoder(meaning: dict[str, Any]) -> Any:
    return (msgspec.json if "JSON" in meaning["flags"] else msgspec.msgpack).encode


def decoder(meaning: dict[str, Any]) -> Any:
    return (msgspec.json if "JSON" in meaning["flags"] else msgspec.msgpack).decode


def write(meaning: dict[str, Any]) -> bytes:
    """The frame that says this."""
    kind = Kind[meaning["kind"]]
    flags = sum(Flag[name] for name in meaning["flags"])
    call_id = meaning["call_id"]
    encode = encoder(meaning)
    if kind is Kind.REQUEST:
        milliseconds = meaning["remaining_ms"]
        remaining = math.inf if milliseconds is None else milliseconds / 1000
        metadata = msgspec.msgpack.encode(meaning["metadata"]) if meaning["metadata"] else b""
        arguments = encode(meaning["arguments"])
        if "key" in meaning:
            arguments = frames.serialize_key(frames.Key(**meaning["key"])) + arguments
        payload = serialize_request(remaining, meaning["method"].encode(), metadata, arguments)
    elif kind is Kind.HELLO:
        settings = meaning["settings"]
        payload = Hello(**settings | {"session": bytes.fromhex(settings.get("session", ""))}).serialize()
    elif kind is Kind.RESPONSE:
        payload = encode(meaning["result"])
    elif kind is Kind.ERROR:
        detail = encode(meaning["detail"]) if meaning["detail"] else b""
        payload = ErrorBody(meaning["status"], meaning["name"], meaning["text"], detail).serialize()
    elif kind is Kind.GOAWAY:
        payload = GoAway(meaning["status"], meaning["last_call_id"], meaning["text"]).serialize()
    elif kind is Kind.ITEM:
        payload = frames.COUNT.pack(meaning["count"]) + encode(meaning["items"])
    elif kind is Kind.CREDIT:
        payload = frames.serialize_credit(meaning["octets"])
    else:
        payload = bytes.fromhex(meaning.get("payload", ""))
    return serialize_frame(kind, flags, call_id, payload)


def read(kind: int, flags: int, call_id: int, payload: bytes) -> dict[str, Any]:
    """What a frame says."""
    meaning: dict[str, Any] = {
        "kind": Kind(kind).name,
        "flags": [flag.name for flag in Flag if flags & flag],
        "call_id": call_id,
    }
    decode = decoder(meaning)
    if kind == Kind.HELLO:
        meaning["settings"] = {
            name: value.hex() if isinstance(value, bytes) else value
            for name, value in msgspec.structs.asdict(Hello.parse(payload)).items()
            if name not in ("session", "next_key") or value
        }
    elif kind == Kind.REQUEST:
        remaining, method, metadata, arguments = frames.parse_request(payload)
        meaning["remaining_ms"] = None if remaining == math.inf else round(remaining * 1000)
        if flags & Flag.KEYED:
            key, arguments = frames.split_key(arguments)
            meaning["key"] = key._asdict()
        meaning |= {"method": method.decode(), "arguments": decode(arguments)}
        meaning["metadata"] = msgspec.msgpack.decode(metadata) if metadata else {}
    elif kind == Kind.RESPONSE:
        meaning["result"] = decode(payload)
    elif kind == Kind.ERROR:
        body = ErrorBody.parse(payload)
        detail = decode(body.detail) if body.detail else {}
        meaning |= {"status": body.status, "name": body.name, "text": body.text, "detail": detail}
    elif kind == Kind.GOAWAY:
        meaning |= GoAway.parse(payload)._asdict()
    elif kind == Kind.ITEM:
        meaning |= {"count": frames.parse_count(payload), "items": decode(payload[2:])}
    elif kind == Kind.CREDIT:
        meaning["octets"] = frames.parse_credit(payload)
    elif kind not in (Kind.CANCEL, Kind.END, Kind.STOP):
        meaning["payload"] = payload.hex()
    return meaning


class Vectors(SynchronousTestCase):
    def test_a_frame_is_read_as_its_vector_says(self):
        for vector in vectors("frames.json"):
            reader = FrameReader(65536, 30.0)
            ((kind, flags, call_id, payload),) = reader.feed(serialize_preface() + bytes.fromhex(vector["hex"]), 0.0)
            self.assertEqual(read(kind, flags, call_id, payload), vector["meaning"], vector["name"])

    def test_a_frame_is_written_as_its_vector_says(self):
        for vector in vectors("frames.json"):
            self.assertEqual(write(vector["meaning"]).hex(), vector["hex"], vector["name"])

    def test_every_kind_and_every_flag_has_a_vector(self):
        meanings = [vector["meaning"] for vector in vectors("frames.json")]
        self.assertEqual({meaning["kind"] for meaning in meanings} | {"CHUNK"}, {kind.name for kind in Kind})
        self.assertEqual(
            {flag for meaning in meanings for flag in meaning["flags"]} | {"MORE"}, {flag.name for flag in Flag}
        )

    def test_a_preface_is_taken_or_refused_as_its_vector_says(self):
        for vector in vectors("prefaces.json"):
            octets = bytes.fromhex(vector["hex"])
            meaning = vector.get("meaning")
            if meaning is None:
                error = self.assertRaises(getattr(errors, vector["error"]), FrameReader(65536, 30.0).feed, octets, 0.0)
                self.assertIn(vector["text"], error.message, vector["name"])
            else:
                first, last = parse_preface(octets)
                self.assertEqual((first, last), (meaning["first"], meaning["last"]))
                self.assertEqual(agree_on_version(first, last), meaning["version"])

    def test_a_preface_is_written_as_its_vector_says(self):
        by_name = {vector["name"]: vector["hex"] for vector in vectors("prefaces.json")}
        self.assertEqual(serialize_preface().hex(), by_name["version 1 alone"])
        self.assertEqual(serialize_preface(1, 3).hex(), by_name["versions 1 to 3"])

    def test_what_is_malformed_ends_the_conversation_with_a_goaway_that_says_why(self):
        for vector in vectors("malformed.json"):
            if vector["after"] == "HELLO":
                end = opened()
            else:
                end = End(Role.ACCEPTOR, Limits(), 1000.0)
                end.receive(serialize_preface())
                end.send()
                end.link.clear()
            end.receive(bytes.fromhex(vector["hex"]))
            self.assertEqual(len(end.of(Ended)), 1, vector["name"])
            error = end.ended.error
            self.assertIsInstance(error, RemoteProtocolError, vector["name"])
            self.assertTrue(error.message.startswith(vector["text"]), f"{vector['name']}: {error.message}")
            end.send()
            *_, (kind, _, _, payload) = cut(bytes(end.link))
            self.assertEqual((kind, GoAway.parse(payload)[::2]), (Kind.GOAWAY, (13, error.message)), vector["name"])

    def test_the_worked_example_is_what_two_ends_say(self):
        # Each step is what its sender's conversation writes, given what came before it.
        acceptor = Limits(
            max_frame=2048,
            max_message=4096,
            max_unfinished=8192,
            max_calls=2,
            stream_credit=1024,
            connection_credit=4096,
        )
        pair = Pair(Limits(), acceptor, opened=False)
        for end, agent in ((pair.initiator, "client"), (pair.acceptor, "server")):
            end.conversation = Conversation(
                Role.INITIATOR if agent == "client" else Role.ACCEPTOR, end.limits, 1000.0, agent
            )
        encode = msgspec.msgpack.encode
        calls = iter(
            [
                (b"Speech.upper", {"text": "hello"}, 1002.0, 0),
                (b"Speech.upper", {"text": ""}, 1002.0, 0),
                (b"Words.count", {}, math.inf, ITEMS),
                (b"Words.of", {"text": "a b"}, math.inf, STREAM),
                (b"Log.note", {}, math.inf, ONEWAY),
            ]
        )
        answers = iter([(1, encode("HELLO")), (5, encode(16))])

        def request(end):
            method, arguments, deadline, flags = next(calls)
            end.conversation.request(method, encode(arguments), "token", deadline, 1000.0, flags=flags)

        def send_items(end):
            ours = end is pair.initiator
            end.conversation.send_items(*((5, 16, encode(["a"] * 16)) if ours else (7, 2, encode(["a", "b"]))))

        acts = {
            "REQUEST": request,
            "RESPONSE": lambda end: end.conversation.respond(*next(answers)),
            "CANCEL": lambda end: end.conversation.cancel(3),
            "ERROR": lambda end: end.conversation.refuse(3, ErrorBody(1, "Cancelled", "")),
            "ITEM": send_items,
            "CREDIT": lambda end: end.conversation.give_back(5, end.of(ItemsReceived)[-1].cost),
            "END": lambda end: end.conversation.end_items(5 if end is pair.initiator else 7),
            "GOAWAY": lambda end: end.conversation.go_away(),
        }
        for step in vectors("conversation.json"):
            end = getattr(pair, step["sender"])
            acts.get(step["what"].partition(":")[0].partition(" ")[0], lambda end: None)(end)
            end.send()
            octets = bytes.fromhex(step["hex"])
            self.assertEqual(bytes(end.link[: len(octets)]).hex(), step["hex"], step["what"])
            pair.deliver(end, len(octets))
        self.assertEqual(
            [event.message for event in pair.initiator.of(ResponseReceived)], [encode("HELLO"), encode(16)]
        )
        self.assertEqual(pair.initiator.of(ItemsReceived)[0].message[2:], encode(["a", "b"]))
        self.assertEqual(pair.acceptor.of(RequestReceived)[-1].method, b"Log.note")
        self.assertEqual([end.conversation.state for end in pair.ends], [State.LEFT, State.LEAVING])
        self.assertEqual([bytes(end.link) for end in pair.ends], [b"", b""])


class Prefaces(SynchronousTestCase):
    def test_the_latest_version_that_both_speak_is_taken(self):
        self.patch(frames, "FIRST_VERSION", 2)
        self.patch(frames, "LAST_VERSION", 5)
        self.assertEqual(
            [agree_on_version(*peer) for peer in ((1, 2), (1, 4), (3, 9), (5, 5), (2, 255))], [2, 4, 5, 5, 5]
        )
        for peer in ((1, 1), (6, 9)):
            self.assertRaises(VersionMismatch, agree_on_version, *peer)

    @given(st.integers(0, 255), st.integers(0, 255))
    def test_any_two_octets_are_a_range_or_refused(self, first, last):
        octets = serialize_preface(first, last)
        if 0 < first <= last:
            self.assertEqual(parse_preface(octets), (first, last))
        else:
            self.assertRaises(RemoteProtocolError, parse_preface, octets)


class Messages(SynchronousTestCase):
    @given(st.binary(max_size=9000), st.sampled_from([2048, 2049, 4096, 65536]), st.integers(0, 7))
    def test_a_message_is_cut_so_that_every_frame_fits_and_the_whole_is_there(self, message, max_frame, flags):
        flags &= ~MORE
        made = serialize_message(RESPONSE, flags, 9, message, max_frame)
        self.assertTrue(all(len(octets) <= max_frame for octets in made))
        (kind, first_flags, call_id, payload), *rest = cut(b"".join(made))
        self.assertEqual((kind, call_id), (RESPONSE, 9))
        self.assertEqual(first_flags, flags | (MORE if rest else 0))
        if rest:
            total, payload = frames.parse_total(payload)
            self.assertEqual(total, len(message))
            self.assertEqual(
                [(kind, more) for kind, more, *_ in rest], [(CHUNK, MORE)] * (len(rest) - 1) + [(CHUNK, 0)]
            )
        self.assertEqual(payload + b"".join(part for *_, part in rest), message)

    def test_the_longest_message_that_is_one_frame_is_one_frame(self):
        self.assertEqual(len(serialize_message(RESPONSE, 0, 1, b"a" * (2048 - 12), 2048)), 1)
        self.assertEqual(len(serialize_message(RESPONSE, 0, 1, b"a" * (2048 - 11), 2048)), 2)

    def test_the_largest_frame_can_be_written_and_read(self):
        (octets,) = serialize_message(RESPONSE, 0, 1, b"a" * (65536 - 12), 65536)
        self.assertEqual(len(octets), 65536)
        ((*_, payload),) = FrameReader(65536, 30.0).feed(serialize_preface() + octets, 0.0)
        self.assertEqual(len(payload), 65524)

    @given(
        st.integers(0, 0xFFFFFFFE),
        st.binary(min_size=1, max_size=255),
        st.binary(max_size=0xFFFF),
        st.binary(max_size=5000),
    )
    def test_a_request_is_read_as_it_was_written(self, milliseconds, method, metadata, arguments):
        message = serialize_request(milliseconds / 1000 + 0.0001, method, metadata, arguments)
        remaining, *what = frames.parse_request(message)
        self.assertEqual(what, [method, metadata, arguments])
        self.assertAlmostEqual(remaining, milliseconds / 1000, delta=0.0005)

    def test_the_time_that_is_left_is_never_told_longer_than_it_is(self):
        for seconds, told in (
            (0.0019, 0.001),
            (-5.0, 0.0),
            (0.0, 0.0),
            (4294967.2941, 4294967.294),
            (4294967.295, 4294967.294),
            (5e6, 4294967.294),
            (math.inf, math.inf),
        ):
            self.assertEqual(frames.parse_request(serialize_request(seconds, b"m", b"", b""))[0], told, seconds)
            self.assertEqual(frames.parse_first_part(serialize_request(seconds, b"m", b"", b""), 9)[0], told, seconds)
            box = Outbox(2048)
            box.put_request(1, 0, seconds, b"m", b"", b"")
            (octets,) = box.poll(1 << 20, large=False)
            self.assertEqual(frames.parse_request(octets[12:])[0], told, seconds)


class Bodies(SynchronousTestCase):
    @given(st.integers(0, 0xFFFF), st.text(max_size=60), st.text(max_size=400), st.binary(max_size=200))
    def test_an_error_is_read_as_it_was_written_but_for_a_text_that_is_too_long(self, status, name, text, detail):
        body = ErrorBody(status, name, text, detail)
        parsed = ErrorBody.parse(body.serialize())
        self.assertEqual((parsed.status, parsed.name, parsed.detail), (status, name, detail))
        self.assertTrue(text.startswith(parsed.text))
        self.assertEqual(parsed.text == text, len(text.encode()) <= 1024)

    def test_a_long_text_is_cut_at_a_character(self):
        body = ErrorBody.parse(ErrorBody(2, "E", "a" + "é" * 1000).serialize())
        self.assertEqual(body.text, "a" + "é" * 511)
        self.assertEqual(GoAway.parse(GoAway(13, 0, "é" * 1000).serialize()).text, "é" * 512)

    def test_text_that_cannot_be_encoded_travels_all_the_same(self):
        self.assertEqual(ErrorBody.parse(ErrorBody(2, "E", "\ud800").serialize()).text, "?")
        self.assertEqual(GoAway.parse(GoAway(2, 0, "\ud800").serialize()).text, "?")

    def test_text_that_is_not_utf_8_is_read_with_replacements(self):
        self.assertEqual(ErrorBody.parse(b"\0\x02\x01\0\x02\xff\xffa").text, "\ufffda")
        self.assertEqual(GoAway.parse(bytes(10) + b"\xff").text, "\ufffd")

    @given(st.binary(max_size=40))
    def test_any_octets_are_a_body_or_refused(self, octets):
        for parse in (
            ErrorBody.parse,
            GoAway.parse,
            Hello.parse,
            frames.parse_request,
            frames.parse_total,
            frames.parse_count,
            frames.parse_credit,
            lambda octets: frames.parse_first_part(octets, 30),
        ):
            try:
                parse(octets)
            except RemoteProtocolError as error:
                self.assertTrue(error.message)

    def test_settings_at_their_bounds_are_taken(self):
        for settings in (
            {"max_frame": 2048, "max_message": 1, "max_unfinished": 1, "max_calls": 0},
            {
                "stream_credit": (1 << 31) - 1,
                "connection_credit": (1 << 31) - 1,
                "token": "t" * 1024,
                "max_frame": 65536,
                "max_message": (1 << 31) - 1,
                "max_unfinished": (1 << 64) - 1,
                "max_calls": (1 << 32) - 1,
                "session": bytes(32),
                "next_key": (1 << 63) - 1,
            },
        ):
            hello = Hello(**settings)
            self.assertEqual(Hello.parse(hello.serialize()), hello)

    def test_a_session_out_of_its_bounds_is_refused(self):
        for settings in ({"session": b"short"}, {"session": bytes(33)}, {"session": bytes(32), "next_key": -1}):
            payload = msgspec.msgpack.encode(msgspec.structs.asdict(Hello(2048, 1, 1, 0)) | settings)
            self.assertRaises(RemoteProtocolError, Hello.parse, payload)

    def test_a_key_is_read_as_it_was_written_or_refused(self):
        for key in (frames.Key(0, 0), frames.Key(7, 3), frames.Key((1 << 63) - 1, (1 << 63) - 2)):
            self.assertEqual(frames.split_key(frames.serialize_key(key) + b"rest"), (key, b"rest"))
        far = frames.Key(1 << 40, 1)
        self.assertLess(far.unsettled, frames.split_key(frames.serialize_key(far))[0].unsettled)
        for octets in (b"", bytes(11), bytes(11) + b"\1"):
            self.assertRaises(RemoteProtocolError, frames.split_key, octets)

    def test_settings_that_are_not_known_are_ignored(self):
        hello = Hello(max_frame=2048, max_message=1, max_unfinished=1, max_calls=0)
        payload = msgspec.msgpack.encode(msgspec.structs.asdict(hello) | {"later": [1, {"a": None}]})
        self.assertEqual(Hello.parse(payload), hello)

    def test_a_hello_is_no_longer_than_the_smallest_frame(self):
        # An octet is the length of an empty text, and three are that of a long one.
        room = LONGEST_HELLO - len(Hello(2048, 1, 1, 0, "").serialize()) - 2
        longest = Hello(2048, 1, 1, 0, "a" * room).serialize()
        self.assertEqual(len(longest), 2048 - HEADER.size)
        Hello.parse(longest)
        self.assertRaises(RemoteProtocolError, Hello.parse, Hello(2048, 1, 1, 0, "a" * (room + 1)).serialize())

    def test_a_hello_that_is_cut_anywhere_is_refused(self):
        payload = Hello(2048, 1, 1, 0, "agent").serialize()
        for length in range(len(payload)):
            self.assertRaises(RemoteProtocolError, Hello.parse, payload[:length])

    def test_an_agent_that_is_too_long_is_cut_before_it_is_sent(self):
        (octets,) = Conversation(Role.INITIATOR, Limits(), 0.0, "é" * 100_000).outbox.poll(1 << 20, large=False)
        self.assertEqual(Hello.parse(octets[12:]).agent, "é" * 512)

    def test_a_token_is_shown_to_nobody_but_the_peer(self):
        hello = Hello(2048, 1, 1, 0, "agent", token="secret of mine")
        self.assertEqual(Hello.parse(hello.serialize()).token, "secret of mine")
        for shown in (repr(hello), str(hello), repr(Opened(hello)), f"{hello}"):
            self.assertNotIn("secret", shown)

    def test_a_token_and_an_agent_that_are_as_long_as_they_may_be_fit_a_hello(self):
        limits = Limits(max_message=1 << 30, max_unfinished=1 << 40, max_unsent=1 << 40)
        (octets,) = Conversation(Role.INITIATOR, limits, 0.0, "a" * 9999, token="t" * 1024).outbox.poll(
            1 << 20, large=False
        )
        self.assertEqual(Hello.parse(octets[12:]).token, "t" * 1024)

    def test_unknown_flags_are_ignored(self):
        end = opened()
        end.receive(frame(7, 0xF8, 5, b"12345678"))
        end.send()
        self.assertEqual(bytes(end.link), frame(8, 0, 0, b"12345678"))
