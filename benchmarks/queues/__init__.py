"""Measures `pf-queue` beside the message queues that a user would pick."""
