"""Tests of `protoframe.testing`."""
