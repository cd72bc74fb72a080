"""What was found, for readers: a table for a terminal, and a page of the documentation.

Knows words and layout.  It takes what was found as it is in JSON, measures nothing, and judges nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import PEERS
from benchmarks.workloads import CURVES, GROWTH, Curve

__all__ = [
    "from_to",
    "in_columns",
    "machine_of",
    "markdown",
    "number",
    "page",
    "rows_of",
    "table",
    "versions_of",
    "write_page",
]

Found = dict[str, Any]
Row = Sequence[str]


def number(value: float) -> str:
    """With three digits that count, or all before the point."""
    for least, text in ((100, ",.0f"), (10, ",.1f"), (1, ",.2f")):
        if abs(value) >= least:
            return format(value, text)
    return f"{value:,.3f}"


def from_to(numbers: Found) -> str:
    return f"{number(numbers['least'])} to {number(numbers['most'])}"


def _wanted(asked: Found) -> str:
    unit = "" if asked["theirs"] else " ms"
    if asked["least"] is not None:
        return f"at least {asked['least']:g}{unit}"
    return f"at most {asked['most']:g}{unit}"


def rows_of(workload: Found) -> Iterable[Row]:
    """Of each peer: its median, the spread, our ratio to it, and that one's spread."""
    yield "", workload["unit"], "least to most", "ratio", "least to most"
    for peer, found in workload["peers"].items():
        ratio = found["ratio"]
        ratios = (number(ratio["median"]), from_to(ratio)) if ratio else ("", "")
        yield peer, number(found["median"]), from_to(found), *ratios


def _asked_rows(found: Found) -> Iterable[Row]:
    yield "workload", "ratio", "median", "least to most", "asked for", ""
    for asked in found["asked"]:
        what = f"{asked['ours']} / {asked['theirs']}" if asked["theirs"] else f"{asked['ours']}, over the interpreter"
        numbers = asked["found"]
        if numbers:
            verdict = "holds" if asked["holds"] else "does not hold"
            yield asked["workload"], what, number(numbers["median"]), from_to(numbers), _wanted(asked), verdict
        else:
            yield asked["workload"], what, "", "", _wanted(asked), "not measured"


def _loss_rows(found: Found) -> Iterable[Row]:
    yield "", "answered", "late", "run twice", "median ms", "99 % ms", "slowest ms", "lost packets"
    for row in found["loss"]["rows"]:
        counts = (f"{row[name]:,}" for name in ("answered", "late", "repeated"))
        times = (number(row["milliseconds"][part]) for part in ("50", "99", "100"))
        yield row["name"], *counts, *times, f"{row['dropped']:,} of {row['packets']:,}"


def in_columns(rows: Iterable[Row]) -> str:
    """Rows below one another, for a terminal."""
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines) + "\n"


def table(found: Found) -> str:
    """All for a terminal."""
    parts = [f"{machine_of(found)}\n{versions_of(found)}\n"]
    parts += [f"{workload['name']}\n{in_columns(rows_of(workload))}" for workload in found["workloads"]]
    if found["loss"]:
        parts.append(f"calls under loss\n{in_columns(_loss_rows(found))}")
    if found["asked"]:
        parts.append(f"what is asked for\n{in_columns(_asked_rows(found))}")
    if found.get("interrupted"):
        parts.append("It was interrupted: this is what had been measured until then.\n")
    return "\n".join(parts + [f"{line}\n" for line in found["left_out"]])


def machine_of(found: Found) -> str:
    machine = found["machine"]
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory']:g} GiB, {machine['system']};"
        f" load {machine['load']:g} when it began"
    )


def versions_of(found: Found) -> str:
    return ", ".join(f"{name} {version}" for name, version in found["versions"].items())


# The page.


def markdown(rows: Iterable[Row]) -> str:
    head, *others = rows
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *others]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _curve_rows(curve: Curve, by_name: dict[str, Found]) -> Iterable[Row]:
    points = {along: by_name[name] for along, name in curve.points.items() if name in by_name}
    unit = next(iter(points.values()))["unit"] if points else ""
    yield curve.along, *(f"{peer}, {unit}" for peer in curve.peers)
    for along, workload in points.items():
        cells = (workload["peers"].get(peer) for peer in curve.peers)
        yield f"{along:,}", *(number(cell["median"]) if cell else "" for cell in cells)


def page(found: Found, *, has_figure: bool) -> str:
    """The page of the documentation, in Markdown."""
    by_name = {workload["name"]: workload for workload in found["workloads"]}
    for_curves = {workload.name for workload in GROWTH}
    head = HEAD.format(
        day=found["began"].partition("T")[0],
        minutes=f"{found['seconds'] / 60:.0f}",
        rounds=found["rounds"],
        scaled=""
        if found["scale"] == 1
        else f"; it did {found['scale']:g} times the usual work, so take it for a trial",
        machine=machine_of(found),
        versions=versions_of(found),
    )
    asked = markdown(_asked_rows(found)) if found["asked"] else "Nothing of it was measured.\n"
    parts = [head, "## What is asked for\n", asked]
    parts += _direct(by_name)
    if has_figure:
        parts.append("![How many times as fast protoframe is as each peer, and cost as work grows](benchmarks.png)\n")
    parts.append("## Each workload\n")
    parts.append(WORK)
    for workload in found["workloads"]:
        if workload["name"] not in for_curves:
            parts += [f"### {workload['name'][0].upper()}{workload['name'][1:]}\n", markdown(rows_of(workload))]
    parts.append("## Cost as work grows\n")
    parts += [text for curve in CURVES for text in (f"### {curve.title}\n", markdown(_curve_rows(curve, by_name)))]
    parts.append("## Calls under loss\n")
    parts += _loss(found)
    parts += ["## What each peer is, and how it is used\n", _peers()]
    if found["left_out"]:
        parts += ["## What was left out\n", "\n".join(f"- {line}" for line in found["left_out"]) + "\n"]
    parts += ["## To repeat it\n", REPEAT]
    return "\n".join(parts)


