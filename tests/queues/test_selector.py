"""A selector takes what its pattern and its headers say, and no pattern makes it slow."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from protoframe import InvalidArgument
from protoframe.servers.queue.rates import Rate
from protoframe.servers.queue.selector import Selector

words = st.lists(st.sampled_from(["a", "b", ""]), max_size=6)
patterns = st.lists(st.sampled_from(["a", "b", "*", "#"]), min_size=1, max_size=6)


def matches(pattern, words):
    """The same, from the definition: a ``#`` is no word, or one and a ``#``."""
    if not pattern:
        return not words
    first, rest = pattern[0], pattern[1:]
    if first == "#":
        return matches(rest, words) or (bool(words) and matches(pattern, words[1:]))
    return bool(words) and first in ("*", words[0]) and matches(rest, words[1:])


class SelectorTests(SynchronousTestCase):
    @given(pattern=patterns, words=words)
    def test_a_subject_is_wanted_as_the_definition_says(self, pattern, words):
        subject = ".".join(words)
        expected = matches(pattern, subject.split(".") if subject else [])
        self.assertEqual(Selector(".".join(pattern), {}).takes(subject, {}), expected)

    def test_words_are_whole(self):
        self.assertFalse(Selector("a.*", {}).takes("ab.c", {}))
        self.assertFalse(Selector("a*", {}).takes("ab", {}))
        self.assertTrue(Selector("a*", {}).takes("a*", {}))

    def test_all_its_headers_have_to_be_there(self):
        selector = Selector("", {"a": "1", "b": "2"})
        self.assertTrue(selector.takes("any", {"a": "1", "b": "2", "c": "3"}))
        self.assertFalse(selector.takes("any", {"a": "1"}))
        self.assertFalse(selector.takes("any", {"a": "1", "b": "3"}))

    def test_without_anything_to_choose_by_there_is_none(self):
        self.assertIsNone(Selector.of("", {}))
        self.assertIsNone(Selector.of("#", {}))
        self.assertIsNotNone(Selector.of("#", {"a": "1"}))

    def test_a_pattern_of_too_many_words_is_refused(self):
        Selector(".".join("#" * 32), {})
        self.assertRaises(InvalidArgument, Selector, ".".join("#" * 33), {})

    def test_the_worst_pattern_takes_no_time(self):
        selector = Selector("#.a." * 15 + "b", {})
        began = time.process_time()
        self.assertFalse(selector.takes(".".join("a" * 128), {}))
        self.assertLess(time.process_time() - began, 0.5)


class RateTests(SynchronousTestCase):
    def setUp(self):
        self.now = 1000.25
        self.rate = Rate(lambda: self.now)

    def test_less_than_a_minute_counts_as_long_as_it_was(self):
        self.rate.add(30)
        self.assertEqual(self.rate.per_second(), 30)
        self.now += 10
        self.assertEqual(self.rate.per_second(), 3)

    def test_what_happened_more_than_a_minute_ago_does_not_count(self):
        self.rate.add(600)
        self.now += 59
        self.rate.add(60)
        self.now += 30
        self.assertEqual(self.rate.per_second(), 1)
        self.now += 1000
        self.assertEqual(self.rate.per_second(), 0)

    def test_a_steady_rate_is_itself(self):
        for _ in range(500):
            self.now += 0.5
            self.rate.add(7)
        self.assertLess(abs(self.rate.per_second() - 14), 0.3)
