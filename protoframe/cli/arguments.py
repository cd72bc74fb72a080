"""The arguments of a call, as they are typed: ``k=v``, ``k:=json`` and ``k@file``.

Knows that syntax and how JSON is composed; not the server, nor what the method takes.  The content of a file becomes
text or base64 when the parameter's type is known; where the parameter is a stream, it is not read here
(`protoframe.cli.items`).
"""

from __future__ import annotations

import base64
import json
import os
import re
import stat
import sys
import unicodedata
from collections.abc import Callable, Sequence
from typing import IO, Any

from protoframe.cli.problems import USAGE, Problem, clip

__all__ = ["Argument", "compose", "open_file", "parse_arguments", "read_content"]

#: Octets of a file; a longer one is refused unread.  No message is longer (`protoframe.Limits`).
LONGEST_FILE = 1024 * 1024 * 1024

_ARGUMENT = re.compile(r"([^\W\d]\w*)(:=|=|@)(.*)", re.DOTALL)
_FORMS = "k=text, k:=json or k@file"


class Argument:
    """One argument.

    :ivar name: the parameter's.
    :ivar json: the value as JSON text; ``None`` for a file, whose value depends on the parameter.
    :ivar path: the file; ``-`` for standard input.
    :ivar file: the same, once it is open.
    :ivar content: what is in the file, once it is read.
    """

    def __init__(self, name: str, json: str | None, path: str = "") -> None:
        self.name = name
        self.json = json
        self.path = path
        self.file: IO[bytes] | None = None
        self.content = b""

    @property
    def typed(self) -> str:
        """What was typed of it, for errors."""
        return f"{self.name}@{self.path}" if self.json is None else f"{self.name}:="

    def value(self, takes_bytes: bool | None) -> str:
        """The value as JSON text.

        :param takes_bytes: whether the parameter takes bytes; ``None`` where that cannot be known, and then what is not
            UTF-8 is taken for bytes.
        :raises Problem: the content is not UTF-8, and the parameter takes text.
        """
        if self.json is not None:
            return self.json
        if not takes_bytes:
            try:
                return _string(self.content.decode())
            except UnicodeDecodeError as error:
                if takes_bytes is not None:
                    text = f"the content is not UTF-8 (octet {error.start}), and the parameter takes no bytes"
                    raise Problem(f"{self.typed}: {text}", USAGE, "a file with UTF-8 text") from None
        return _string(base64.b64encode(self.content).decode())


def parse_arguments(words: Sequence[str]) -> list[Argument]:
    """Reads what is typed behind the method's name; no file is opened yet.

    :raises Problem: a word is no argument, or two give the same parameter.
    """
    arguments: dict[str, Argument] = {}
    standard_input = ""
    for word in words:
        argument = _parse(word)
        name = argument.name
        if name in arguments:
            raise Problem(f"argument {name} is given twice", USAGE, f"a single {name}")
        arguments[name] = argument
        if argument.path == "-":
            if standard_input:
                both = f"{standard_input}@- and {name}@-"
                raise Problem(f"{both} cannot both read standard input", USAGE, "a file for one")
            standard_input = name
    return list(arguments.values())


def _parse(word: str) -> Argument:
    shown = clip(word, 80)
    try:
        word.encode()
    except UnicodeEncodeError:
        raise Problem(f"argument {shown} is not UTF-8", USAGE, "k@file for what is not text") from None
    match = _ARGUMENT.fullmatch(word)
    if match is None:
        raise Problem(f"{shown!r} is no argument", USAGE, _FORMS)
    # Python compares identifiers in this form, and so do the servers.
    name = unicodedata.normalize("NFKC", match[1])
    sign, text = match[2], match[3]
    if sign == "=":
        return Argument(name, _string(text))
    if sign == ":=":
        return Argument(name, _checked_json(name, text))
    if not text:
        raise Problem(f"{name}@ names no file", USAGE, f"{name}@path, or {name}@- for standard input")
    return Argument(name, None, text)


def _checked_json(name: str, text: str) -> str:
    """JSON text, unchanged: numbers keep every digit."""
    try:
        json.loads(text, parse_constant=_refuse_constant, parse_int=str, parse_float=str)
    except RecursionError:
        raise Problem(f"{name}:= is nested too deep", USAGE, f"{name}@file, or a smaller value") from None
    except ValueError as error:
        raise Problem(
            f"{name}:={clip(text, 80)} is not JSON: {lowered(str(error))}",
            USAGE,
            f"{name}={clip(text, 40)} for a string, or quotes around it, as in {name}:='\"text\"'",
        ) from None
    # Between values JSON takes line ends, and in them none; as spaces they leave the line whole.
    return text.strip().replace("\r", " ").replace("\n", " ")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"there is no {name} in JSON")


def open_file(argument: Argument) -> None:
    """Opens the file of an argument that has one; nothing is read yet.

    :raises Problem: it cannot be opened.
    """
    if argument.json is not None:
        return
    if argument.path == "-":
        if sys.stdin is None:
            raise Problem(f"{argument.typed}: standard input is closed", USAGE, f"{argument.name}@path")
        argument.file = sys.stdin.buffer
        return
    try:
        argument.file = open(argument.path, "rb")  # noqa: SIM115 - it is open until pf ends
    except (OSError, ValueError) as error:
        raise unreadable(argument, error) from None


def read_content(argument: Argument) -> None:
    """Reads the file of an argument that has one.

    :raises Problem: it cannot be read, or has more than 1 GiB.
    """
    if argument.file is None:
        return
    try:
        status = os.fstat(argument.file.fileno())
        length = status.st_size if stat.S_ISREG(status.st_mode) else 0
        content = argument.file.read(LONGEST_FILE + 1) if length <= LONGEST_FILE else None
    except (OSError, ValueError) as error:
        raise unreadable(argument, error) from None
    if content is None or len(content) > LONGEST_FILE:
        raise Problem(f"{argument.typed}: more than {LONGEST_FILE} bytes", USAGE, "a smaller file")
    argument.content = content


def unreadable(argument: Argument, error: Exception) -> Problem:
    """Why a file cannot be read."""
    text = getattr(error, "strerror", None) or str(error)
    return Problem(f"{argument.typed}: {lowered(text)}", USAGE, "the path of a file")


def compose(arguments: Sequence[Argument], takes_bytes: Callable[[str], bool | None]) -> bytes:
    """The arguments as a JSON object.

    :param takes_bytes: tells of a parameter whether it takes bytes; asked for files alone.
    :raises Problem: a file's content does not fit the parameter.
    """
    entries = (
        f"{_string(argument.name)}:{argument.value(None if argument.json is not None else takes_bytes(argument.name))}"
        for argument in arguments
    )
    return f"{{{','.join(entries)}}}".encode()


def lowered(text: str) -> str:
    """A reason, in the middle of a line."""
    return text[:1].lower() + text[1:]


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
