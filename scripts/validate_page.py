"""The page and the figure of scripts/validate_influence.py, from the content of validation.json alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from validate_content import AIMS, MEAN_AIM, OFF_AIM, SIGNIFICANT, WORST_AIM
from validate_estimates import JOINT, family_of
from validate_search import whole_runs

from ideal.compare.tables import as_markdown, change
from ideal.report.figures import FAINT, INK, STYLE, render, styles_of
from ideal.report.files import Json, number
from ideal.report.tables import MISSING, Table

DEMO, MODEL = (Path(__file__).with_name(f"validate_{name}.template.md") for name in ("influence", "model"))
"""The page's text; MODEL: for a model and data of one's own."""
SHORT = 50
"""Optimizer steps below which one more or less is a change of its own."""
MET, MISSED = "met", "**missed**"
OTHER_MEASURES = {
    "vector_spearman": "Spearman of the vector",
    "off_diagonal": "off-diagonal Pearson",
    "off_diagonal_spearman": "off-diagonal Spearman",
    "rows": "row by row (Pearson)",
    "size": "predicted / measured size",
}


def cell(value: Any, digits: int = 2) -> str:
    """A number, or a dash."""
    found = number(value)
    return MISSING if found is None else f"{found:.{digits}f}"


def mean_and_worst(found: Json) -> str:
    """Of one measure over seeds."""
    return MISSING if number(found["mean"]) is None else f"{cell(found['mean'])} / {cell(found['worst'])}"


def short(name: str) -> str:
    """A setting's name in a table's head."""
    return name.replace(" start", "").replace(" volume", "")


def verdict_table(content: Json) -> Table:
    """The chosen estimator in every setting: what it reaches, beside what could be reached, and the baseline."""
    estimator, rows = content["choice"]["estimator"], []
    for name, setting in content["settings"].items():
        own, verdict, oracle = setting["estimators"][estimator], setting["verdict"], setting["oracle"]
        rows.append([
            short(name), cell(own["vector"]["mean"]), cell(own["vector"]["worst"]), cell(oracle["ceiling"]["vector"]),
            cell(own["off_diagonal"]["mean"]), cell(oracle["ceiling"]["off_diagonal"]),
            f"{verdict['baseline']}: {cell(verdict['baseline_mean'])}",
            change(verdict["difference"], verdict["difference_error"]),
        ])  # fmt: skip
    header = ["setting", "vector, mean", "worst seed", "ceiling", "off-diagonal", "its ceiling",
              "best without gradients", "difference"]  # fmt: skip
    return Table("", header, rows)


def aims_table(content: Json) -> Table:
    """Met or missed."""
    rows = [
        [short(name), *(MET if setting["verdict"][aim] else MISSED for aim in AIMS)]
        for name, setting in content["settings"].items()
    ]
    header = [f"mean ≥ {MEAN_AIM:.2f}", f"worst seed ≥ {WORST_AIM:.2f}", f"off-diagonal ≥ {OFF_AIM:.2f}",
              "beats the best without gradients"]  # fmt: skip
    return Table("", ["setting", *header], rows)


def verdict_in_words(content: Json) -> str:
    """How many settings meet each aim, and which miss it."""
    lines, every = [], content["settings"]
    for aim, text in AIMS.items():
        missing = [short(name) for name, setting in every.items() if not setting["verdict"][aim]]
        state = "met in all settings" if not missing else f"missed in {len(missing)} of {len(every)}"
        lines.append(f"- {text}: {state}{'' if not missing else ' (' + '; '.join(missing) + ')'}.")
    return "\n".join(lines)


def steps_in_words(content: Json) -> str:
    """Whether a change of the mixture also changed how long training took, where the volume was held."""
    lines = []
    for name, setting in content["settings"].items():
        fewest, most = setting["oracle_steps"]
        if setting["volume"] == "fixed" and fewest < most and fewest < SHORT:
            lines.append(
                f"**{short(name)}: the inner loops took {fewest} to {most} optimizer steps.** Trained tokens are held,"
                " but a step is a number of examples, and domains differ in tokens per example; where training is so"
                " short, what is measured is the steps as much as the mixture. Longer inner loops are needed before"
                " this says anything about influence."
            )
    return "\n\n".join(lines)


def oracle_table(content: Json) -> Table:
    """What retraining says, and how far it can be trusted."""
    rows = []
    for name, setting in content["settings"].items():
        oracle, q = setting["oracle"], np.array(setting["Q"])
        rows.append([
            short(name), cell(setting["steps"], 0), f"{q.mean():.3f} ({q.std(ddof=1):.3f})",
            *(cell(oracle["reliability"][part]) for part in ("vector", "off_diagonal", "matrix")),
            f"{oracle['measured']:.0%} / {oracle['measured_off_diagonal']:.0%}", cell(oracle["reference_and_test"]),
        ])  # fmt: skip
    header = ["setting", "steps", "Q (sd)", "split-half, vector", "off-diagonal", "whole matrix",
              f"entries with \\|t\\| > {SIGNIFICANT:g}, all / off-diagonal", "reference and test vector"]  # fmt: skip
    return Table("", [text.replace("\\|", "|") for text in header], rows)


def entries_table(content: Json, name: str) -> Table:
    """One setting's oracle, entry by entry: mean (t)."""
    oracle = content["settings"][name]["oracle"]
    rows = [
        [capability, *(entry(mean, t) for mean, t in zip(means, ts, strict=True))]
        for capability, means, ts in zip(content["capabilities"], oracle["matrix"], oracle["t"], strict=True)
    ]
    rows.append(["Q", *(entry(mean, t) for mean, t in zip(oracle["vector"], oracle["vector_t"], strict=True))])
    return Table("", ["loss of", *content["domains"]], rows)


