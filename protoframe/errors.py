"""The errors that protoframe raises and carries, one class for each thing that can go wrong.

Knows the taxonomy and its numbers alone; how an error is laid out on the wire is `protoframe.core`'s business, and who
logs what is the binding's.

The tree, with the status number that travels in an ERROR frame (the numbers are those of gRPC's status codes, so that a
gateway need not translate them; `pf` exits with 64 plus the number)::

    Error                      2   declared by a handler; the base of everything below
    ├── Cancelled              1   the caller gave up, or the connection that the call came over did
    ├── InvalidArgument        3   an argument is missing or is not what the parameter's type asks for
    │   └── NestedTooDeep          it has more containers within containers than an end takes
    ├── DeadlineExceeded       4   the time ran out (also a TimeoutError)
    ├── NotFound               5
    ├── AlreadyExists          6
    ├── PermissionDenied       7
    ├── ResourceExhausted      8   a limit was met
    │   ├── MessageTooLarge        a value is larger than an end takes
    │   ├── TooManyCalls           more calls at once than an end takes
    │   ├── TooManyConnections     more connections at once than a server takes
    │   └── TooMuchUnsent          more waits to be sent than an end keeps for a peer that does not read
    ├── FailedPrecondition     9
    ├── Aborted               10
    ├── OutOfRange            11
    ├── Unimplemented         12
    │   ├── UnknownMethod          the other end serves no such method
    │   └── VersionMismatch        the ends speak no common version of the wire format
    ├── Internal              13   the handler failed; the text stayed at home, the incident id says where to look
    │   └── InvalidResponse        the answer is not what the method's result type says
    ├── Unavailable           14
    │   ├── ConnectFailed          no conversation could be opened (also a ConnectionError)
    │   ├── ConnectionLost         the conversation ended before the answer came (also a ConnectionError)
    │   │   ├── KeepaliveTimeout   the other end gave no sign of life
    │   │   ├── WriteTimeout       the other end read nothing of what there was for it
    │   │   └── SessionLost        the server does not know any more whether the call ran
    │   ├── GoingAway              the other end takes no more calls
    │   └── TryLater               the handler did nothing, and says when to ask again
    ├── DataLoss              15
    ├── Unauthenticated       16
    └── ProtocolError
        ├── RemoteProtocolError 13  the peer broke the wire format: its bug
        │   ├── HandshakeTimeout       it did not greet in time
        │   ├── FrameTimeout           a frame did not come whole in time
        │   ├── FrameTooLarge          a frame is longer than this end takes
        │   ├── TooMuchUnfinished      more messages were begun at once than this end holds
        │   ├── CreditExceeded         items came without credit
        │   └── Flood               8
        │       ├── CancelFlood        more calls were cancelled, or opened, than this end takes
        │       └── PingFlood          more PINGs came than this end takes
        └── LocalProtocolError  13  this end was used wrongly: your bug
"""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, ClassVar, dataclass_transform

__all__ = [
    "Aborted",
    "AlreadyExists",
    "CancelFlood",
    "Cancelled",
    "ConnectFailed",
    "ConnectionLost",
    "CreditExceeded",
    "DataLoss",
    "DeadlineExceeded",
    "Error",
    "FailedPrecondition",
    "Flood",
    "FrameTimeout",
    "FrameTooLarge",
    "GoingAway",
    "HandshakeTimeout",
    "Internal",
    "InvalidArgument",
    "InvalidResponse",
    "KeepaliveTimeout",
    "LocalProtocolError",
    "MessageTooLarge",
    "NestedTooDeep",
    "NotFound",
    "OutOfRange",
    "PermissionDenied",
    "PingFlood",
    "ProtocolError",
    "RemoteProtocolError",
    "ResourceExhausted",
    "SessionLost",
    "Status",
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
]


class Status(enum.IntEnum):
    """The number of an error on the wire: 1 to 16, as in gRPC's status codes."""

    CANCELLED = 1
    FAILED = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(dataclasses.field,))
