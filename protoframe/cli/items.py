"""The items of streams: a JSON value a line, those that go from a file, and those that come to standard output.

Knows lines, and how they are read and written: a piece at a time, in a thread, for a file or a reader may take as long
as it likes.  Not whose streams they are.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import IO, TYPE_CHECKING, Any

from protoframe.cli.arguments import Argument, lowered, unreadable
from protoframe.cli.output import write_through
from protoframe.cli.problems import USAGE, Problem, clip

if TYPE_CHECKING:
    import msgspec

__all__ = ["Lines", "one_line", "send", "take"]

#: Octets that are read, or characters that are written, at a time.
_PIECE = 64 * 1024
#: Octets; no server takes an item that is longer.
_LONGEST_LINE = 1024 * 1024 * 1024


def send(argument: Argument) -> AsyncIterator[msgspec.Raw]:
    """The items that an argument gives: the lines of its file, or the elements of its JSON array.

    The iterator raises `Problem` where a line is no JSON value.

    :raises Problem: it gives neither.
    """
    import msgspec

    if argument.file is not None:
        return _lines(Lines(argument, argument.file))
    try:
        return _elements(msgspec.json.decode(argument.json or "", type=list[msgspec.Raw]))
    except (msgspec.MsgspecError, RecursionError):
        name = argument.name
        raise Problem(f"{name} is a stream", USAGE, f"{name}@FILE with a JSON value a line, or {name}:=[...]") from None


async def _lines(lines: Lines) -> AsyncIterator[msgspec.Raw]:
    from protoframe.cli.running import in_thread

    while items := await in_thread(lines.read):
        for item in items:
            yield item


async def _elements(elements: list[msgspec.Raw]) -> AsyncIterator[msgspec.Raw]:
    for element in elements:
        yield element


class Lines:
    """The lines of a file, each a JSON value; empty ones are passed over.

    :param argument: names it.
    :param file: where they are.
    """

    def __init__(self, argument: Argument, file: IO[bytes]) -> None:
        self._argument = argument
        self._file: Any = file
        self._number = 0
        self._begun: list[bytes] = []
        self._length = 0
        self._is_over = False
        self._problem: Problem | None = None

    def read(self) -> list[msgspec.Raw]:
        """Some more of them, as many as are there; none at the end.

        :raises Problem: a line is no JSON value, or cannot be read.  Those before it have been given.
        """
        items: list[msgspec.Raw] = []
        while not items and not self._is_over:
            try:
                piece = self._file.read1(_PIECE)
            except (OSError, ValueError) as error:
                raise unreadable(self._argument, error) from None
            self._is_over = not piece
            *whole, rest = piece.split(b"\n")
            if self._is_over or whole:
                self._begun.append(whole[0] if whole else rest)
                whole[:1] = [b"".join(self._begun)]
                self._begun = [rest]
                self._length = len(rest)
            else:
                self._begun.append(rest)
                self._length += len(rest)
            self._parse(whole, items)
            if self._length > _LONGEST_LINE:
                self._end(f"line {self._number + 1} has more than {_LONGEST_LINE} bytes")
        if self._problem is not None and not items:
            raise self._problem
        return items

    def _parse(self, lines: list[bytes], items: list[msgspec.Raw]) -> None:
        import msgspec

        for line in lines:
            self._number += 1
            text = line.strip()
            if not text:
                continue
            try:
                msgspec.json.decode(text, type=msgspec.Raw)
                text.decode()
            except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
                reason = lowered(str(error).removeprefix("JSON is malformed: "))
                self._end(f"line {self._number} is not JSON: {clip(reason, 80)}")
                return
            items.append(msgspec.Raw(text))

    def _end(self, text: str) -> None:
        self._is_over = True
        self._problem = Problem(f"{self._argument.typed}: {text}", USAGE, "a JSON value a line")


async def take(items: AsyncIterator[bytes], reactor: Any, began: Callable[[], None]) -> str:
    """Writes items to standard output, a line each, as they come.

    :param began: called before the first.
    :return: the lines that are not written yet when the stream has ended, without the last line's end.
    :raises BrokenPipeError: the reader went away.
    :raises Problem: they cannot be written.
    :raises Error: that the stream ended with; what came before it is written.
    """
    from twisted.internet.defer import Deferred
    from twisted.internet.task import deferLater

    from protoframe.cli.running import Reader, in_thread

    iterator = aiter(items)
    lines: list[str] = []
    size = 0
    reader: Reader | None = None
    while True:
        coming: Deferred[bytes] = Deferred.fromCoroutine(_next(iterator))
        try:
            if lines and not coming.called:
                # What belongs together comes in one turn of the reactor: the end of the stream, say.
                await deferLater(reactor, 0)
            if lines and (size > _PIECE or not coming.called):
                text, lines, size = "\n".join(lines), [], 0
                await in_thread(write_through, text)
                reader = reader or Reader(reactor)
            if reader is not None:
                reader.waits_for(coming)
            line = one_line(await coming)
        except StopAsyncIteration:
            return "\n".join(lines)
        except Exception:
            coming.addErrback(lambda _: None)
            coming.cancel()
            if lines:
                await in_thread(write_through, "\n".join(lines))
            if reader is not None and reader.is_gone:
                raise BrokenPipeError from None
            raise
        began()
        lines.append(line)
        size += len(line)


async def _next(iterator: AsyncIterator[bytes]) -> bytes:
    return await anext(iterator)


def one_line(octets: bytes) -> str:
    """A result, or an item, as one line of JSON.

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
