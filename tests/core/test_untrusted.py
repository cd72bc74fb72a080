"""Bounds on untyped values: what they let through nests as deep as they say, and looking costs little."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import struct
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from protoframe.core import untrusted
from protoframe.core.untrusted import Bounds, bounds_of, check_json, check_msgpack

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=40)
    | st.sampled_from(["a" * 300, "[[[", '"', '\\"', "\\", "]}", '{"a":[', "\u2028", "é" * 40000])
)
keys = st.text(max_size=8) | st.sampled_from(['"', "\\", "[", "{{{"])
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=18) | st.dictionaries(keys, inner, max_size=18),
    max_leaves=60,
)
binary = st.recursive(
    scalars | st.binary(max_size=300) | st.datetimes(timezones=st.just(datetime.UTC)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=4) | st.integers(0, 9) | st.binary(max_size=4), inner, max_size=4)
    ),
    max_leaves=30,
)


def nesting(value):
    """Containers within containers."""
    if isinstance(value, dict):
        return 1 + max(map(nesting, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(nesting, value), default=0)
    return 0


class Node(msgspec.Struct):
    children: list[Node] = []
    name: str = ""


class Plain(msgspec.Struct):
    names: dict[str, list[int]]


class Open(msgspec.Struct):
    plain: Plain
    anything: dict[str, Any]


class Kinds(SynchronousTestCase):
    def test_a_type_that_bounds_its_values_is_told_from_one_that_does_not(self):
        for annotation in (int, str, Plain, dict[str, list[tuple[int, str]]], Plain | None, tuple[Plain, ...]):
            self.assertIs(bounds_of(annotation), Bounds.TYPED, annotation)
        for annotation in (Node, list[Node], dict[str, Node | None]):
            self.assertIs(bounds_of(annotation), Bounds.RECURSIVE, annotation)
        for annotation in (
            Any,
            list,
            dict,
            list[Any],
            dict[str, Any],
            Open,
            Open | None,
            msgspec.Raw,
            tuple[int, Any],
            tuple,
        ):
            self.assertIs(bounds_of(annotation), Bounds.UNTYPED, annotation)

    def test_a_type_that_is_recursive_and_untyped_is_untyped(self):
        self.assertIs(bounds_of(tuple[Node, Any]), Bounds.UNTYPED)
        self.assertIs(bounds_of(tuple[Any, Node]), Bounds.UNTYPED)

    def test_types_that_are_used_many_times_over_are_looked_at_once(self):
        layer = int
        for index in range(30):
            layer = msgspec.defstruct(f"Layer{index}", [(name, layer) for name in "abcd"])
        looked = 0
        walk = untrusted._walk

        def count(*args):
            nonlocal looked
            looked += 1
            self.assertLess(looked, 5000)
            walk(*args)

        self.patch(untrusted, "_walk", count)
        self.assertIs(bounds_of(layer), Bounds.TYPED)


class MessagePack(SynchronousTestCase):
    @given(values | binary, st.integers(1, 6))
    def test_what_is_let_through_nests_no_deeper_than_it_may_and_nothing_else_is_refused(self, value, most):
        octets = msgspec.msgpack.encode(value)
        for bounds in (Bounds.UNTYPED, Bounds.RECURSIVE):
            if nesting(value) > most:
                self.assertRaises(msgspec.ValidationError, check_msgpack, octets, most, bounds)
            else:
                check_msgpack(octets, most, bounds)

    @given(values | binary, st.data())
    def test_a_value_that_is_cut_or_changed_is_looked_through_without_another_error(self, value, data):
        octets = bytearray(msgspec.msgpack.encode(value))
        del octets[data.draw(st.integers(0, len(octets))) :]
        if octets:
            octets[data.draw(st.integers(0, len(octets) - 1))] = data.draw(st.integers(0, 255))
        try:
            check_msgpack(bytes(octets), 3, Bounds.UNTYPED)
        except msgspec.ValidationError:
            return
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
            self.assertLessEqual(nesting(msgspec.msgpack.decode(octets)), 3)

    def test_every_first_octet_is_measured_as_the_decoder_measures_it(self):
        # In an array of two: where the first element is measured wrongly, the second is not where it should be.
        lengths = {
            0xC4: b"\x03",
            0xC5: b"\0\x03",
            0xC6: b"\0\0\0\x03",
            0xD9: b"\x03",
            0xDA: b"\0\x03",
            0xDB: b"\0\0\0\x03",
        }
        extensions = {0xC7: b"\x03\x05", 0xC8: b"\0\x03\x05", 0xC9: b"\0\0\0\x03\x05"}
        fixed = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
        seen = 0
        for first in range(256):
            if first in extensions:
                element = extensions[first] + b"abc"
            elif first in fixed:
                element = b"\x05" + bytes(fixed[first])
            elif first in lengths:
                element = lengths[first] + b"abc"
            elif 0xA0 <= first <= 0xBF:
                element = b"a" * (first - 0xA0)
            elif 0x80 <= first <= 0x9F:
                element = b"".join(b"\xa1" + bytes([65 + i]) for i in range((first & 15) * (2 if first < 0x90 else 1)))
            elif first in (0xDC, 0xDD, 0xDE, 0xDF):
                element = {0xDC: b"\0\x02", 0xDD: b"\0\0\0\x02", 0xDE: b"\0\x01", 0xDF: b"\0\0\0\x01"}[
                    first
                ] + b"\xa1a\xa1b"
            else:
                sizes = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
                element = bytes(sizes.get(first, 0))
            shallow = b"\x92" + bytes([first]) + element + b"\x90"
            deep = b"\x92" + bytes([first]) + element + b"\x91\x91\x90"
            try:
                msgspec.msgpack.decode(shallow)
            except msgspec.DecodeError:
                self.assertEqual(first, 0xC1)
                continue
            seen += 1
            check_msgpack(shallow, 2, Bounds.UNTYPED)
            check_msgpack(deep, 4, Bounds.UNTYPED)
            self.assertRaises(msgspec.ValidationError, check_msgpack, deep, 3, Bounds.UNTYPED)
        self.assertEqual(seen, 255)

    def test_keys_that_are_containers_are_refused_wherever_they_stand(self):
        for key in (
            b"\x91\x01",
            b"\x90",
            b"\x81\x01\x01",
            b"\x80",
            b"\xdc\0\x01\x01",
            b"\xdd\0\0\0\0",
            b"\xde\0\0",
            b"\xdf\0\0\0\0",
        ):
            for octets in (
                b"\x81" + key + b"\x01",
                b"\x82\x01\x01" + key + b"\x01",
                b"\x91\x81\x01\x81" + key + b"\x01",
                b"\x82\x01\x92\x01\x90" + key + b"\x01",
                b"\xde\0\x01" + key + b"\x01",
                b"\xdf\0\0\0\x01" + key + b"\x01",
            ):
                error = self.assertRaises(msgspec.ValidationError, check_msgpack, octets, 64, Bounds.UNTYPED)
                self.assertEqual(str(error), "A key of a map is an array or a map")
                check_msgpack(octets, 64, Bounds.RECURSIVE)
        check_msgpack(b"\x82\x01\x91\x91\x90\x02\x81\x01\x90", 64, Bounds.UNTYPED)

    def test_claimed_lengths_and_nesting_without_end_cost_nothing(self):
        for octets in (
            b"\xdd\xff\xff\xff\xff",
            b"\xdf\xff\xff\xff\xff",
            b"\xc6\xff\xff\xff\xff",
            b"\xdb\xff\xff\xff\xff",
            b"\xc9\xff",
        ):
            check_msgpack(octets, 64, Bounds.UNTYPED)
            check_msgpack(octets * 3, 64, Bounds.RECURSIVE)
        for first in (b"\x91", b"\x81\xa1a", b"\xdd\xff\xff\xff\xff", b"\xdc\0\x02\x01"):
            self.assertRaises(msgspec.ValidationError, check_msgpack, first * 100_000, 64, Bounds.UNTYPED)


class Json(SynchronousTestCase):
    @given(values, st.integers(1, 6), st.booleans())
    def test_what_is_let_through_nests_no_deeper_than_it_may_and_nothing_else_is_refused(self, value, most, ascii_only):
        octets = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
        if nesting(value) > most:
            self.assertRaises(msgspec.ValidationError, check_json, octets, most, Bounds.UNTYPED)
        else:
            check_json(octets, most, Bounds.UNTYPED)

    def test_brackets_in_strings_do_not_count(self):
        for text in (b'"[[[["', b'["\\"[[[["]', b'{"a\\\\":"]][[[["}', b'"\\\\\\"[[[[["', b'"\\u005b[[[["'):
            check_json(text, 1, Bounds.UNTYPED)
        for text in (b'["\\\\",[[]]]', b'[["\\""],[[]]]'):
            self.assertRaises(msgspec.ValidationError, check_json, text, 2, Bounds.UNTYPED)

    @given(st.lists(st.sampled_from([b'"', b"\\", b"[", b"]", b"{", b"a", b"\n"]), max_size=30))
    def test_no_text_that_the_decoder_takes_nests_deeper(self, parts):
        octets = b"".join(parts)
        try:
            check_json(octets, 2, Bounds.UNTYPED)
            value = msgspec.json.decode(octets)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return
        self.assertLessEqual(nesting(value), 2)

    def test_a_string_without_end_is_looked_at_once(self):
        # Were each quote a new beginning, these would take the square of their length: hours.
        size = 1 << 20
        for text in (
            b'"' + b'\\"' * size,
            b'"' * (2 * size + 1),
            b'"' + b"\\" * size,
            b'"' + b"a" * size,
            b'["' + b'\\"[' * size,
        ):
            check_json(text, 64, Bounds.UNTYPED)

    def test_only_one_attempt_is_made_for_each_string(self):
        for text in (b'"' + b'\\"' * 50, b'"abc', b'"abc\\', b'"\\"'):
            ((at, end),) = [match.span() for match in itertools.islice(untrusted._JSON_STRING.finditer(text), 5)]
            self.assertEqual(at, 0)
            self.assertGreaterEqual(end, len(text) - 1)

    def test_nesting_without_end_is_refused(self):
        for text in (b"[" * 100_000, b'{"a":' * 100_000, b"[" * 65 + b"]" * 65):
            self.assertRaises(msgspec.ValidationError, check_json, text, 64, Bounds.UNTYPED)
        check_json(b"[" * 64 + b"]" * 64, 64, Bounds.UNTYPED)


def colliding(count):
    """Pairs of numbers whose tuples have one hash."""
    first, second, fifth, mask = 11400714785074694791, 14029467366897019727, 2870177450012600261, (1 << 64) - 1

    def turn(value, by):
        return ((value << by) | (value >> (64 - by))) & mask

    def add(hashed, lane):
        return turn((hashed + lane * second) & mask, 31) * first & mask

    wanted = turn(add(add(fifth, 7), 9) * pow(first, -1, 1 << 64) & mask, 33)
    found = []
    for one in itertools.count(1):
        other = (wanted - add(fifth, one)) * pow(second, -1, 1 << 64) & mask
        if other < (1 << 61) - 1:
            found.append((one, other))
            if len(found) == count:
                return found
    return found


class Collisions(SynchronousTestCase):
    def test_maps_whose_keys_collide_are_refused_before_they_are_decoded(self):
        pairs = colliding(500)
        self.assertEqual(len({hash(pair) for pair in pairs}), 1)
        octets = b"\xdf" + struct.pack("!I", 500) + b"".join(msgspec.msgpack.encode(pair) + b"\x01" for pair in pairs)
        self.assertEqual(len(msgspec.msgpack.decode(octets)), 500)
        self.assertRaises(msgspec.ValidationError, check_msgpack, octets, 64, Bounds.UNTYPED)
