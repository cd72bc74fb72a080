"""`tools/lossy.py`: calls over a real link that loses packets, and that it tells where what must hold does not."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.processes import ROOT, environment

TOOLS = ROOT / "tools"
SCRIPT = TOOLS / "lossy.py"
#: The exit status of a test that cannot be run here, as automake has it.
SKIPPED = 77


@pytest.fixture
def lossy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("lossy")


def run(*arguments: str, timeout: float = 240, **variables: str) -> tuple[int, str, str, int]:
    """Runs the script to its end; its exit status, what it prints, and its process id."""
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *arguments],
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            # It ends what it has started.
            process.terminate()
            process.wait()
    return process.returncode, output, errors, process.pid


@pytest.mark.slow
def test_calls_over_a_link_that_loses_packets_are_answered_and_run_once(tmp_path: Path) -> None:
    status, output, errors, pid = run("--quick", "--json", str(tmp_path / "found"))
    if status == SKIPPED:
        pytest.skip(output.strip())
    assert status == 0, output + errors
    assert output.endswith("\nall holds\n")
    for name in ("udp, 10 %", "udp, 50 %", "udp, 10 %, 64 in flight, round 1", "tcp, 10 %, 64 in flight, round 1"):
        assert f"\n{name}: " in f"\n{output}", output
    found = json.loads((tmp_path / "found").read_text())
    assert [(row["name"], row["answered"], row["repeated"]) for row in found["rows"][:1]] == [("udp, 10 %", 100, 0)]
    assert set(found["compared"]["percentiles"]) == {"udp", "tcp"}
    assert found["broken"] == []
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert str(pid) not in left


def test_where_there_can_be_no_network_it_says_why_in_a_line_and_removes_what_it_made(tmp_path: Path) -> None:
    ip = tmp_path / "ip"
    ip.write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\ncase "$2" in delete) ;; *)\n'
        "echo nothing of note >&2; echo Operation not permitted >&2; exit 1;; esac\n"
    )
    ip.chmod(0o755)
    status, output, errors, pid = run("--quick", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert (status, errors) == (SKIPPED, "")
    assert output == f"skipped: `ip netns add pf-lossy-{pid}-server` failed: Operation not permitted\n"
    assert f"netns delete pf-lossy-{pid}-server\n" in (tmp_path / "asked").read_text()


@pytest.mark.parametrize(
    ("values", "in_time", "faults"),
    [
        ({}, True, []),
        ({"answered": 99, "late": 1}, False, []),
        ({"answered": 99, "late": 1}, True, ["1 missed the deadline"]),
        ({"repeated": 2}, False, ["2 ran twice"]),
        ({"not_run": 1}, False, ["1 were answered and did not run"]),
        ({"answered": 98, "hung": 1, "wrong": 1}, False, ["1 hung", "1 had a wrong answer"]),
        ({"answered": 97, "failed": Counter(ConnectionLost=3)}, False, ["3 failed with ConnectionLost"]),
        ({"answered": 99}, False, ["1 had no outcome"]),
        ({"answered": 0, "late": 100}, False, ["none was answered"]),
    ],
)
def test_what_does_not_hold_of_calls_is_told(
    lossy: ModuleType, values: dict[str, Any], in_time: bool, faults: list[str]
) -> None:
    assert lossy.faults_of(lossy.Outcome(**({"answered": 100} | values)), 100, in_time=in_time) == faults


def test_a_link_that_does_not_lose_what_it_should_is_told_where_there_was_enough_to_lose(lossy: ModuleType) -> None:
    assert lossy.loss_fault(100, 1000, 10) == []
    assert lossy.loss_fault(0, 1000, 10) == ["the link dropped 0 of 1,000 packets"]
    assert lossy.loss_fault(0, 100, 10) == []


def test_a_percentile_is_the_time_in_which_so_many_calls_ended(lossy: ModuleType) -> None:
    outcome = lossy.Outcome(milliseconds=[float(number) for number in range(1, 201)])
    assert [outcome.percentile(percent) for percent in (50, 99, 100)] == [100.0, 198.0, 200.0]
