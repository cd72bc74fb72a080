"""What a Protocol's annotations say: its methods, and the codecs of their parameters, results and errors.

Knows Python signatures and msgspec; not who calls, nor what carries the octets.  Arguments travel as a map by name,
so a parameter with a default can be added; the receiver ignores names that it does not know.
"""

from __future__ import annotations

import collections.abc
import copy
import dataclasses
import enum
import functools
import inspect
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from protoframe.core.declaration import is_declaration
from protoframe.core.frames import COUNT, Flag, behind
from protoframe.core.untrusted import Bounds, TooDeep, bounds_of, check_json, check_msgpack
from protoframe.errors import (
    Error,
    InvalidArgument,
    InvalidResponse,
    NestedTooDeep,
    build_error,
    detail_fields,
)

__all__ = [
    "ErrorType",
    "ItemType",
    "Method",
    "RequestOptions",
    "encode_json",
    "encode_msgpack",
    "error_type",
    "invalid_value",
    "methods_of",
    "protocol_name",
    "wire_names",
]

#: Under this name the options of ``@request`` stand on a function.
MARK = "__protoframe_request__"
#: Names that a `Protocol` uses for other things.
RESERVED = frozenset({"connectionLost", "connectionMade", "factory", "peer"})
#: Under this name a class that is asked to have another name on the wire keeps it.
NAME = "__protoframe_name__"
#: Under this name a class keeps what a peer must be permitted to call any of its methods.
PERMISSION = "__protoframe_permission__"

_CODEC_ERRORS = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)
_IMMUTABLE = (type(None), bool, int, float, str, bytes, frozenset, enum.Enum)

_TYPED = Bounds.TYPED
_astuple = msgspec.structs.astuple
encode_msgpack = msgspec.msgpack.Encoder().encode
encode_json = msgspec.json.Encoder().encode


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RequestOptions:
    """What ``@request(...)`` says of a method; see `protoframe.request`."""

    idempotent: bool = False
    timeout: float | None = None
    raises: tuple[type[Error], ...] = ()
    max_size: int | None = None
    oneway: bool = False
    permission: str | None = None

    def __post_init__(self) -> None:
        if self.timeout is not None and not (self.timeout > 0 and math.isfinite(self.timeout)):
            raise ValueError(f"timeout: expected a finite number of seconds above 0, got {self.timeout}")
        if self.max_size is not None and self.max_size < 1:
            raise ValueError(f"max_size: expected at least 1 byte, got {self.max_size}")
        if self.permission is not None and not (isinstance(self.permission, str) and self.permission):
            raise TypeError(f"permission: expected a name, got {self.permission!r}")
        if self.oneway and self.raises:
            raise TypeError("raises: a oneway request has no answer that could carry an error")
        names: dict[str, type[Error]] = {}
        for cls in self.raises:
            if not (isinstance(cls, type) and issubclass(cls, Error)):
                raise TypeError(f"raises: expected subclasses of protoframe.Error, got {cls!r}")
            if names.setdefault(cls.__name__, cls) is not cls:
                raise TypeError(f"raises: two errors are called {cls.__name__}")


class ErrorType:
    """A declared error: its class, the name it travels under, and the codec of its fields."""

    def __init__(self, cls: type[Error]) -> None:
        self.cls = cls
        self.name = cls.__name__
        hints = _hints(cls, f"error {cls.__name__}")
        defaults = {field.name: field for field in dataclasses.fields(cls)}
        fields: list[Any] = []
        for name in detail_fields(cls):
            field = defaults[name]
            if field.default is not dataclasses.MISSING:
                fields.append((name, hints[name], _default(field.default)))
            elif field.default_factory is not dataclasses.MISSING:
                fields.append((name, hints[name], msgspec.field(default_factory=field.default_factory)))
            else:
                fields.append((name, hints[name]))
        self.fields = _struct(cls.__name__, (), fields, f"error {cls.__module__}.{cls.__qualname__}")
        _check_type(self.fields, f"error {cls.__name__}")
        self._bounds = bounds_of(self.fields)

    def encode(self, error: Error, json: bool) -> bytes:
        """The detail of an error of this class, for the wire."""
        detail = self.fields(**{name: getattr(error, name) for name in self.fields.__struct_fields__})
        return encode_json(detail) if json else encode_msgpack(detail)

    def decode(self, message: str, detail: bytes, max_nesting: int, *, json: bool = False) -> Error:
        """An error of this class, from its detail.

        :raises InvalidResponse: the detail is not what the class's fields say.
        """
        try:
            if self._bounds is not _TYPED:
                check = check_json if json else check_msgpack
                check(detail, max_nesting, self._bounds)
            decode = msgspec.json.decode if json else msgspec.msgpack.decode
            # An older or a newer end may declare the error without fields, and send none.
            fields = decode(detail or (b"{}" if json else b"\x80"), type=self.fields)
            return build_error(self.cls, message, msgspec.structs.asdict(fields))
        except _CODEC_ERRORS as error:
            fault = invalid_value(error)
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        raise InvalidResponse(f"{self.name}: {fault}")


