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
    "max_connections": (1, 10_000_000),
    "stream_credit": (1024, 1 << 30),
    "max_unread": (0, 1 << 40),
    "cancel_burst": (1, 1_000_000),
    "ping_burst": (1, 1_000_000),
    "max_sessions": (1, 10_000_000),
    "max_replies": (0, 1 << 40),
}
#: What must not be below another.
ROOM = {"max_unfinished": 1 << 30, "max_unsent": 1 << 30, "connection_credit": 1 << 30}
TIMES = (
    "keepalive_idle",
    "keepalive_timeout",
    "write_timeout",
    "drain_timeout",
    "handshake_timeout",
    "frame_timeout",
    "close_timeout",
    "session_retention",
    "default_timeout",
)
RATES = ("cancel_rate", "ping_rate")


class LimitsTests(SynchronousTestCase):
    def test_each_of_them_is_tested(self):
        self.assertEqual({*BOUNDS, *ROOM, *TIMES, *RATES}, {field.name for field in dataclasses.fields(Limits)})

    def test_the_defaults_are_in_their_bounds(self):
        self.assertEqual(dataclasses.replace(Limits()), Limits())

    def test_each_number_is_taken_at_its_bounds_and_refused_beyond(self):
        for name, (least, most) in BOUNDS.items():
            for value in (least, most):
                self.assertEqual(getattr(Limits(**ROOM, **{name: value}), name), value)
            for value in (least - 1, most + 1):
                error = self.assertRaises(ValueError, Limits, **ROOM, **{name: value})
                self.assertEqual(str(error), f"{name}: expected {least} to {most}, got {value}")

    def test_what_holds_messages_holds_at_least_one(self):
        for name in ("max_unfinished", "max_unsent"):
            Limits(max_message=2048, **{name: 2048})
            error = self.assertRaises(ValueError, Limits, max_message=2048, **{name: 2047})
            self.assertEqual(str(error), f"{name}: expected 2048 to {1 << 40}, got 2047")

    def test_the_credit_of_all_streams_is_no_less_than_that_of_one(self):
        Limits(stream_credit=2048, connection_credit=2048)
        for credit in (2047, (1 << 30) + 1):
            self.assertRaises(ValueError, Limits, stream_credit=2048, connection_credit=credit)

    def test_times_and_rates_are_finite_and_above_0(self):
        for name in (*TIMES, *RATES):
            self.assertEqual(getattr(Limits(**{name: 1}), name), 1)
            for value in (0, -1.0, float("inf"), float("nan")):
                self.assertRaises(ValueError, Limits, **{name: value})

    def test_what_is_no_number_is_refused(self):
        for name in (*BOUNDS, *ROOM, *TIMES, *RATES):
            for value in ("1", None, True):
                self.assertRaises(TypeError, Limits, **{name: value})
        self.assertRaises(TypeError, Limits, max_calls=1.5)

    def test_they_cannot_be_changed(self):
        self.assertRaises(dataclasses.FrozenInstanceError, setattr, Limits(), "max_calls", 1)
