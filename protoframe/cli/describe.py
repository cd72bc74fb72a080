"""``pf describe``: everything that a server says of its Protocols and methods.

Knows how that is laid out, and which description a name means.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from protoframe.cli.completing import complete_name, complete_where
from protoframe.cli.options import Settings, check_where, shared
from protoframe.cli.output import Style, pad, style_for, width, write_json, write_text
from protoframe.cli.problems import REMOTE, STATUSES, clean
from protoframe.cli.schemas import Fields, fields_of, reachable, type_text
from protoframe.errors import Status

if TYPE_CHECKING:
    from protoframe.cli.running import Target
    from protoframe.reflection import MethodDescription, ProtocolDescription

__all__ = ["describe"]


@click.command(epilog=STATUSES)
@click.argument("where", callback=check_where, shell_complete=complete_where)
@click.argument("name", metavar="[PROTOCOL[.METHOD]]", default="", shell_complete=complete_name)
@shared
def describe(where: str, name: str, timeout: float, token_file: str, json: bool, quiet: bool) -> None:
    """Describe what a server serves: all of it, a Protocol, or a method.

    With --json, one line: an array of Protocols, a Protocol, or a method, with JSON Schemas; what these refer to
    (#/$defs/...) stands under "definitions".

    A Protocol that is not served exits with 69 (not found), a method that a Protocol does not have with 76 (unknown
    method), as does a server that does not describe itself.

    \b
    Examples:
      pf describe tcp:127.0.0.1:12000 Speech.upper
      pf describe --json tcp:127.0.0.1:12000 Speech | jq .definitions
    """
    import sys

    from protoframe.cli import describing
    from protoframe.cli.running import Target, converse, read_token, run

    settings = Settings(timeout, json, quiet, read_token(token_file))
    target = Target(where, name)

    async def session(reactor: Any) -> tuple[list[ProtocolDescription], str]:
        async with converse(reactor, target, settings) as connecting:
            names = await describing.protocol_names(connecting, target)
            wanted, method = _wanted(name, names, target)
            return await describing.describe(connecting, wanted), method

    protocols, method_name = run(session, target, settings)
    if method_name:
        (protocol,) = protocols
        method = _method(protocol, method_name, target)
        if json:
            write_json(_method_json(protocol, method))
        else:
            write_text("\n".join(_method_lines(protocol, method, style_for(sys.stdout))))
        return
    if json:
        import msgspec

        write_json(msgspec.json.encode(protocols[0] if name else protocols).decode())
    else:
        write_text("\n\n\n".join("\n".join(_protocol_lines(one, style_for(sys.stdout))) for one in protocols))


def _wanted(name: str, served: list[str], target: Target) -> tuple[list[str], str]:
    """The Protocols that a name means, and the method, if it means one."""
    if not name:
        return served, ""
    if name in served:
        return [name], ""
    protocol, _, method = name.rpartition(".")
    if protocol in served:
        return [protocol], method
    text = f"no Protocol {protocol or name} is served there"
    raise target.problem(text, REMOTE + Status.NOT_FOUND, target.command("list"))


def _method(protocol: ProtocolDescription, name: str, target: Target) -> MethodDescription:
    for method in protocol.methods:
        if method.name == name:
            return method
    hint = target.command("describe", protocol.name)
    raise target.problem(f"there is no method {protocol.name}.{name}", REMOTE + Status.UNIMPLEMENTED, hint)


def _schemas(method: MethodDescription) -> list[Any]:
    errors = [error.schema for error in method.errors]
    return [method.arguments_schema, method.items_schema, method.result_schema, *errors]


def _method_json(protocol: ProtocolDescription, method: MethodDescription) -> str:
    import msgspec

    entries = {
        "protocol": protocol.name,
        **msgspec.structs.asdict(method),
        "definitions": reachable(_schemas(method), protocol.definitions),
    }
    return msgspec.json.encode(entries).decode()


def _protocol_lines(protocol: ProtocolDescription, style: Style) -> Iterable[str]:
    yield style.bold(clean(protocol.name))
    yield from _indented(protocol.doc, 2)
    for method in protocol.methods:
        yield ""
        yield from _method_body(protocol, method, style)
    yield from _definitions(protocol.definitions, style)


def _method_lines(protocol: ProtocolDescription, method: MethodDescription, style: Style) -> Iterable[str]:
    yield from _method_body(protocol, method, style)
    yield from _definitions(reachable(_schemas(method), protocol.definitions), style)


def _method_body(protocol: ProtocolDescription, method: MethodDescription, style: Style) -> Iterable[str]:
    name, parenthesis, rest = method.signature.partition("(")
    yield f"{style.bold(clean(f'{protocol.name}.{name}'))}{clean(parenthesis + rest)}"
    yield from _indented(method.doc, 2)
    if method.parameters:
        yield f"  {style.dim('Parameters')}"
        yield from _table(
            [
                (one.name, one.type, "required" if one.required else f"default {_json(one.default)}")
                for one in method.parameters
            ],
        )
    yield f"  {style.dim('Result')}"
    yield f"    {clean(method.result)}"
    if method.errors:
        yield f"  {style.dim('Errors')}"
    for error in method.errors:
        yield f"    {clean(error.name)}  (status {error.status}, exit {REMOTE + error.status})"
        yield from _indented(error.doc, 6)
        yield from _table(fields_of(error.schema), 6)
    yield f"  {style.dim('Options')}"
    timeout = "the caller's" if method.timeout is None else f"{method.timeout:g} s where the caller sets none"
    max_size = "as the connection allows" if method.max_size is None else f"{method.max_size} bytes"
    options = [
        ("idempotent", "yes" if method.idempotent else "no", ""),
        ("timeout", timeout, ""),
        ("max_size", max_size, ""),
    ]
    if method.oneway:
        options.append(("oneway", "yes", ""))
    if method.permissions:
        options.append(("permissions", ", ".join(method.permissions), ""))
    yield from _table(options)


def _definitions(definitions: dict[str, Any], style: Style) -> Iterable[str]:
    if not definitions:
        return
    yield ""
    yield style.dim("Types")
    for name, schema in definitions.items():
        fields = fields_of(schema)
        yield f"  {clean(name)}" if fields else f"  {clean(name)} = {clean(type_text(schema))}"
        yield from _table(fields)


def _table(rows: Fields, indent: int = 4) -> Iterable[str]:
    cells = [[clean(cell) for cell in row] for row in rows]
    columns = [max(map(width, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield (" " * indent + "  ".join(map(pad, row, columns))).rstrip()


def _indented(doc: str, indent: int) -> Iterable[str]:
    for line in doc.strip().splitlines():
        yield (" " * indent + clean(line)).rstrip()


def _json(value: Any) -> str:
    import msgspec

    return msgspec.json.encode(value).decode()
