"""``pf bench``: the histogram, thresholds and loops in virtual time, and runs against real servers."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock, deferLater

from protoframe.cli import bench, histogram, loops, main, running
from protoframe.cli.histogram import LONGEST, Histogram
from protoframe.cli.options import Settings
from protoframe.cli.problems import Problem
from protoframe.cli.thresholds import parse_threshold
from protoframe.errors import NotFound, TooManyCalls
from tests import processes
from tests.test_cli import (
    PATIENCE,
    Done,
    Server,
    at_once,
    closed_port,
    ended,
    error_line,
    on_terminal,
    pf,
    pf_each,
    started,
)

TIMES = st.lists(st.one_of(st.integers(0, 5000), st.integers(0, LONGEST)), min_size=1, max_size=300)


def histogram_of(*values: int) -> Histogram:
    made = Histogram()
    for value in values:
        made.record(value)
    return made


class TestHistogram:
    @given(TIMES, st.sampled_from([0.1, 1.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 100.0]))
    def test_a_percentile_is_above_the_exact_one_by_a_thousandth_at_most(
        self, values: list[int], percent: float
    ) -> None:
        exact = sorted(values)[math.ceil(Fraction(repr(percent)) * len(values) / 100) - 1]
        assert exact <= histogram_of(*values).percentile(percent) <= exact * 1.001

    @given(TIMES)
    def test_the_least_the_most_and_the_mean_are_exact_and_the_deviation_is_near(self, values: list[int]) -> None:
        made = histogram_of(*values)
        assert (made.minimum, made.maximum, made.count) == (min(values), max(values), len(values))
        assert made.mean() == sum(values) / len(values)
        assert abs(made.stddev() - statistics.pstdev(values)) <= max(values) / 1000

    @given(TIMES, TIMES)
    def test_two_together_are_as_if_one_had_counted_all(self, some: list[int], others: list[int]) -> None:
        together = histogram_of(*some)
        together.add(histogram_of(*others))
        together.add(Histogram())
        whole = histogram_of(*some, *others)
        assert together.buckets() == whole.buckets()
        for name in ("count", "minimum", "maximum", "clamped"):
            assert getattr(together, name) == getattr(whole, name)
        assert together.mean() == whole.mean()

    @given(TIMES)
    def test_buckets_that_are_recorded_again_are_the_same(self, values: list[int]) -> None:
        made, again = histogram_of(*values), Histogram()
        for upper, count in made.buckets():
            again.record(min(upper, LONGEST), count)
        assert again.buckets() == made.buckets()

    def test_what_is_longer_than_an_hour_counts_as_an_hour_and_is_told(self) -> None:
        made = histogram_of(1000, LONGEST + 1, 10 * LONGEST)
        assert (made.clamped, made.maximum, made.percentile(99.0)) == (2, LONGEST, LONGEST)

    def test_no_rounding_makes_a_share_more_than_it_is(self) -> None:
        assert histogram_of(*range(1000)).percentile(99.9) == 998
        # In floating point 1.1 * 3000 / 100 is more than 33.
        made = Histogram()
        made.record(1, 33)
        made.record(2, 2967)
        assert made.percentile(1.1) == 1

    def test_it_does_not_grow(self) -> None:
        assert histogram._BUCKETS < 40_000

    def test_there_is_no_percentile_of_nothing_and_none_above_100(self) -> None:
        assert Histogram().stddev() == Histogram().mean() == 0.0
        for made, percent in ((Histogram(), 50.0), (histogram_of(1), 0.0), (histogram_of(1), 100.1)):
            with pytest.raises(ValueError, match="percentile"):
                made.percentile(percent)


class TestThresholds:
    @pytest.mark.parametrize(
        ("text", "value", "holds"),
        [
            ("p99<20ms", 19_999_999, True),
            ("p99<20ms", 20_000_000, False),
            ("p99.9 <= 20 ms", 20_000_000, True),
            ("mean<1.5us", 1_400, True),
            ("max<2µs", 1_999, True),
            ("min>1s", 1_000_000_000, False),
            ("rate>=1000", 1000.0, True),
            ("rate>1000", 1000.0, False),
            ("errors<1", 0, True),
            ("unsent<=0", 1, False),
            ("error-rate<1%", 0.0099, True),
            ("error-rate<1%", 0.01, False),
            ("error-rate<=0.01", 0.01, True),
            ("p50<1s", None, False),
        ],
    )
    def test_it_says_what_must_hold(self, text: str, value: float | None, holds: bool) -> None:
        assert parse_threshold(text).holds(value) is holds

    @pytest.mark.parametrize(
        ("text", "understood"),
        [
            ("", "p99<20ms"),
            ("p99", "p99<20ms"),
            ("p99=20ms", "is no threshold"),
            ("p99<-1ms", "is no threshold"),
            ("p99<20", "expected us, ms or s"),
            ("p99<20m", "expected us, ms or s"),
            ("p0<1ms", "no metric 'p0'"),
            ("p99.99<1ms", "no metric 'p99.99'"),
            ("p100<1ms", "p1 to p99.9"),
            ("speed<1", "no metric 'speed'"),
            ("rate>1s", "expected no unit"),
            ("error-rate<1ms", "a fraction, or %"),
            ("p99<20ms" + "x" * 5000, "p99<20ms"),
        ],
    )
    def test_what_is_none_is_refused_with_what_is_understood(self, text: str, understood: str) -> None:
        with pytest.raises(Problem) as caught:
            parse_threshold(text)
        assert caught.value.status == 2
        assert understood in str(caught.value)
        assert len(str(caught.value)) < 300

    def test_a_value_is_told_in_the_unit_that_was_typed(self) -> None:
        assert parse_threshold("p99<20ms").text(31_234_567) == "31.23 ms"
        assert parse_threshold("rate>5").text(12345.6) == "12346"
        assert parse_threshold("error-rate<1%").text(0.015) == "1.5%"
        assert parse_threshold("p99<20ms").text(None) == "unknown"

    def test_it_finds_its_value(self) -> None:
        latency = histogram_of(1000, 2000, 6000)
        for text, value in (("min<1s", 1000), ("p50<1s", 2000), ("mean<1s", 3000), ("max<1s", 6000), ("rate>1", 7.0)):
            assert parse_threshold(text).value(latency, {"rate": 7.0}) == value
        assert parse_threshold("p50<1s").value(Histogram(), {}) is None


class Stalling:
    """A server in virtual time: it answers in no time to speak of, but for a second in which it answers nothing."""

    def __init__(self, clock: Clock, took: float = 0.001, stalls: float = math.inf) -> None:
        self._clock = clock
        self._took = took
        self._stalls = stalls
        self.times: list[float] = []

    def __call__(self) -> Deferred[Any]:
        now = self._clock.seconds()
        self.times.append(now)
        ready = self._stalls + 1.0 if self._stalls <= now < self._stalls + 1.0 else now
        return deferLater(self._clock, ready + self._took - now, lambda: None)


def plan(**more: Any) -> loops.Plan:
    return loops.Plan(**{"concurrency": 1024, "duration": 10.0, **more})


def go(loop: loops.Loop, clock: Clock, until: float = math.inf) -> None:
    """Lets time pass, from one thing that happens to the next."""
    if not loop.elapsed:
        loop.start()
    while not loop.done.called and (calls := clock.getDelayedCalls()):
        at = min(call.getTime() for call in calls)
        if at > until:
            return
        clock.advance(max(0.0, at - clock.seconds()))


def ran(kind: type[loops.Loop], **more: Any) -> tuple[loops.Loop, Stalling]:
    """A run to its end, against a server of its own."""
    clock = Clock()
    server = Stalling(clock, more.pop("took", 0.001), more.pop("stalls", math.inf))
    loop = kind(clock, server, plan(**more))
    go(loop, clock)
    assert loop.done.called
    return loop, server


class TestLoops:
    def test_an_open_loop_counts_what_a_stall_does_to_all_who_would_have_called(self) -> None:
        loop, _ = ran(loops.OpenLoop, rate=100.0, stalls=3.0)
        assert loop.answered == 1000
        assert 0.85e9 < loop.latency.percentile(99) < 1.01e9
        assert loop.latency.percentile(90) > 1e6 * 0.9

    def test_a_closed_loop_omits_them(self) -> None:
        loop, _ = ran(loops.ClosedLoop, concurrency=1, stalls=3.0)
        assert loop.latency.maximum > 0.99e9
        assert loop.latency.percentile(99.9) < 2e6

    def test_whoever_waits_for_its_turn_waits_though_the_server_is_quick(self) -> None:
        loop, _ = ran(loops.OpenLoop, rate=100.0, stalls=3.0, concurrency=1)
        assert loop.answered == 1000
        assert loop.latency.percentile(99) > 0.85e9
        assert loop.service.percentile(99) < 2e6

    def test_calls_go_when_they_are_due_and_one_timer_does_for_many(self) -> None:
        clock = Clock()
        server = Stalling(clock)
        timers = 0
        later = clock.callLater

        def counted(seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
            nonlocal timers
            timers += function.__qualname__.startswith("Timer.")
            return later(seconds, function, *arguments)

        clock.callLater = counted  # type: ignore[method-assign]
        loop = loops.OpenLoop(clock, server, plan(rate=20_000.0, duration=1.0))
        go(loop, clock)
        assert loop.sent == len(server.times) == 20_000
        assert timers <= 2100
        late = [sent - number / 20_000 for number, sent in enumerate(server.times)]
        assert -0.0016 < min(late) <= max(late) < 1e-9
        # What goes before it is due is not quicker for that.
        assert loop.latency.minimum > 0.99e6

    def test_a_slow_rate_sets_few_timers_and_misses_nothing(self) -> None:
        loop, server = ran(loops.OpenLoop, rate=0.5, duration=10.0)
        assert [round(time, 2) for time in server.times] == [0.0, 2.0, 4.0, 6.0, 8.0]
        assert loop.achieved == 0.5

    def test_what_was_due_and_never_sent_is_told(self) -> None:
        loop, _ = ran(loops.OpenLoop, rate=100.0, duration=2.0, warmup=1.0, concurrency=1, took=0.1)
        assert loop.unsent > 150
        assert loop.sent + loop.unsent == 200
        assert 9 <= loop.achieved <= 11

    def test_what_waits_when_the_warm_up_is_over_does_not_go_before_what_counts(self) -> None:
        # 20 a second is what the server can do, and 1000 it is asked for: after the warm-up 980 still wait.
        loop, server = ran(loops.OpenLoop, rate=1000.0, duration=5.0, warmup=1.0, concurrency=10, took=0.5)
        assert sum(time < 1.0 for time in server.times) == len(server.times) - loop.sent == 20
        assert 80 <= loop.sent == loop.answered <= 100
        assert loop.sent + loop.unsent == 5000
        assert loop.achieved == pytest.approx(20.0, abs=2.5)
        # What was due first waited no longer than for what was on the way; those behind it wait for all before them.
        assert 0.49e9 < loop.latency.minimum < 1.1e9
        assert loop.latency.percentile(99) > 4e9
        assert loop.service.maximum < 0.51e9

    def test_of_a_warm_up_that_fills_all_the_time_nothing_is_sent_and_what_was_due_is_told(self) -> None:
        loop, server = ran(loops.OpenLoop, rate=100.0, duration=2.0, warmup=1.0, concurrency=3, took=9.0)
        assert len(server.times) == 3
        assert (loop.sent, loop.answered, loop.failed, loop.unsent) == (0, 0, 0, 200)
        assert (loop.seconds, loop.achieved) == (2.0, 0.0)

    @pytest.mark.parametrize("kind", [loops.OpenLoop, loops.ClosedLoop])
    def test_so_many_requests_and_no_more_are_counted_behind_the_warm_up(self, kind: type[loops.Loop]) -> None:
        rate = 100.0 if kind is loops.OpenLoop else None
        loop, server = ran(kind, rate=rate, concurrency=3, duration=math.inf, requests=50, warmup=1.0)
        assert loop.sent == loop.answered == loop.latency.count == 50
        # In an open loop the first goes a little before it is due.
        assert sum(time >= (0.9984 if rate else 1.0) for time in server.times) == 50
        assert len(server.times) > 100

    def test_a_closed_loop_has_so_many_on_the_way_and_no_more(self) -> None:
        clock, most, now = Clock(), 0, 0

        def call() -> Deferred[None]:
            nonlocal most, now
            now += 1
            most = max(most, now)
            return deferLater(clock, 0.01, back)

        def back() -> None:
            nonlocal now
            now -= 1

        loop = loops.ClosedLoop(clock, call, plan(concurrency=7, duration=1.0))
        go(loop, clock)
        assert most == 7
        assert 690 <= loop.answered <= 707
        assert 690 <= loop.achieved <= 707

    @pytest.mark.parametrize("kind", [loops.OpenLoop, loops.ClosedLoop])
    def test_slow_answers_are_waited_for_and_count(self, kind: type[loops.Loop]) -> None:
        loop, _ = ran(kind, rate=10.0 if kind is loops.OpenLoop else None, concurrency=10, duration=1.0, took=5.0)
        assert loop.answered == loop.sent == 10
        assert loop.latency.minimum >= 4.99e9
        assert loop.seconds == 1.0

    def test_the_very_first_outcome_ends_it_where_it_is_an_error(self) -> None:
        clock = Clock()
        seconds = iter([0.1, 0.2, 0.3])
        loop = loops.ClosedLoop(clock, lambda: deferLater(clock, next(seconds), _raise), plan(concurrency=3))
        failures: list[Any] = []
        loop.done.addErrback(failures.append)
        go(loop, clock)
        assert [failure.type for failure in failures] == [NotFound]
        assert clock.getDelayedCalls() != []  # What else was on the way comes to nothing.
        clock.advance(20.0)
        assert loop.failed == 0

    def test_later_errors_are_counted_by_name_and_do_not_end_it(self) -> None:
        clock = Clock()
        outcomes = iter([lambda: None] + [_raise, lambda: 1 / 0] * 10_000)
        loop = loops.ClosedLoop(clock, lambda: deferLater(clock, 0.1, next(outcomes)), plan(concurrency=1))
        go(loop, clock)
        assert loop.answered == loop.latency.count == 1
        assert loop.failed == loop.sent - 1
        assert {name: kind.status for name, kind in loop.errors.items()} == {"NotFound": 5, "ZeroDivisionError": None}

    def test_names_that_a_server_makes_up_do_not_fill_the_memory(self) -> None:
        clock = Clock()
        numbers = iter(range(10_000))

        def answer() -> None:
            if number := next(numbers):
                raise type(f"Error{number}", (Exception,), {})

        loop = loops.ClosedLoop(clock, lambda: deferLater(clock, 0.01, answer), plan(concurrency=1))
        go(loop, clock)
        assert loop.failed > 900
        assert len(loop.errors) == 51
        assert loop.errors["others"].count == loop.failed - 50

    @pytest.mark.parametrize("kind", [loops.OpenLoop, loops.ClosedLoop])
    def test_calls_that_fail_unsent_are_not_made_over_and_over(self, kind: type[loops.Loop]) -> None:
        clock = Clock()
        made = 0

        def call() -> Deferred[Any]:
            nonlocal made
            made += 1
            return succeed(None) if made == 1 else fail(TooManyCalls())

        loop = kind(clock, call, plan(rate=1000.0 if kind is loops.OpenLoop else None, duration=1.0))
        go(loop, clock)
        assert 10 < made < 30

    def test_what_is_on_the_way_when_it_is_stopped_does_not_count(self) -> None:
        clock = Clock()
        loop = loops.OpenLoop(clock, Stalling(clock, 0.5), plan(rate=10.0, warmup=1.0))
        go(loop, clock, until=3.05)
        loop.stop()
        seconds, answered = loop.seconds, loop.answered
        clock.advance(20.0)
        assert loop.seconds == seconds == pytest.approx(2.0, abs=0.06)
        assert loop.answered == answered == loop.sent - loop.in_flight
        assert loop.unsent == 0

    def test_items_are_added_up(self) -> None:
        clock = Clock()
        loop = loops.ClosedLoop(clock, lambda: deferLater(clock, 0.1, lambda: 3), plan(concurrency=1, requests=5))
        go(loop, clock)
        assert loop.items == 15
        assert loop.achieved_items == pytest.approx(30.0)

    @pytest.mark.parametrize("kind", [loops.OpenLoop, loops.ClosedLoop])
    def test_items_a_second_are_those_that_came_in_time_as_are_answers(self, kind: type[loops.Loop]) -> None:
        clock = Clock()
        rate = 10.0 if kind is loops.OpenLoop else None
        loop = kind(clock, lambda: deferLater(clock, 0.75, lambda: 3), plan(rate=rate, duration=2.0, concurrency=10))
        go(loop, clock)
        assert loop.items == 3 * loop.answered > 6 * loop.achieved > 0
        assert loop.achieved_items == pytest.approx(3 * loop.achieved)


def _raise() -> None:
    raise NotFound("nothing")


class Outcome:
    """What `pf bench` says and exits with when a loop has ended; over no connection."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._patch = monkeypatch
        self._capsys = capsys

    def __call__(self, loop: loops.Loop, *thresholds: str, interrupted: bool = False) -> tuple[int, str, Any]:
        """The status, what is said of the failure, and the object that was written, if one was."""
        settings = Settings(10.0, True, True, None)
        run = bench._Bench(running.Target("tcp:a:1", "A.b"), settings, loop._plan, [], 1)

        def end(*_: Any) -> None:
            run._loop = loop
            if interrupted:
                raise KeyboardInterrupt

        self._patch.setattr(running, "run", end)
        status, said = 0, ""
        try:
            run.run([parse_threshold(one) for one in thresholds])
        except Problem as problem:
            status, said = problem.status, str(problem)
        except KeyboardInterrupt:
            status = 130
        out = self._capsys.readouterr().out
        return status, said, json.loads(out) if out else None


