"""``pf queue``: declares the queues of a server, shows how they stand and what is in them, and removes it.

Knows how that is laid out; publishing is `protoframe.cli.queue_publish`'s, and consuming
`protoframe.cli.queue_consume`'s.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from protoframe.cli.completing import complete_where
from protoframe.cli.options import Settings, check_where, shared
from protoframe.cli.output import pad, style_for, width, write_json, write_text
from protoframe.cli.problems import STATUSES, clean, clip
from protoframe.cli.queue_session import check_headers, check_name, check_names, message_fields, run_with_queue

if TYPE_CHECKING:
    from protoframe.queue import QueueClient, Statistics, Waiting

__all__ = ["queue"]

#: Characters of a body in a table.
_WIDEST_BODY = 60
#: In the order of the help: the commands that have modules of their own.
_ELSEWHERE = {"publish": "queue_publish", "consume": "queue_consume"}
_ORDER = ("ls", "declare", "publish", "consume", "peek", "purge", "stats", "delete")


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_ORDER)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _ELSEWHERE:
            module = importlib.import_module(f"protoframe.cli.{_ELSEWHERE[cmd_name]}")
            command: click.Command = getattr(module, cmd_name)
            return command
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Commands, no_args_is_help=False, epilog=STATUSES)
def queue() -> None:
    """Use and look after the queues of a `twistd pf-queue` server.

    \b
    Examples:
      pf queue declare tcp:127.0.0.1:12100 orders --max-deliveries 5
      pf queue publish tcp:127.0.0.1:12100 orders 'an order'
      pf queue consume tcp:127.0.0.1:12100 orders --max 1
    """


def _settings(timeout: float, token_file: str, json: bool, quiet: bool) -> Settings:
    from protoframe.cli.running import read_token

    return Settings(timeout, json, quiet, read_token(token_file))


@queue.command(epilog=STATUSES)
@click.argument("where", callback=check_where, shell_complete=complete_where)
@click.argument("prefix", default="")
@shared
def ls(where: str, prefix: str, timeout: float, token_file: str, json: bool, quiet: bool) -> None:
    """List queues: those whose names begin with PREFIX, or all.

    With --json, a line with an array of what `pf queue stats --json` has.

    \b
    Examples:
      pf queue ls tcp:127.0.0.1:12100
      pf queue ls tcp:127.0.0.1:12100 orders. --json | jq -r '.[].name'
    """

    async def session(client: QueueClient) -> list[Statistics]:
        return await client.list(prefix)

    found = run_with_queue(session, where, "", _settings(timeout, token_file, json, quiet))
    if json:
        _write_object([_statistics_fields(one) for one in found])
        return
    rows = [
        (
            one.name,
            _sum(group.ready for group in one.groups),
            _sum(group.delayed for group in one.groups),
            _sum(group.leased for group in one.groups),
            _sum(group.consumers for group in one.groups),
            f"{one.bytes}",
            f"{one.published_rate:.1f}",
            f"{sum(group.acknowledged_rate for group in one.groups):.1f}",
        )
        for one in found
    ]
    _write_table(("queue", "ready", "delayed", "leased", "consumers", "bytes", "published/s", "acked/s"), rows)


@queue.command(epilog=STATUSES)
@click.argument("where", callback=check_where, shell_complete=complete_where)
@click.argument("names", metavar="NAME...", nargs=-1, required=True, callback=check_names)
@shared
def stats(where: str, names: tuple[str, ...], timeout: float, token_file: str, json: bool, quiet: bool) -> None:
    """Say how queues stand: their settings, and what each group of consumers has and had.

    Counts are of the time since the server's start, rates of the last minute.  With --json, a line with an array.

    \b
    Examples:
      pf queue stats tcp:127.0.0.1:12100 orders
      pf queue stats tcp:127.0.0.1:12100 orders --json | jq '.[0].groups[0].ready'
    """
    found: list[Statistics] = []
    settings = _settings(timeout, token_file, json, quiet)

    async def session(client: QueueClient) -> None:
        found.extend([await client.statistics(name) for name in names])

    run_with_queue(session, where, ", ".join(names), settings)
    if json:
        _write_object([_statistics_fields(one) for one in found])
        return
    style = style_for(sys.stdout)
    for number, one in enumerate(found):
        if number:
            write_text("")
        fields = _statistics_fields(one)
        write_text(style.bold(clean(one.name)))
        given = ", ".join(f"{name}={_said(value)}" for name, value in _changed(one).items())
        lines = [("settings", given or "all by default")]
        lines += [(name, _said(fields[name])) for name in fields if name not in ("name", "settings", "groups")]
        column = max(len(name) for name, _ in lines)
        for name, text in lines:
            write_text(f"  {pad(name, column)}  {clean(text)}")
        columns = ("group", "ready", "delayed", "leased", "consumers", "delivered", "acked", "dead", "oldest")
        rows = [
            (
                group.name or "-",
                f"{group.ready}",
                f"{group.delayed}",
                f"{group.leased}",
                f"{group.consumers}",
                f"{group.delivered}",
                f"{group.acknowledged}",
                f"{group.dead_lettered}",
                "-" if group.oldest_age is None else f"{group.oldest_age:.1f} s",
            )
            for group in one.groups
        ]
        _write_table(columns, rows, indent="  ")


@queue.command(epilog=STATUSES)
@click.argument("where", callback=check_where, shell_complete=complete_where)
@click.argument("name", callback=check_name)
@click.option("--order", type=click.Choice(["fifo", "priority", "last-value"]), help="Which message comes first.")
@click.option("--delivery", type=click.Choice(["at-least-once", "at-most-once"]), help="How often one is delivered.")
@click.option("--storage", type=click.Choice(["disk", "memory"]), help="Where they are.")
@click.option("--lease", type=float, metavar="SECONDS", help="How long a consumer has one before it comes again.")
@click.option("--max-deliveries", type=int, metavar="N", help="How often one comes before it is a dead letter.")
@click.option("--dead-letter", metavar="QUEUE", help="The queue that gets the dead letters; it has to be there.")
@click.option("--message-ttl", type=float, metavar="SECONDS", help="How long a message may wait.")
@click.option("--queue-ttl", type=float, metavar="SECONDS", help="How long the queue may be without use.")
@click.option("--delay", type=float, metavar="SECONDS", help="How long a message is kept before it is delivered.")
@click.option("--max-messages", type=int, metavar="N", help="How many may wait.")
@click.option("--max-bytes", type=int, metavar="N", help="How many octets they may have.")
@click.option("--overflow", type=click.Choice(["refuse", "drop-oldest"]), help="What becomes of those above.")
@click.option("--dedup-window", type=float, metavar="SECONDS", help="How long deduplication keys are remembered.")
@click.option("--group", "groups", metavar="GROUP", multiple=True, help="Of consumers.  May be given several times.")
@click.option("--batch-count", type=int, metavar="N", help="Messages that are stored together at most.")
@click.option("--batch-bytes", type=int, metavar="N", help="Octets that are.")
@click.option("--batch-time", type=float, metavar="SECONDS", help="How long one waits for others.")
@click.option("--replace", is_flag=True, help="Changes the settings of a queue that is there.")
@shared
def declare(
    where: str,
    name: str,
    replace: bool,
    groups: tuple[str, ...],
    timeout: float,
    token_file: str,
    json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Have a queue be there.  One that is there with the same settings is left as it is.

    \b
    Examples:
      pf queue declare tcp:127.0.0.1:12100 orders --lease 60 --max-deliveries 5 --dead-letter orders.dead
      pf queue declare tcp:127.0.0.1:12100 prices --order last-value
    """
    given: dict[str, Any] = {option: value for option, value in options.items() if value is not None}
    if groups:
        given["groups"] = groups

    async def session(client: QueueClient) -> bool:
        return await client.declare(name, replace=replace, **given)

    is_new = run_with_queue(session, where, name, _settings(timeout, token_file, json, quiet))
    if json:
        _write_object({"queue": name, "created": is_new})
    elif not quiet:
        write_text(clean(f"{name}: {'created' if is_new else 'is there'}"))