_error_types: dict[type[Error], ErrorType] = {}


def error_type(cls: type[Error]) -> ErrorType:
    """The codec of a class of errors; made once."""
    known = _error_types.get(cls)
    if known is None:
        known = _error_types[cls] = ErrorType(cls)
    return known


_FIRST_ITEM = COUNT.size


class ItemType:
    """The items of a stream: what their annotation says, and their codec.

    :ivar type: the annotation.
    """

    def __init__(self, annotation: Any, where: str) -> None:
        self.type: Any = annotation
        self._array: Any = list[annotation]
        _check_type(self._array, where)
        try:
            self._decode = msgspec.msgpack.Decoder(self._array).decode
        except TypeError as error:
            raise TypeError(f"{where}: {error}") from None
        self._bounds = bounds_of(self._array)

    @functools.cached_property
    def _decode_json(self) -> Callable[[bytes], list[Any]]:
        return msgspec.json.Decoder(self._array).decode

    def decode(self, message: bytes, count: int, max_nesting: int, *, json: bool = False) -> list[Any]:
        """The items of an ITEM.

        :raises InvalidArgument: they are not what the annotation says, or not as many as was said.
        :raises Exception: what a type of the user's raises, in ``__post_init__``, say.
        """
        octets = behind(message, _FIRST_ITEM)
        try:
            if self._bounds is not _TYPED:
                # The array around them is this package's.
                (check_json if json else check_msgpack)(octets, max_nesting + 1, self._bounds)
            items = self._decode_json(octets) if json else self._decode(octets)
        except _CODEC_ERRORS as error:
            raise invalid_argument(error) from None
        if len(items) != count:
            raise InvalidArgument(f"{len(items)} items where {count} were announced")
        return items