@pytest.fixture
def outcome(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Outcome:
    return Outcome(monkeypatch, capsys)


OVERLOAD = {"rate": 1000.0, "duration": 5.0, "warmup": 0.5, "concurrency": 10}


class TestOutcomes:
    def test_of_an_overload_there_is_a_report_and_thresholds_are_judged(self, outcome: Outcome) -> None:
        loop, _ = ran(loops.OpenLoop, took=0.5, **OVERLOAD)
        status, said, written = outcome(loop)
        assert (status, said) == (0, "")
        assert (written["sent"], written["unsent"]) == (loop.sent, 5000 - loop.sent)
        assert written["answered"] > 50
        status, said, written = outcome(loop, "p99<20ms", "unsent<1", "errors<1")
        assert status == 99
        assert "threshold p99<20ms does not hold: p99 is " in said
        assert "unsent is 49" in said
        assert [one["holds"] for one in written["thresholds"]] == [False, False, True]

    def test_also_where_nothing_that_counts_was_sent(self, outcome: Outcome) -> None:
        loop, _ = ran(loops.OpenLoop, took=9.0, **OVERLOAD)
        status, said, written = outcome(loop, "p99<20ms", "error-rate<1%")
        assert status == 99
        assert "p99 is unknown; threshold error-rate<1% does not hold: error-rate is unknown" in said
        assert (written["sent"], written["answered"], written["unsent"]) == (0, 0, 5000)
        assert set(written["latency_ms"].values()) == {None}
        for status, said, written in (outcome(loop), outcome(loop, "unsent>1")):
            assert status == 1
            assert "nothing was answered, and 5000 calls had to wait; try: a lower --rate" in said
            assert written["unsent"] == 5000

    def test_where_all_that_counts_fails_thresholds_come_before_the_error(self, outcome: Outcome) -> None:
        clock = Clock()
        answers = iter([lambda: None])
        loop = loops.OpenLoop(
            clock, lambda: deferLater(clock, 0.1, next(answers, _raise)), plan(rate=10.0, duration=2.0, warmup=0.05)
        )
        go(loop, clock)
        assert (loop.answered, loop.failed) == (0, 20)
        assert outcome(loop, "p99<20ms")[0] == 99
        status, said, written = outcome(loop, "errors>1")
        assert (status, written["errors"]["NotFound"]["count"]) == (69, 20)
        assert "NotFound: nothing" in said

    def test_what_is_interrupted_before_an_answer_is_told_too(self, outcome: Outcome) -> None:
        clock = Clock()
        loop = loops.OpenLoop(clock, Stalling(clock, 9.0), plan(rate=10.0, concurrency=3))
        go(loop, clock, until=1.05)
        clock.advance(1.05 - clock.seconds())
        loop.stop()
        status, _, written = outcome(loop, interrupted=True)
        assert (status, written["sent"], written["answered"], written["unsent"]) == (130, 3, 0, 8)

    def test_where_none_was_due_none_was_counted(self, outcome: Outcome) -> None:
        # A closed loop knows no calls but those that it sends.
        loop, _ = ran(loops.ClosedLoop, duration=1.0, warmup=1.0, concurrency=1, took=9.0)
        status, said, written = outcome(loop, "p99<20ms")
        assert (status, written) == (2, None)
        assert "no call was counted; try: a longer --duration, or a shorter --warmup" in said
        clock = Clock()
        loop = loops.ClosedLoop(clock, Stalling(clock), plan(warmup=5.0, concurrency=1))
        go(loop, clock, until=1.0)
        loop.stop()
        assert outcome(loop, interrupted=True) == (130, "", None)


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The port of a `twistd pf-upper`, for TCP and UDP."""
    port = processes.free_port()
    places = [f"--listen={kind}:{port}:interface=127.0.0.1" for kind in ("tcp", "udp")]
    with processes.server(tmp_path_factory.mktemp("speech"), "pf-upper", *places) as server:
        server.wait_for_log(r"serving \w+ at udp")
        yield f"127.0.0.1:{port}"


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("desk"))
    yield made
    made.kill()


UPPER = ["Speech.upper", "text=hello"]
SHORT = ["--duration", "400ms", "--warmup", "0.1"]


def summary(done: Done, status: int = 0) -> Any:
    assert done.status == status, done.err
    assert done.out.count("\n") == 1
    return json.loads(done.out)


class TestRuns:
    @pytest.mark.parametrize("kind", ["tcp", "udp"])
    def test_a_closed_loop_makes_calls_one_after_the_other(self, speech: str, kind: str) -> None:
        where = f"{kind}:{speech}"
        done = summary(pf("bench", where, *UPPER, *SHORT, "--json"))
        assert (done["where"], done["method"], done["mode"]) == (where, "Speech.upper", "closed")
        assert (done["rate"], done["concurrency"], done["connections"], done["service_ms"]) == (None, 1, 1, None)
        assert (done["warmup"], done["duration"], done["errors"], done["items"]) == (0.1, 0.4, {}, None)
        assert done["sent"] == done["answered"] > 0
        # One more or less, at the beginning and at the end.
        assert done["achieved"] * 0.4 == pytest.approx(done["answered"], abs=1.01)
        latency = done["latency_ms"]
        order = ["min", "p50", "p75", "p90", "p95", "p99", "p99.9", "max"]
        assert set(latency) == {*order, "mean", "stddev"}
        assert [latency[name] for name in order] == sorted(latency[name] for name in order)
        assert latency["min"] > 0
        assert sum(count for _, count in done["histogram"]) == done["answered"]
        assert done["histogram"][-1][0] / 1000 == pytest.approx(latency["max"], rel=0.001)

    @pytest.mark.parametrize("kind", ["tcp", "udp"])
    def test_an_open_loop_keeps_to_its_rate(self, speech: str, kind: str) -> None:
        words = ["--rate", "250", "--connections", "2", "--json"]
        done = summary(pf("bench", f"{kind}:{speech}", *UPPER, *SHORT, *words))
        assert (done["mode"], done["rate"], done["concurrency"], done["connections"]) == ("open", 250.0, 1024, 2)
        assert done["sent"] == done["answered"] == 100
        assert done["unsent"] == 0
        # How many of the answers came in time is the machine's business, or virtual time's.
        assert 0 < done["achieved"] <= 255
        assert 0 < done["service_ms"]["mean"] <= done["latency_ms"]["mean"]

    def test_a_person_gets_a_table(self, speech: str) -> None:
        closed, open_ = pf_each(
            ["bench", f"tcp:{speech}", *UPPER, *SHORT, "--fail-if", "p99<10s", *more] for more in ([], ["--rate", "50"])
        )
        assert closed.out.startswith(
            f"Speech.upper at tcp:{speech}: closed loop, 1 at a time over 1 connection, 0.4 s\n"
        )
        assert "\nms          latency\nmin  " in closed.out
        assert "open loop, 50 a second" in open_.out
        assert "\nms          latency    service\nmin  " in open_.out
        for done in (closed, open_):
            assert (done.status, done.err) == (0, "")
            assert "\np99<10s  holds: " in done.out

    def test_a_number_of_requests_is_just_that(self, speech: str) -> None:
        done = summary(pf("bench", f"tcp:{speech}", *UPPER, "-n", "123", "-c", "10", "--connections", "3", "--json"))
        assert (done["sent"], done["answered"], done["warmup"]) == (123, 123, 0.0)

    def test_a_threshold_that_does_not_hold_is_99(self, speech: str) -> None:
        words = ["--fail-if", "p99<1us", "--fail-if", "errors<1", "--fail-if", "rate>999999", "--json"]
        done = pf("bench", f"tcp:{speech}", *UPPER, *SHORT, *words)
        judged = summary(done, 99)["thresholds"]
        assert [(one["expression"], one["holds"]) for one in judged] == [
            ("p99<1us", False),
            ("errors<1", True),
            ("rate>999999", False),
        ]
        assert judged[0]["value"] > 1
        line = error_line(done._replace(out=""), 99)
        assert f"Speech.upper at tcp:{speech}: threshold p99<1us does not hold: p99 is " in line
        assert "; threshold rate>999999 does not hold: rate is " in line
        assert "errors" not in line

    def test_the_items_of_streams_are_counted(self, speech: str) -> None:
        words = ["Speech.spell", "word=hello", "--requests", "50"]
        in_json, text = pf_each(["bench", f"tcp:{speech}", *words, *more] for more in (["--json"], []))
        assert summary(in_json)["items"] == 250
        assert "\nitems     250  " in text.out

    def test_where_the_first_call_fails_that_is_all(self, speech: str, desk: Server) -> None:
        where = f"tcp:{speech}"
        cases: list[tuple[list[str], int, str]] = [
            ([where, "Speech.nope"], 76, "there is no method Speech.nope; try: pf list"),
            ([where, "Speech.upper"], 67, "InvalidArgument: $.text: missing"),
            ([closed_port(), *UPPER], 7, "could not connect: connection refused"),
            ([desk.tcp, "Desk.refuse", "reason=x", "-c", "20"], 66, "Refused: not today"),
            # Time enough to connect, on a machine that is busy.
            ([desk.tcp, "Desk.never", "--timeout", "1"], 28, "timed out after 1 s"),
            ([desk.tcp, "Desk.drip", "--timeout", "1"], 28, "timed out after 1 s"),
            ([desk.tcp, "Desk.tell", "text=a"], 2, "no answer (oneway)"),
            ([desk.tcp, "Desk.add", "numbers:=[1]"], 2, "it takes a stream (numbers), and pf bench sends none"),
        ]
        for (_, status, text), done in zip(cases, pf_each(["bench", *words] for words, _, _ in cases), strict=True):
            assert text in error_line(done, status)

    def test_what_cannot_be_is_said_before_anything_is_connected(self, capsys: pytest.CaptureFixture[str]) -> None:
        cases: list[tuple[list[str], str]] = [
            (["--fail-if", "p99<20"], "expected us, ms or s; try: p99<20ms"),
            (["--rate", "0"], "0.001 to 1000000"),
            (["--rate", "nan"], "0.001 to 1000000"),
            (["--duration", "5x"], "such as 10, 10s, 500ms or 2m"),
            (["--duration", "0"], "--duration is 0"),
            (["--warmup", "-1"], "such as 10"),
            (["--duration", "300h"], "0 to 1000000 seconds"),
            (["--concurrency", "0"], "--concurrency"),
            (["--connections", "0"], "--connections"),
            (["--requests", "0"], "--requests"),
            (["x"], "'x' is no argument"),
        ]
        for words, text in cases:
            assert main._run(["bench", closed_port(), "A.b", *words]) == 2
            printed = capsys.readouterr()
            assert text in error_line(Done(2, printed.out, printed.err), 2)

    def test_a_server_that_does_not_describe_itself_is_measured_too(self, desk: Server) -> None:
        done = summary(pf("bench", desk.where["mute"], "Desk.echo", "text=a", "-n", "20", "--json"))
        assert done["answered"] == 20

    def test_progress_is_for_terminals_and_not_when_quiet(self, speech: str) -> None:
        words = ["bench", f"tcp:{speech}", *UPPER, "--duration", "1500ms", "--warmup", "0"]
        shown, quiet = at_once(
            lambda: on_terminal(words, stream="stderr"), lambda: on_terminal([*words, "--quiet"], stream="stderr")
        )
        assert "\r\x1b[K[###" in shown
        assert "/s  p99 " in shown
        assert shown.endswith("\r\x1b[K")
        assert quiet == ""


class Relay:
    """Something between ``pf`` and a server, which can be waited for, and can cut the line.

    :ivar where: where it is.
    :ivar accepted: when it took connections.
    :ivar said: how many octets the server has said, for each.
    :ivar passed: is set when the server has said so much.
    :ivar then: is called then, once, before anything more is passed on: however slow the machine is, what it does is
        done at the same place of the conversation.
    """

    def __init__(self, server: str, octets: int) -> None:
        host, port = server.rsplit(":", 1)
        self._server = (host, int(port))
        self._octets = octets
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.where = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        self.accepted: list[float] = []
        self.said: list[int] = []
        self.passed = threading.Event()
        self.then: Callable[[], None] | None = None
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        # Closed alone, it would take one more: the thread still waits for it.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for one in self._open:
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self.accepted.append(time.monotonic())
                far = socket.create_connection(self._server)
                self._open += [near, far]
                self.said.append(0)
                threading.Thread(target=self._pass, args=(near, far, None), daemon=True).start()
                threading.Thread(target=self._pass, args=(far, near, len(self.said) - 1), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, number: int | None) -> None:
        with contextlib.suppress(OSError):
            while octets := source.recv(65536):
                sink.sendall(octets)
                if number is not None:
                    self.said[number] += len(octets)
                    if sum(self.said) > self._octets and not self.passed.is_set():
                        self.passed.set()
                        if self.then is not None:
                            self.then()
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def relay(speech: str) -> Iterator[Relay]:
    made = Relay(speech, 5_000)
    yield made
    made.close()


class TestConnections:
    def test_calls_go_over_them_in_turn(self, relay: Relay) -> None:
        words = ["-n", "300", "--connections", "3", "--json"]
        assert summary(pf("bench", relay.where, *UPPER, *words))["answered"] == 300
        assert len(relay.accepted) == 3
        # The first has the description too.
        assert min(relay.said) > 1000
        assert max(relay.said[1:]) < 1.1 * min(relay.said[1:])


class TestInterruptions:
    def test_an_interrupt_sums_up_what_was_measured(self, relay: Relay) -> None:
        with started(
            "bench", relay.where, *UPPER, "--duration", "100s", "--warmup", "0", "--json", "-c", "3"
        ) as process:
            assert relay.passed.wait(PATIENCE)
            process.send_signal(signal.SIGINT)
            done = ended(process)
        assert done.err == "pf: interrupted\n"
        measured = summary(done, 130)
        assert 30 < measured["answered"] <= measured["sent"] <= measured["answered"] + 3
        assert 0 < measured["duration"] < 60
        assert measured["errors"] == {}

    def test_a_connection_that_is_lost_is_opened_again_and_the_calls_over_it_are_counted(self, relay: Relay) -> None:
        relay.then = relay.cut
        words = ["-c", "20", "-n", "400", "--json", "--fail-if", "errors<1"]
        measured = summary(pf("bench", relay.where, *UPPER, *words), 99)
        first, second = relay.accepted
        # A second apart as pf sees it.
        assert second - first > 0.5
        assert set(measured["errors"]) == {"ConnectionLost"}
        lost = measured["errors"]["ConnectionLost"]
        assert (lost["status"], lost["exit"]) == (14, 78)
        assert 0 < lost["count"] <= 20
        assert measured["answered"] + lost["count"] == measured["sent"] == 400

    def test_a_server_that_goes_away_for_good_is_counted_as_errors(self, relay: Relay) -> None:
        words = ["--rate", "500", "--duration", "1500ms", "--warmup", "0", "--json"]
        relay.then = relay.close
        measured = summary(pf("bench", relay.where, *UPPER, *words))
        assert measured["answered"] > 10
        assert measured["errors"]["ConnectFailed"]["count"] > 10
        assert measured["answered"] + sum(kind["count"] for kind in measured["errors"].values()) == 750
