"""What was found of queues, for readers: a table for a terminal, and a page of the documentation.

Knows words and layout.  It takes what was found as it is in JSON, measures nothing, and judges nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

from benchmarks.queues.peers import QUEUES
from benchmarks.report import Found, Row, from_to, in_columns, machine_of, markdown, number, rows_of, versions_of

__all__ = ["PAGE", "page", "table", "write_page"]

PAGE = "queue-benchmarks.md"


def _asked_rows(found: Found) -> Iterable[Row]:
    yield "workload", "protoframe beside", "ratio", "least to most", "asked for", ""
    for asked in found["asked"]:
        numbers = asked["found"]
        wanted = f"at least {asked['least']:g}"
        if numbers:
            verdict = "holds" if asked["holds"] else "does not hold"
            yield asked["workload"], asked["theirs"], number(numbers["median"]), from_to(numbers), wanted, verdict
        else:
            yield asked["workload"], asked["theirs"], "", "", wanted, "not measured"


def _depth_rows(found: Found) -> Iterable[Row]:
    yield "waiting", "filled/s", "published/s", "consumed/s", "MiB of memory", "MiB on disk"
    for each in found["depths"]:

        def median(name: str, figures: list[dict[str, float]] = each["figures"]) -> float:
            return statistics.median(figure[name] for figure in figures)

        speeds = (number(median(name)) for name in ("filled", "published", "consumed"))
        memory = max(median("memory"), median("memory_after"))
        yield (
            f"{each['depth']:,}",
            *speeds,
            number(memory / 2**20),
            number((median("disk") - median("disk_empty")) / 2**20),
        )


def _disk(found: Found) -> str:
    disk = found["disk"]
    return (
        f"{disk['file_system'] or 'a file system that is not told'}; 256 octets and fsync take"
        f" {number(disk['fsync']['median'])} ms (99 of a hundred at most {number(disk['fsync']['99'])} ms)"
    )


def _warnings(found: Found) -> list[str]:
    return [
        f"{name} answers before a message is durable: this version does not know `sync_interval: always`, and has what"
        " was written in the last two minutes go with a loss of power. It is shown, and is not among those that are"
        " compared with."
        for name in found["not_durable"]
    ]


def table(found: Found) -> str:
    """All for a terminal."""
    parts = [f"{machine_of(found)}\n{versions_of(found)}\n{_disk(found)}\n"]
    parts += [f"{workload['name']}\n{in_columns(rows_of(workload))}" for workload in found["workloads"]]
    if found["depths"]:
        parts.append(f"depth\n{in_columns(_depth_rows(found))}")
    if found["c_client"]:
        parts.append(f"{_c_client(found)}\n")
    if found["asked"]:
        parts.append(f"what is asked for\n{in_columns(_asked_rows(found))}")
    if found["interrupted"]:
        parts.append("It was interrupted: this is what had been measured until then.\n")
    return "\n".join(parts + [f"{line}\n" for line in (*_warnings(found), *found["left_out"])])


def _c_client(found: Found) -> str:
    return (
        f"redis-benchmark, a client in C with 64 connections, makes {number(found['c_client'])} `XADD`s a second of 256"
        " octets with `appendfsync always` (for information)."
    )


def page(found: Found) -> str:
    """The page of the documentation, in Markdown."""
    trial = "" if found["scale"] == 1 else f"; it did {found['scale']:g} times the usual work, so take it for a trial"
    parts = [
        HEAD.format(
            day=found["began"].partition("T")[0],
            rounds=found["rounds"],
            minutes=f"{found['seconds'] / 60:.0f}",
            trial=trial,
            machine=machine_of(found),
            disk=_disk(found),
            versions=versions_of(found),
        ),
        "## What is asked for\n",
        markdown(_asked_rows(found)) if found["asked"] else "Nothing of it was measured.\n",
        *(f"{line}\n" for line in _warnings(found)),
        "## Each workload\n",
        WORK,
    ]
    for workload in found["workloads"]:
        parts += [f"### {workload['name'][0].upper()}{workload['name'][1:]}\n", markdown(rows_of(workload))]
    if found["c_client"]:
        parts.append(f"{_c_client(found)}\n")
    if found["depths"]:
        parts += ["## Messages that wait\n", DEPTH, markdown(_depth_rows(found))]
    peers = "\n".join(f"- **{peer.name}** (`{peer.distributions[0]}`). {peer.use}" for peer in QUEUES.values())
    parts += ["## What each queue is, and how it is used\n", f"{peers}\n"]
    if found["left_out"]:
        parts += ["## What was left out\n", "\n".join(f"- {line}" for line in found["left_out"]) + "\n"]
    parts += ["## To repeat it\n", REPEAT]
    return "\n".join(parts)


def write_page(found: Found, directory: Path) -> None:
    """Writes it."""
    (directory / PAGE).write_text(page(found))


HEAD = """\
<!-- Generated by `python -m benchmarks.queues`. Do not edit it: what you change is gone with the next run. -->

# Benchmarks of queues

What `pf-queue` does beside the message queues that one would pick. `make bench-queues` measured it and wrote this page,
so do not edit it.

- **The run**: {day}, {rounds} rounds in {minutes} minutes{trial}.
- **The machine**: {machine}.
- **The disk**: {disk}.
- **The versions**: {versions}.

Numbers of one machine say little about another: read the ratios. Each server and each client is a process of its own,
on the loopback interface, and all servers have their data on the same file system. Clients take turns, round after
round and another first in each. A ratio is protoframe's figure divided by the other's in the same round; what is shown
of all rounds is the median, the least and the most. *The best durable one* is, in each round, the fastest of the others
that answer when a message is durable, whichever kind of queue or way of calling that is.
"""

WORK = """\
Messages have 256 octets. Publishing is durable: the client waits for the answer that says so. *64 in flight* is one
message a call, and 64 of them on the way; *batches of 100* are answered before the next is sent, *4 in flight* has four
of them on the way. Consuming takes messages that wait, with a prefetch of 100, and acknowledges all of them.

What an acknowledgement is worth differs. Only protoframe's and Redis' are answered, when they are durable; RabbitMQ and
NATS answer none, so that theirs are on their way to the disk when the time ends.
"""

DEPTH = """\
protoframe alone, with a server of its own for each depth. So many messages are published in batches of 1,000
(*filled*); then messages are published, 64 in flight, and consumed, while the others wait. Memory is what is resident
of the server's, when they wait or after it, whichever is more; on disk is what its directory takes more than before
they came.
"""

REPEAT = """\
```shell
apt-get install --no-install-recommends rabbitmq-server nats-server redis-server
make bench-queues
```

installs the extra `bench` and runs everything. Servers that the packages have started may be stopped: each run starts
its own, with a directory below `--dir`. `python -m benchmarks.queues --help` tells how to measure less or more; every
figure is in `build/queue-benchmarks.json`, or where `--json PATH` says. What is not installed is left out.
"""
