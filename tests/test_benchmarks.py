"""`python -m benchmarks`: what figures come to, that the tables of workloads and peers fit one another, and a real run.

No peer needs to be installed but Twisted, which always is.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred

import benchmarks.__main__
from benchmarks import connections, report, results, runner, starts
from benchmarks.loads import Task
from benchmarks.peers import PEERS, Peer, handwritten, handwritten_direct
from benchmarks.peers.direct import give
from benchmarks.progress import Progress
from benchmarks.runner import Failed, Job, Runner, in_turn, jobs_of
from benchmarks.workloads import ASKED, CURVES, WORKLOADS, Asked, Kind, Workload
from tests.processes import ROOT, environment

CALLS = Workload(name="calls", kind=Kind.CALLS, counts={"protoframe": 640, "raw echo": 640}, at_once=64)
FIGURES = {"calls": {"protoframe": [100.0, 90.0, 300.0], "raw echo": [200.0, 100.0, 300.0]}}


def run(*arguments: str, status: int = 0) -> tuple[str, str]:
    """Standard output and standard error of a run of the package."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


# What figures come to.


def test_a_ratio_is_of_the_figures_of_one_round_and_its_median_is_taken_last() -> None:
    ratios = results.within_rounds([100.0, 90.0, 300.0], [200.0, 100.0, 300.0])
    assert results.spread(ratios) == {"median": 0.9, "least": 0.5, "most": 1.0}


def test_rounds_that_are_missing_are_not_passed_over() -> None:
    with pytest.raises(ValueError, match="longer"):
        results.within_rounds([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("least", "most", "found", "holds"),
    [(2.0, None, 2.0, True), (2.0, None, 1.9, False), (None, 2.0, 2.0, True), (None, 2.0, 2.1, False)],
)
def test_what_is_asked_holds_up_to_its_bound(
    least: float | None, most: float | None, found: float, holds: bool
) -> None:
    assert results.holds(Asked("calls", "protoframe", "raw echo", least=least, most=most), found) is holds


def test_what_is_asked_is_judged_by_the_median_of_the_ratios() -> None:
    asked = [Asked("calls", "protoframe", "raw echo", least=0.85), Asked("calls", "protoframe", most=99)]
    ratio, itself = results.asked_of(asked, FIGURES)
    assert (ratio["found"]["median"], ratio["holds"]) == (0.9, True)
    assert (itself["found"]["median"], itself["holds"]) == (100.0, False)


def test_a_ratio_is_of_rounds_that_both_have() -> None:
    assert results.within_rounds([1.0, None, 4.0], [2.0, 2.0, None]) == [0.5]
    assert results.spread([None, 3.0, 1.0]) == {"median": 2.0, "least": 1.0, "most": 3.0}
    peers = results.summary(CALLS, {"protoframe": [1.0, None], "raw echo": [None, 1.0]})["peers"]
    assert (peers["protoframe"]["median"], peers["raw echo"]["ratio"]) == (1.0, None)


def test_what_is_asked_of_something_that_was_not_measured_is_told_and_not_judged(found: dict[str, Any]) -> None:
    asked = [Asked("calls", "protoframe", "AMP", least=8), Asked("streams", "protoframe", "raw echo", least=1)]
    judged = results.asked_of(asked, FIGURES)
    assert [(each["found"], each["holds"]) for each in judged] == [(None, None)] * 2
    for text in (report.table(found | {"asked": judged}), report.page(found | {"asked": judged}, has_figure=False)):
        assert text.count("not measured") - text.count("It was not measured in this run") == 2


def test_a_summary_has_every_figure_and_our_ratio_to_each_other_peer() -> None:
    peers = results.summary(CALLS, FIGURES["calls"])["peers"]
    assert peers["protoframe"]["figures"] == [100.0, 90.0, 300.0]
    assert peers["protoframe"]["ratio"] is None
    assert peers["raw echo"]["ratio"]["median"] == 0.9
    assert results.summary(CALLS, {"raw echo": [1.0]})["peers"]["raw echo"]["ratio"] is None


# The tables.


def test_workloads_have_names_of_their_own_and_peers_that_there_are() -> None:
    assert len({workload.name for workload in WORKLOADS}) == len(WORKLOADS)
    for workload in WORKLOADS:
        known = starts.COMMANDS if workload.kind is Kind.START else PEERS
        assert set(workload.counts) <= set(known), workload.name


@pytest.mark.parametrize("scale", [0.001, 0.3, 1.0])
def test_a_count_fills_each_place_in_flight_alike(scale: float) -> None:
    for workload in WORKLOADS:
        for peer in workload.counts:
            count = workload.count(peer, scale)
            assert count >= workload.at_once, workload.name
            assert count % workload.at_once == 0, workload.name
            assert workload.at_once % workload.connections == 0, workload.name


def test_what_is_asked_and_drawn_is_measured() -> None:
    by_name = {workload.name: workload for workload in WORKLOADS}
    for asked in ASKED:
        assert {asked.ours, asked.theirs or asked.ours} <= set(by_name[asked.workload].counts)
        assert (asked.least is None) != (asked.most is None)
    for curve in CURVES:
        assert list(curve.points) == sorted(curve.points)
        for name in curve.points.values():
            assert "protoframe" in by_name[name].counts


def test_every_peer_is_used_and_its_module_has_the_face_of_one() -> None:
    used = {name for workload in WORKLOADS for name in workload.counts}
    assert set(PEERS) <= used
    for peer in PEERS.values():
        module = ast.parse((ROOT / "benchmarks" / "peers" / f"{peer.module}.py").read_text())
        names = {node.name for node in module.body if isinstance(node, ast.FunctionDef)}
        names |= {alias.name for node in module.body if isinstance(node, ast.ImportFrom) for alias in node.names}
        assert {"serve", "take"} <= names, peer.name


def test_a_peer_that_is_not_installed_is_left_out_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "AMP", Peer("AMP", "amp_", ("twisted", "no-such-distribution"), ""))
    jobs, missing = jobs_of(WORKLOADS, ["calls, "], ["protoframe", "AMP"], 1.0)
    assert {job.peer for job in jobs} == {"protoframe"}
    assert missing == ["AMP is left out: no-such-distribution is not installed"]