class Method:
    """One method of a Protocol.

    :ivar protocol: the name of the Protocol that declares it.
    :ivar name: its name there.
    :ivar full_name: ``protocol.name``.
    :ivar wire_name: the same, as it travels.
    :ivar function: what serves it; ``None`` for a declaration alone.
    :ivar json: whether it is called with JSON texts; it is not, see `protoframe._calling.JSONMethod`.
    :ivar invoke: calls the function, with the Protocol and what `decode_arguments` gave.
    :ivar doc: its docstring.
    :ivar parameters: a Struct of its parameters, but for one that is a stream.
    :ivar result: the type of its result; of its items, where that is a stream.
    :ivar items: the items of its result, where that is a stream.
    :ivar sends: the name of the parameter that is a stream, where there is one.
    :ivar sends_at: its place among the parameters.
    :ivar sent_items: the items of that.
    :ivar flags: what a REQUEST of it has.
    :ivar permissions: what a peer must be permitted to call it.
    :ivar decode_typed: decodes a result that needs no look before; `decode_result` says what is wrong with one that it
        does not take.
    :ivar is_ordinary: whether a caller has nothing to heed but the defaults: no stream, no size, no timeout.
    :ivar is_plain: whether it is served, and nothing is asked of a call but arguments that fit: no permission, no
        stream, no size.
    :raises TypeError: the signature cannot travel; the text says where and why.
    """

    def __init__(
        self,
        protocol: str,
        name: str,
        function: Callable[..., Any],
        options: RequestOptions,
        permissions: frozenset[str] = frozenset(),
    ) -> None:
        self.protocol = protocol
        self.name = name
        self.options = options
        self.doc = inspect.getdoc(function) or ""
        self.full_name = where = f"{protocol}.{name}"
        self.wire_name = where.encode()
        if len(self.wire_name) > 255:
            raise TypeError(f"{where}: the name is {len(self.wire_name)} octets long, and 255 are allowed")
        hints = _hints(function, where)
        self.function = None if is_declaration(function, hints) else function
        self.parameters, positional, keywords, sends = _parameters(function, hints, where)
        self.sends = sends.name if sends is not None else None
        self.sends_at = positional if sends is None or sends.position is None else sends.position
        if sends is not None:
            self.invoke = _with_stream(function, positional, keywords, sends)
        else:
            self.invoke = _by_keyword(function, positional, keywords) if keywords else function
        self.sent_items = ItemType(sends.item, f"{where}: parameter {sends.name}") if sends is not None else None
        self.result, is_stream = _result_type(hints, where)
        self.items = ItemType(self.result, f"{where}: result") if is_stream else None
        if options.oneway and (self.result is not type(None) or is_stream or sends is not None):
            raise TypeError(f"{where}: a oneway request has no result (-> None), and no streams")
        self.flags = int(
            (Flag.ITEMS if sends is not None else 0)
            | (Flag.STREAM if is_stream else 0)
            | (Flag.ONEWAY if options.oneway else 0)
        )
        self.permissions = permissions
        self.is_ordinary = not self.flags and options.max_size is None and options.timeout is None
        self.is_plain = not self.flags and not permissions and options.max_size is None and self.function is not None
        self.errors: Mapping[str, ErrorType] = {cls.__name__: error_type(cls) for cls in options.raises}
        _check_type(self.parameters, where)
        try:
            self._decode_arguments = msgspec.msgpack.Decoder(self.parameters).decode
            self._decode_result = msgspec.msgpack.Decoder(self.result).decode
        except TypeError as error:
            raise TypeError(f"{where}: {error}") from None
        _check_type(self.result, f"{where}: result")
        self.json = False
        self.argument_bounds = bounds_of(self.parameters)
        self.result_bounds = bounds_of(self.result)
        self.decode_typed: Callable[[bytes], Any] | None = None
        if self.result_bounds is _TYPED:
            self.decode_typed = self._decode_result

    def __repr__(self) -> str:
        return f"<Method {self.protocol}.{self.name}>"

    @functools.cached_property
    def _decode_json_arguments(self) -> Callable[[bytes], msgspec.Struct]:
        return msgspec.json.Decoder(self.parameters).decode

    def decode_arguments(self, octets: bytes, max_nesting: int, *, json: bool = False) -> tuple[Any, ...]:
        """The arguments of a call, in the order of the parameters.

        :raises InvalidArgument: they are not what the annotations say; the text opens with the path of the fault.
        """
        try:
            if self.argument_bounds is _TYPED and not json:
                decode = self._decode_arguments
                return _astuple(decode(octets))
            if self.argument_bounds is not _TYPED:
                check = check_json if json else check_msgpack
                check(octets, max_nesting, self.argument_bounds)
            return _astuple(self._decode_json_arguments(octets) if json else self._decode_arguments(octets))
        except _CODEC_ERRORS as error:
            raise invalid_argument(error) from None

    def decode_result(self, octets: bytes, max_nesting: int) -> Any:
        """A result.

        :raises InvalidResponse: it is not what the annotation says; the text opens with the path of the fault.
        """
        try:
            if self.result_bounds is not _TYPED:
                check_msgpack(octets, max_nesting, self.result_bounds)
            decode = self._decode_result
            return decode(octets)
        except _CODEC_ERRORS as error:
            fault = invalid_value(error)
        except Exception as error:
            # A type of the user's that fails in a way of its own, in ``__post_init__``, say.
            fault = f"{type(error).__name__}: {error}"
        raise InvalidResponse(f"the answer of {self.full_name} is not what was declared: {fault}")

    def error_for(self, error: BaseException) -> ErrorType | None:
        """The declared error that an exception is, the narrowest; ``None`` for an undeclared one."""
        if self.errors:
            for cls in type(error).__mro__:
                declared = self.errors.get(cls.__name__)
                if declared is not None and declared.cls is cls:
                    return declared
        return None


def protocol_name(cls: type) -> str:
    """The name of a Protocol on the wire: its class's, unless ``class X(Protocol, name="...")`` gives another."""
    name: str = cls.__dict__.get(NAME) or cls.__name__
    return name


#: Made once for each class.
_methods: dict[type, Mapping[str, Method]] = {}


def methods_of(cls: type) -> Mapping[str, Method]:
    """The methods of a Protocol, by their Python names, those of its bases first.

    A method belongs to the class that declared it first, and travels under that class's name; a subclass serves it by
    defining it again, with or without ``@request``.

    :raises TypeError: a signature cannot travel; the text says where and why.
    """
    known = _methods.get(cls)
    if known is not None:
        return known
    owners: dict[str, type] = {}
    for base in reversed(cls.__mro__):
        for name, value in base.__dict__.items():
            if hasattr(value, MARK):
                owners.setdefault(name, base)
            elif hasattr(getattr(value, "__func__", None) or getattr(value, "fget", None), MARK):
                raise TypeError(f"{base.__name__}.{name}: a request is a plain method")
    methods: dict[str, Method] = {}
    for name, owner in owners.items():
        function = inspect.getattr_static(cls, name)
        if not inspect.isfunction(function):
            raise TypeError(f"{cls.__name__}.{name}: {owner.__name__} declares a request, and this is no plain method")
        if name in RESERVED or name.startswith("_"):
            raise TypeError(f"{cls.__name__}.{name}: a request cannot have this name, which protoframe uses itself")
        methods[name] = Method(protocol_name(owner), name, function, _options(cls, name), _permissions(cls, name))
    _methods[cls] = methods
    return methods