HEAD = """\
<!-- Generated by `python -m benchmarks`. Do not edit it: what you change is gone with the next run. -->

# Benchmarks

What protoframe does beside its peers. `make bench` measured it and wrote this page, so do not edit it.

- **The run**: {day}, {rounds} rounds in {minutes} minutes{scaled}.
- **The machine**: {machine}.
- **The versions**: {versions}.

Numbers of one machine say little about another: read the ratios. Each server and each client is a process of its own,
on the loopback interface; the clients take turns, round after round and another first in each, so that a machine whose
speed drifts does so for all. A ratio is protoframe's figure divided by the other's in the same round; what is shown of
all rounds that have one is the median, the least and the most. Two processes that share a few cores with whatever else
runs there are no laboratory: where the spread is wide, believe the median little.
"""

WORK = """\
*Calls* ask for a text of 11 octets in capitals. *Payloads* are octets that the other end counts, one payload at a time;
a megabyte is 10^6 octets. The *stream* is of such short texts, which the server sends. *Opening* is a connection, one
call on it, and its end, with 16 at a time. *Memory* is what a server's resident memory grows by for each connection
that is open and idle, without what the system keeps for its socket; afterwards each of them answers a call. That these
take at most twice what raw ones take is asked for of connections that have not had a call yet; what they keep once they
have had one is *each called once*, of which nothing is asked. *Start-up* is what a program takes from start to end more
than `python -c pass`, in milliseconds. For memory and start-up, less is better.
"""

REPEAT = """\
```shell
make bench
```

installs the extra `bench` and runs everything, which takes ten to fifteen minutes on a machine that does nothing else.
`python -m benchmarks --list` names the workloads; `--only TEXT`, `--peer NAME`, `--rounds N` and `--scale X` measure
less or more; every figure is in `build/benchmarks.json`, or where `--json PATH` says. Peers that are not installed are
left out, as are calls under loss where there is no root, `ip` or `iptables`.
"""


DIRECT = """\
The raw echo and the hand-written loop are no limits: they write by `transport.write`, which leaves octets to the
reactor's next turn. protoframe gives them to the socket itself, when all that came is dealt with and after every 16
events, which is why it can be as fast as they are, or faster. Those called *direct* do the same, and nothing is asked
of the ratios to them: they show what protoframe's own work takes. Nor is the echo of raw datagrams a limit, one at a
time: it sleeps until a datagram comes, and protoframe stays awake where the next one mostly comes at once."""

#: Of what direct ones the ratios are told.
DIRECT_ONES = [
    ("calls, one at a time", "raw echo, direct"),
    ("calls, one at a time", "hand-written, direct"),
    ("calls, 64 in flight", "hand-written, direct"),
    ("calls, 512 in flight", "hand-written, direct"),
]


def _direct(by_name: dict[str, Found]) -> list[str]:
    """What the plain ones are no limit of, and what those show that are nearer to it."""
    ratios = [
        f"{number(ratio['median'])} of *{peer}*, {name.removeprefix('calls, ')}"
        for name, peer in DIRECT_ONES
        if (ratio := by_name.get(name, {"peers": {}})["peers"].get(peer, {}).get("ratio"))
    ]
    return [
        f"{DIRECT} The calls a second that protoframe makes are {'; '.join(ratios)}.\n" if ratios else f"{DIRECT}\n"
    ]


LOSS = """\
Two network namespaces are joined by a link that loses so many of a hundred packets each way, at random. At each loss
there are 16 calls at a time on four connections, and every tenth handler takes 50 ms; *late* are those that had no
answer within 10 seconds.
"""


def _loss(found: Found) -> list[str]:
    if not found["loss"]:
        return ["It was not measured in this run; `make lossy` does it by itself, where it may.\n"]
    parts = [LOSS, markdown(_loss_rows(found))]
    compared = found["loss"]["compared"]
    if compared:
        percentiles = compared["percentiles"]
        parts.append(
            f"At {compared['loss']:g} % and with 64 small calls in flight the 99th percentile is"
            f" {number(percentiles['udp'])} ms over UDP and {number(percentiles['tcp'])} ms over TCP"
            f" ({compared['congestion_control']}): UDP / TCP {number(compared['ratio']['median'])}"
            f" ({from_to(compared['ratio'])}; at most {compared['most']:g} is asked for).\n"
        )
    return parts


def _peers() -> str:
    return "\n".join(f"- **{peer.name}** (`{peer.distributions[0]}`). {peer.use}" for peer in PEERS.values()) + "\n"


def write_page(found: Found, directory: Path) -> None:
    """Writes ``benchmarks.md``, and ``benchmarks.png`` where what draws it is installed."""
    try:
        from benchmarks import figures
    except ImportError:
        print("there is no figure: matplotlib is not installed", file=sys.stderr)
        has_figure = False
    else:
        has_figure = figures.draw(found, directory / "benchmarks.png")
    (directory / "benchmarks.md").write_text(page(found, has_figure=has_figure))