def test_the_page_tells_our_ratios_to_those_that_write_at_once(found: dict[str, Any]) -> None:
    figures = {"protoframe": [1.0, 2.0], "raw echo, direct": [2.0, 4.0]}
    workload = results.summary(dataclasses.replace(CALLS, name="calls, one at a time"), figures)
    page = report.page(found | {"workloads": [workload]}, has_figure=False)
    assert "The calls a second that protoframe makes are 0.500 of *raw echo, direct*, one at a time." in page


@pytest.mark.parametrize(("waiting", "takes"), [(b"", 3), (b"", 0), (b"before", 0)])
def test_what_goes_to_the_socket_itself_keeps_its_order_and_none_is_lost(waiting: bytes, takes: int) -> None:
    given: list[bytes] = []
    written = [waiting] if waiting else []

    class Socket:
        def send(self, data: bytes) -> int:
            if not takes:
                raise BlockingIOError
            given.append(data[:takes])
            return takes

    transport = types.SimpleNamespace(dataBuffer=waiting, _tempDataBuffer=[], getHandle=Socket, write=written.append)
    give(transport, b"octets")
    assert b"".join(given + written) == waiting + b"octets"
    assert bool(given) is bool(takes)


def test_the_direct_loop_sends_every_16_frames_and_the_rest_at_the_end() -> None:
    frames = b"".join(
        handwritten.REQUEST.pack(handwritten.REQUEST.size - 4 + 12 + len(body), number, 1.0, 12)
        + b"Speech.upper"
        + body
        for number in range(40)
        for body in [handwritten.encode(handwritten.Upper("a"))]
    )
    sent: list[bytes] = []
    transport = types.SimpleNamespace(
        dataBuffer=b"",
        _tempDataBuffer=[],
        getHandle=lambda: types.SimpleNamespace(send=lambda data: sent.append(data) or len(data)),
    )
    server = handwritten_direct.Server(None)
    server.transport = transport
    server.dataReceived(frames)
    each = handwritten.RESPONSE.size + len(handwritten.encode("A"))
    assert [len(part) // each for part in sent] == [16, 16, 8]


@pytest.mark.parametrize("is_called", [False, True])
def test_connections_that_are_held_are_used_before_memory_is_looked_at_where_it_is_asked_for(
    is_called: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    looks: list[int] = []

    def resident(process: int) -> int:
        looks.append(len(used))
        return 1000 * len(looks)

    async def open_one(number: int) -> int:
        return number

    async def use(number: int) -> None:
        used.append(number)

    monkeypatch.setattr(connections, "resident", resident)
    workload = Workload(name="memory", kind=Kind.IDLE, counts={}, is_called=is_called)
    done: list[float] = []
    Deferred.fromCoroutine(connections.idle_memory(Task(workload, 100, 0), open_one, use)).addCallback(done.append)
    assert done == [1000 / 80]
    assert looks == ([20, 100] if is_called else [0, 0])
    assert sorted(set(used)) == list(range(100))


# Runs.


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a short run finds, as it is in its JSON, with what it prints."""
    path = tmp_path_factory.mktemp("found") / "deep" / "found.json"
    peers = ("--peer", "protoframe", "--peer", "raw echo")
    output, errors = run(
        "--only", "calls, one at a time", *peers, "--rounds", "2", "--scale", "0.01", "--json", str(path)
    )
    written: dict[str, Any] = json.loads(path.read_text())
    return written | {"output": output, "errors": errors}


def test_a_run_measures_each_peer_in_each_round_and_judges_what_is_asked(found: dict[str, Any]) -> None:
    workload = next(each for each in found["workloads"] if each["name"] == "calls, one at a time")
    assert {peer: len(each["figures"]) for peer, each in workload["peers"].items()} == {"protoframe": 2, "raw echo": 2}
    assert all(figure > 0 for each in workload["peers"].values() for figure in each["figures"])
    assert [(each["ours"], each["theirs"]) for each in found["asked"]] == [("protoframe", "raw echo")]
    assert (found["rounds"], found["left_out"]) == (2, [])
    assert {"Python", "twisted", "protoframe"} <= set(found["versions"])
    assert {"processor", "cores", "memory", "system"} <= set(found["machine"])


def test_a_run_prints_a_table_and_no_progress_where_there_is_no_terminal(found: dict[str, Any]) -> None:
    lines = found["output"].splitlines()
    assert any(line.startswith("raw echo ") for line in lines), found["output"]
    assert any("at least 0.85" in line for line in lines), found["output"]
    assert found["errors"] == ""


def test_a_page_says_what_made_it_and_has_what_was_found(found: dict[str, Any]) -> None:
    page = report.page(found, has_figure=False)
    assert page.startswith("<!-- Generated by `python -m benchmarks`.")
    assert f"Python {found['versions']['Python']}" in page
    assert "| raw echo | " in page
    assert "benchmarks.png" not in page
    assert "The raw echo and the hand-written loop are no limits" in page
    assert "The calls a second that protoframe makes are" not in page
    for peer in PEERS.values():
        assert f"- **{peer.name}** (`{peer.distributions[0]}`). {peer.use}" in page


def test_the_page_in_the_documentation_is_one_that_was_generated() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert page.startswith("<!-- Generated by `python -m benchmarks`.")
    assert (ROOT / "docs" / "benchmarks.png").read_bytes().startswith(b"\x89PNG")


def test_a_client_that_fails_is_told_and_every_process_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    start = runner._start

    def remember(*arguments: str, **options: Any) -> Any:
        started.append(start(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(runner, "_start", remember)
    unknown = dataclasses.replace(CALLS, name="unknown")
    running = Runner([Job(unknown, "raw echo", 64)], 2, Progress(2, is_shown=False))
    running.run()
    assert running.figures == {}
    assert running.left_out == ["unknown: raw echo: its client ended with 1: StopIteration"]
    # In both rounds a server and a client, and both once more.
    assert len(started) == 8
    assert all(process.poll() is not None for process in started)


class FakeServer:
    """One that is no process."""

    is_running = True

    def __init__(self, peer: str) -> None:
        self.port = 0
        self.process = types.SimpleNamespace(pid=0)

    def end(self) -> None:
        """It has none."""


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch) -> list[float | BaseException]:
    """What clients find or raise, one after another, and 1 afterwards; there are no processes."""
    coming: list[float | BaseException] = []

    def take(self: Runner, job: Job, port: int, server: int) -> float:
        next_ = coming.pop(0) if coming else 1.0
        if isinstance(next_, BaseException):
            raise next_
        return next_

    monkeypatch.setattr(runner, "Server", FakeServer)
    monkeypatch.setattr(Runner, "_take", take)
    return coming


def test_a_job_that_fails_once_is_tried_again_in_its_round(takes: list[float | BaseException]) -> None:
    takes += [5.0, Failed("a hiccup"), 6.0]
    running = Runner([Job(CALLS, "raw echo", 64)], 2, Progress(2, is_shown=False))
    running.run()
    assert running.figures == {"calls": {"raw echo": [5.0, 6.0]}}
    assert (running.left_out, running.failed) == ([], set())
    assert running.notes == ["calls: raw echo: tried again in round 2: a hiccup"]


def test_a_job_that_fails_twice_in_a_round_keeps_those_of_the_others(takes: list[float | BaseException]) -> None:
    takes += [5.0, Failed("one"), Failed("other"), 7.0]
    running = Runner([Job(CALLS, "raw echo", 64)], 3, Progress(3, is_shown=False))
    running.run()
    assert running.figures == {"calls": {"raw echo": [5.0, None, 7.0]}}
    assert running.left_out == ["calls: raw echo: no figure in round 2 of 3: other"]
    assert running.failed == set()


def test_a_server_that_has_died_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def take(self: Runner, job: Job, port: int, server: int) -> float:
        used.append(self._servers[job.peer].process)
        assert used[-1].poll() is None
        used[-1].kill()
        used[-1].wait()
        return 1.0

    monkeypatch.setattr(Runner, "_take", take)
    running = Runner([Job(CALLS, "raw echo", 64)], 2, Progress(2, is_shown=False))
    running.run()
    assert len(set(used)) == 2
    assert running.notes == ["calls: raw echo: its server had ended, and was started again"]


def test_another_peer_comes_first_in_each_round() -> None:
    jobs = [Job(CALLS, peer, 64) for peer in ("one", "two", "three")]
    jobs += [Job(dataclasses.replace(CALLS, name="other"), "one", 64)]
    turns = [[job.peer for job in in_turn(jobs, round_)] for round_ in range(4)]
    assert turns == [
        ["one", "two", "three", "one"],
        ["two", "three", "one", "one"],
        ["three", "one", "two", "one"],
        ["one", "two", "three", "one"],
    ]


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ("", ""),
        ("a warning\n>\n", "a warning"),
        ("Traceback (most recent call last):\n  File x\n    y()\nValueError: bad\n>\n", "ValueError: bad"),
        (
            (
                "Traceback (most recent call last):\n  File x\ngrpc.AioRpcError: <of RPC that terminated with:\n"
                "\tstatus = CANCELLED\n\tdetails = none\n\tmore\n>\n"
            ),
            "grpc.AioRpcError: <of RPC that terminated with: status = CANCELLED details = none",
        ),
    ],
)
def test_of_a_failure_the_line_is_told_that_names_it(errors: str, said: str) -> None:
    assert runner.said_in(io.BytesIO(errors.encode())) == said


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs calls one at a time of protoframe and the raw echo in this process; its status and what it writes."""
    handlers = {each: signal.getsignal(each) for each in benchmarks.__main__.STOPPING}
    path = tmp_path / "found.json"

    def run_them(*more: str) -> tuple[int, dict[str, Any]]:
        peers = ("--peer", "protoframe", "--peer", "raw echo")
        status = benchmarks.__main__.main(["--only", "calls, one at", *peers, "--quiet", "--json", str(path), *more])
        return status, json.loads(path.read_text())

    yield run_them
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_after_an_interrupt_what_was_measured_is_shown_and_kept(
    takes: list[float | BaseException],
    run_here: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report, "write_page", lambda *_: pytest.fail("a page was written"))
    takes += [10.0, 20.0, KeyboardInterrupt()]
    status, written = run_here("--rounds", "2", "--docs")
    assert status == 130
    assert written["interrupted"]
    peers = written["workloads"][0]["peers"]
    assert {name: peer["figures"] for name, peer in peers.items()} == {
        "protoframe": [10.0, None],
        "raw echo": [20.0, None],
    }
    assert "It was interrupted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("coming", "status"),
    [
        ([], 0),
        ([Failed("no"), Failed("no")], 1),
        ([1.0, Failed("no"), Failed("no")], 0),
    ],
)
def test_the_exit_status_is_1_where_protoframe_has_no_figure(
    coming: list[Any], status: int, takes: list[float | BaseException], run_here: Any
) -> None:
    takes += coming
    assert run_here("--rounds", "1")[0] == status


def test_a_table_is_printed_before_files_are_written(
    takes: list[float | BaseException],
    run_here: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(FileNotFoundError):
        # There is nothing to read.
        run_here("--rounds", "1")
    printed = capsys.readouterr()
    assert "raw echo " in printed.out
    assert printed.err == f"{tmp_path / 'found.json'} is not written: No space left on device\n"


def children(process: int) -> list[int]:
    """The processes that a process has started."""
    return [int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="where there is no /proc, no children are told")
def test_a_hangup_ends_every_server(tmp_path: Path) -> None:
    what = ("--only", "calls, one at a time", "--peer", "raw echo", "--json", str(tmp_path / "found.json"))
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *what],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
    )
    until = time.monotonic() + 20
    # A server and a client.
    while len(started := children(process.pid)) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    assert process.wait(20) == 129
    assert len(started) == 2
    assert not any(Path(f"/proc/{each}").exists() for each in started)


