"""When a call is made again, how often, and which of several servers is left alone."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from protoframe.core.balance import Balance
from protoframe.core.retry import Backoff, RetryBudget, RetryPolicy
from protoframe.errors import (
    ConnectionLost,
    DeadlineExceeded,
    InvalidArgument,
    MessageTooLarge,
    NotFound,
    Status,
    TooManyCalls,
    TryLater,
    Unavailable,
)


class Backoffs(SynchronousTestCase):
    def test_it_grows_to_the_longest(self):
        backoff = Backoff(first=1.0, factor=1.5, longest=60.0, jitter=0.0)
        self.assertEqual([backoff.seconds(failures, 0.5) for failures in (1, 2, 3)], [1.0, 1.5, 2.25])
        for failures in (50, 5000, 10**9):
            self.assertEqual(backoff.seconds(failures, 0.5), 60.0)
        self.assertEqual(Backoff(factor=1.0, jitter=0.0).seconds(10**9, 0.0), 1.0)

    def test_a_part_is_left_to_chance(self):
        backoff = Backoff(first=10.0, jitter=0.2)
        self.assertEqual([backoff.seconds(1, chance) for chance in (0.0, 0.5, 1.0)], [8.0, 9.0, 10.0])

    def test_what_is_out_of_bounds_is_refused(self):
        for wrong in (
            {"first": 0},
            {"factor": 0.9},
            {"longest": 0.5},
            {"jitter": 1.1},
            {"first": "1"},
            {"first": True},
        ):
            self.assertRaises(ValueError, Backoff, **wrong)
        for wrong in ({"attempts": 0}, {"attempts": 101}, {"hedge_after": -1}):
            self.assertRaises(ValueError, RetryPolicy, **wrong)


class Policies(SynchronousTestCase):
    def allows(self, error, times=1, *, may_have_run=False, idempotent=False, **options):
        return RetryPolicy(**options).allows(error, times, may_have_run=may_have_run, idempotent=idempotent)

    def test_only_what_did_not_run_or_may_run_twice_is_made_again(self):
        for error in (Unavailable(), ConnectionLost(), TryLater(), TooManyCalls()):
            self.assertTrue(self.allows(error))
            self.assertFalse(self.allows(error, may_have_run=True))
            self.assertTrue(self.allows(error, may_have_run=True, idempotent=True))

    def test_what_would_be_the_same_again_is_not(self):
        for error in (InvalidArgument(), NotFound(), DeadlineExceeded(), MessageTooLarge()):
            self.assertFalse(self.allows(error, idempotent=True))
        self.assertTrue(self.allows(NotFound(), statuses=frozenset({Status.NOT_FOUND})))

    def test_there_is_an_end_to_it(self):
        self.assertTrue(self.allows(Unavailable(), 3))
        self.assertFalse(self.allows(Unavailable(), 4))
        self.assertFalse(self.allows(Unavailable(), 1, attempts=1))


class Budgets(SynchronousTestCase):
    def test_it_is_a_part_of_the_calls_and_so_many_a_second(self):
        budget = RetryBudget(0.2, 10.0, now=0.0)
        self.assertEqual([budget.take(0.0) for _ in range(12)], [True] * 10 + [False] * 2)
        self.assertEqual([budget.take(0.5) for _ in range(6)], [True] * 5 + [False])
        for _ in range(10):
            budget.made()
        self.assertEqual([budget.take(0.5) for _ in range(3)], [True, True, False])
        self.assertEqual((budget.calls, budget.retries, budget.refused), (10, 17, 4))

    def test_a_quiet_day_is_no_licence(self):
        budget = RetryBudget(0.2, 10.0, now=0.0)
        for _ in range(1000):
            budget.made()
        self.assertEqual(sum(budget.take(86400.0) for _ in range(1000)), 10)

    def test_hedges_are_a_part_of_the_calls_alone(self):
        budget = RetryBudget(0.2, 10.0, now=0.0)
        self.assertEqual([budget.take_hedge(0.0) for _ in range(2)], [True, False])
        for second in range(1, 101):
            budget.made()
            budget.take_hedge(float(second))
        self.assertLessEqual(budget.retries, 21)

    def test_none_at_all(self):
        budget = RetryBudget(0.0, 0.0, now=0.0)
        self.assertEqual([budget.take(9.0) for _ in range(3)], [True, False, False])


class Balances(SynchronousTestCase):
    def test_one_that_fails_five_times_in_a_row_is_left_alone_longer_each_time(self):
        balance = Balance()
        for _ in range(4):
            balance.ended("a", 0.0, Unavailable())
        balance.ended("a", 0.0, None)
        for now, until in ((0.0, 10.0), (10.0, 30.0), (30.0, 60.0)):
            for _ in range(5):
                balance.ended("a", now, Unavailable())
            self.assertEqual(balance.until("a"), until)
            self.assertEqual(balance.without(["a", "b", "c"], now + 5), ["b", "c"])
        balance.ended("a", 61.0, None)
        for _ in range(5):
            balance.ended("a", 62.0, Unavailable())
        self.assertEqual(balance.until("a"), 72.0)

    def test_more_than_half_are_never_left_alone(self):
        balance = Balance()
        for server in "ab":
            for _ in range(5):
                balance.ended(server, 0.0, Unavailable())
        self.assertEqual(balance.without(list("abc"), 1.0), ["a", "b", "c"])
        self.assertEqual(balance.without(list("abcd"), 1.0), ["c", "d"])

    def test_what_a_caller_did_wrong_is_no_fault_of_the_servers(self):
        balance = Balance()
        for _ in range(50):
            balance.ended("a", 0.0, InvalidArgument())
        self.assertEqual(balance.until("a"), 0.0)

    def test_one_that_loses_races_counts_as_slower_until_that_fades(self):
        balance = Balance()
        self.assertEqual(balance.slowness("a", 0.0), 1)
        for expected in (2, 4, 8):
            balance.lost("a", 0.0)
            self.assertEqual(balance.slowness("a", 0.0), expected)
        self.assertEqual([balance.slowness("a", now) for now in (9.0, 11.0, 21.0, 100.0)], [8, 4, 2, 1])
        for _ in range(100):
            balance.lost("b", 0.0)
        self.assertEqual(balance.slowness("b", 0.0), 64)
        balance.forget("b")
        self.assertEqual(balance.slowness("b", 0.0), 1)