@queue.command(epilog=STATUSES)
@click.argument("where", callback=check_where, shell_complete=complete_where)
@click.argument("name", callback=check_name)
@click.option("--count", "-c", type=click.IntRange(1), metavar="N", default=10, show_default=True, help="At most.")
@click.option("--group", metavar="GROUP", default="", help="Of consumers, where the queue has groups.")
@click.option("--subject", metavar="PATTERN", default="", help="Only such: * stands for one word, # for any number.")
@click.option(
    "--header",
    "headers",
    metavar="K=V",
    multiple=True,
    callback=check_headers,
    help="Only those that have it.  May be given several times.",
)
@shared
def peek(
    where: str,
    name: str,
    count: int,
    group: str,
    subject: str,
    headers: dict[str, str],
    timeout: float,
    token_file: str,
    json: bool,
    quiet: bool,
) -> None:
    """Show messages that are in a queue, in its order, and leave them there.

    With --json, a line for each: state, due, and what `pf queue consume --json` has.

    \b
    Examples:
      pf queue peek tcp:127.0.0.1:12100 orders
      pf queue peek tcp:127.0.0.1:12100 orders.dead --json --count 100 | jq -r .dead.reason
    """
    rows: list[tuple[str, ...]] = []

    async def session(client: QueueClient) -> None:
        async for waiting in client.peek(name, group=group, count=count, subject=subject, headers=headers):
            if json:
                fields = {"state": waiting.state.value, "due": waiting.due, **message_fields(waiting.message)}
                _write_object(fields)
            else:
                rows.append(_row(waiting))

    run_with_queue(session, where, name, _settings(timeout, token_file, json, quiet))
    if not json:
        _write_table(("sequence", "state", "attempt", "age", "subject", "body"), rows)


