"""A line on a terminal that says what is being measured, and how much is left.

Knows how many steps there are and what each took.  It writes to standard error, and only where that is a terminal
which can write over a line.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import TextIO

__all__ = ["Progress"]

WIDTH = 24


class Progress:
    """A bar over all steps of a run.

    :param total: how many there will be.
    :param is_shown: whether it writes anything.
    """

    def __init__(self, total: int, *, is_shown: bool, output: TextIO = sys.stderr) -> None:
        self._total = total
        self._done = 0
        self._is_shown = is_shown and output.isatty() and os.environ.get("TERM") != "dumb"
        self._output = output
        self._began = time.monotonic()
        self._took: dict[str, float] = {}
        self._left: list[str] = []

    def plan(self, steps: list[str]) -> None:
        """Says which steps there will be, in order, so that what is left is told by what each took before."""
        self._left = steps

    def begin(self, step: str, text: str) -> None:
        """A step begins."""
        self._began = time.monotonic()
        if self._is_shown:
            filled = WIDTH * self._done // max(1, self._total)
            bar = "#" * filled + "-" * (WIDTH - filled)
            line = f"[{bar}] {self._done}/{self._total}  {self._remaining()}{text}"
            self._write(line)

    def end(self, step: str) -> None:
        """It has ended."""
        self._took[step] = time.monotonic() - self._began
        self._done += 1
        self._left = self._left[1:]

    def clear(self) -> None:
        """Leaves an empty line behind."""
        if self._is_shown:
            self._write("")

    def _remaining(self) -> str:
        if not self._took:
            return ""
        mean = sum(self._took.values()) / len(self._took)
        minutes = sum(self._took.get(step, mean) for step in self._left) / 60
        return "less than a minute left  " if minutes < 1 else f"about {minutes:.0f} min left  "

    def _write(self, line: str) -> None:
        columns = shutil.get_terminal_size().columns - 1
        self._output.write(f"\r\x1b[K{line[:columns]}")
        self._output.flush()
