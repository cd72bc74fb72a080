"""What the commands of ``pf queue`` share: a client of the server, what goes wrong there, and messages as JSON.

Knows queue servers; not what is asked of one.
"""

from __future__ import annotations

import base64
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from protoframe.cli.options import Settings
from protoframe.cli.problems import USAGE, Problem

if TYPE_CHECKING:
    from protoframe import Error
    from protoframe.cli.running import Progress, Target
    from protoframe.queue import Delivery, QueueClient

__all__ = ["check_headers", "check_name", "check_names", "message_fields", "run_with_queue", "trouble"]

T = TypeVar("T")

#: Seconds that closing may take.
_CLOSING = 0.25
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]*")
_LONGEST_NAME = 200


def check_name(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """
    :raises Problem: no queue can have the name.
    """
    del context, parameter
    if len(value) > _LONGEST_NAME or _NAME.fullmatch(value) is None:
        text = f"{value!r} is no name of a queue"
        raise Problem(text, USAGE, f"letters, digits and any of _ . : / -, {_LONGEST_NAME} characters at most")
    return value


def check_names(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """The same, of several."""
    return tuple(check_name(context, parameter, name) for name in value)


def check_headers(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> dict[str, str]:
    """
    :raises Problem: one is not ``k=v``.
    """
    del context, parameter
    headers = {}
    for word in value:
        name, sign, text = word.partition("=")
        if not (name and sign):
            raise Problem(f"--header {word!r} is no k=v", USAGE, "--header tenant=acme")
        headers[name] = text
    return headers


def run_with_queue(
    session: Callable[[QueueClient], Awaitable[T]],
    where: str,
    what: str,
    settings: Settings,
    progress: Callable[[Target], Progress] | None = None,
) -> T:
    """Runs a session, which is given a client that is connected, to its end; once in a process.

    :param what: the queue, for errors.
    :param progress: makes that of a session which writes something itself.
    :raises Problem: an error, as a line and a status.
    :raises KeyboardInterrupt: the user asked for an end; the session was cancelled.
    """
    from protoframe import Error
    from protoframe.cli.running import Target, run

    target = Target(where, what)

    async def whole(reactor: Any) -> T:
        async with _connected(reactor, target, settings) as queue:
            try:
                return await session(queue)
            except Error as error:
                raise trouble(error, target, settings) from None

    return run(whole, target, settings, progress(target) if progress is not None else None)


@asynccontextmanager
async def _connected(reactor: Any, target: Target, settings: Settings) -> AsyncIterator[QueueClient]:
    from twisted.internet.defer import Deferred

    from protoframe import Backoff, Limits
    from protoframe.cli.running import opened_in_time
    from protoframe.queue import QueueClient

    limits = Limits(handshake_timeout=settings.timeout, close_timeout=_CLOSING)
    backoff = Backoff(first=0.2, longest=5.0)
    try:
        queue = QueueClient(
            reactor, target.where, token=settings.token, limits=limits, reconnect=backoff, timeout=settings.timeout
        )
    except ValueError as error:
        raise Problem(str(error), USAGE, "tcp:host:port, tls:host:port, udp:host:port or unix:path") from None
    await opened_in_time(reactor, Deferred.fromCoroutine(queue.__aenter__()), target, settings)
    try:
        yield queue
    finally:
        await queue.stopService()


def trouble(error: Error, target: Target, settings: Settings) -> Problem:
    """An error of a call, or of a queue."""
    from protoframe.cli.running import refused
    from protoframe.queue import (
        DifferentSettings,
        InvalidMessage,
        InvalidSettings,
        LeaseLost,
        NoSuchGroup,
        NoSuchQueue,
        NotEmpty,
        QueueFull,
    )

    problem = refused(error, target, settings)
    # What is asked for here is a queue, which `pf describe` does not know.
    if "describe" in problem.hint:
        problem.hint = target.command("list")
    if isinstance(error, NoSuchQueue):
        problem.hint = f"pf queue ls {target.where}, which names them"
    elif isinstance(error, NoSuchGroup):
        problem.hint = f"pf queue stats {target.where} {target.what}, which names them"
    elif isinstance(error, DifferentSettings):
        for_good = {"order", "delivery", "storage"} & set(error.fields)
        problem.hint = f"pf queue delete {target.where} {target.what}, and declare it anew" if for_good else "--replace"
    elif isinstance(error, InvalidSettings):
        problem.hint = "pf queue declare --help"
    elif isinstance(error, InvalidMessage):
        problem.hint = "pf queue publish --help"
    elif isinstance(error, QueueFull):
        problem.hint = "again when consumers have made room"
    elif isinstance(error, NotEmpty):
        problem.hint = "without --only-unused"
    elif isinstance(error, LeaseLost):
        problem.hint = "a longer lease of the queue"
    return problem


def message_fields(delivery: Delivery) -> dict[str, Any]:
    """All about a message, for JSON: its body as text where it is UTF-8, or else in base64 as ``body_base64``."""
    import msgspec

    fields = {name: getattr(delivery, name) for name in delivery.__struct_fields__}
    body = fields.pop("body")
    try:
        said: dict[str, Any] = {"body": body.decode()}
    except UnicodeDecodeError:
        said = {"body_base64": base64.b64encode(body).decode()}
    first = {"sequence": fields.pop("sequence")}
    fields["dead"] = msgspec.to_builtins(delivery.dead)
    return {**first, **said, **fields}
