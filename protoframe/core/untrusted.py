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

__all__ = ["Bounds", "bounds_of", "check_json", "check_msgpack"]


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


# One entry for each first octet of msgpack (the format's specification, "Formats"): how many octets its length field
# has, how many octets follow in any case, and whether elements follow.
_FIXED = {
    0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8,
    0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8, 0xD4: 2, 0xD5: 3, 0xD6: 5, 0xD7: 9, 0xD8: 17,
}  # fmt: skip
_STRINGS = {0xC4: (1, 0), 0xC5: (2, 0), 0xC6: (4, 0), 0xD9: (1, 0), 0xDA: (2, 0), 0xDB: (4, 0),
            0xC7: (1, 1), 0xC8: (2, 1), 0xC9: (4, 1)}  # fmt: skip
_ARRAYS = {0xDC: 2, 0xDD: 4}
_MAPS = {0xDE: 2, 0xDF: 4}


def check_msgpack(octets: bytes, max_nesting: int, bounds: Bounds) -> None:
    """Looks a msgpack value through without decoding it.

    :raises msgspec.ValidationError: it nests deeper than ``max_nesting``, or has a map whose key is an array or a map.
    """
    at = 0
    end = len(octets)
    # What is open: how many elements are left, and for a map (whose keys are the odd ones when counted down) that it
    # is.
    left: list[int] = []
    is_map: list[bool] = []
    while at < end:
        first = octets[at]
        at += 1
        key = bool(left) and is_map[-1] and not left[-1] & 1
        if left:
            left[-1] -= 1
        elements = -1
        if first <= 0x7F or first >= 0xE0:
            pass
        elif first <= 0x8F:
            elements = 2 * (first & 0x0F)
        elif first <= 0x9F:
            elements = first & 0x0F
        elif first <= 0xBF:
            at += first & 0x1F
        elif (fixed := _FIXED.get(first)) is not None:
            at += fixed
        elif (string := _STRINGS.get(first)) is not None:
            width, extra = string
            at += width + extra + int.from_bytes(octets[at : at + width])
        elif (width := _ARRAYS.get(first, 0)) or (width := _MAPS.get(first, 0)):
            elements = int.from_bytes(octets[at : at + width]) * (2 if first in _MAPS else 1)
            at += width
        else:
            return  # Malformed: the decoder says so.
        if elements >= 0:
            if key and bounds is Bounds.UNTYPED:
                raise msgspec.ValidationError("A key of a map is an array or a map")
            if len(left) >= max_nesting:
                raise msgspec.ValidationError(f"Nested deeper than {max_nesting}")
            if elements:
                left.append(elements)
                is_map.append(first <= 0x8F or first in _MAPS)
        while left and not left[-1]:
            left.pop()
            is_map.pop()


# A string that does not end is taken too, to the end: else each quote in it would be tried anew, which takes the
# square of the length.  Nothing is given back (``*+``), for the same reason.
_JSON_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_JSON_BRACKET = re.compile(rb"[][{}]")


def check_json(octets: bytes, max_nesting: int, bounds: Bounds) -> None:
    """Looks a JSON text through without decoding it; the keys of its objects are strings in any case.

    :raises msgspec.ValidationError: it nests deeper than ``max_nesting``.
    """
    del bounds
    depth = 0
    for bracket in _JSON_BRACKET.findall(_JSON_STRING.sub(b"", octets)):
        depth += 1 if bracket in b"[{" else -1
        if depth > max_nesting:
            raise msgspec.ValidationError(f"Nested deeper than {max_nesting}")
