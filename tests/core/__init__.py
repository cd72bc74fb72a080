"""Tests of the sans-I/O core: no reactor, no socket, virtual time."""

from hypothesis import HealthCheck, settings

# How long an example takes depends on what else the machine does: nothing here is told by it.
settings.register_profile("core", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("core")
