"""The figures of a run: ratios and shares per round, the influence matrix, losses over rounds.

Drawn with matplotlib's object interface, without pyplot, so nothing global is kept and no display is needed.
"""

import io
import math
from collections.abc import Iterable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from ideal.report.files import Json, RunFiles, number, write_atomically
from ideal.report.tables import (
    doubt,
    influence_errors,
    influence_matrix,
    influence_objective,
    objective_errors,
    shorten,
)

# Okabe and Ito's colours (told apart with every common colour blindness), without black and with a darker
# yellow; beyond seven names a lighter tone, other markers and hatches take over.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
FAR_OFF = 4
"""Base loss / highest loss of a round beyond which a panel is logarithmic, so that the rounds stay apart."""
INK, FAINT = "#222222", "#8a8a8a"
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "text.parse_math": False,  # names may hold dollar signs
    "svg.hashsalt": "ideal",  # the same run gives the same file
}


def draw_figures(run: RunFiles) -> list[str]:
    """Draws every figure that the run's files allow into `run.folder`/figures, as PNG and SVG.

    Returns their names without ending, in the order in which the page shows them.
    """
    figures: dict[str, Figure] = {}
    # rc_context restores matplotlib's settings; they are read while drawing and while saving.
    with matplotlib.rc_context(STYLE):
        if any(r.mixture.get("domains") for r in run.rounds):
            figures["ratios"] = ratios_figure(run)
        if any(e.get("reference_loss") for e in [run.base, *(r.evaluation for r in run.rounds)]):
            figures["losses"] = losses_figure(run)
        for this in run.rounds:
            drawn = influence_figure(run, this.number)
            if drawn is not None:
                figures[f"influence_round_{this.number:02d}"] = drawn
        for name, figure in figures.items():
            for ending in ("png", "svg"):
                write_atomically(run.folder / "figures" / f"{name}.{ending}", render(figure, ending))
    return list(figures)


