"""The page and the figure of scripts/search_benchmark.py, from the content of search.json alone."""

from collections.abc import Mapping

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from search_regret import BUDGETS, GRADIENTS
from search_runs import STEPPING

from ideal.compare.tables import as_markdown, change, with_spread
from ideal.report.figures import FAINT, STYLE, render, styles_of
from ideal.report.files import Json
from ideal.report.tables import MISSING, Table

AXES = {
    "cost": "Cost: everything a method does, proxies, evaluations and outer steps included, in units of one run",
    "loops": "Cost: inner loops alone, proxies included",
}


def regret_table(start: Json, axis: str) -> Table:
    """Regret by row and budget; a dash where the method costs more than the budget."""
    budgets = start["budgets"][axis]
    names = sorted(start["curves"], key=lambda name: last_regret(budgets, name))
    rows = []
    for name in names:
        found = [budgets[str(budget)]["rows"].get(name) for budget in BUDGETS]
        rows.append([name, *(with_spread(f["regret"], f["regret_error"], 3) if f else MISSING for f in found)])
    return Table("", ["method", *map(str, BUDGETS)], rows)


def last_regret(budgets: Json, name: str) -> float:
    """A row's regret at the largest budget that reaches it."""
    found = [budgets[str(budget)]["rows"][name]["regret"] for budget in BUDGETS if name in budgets[str(budget)]["rows"]]
    return float(found[-1]) if found else float("inf")


def gradients_table(start: Json, axis: str) -> Table:
    """Rows that measure gradients: their paired difference in regret to the best row that does not."""
    budgets = start["budgets"][axis]
    rows = []
    for name in (name for name in GRADIENTS if name in start["curves"]):
        cells = []
        for budget in BUDGETS:
            found = budgets[str(budget)]["rows"].get(name, {})
            cells.append(change(found.get("against_rule"), found.get("against_rule_error")))
        rows.append([name, *cells])
    rules = [budgets[str(budget)]["rule"] or MISSING for budget in BUDGETS]
    return Table("", ["method", *(f"{b}: against {r}" for b, r in zip(BUDGETS, rules, strict=True))], rows)


def start_table(start: Json, axis: str) -> Table:
    """Rows that go on from the start: their paired difference in test Q to its own mixture."""
    budgets, rows = start["budgets"][axis], []
    for name in (name for name in STEPPING if name in start["curves"]):
        found = [budgets[str(budget)]["rows"].get(name, {}) for budget in BUDGETS]
        rows.append([name, *(change(f.get("against_start"), f.get("against_start_error")) for f in found)])
    return Table("", ["method", *map(str, BUDGETS)], rows)


def longest_in_words(start: Json) -> str:
    """How many inner loops the runs have that go on step after step."""
    found = [f"{name} {start['longest'][name]}" for name in STEPPING if name in start["longest"]]
    return f"Inner loops of the runs that go on step after step: {', '.join(found)}. Larger budgets hold these too."


def winners(start: Json, axis: str) -> list[str]:
    """A line for each budget: who has the lowest mean regret, and who is not told apart from it."""
    lines = []
    for budget in BUDGETS:
        found = start["budgets"][axis][str(budget)]
        if found["lowest"] is None:
            continue
        own = found["rows"][found["lowest"]]
        tied = f"not told apart: {', '.join(found['tied'])}" if found["tied"] else "told apart from all others"
        regret = with_spread(own["regret"], own["regret_error"], 3)
        lines.append(f"- {budget}: **{found['lowest']}**, {regret}; {tied}.")
    return lines


def tuning_table(content: Json) -> Table:
    """What was tried for each method's constant, and what was taken."""
    rows = []
    for row in content["tuning"]:
        tried = ", ".join(f"{found['value']:g}: {found['mean']:.4f}" for found in row["Q"])
        rows.append([row["row"], row["constant"], tried, f"{row['taken']:g}"])
    return Table("", ["method", "constant", "value: mean Q on the reference sets", "taken"], rows)


def sweep_in_words(sweep: Json) -> str:
    """What the best mixture known is."""
    shares = ", ".join(f"{name} {share:.1%}" for name, share in sweep["shares"].items())
    error = "" if sweep["error"] is None else f" (standard error {sweep['error']:.4f})"
    return (
        f"**The reference.** {sweep['runs']} runs of {sweep['mixtures']} mixtures of {sweep['total_tokens']:,} trained"
        " tokens per pass: first over the whole simplex, then generations near the best so far, then fewer and fewer"
        f" of the best with more and more seeds. The best mixture known has the shares {shares}. Its test Q over"
        f" {sweep['seeds']} seeds that had no part in picking it is {sweep['q']:.4f}{error}; while it was picked it"
        f" looked like {sweep['picked']:.4f}. All runs are in [{sweep['file']}]({sweep['file']}), sha256"
        f" `{sweep['sha256']}`. Their seeds are used for nothing else."
    )


def least_weight(weights: Mapping[str, float]) -> float:
    """The smallest that counts: a capability of weight 0 is left out of Q."""
    return min(weight for weight in weights.values() if weight > 0)


