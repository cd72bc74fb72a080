"""``pf list``: what a server serves, a line for each method.

Knows how that is laid out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from protoframe.cli.completing import complete_where
from protoframe.cli.options import Settings, check_where, shared
from protoframe.cli.output import pad, style_for, width, write_json, write_text
from protoframe.cli.problems import STATUSES, clean

if TYPE_CHECKING:
    from protoframe.reflection import MethodDescription, ProtocolDescription

__all__ = ["list_"]

#: Columns; a longer signature does not push what is said of the others to the right.
_WIDEST = 48


@click.command("list", epilog=STATUSES)
@click.argument("where", callback=check_where, shell_complete=complete_where)
@shared
def list_(where: str, timeout: float, token_file: str, json: bool, quiet: bool) -> None:
    """List the Protocols that a server serves, and their methods.

    With --json, a line with an array of objects, as `pf describe --json` has them: name, doc, definitions and methods,
    each with name, signature, doc, parameters, result, errors, options and JSON Schemas.

    \b
    Examples:
      pf list tcp:127.0.0.1:12000
      pf list --json tcp:127.0.0.1:12000 | jq -r '.[].methods[].name'
    """
    import sys

    from protoframe.cli.describing import describe, protocol_names
    from protoframe.cli.running import Target, converse, read_token, run

    settings = Settings(timeout, json, quiet, read_token(token_file))
    target = Target(where)

    async def session(reactor: Any) -> list[ProtocolDescription]:
        async with converse(reactor, target, settings) as connecting:
            return await describe(connecting, await protocol_names(connecting, target))

    protocols = run(session, target, settings)
    if json:
        import msgspec

        write_json(msgspec.json.encode(protocols).decode())
        return
    style = style_for(sys.stdout)
    blocks = []
    for protocol in protocols:
        lines = [f"{style.bold(clean(protocol.name))}  {style.dim(_first_line(protocol.doc))}".rstrip()]
        signatures = [clean(method.signature) for method in protocol.methods]
        column = max((width(signature) for signature in signatures if width(signature) <= _WIDEST), default=0)
        for method, signature in zip(protocol.methods, signatures, strict=True):
            padded = pad(signature, column)
            lines.append(f"  {padded}  {style.dim(_said_of(method))}".rstrip())
        blocks.append("\n".join(lines))
    write_text("\n\n".join(blocks))


def _said_of(method: MethodDescription) -> str:
    marks = ["oneway"] if method.oneway else []
    if method.permissions:
        marks.append(f"permission: {', '.join(method.permissions)}")
    said = f"[{'; '.join(marks)}] " if marks else ""
    return clean(said) + _first_line(method.doc)


def _first_line(doc: str) -> str:
    return clean(doc.strip().partition("\n")[0].strip())