def ratios_figure(run: RunFiles) -> Figure:
    """Left: each domain's ratio (size / pool) per round. Right: its share of the mixture's trained tokens."""
    rounds = [r for r in run.rounds if r.mixture.get("domains")]
    steps = [r.number for r in rounds]
    styles = styles_of([*run.domains, *run.capabilities])
    figure = Figure(figsize=(min(max(9.0, 6.2 + 0.75 * len(steps)), 24.0), 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    base = np.zeros(len(rounds))
    found = {
        name: np.array([_value(r.mixture["domains"].get(name, {}).get("ratio")) for r in rounds])
        for name in run.domains
    }
    positive = [ratio for ratios in found.values() for ratio in ratios if ratio > 0]
    largest, smallest = max(positive, default=0.0), min(positive, default=math.inf)
    logarithmic = largest > 25 * smallest
    for name in run.domains:
        colour, marker, hatch = styles[name]
        entries = [r.mixture["domains"].get(name, {}) for r in rounds]
        # A logarithmic axis has no place for a domain that is left out.
        ratios = np.where(found[name] > 0, found[name], np.nan) if logarithmic else found[name]
        left.plot(steps, ratios, color=colour, marker=marker, markersize=6, linewidth=1.8 * run.method.successive,
                  clip_on=False)  # fmt: skip
        shares = np.nan_to_num(np.array([_value(e.get("share")) for e in entries]))
        right.bar(steps, shares, 0.7, base, color=colour, hatch=hatch, edgecolor="white", linewidth=0.8)
        for x, bottom, share in zip(steps, base, shares, strict=True):
            if share >= 0.05 and len(steps) <= 8:
                ink = "white" if is_dark(colour) else INK
                place = {"ha": "center", "va": "center", "fontsize": 8.5}
                right.text(x, bottom + share / 2, f"{100 * share:.0f}%", color=ink, **place)
        base += shares
    left.axhline(1, color=FAINT, linewidth=1, linestyle=(0, (2, 2)), zorder=0)
    if logarithmic:
        left.set_yscale("log")
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.yaxis.set_minor_locator(NullLocator())
        left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        low, high = min(smallest, 1), max(largest, 1)
        margin = max(0.08 * (high - low), 0.05)
        left.set_ylim(max(low - margin, 0), high + margin)
    left.grid(axis="y")
    left.set_title("Ratio (dashed: whole pool once)", loc="left")
    right.set_title("Share of trained tokens", loc="left")
    right.yaxis.set_major_formatter(PercentFormatter(1))
    right.set_ylim(0, 1)
    for axes in (left, right):
        _round_axis(axes, steps, [str(s) for s in steps])
    # From top to bottom as the bars are stacked.
    names = list(reversed(run.domains))
    handles = [legend_bar(styles[name]) for name in names]
    labels = [short_label(name) for name in names]
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9, labelspacing=0.9)
    return figure


def losses_figure(run: RunFiles) -> Figure:
    """Q, then every capability: mean loss per trained token of the base model and of each round's model."""
    models = [("base", run.base)] if run.base else []
    models += [(str(r.number), r.evaluation) for r in run.rounds if r.evaluation]
    panels: list[str | None] = [None, *run.capabilities]
    columns = min(len(panels), 3 if len(panels) <= 6 else 4)
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.1 * columns if columns > 1 else 5.0, 2.4 * lines + 0.6), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    styles = styles_of([*run.domains, *run.capabilities])
    positions = np.arange(len(models))
    for axes, name in zip(grid, panels, strict=False):
        colour = INK if name is None else styles[name][0]
        keys = ("Q", "Q_test") if name is None else ("reference_loss", "test_loss")
        for key, dashes, face in zip(keys, ("-", (0, (4, 2))), (colour, "white"), strict=True):
            found = [e.get(key) for _, e in models]
            values = np.array([_value(v if name is None else (v or {}).get(name)) for v in found])
            if np.isfinite(values).any():
                axes.plot(positions, values, color=colour, linestyle=dashes, marker="o", markersize=4.5,
                          linewidth=(2.2 if name is None else 1.7) * run.method.successive,
                          markerfacecolor=face)  # fmt: skip
        title = "Q, the objective" if name is None else short_label(name, 18)
        axes.set_title(title, loc="left", fontweight="bold" if name is None else "normal")
        # The base model's loss may lie so far off that the rounds' own change is hard to see.
        rounds = _reference(models, name)
        if len(rounds) > 1 and run.method.successive:
            axes.set_title(f"{rounds[0]:.3f} → {rounds[-1]:.3f}", loc="right", fontsize=8.5, color="#666666")
        axes.grid(axis="y")
        axes.margins(y=0.15)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        base = _value(run.base.get("Q") if name is None else (run.base.get("reference_loss") or {}).get(name))
        if rounds and min(rounds) > 0 and base > FAR_OFF * max(rounds):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
        _round_axis(axes, list(positions), [label for label, _ in models], label="", most=9)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel("round", fontsize=10)
    figure.supylabel("mean loss per trained token", fontsize=10)
    if run.has_tests:
        solid = Line2D([], [], color=INK, marker="o", markersize=4.5)
        dashed = Line2D([], [], color=INK, marker="o", markersize=4.5, linestyle=(0, (4, 2)))
        dashed.set_markerfacecolor("white")
        labels = ["reference sets", "test sets (not used for choosing)"]
        figure.legend([solid, dashed], labels, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    return figure


def influence_figure(run: RunFiles, round_number: int) -> Figure | None:
    """The influence matrix of one round in the form that the step used; None if the round has none."""
    influence = run.round(round_number).influence
    form = "fixed" if run.fixed_budget else "free"
    matrix = influence_matrix(influence, form)
    if matrix is None:
        return None
    rows, objective = list(influence["capabilities"]), influence_objective(run, round_number, form)
    domains = influence["domains"]
    exponent = _exponent(matrix if objective is None else np.vstack([matrix, objective]))
    errors = np.linalg.norm(influence_errors(influence, form), axis=0)
    height = 0.52 if np.isfinite(errors).any() else 0.44
    size = (max(6.0, 4.2 + 0.85 * len(domains)), 2.5 + height * (len(rows) + 1))
    figure = Figure(figsize=size, layout="constrained")
    heights = [len(rows)] + [1] * (objective is not None)
    grid = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    unit_size = 10.0**exponent
    _heat(figure, grid[0], matrix / unit_size, errors / unit_size, rows)
    if objective is not None:
        # Its own colour scale: in the free form it would be a pale average, in a skewed one the only colour.
        own = objective_errors(influence, form).combined
        _heat(figure, grid[1], objective[None] / unit_size, own[None] / unit_size, [""])
        grid[1].set_yticks([0], ["objective\n(own colours)"], fontweight="bold")
        grid[0].tick_params(bottom=False, labelbottom=False)
    long_names = max(len(short_label(name)) for name in domains) > 9
    turn = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if long_names else {}
    grid[-1].set_xticks(range(len(domains)), [short_label(name) for name in domains], **turn)
    unit = "nats per token" if exponent == 0 else f"1e{exponent:+d} nats per token"
    kept = "at a fixed total of tokens" if form == "fixed" else "the total free to change"
    figure.suptitle(
        f"Influence after round {round_number}, {kept}\n"
        f"dL/dbeta in {unit}: the loss changes by beta times this\n"
        "negative: more of this domain lowers this capability's loss" + _doubt_note(errors),
        x=0.01, ha="left", fontsize=10.5,
    )  # fmt: skip
    return figure


def _heat(figure: Figure, axes: Axes, values: np.ndarray, errors: np.ndarray, rows: list[str]) -> None:
    """Coloured cells with their values and, where known, their standard errors."""
    limit = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
    limit = limit or 1.0
    # Blue and red differ for every common colour blindness; blue (loss falls) is negative.
    image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_yticks(range(len(rows)), [short_label(name) for name in rows])
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for edge in range(1, max(values.shape)):
        axes.axvline(edge - 0.5, color="white", linewidth=1.5)
        axes.axhline(edge - 0.5, color="white", linewidth=1.5)
    axes.set_xlim(-0.5, values.shape[1] - 0.5)
    axes.set_ylim(values.shape[0] - 0.5, -0.5)
    for (r, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            ink, error = "white" if abs(value) > 0.6 * limit else INK, float(errors[r, j])
            text = f"{_rounded(value, '+')}{doubt(value, error)}"
            if math.isfinite(error):
                text += f"\n±{_rounded(error)}"
            axes.text(j, r, text, ha="center", va="center", color=ink, fontsize=8.5, linespacing=1.05)
    if values.shape[0] > 1:
        bar = figure.colorbar(image, ax=axes, shrink=0.95, pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8)


def _doubt_note(errors: np.ndarray) -> str:
    if not np.isfinite(errors).any():
        return ""
    return "\n±: standard error of the sampled examples; ?: the sign is uncertain"


def styles_of(names: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and hatch per name; a capability looks like the domain of its name."""
    styles = {}
    for index, name in enumerate(dict.fromkeys(names)):
        cycle, place = divmod(index, len(COLOURS))
        colour = COLOURS[place] if cycle % 2 == 0 else _lighter(COLOURS[place])
        styles[name] = (colour, MARKERS[(place + 3 * cycle) % len(MARKERS)], "" if cycle == 0 else "///")
    return styles


def _reference(models: list[tuple[str, Json]], capability: str | None) -> list[float]:
    """The rounds' Q or reference losses (not the base model's)."""
    found = [e.get("Q") if capability is None else (e.get("reference_loss") or {}).get(capability)
             for label, e in models if label != "base"]  # fmt: skip
    return [value for value in map(_value, found) if math.isfinite(value)]


def _round_axis(axes: Axes, positions: list[int], labels: list[str], label: str = "round", most: int = 14) -> None:
    """Ticks at the rounds, at most `most` of them."""
    shown = range(0, len(positions), math.ceil(len(positions) / most))
    axes.set_xticks([positions[i] for i in shown], [labels[i] for i in shown])
    margin = max(0.5, (4 - len(positions)) / 3)
    axes.set_xlim(positions[0] - margin, positions[-1] + margin)
    axes.set_xlabel(label)


def legend_bar(style: tuple[str, str, str]) -> Line2D:
    """A legend's entry of a name's style."""
    colour, marker, _ = style
    return Line2D([], [], color=colour, marker=marker, markersize=7, linewidth=3)


def short_label(name: str, length: int = 22) -> str:
    """A name that a figure has room for."""
    text = shorten(name, length, "…")
    # Matplotlib leaves labels that start with an underscore out of legends.
    return f" {text}" if text.startswith("_") else text


def _exponent(values: np.ndarray) -> int:
    """The power of ten, a multiple of three, that makes the largest value readable; 0 if it is so already."""
    largest = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 0.0
    if largest == 0 or 0.1 <= largest < 1000:
        return 0
    return 3 * math.floor(math.log10(largest) / 3)


def _rounded(value: float, sign: str = "") -> str:
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:{sign}.{digits}f}".replace("-", "\u2212")


def _value(value: object) -> float:
    found = number(value)
    return math.nan if found is None else found


def _rgb(colour: str) -> tuple[float, float, float]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))  # type: ignore[return-value]


def _lighter(colour: str) -> str:
    return "#" + "".join(f"{round(255 * (0.55 * part + 0.45)):02x}" for part in _rgb(colour))


def is_dark(colour: str) -> bool:
    """Whether text on it should be white."""
    red, green, blue = _rgb(colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue < 0.55


def render(figure: Figure, ending: str) -> bytes:
    """The figure as a file of this ending, png or svg."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    extra = {"metadata": {"Date": None}} if ending == "svg" else {"dpi": 150}
    figure.savefig(buffer, format=ending, facecolor="white", **extra)
    return buffer.getvalue()
