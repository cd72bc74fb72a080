"""Many deadlines behind one timer."""

from __future__ import annotations

import math
import random

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from protoframe.core.deadlines import Deadlines

TIMES = st.floats(0, 1e9)


class DeadlinesTests(SynchronousTestCase):
    def setUp(self):
        self.awaited = set()
        self.deadlines = Deadlines(lambda entries: [entry for entry in entries if entry[1] in self.awaited])

    def add(self, identifier, due):
        self.awaited.add(identifier)
        self.deadlines.add(identifier, due)

    def test_nothing_is_due_where_there_is_nothing(self):
        self.assertEqual(self.deadlines.earliest(), math.inf)
        self.assertEqual(self.deadlines.pop_due(1e9), [])

    @given(st.lists(TIMES, unique=True, min_size=1), TIMES)
    def test_what_is_due_comes_out_the_earliest_first_and_once(self, times, now):
        self.setUp()
        for identifier, due in enumerate(times):
            self.add(identifier, due)
        self.assertEqual(self.deadlines.earliest(), min(times))
        in_order = sorted(range(len(times)), key=times.__getitem__)
        self.assertEqual(self.deadlines.pop_due(now), [one for one in in_order if times[one] <= now])
        self.assertEqual(self.deadlines.pop_due(1e9), [one for one in in_order if times[one] > now])
        self.assertEqual(self.deadlines.earliest(), math.inf)

    @given(st.dictionaries(st.integers(1, 99), TIMES), st.sets(st.integers(1, 99)))
    def test_what_nobody_waits_for_does_not_come_out(self, due, forgotten):
        self.setUp()
        for identifier, time in due.items():
            self.add(identifier, time)
        self.awaited -= forgotten
        self.assertEqual(sorted(self.deadlines.pop_due(1e9)), sorted(due.keys() - forgotten))

    def test_a_time_that_nobody_waits_for_is_forgotten_when_it_is_met(self):
        self.add(1, 5.0)
        self.add(2, 7.0)
        self.awaited.discard(1)
        self.assertEqual(self.deadlines.pop_due(5.0), [])
        self.assertEqual(self.deadlines.earliest(), 7.0)

    def test_the_heap_stays_in_proportion_to_what_is_alive(self):
        chance = random.Random(1)
        largest = 0
        for identifier in range(20_000):
            self.add(identifier, chance.random() * 1e6)
            self.awaited.discard(identifier - 10)
            self.deadlines.earliest()
            largest = max(largest, len(self.deadlines))
        self.assertLess(largest, 200)

    def test_clear_takes_all_out(self):
        self.add(1, 1.0)
        self.deadlines.clear()
        self.assertEqual(self.deadlines.pop_due(1e9), [])