def _row(waiting: Waiting) -> tuple[str, ...]:
    message = waiting.message
    body = clean(message.body[: 4 * _WIDEST_BODY].decode(errors="replace"))
    return (
        f"{message.sequence}",
        waiting.state.value,
        f"{message.attempt}",
        f"{max(0.0, time.time() - message.published):.0f} s",
        message.subject or "-",
        clip(body, _WIDEST_BODY),
    )


@queue.command(epilog=STATUSES)
@click.argument("where", callback=check_where, shell_complete=complete_where)
@click.argument("name", callback=check_name)
@click.option("--group", metavar="GROUP", help="Of this group alone.")
@shared
def purge(where: str, name: str, group: str | None, timeout: float, token_file: str, json: bool, quiet: bool) -> None:
    """Remove the messages of a queue that no consumer has, and say how many.

    \b
    Example:
      pf queue purge tcp:127.0.0.1:12100 orders
    """

    async def session(client: QueueClient) -> int:
        return await client.purge(name, group)

    count = run_with_queue(session, where, name, _settings(timeout, token_file, json, quiet))
    _say_removed(name, count, as_json=json, quiet=quiet)


@queue.command(epilog=STATUSES)
@click.argument("where", callback=check_where, shell_complete=complete_where)
@click.argument("name", callback=check_name)
@click.option("--only-unused", is_flag=True, help="Only without messages and consumers.")
@shared
def delete(where: str, name: str, only_unused: bool, timeout: float, token_file: str, json: bool, quiet: bool) -> None:
    """Delete a queue with all its messages, and say how many these were.

    \b
    Examples:
      pf queue delete tcp:127.0.0.1:12100 orders
      pf queue delete tcp:127.0.0.1:12100 orders --only-unused
    """

    async def session(client: QueueClient) -> int:
        return await client.delete(name, only_unused)

    count = run_with_queue(session, where, name, _settings(timeout, token_file, json, quiet))
    _say_removed(name, count, as_json=json, quiet=quiet)


def _say_removed(name: str, count: int, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        _write_object({"queue": name, "removed": count})
    elif not quiet:
        write_text(clean(f"{name}: {count} {'message' if count == 1 else 'messages'} removed"))


def _statistics_fields(one: Statistics) -> dict[str, Any]:
    """All of it, for JSON: what is as by default too."""
    import msgspec

    fields: dict[str, Any] = msgspec.to_builtins(one)
    fields["settings"] = {
        name: msgspec.to_builtins(value) for name, value in msgspec.structs.asdict(one.settings).items()
    }
    return fields


def _changed(one: Statistics) -> dict[str, Any]:
    import msgspec

    changed: dict[str, Any] = msgspec.to_builtins(one.settings)
    return changed


def _said(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "+".join(map(str, value))
    return f"{value:.10g}" if isinstance(value, float) else f"{value}"


def _sum(numbers: Iterable[int]) -> str:
    return f"{sum(numbers)}"


def _write_object(value: Any) -> None:
    from json import dumps

    write_json(dumps(value, ensure_ascii=False))


def _write_table(columns: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "") -> None:
    """Writes a table; what could drive a terminal is written as an escape."""
    style = style_for(sys.stdout)
    cleaned = [[clean(cell) for cell in row] for row in rows]
    widths = [max(map(width, column)) for column in zip(columns, *cleaned, strict=True)]
    lines = [columns, *cleaned]
    for number, line in enumerate(lines):
        text = "  ".join(pad(cell, columns_) for cell, columns_ in zip(line, widths, strict=True)).rstrip()
        write_text(indent + (style.dim(text) if not number else text))
