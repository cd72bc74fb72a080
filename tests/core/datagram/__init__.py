"""Tests of `protoframe.core.datagram`; what two ends make of it together is in `tests.test_seeds`."""
