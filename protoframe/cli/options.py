"""The parameters that commands share, and what each must be.

Knows click and what can be said of a string by looking at it; where it leads is found out when a command runs.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from protoframe.cli.problems import USAGE, Problem

if TYPE_CHECKING:
    from protoframe import Token

__all__ = ["Settings", "check_method", "check_seconds", "check_where", "shared"]

F = TypeVar("F", bound=Callable[..., Any])

#: Seconds.
DEFAULT_TIMEOUT = 10.0
#: Seconds; what `select` and its kin take ends at some 24 days.
_LONGEST = 1_000_000
#: Octets of a method's name: the wire format's limit.
_LONGEST_NAME = 255

_KINDS = frozenset({"tcp", "tcp6", "tls", "ssl", "udp", "unix"})
#: An address without a kind.
_ADDRESS = re.compile(r"^(?:[\w.-]+|\[[0-9A-Fa-f:.]+\]):\d{1,5}$")


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What the shared options say.

    :ivar timeout: seconds for connecting and the call together.
    :ivar json: JSON instead of a table.
    :ivar quiet: no progress.
    :ivar token: shows the server who calls.
    """

    timeout: float = DEFAULT_TIMEOUT
    json: bool = False
    quiet: bool = False
    token: Token | None = None


def check_where(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """
    :raises Problem: the string cannot lead anywhere.
    """
    del context, parameter
    _check_text(value, "WHERE")
    if not value.strip():
        raise Problem("WHERE is empty", USAGE, "tcp:host:port")
    if _ADDRESS.match(value) and value.partition(":")[0] not in _KINDS:
        raise Problem(f"{value} does not say how to connect", USAGE, f"tcp:{value}")
    return value


def check_method(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """
    :raises Problem: no method can have the name.
    """
    where = str(context.params.get("where") or "WHERE")
    del parameter
    _check_text(value, "the method's name")
    hint = f"{shlex.join(['pf', 'list', where])}, which names them"
    if "." not in value or not all(value.split(".")):
        raise Problem(f"{value!r} is no Protocol.method", USAGE, hint)
    if len(value.encode()) > _LONGEST_NAME:
        raise Problem(f"the method's name has more than {_LONGEST_NAME} octets", USAGE, hint)
    return value


def check_timeout(context: click.Context, parameter: click.Parameter, value: float) -> float:
    """
    :raises click.BadParameter: it is no time that one can wait.
    """
    if not (value > 0 and math.isfinite(value)):
        raise click.BadParameter(f"expected a finite number of seconds above 0, got {value:g}", context, parameter)
    return check_seconds(context, parameter, value)


def check_seconds(context: click.Context, parameter: click.Parameter, value: float) -> float:
    """
    :raises click.BadParameter: it is below 0, or longer than a reactor can wait.
    """
    if not 0 <= value <= _LONGEST:
        raise click.BadParameter(f"expected 0 to {_LONGEST} seconds, got {value:g}", context, parameter)
    return value


def _check_text(value: str, what: str) -> None:
    # What is not UTF-8 on the command line reaches Python as surrogates.
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Problem(f"{what} is not UTF-8", USAGE, "pf --help") from None


def shared(function: F) -> F:
    """Adds ``--timeout``, ``--token-file``, ``--json`` and ``--quiet``; the function takes them as keywords."""
    for option in reversed(
        (
            click.option(
                "--timeout",
                type=float,
                callback=check_timeout,
                metavar="SECONDS",
                default=DEFAULT_TIMEOUT,
                show_default=True,
                envvar="PROTOFRAME_TIMEOUT",
                show_envvar=True,
                help="Connecting and the answer, together, may take this long.",
            ),
            click.option(
                "--token-file",
                metavar="FILE",
                default="",
                help="Shows the server who calls: a token, the first line of the file.  By default $PROTOFRAME_TOKEN.",
            ),
            click.option(
                "--json/--no-json",
                default=False,
                envvar="PROTOFRAME_JSON",
                show_envvar=True,
                help="JSON instead of text for people.",
            ),
            click.option(
                "--quiet/--no-quiet",
                "-q",
                default=False,
                envvar="PROTOFRAME_QUIET",
                show_envvar=True,
                help="Show no progress.",
            ),
        ),
    ):
        function = option(function)
    return function
