"""``pf queue publish``: messages from the command line, from files and from standard input.

Knows where bodies come from, and how many of them are durable.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import AsyncIterator
from typing import IO, TYPE_CHECKING, Any

import click

from protoframe.cli.completing import complete_where
from protoframe.cli.options import Settings, check_where, shared
from protoframe.cli.output import width, write_json, write_text
from protoframe.cli.problems import INTERRUPTED, STATUSES, USAGE, Problem
from protoframe.cli.queue_session import check_headers, check_name, run_with_queue, trouble

if TYPE_CHECKING:
    from twisted.internet.defer import Deferred

    from protoframe.cli.running import Progress, Target
    from protoframe.queue import QueueClient

__all__ = ["publish"]

#: Octets that are read at a time.
_PIECE = 64 * 1024
#: Messages and octets of a batch, at most.
_COUNT, _OCTETS = 1000, 512 * 1024


@click.command(epilog=STATUSES)
@click.argument("where", callback=check_where, shell_complete=complete_where)
@click.argument("name", callback=check_name)
@click.argument("bodies", metavar="BODY|@FILE|-...", nargs=-1, required=True)
@click.option("--subject", metavar="WORDS", default="", help="Words with dots between, by which consumers choose.")
@click.option(
    "--header",
    "headers",
    metavar="K=V",
    multiple=True,
    callback=check_headers,
    help="By which they choose too.  May be given several times.",
)
@click.option("--key", metavar="KEY", default="", help="Of a queue that keeps the last value of each.")
@click.option("--priority", type=click.IntRange(0, 9), metavar="N", default=0, help="0 to 9, the highest.")
@click.option("--ttl", type=float, metavar="SECONDS", help="How long it may wait.")
@click.option("--delay", type=float, metavar="SECONDS", help="How long it is kept before it is delivered.")
@click.option(
    "--dedup",
    metavar="KEY",
    default="",
    help="By which a message that is published again is known; of several messages, with -1, -2 and so on behind it.",
)
@shared
def publish(
    where: str,
    name: str,
    bodies: tuple[str, ...],
    subject: str,
    headers: dict[str, str],
    key: str,
    priority: int,
    ttl: float | None,
    delay: float | None,
    dedup: str,
    timeout: float,
    token_file: str,
    json: bool,
    quiet: bool,
) -> None:
    """Publish messages: each BODY is one, @FILE one with a file's content, and - one for each line of standard input.

    Exits with 0 only where every message is durable; otherwise it says how many are.  With --dedup, to a queue that has
    a dedup window, the same command can be run again: what is there already is not stored twice.

    \b
    Examples:
      pf queue publish tcp:127.0.0.1:12100 orders 'an order' @another.json
      pf queue publish tcp:127.0.0.1:12100 orders - --subject orders.eu < orders.jsonl
    """
    from protoframe.cli.running import read_token

    if bodies.count("-") > 1:
        raise Problem("- is given twice, and there is one standard input", USAGE, "a single -")
    settings = Settings(timeout, json, quiet, read_token(token_file))
    properties = {
        "subject": subject,
        "headers": headers,
        "key": key,
        "priority": priority,
        "ttl": ttl,
        "delay": delay,
    }
    is_one = len(bodies) == 1 and bodies[0] != "-"
    publishing = _Publishing(name, properties, dedup, is_one=is_one)

    async def session(queue: QueueClient) -> None:
        await publishing.run(queue, bodies)

    try:
        run_with_queue(session, where, name, settings, lambda target: _progress(target, settings, publishing))
        if publishing.error is not None:
            from protoframe.cli.running import Target

            raise trouble(publishing.error, Target(where, name), settings)
    except KeyboardInterrupt:
        raise Problem(f"interrupted; {publishing.durable}", INTERRUPTED) from None
    except Problem as problem:
        if publishing.began:
            raise Problem(f"{problem.what}; {publishing.durable}", problem.status, problem.hint) from None
        raise
    if json:
        from json import dumps

        write_json(dumps({"queue": name, "durable": publishing.stored, "duplicates": publishing.duplicates}))
    elif not quiet:
        again = f", {publishing.duplicates} of them already" if publishing.duplicates else ""
        write_text(f"{_messages(publishing.stored)} durable{again}")


class _Publishing:
    """What was published so far.

    :ivar began: messages that were begun to be published.
    :ivar stored: those that are durable.
    :ivar duplicates: those of them that were so already.
    :ivar error: the first.
    """

    def __init__(self, name: str, properties: dict[str, Any], dedup: str, *, is_one: bool) -> None:
        self.began = self.stored = self.duplicates = 0
        self.error: Any = None
        self._name = name
        self._properties = properties
        self._dedup = dedup
        self._is_one = is_one
        self._reading: Deferred[Any] | None = None

    @property
    def durable(self) -> str:
        """How many are."""
        return f"{self.stored} of {self.began} messages are durable"

    async def run(self, queue: QueueClient, sources: tuple[str, ...]) -> None:
        """Publishes what there is, until there is an error."""
        from twisted.internet.defer import CancelledError

        # A person who types is not kept waiting for others.
        async with queue.publisher(self._name, count=_COUNT, octets=_OCTETS) as publisher:
            try:
                async for body in self._bodies(sources):
                    await publisher.ready()
                    if self.error is not None:
                        return
                    self.began += 1
                    dedup = self._dedup and (self._dedup if self._is_one else f"{self._dedup}-{self.began}")
                    done = publisher.publish(body, dedup=dedup, **self._properties)
                    done.addCallbacks(self._succeeded, self._failed)
            except CancelledError:
                if self.error is None:
                    raise

    def _succeeded(self, receipt: Any) -> None:
        self.stored += 1
        self.duplicates += receipt.is_duplicate

    def _failed(self, failure: Any) -> None:
        if self.error is None:
            self.error = failure.value
            if self._reading is not None:
                self._reading.cancel()

    async def _bodies(self, sources: tuple[str, ...]) -> AsyncIterator[bytes]:
        for source in sources:
            if source == "-":
                lines = _Lines(sys.stdin.buffer if sys.stdin is not None else None)
                while several := await self._in_thread(lines.read):
                    for line in several:
                        yield line
            elif source.startswith("@"):
                yield await self._in_thread(_content, source)
            else:
                yield os.fsencode(source)

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        from protoframe.cli.running import in_thread

        self._reading = in_thread(function, *arguments)
        try:
            return await self._reading
        finally:
            self._reading = None


def _messages(count: int) -> str:
    return "1 message is" if count == 1 else f"{count} messages are"


def _content(source: str) -> bytes:
    from protoframe.queue import LARGEST_BODY

    try:
        with open(source[1:], "rb") as file:
            content = file.read(LARGEST_BODY + 1)
    except (OSError, ValueError) as error:
        text = getattr(error, "strerror", None) or str(error)
        raise Problem(f"{source}: {text[:1].lower()}{text[1:]}", USAGE, "the path of a file") from None
    if len(content) > LARGEST_BODY:
        raise Problem(f"{source}: more than {LARGEST_BODY} bytes", USAGE, "a smaller file")
    return content


class _Lines:
    """The lines of a file, without their ends."""

    def __init__(self, file: IO[bytes] | None) -> None:
        self._file: Any = file
        self._begun: list[bytes] = []
        self._length = 0
        self._number = 0
        self._is_over = False

    def read(self) -> list[bytes]:
        """Some more of them, as many as are there; none at the end.

        :raises Problem: they cannot be read, or one is longer than a body can be.
        """
        from protoframe.queue import LARGEST_BODY

        if self._file is None:
            raise Problem("-: standard input is closed", USAGE, "@FILE")
        while not self._is_over:
            try:
                piece = self._file.read1(_PIECE)
            except (OSError, ValueError) as error:
                raise Problem(f"-: {getattr(error, 'strerror', None) or error}", USAGE, "@FILE") from None
            if not piece:
                self._is_over = True
                return [b"".join(self._begun)] if self._length else []
            whole: list[bytes]
            *whole, rest = piece.split(b"\n")
            if whole:
                whole[0] = b"".join([*self._begun, whole[0]])
                self._begun, self._length = [], 0
            self._begun.append(rest)
            self._length += len(rest)
            self._number += len(whole)
            if self._length > LARGEST_BODY:
                raise Problem(f"-: line {self._number + 1} has more than {LARGEST_BODY} bytes", USAGE, "shorter lines")
            if whole:
                return whole
        return []


def _progress(target: Target, settings: Settings, publishing: _Publishing) -> Progress:
    from protoframe.cli.running import Progress

    class Rate(Progress):
        """How many messages there are, and how fast they become durable."""

        interval = 0.25
        _since = time.monotonic()

        def line(self, columns: int) -> str:
            seconds = time.monotonic() - self._since
            text = f"{_messages(publishing.stored)} durable, {publishing.stored / seconds:,.0f} a second"
            return text if publishing.stored and width(text) < columns else super().line(columns)

    return Rate(target, settings)
