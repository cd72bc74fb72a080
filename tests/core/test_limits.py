"""Limits are checked when they are made."""

from __future__ import annotations

import dataclasses

from twisted.trial.unittest import SynchronousTestCase

from protoframe.core.limits import Limits

BOUNDS = {
    "max_message": (1024, 1 << 30),
    "max_nesting": (1, 500),
    "max_frame": (2048, 65536),
    "max_calls": (1, 1_000_000),
    "max_waiting": (0, 10_000_000),
}
TIMES = ("handshake_timeout", "frame_timeout", "close_timeout", "default_timeout")


class LimitsTests(SynchronousTestCase):
    def test_the_defaults_are_in_their_bounds(self):
        self.assertEqual(dataclasses.replace(Limits()), Limits())

    def test_each_number_is_taken_at_its_bounds_and_refused_beyond(self):
        for name, (least, most) in BOUNDS.items():
            for value in (least, most):
                self.assertEqual(getattr(Limits(**{"max_unfinished": 1 << 30, name: value}), name), value)
            for value in (least - 1, most + 1):
                error = self.assertRaises(ValueError, Limits, **{name: value})
                self.assertEqual(str(error), f"{name}: expected {least} to {most}, got {value}")

    def test_max_unfinished_holds_at_least_one_message(self):
        self.assertRaises(ValueError, Limits, max_message=2048, max_unfinished=2047)
        Limits(max_message=2048, max_unfinished=2048)

    def test_times_are_finite_and_above_0(self):
        for name in TIMES:
            self.assertEqual(getattr(Limits(**{name: 1}), name), 1)
            for value in (0, -1.0, float("inf"), float("nan")):
                self.assertRaises(ValueError, Limits, **{name: value})

    def test_what_is_no_number_is_refused(self):
        for name in (*BOUNDS, *TIMES):
            for value in ("1", None, True):
                self.assertRaises(TypeError, Limits, **{name: value})
        self.assertRaises(TypeError, Limits, max_calls=1.5)

    def test_they_cannot_be_changed(self):
        self.assertRaises(dataclasses.FrozenInstanceError, setattr, Limits(), "max_calls", 1)
