"""The pytest plugin: fixtures for a simulated network, and for a server on the loopback interface.

Knows pytest.  It is loaded by every run of pytest where protoframe is installed, so it imports nothing else before a
fixture is asked for, and stands outside of `protoframe.testing`, which brings Twisted in.
"""

from __future__ import annotations

import shlex
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from protoframe.testing.loopback import Loopback
    from protoframe.testing.network import Network


def pytest_addoption(parser: pytest.Parser) -> None:
    """The seed can be given on the command line."""
    parser.getgroup("protoframe").addoption(
        "--pf-seed", type=int, default=None, metavar="SEED", help="the seed of pf_net, to have a failure again"
    )


@pytest.fixture
def pf_net(request: pytest.FixtureRequest) -> Iterator[Network]:
    """A simulated network in virtual time.

    Its seed is that of ``--pf-seed``, or of ``PROTOFRAME_SEED``, or else one that is the test's own.  It is told when
    the test fails.
    """
    from protoframe._context import scope
    from protoframe.testing.network import Network
    from protoframe.testing.seeds import seed_to_replay

    seed = request.config.getoption("--pf-seed")
    if seed is None:
        seed = seed_to_replay()
    network = Network(seed if seed is not None else zlib.crc32(request.node.nodeid.encode()))
    request.node.stash[_NETWORK] = network
    # A deadline that the test sets itself is in the network's time too.
    token = network.enter()
    yield network
    with suppress(ValueError):
        # Something else, such as a greenlet of pytest-twisted's, had a context of its own.
        scope.reset(token)
    network.close()


@pytest.fixture
def pf_loopback() -> Iterator[Loopback]:
    """Serves Protocols on the loopback interface, for tests that `pytest_twisted` runs in the real reactor."""
    import pytest_twisted  # type: ignore[import-untyped]

    from protoframe.testing.loopback import Loopback

    loopback = Loopback()
    yield loopback
    pytest_twisted.blockon(loopback.close())


_NETWORK: pytest.StashKey[Any] = pytest.StashKey()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Says how to have a failure again."""
    outcome: Any = yield
    report = outcome.get_result()
    network = item.stash.get(_NETWORK, None)
    if network is not None and report.failed:
        text = (
            f"pf_net had seed {network.seed}, at {network.now:.6f} s of virtual time\n"
            f"to replay it: pytest --pf-seed={network.seed} {shlex.quote(item.nodeid)}\n"
            f"the last packets:\n{network.trace(12)}"
        )
        report.sections.append(("protoframe", text))
