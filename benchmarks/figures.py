"""The figure of the page: how many times as fast protoframe is as each peer, and what becomes of that as work grows.

Knows matplotlib, and what was found as it is in JSON; it judges nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.report import number
from benchmarks.workloads import CURVES, Curve

__all__ = ["draw"]

Found = dict[str, Any]

#: The workloads that have bars.
BARS = [
    "calls, one at a time",
    "calls, 64 in flight",
    "calls, 512 in flight",
    "payloads of 1 KiB",
    "payloads of 64 KiB",
    "payloads of 4 MiB",
    "stream of small items",
    "UDP calls, one at a time",
    "UDP calls, 64 in flight",
]
COLUMNS = 3
#: Of what does next to nothing, and of another framework.
BARE, OTHER = "#9a9a9a", "#3b6ea8"
BARE_ONES = {"raw echo", "raw echo, direct", "raw stream", "raw datagrams", "hand-written", "hand-written, direct"}
COLOURS = {
    "protoframe": "#c8501e",
    "hand-written": "#9a9a9a",
    "raw echo": "#9a9a9a",
    "raw stream": "#9a9a9a",
    "AMP": "#3b6ea8",
    "grpc.aio": "#2f8f6b",
}


def draw(found: Found, path: Path) -> bool:
    """Draws it as a PNG, and tells whether there was anything to draw."""
    by_name = {workload["name"]: workload for workload in found["workloads"]}
    bars = [by_name[name] for name in BARS if name in by_name]
    curves = [curve for curve in CURVES if any(name in by_name for name in curve.points.values())]
    rows_of_bars = [bars[first : first + COLUMNS] for first in range(0, len(bars), COLUMNS)]
    # How many peers the fullest of each row has.
    places = [max(len(workload["peers"]) - 1 for workload in row) for row in rows_of_bars]
    heights = [0.8 + 0.24 * count for count in places] + ([3.0] if curves else [])
    if not heights:
        return False
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, sum(heights) + 0.4), dpi=110, layout="constrained")
        grid = figure.add_gridspec(len(heights), COLUMNS, height_ratios=heights)
        for row, (workloads, count) in enumerate(zip(rows_of_bars, places, strict=True)):
            for column, workload in enumerate(workloads):
                _bars(figure.add_subplot(grid[row, column]), workload, count)
        for index, curve in enumerate(curves):
            _curve(figure.add_subplot(grid[-1, index]), curve, by_name)
        figure.suptitle(
            "protoframe's figure divided by each peer's: to the right of 1 protoframe is faster", fontsize=11
        )
        figure.savefig(path, metadata={"Software": None})
    return True


def _bars(axes: Any, workload: Found, places: int) -> None:
    """Our ratio to each peer, with its spread, on a scale on which twice as fast is as far from 1 as half as fast."""
    peers = [(name, peer["ratio"]) for name, peer in workload["peers"].items() if peer["ratio"]]
    peers.sort(key=lambda each: each[1]["median"])
    for place, (name, ratio) in enumerate(peers):
        median = ratio["median"]
        axes.barh(place, median - 1, left=1, color=BARE if name in BARE_ONES else OTHER, height=0.6)
        axes.hlines(place, ratio["least"], ratio["most"], color="black", linewidth=1)
        axes.annotate(
            f"{number(median)}",
            (max(1.0, ratio["most"]), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_xscale("log")
    least = min([ratio["least"] for _, ratio in peers] + [1.0])
    most = max([ratio["most"] for _, ratio in peers] + [1.0])
    axes.set_xlim(least / 1.3, most * 2.5)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(peers)), [name for name, _ in peers])
    # Bars are as thick everywhere.
    axes.set_ylim(places - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    _plain(axes.xaxis)
    axes.set_title(workload["name"], loc="left", fontsize=10)


def _curve(axes: Any, curve: Curve, by_name: dict[str, Found]) -> None:
    """Each peer's medians as work grows."""
    unit = ""
    for peer in curve.peers:
        points = [
            (along, by_name[name]["peers"][peer])
            for along, name in curve.points.items()
            if name in by_name and peer in by_name[name]["peers"]
        ]
        if not points:
            continue
        unit = by_name[curve.points[points[0][0]]]["unit"]
        along = [each for each, _ in points]
        axes.plot(along, [each["median"] for _, each in points], marker="o", markersize=3, color=COLOURS[peer])
        axes.fill_between(
            along,
            [each["least"] for _, each in points],
            [each["most"] for _, each in points],
            color=COLOURS[peer],
            alpha=0.15,
            linewidth=0,
        )
        axes.annotate(
            peer,
            (along[-1], points[-1][1]["median"]),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=COLOURS[peer],
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    measured = [along for along, name in curve.points.items() if name in by_name]
    ticks = measured[:1]
    for along in measured[1:]:
        # Numbers that would stand in one another are left out.
        if along / ticks[-1] > (measured[-1] / measured[0]) ** 0.12:
            ticks.append(along)
    # To the right of the last point stand the names.
    axes.set_xlim(measured[0] / 1.5, measured[-1] * max(2, measured[-1] / measured[0]) ** 0.4)
    axes.set_xticks(ticks, [_short(tick) if curve.along == "octets" else f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if curve.along == "connections" else (1,)))
    axes.set_xlabel(curve.along)
    axes.set_ylabel(unit)
    _plain(axes.yaxis)
    axes.set_title(curve.title, loc="left", fontsize=10)


def _short(octets: int) -> str:
    """A size, in as few letters as go below an axis."""
    for bits, unit in ((20, "Mi"), (10, "Ki")):
        if octets >> bits:
            return f"{octets >> bits} {unit}"
    return str(octets)


def _plain(axis: Any) -> None:
    """Numbers, and not powers."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