class _Fields(Exception):
    """Turns the annotations of each subclass into fields and a constructor, as a dataclass has them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A docstring is asked for first: dataclass() would write a signature into a missing one.
        if cls.__doc__ is None:
            cls.__doc__ = ""
        dataclasses.dataclass(kw_only=True, eq=False, repr=False)(cls)


class Error(_Fields):
    """The base of all errors that travel; subclass it to declare one of your own.

    Annotated attributes of a subclass become fields, given by keyword and of any type a message may have:

    >>> class TooLong(Error):
    ...     limit: int
    >>> TooLong("what a long text", limit=1000)
    TooLong(what a long text (limit=1000))

    A method that declares it (``@request(raises=[TooLong])``) sends it, and the caller catches the same class with the
    same fields.  What a method does not declare reaches the caller as `Internal`, without its text.  A subclass of one
    of the classes below keeps that class's status.

    :ivar message: a sentence for people; may be empty.
    """

    message: str = dataclasses.field(default="", kw_only=False)

    #: The number that travels; a subclass inherits it.
    status: ClassVar[Status] = Status.FAILED

    #: Whether the call may have run at the other end.  ``False`` is a promise: it did not, so it is safe to repeat.
    may_have_run: bool = dataclasses.field(default=True, init=False)

    @property
    def type_name(self) -> str:
        """The error's name as it travels: the class's, or what the peer sent where this end does not know the class."""
        name: str = self.__dict__.get("_remote_name") or type(self).__name__
        return name

    @property
    def detail(self) -> Mapping[str, Any]:
        """The fields but for the message, by name; of an error whose class this end does not know, what was sent."""
        remote: Mapping[str, Any] | None = self.__dict__.get("_remote_detail")
        if remote is not None:
            return remote
        return {name: getattr(self, name) for name in detail_fields(type(self))}

    def __str__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.detail.items())
        if self.message and fields:
            return f"{self.message} ({fields})"
        return self.message or fields

    def __repr__(self) -> str:
        return f"{self.type_name}({self})"

    def __reduce__(self) -> tuple[Any, ...]:
        # The default passes `args`, which a constructor with keywords does not take.
        return (build_error, (type(self), self.message, dict(self.__dict__)))


def detail_fields(cls: type[Error]) -> tuple[str, ...]:
    """The names of the fields that a class of errors adds to `Error`'s own, in order."""
    return tuple(field.name for field in dataclasses.fields(cls) if field.name not in ("message", "may_have_run"))


class Cancelled(Error):
    """The caller gave the call up, or the connection that it came over went away."""

    status = Status.CANCELLED


class InvalidArgument(Error):
    """An argument is missing or is not what the parameter's type asks for; the message opens with its path."""

    status = Status.INVALID_ARGUMENT


class DeadlineExceeded(Error, TimeoutError):
    """The time that the caller allows ran out; the call may have run all the same."""

    status = Status.DEADLINE_EXCEEDED


class NotFound(Error):
    """What the call asks for does not exist."""

    status = Status.NOT_FOUND


class AlreadyExists(Error):
    """What the call would make exists."""

    status = Status.ALREADY_EXISTS


class PermissionDenied(Error):
    """The caller is known and may not do this."""

    status = Status.PERMISSION_DENIED


class ResourceExhausted(Error):
    """A limit was met; trying again later may help."""

    status = Status.RESOURCE_EXHAUSTED


class MessageTooLarge(ResourceExhausted):
    """The encoded arguments or result have more bytes than an end takes."""


class NestedTooDeep(InvalidArgument):
    """An argument has more containers within containers than an end takes."""


class TooManyCalls(ResourceExhausted):
    """More calls are in flight, or wait to be, than an end takes."""


class TooManyConnections(ResourceExhausted):
    """More connections are open than a server takes."""


class TooMuchUnsent(ResourceExhausted):
    """More waits to be sent than an end keeps for a peer that does not read."""


class FailedPrecondition(Error):
    """The state of things does not allow it."""

    status = Status.FAILED_PRECONDITION


class Aborted(Error):
    """Another call got in the way; the whole transaction may be tried again."""

    status = Status.ABORTED


class OutOfRange(Error):
    """Past the end of what there is."""

    status = Status.OUT_OF_RANGE


class Unimplemented(Error):
    """The other end does not do this."""

    status = Status.UNIMPLEMENTED


class UnknownMethod(Unimplemented):
    """The other end serves no method of this name."""


class VersionMismatch(Unimplemented, ConnectionError):
    """The two ends speak no common version of the wire format."""


class Internal(Error):
    """The handler failed in a way that it does not declare.

    The text and the traceback stay in the server's log, under the incident id.
    """

    status = Status.INTERNAL
    incident: str = ""


class InvalidResponse(Internal):
    """The other end answered, but not with what the method's result type says."""


class Unavailable(Error):
    """The other end cannot be reached, or does not take calls now."""

    status = Status.UNAVAILABLE


class ConnectFailed(Unavailable, ConnectionError):
    """No conversation could be opened: nothing listens there, or what listens does not speak the wire format."""


class ConnectionLost(Unavailable, ConnectionError):
    """The conversation ended before the answer came; `Error.may_have_run` says whether the call may have run."""