def entry(mean: float, t: float | None) -> str:
    """Bold where the t value is large enough."""
    text = f"{mean:+.3f} ({MISSING if t is None else format(t, '+.1f')})"
    return f"**{text}**" if t is not None and abs(t) > SIGNIFICANT else text


def shown(content: Json) -> list[str]:
    """Of each family the damping that was best with the choosing seeds, in the order of the estimators; without such
    seeds, or where a family had no part in the choice, all."""
    every = list(next(iter(content["settings"].values()))["estimators"])
    if not content["choice"]["table"]:
        return every
    ranked = [row["estimator"] for row in content["choice"]["table"]]
    best: dict[str, str] = {}
    for estimator in [*ranked, *every]:
        best.setdefault(family_of(estimator), estimator)
    return [estimator for estimator in every if estimator in best.values()]


def measure_table(content: Json, measure: str, estimators: Sequence[str]) -> Table:
    """Mean / worst seed of one measure: estimators, then baselines."""
    settings, rows = content["settings"], []
    for kind, names in (("estimators", estimators), ("baselines", next(iter(settings.values()))["baselines"])):
        for name in names:
            cells = [mean_and_worst(setting[kind][name][measure]) for setting in settings.values()]
            if measure == "size":
                cells = [cell(setting[kind][name][measure]["mean"], 1) for setting in settings.values()]
            if kind == "baselines" and measure == "size":
                continue
            mark = f"**{name}**" if name == content["choice"]["estimator"] else name
            rows.append([mark if kind == "estimators" else f"*{name}*", *cells])
    return Table("", ["", *map(short, settings)], rows)


def choice_table(content: Json) -> Table:
    """How every estimator did with the choosing seeds."""
    names = list(content["choice"]["table"][0]["settings"])
    rows = [
        [row["estimator"], cell(row["worst"]), *(cell(row["settings"][name]) for name in names)]
        for row in content["choice"]["table"]
    ]
    return Table("", ["estimator", "worst setting", *map(short, names)], rows)


def residuals_table(content: Json) -> Table:
    """How far the joint solver came."""
    every = content["settings"]
    names = next(iter(every.values()))["residuals"]
    rows = [[name, *(cell(setting["residuals"].get(name)) for setting in every.values())] for name in names]
    return Table("", ["residual at the end", *map(short, every)], rows)


def passes_in_words(content: Json) -> str:
    """What few passes and overfit are."""
    return "; ".join(
        f"{name}: the start's ratios x {found['scale']:g}, {found['epochs']:g} passes"
        for name, found in content["passes"].items()
        if found["epochs"] is not None
    )


def markdown(content: Json, figure: str, searches: Mapping[str, Json]) -> str:
    """The page: the template with its places filled. figure: where it lies, relative to the page. searches: the
    search benchmarks' content by page."""
    every = next(iter(content["settings"].values()))["estimators"]
    others = [
        f"**{title}**\n\n{as_markdown(measure_table(content, measure, shown(content)))}"
        for measure, title in OTHER_MEASURES.items()
    ]
    entries = [f"**{name}**\n\n{as_markdown(entries_table(content, name))}" for name in content["settings"]]
    unfinished = f"Not finished: {'; '.join(content['unfinished'])}." if content["unfinished"] else ""
    places = {
        "estimator": content["choice"]["estimator"],
        "seeds": f"{len(content['seeds'])} ({', '.join(map(str, content['seeds']))})",
        "choosing_seeds": ", ".join(map(str, content["choice"]["seeds"])),
        "beta": f"{content['beta']:g}",
        "runs": f"{content['runs']['oracle'] + content['runs']['centres']:,}",
        "segments": str(content["segments"]),
        "iterations": str(JOINT["joint"].solver_iterations),
        "passes": passes_in_words(content),
        "unfinished": unfinished,
        "verdict_in_words": verdict_in_words(content),
        "aims": as_markdown(aims_table(content)),
        "verdict": as_markdown(verdict_table(content)),
        "figure": figure,
        "whole_runs": whole_runs(searches),
        "setup": content["setup"],
        "steps_in_words": steps_in_words(content),
        "oracle": as_markdown(oracle_table(content)),
        "vector": as_markdown(measure_table(content, "vector", list(every))),
        "residuals": as_markdown(residuals_table(content)),
        "others": "\n\n".join(others),
        "choice": as_markdown(choice_table(content)) if content["choice"]["table"] else "",
        "entries": "\n\n".join(entries),
    }
    text = (DEMO if content["choice"]["table"] else MODEL).read_text(encoding="utf-8")
    for name, value in places.items():
        text = text.replace(f"{{{name}}}", value)
    return text.replace("\n\n\n\n", "\n\n")


