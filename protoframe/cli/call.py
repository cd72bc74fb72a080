"""``pf call``: calls a method, and prints what it answers.

Knows how a call is put together; the types are the server's business, which is why no declaration is needed here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from protoframe.cli.arguments import Argument, compose, parse_arguments, read_content
from protoframe.cli.completing import complete_argument, complete_method, complete_where
from protoframe.cli.options import Settings, check_method, check_where, shared
from protoframe.cli.output import write_json
from protoframe.cli.problems import STATUSES
from protoframe.cli.schemas import takes_bytes

if TYPE_CHECKING:
    from protoframe import Connecting
    from protoframe.reflection import Reflection

__all__ = ["call"]


@click.command(epilog=STATUSES)
@click.argument("where", callback=check_where, shell_complete=complete_where)
@click.argument("method", metavar="PROTOCOL.METHOD", callback=check_method, shell_complete=complete_method)
@click.argument("arguments", metavar="[k=v | k:=json | k@file]...", nargs=-1, shell_complete=complete_argument)
@shared
def call(where: str, method: str, arguments: tuple[str, ...], timeout: float, json: bool, quiet: bool) -> None:
    """Call a method, and print its result as a line of JSON.

    Arguments go by name.  k=v gives a string, k:=json any JSON value, k@file the content of a file (k@- reads standard
    input): as base64 where the parameter takes bytes, and as text where it does not.

    \b
    WHERE is tcp:host:port, tls:host:port, unix:path or any other
    client endpoint string of Twisted.

    \b
    Examples:
      pf call tcp:127.0.0.1:12000 Speech.upper text=hello
      pf call unix:/run/bank.sock Bank.pay to=ann cents:=1250
      pf call tcp:files.lan:12000 Files.put name=a.png content@a.png
    """
    # Imported here, as in every command: `pf --help` need not know of errors, the reactor and so on.
    from protoframe.cli.running import Target, converse, run

    del json  # A result is JSON in any case.
    given = parse_arguments(arguments)
    for argument in given:
        read_content(argument)
    settings = Settings(timeout, True, quiet)
    target = Target(where, method)

    async def session(reactor: Any) -> str:
        async with converse(reactor, target, settings) as connecting:
            octets = compose(given, await _parameter_types(connecting, method, given))
            return _text(await connecting.connection.call_json(method, octets))

    write_json(run(session, target, settings))


async def _parameter_types(
    connecting: Connecting[Reflection],
    method: str,
    given: list[Argument],
) -> Callable[[str], bool | None]:
    """Tells of a parameter whether it takes bytes, ``None`` where the server does not say.

    The server is asked where there is a file to send, and not else.
    """
    from protoframe.cli.describing import describe
    from protoframe.errors import NotFound, UnknownMethod

    if all(argument.json is not None for argument in given):
        return lambda _: None
    protocol, _, name = method.rpartition(".")
    try:
        (description,) = await describe(connecting, [protocol])
    except (NotFound, UnknownMethod):
        return lambda _: None
    for one in description.methods:
        if one.name == name:
            properties = one.arguments_schema.get("properties", {})
            return lambda parameter: takes_bytes(properties.get(parameter), description.definitions)
    return lambda _: None


def _text(octets: bytes) -> str:
    """A result as one line of JSON.

    :raises InvalidResponse: it is not JSON.
    """
    import msgspec

    from protoframe.errors import InvalidResponse

    try:
        msgspec.json.decode(octets, type=msgspec.Raw)
        text = octets.decode()
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        raise InvalidResponse("the answer is not JSON") from None
    # Line ends can stand between values alone: the line stays whole, and says the same.
    return text.strip().replace("\r", " ").replace("\n", " ")
