"""``pf queue consume``: messages to standard output, each acknowledged when it is there.

Knows how a message is written, and when there are no more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from protoframe.cli.completing import complete_where
from protoframe.cli.options import Settings, check_seconds, check_where, shared
from protoframe.cli.output import write_octets, write_through
from protoframe.cli.problems import STATUSES
from protoframe.cli.queue_session import check_headers, check_name, message_fields, run_with_queue

if TYPE_CHECKING:
    from twisted.internet.defer import Deferred

    from protoframe.cli.running import Progress, Target
    from protoframe.queue import Consumer, QueueClient, ReceivedMessage

__all__ = ["consume"]

#: Messages, and octets of them, that are written in one go at most.
_PIECE_COUNT, _PIECE = 1000, 64 * 1024
#: Of the largest prefetch: see `protoframe.queue.Queue.consume`.
_MOST = 10_000


def _check_idle(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    return None if value is None else check_seconds(context, parameter, value)


@click.command(epilog=STATUSES)
@click.argument("where", callback=check_where, shell_complete=complete_where)
@click.argument("name", callback=check_name)
@click.option("--max", "-n", "most", type=click.IntRange(1), metavar="N", help="Ends after so many messages.")
@click.option("--idle", type=float, callback=_check_idle, metavar="SECONDS", help="Ends when none comes for so long.")
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
@click.option(
    "--prefetch",
    type=click.IntRange(1, _MOST),
    metavar="N",
    default=100,
    show_default=True,
    help="Messages that may be here and not acknowledged.",
)
@click.option("--exclusive", is_flag=True, help="As the only consumer.")
@shared
def consume(
    where: str,
    name: str,
    most: int | None,
    idle: float | None,
    group: str,
    subject: str,
    headers: dict[str, str],
    prefetch: int,
    exclusive: bool,
    timeout: float,
    token_file: str,
    json: bool,
    quiet: bool,
) -> None:
    """Write messages to standard output, a line each, as they come, and acknowledge them when they are written.

    A body is written as it is, with a line end behind it.  With --json, each message is an object: body, or body_base64
    where it is not UTF-8, sequence, attempt, subject, headers and so on.

    It goes on until it is interrupted, or as --max and --idle say, through the loss of connections.  What was not
    written is not acknowledged, and is delivered again.

    \b
    Examples:
      pf queue consume tcp:127.0.0.1:12100 orders --max 1
      pf queue consume tcp:127.0.0.1:12100 orders --json --idle 5 | jq -r .subject
    """
    from protoframe.cli.running import Progress, read_token

    settings = Settings(timeout, json, quiet, read_token(token_file))
    progresses: list[Progress] = []

    def progress(target: Target) -> Progress:
        progresses.append(Progress(target, settings))
        return progresses[0]

    async def session(queue: QueueClient) -> None:
        messages = queue.consume(
            name,
            group=group,
            prefetch=prefetch if most is None else min(prefetch, most),
            subject=subject,
            headers=headers,
            exclusive=exclusive,
            limit=most,
        )
        writing = _Writing(queue.reactor, messages, progresses[0], as_json=json)
        async with messages:
            await writing.run(most, idle)
        # No more come while the last are acknowledged.
        await writing.finish()

    run_with_queue(session, where, name, settings, progress)


class _Writing:
    """Writes what comes."""

    def __init__(self, reactor: Any, messages: Consumer, progress: Progress, *, as_json: bool) -> None:
        from twisted.internet.defer import succeed

        from protoframe.cli.running import Reader

        self._reactor = reactor
        self._messages = messages
        self._progress = progress
        self._as_json = as_json
        self._reader = Reader(reactor)
        self._acknowledging: Deferred[Any] = succeed(None)
        self._lost: Any = None

    async def run(self, most: int | None, idle: float | None) -> None:
        """Writes messages until there are so many, or none comes for so long.

        :raises BrokenPipeError: the reader went away.
        :raises Problem: they cannot be written.
        :raises Error: of the queue; what came before it is written.
        """
        from protoframe.cli.running import in_thread

        written = 0
        while most is None or written < most:
            batch = await self._next(_PIECE_COUNT if most is None else min(_PIECE_COUNT, most - written), idle)
            if not batch:
                break
            self._progress.stop()
            # A piece at a time: what is out is acknowledged, whatever becomes of the rest.
            for piece in _pieces(batch):
                if self._as_json:
                    await in_thread(write_through, "\n".join(_json(message) for message in piece))
                else:
                    await in_thread(write_octets, b"".join(message.body + b"\n" for message in piece))
                written += len(piece)
                await self._acknowledging
                self._acknowledging = self._acknowledge(piece)

    async def finish(self) -> None:
        """Waits until what was written is acknowledged.

        :raises Error: something is not, and is delivered again.
        """
        await self._acknowledging
        if self._lost is not None:
            raise self._lost

    async def _next(self, most: int, idle: float | None) -> list[ReceivedMessage]:
        """Messages; none when none came for so long."""
        from twisted.internet.defer import CancelledError, Deferred

        coming = Deferred.fromCoroutine(self._messages.take(most))
        self._reader.waits_for(coming)
        is_late = False

        def give_up() -> None:
            nonlocal is_late
            is_late = True
            coming.cancel()

        timer = self._reactor.callLater(idle, give_up) if idle is not None else None
        try:
            return await coming
        except CancelledError:
            if self._reader.is_gone:
                raise BrokenPipeError from None
            if is_late:
                return []
            raise
        finally:
            if timer is not None and timer.active():
                timer.cancel()

    def _acknowledge(self, messages: list[ReceivedMessage]) -> Deferred[Any]:
        from twisted.internet.defer import DeferredList

        return DeferredList([message.ack().addErrback(self._not_acknowledged) for message in messages])

    def _not_acknowledged(self, failure: Any) -> None:
        # It is delivered again: that is said at the end, for what else comes can be written nevertheless.
        if self._lost is None:
            self._lost = failure.value


def _json(message: ReceivedMessage) -> str:
    from json import dumps

    return dumps(message_fields(message.delivery), ensure_ascii=False)


def _pieces(messages: list[ReceivedMessage]) -> list[list[ReceivedMessage]]:
    pieces: list[list[ReceivedMessage]] = [[]]
    octets = 0
    for message in messages:
        if octets > _PIECE:
            pieces.append([])
            octets = 0
        pieces[-1].append(message)
        octets += len(message.body)
    return pieces
