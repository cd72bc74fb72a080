"""Tests of the sans-I/O core: no reactor, no socket, virtual time."""
