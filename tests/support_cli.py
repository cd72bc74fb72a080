"""A server for the tests of the command line: a process of its own, that says on standard output what happens to it.

``python support_cli.py DIRECTORY``: serves `Desk` over TCP, over a UNIX socket in the directory, over TCP without
reflection, and over TLS where the directory has a key; the first line tells where, as a JSON object.
"""

from __future__ import annotations

import datetime
import enum
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from msgspec import Struct
from twisted.internet import reactor
from twisted.internet.defer import Deferred

from protoframe import DeadlineExceeded, Error, Factory, NotFound, Protocol, listen, request

#: A message that would paint a terminal red, start another line and ring the bell.
HOSTILE = "no \x1b[31mred\nTraceback\r\x07\x9b1m \u202eevil\u2028end"


class Colour(enum.Enum):
    """What there is."""

    RED = "red"
    GREEN = "green"


class Item(Struct):
    """What can be ordered."""

    name: str
    price: float = 0.5
    tags: list[str] = []


class Refused(Error):
    """The desk does not want to."""

    reason: str
    limit: int


class Late(DeadlineExceeded):
    """Too late, says the desk."""


class Desk(Protocol[Any]):
    """Answers to the tests.

    And has a docstring of two paragraphs.
    """

    @request(idempotent=True)
    async def echo(self, text: str) -> str:
        """The text as it came."""
        return text

    @request
    async def reverse(self, content: bytes) -> bytes:
        """The content, last octet first."""
        return content[::-1]

    @request
    async def measure(self, content: bytes | None = None) -> int:
        """How many octets there are."""
        return -1 if content is None else len(content)

    @request
    async def shift(self, at: datetime.datetime, days: int = 1) -> datetime.datetime:
        """A time, so many days later."""
        return at + datetime.timedelta(days=days)

    @request
    async def paint(self, colour: Colour, glossy: bool = False) -> str:
        """The name of the colour."""
        return f"{colour.name} {glossy}"

    @request(timeout=30.0, max_size=10_000)
    async def order(self, item: Item, count: int = 1) -> list[Item]:
        """So many of an item."""
        return [item] * count

    @request
    async def keys(self, names: dict[int, str]) -> list[int]:
        return sorted(names)

    @request
    async def nothing(self) -> None:
        return None

    @request(raises=[Refused])
    async def refuse(self, reason: str) -> str:
        """Refuses."""
        raise Refused("not today", reason=reason, limit=3)

    @request(raises=[Refused])
    async def insult(self) -> str:
        """Refuses, without manners."""
        raise Refused(HOSTILE, reason=HOSTILE, limit=3)

    @request(raises=[Error])
    async def fail(self) -> str:
        raise Error("nothing special")

    @request(raises=[NotFound])
    async def find(self) -> str:
        raise NotFound("no such thing")

    @request(raises=[Late])
    async def late(self) -> str:
        raise Late("the train has gone")

    @request
    async def crash(self) -> str:
        raise RuntimeError("a secret")

    @request
    def never(self) -> Deferred[str]:
        """Does not answer."""
        say("never began")
        return Deferred(lambda _: say("never cancelled"))

    @request
    async def letters(self, count: int) -> str:
        """A text that is as long as asked."""
        return "x" * count

    @request
    async def numbers(self, count: int) -> AsyncIterator[int]:
        """As many as asked."""
        for number in range(count):
            yield number

    @request
    async def drip(self) -> AsyncIterator[str]:
        """One, and then nothing for ever."""
        try:
            yield "one"
            await Deferred()
        finally:
            say("drip left")

    @request(raises=[Refused])
    async def tire(self, count: int) -> AsyncIterator[Item]:
        """As many as asked, and then an error."""
        for number in range(count):
            yield Item(f"item {number}")
        raise Refused("enough", reason="tired", limit=count)

    @request
    async def add(self, numbers: AsyncIterator[int], to: int = 0) -> int:
        """The sum."""
        async for number in numbers:
            to += number
        return to

    @request
    async def repeat(self, items: AsyncIterator[Item]) -> AsyncIterator[str]:
        """Their names, as they come."""
        async for item in items:
            yield item.name

    @request(oneway=True, permission="tell")
    async def tell(self, text: str) -> None:
        """Takes note."""


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


async def serve(directory: Path) -> None:
    tcp = await listen(reactor, "tcp:0:interface=127.0.0.1", Factory(Desk))
    await listen(reactor, f"unix:{directory / 'desk.sock'}", Factory(Desk))
    unready = Factory(Desk, reflection=False)
    unready.set_ready(False)
    mute = await listen(reactor, "tcp:0:interface=127.0.0.1", unready)
    where = {
        "tcp": f"tcp:127.0.0.1:{tcp.getHost().port}",
        "unix": f"unix:{directory / 'desk.sock'}",
        "mute": f"tcp:127.0.0.1:{mute.getHost().port}",
    }
    if (directory / "key.pem").exists():
        endpoint = f"ssl:0:privateKey={directory / 'key.pem'}:certKey={directory / 'chain.pem'}:interface=127.0.0.1"
        tls = await listen(reactor, endpoint, Factory(Desk))
        where["tls"] = f"tls:localhost:{tls.getHost().port}"
    say(json.dumps(where))


if __name__ == "__main__":
    any_reactor: Any = reactor
    any_reactor.callWhenRunning(lambda: Deferred.fromCoroutine(serve(Path(sys.argv[1]))))
    any_reactor.run()
