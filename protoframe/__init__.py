"""protoframe: typed request/response application-layer protocols on Twisted.

A `Protocol` class declares what one end of a conversation answers, as plain annotated Python; a `Factory` serves it
on any Twisted endpoint; `connect` gives a typed proxy of the other end.  The names below are the public face; they
are imported when they are first used, so that ``import protoframe`` is cheap and the sans-I/O core does not bring
Twisted in.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from protoframe._version import __version__

if TYPE_CHECKING:
    from protoframe._context import Call, current_call, metadata, timeout
    from protoframe._endpoints import Connecting, ListeningPort, connect, listen
    from protoframe._factory import Factory
    from protoframe._protocol import Protocol, request
    from protoframe.core.limits import Limits
    from protoframe.errors import (
        Aborted,
        AlreadyExists,
        Cancelled,
        ConnectFailed,
        ConnectionLost,
        DataLoss,
        DeadlineExceeded,
        Error,
        FailedPrecondition,
        GoingAway,
        Internal,
        InvalidArgument,
        InvalidResponse,
        LocalProtocolError,
        MessageTooLarge,
        NotFound,
        OutOfRange,
        PermissionDenied,
        ProtocolError,
        RemoteProtocolError,
        ResourceExhausted,
        Status,
        TooManyCalls,
        Unauthenticated,
        Unavailable,
        Unimplemented,
        UnknownMethod,
        VersionMismatch,
    )

__all__ = [
    "Aborted",
    "AlreadyExists",
    "Call",
    "Cancelled",
    "ConnectFailed",
    "Connecting",
    "ConnectionLost",
    "DataLoss",
    "DeadlineExceeded",
    "Error",
    "Factory",
    "FailedPrecondition",
    "GoingAway",
    "Internal",
    "InvalidArgument",
    "InvalidResponse",
    "Limits",
    "ListeningPort",
    "LocalProtocolError",
    "MessageTooLarge",
    "NotFound",
    "OutOfRange",
    "PermissionDenied",
    "Protocol",
    "ProtocolError",
    "RemoteProtocolError",
    "ResourceExhausted",
    "Status",
    "TooManyCalls",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "UnknownMethod",
    "VersionMismatch",
    "__version__",
    "connect",
    "current_call",
    "listen",
    "metadata",
    "request",
    "timeout",
]

_HOMES = {
    "Call": "_context",
    "Connecting": "_endpoints",
    "Factory": "_factory",
    "Limits": "core.limits",
    "ListeningPort": "_endpoints",
    "Protocol": "_protocol",
    "connect": "_endpoints",
    "current_call": "_context",
    "listen": "_endpoints",
    "metadata": "_context",
    "request": "_protocol",
    "timeout": "_context",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
