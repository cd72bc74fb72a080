"""Calls of this end: what one needs to know of the method that it calls, and how its answer is read.

Knows encoded answers and errors; when they come and who waits for them is the connection's.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

import msgspec
from twisted.internet.defer import CancelledError, Deferred

from protoframe.core.frames import ErrorBody
from protoframe.core.schema import ErrorType, RequestOptions, error_type, invalid_value
from protoframe.core.untrusted import Bounds, check_json, check_msgpack
from protoframe.errors import BY_NAME, Cancelled, Error, InvalidResponse, unknown_error

__all__ = ["CallCancelled", "Callee", "JSONMethod", "PendingCall", "read_error"]


class Callee(typing.Protocol):
    """What a call needs to know of the method that it calls; a `Method` knows it."""

    wire_name: bytes
    options: RequestOptions
    errors: Mapping[str, ErrorType]
    json: bool

    def decode_result(self, octets: bytes, max_nesting: int) -> Any:
        """
        :raises InvalidResponse: this is not the result of such a method.
        """


class JSONMethod:
    """A method of the other end whose declaration is not at hand: arguments and result are JSON texts.

    :param name: ``Protocol.method``.
    """

    json = True
    options = RequestOptions()
    errors: Mapping[str, ErrorType] = {}

    def __init__(self, name: str) -> None:
        self.wire_name = name.encode()

    def decode_result(self, octets: bytes, max_nesting: int) -> bytes:
        """The JSON text."""
        del max_nesting
        return octets


class CallCancelled(Cancelled, CancelledError):
    """What a call fails with that this end cancelled: to Twisted, as for any Deferred, a `CancelledError`."""


class PendingCall(msgspec.Struct):
    """A call of this end: who waits for it, and what reads its answer."""

    deferred: Deferred[Any]
    method: Callee


def read_error(method: Callee, body: ErrorBody, max_nesting: int) -> Error:
    """The error that a call was answered with: of the class that the method declares, where this end knows it."""
    status, name, text, detail = body
    known = method.errors.get(name)
    if known is None and (cls := BY_NAME.get(name)) is not None:
        known = error_type(cls)
    try:
        if known is not None:
            return known.decode(text, detail, max_nesting, json=method.json)
        if not detail:
            fields = {}
        elif method.json:
            check_json(detail, max_nesting, Bounds.UNTYPED)
            fields = msgspec.json.decode(detail, type=dict[str, Any])
        else:
            check_msgpack(detail, max_nesting, Bounds.UNTYPED)
            fields = msgspec.msgpack.decode(detail, type=dict[str, Any])
    except InvalidResponse as error:
        return error
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        return InvalidResponse(f"{name}: {invalid_value(error)}")
    return unknown_error(status, name, text, fields)