def wire_names(cls: type, method: Method) -> list[str]:
    """The names under which a Protocol serves a method: that of the class which declares it, and of the ones below."""
    names: dict[str, None] = {}
    for base in cls.__mro__:
        if any(hasattr(vars(above).get(method.name), MARK) for above in base.__mro__):
            names[f"{protocol_name(base)}.{method.name}"] = None
    return list(names)


def _options(cls: type, name: str) -> RequestOptions:
    """The options of the nearest definition that is decorated."""
    for base in cls.__mro__:
        options = getattr(base.__dict__.get(name), MARK, None)
        if isinstance(options, RequestOptions):
            return options
    raise TypeError(f"{cls.__name__}.{name} is no request")


def _permissions(cls: type, name: str) -> frozenset[str]:
    """What a peer must be permitted: all that any class above asks for, of its methods or of this one.

    No subclass takes a permission away, whatever it overrides.
    """
    asked = set()
    for base in cls.__mro__:
        options = getattr(base.__dict__.get(name), MARK, None)
        asked |= {base.__dict__.get(PERMISSION), options.permission if options is not None else None}
    return frozenset(permission for permission in asked if permission is not None)


def _hints(thing: Any, where: str) -> dict[str, Any]:
    try:
        return typing.get_type_hints(thing, include_extras=True)
    except NameError as error:
        raise TypeError(f"{where}: an annotation cannot be resolved: {error}") from None
    except TypeError as error:
        raise TypeError(f"{where}: {error}") from None


class _Sends(typing.NamedTuple):
    """A parameter that is a stream: its name, its place among those by position, and what its items are."""

    name: str
    position: int | None
    item: Any


def _parameters(
    function: Callable[..., Any],
    hints: Mapping[str, Any],
    where: str,
) -> tuple[type[msgspec.Struct], int, tuple[str, ...], _Sends | None]:
    """A Struct of the parameters, how many go by position, the names of those that go by keyword, and the stream."""
    by_position: list[Any] = []
    by_keyword: list[Any] = []
    sends: _Sends | None = None
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters or parameters[0].kind not in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    ):
        raise TypeError(f"{where}: a request is a method, and its first parameter is self")
    for parameter in parameters[1:]:
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            raise TypeError(f"{where}: *{parameter.name} cannot travel; arguments go by name")
        if parameter.name not in hints:
            raise TypeError(f"{where}: parameter {parameter.name} has no annotation")
        hint = hints[parameter.name]
        item = _item_of(hint, f"{where}: parameter {parameter.name}")
        if item is not None:
            if sends is not None:
                raise TypeError(f"{where}: {sends.name} and {parameter.name} are streams, and a call sends one at most")
            if parameter.default is not inspect.Parameter.empty:
                raise TypeError(f"{where}: parameter {parameter.name}: a stream has no default")
            keyword = parameter.kind is inspect.Parameter.KEYWORD_ONLY
            sends = _Sends(parameter.name, None if keyword else len(by_position), item[0])
            continue
        _refuse_what_cannot_be_held_to(hint, f"{where}: parameter {parameter.name}")
        field: Any = (parameter.name, hint)
        if parameter.default is not inspect.Parameter.empty:
            field = (parameter.name, hint, _default(parameter.default))
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            by_keyword.append(field)
        else:
            by_position.append(field)
    struct = _struct(function.__name__, by_position, by_keyword, where)
    return struct, len(by_position), tuple(name for name, *_ in by_keyword), sends


def _by_keyword(function: Callable[..., Any], positional: int, keywords: tuple[str, ...]) -> Callable[..., Any]:
    def invoke(protocol: object, *arguments: Any) -> Any:
        named = dict(zip(keywords, arguments[positional:], strict=True))
        return function(protocol, *arguments[:positional], **named)

    return invoke


def _with_stream(
    function: Callable[..., Any],
    positional: int,
    keywords: tuple[str, ...],
    sends: _Sends,
) -> Callable[..., Any]:
    """Calls a function with what `Method.decode_arguments` gave, and the stream behind it."""

    def invoke(protocol: object, *arguments: Any) -> Any:
        *arguments_, stream = arguments
        by_position = arguments_[:positional]
        named = dict(zip(keywords, arguments_[positional:], strict=True))
        if sends.position is None:
            named[sends.name] = stream
        else:
            by_position.insert(sends.position, stream)
        return function(protocol, *by_position, **named)

    return invoke


