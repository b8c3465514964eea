"""The figures of a leaderboard: score against cost, and the mixtures that the methods came to."""

import math
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from ideal.compare.leaderboard import JOINT
from ideal.compare.tables import label_of
from ideal.report.figures import COLOURS, FAINT, INK, STYLE, is_dark, legend_bar, render, short_label, styles_of
from ideal.report.files import Json, number

WIDE = 6
"""Highest / lowest cost beyond which its axis is logarithmic."""
LONGEST = 26
"""Characters of a row's name beside its bar."""


def draw(content: Json) -> dict[str, Figure]:
    """Every figure that the leaderboard's content allows, by name; to be rendered under STYLE too."""
    figures = {}
    if any(number(row["equivalents"]["mean"]) is not None for row in content["rows"]):
        figures["score_and_cost"] = score_figure(content)
    if content["rows"]:
        figures["mixtures"] = mixtures_figure(content)
    return figures


def rendered(content: Json) -> dict[str, bytes]:
    """The figures as files, name.svg and name.png."""
    with matplotlib.rc_context(STYLE):
        return {
            f"{name}.{ending}": render(figure, ending)
            for name, figure in draw(content).items()
            for ending in ("svg", "png")
        }


def score_figure(content: Json) -> Figure:
    """The average loss over training-run equivalents, each with its standard error; joint's loss as a line."""
    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    axes = figure.subplots()
    points = []
    for row in content["rows"]:
        cost, score = number(row["equivalents"]["mean"]), number(row["losses"]["average"]["mean"])
        if cost is None or score is None:
            continue
        errors = (number(row["losses"]["average"]["error"]), number(row["equivalents"]["error"]))
        control = row["beside"] is not None
        colour = INK if row["row"] == JOINT else FAINT if control else COLOURS[0]
        axes.errorbar(cost, score, yerr=errors[0], xerr=errors[1], color=colour, marker="o", markersize=7,
                      markerfacecolor="white" if control else colour, linewidth=1.2, capsize=3)  # fmt: skip
        if row["row"] == JOINT:
            axes.axhline(score, color=FAINT, linewidth=1, linestyle=(0, (2, 2)), zorder=0)
        points.append((cost, score, short_label(label_of(row), LONGEST)))
    costs = [cost for cost, _, _ in points]
    if max(costs) > WIDE * min(costs):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.margins(x=0.18, y=0.1)
    figure.draw_without_rendering()
    place_names(axes, points)
    axes.grid()
    axes.set_xlabel("cost in training runs, everything included")
    axes.set_ylabel(f"average loss on the {content['losses']} sets (nats per trained token)")
    axes.set_title("Score against cost (lower left is better; dashed: joint)", loc="left")
    return figure


def place_names(axes: Axes, points: list[tuple[float, float, str]]) -> None:
    """A name beside each point, moved up where it would lie on one that is there already."""
    height, width, taken = 13.0, 5.2, list[tuple[float, float, float]]()
    for cost, score, name in sorted(points, key=lambda point: point[1]):
        x, y = axes.transData.transform((cost, score)) * 72 / axes.figure.dpi
        wanted, end = y, x + width * len(name)
        while any(x < right and left < end and abs(wanted - there) < height for left, right, there in taken):
            wanted += 1
        taken.append((x, end, wanted))
        line: Any = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.6} if wanted > y else None
        axes.annotate(name, (cost, score), (9, wanted - y), textcoords="offset points", va="center", fontsize=8.5,
                      arrowprops=line)  # fmt: skip


def mixtures_figure(content: Json) -> Figure:
    """Left: each result's ratios (size / pool). Right: its shares of the trained tokens. Means over seeds."""
    rows, domains = content["rows"], content["domains"]
    styles = styles_of(domains)
    figure = Figure(figsize=(11.0, 1.6 + 0.36 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(rows))
    base = np.zeros(len(rows))
    found = {name: np.array([number(row["ratios"][name]["mean"]) or 0.0 for row in rows]) for name in domains}
    positive = [value for values in found.values() for value in values if value > 0]
    if max(positive) > 25 * min(positive):
        left.set_xscale("log")
        left.xaxis.set_minor_locator(NullLocator())
        left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for index, name in enumerate(domains):
        colour, marker, hatch = styles[name]
        # A domain that is left out has no place on a logarithmic axis.
        ratios = np.where(found[name] > 0, found[name], math.nan)
        errors = np.array([number(row["ratios"][name]["error"]) or 0.0 for row in rows])
        apart = places + 0.1 * (index - (len(domains) - 1) / 2)
        left.errorbar(ratios, apart, xerr=errors, color=colour, marker=marker, markersize=5.5, linestyle="none",
                      linewidth=1)  # fmt: skip
        shares = np.array([number(row["shares"][name]["mean"]) or 0.0 for row in rows])
        right.barh(places, shares, 0.7, base, color=colour, hatch=hatch, edgecolor="white", linewidth=0.8)
        for place, start, share in zip(places, base, shares, strict=True):
            if share >= 0.06:
                ink = "white" if is_dark(colour) else INK
                right.text(start + share / 2, place, f"{100 * share:.0f}%", color=ink, ha="center", va="center",
                           fontsize=8)  # fmt: skip
        base += shares
    left.set_yticks(places, [short_label(label_of(row), LONGEST) for row in rows])
    left.set_ylim(len(rows) - 0.4, -0.6)
    near = bool(max(positive) > 0.5)
    if near:
        left.axvline(1, color=FAINT, linewidth=1, linestyle=(0, (2, 2)), zorder=0)
    left.grid(axis="x")
    left.set_title("Ratio of the result" + " (dashed: whole pool once)" * near, loc="left")
    right.set_title("Share of trained tokens", loc="left")
    right.set_xlim(0, 1)
    right.xaxis.set_major_formatter(PercentFormatter(1))
    handles = [legend_bar(styles[name]) for name in domains]
    labels = [short_label(name) for name in domains]
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9, labelspacing=0.9)
    return figure
