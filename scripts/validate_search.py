"""The part of docs/validation.md on whole runs: what scripts/search_benchmark.py measured, from search.json alone."""

from collections.abc import Iterator, Mapping

from search_page import least_weight, weights_in_words
from search_regret import GRADIENTS

from ideal.compare.leaderboard import exceeds
from ideal.compare.tables import as_markdown, with_spread
from ideal.report.files import Json
from ideal.report.tables import MISSING, Table

BUDGETS = ("3", "5", "8")
"""Inner loops."""
SURROGATE, PAPER = "ideal, surrogate", "ideal, m = 0.15"
"""The rows that the aims are about: the default, and the paper's step with the paper's m."""
NOT_MEASURED = "not measured"


def starts_of(pages: Mapping[str, Json]) -> Iterator[tuple[str, Json]]:
    """Every start of every page, with a title."""
    for content in pages.values():
        for start, found in content["starts"].items():
            yield f"{weights_of(content['weights'])}, {start} start", found


def weights_of(weights: Mapping[str, float]) -> str:
    """What is weighed otherwise than the rest."""
    least = least_weight(weights)
    others = [f"{name} x {weight / least:.3g}" for name, weight in weights.items() if weight != least]
    return ", ".join(others) or "equal weights"


def regret_table(found: Json) -> Table:
    """Regret by row and inner loops, the lowest at the most loops first; in bold what measures gradients."""
    budgets = found["budgets"]["loops"]
    cells = {
        row: [budgets[budget]["rows"].get(row) for budget in BUDGETS]
        for row in found["curves"]
        if any(row in budgets[budget]["rows"] for budget in BUDGETS)
    }
    order = sorted(cells, key=lambda row: [cell["regret"] for cell in cells[row] if cell][-1])
    rows = [
        [
            f"**{row}**" if row in GRADIENTS else row,
            *(with_spread(cell["regret"], cell["regret_error"], 3) if cell else MISSING for cell in cells[row]),
        ]
        for row in order
    ]
    return Table("", ["regret after inner loops", *BUDGETS], rows)


def aims_table(pages: Mapping[str, Json]) -> Table:
    """What the surrogate was to reach, and what it reaches, in every start of every page."""
    rows = []
    for title, found in starts_of(pages):
        budgets = found["budgets"]["loops"]
        own, paper = ({b: budgets[b]["rows"].get(row) for b in BUDGETS} for row in (SURROGATE, PAPER))
        if own["3"] is None:
            continue
        here = own["3"]["regret"]
        rows.append([
            title,
            f"{here:.3f}",
            against(here, paper["3"], 0.5),
            against(here, paper["8"], 1.0),
            *(beats_rules(budgets[b]["rule"], own[b]) for b in ("3", "5")),
        ])  # fmt: skip
    head = ["setting", "surrogate at 3", f"≤ half of {PAPER} at 3", f"≤ {PAPER} at 8", "below every rule at 3", "at 5"]
    return Table("", head, rows)


def against(own: float, other: Json | None, part: float) -> str:
    """Whether a regret is at most this part of another row's, and that one's."""
    if other is None:
        return NOT_MEASURED
    return f"{'yes' if own <= part * other['regret'] else '**no**'} ({other['regret']:.3f})"


def beats_rules(rule: str | None, own: Json | None) -> str:
    """Whether a row is below the best one without gradients by more than two standard errors; the difference."""
    if own is None or rule is None or own.get("against_rule") is None:
        return NOT_MEASURED
    mean, error = own["against_rule"], own["against_rule_error"]
    below = mean < 0 and exceeds(mean, error)
    return f"{'yes' if below else '**no**'} ({rule}: {mean:+.3f} ± {error:.3f})"


def whole_runs(pages: Mapping[str, Json]) -> str:
    """The section. pages: search.json's content by its page's name."""
    if not pages:
        return "`bash scripts/search_benchmark.sh` has not been run."
    parts = [as_markdown(aims_table(pages))]
    for page, content in pages.items():
        q, mixtures = content["sweep"]["q"], content["sweep"]["mixtures"]
        parts.append(
            f"[{page}]({page}): {weights_in_words(content['weights'])} The best mixture of its sweep"
            f" ({mixtures} mixtures) has a test Q of {q:.4f}, which with the regret is a method's test Q."
        )
    for title, found in starts_of(pages):
        parts += [f"**{title[0].upper()}{title[1:]}**", as_markdown(regret_table(found))]
    return "\n\n".join(parts)