def _struct(name: str, by_position: Any, by_keyword: Any, where: str) -> type[msgspec.Struct]:
    try:
        # The module tells Structs of one name apart where they are described together.
        struct = msgspec.defstruct(name, by_position, module=where)
        if by_keyword:
            struct = msgspec.defstruct(name, by_keyword, bases=(struct,), kw_only=True, module=where)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{where}: {error}") from None
    return struct


def _default(value: Any) -> Any:
    """A default as msgspec takes it; what could be changed is copied for each call."""
    if isinstance(value, _IMMUTABLE):
        return value
    return msgspec.field(default_factory=functools.partial(copy.deepcopy, value))


def _result_type(hints: Mapping[str, Any], where: str) -> tuple[Any, bool]:
    """The type of a result, or of the items of a stream, and whether it is one."""
    if "return" not in hints:
        raise TypeError(f"{where}: no result type; annotate it (-> None for none)")
    result = hints["return"]
    origin = typing.get_origin(result)
    arguments = typing.get_args(result)
    if origin is collections.abc.Coroutine and len(arguments) == 3:
        result = arguments[2]
    elif origin is collections.abc.Awaitable or _is_deferred(origin):
        result = arguments[0]
    elif _is_deferred(result):
        raise TypeError(f"{where}: a Deferred of what? annotate it (-> Deferred[str])")
    item = _item_of(result, f"{where}: result")
    if item is not None:
        return item[0], True
    _refuse_what_cannot_be_held_to(result, f"{where}: result")
    return result, False


def _is_deferred(cls: Any) -> bool:
    # By name: this package does not import Twisted.
    return getattr(cls, "__module__", "") == "twisted.internet.defer" and getattr(cls, "__name__", "") == "Deferred"


def _refuse_what_cannot_be_held_to(hint: Any, where: str) -> None:
    if isinstance(hint, typing.TypeVar) or getattr(hint, "__parameters__", None):
        raise TypeError(f"{where}: {hint} leaves a type open, and values could not be held to it")


_STREAMS = (collections.abc.AsyncIterator, collections.abc.AsyncIterable, collections.abc.AsyncGenerator)


def _item_of(hint: Any, where: str) -> tuple[Any] | None:
    """What the items of a stream are, as a tuple of one; ``None`` for what is no stream."""
    if hint in _STREAMS:
        raise TypeError(f"{where}: a stream of what? annotate it (AsyncIterator[str])")
    if typing.get_origin(hint) not in _STREAMS:
        return None
    (item, *_) = typing.get_args(hint)
    _refuse_what_cannot_be_held_to(item, where)
    if _item_of(item, where) is not None:
        raise TypeError(f"{where}: the items of a stream cannot be streams")
    return (item,)


def _check_type(annotation: Any, where: str) -> None:
    """
    :raises TypeError: msgspec does not know how a value of the type travels.
    """
    try:
        msgspec.json.schema(annotation, schema_hook=_refuse_custom)
    except TypeError as error:
        raise TypeError(f"{where}: {error}") from None
    except (NameError, ValueError) as error:
        raise TypeError(f"{where}: {error}") from None


def _refuse_custom(cls: Any) -> Any:
    raise TypeError(f"{cls!r} is no type that can travel; use a Struct, a dataclass or another type that msgspec knows")


def invalid_argument(error: Exception) -> InvalidArgument:
    """What a codec said of an argument, as an error of this package's."""
    cls = NestedTooDeep if isinstance(error, RecursionError | TooDeep) else InvalidArgument
    return cls(invalid_value(error))


def invalid_value(error: Exception) -> str:
    """What is wrong with a value, path first: ``$.ttl: expected int, got str``."""
    if isinstance(error, RecursionError):
        return "$: nested too deep"
    if isinstance(error, UnicodeDecodeError):
        return "$: text is not UTF-8"
    text, found, place = str(error).rpartition(" - at ")
    if not found:
        text, place = place, "$"
    # The place is "`$.a`", or "`key` in `$.a`".
    key, _, path = place.replace("`", "").rpartition(" in ")
    missing = "Object missing required field `"
    if text.startswith(missing):
        return f"{path}.{text[len(missing) :].rstrip('`')}: missing"
    if not text[1:2].isupper() and not text.startswith("MessagePack"):
        text = text[0].lower() + text[1:]
    return f"{path}: {'key: ' if key else ''}{text.replace('`', '')}"
