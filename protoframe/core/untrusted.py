"""Bounds on values whose type sets none.

msgspec holds a value to its type, and a type bounds how deep the value nests and what the keys of its maps are,
unless it says `Any` or refers to itself.  There a hostile peer could nest without end, or send maps whose keys, made
of arrays, collide: 57 kB of them take 178 ms to decode, and the time grows with the square.  What such a type lets in
is looked through before it is decoded; what any other type lets in is not, and costs nothing.
"""

from __future__ import annotations

import enum
import re
from typing import Any

import msgspec

__all__ = ["Bounds", "TooDeep", "bounds_of", "check_json", "check_msgpack"]


class TooDeep(msgspec.ValidationError):
    """A value has more containers within containers than are allowed."""


class Bounds(enum.Enum):
    """How far a type bounds its values."""

    TYPED = "typed"
    """Altogether."""
    RECURSIVE = "recursive"
    """It refers to itself: values nest without end."""
    UNTYPED = "untyped"
    """It says `Any` somewhere: values nest, and maps have keys of any kind."""


def bounds_of(annotation: Any) -> Bounds:
    """How far an annotation bounds its values."""
    found: set[Bounds] = set()
    _walk(msgspec.inspect.type_info(annotation), (), found, set())
    for bounds in (Bounds.UNTYPED, Bounds.RECURSIVE):
        if bounds in found:
            return bounds
    return Bounds.TYPED


def _walk(info: Any, above: tuple[Any, ...], found: set[Bounds], done: set[int]) -> None:
    if isinstance(info, msgspec.inspect.AnyType | msgspec.inspect.RawType):
        found.add(Bounds.UNTYPED)
        return
    if not isinstance(info, msgspec.inspect.Type | msgspec.inspect.Field):
        return
    if any(info is one for one in above):
        found.add(Bounds.RECURSIVE)
        return
    # One Struct is one object, however many refer to it: looked into once.
    if id(info) in done:
        return
    done.add(id(info))
    above = (*above, info)
    for name in type(info).__struct_fields__:
        value = getattr(info, name)
        for part in value if isinstance(value, tuple) else (value,):
            _walk(part, above, found, done)


# The first octets of msgpack (the format's specification, "Formats").  What has a fixed length and holds nothing,
# written as a pattern; what has a length field: how many octets that has, and how many follow it in any case; what
# holds elements: how many octets count them.
_SCALAR = b"|".join(
    [
        rb"[\x00-\x7f\xe0-\xff\xc0\xc2\xc3]",
        *(rb"[%b].{%d}" % (firsts, length) for firsts, length in (
            (rb"\xcc\xd0", 1), (rb"\xcd\xd1", 2), (rb"\xca\xce\xd2", 4), (rb"\xcb\xcf\xd3", 8),
            (rb"\xd4", 2), (rb"\xd5", 3), (rb"\xd6", 5), (rb"\xd7", 9), (rb"\xd8", 17),
        )),
        *(rb"\x%02x.{%d}" % (0xA0 + length, length) for length in range(32)),
    ],
)  # fmt: skip
_find_scalars = re.compile(_SCALAR, re.DOTALL).findall
_match_scalars = re.compile(rb"(?:%b)++" % _SCALAR, re.DOTALL).match
_STRINGS = {0xC4: (1, 0), 0xC5: (2, 0), 0xC6: (4, 0), 0xD9: (1, 0), 0xDA: (2, 0), 0xDB: (4, 0),
            0xC7: (1, 1), 0xC8: (2, 1), 0xC9: (4, 1)}  # fmt: skip
_ARRAYS = {0xDC: 2, 0xDD: 4}
_MAPS = {0xDE: 2, 0xDF: 4}


def check_msgpack(octets: bytes, max_nesting: int, bounds: Bounds) -> None:
    """Looks a msgpack value through without decoding it.

    :raises TooDeep: it nests deeper than ``max_nesting``.
    :raises msgspec.ValidationError: it has a map whose key is an array or a map.
    """
    at = 0
    end = len(octets)
    # What is open: how many elements are left, and whether it is a map, whose keys are the even ones when counted down.
    left: list[int] = []
    is_map: list[bool] = []
    while at < end:
        first = octets[at]
        elements = -1
        if scalars := _match_scalars(octets, at):
            # Most of most values: counted as a whole, for one by one takes the interpreter ten times as long.
            at = scalars.end()
            count = len(_find_scalars(octets, scalars.start(), at))
        elif (string := _STRINGS.get(first)) is not None:
            width, extra = string
            at += 1 + width + extra + int.from_bytes(octets[at + 1 : at + 1 + width])
            count = 1
        else:
            count = 1
            width = _ARRAYS.get(first, 0) or _MAPS.get(first, 0)
            if width:
                elements = int.from_bytes(octets[at + 1 : at + 1 + width])
            elif 0x80 <= first <= 0x9F:
                elements = first & 0x0F
            else:
                return  # Malformed, or cut off: the decoder says so.
            at += 1 + width
            if bounds is Bounds.UNTYPED and left and is_map[-1] and not left[-1] & 1:
                raise msgspec.ValidationError("A key of a map is an array or a map")
            if len(left) >= max_nesting:
                raise TooDeep(f"Nested deeper than {max_nesting}")
        while count and left:
            taken = min(count, left[-1])
            left[-1] -= taken
            count -= taken
            if elements <= 0:
                while left and not left[-1]:
                    left.pop()
                    is_map.pop()
        if elements > 0:
            of_map = first <= 0x8F or first in _MAPS
            left.append(2 * elements if of_map else elements)
            is_map.append(of_map)


# A string that does not end is taken too, to the end: else each quote in it would be tried anew, which takes the
# square of the length.  Nothing is given back (``*+``), for the same reason.
_JSON_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_JSON_BRACKET = re.compile(rb"[][{}]")


def check_json(octets: bytes, max_nesting: int, bounds: Bounds) -> None:
    """Looks a JSON text through without decoding it; the keys of its objects are strings in any case.

    :raises TooDeep: it nests deeper than ``max_nesting``.
    """
    del bounds
    depth = 0
    for bracket in _JSON_BRACKET.findall(_JSON_STRING.sub(b"", octets)):
        depth += 1 if bracket in b"[{" else -1
        if depth > max_nesting:
            raise TooDeep(f"Nested deeper than {max_nesting}")