def figure_of(content: Json) -> Figure:
    """A column for each start and passes; for each volume a row of the vector and one of the off-diagonal entries."""
    columns = list(dict.fromkeys((s["start"], s["passes"]) for s in content["settings"].values()))
    volumes = list(dict.fromkeys(s["volume"] for s in content["settings"].values()))
    figure = Figure(figsize=(3.1 * len(columns) + 1.6, 5.4 * len(volumes)), layout="constrained")
    panels = figure.subplots(2 * len(volumes), len(columns), squeeze=False)
    for setting in content["settings"].values():
        column = columns.index((setting["start"], setting["passes"]))
        row = 2 * volumes.index(setting["volume"])
        _vector_panel(panels[row][column], content, setting)
        _entries_panel(panels[row + 1][column], content, setting)
        panels[row][column].set_title(
            f"{setting['start']}, {setting['passes']}\n{setting['volume']} volume", loc="left"
        )
    for row in range(2 * len(volumes)):
        what = "off-diagonal entries" if row % 2 else "dQ/dβ"
        panels[row][0].set_ylabel(f"measured {what}")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 2 * len(columns)), frameon=False)
    figure.suptitle(f"{content['choice']['estimator']}, each panel scaled to the measured size", x=0.01, ha="left")
    return figure


def _vector_panel(axes: Axes, content: Json, setting: Json) -> None:
    """Each seed's prediction faint, their mean with the measured value's standard error."""
    predicted, measured = np.array(setting["predicted"]), np.array(setting["oracle"]["vector"])
    errors = np.array(setting["oracle"]["vector_error"])
    predicted = _scaled(predicted, predicted.mean(axis=0), measured)
    styles = styles_of(content["domains"])
    for number_, domain in enumerate(content["domains"]):
        colour, marker, _ = styles[domain]
        ys = np.full(len(predicted), measured[number_])
        axes.plot(predicted[:, number_], ys, marker, color=colour, alpha=0.3, markersize=4, markeredgewidth=0)
        axes.errorbar(
            predicted[:, number_].mean(), measured[number_], yerr=2 * errors[number_], color=colour, marker=marker,
            markersize=7, linestyle="none", label=domain, elinewidth=1,
        )  # fmt: skip
    _diagonal(axes)


def _entries_panel(axes: Axes, content: Json, setting: Json) -> None:
    """One point per entry; filled where the oracle's t value is large."""
    oracle, styles = setting["oracle"], styles_of(content["domains"])
    predicted, measured = np.array(setting["predicted_matrix"]), np.array(oracle["matrix"])
    off = np.array([[c != d for d in content["domains"]] for c in content["capabilities"]])
    predicted = _scaled(predicted, predicted[off], measured[off])
    for row, column in zip(*np.nonzero(off), strict=True):
        colour, marker, _ = styles[content["domains"][column]]
        known = abs(oracle["t"][row][column] or 0.0) > SIGNIFICANT
        face = colour if known else "none"
        axes.plot(predicted[row, column], measured[row, column], marker, color=colour, markerfacecolor=face)
    _diagonal(axes)
    axes.set_xlabel("predicted")


def _scaled(predicted: np.ndarray, part: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """The predictions, such that this part of them is as large as what was measured."""
    return predicted * np.linalg.norm(measured) / np.linalg.norm(part)


def _diagonal(axes: Axes) -> None:
    axes.axline((0, 0), slope=1, color=FAINT, linewidth=1, linestyle=(0, (2, 2)), zorder=0)
    axes.axhline(0, color=INK, linewidth=0.4, zorder=0)
    axes.axvline(0, color=INK, linewidth=0.4, zorder=0)
    axes.locator_params(nbins=4)
    axes.grid()


def rendered(content: Json, ending: str = "svg") -> bytes:
    """The figure as a file."""
    with matplotlib.rc_context(STYLE):
        return render(figure_of(content), ending)
