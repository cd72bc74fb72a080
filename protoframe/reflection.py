"""Reflection: a server describes what it serves, to ``pf`` and to whoever asks.

Knows how methods are described; it is a `Protocol` like any other, which each `Factory` serves unless told not to.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from protoframe._protocol import Protocol, request
from protoframe.core.schema import Method, methods_of, protocol_name, wire_names
from protoframe.errors import NotFound

__all__ = [
    "ErrorDescription",
    "MethodDescription",
    "ParameterDescription",
    "ProtocolDescription",
    "Reflection",
    "describe",
]

#: A JSON Schema (draft 2020-12).
JSONSchema = dict[str, Any]


class ParameterDescription(msgspec.Struct, frozen=True):
    """A parameter: its name, its type as Python writes it, whether a call must give it, and whether it is a stream."""

    name: str
    type: str
    required: bool
    default: Any = None
    stream: bool = False


class ErrorDescription(msgspec.Struct, frozen=True):
    """An error that a method declares: its name, status, docstring, and the schema of its fields."""

    name: str
    status: int
    doc: str
    schema: JSONSchema


class MethodDescription(msgspec.Struct, frozen=True):
    """A method: what it is called with, what it answers, and what its schemas say."""

    name: str
    signature: str
    doc: str
    parameters: list[ParameterDescription]
    result: str
    errors: list[ErrorDescription]
    idempotent: bool
    timeout: float | None
    max_size: int | None
    arguments_schema: JSONSchema
    result_schema: JSONSchema
    #: Whether the result is a stream; the schema of the result is then that of its items.
    stream: bool = False
    #: The schema of the items of the parameter that is a stream, where there is one.
    items_schema: JSONSchema | None = None
    oneway: bool = False
    permissions: list[str] = []


class ProtocolDescription(msgspec.Struct, frozen=True):
    """A Protocol: its methods, and the definitions that their schemas refer to (``#/$defs/...``)."""

    name: str
    doc: str
    methods: list[MethodDescription]
    definitions: dict[str, JSONSchema]


class Reflection(Protocol[Any], name="protoframe.Reflection"):
    """What this server serves."""

    @request(idempotent=True)
    async def protocols(self) -> list[str]:
        """The names of the Protocols that are served, sorted."""
        return sorted(_served(self.factory.protocols))

    @request(idempotent=True, raises=[NotFound])
    async def describe(self, protocol: str) -> ProtocolDescription:
        """Describes a Protocol that is served."""
        served = _served(self.factory.protocols, aliases=True)
        if protocol not in served:
            known = ", ".join(await self.protocols())
            raise NotFound(f"no Protocol {protocol} is served here; there is {known}")
        doc, methods = served[protocol]
        return describe(protocol, doc, methods)


def describe(name: str, doc: str, methods: Sequence[Method]) -> ProtocolDescription:
    """Describes methods of one Protocol."""
    types: list[Any] = []
    for method in methods:
        types += [method.parameters, method.result]
        types += [method.sent_items.type] if method.sent_items is not None else []
        types += [*(error.fields for error in method.errors.values())]
    schemas, definitions = msgspec.json.schema_components(types)
    schema_of = iter(schemas)

    own: dict[str, JSONSchema] = {}

    def inline() -> JSONSchema:
        # What msgspec was given is a Struct of the framework's making: its schema stands here, not among the
        # definitions. An error that several methods declare comes by several times.
        schema = next(schema_of)
        name = schema.get("$ref", "").rpartition("/")[2]
        if name in definitions:
            own[name] = definitions.pop(name)
        return own.get(name, schema)

    descriptions = []
    for method in methods:
        arguments_schema = inline()
        result_schema = next(schema_of)
        items_schema = next(schema_of) if method.sent_items is not None else None
        descriptions.append(
            MethodDescription(
                name=method.name,
                signature=f"{method.name}({_parameters_text(method)}) -> {_result_name(method)}",
                doc=method.doc,
                parameters=_parameters(method),
                result=_result_name(method),
                errors=[
                    ErrorDescription(error.name, int(error.cls.status), inspect.getdoc(error.cls) or "", inline())
                    for error in method.errors.values()
                ],
                idempotent=method.options.idempotent,
                timeout=method.options.timeout,
                max_size=method.options.max_size,
                arguments_schema=arguments_schema,
                result_schema=result_schema,
                stream=method.items is not None,
                items_schema=items_schema,
                oneway=method.options.oneway,
                permissions=sorted(method.permissions),
            ),
        )
    return ProtocolDescription(name, doc, descriptions, definitions)


def type_name(annotation: Any) -> str:
    """A type as Python writes it, without the names of modules."""
    if annotation is None or annotation is type(None):
        return "None"
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", inspect.formatannotation(annotation))


def _served(
    protocols: Iterable[type[Protocol[Any]]],
    *,
    aliases: bool = False,
) -> dict[str, tuple[str, list[Method]]]:
    """By the name of each Protocol that declares something served here: its docstring and those methods.

    :param aliases: also by the names of subclasses, under which the same methods can be called.
    """
    served: dict[str, tuple[str, list[Method]]] = {}
    for protocol in protocols:
        docs = {protocol_name(base): inspect.cleandoc(base.__doc__ or "") for base in protocol.__mro__}
        for method in methods_of(protocol).values():
            if method.function is not None:
                names = wire_names(protocol, method) if aliases else [method.full_name]
                for owner in [name.rpartition(".")[0] for name in names]:
                    served.setdefault(owner, (docs[owner], []))[1].append(method)
    return served


def _result_name(method: Method) -> str:
    name = type_name(method.result)
    return name if method.items is None else f"AsyncIterator[{name}]"


def _parameters(method: Method) -> list[ParameterDescription]:
    parameters = [
        ParameterDescription(
            field.name,
            type_name(field.type),
            field.required,
            None if field.required else _shown(_default(field)),
        )
        for field in msgspec.structs.fields(method.parameters)
    ]
    if method.sends is not None and method.sent_items is not None:
        sent = ParameterDescription(
            method.sends, f"AsyncIterator[{type_name(method.sent_items.type)}]", True, stream=True
        )
        parameters.insert(method.sends_at, sent)
    return parameters


def _parameters_text(method: Method) -> str:
    defaults = {
        field.name: f" = {_default(field)!r}"
        for field in msgspec.structs.fields(method.parameters)
        if not field.required
    }
    return ", ".join(f"{one.name}: {one.type}{defaults.get(one.name, '')}" for one in _parameters(method))


def _shown(default: Any) -> Any:
    """A default as it can travel; ``None`` for one that cannot, such as `msgspec.UNSET`."""
    try:
        return msgspec.to_builtins(default, str_keys=True)
    except (TypeError, ValueError):
        return None


def _default(field: msgspec.structs.FieldInfo) -> Any:
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return field.default
