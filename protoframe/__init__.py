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
    from protoframe._client import Client, ClientState
    from protoframe._connection import Connection
    from protoframe._context import Call, current_call, current_metadata, metadata, remaining, timeout
    from protoframe._endpoints import Connecting, ListeningPort, connect, listen
    from protoframe._factory import Factory
    from protoframe._protocol import Protocol, request
    from protoframe.authentication import (
        CertificateAuthenticator,
        FirstOf,
        IAuthenticator,
        Identity,
        Shown,
        Token,
        TokenAuthenticator,
    )
    from protoframe.core.limits import Limits
    from protoframe.core.retry import Backoff, RetryPolicy
    from protoframe.errors import (
        Aborted,
        AlreadyExists,
        CancelFlood,
        Cancelled,
        ConnectFailed,
        ConnectionLost,
        CreditExceeded,
        DataLoss,
        DeadlineExceeded,
        Error,
        FailedPrecondition,
        Flood,
        FrameTimeout,
        FrameTooLarge,
        GoingAway,
        HandshakeTimeout,
        Internal,
        InvalidArgument,
        InvalidResponse,
        KeepaliveTimeout,
        LocalProtocolError,
        MessageTooLarge,
        NestedTooDeep,
        NotFound,
        OutOfRange,
        PermissionDenied,
        PingFlood,
        ProtocolError,
        RemoteProtocolError,
        ResourceExhausted,
        SessionLost,
        Status,
        TooManyCalls,
        TooManyConnections,
        TooMuchUnfinished,
        TooMuchUnsent,
        TryLater,
        Unauthenticated,
        Unavailable,
        Unimplemented,
        UnknownMethod,
        VersionMismatch,
        WriteTimeout,
    )
    from protoframe.interceptors import IInterceptor, InterceptedCall, LogCalls, MeterCalls

__all__ = [
    "Aborted",
    "AlreadyExists",
    "Backoff",
    "Call",
    "CancelFlood",
    "Cancelled",
    "CertificateAuthenticator",
    "Client",
    "ClientState",
    "ConnectFailed",
    "Connecting",
    "Connection",
    "ConnectionLost",
    "CreditExceeded",
    "DataLoss",
    "DeadlineExceeded",
    "Error",
    "Factory",
    "FailedPrecondition",
    "FirstOf",
    "Flood",
    "FrameTimeout",
    "FrameTooLarge",
    "GoingAway",
    "HandshakeTimeout",
    "IAuthenticator",
    "IInterceptor",
    "Identity",
    "InterceptedCall",
    "Internal",
    "InvalidArgument",
    "InvalidResponse",
    "KeepaliveTimeout",
    "Limits",
    "ListeningPort",
    "LocalProtocolError",
    "LogCalls",
    "MessageTooLarge",
    "MeterCalls",
    "NestedTooDeep",
    "NotFound",
    "OutOfRange",
    "PermissionDenied",
    "PingFlood",
    "Protocol",
    "ProtocolError",
    "RemoteProtocolError",
    "ResourceExhausted",
    "RetryPolicy",
    "SessionLost",
    "Shown",
    "Status",
    "Token",
    "TokenAuthenticator",
    "TooManyCalls",
    "TooManyConnections",
    "TooMuchUnfinished",
    "TooMuchUnsent",
    "TryLater",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "UnknownMethod",
    "VersionMismatch",
    "WriteTimeout",
    "__version__",
    "connect",
    "current_call",
    "current_metadata",
    "listen",
    "metadata",
    "remaining",
    "request",
    "timeout",
]

_HOMES = {
    "Backoff": "core.retry",
    "Call": "_context",
    "CertificateAuthenticator": "authentication",
    "Client": "_client",
    "ClientState": "_client",
    "Connecting": "_endpoints",
    "Connection": "_connection",
    "Factory": "_factory",
    "FirstOf": "authentication",
    "IAuthenticator": "authentication",
    "IInterceptor": "interceptors",
    "Identity": "authentication",
    "InterceptedCall": "interceptors",
    "Limits": "core.limits",
    "ListeningPort": "_endpoints",
    "LogCalls": "interceptors",
    "MeterCalls": "interceptors",
    "Protocol": "_protocol",
    "RetryPolicy": "core.retry",
    "Shown": "authentication",
    "Token": "authentication",
    "TokenAuthenticator": "authentication",
    "connect": "_endpoints",
    "current_call": "_context",
    "current_metadata": "_context",
    "listen": "_endpoints",
    "metadata": "_context",
    "remaining": "_context",
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
