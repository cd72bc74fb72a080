"""The first server: it answers with what it was sent, in capital letters.

The upper-case server is the example that lectures on sockets begin with.  Here it is as a Protocol: typed, with an
error of its own, and with streams in either direction.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from msgspec import Struct
from twisted.internet.task import deferLater

from protoframe import Error, Factory, Protocol, request
from protoframe.service import ServerOptions, ServerService

__all__ = ["Options", "Speech", "Statistics", "TooLong", "makeService"]

LONGEST = 100_000
#: Seconds.
LONGEST_PAUSE = 10.0


class TooLong(Error):
    """The text has more characters than the server takes."""

    limit: int


class Statistics(Struct, frozen=True):
    """What is in a text."""

    characters: int
    words: int
    lines: int
    longest_word: str | None = None


class Speech(Protocol):
    """What the upper-case server answers."""

    @request(idempotent=True, raises=[TooLong])
    async def upper(self, text: str) -> str:
        """The text in capital letters."""
        return _checked(text).upper()

    @request(idempotent=True, raises=[TooLong])
    async def lower(self, text: str) -> str:
        """The text in small letters."""
        return _checked(text).lower()

    @request(idempotent=True, raises=[TooLong])
    async def count(self, text: str) -> Statistics:
        """How many characters, words and lines the text has, and its longest word."""
        words = _checked(text).split()
        return Statistics(
            characters=len(text),
            words=len(words),
            lines=len(text.splitlines()),
            longest_word=max(words, key=len, default=None),
        )

    @request(idempotent=True)
    async def echo(self, text: str) -> str:
        """The text as it came."""
        return text

    @request(idempotent=True, raises=[TooLong])
    async def spell(self, word: str, pause: float = 0.0) -> AsyncIterator[str]:
        """The letters of a word, one at a time, so many seconds apart; 10 at most."""
        from twisted.internet import reactor

        for number, letter in enumerate(_checked(word)):
            if number and pause > 0:
                await deferLater(reactor, min(pause, LONGEST_PAUSE))
            yield letter

    @request(idempotent=True, raises=[TooLong])
    async def shout(self, lines: AsyncIterator[str]) -> AsyncIterator[str]:
        """Each line in capital letters, as it comes."""
        async for line in lines:
            yield _checked(line).upper()

    @request(idempotent=True, raises=[TooLong])
    async def longest(self, words: AsyncIterator[str]) -> str | None:
        """The first of the longest words; null where there are none."""
        longest: str | None = None
        async for word in words:
            if longest is None or len(_checked(word)) > len(longest):
                longest = word
        return longest


def _checked(text: str) -> str:
    if len(text) > LONGEST:
        raise TooLong(f"the text has {len(text)} characters", limit=LONGEST)
    return text


class Options(ServerOptions):
    """The command line of ``twistd pf-upper``."""

    longdesc = "Serves Speech: text in, capital letters out; a first server to call and to read."


def makeService(options: Options) -> ServerService:
    """The service that twistd runs."""
    return ServerService(Factory(Speech, reflection=not options["no-reflection"]), options)
