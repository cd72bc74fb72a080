"""How ``pf`` fails: one line of text and an exit status.

Knows the statuses and how to keep a line one line, whatever the peer sent; not what went wrong.
"""

from __future__ import annotations

import unicodedata

__all__ = [
    "CONNECT",
    "FAILURE",
    "INTERRUPTED",
    "PIPE",
    "REMOTE",
    "STATUSES",
    "THRESHOLD",
    "TIMEOUT",
    "USAGE",
    "Problem",
    "clean",
    "clip",
]

FAILURE = 1
USAGE = 2
CONNECT = 7
TIMEOUT = 28
REMOTE = 64
THRESHOLD = 99
INTERRUPTED = 130
PIPE = 141

#: For the end of each ``--help``; the backspace keeps click from wrapping it.
STATUSES = """\b
Exit status:
  0    done
  1    pf itself failed, such as on a full disk or for want of a local file
  2    usage: what was typed cannot be
  7    could not connect, or what listens there does not speak protoframe
  28   timed out
  64+n an error from the other end, n its status: 66 declared by the method,
       67 invalid argument, 69 not found, 71 permission denied,
       76 unknown method, 77 internal error, 78 connection lost,
       80 unauthenticated
  99   a threshold of pf bench does not hold
  130  interrupted
  141  the reader of the output went away"""

#: What joins and parts letters within words of some scripts, and emoji.
_JOINERS = "\u200c\u200d"
#: Control and format characters, among them those that turn the direction of text; surrogates; line and paragraph ends.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


class Problem(Exception):
    """Why a command ends without success.

    :param what: what, where and why, in one line.
    :param status: what ``pf`` exits with.
    :param hint: what to try next.
    """

    def __init__(self, what: str, status: int, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.status = status
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what}; try: {self.hint}" if self.hint else self.what


def clean(text: str) -> str:
    """A text that stays on its line and does not drive a terminal: what could do either is written as an escape."""
    if text.isprintable():
        return text
    return "".join(
        _escape(character) if unicodedata.category(character) in _UNSAFE and character not in _JOINERS else character
        for character in text
    )


def clip(text: str, longest: int) -> str:
    """A text of ``longest`` characters at most; an ellipsis stands for what was cut."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _escape(character: str) -> str:
    number = ord(character)
    if number < 0x100:
        return _SHORT.get(character, f"\\x{number:02x}")
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
