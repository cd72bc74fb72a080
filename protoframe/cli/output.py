"""Where ``pf`` writes: data to standard output, everything else to standard error, colour only to terminals.

Knows streams and terminals; what is written is the commands' business.
"""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from typing import TextIO

from protoframe.cli.problems import FAILURE, Problem, clean

__all__ = [
    "Style",
    "is_terminal",
    "pad",
    "report",
    "style_for",
    "width",
    "write_json",
    "write_octets",
    "write_text",
    "write_through",
]

_BOLD = "1"
_DIM = "2"
_RED = "1;31"

#: What JSON lets stand in a string as it is, and a terminal may act on.
_TERMINAL_UNSAFE = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class Style:
    """Marks text for a terminal, or leaves it alone."""

    def __init__(self, coloured: bool) -> None:
        self._coloured = coloured

    def bold(self, text: str) -> str:
        """For names."""
        return self._mark(_BOLD, text)

    def dim(self, text: str) -> str:
        """For what explains."""
        return self._mark(_DIM, text)

    def red(self, text: str) -> str:
        """For errors."""
        return self._mark(_RED, text)

    def _mark(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._coloured and text else text


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person reads a stream, on a terminal that understands escape sequences."""
    try:
        return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:
        return False


def style_for(stream: TextIO | None) -> Style:
    """Colour for a terminal, unless ``NO_COLOR`` is set to anything (https://no-color.org)."""
    return Style(is_terminal(stream) and not os.environ.get("NO_COLOR"))


def write_json(text: str) -> None:
    """Writes a line of JSON, exactly, in UTF-8 (RFC 8259, section 8.1) whatever the locale says.

    To a terminal, what it could act on is written as JSON escapes, which mean the same.
    """
    _write(_json_octets(text))


def write_through(text: str) -> None:
    """The same, past all buffers: for a thread, which may still be at it when ``pf`` ends."""
    write_octets(_json_octets(text))


def write_octets(octets: bytes) -> None:
    """Writes octets as they are, past all buffers: they are out when it returns.

    :raises BrokenPipeError: the reader went away.
    :raises Problem: they cannot be written.
    """
    if sys.stdout is None:
        raise Problem("standard output is closed", FAILURE)
    rest = memoryview(octets)
    try:
        descriptor = sys.stdout.fileno()
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _unwritable(error) from None


def _json_octets(text: str) -> bytes:
    if is_terminal(sys.stdout):
        text = _TERMINAL_UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    return f"{text}\n".encode()


def write_text(text: str) -> None:
    """Writes lines for people, in the locale's encoding; what that cannot say is written as escapes."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    _write(f"{text}\n".encode(encoding, "backslashreplace"))


def _write(octets: bytes) -> None:
    """Writes to standard output, at once.

    :raises BrokenPipeError: the reader went away.
    :raises Problem: it cannot be written.
    """
    if sys.stdout is None:
        raise Problem("standard output is closed", FAILURE)
    try:
        sys.stdout.buffer.write(octets)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _unwritable(error) from None


def _unwritable(error: OSError) -> Problem:
    return Problem(f"standard output: {error.strerror or error}", FAILURE)


def report(problem: Problem) -> None:
    """Writes the one line that says what went wrong; where nobody reads standard error, nothing is left to do."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(f"{style_for(sys.stderr).red('pf:')} {clean(str(problem))}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass


def width(text: str) -> int:
    """The columns that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    return sum(_columns(character) for character in text)


def _columns(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def pad(text: str, columns: int) -> str:
    """A text with spaces behind it, to so many columns."""
    return text + " " * (columns - width(text))
