"""`python -m benchmarks.queues`: that the tables fit one another, what is judged, and a real run of pf-queue.

No other queue needs to be installed.
"""

from __future__ import annotations

import ast
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import runner
from benchmarks.__main__ import STOPPING, stop
from benchmarks.queues import disk, report, servers
from benchmarks.queues.__main__ import main
from benchmarks.queues.peers import QUEUES
from benchmarks.queues.runner import asked_of, best_of
from benchmarks.queues.workloads import ASKED, OWN_CALLS, WORKLOADS
from benchmarks.runner import Failed, jobs_of
from tests.processes import ROOT

FIGURES = {
    "publish, 64 in flight": {
        "protoframe": [100.0, 90.0],
        "NATS JetStream": [900.0, 900.0],
        "Redis, pipeline": [50.0, None],
        "RabbitMQ, quorum": [25.0, 30.0],
    }
}


def test_the_best_is_taken_in_each_round_and_not_of_what_is_left_out() -> None:
    of_peers = FIGURES["publish, 64 in flight"]
    assert best_of(of_peers, ["NATS JetStream"]) == [50.0, 30.0]
    assert best_of(of_peers, []) == [900.0, 900.0]
    assert best_of({"protoframe": [1.0], "protoframe, a call each": [2.0]}, []) == []


@pytest.mark.parametrize(("not_durable", "median", "holds"), [(["NATS JetStream"], 2.5, True), ([], 19 / 180, False)])
def test_what_is_asked_is_judged_beside_the_best_durable_one(
    not_durable: list[str], median: float, holds: bool
) -> None:
    (asked,) = asked_of(FIGURES, not_durable, ["publish, 64 in flight"])
    assert asked["found"]["median"] == pytest.approx(median)
    assert asked["holds"] is holds


def test_what_has_nobody_to_be_compared_with_is_not_judged() -> None:
    (asked,) = asked_of({"publish, 64 in flight": {"protoframe": [1.0]}}, [], ["publish, 64 in flight"])
    assert (asked["found"], asked["holds"]) == (None, None)


def test_the_tables_fit_one_another() -> None:
    names = {workload.name: workload for workload in WORKLOADS}
    assert len(names) == len(WORKLOADS)
    assert {asked.workload for asked in ASKED} <= set(names)
    assert {peer for workload in WORKLOADS for peer in workload.counts} == set(QUEUES)
    for peer in QUEUES.values():
        module = ast.parse((ROOT / "benchmarks" / "queues" / "peers" / f"{peer.module}.py").read_text())
        assert "take" in {node.name for node in module.body if isinstance(node, ast.FunctionDef)}, peer.name
    for workload in WORKLOADS:
        for peer in workload.counts:
            for scale in (0.0001, 0.3, 1.0):
                assert workload.count(peer, scale) % (workload.at_once * workload.batch) == 0, workload.name


def test_a_queue_whose_program_is_not_there_is_left_out_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers.shutil, "which", lambda *_, **__: None)
    jobs, missing = jobs_of(WORKLOADS, [], [], 1.0, QUEUES)
    assert {job.peer for job in jobs} == {"protoframe", OWN_CALLS}
    assert (
        "Redis, tasks is left out: the program redis-server (Debian's package of that name) is not installed" in missing
    )


def test_the_size_on_disk_is_of_what_is_there_and_not_of_holes(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "full").write_bytes(bytes(range(256)) * 4096)
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(2**30)
    assert 2**20 <= disk.size(tmp_path) < 2**21


def test_a_server_that_does_not_listen_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = [sys.executable, "-c", "raise SystemExit('no such disk')"]
    monkeypatch.setitem(servers._COMMANDS, "protoframe", lambda *_: (failing, {}))
    with pytest.raises(Failed, match="its server does not listen: no such disk"):
        servers.QueueServer("protoframe", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def handlers() -> Iterator[None]:
    """Has signals be dealt with afterwards as they were before."""
    before = {each: signal.getsignal(each) for each in STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_pf_queue_is_measured_alone_and_every_process_and_file_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[str]] = []
    start = runner.start

    def remember(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
        started.append(start(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(runner, "start", remember)
    monkeypatch.setattr(servers, "start", remember)
    path, work = tmp_path / "found.json", tmp_path / "work"
    work.mkdir()
    what = ("--peer", "protoframe", "--only", "64 in flight", "--rounds", "1", "--scale", "0.001")
    # Nobody was there to be compared with.
    assert main([*what, "--dir", str(work), "--json", str(path), "--check"]) == 1
    found: dict[str, Any] = json.loads(path.read_text())
    assert found["workloads"][0]["peers"]["protoframe"]["figures"][0] > 0
    assert (found["left_out"], found["failed"]) == ([], [])
    assert "not measured" in capsys.readouterr().out
    assert list(work.iterdir()) == []
    # A server and a client.
    assert [process.poll() is None for process in started] == [False, False]
    page = report.page(found)
    assert page.startswith("<!-- Generated by `python -m benchmarks.queues`.")
    assert all(f"- **{peer.name}**" in page for peer in QUEUES.values())


def test_a_queue_that_is_not_durable_is_named() -> None:
    found = {
        "machine": {"processor": "", "cores": 2, "memory": 1, "system": "", "load": 0},
        "versions": {},
        "disk": {"file_system": "ext4", "fsync": {"median": 1.0, "99": 2.0}},
        "workloads": [],
        "depths": [{"depth": 1000, "figures": [dict.fromkeys(DEPTH, 2.0**20)]}],
        "c_client": None,
        "asked": [],
        "interrupted": False,
        "not_durable": ["NATS JetStream"],
        "left_out": [],
    }
    assert "NATS JetStream answers before a message is durable" in report.table(found)
    assert "1,000" in report.table(found)


DEPTH = ("filled", "published", "consumed", "memory", "memory_after", "disk", "disk_empty")


def test_what_there_is_not_is_a_usage_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments in (["--peer", "pigeon"], ["--only", "pigeons"], ["--dir", str(tmp_path / "no")], ["--depth", "0"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
    assert "is no directory" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is not stop


def test_the_page_in_the_documentation_is_one_that_was_generated() -> None:
    page = (ROOT / "docs" / report.PAGE).read_text()
    assert page.startswith("<!-- Generated by `python -m benchmarks.queues`.")


def test_no_module_is_long() -> None:
    for path in (ROOT / "benchmarks" / "queues").rglob("*.py"):
        assert len(path.read_text().splitlines()) < 400, path.name
