"""What JSON Schemas (draft 2020-12) say of types, as msgspec writes them.

Knows the few keywords that msgspec uses; a schema comes from a server, so nothing in it is taken for granted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["Fields", "fields_of", "reachable", "resolve", "takes_bytes", "takes_text", "type_text", "values_of"]

Schemas = Mapping[str, Any]
#: Of each field: its name, its type, and whether it is required or what its default is.
Fields = list[tuple[str, str, str]]

_NAMES = {"integer": "int", "number": "float", "boolean": "bool", "null": "None", "object": "dict", "string": "str"}
_FORMATS = {
    "date-time": "datetime",
    "date": "date",
    "time": "time",
    "duration": "timedelta",
    "uuid": "UUID",
    "decimal": "Decimal",
}
_DEEPEST = 16


def resolve(schema: Any, definitions: Schemas) -> dict[str, Any]:
    """A schema, with a reference followed to what it names."""
    for _ in range(_DEEPEST):
        if not isinstance(schema, dict):
            return {}
        name = _referred(schema)
        if name is None:
            return schema
        schema = definitions.get(name)
    return {}


def alternatives(schema: Any, definitions: Schemas, depth: int = 0) -> Iterable[dict[str, Any]]:
    """The schemas of which a value meets one."""
    schema = resolve(schema, definitions)
    options = schema.get("anyOf")
    if not isinstance(options, list) or depth > _DEEPEST:
        yield schema
        return
    for option in options:
        yield from alternatives(option, definitions, depth + 1)


def takes_bytes(schema: Any, definitions: Schemas) -> bool:
    """Whether a value is bytes, which JSON carries as base64."""
    return any(one.get("contentEncoding") == "base64" for one in alternatives(schema, definitions))


def takes_text(schema: Any, definitions: Schemas) -> bool:
    """Whether a JSON string will do."""
    return any(
        one.get("type") == "string" or any(isinstance(value, str) for value in _enum(one))
        for one in alternatives(schema, definitions)
    )


def values_of(schema: Any, definitions: Schemas) -> list[Any]:
    """All values of a type that has few: an enum, or a truth value."""
    values: list[Any] = []
    for one in alternatives(schema, definitions):
        values += _enum(one) or ([True, False] if one.get("type") == "boolean" else [])
    return values


def fields_of(schema: Any) -> Fields:
    """The fields of an object."""
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(properties, dict):
        return []
    required = schema.get("required")
    names = required if isinstance(required, list) else []
    return [
        (name, type_text(field), "required" if name in names else _default(field)) for name, field in properties.items()
    ]


def type_text(schema: Any, depth: int = 0) -> str:
    """A type as Python writes it, or nearly."""
    if not isinstance(schema, dict) or depth > _DEEPEST:
        return "Any"
    name = _referred(schema)
    if name is not None:
        return name
    if isinstance(schema.get("anyOf"), list):
        return " | ".join(type_text(option, depth + 1) for option in schema["anyOf"])
    values = _enum(schema)
    if values:
        return " | ".join(json.dumps(value, ensure_ascii=False) for value in values)
    if schema.get("contentEncoding") == "base64":
        return "bytes"
    kind = schema.get("type")
    if kind == "array":
        return f"list[{type_text(schema.get('items', {}), depth + 1)}]" if "items" in schema else "list"
    if kind == "object":
        inner = schema.get("additionalProperties")
        return f"dict[str, {type_text(inner, depth + 1)}]" if isinstance(inner, dict) else "dict"
    if isinstance(schema.get("format"), str) and kind == "string":
        return _FORMATS.get(schema["format"], "str")
    return _NAMES.get(kind, "Any") if isinstance(kind, str) else "Any"


def reachable(schemas: Iterable[Any], definitions: Schemas) -> dict[str, Any]:
    """The definitions that schemas refer to, and those that these refer to, in the order of ``definitions``."""
    found: set[str] = set()
    waiting = list(schemas)
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            name = _referred(part)
            if name is not None and name in definitions and name not in found:
                found.add(name)
                waiting.append(definitions[name])
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
    return {name: schema for name, schema in definitions.items() if name in found}


def _referred(schema: Mapping[str, Any]) -> str | None:
    reference = schema.get("$ref")
    return re.sub(r"^#/\$defs/", "", reference) if isinstance(reference, str) else None


def _enum(schema: Mapping[str, Any]) -> list[Any]:
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) else []


def _default(field: Any) -> str:
    if isinstance(field, dict) and "default" in field:
        return f"default {json.dumps(field['default'], ensure_ascii=False)}"
    return "optional"