def test_a_server_that_does_not_listen_is_told() -> None:
    running = Runner([Job(CALLS, "nobody", 64)], 1, Progress(1, is_shown=False))
    running.run()
    assert running.left_out == ["calls: nobody: its server does not listen: KeyError: 'nobody'"]


def test_what_there_is_not_is_a_usage_error() -> None:
    _, errors = run("--peer", "pigeon", status=2)
    assert "there is no peer 'pigeon'" in errors
    _, errors = run("--only", "pigeons", status=2)
    assert "no workload has 'pigeons' in its name" in errors
    _, errors = run("--only", "stream of", "--peer", "AMP", status=2)
    assert "none of these peers does any of these workloads" in errors


def test_where_nothing_can_be_written_nothing_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    _, errors = run("--json", str(tmp_path / "file" / "found.json"), status=2)
    assert "cannot be written: " in errors
    _, errors = run("--json", str(tmp_path), status=2)
    assert "cannot be written: Is a directory" in errors


@pytest.mark.parametrize("text", [None, "no JSON", "[1]", "{}"])
def test_what_cannot_be_shown_is_told_in_a_line(
    text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        benchmarks.__main__.main(["--show", str(path)])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert printed.err.startswith(f"{path} cannot be shown: ")


def test_the_list_has_every_workload() -> None:
    output, _ = run("--list")
    names = {line.partition(" (")[0] for line in output.splitlines()}
    assert {workload.name for workload in WORKLOADS} | {"calls under loss"} == names


# What is shown.


class Terminal(io.StringIO):
    """What standard error is to somebody who watches."""

    def isatty(self) -> bool:
        return True


def test_progress_says_what_runs_and_how_much_is_left() -> None:
    output = Terminal()
    progress = Progress(2, is_shown=True, output=output)
    progress.plan(["one", "other"])
    progress.begin("one", "one of them")
    progress.end("one")
    progress.begin("other", "the other")
    assert "0/2  one of them" in output.getvalue()
    assert "1/2  less than a minute left  the other" in output.getvalue()
    progress.clear()
    assert output.getvalue().endswith("\r\x1b[K")


@pytest.mark.parametrize(("output", "is_shown"), [(io.StringIO(), True), (Terminal(), False)])
def test_progress_is_for_terminals_and_for_who_wants_it(output: io.StringIO, is_shown: bool) -> None:
    progress = Progress(1, is_shown=is_shown, output=output)
    progress.begin("one", "one of them")
    progress.clear()
    assert output.getvalue() == ""


def test_progress_writes_nothing_to_a_terminal_that_is_dumb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    output = Terminal()
    Progress(1, is_shown=True, output=output).begin("one", "one of them")
    assert output.getvalue() == ""


@pytest.mark.parametrize("is_drawn", [True, False])
def test_a_page_has_a_figure_where_one_was_drawn(
    is_drawn: bool, found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmarks, "figures", types.SimpleNamespace(draw=lambda *_: is_drawn), raising=False)
    report.write_page(found, tmp_path)
    assert ("benchmarks.png" in (tmp_path / "benchmarks.md").read_text()) is is_drawn


def test_there_is_no_figure_of_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import figures

    assert not figures.draw({"workloads": []}, tmp_path / "benchmarks.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "text"), [(1234567.8, "1,234,568"), (12.345, "12.3"), (1.234, "1.23"), (0.1234, "0.123")]
)
def test_a_number_has_the_digits_that_count(value: float, text: str) -> None:
    assert report.number(value) == text


def test_no_module_is_long() -> None:
    for path in Path(runner.__file__).parent.rglob("*.py"):
        assert len(path.read_text().splitlines()) < 400, path.name
