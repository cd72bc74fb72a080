"""Calls over a link that loses packets, by `tools/lossy.py`, which makes network namespaces of its own.

Knows how that script is run and where it writes what it found; not how packets are lost, nor what must hold of calls.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.runner import ROOT, Failed, end

__all__ = ["NAME", "measure"]

NAME = "calls under loss"
#: Its exit status where it may have no network of its own.
SKIPPED = 77
#: Seconds after which it is given up.
PATIENCE = 900.0


def measure(rounds: int, *, is_quick: bool) -> dict[str, Any]:
    """What it found.

    :raises Failed: it could not be run; the text says why.
    """
    how = ["--quick"] if is_quick else ["--calls", "400", "--loss", "1", "10", "30", "--rounds", str(rounds)]
    with tempfile.TemporaryDirectory(prefix="protoframe-benchmarks-") as directory:
        path = Path(directory) / "found"
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "tools" / "lossy.py"), *how, "--transport", "udp", "tcp", "--json", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            output, errors = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise Failed(f"it had not ended after {PATIENCE:.0f} s") from None
        finally:
            end(process)
        if process.returncode == SKIPPED:
            raise Failed(output.strip().removeprefix("skipped: "))
        if not path.exists():
            lines = (errors.strip() or output.strip() or "it said nothing").splitlines()
            raise Failed(f"it ended with {process.returncode}: {lines[-1]}")
        found: dict[str, Any] = json.loads(path.read_text())
        return found