def weights_in_words(weights: Mapping[str, float]) -> str:
    """What each capability counts in Q."""
    if len(set(weights.values())) == 1:
        return f"Q is the mean loss of the {len(weights)} capabilities."
    least = least_weight(weights)
    counts = ", ".join(f"{name} {weight / least:.3g}" for name, weight in weights.items())
    return f"Q is the mean loss of the {len(weights)} capabilities, weighed: {counts}."


def markdown(content: Json, figure: str) -> str:
    """The page. figure: where it lies, relative to the page."""
    parts = [
        "# Search benchmark: how near to the best mixture, for how many training runs",
        f"On the embedded demo with a fixed volume. Regret: test Q of a method's result less that of the best mixture"
        f" known; mean over seeds {', '.join(map(str, content['seeds']))} ± its standard error. A method that goes on"
        " round after round gives a curve: with a budget of b its result is the round of lowest Q on the *reference*"
        " sets among those that b pays for, whatever came after.",
        f"Made by `{content['command']}`, which goes on where it was stopped; numbers and lists below are"
        " written by it from search.json. What the methods are: [methods.md](methods.md).",
        weights_in_words(content["weights"]),
        f"![Regret against cost]({figure})",
        sweep_in_words(content["sweep"]),
    ]
    if content["unfinished"]:
        parts.append(f"Not finished, and so not in the tables: {', '.join(content['unfinished'])}.")
    for name, start in content["starts"].items():
        parts += [f"## From the {name} start", f"Start ratios: {start['ratios']}.", longest_in_words(start)]
        for axis, title in AXES.items():
            parts += [
                f"**{title}.** Regret by training runs that may be spent:",
                as_markdown(regret_table(start, axis)),
                "The lowest mean regret, and the methods whose paired difference to it is within two standard errors:",
                "\n".join(winners(start, axis)),
                "Regret of what measures gradients less that of the best method that does not, seed by seed (negative:"
                " gradients help):",
                as_markdown(gradients_table(start, axis)),
            ]
        parts += [
            "Does a result end worse than its start? Test Q less that of the start's mixture, seed by seed, by inner"
            " loops that may be spent:",
            as_markdown(start_table(start, "loops")),
        ]
    parts += [
        "## Tuning",
        f"Each method's one documented constant, at most three values, with seeds"
        f" {', '.join(map(str, content['tuning_seeds']))}, {content['tuning_loops']} inner loops and both starts (where"
        " the start matters): the value of lowest mean Q on the reference sets was taken before any reported run."
        " Methods that are not listed have no such constant, or one that the budget sets."
        + (" Tuned in [search.md](search.md), with its weights." if content["tuned_elsewhere"] else ""),
        as_markdown(tuning_table(content)),
        "## How to read this",
        "\n".join(
            [
                "- A cost of 1 is joint's one inner loop with its evaluations. Trained tokens are counted, and seconds"
                " of everything else, as on the [leaderboard](methods.md#what-a-comparison-counts-as-cost). A budget"
                f" holds what costs at most {content['tolerance']:.0%} more than it.",
                "- The best method without gradients is the best of many at each budget, by the same seeds: the"
                " difference to it is a little too hard on the others.",
                "- All regrets share the reference's own error: it moves all of them alike, and no difference.",
                "- uniform, loss, random, specific and skillit keep nothing of the start but its volume: their runs"
                " from the uniform start count for both. From the uniform start, temperature is joint.",
                "- regmix stands for a run of its own at each budget, with as many proxies as that one pays for.",
            ]
        ),
    ]
    return "\n\n".join(parts) + "\n"


def figure_of(content: Json) -> Figure:
    """Mean regret against cost, a panel for each start and a line for each method."""
    names = list(dict.fromkeys(name for start in content["starts"].values() for name in start["curves"]))
    styles = styles_of(names)
    figure = Figure(figsize=(11.0, 5.2), layout="constrained")
    panels = figure.subplots(1, len(content["starts"]), sharey=True, squeeze=False)[0]
    for axes, (start, found) in zip(panels, content["starts"].items(), strict=True):
        for name, points in found["curves"].items():
            colour, marker, _ = styles[name]
            axes.errorbar(
                [point["cost"] for point in points], [point["regret"] for point in points],
                yerr=[point["regret_error"] or 0.0 for point in points], label=name, color=colour, marker=marker,
                markersize=5, capsize=2, elinewidth=0.8, linewidth=2.2 if name in GRADIENTS else 1.0,
            )  # fmt: skip
        axes.axhline(0, color=FAINT, linewidth=1, linestyle=(0, (2, 2)), zorder=0)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid()
        axes.set_xlabel("cost in training runs, everything included")
        axes.set_title(f"{start} start", loc="left")
    panels[0].set_ylabel("regret: test Q less the best mixture's")
    drawn = [axes.get_legend_handles_labels() for axes in panels]
    handles = {label: handle for each in drawn for handle, label in zip(*each, strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside right center", frameon=False, fontsize=9)
    return figure


def rendered(content: Json) -> bytes:
    """The figure as SVG."""
    with matplotlib.rc_context(STYLE):
        return render(figure_of(content), "svg")
