"""How long programs take to start, over the start of the interpreter itself.

Knows the programs' command lines, and runs each by turns with an interpreter that does nothing.  It must not know what
is asked of them.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

__all__ = ["COMMANDS", "take"]

NOTHING = [sys.executable, "-c", "pass"]
_PF = Path(sys.executable).with_name("pf")

COMMANDS = {
    "import protoframe": [sys.executable, "-c", "import protoframe"],
    "from protoframe import connect": [sys.executable, "-c", "from protoframe import connect"],
    "pf --help": [str(_PF), "--help"] if _PF.exists() else [sys.executable, "-m", "protoframe.cli", "--help"],
    "import twisted.internet.reactor": [sys.executable, "-c", "import twisted.internet.reactor"],
}


def milliseconds(command: list[str]) -> float:
    """What a program takes from its start to its end."""
    began = time.perf_counter()
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    return 1000 * (time.perf_counter() - began)


def take(name: str, count: int) -> float:
    """Milliseconds that a program takes more than an interpreter that does nothing: the median of so many pairs."""
    command = COMMANDS[name]
    # Once for what is read from disk, and compiled.
    milliseconds(command)
    return statistics.median(milliseconds(command) - milliseconds(NOTHING) for _ in range(count))
