"""One scenario, many seeds: what failed with one says so, and how to have it again.

Knows seeds, and the environment that may choose them; not what a scenario does.
"""

from __future__ import annotations

import gc
import os
import shlex
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from protoframe.testing.network import Network

__all__ = ["REPLAY", "SEEDS", "replay_note", "run_seeds", "seed_to_replay", "seeds_to_run"]

#: The environment: one seed to run, and how many to run.
REPLAY, SEEDS = "PROTOFRAME_SEED", "PROTOFRAME_SEEDS"

#: Networks are full of cycles, and the collector would let gigabytes of them gather.
_SEEDS_OF_GARBAGE = 100

Scenario = Callable[[Network], Coroutine[Any, Any, Any]]


def run_seeds(
    scenario: Scenario,
    seeds: int | Iterable[int] = 1000,
    *,
    seconds: float = 600.0,
    check: Callable[[Network], None] | None = None,
    **conditions: Any,
) -> int:
    """Runs a scenario in a network of its own for each of many seeds.

    ``PROTOFRAME_SEED`` in the environment has it run for that seed alone, and ``PROTOFRAME_SEEDS`` for so many.

    :param scenario: ``async def scenario(network)``.
    :param seeds: how many, from 0 on, or which.
    :param seconds: of virtual time that each may take.
    :param check: called with the network when the scenario is done, before the network is closed.
    :param conditions: of the network, as `Network` takes them.
    :return: how many were run.
    :raises ValueError: there is no seed to run, or what the environment has is no number.

    What a scenario raises is raised, with a note that has the seed and how to run it again.
    """
    count = 0
    if isinstance(seeds, int) and seeds <= 0:
        raise ValueError(f"seeds: expected 1 or more, got {seeds}")
    for seed in seeds_to_run(seeds):
        network = Network(seed, **conditions)
        count += 1
        try:
            network.run(scenario(network), seconds)
            if check is not None:
                check(network)
        except BaseException as error:
            error.add_note(replay_note(network))
            raise
        finally:
            network.close()
        if not count % _SEEDS_OF_GARBAGE:
            gc.collect()
    return count


def seeds_to_run(seeds: int | Iterable[int]) -> Iterable[int]:
    """The seeds that are asked for: by the environment, or else by the caller.

    :raises ValueError: what the environment has is no number.
    """
    seed, count = seed_to_replay(), _number_in(SEEDS)
    if seed is not None:
        return [seed]
    if count is not None:
        return range(count)
    return range(seeds) if isinstance(seeds, int) else seeds


def seed_to_replay() -> int | None:
    """The seed that the environment asks for.

    :raises ValueError: what it has is no number.
    """
    return _number_in(REPLAY)


def _number_in(name: str) -> int | None:
    text = os.environ.get(name)
    if not text:
        return None
    if not text.isdecimal():
        raise ValueError(f"{name}: expected a whole number, got {text!r}")
    return int(text)


def replay_note(network: Network) -> str:
    """How to have it again."""
    # What follows the last space is which part of the test it is.
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
    command = f"pytest {shlex.quote(test)}" if test else "the same test"
    return (
        f"with seed {network.seed}, at {network.now:.6f} s of virtual time\n"
        f"to replay it: {REPLAY}={network.seed} {command}\n"
        f"the last packets:\n{network.trace(12)}"
    )
