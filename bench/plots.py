"""What was found as plots: bars for each case, from its median with its minimum and maximum; for `growth`, lines."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.suites import SUITES

mpl.rcParams.update({"svg.hashsalt": "tricorn", "svg.fonttype": "none", "font.size": 8, "axes.axisbelow": True})
OURS, OTHERS = "#c0392b", "#8a98a8"
COLUMNS = 3  # of small plots beside each other


def draw(suites: dict[str, dict[str, Any]], directory: Path) -> None:
    """Write a plot of each suite, as SVG."""
    for name, found in suites.items():
        panels = [
            (f"{case}: {figure}" if len(SUITES[name].shown) > 1 else case, values)
            for case, servers in found["cases"].items()
            for figure in SUITES[name].shown
            if (values := {server: figures[figure] for server, figures in servers.items() if figure in figures})
        ]
        if not panels:
            continue
        draw_panels = _lines if name == "growth" else _bars
        picture = draw_panels(panels)
        picture.suptitle(SUITES[name].about, fontsize=9, wrap=True)
        picture.savefig(directory / f"{name}.svg", metadata={"Date": None})


def _bars(panels: list[tuple[str, dict[str, list[float]]]]) -> Figure:
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    height = 0.6 + 0.22 * max(len(values) for _, values in panels)
    picture = Figure((4 * columns, height * rows + 0.6), layout="constrained")
    for place, (title, values) in enumerate(panels, 1):
        axes: Axes = picture.add_subplot(rows, columns, place)
        middles = {server: median(each) for server, each in values.items()}
        spread = [
            [middle - min(values[server]) for server, middle in middles.items()],
            [max(values[server]) - middle for server, middle in middles.items()],
        ]
        colors = [OURS if server.startswith("tricorn") else OTHERS for server in middles]
        axes.barh(list(middles), list(middles.values()), xerr=spread, color=colors, ecolor="black")
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(title)
    return picture


def _lines(panels: list[tuple[str, dict[str, list[float]]]]) -> Figure:
    picture = Figure((8, 5), layout="constrained")
    axes: Axes = picture.add_subplot()
    for server in dict.fromkeys(server for _, values in panels for server in values):
        points = [(int(title.replace(",", "")), median(values[server])) for title, values in panels if server in values]
        ours = server.startswith("tricorn")
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=server, linewidth=2.5 if ours else 1)
    axes.set(xscale="log", yscale="log", xlabel="connections", ylabel="µs")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    return picture