class KeepaliveTimeout(ConnectionLost):
    """The other end was silent, and gave no sign of life when it was asked for one."""


class WriteTimeout(ConnectionLost):
    """The other end read nothing of what there was for it for too long."""


class SessionLost(ConnectionLost):
    """The connection was lost, and the server does not know any more whether the call ran: it was restarted, say."""


class GoingAway(Unavailable):
    """The other end takes no more calls; this one did not run."""


class TryLater(Unavailable):
    """Raised by a handler that has done nothing, and will not for now; the call may be made again after a while.

    It travels from any method, whether its ``raises`` has it or not, and says that the call did not run.
    """

    retry_after: float = 0.0
    """Seconds to wait before the call is made again."""


class DataLoss(Error):
    """Data was lost or damaged for good."""

    status = Status.DATA_LOSS


class Unauthenticated(Error):
    """The caller has not shown who it is."""

    status = Status.UNAUTHENTICATED


class ProtocolError(Error):
    """The rules of the wire format were broken, by one end or the other."""

    status = Status.INTERNAL


class RemoteProtocolError(ProtocolError):
    """The peer broke the rules of the wire format; the conversation is over."""


class HandshakeTimeout(RemoteProtocolError):
    """The peer did not greet in time."""


class FrameTimeout(RemoteProtocolError):
    """A frame of the peer's did not come whole in time."""


class FrameTooLarge(RemoteProtocolError):
    """The peer sent a longer frame than this end takes."""


class TooMuchUnfinished(RemoteProtocolError):
    """The peer began more messages at once than this end holds."""


class CreditExceeded(RemoteProtocolError):
    """The peer sent more items of a stream than it had credit for."""


class Flood(RemoteProtocolError):
    """The peer does something more often than anybody needs to."""

    status = Status.RESOURCE_EXHAUSTED


class CancelFlood(Flood):
    """The peer cancels more calls than this end takes, or opens more than it may."""


class PingFlood(Flood):
    """The peer sends more PINGs than this end takes."""


class LocalProtocolError(ProtocolError):
    """What this end was asked for is not allowed by the rules, such as a call on a closed connection."""


#: For each status the class that a caller gets where it does not know, or was not told, a narrower one.
BY_STATUS: Mapping[int, type[Error]] = {
    Status.CANCELLED: Cancelled,
    Status.FAILED: Error,
    Status.INVALID_ARGUMENT: InvalidArgument,
    Status.DEADLINE_EXCEEDED: DeadlineExceeded,
    Status.NOT_FOUND: NotFound,
    Status.ALREADY_EXISTS: AlreadyExists,
    Status.PERMISSION_DENIED: PermissionDenied,
    Status.RESOURCE_EXHAUSTED: ResourceExhausted,
    Status.FAILED_PRECONDITION: FailedPrecondition,
    Status.ABORTED: Aborted,
    Status.OUT_OF_RANGE: OutOfRange,
    Status.UNIMPLEMENTED: Unimplemented,
    Status.INTERNAL: Internal,
    Status.UNAVAILABLE: Unavailable,
    Status.DATA_LOSS: DataLoss,
    Status.UNAUTHENTICATED: Unauthenticated,
}

#: The narrower classes that the framework itself sends by name, whatever a method declares.
BY_NAME: Mapping[str, type[Error]] = {
    cls.__name__: cls
    for cls in (
        *BY_STATUS.values(),
        MessageTooLarge,
        NestedTooDeep,
        TooManyCalls,
        UnknownMethod,
        GoingAway,
        SessionLost,
        TryLater,
    )
}


def build_error(cls: type[Error], message: str, fields: Mapping[str, Any]) -> Error:
    """An error as it came from the wire: its constructor, which a subclass may have replaced, is not asked."""
    error = cls.__new__(cls)
    error.message = message
    error.__dict__.update(fields)
    return error


def not_run(error: Error) -> Error:
    """An error of a call that certainly did not run."""
    error.may_have_run = False
    return error


def own_copy(error: Error) -> Error:
    """The same error for somebody else, who may be told more of it."""
    copied: Error = copy.copy(error)
    copied.__cause__ = error.__cause__
    return copied


def unknown_error(status: int, name: str, message: str, detail: Mapping[str, Any]) -> Error:
    """An error that this end knows no class for: the status's class, with the name and the fields that were sent."""
    cls = BY_STATUS.get(status, Error)
    error = cls(message)
    error.__dict__["_remote_name"] = name
    error.__dict__["_remote_detail"] = detail
    return error
