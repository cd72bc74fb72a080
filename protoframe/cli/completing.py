"""What the shell may complete: the server is asked what it serves.

Knows the parameters of the commands.  A completion is a courtesy: it takes a second at most, and what fails, fails in
silence.
"""

from __future__ import annotations

import os
import re
import shlex
from typing import TYPE_CHECKING, Any, TypeAlias

import click
from click.shell_completion import CompletionItem

from protoframe.cli.options import Settings
from protoframe.cli.problems import clean
from protoframe.cli.schemas import takes_bytes, takes_text, values_of

if TYPE_CHECKING:
    from protoframe.reflection import ProtocolDescription

__all__ = ["STEM", "complete_argument", "complete_method", "complete_name", "complete_where"]

#: As a string, for the class takes a type from click 8.3 on alone.
Items: TypeAlias = "list[CompletionItem[str]]"

#: The type of an item that goes on: the shell puts no space behind it.
STEM = "stem"

_SECONDS = 1.0
#: What a shell takes as it stands.  A name from a server reaches the command line: nothing else may.
_NAME = re.compile(r"\w+(?:\.\w+)*")
_VALUE = re.compile(r"[\w.+-]+")


def complete_where(context: click.Context, parameter: click.Parameter, incomplete: str) -> Items:
    """The kinds of addresses."""
    del context, parameter
    kinds = {"tcp:": "host:port", "tls:": "host:port", "udp:": "host:port", "unix:": "path"}
    return [CompletionItem(kind, type=STEM, help=rest) for kind, rest in kinds.items() if kind.startswith(incomplete)]


def complete_method(context: click.Context, parameter: click.Parameter, incomplete: str) -> Items:
    """The methods, as ``Protocol.method``."""
    del parameter
    return [
        CompletionItem(f"{protocol.name}.{method.name}", help=_help(method.doc))
        for protocol in _ask(context, None)
        for method in protocol.methods
        if f"{protocol.name}.{method.name}".startswith(incomplete) and _NAME.fullmatch(f"{protocol.name}.{method.name}")
    ]


def complete_name(context: click.Context, parameter: click.Parameter, incomplete: str) -> Items:
    """The Protocols, and where the name of one stands, its methods."""
    protocols = [
        CompletionItem(protocol.name, help=_help(protocol.doc))
        for protocol in _ask(context, None)
        if protocol.name.startswith(incomplete) and _NAME.fullmatch(protocol.name)
    ]
    if len(protocols) > 1:
        return protocols
    return protocols + complete_method(context, parameter, incomplete)


def complete_argument(context: click.Context, parameter: click.Parameter, incomplete: str) -> Items:
    """The parameters that are not given yet; then files, and the values of a parameter that has few."""
    del parameter
    name, sign, value = _split(incomplete)
    if sign == "@":
        return [CompletionItem(f"{name}@{path}", type=kind) for path, kind in _files(value)]
    called = str(context.params.get("method") or "")
    protocol_name, _, method_name = called.rpartition(".")
    given = {_split(word)[0] for word in context.params.get("arguments") or ()}
    for protocol in _ask(context, protocol_name):
        for method in protocol.methods:
            if method.name != method_name:
                continue
            properties = method.arguments_schema.get("properties", {})
            if sign:
                return _values(name, sign, value, properties.get(name), protocol)
            return [
                CompletionItem(
                    one.name + ("@" if one.stream else _sign(properties.get(one.name), protocol)),
                    type=STEM,
                    help=_help(one.type),
                )
                for one in method.parameters
                if one.name.startswith(name) and one.name not in given and _NAME.fullmatch(one.name)
            ]
    return []


def _split(word: str) -> tuple[str, str, str]:
    match = re.match(r"(\w*)(:=|=|@|:?$)(.*)", word, re.DOTALL)
    return (match[1], match[2].rstrip(":"), match[3]) if match is not None else (word, "", "")


def _sign(schema: Any, protocol: ProtocolDescription) -> str:
    if takes_bytes(schema, protocol.definitions):
        return "@"
    return "=" if takes_text(schema, protocol.definitions) else ":="


def _values(name: str, sign: str, value: str, schema: Any, protocol: ProtocolDescription) -> Items:
    texts = []
    for one in values_of(schema, protocol.definitions):
        if isinstance(one, str):
            if sign == "=":
                texts.append(one)
        elif sign == ":=" and isinstance(one, bool | int):
            texts.append(str(one).lower())
    fitting = [text for text in texts if text.startswith(value) and _VALUE.fullmatch(text)]
    return [CompletionItem(f"{name}{sign}{text}") for text in fitting]


def _files(value: str) -> list[tuple[str, str]]:
    """The files that a path may go on to; those whose names a shell would have to quote are left out."""
    beginning = value.rpartition("/")[2]
    prefix = value[: len(value) - len(beginning)]
    try:
        entries = sorted(os.scandir(os.path.expanduser(prefix) or "."), key=lambda entry: entry.name)
    except OSError:
        return []
    return [
        (f"{prefix}{entry.name}/", STEM) if entry.is_dir() else (f"{prefix}{entry.name}", "plain")
        for entry in entries
        if entry.name.startswith(beginning) and shlex.quote(entry.name) == entry.name
        if beginning.startswith(".") or not entry.name.startswith(".")
    ]


def _help(doc: str) -> str:
    return clean(doc.strip().partition("\n")[0])


def _ask(context: click.Context, protocol: str | None) -> list[ProtocolDescription]:
    """The descriptions of one Protocol or of all; none where the server cannot be asked."""
    where = context.params.get("where")
    if not where:
        return []
    try:
        return _descriptions(where, protocol, context.params.get("token_file"))
    except Exception:
        return []


_asked: dict[tuple[str, str | None], list[ProtocolDescription]] = {}


def _descriptions(where: str, protocol: str | None, token_file: str | None) -> list[ProtocolDescription]:
    from protoframe.cli.describing import describe, protocol_names
    from protoframe.cli.running import Target, converse, read_token, run

    # A reactor runs once in a process.
    if (where, protocol) in _asked:
        return _asked[where, protocol]
    settings = Settings(_SECONDS, quiet=True, token=read_token(token_file))
    target = Target(where)

    async def session(reactor: Any) -> list[ProtocolDescription]:
        async with converse(reactor, target, settings) as connecting:
            names = [protocol] if protocol is not None else await protocol_names(connecting, target)
            return await describe(connecting, names)

    _asked[where, protocol] = run(session, target, settings)
    return _asked[where, protocol]
