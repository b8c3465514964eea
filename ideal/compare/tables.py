"""A leaderboard's content as tables, sentences, Markdown and CSV: pure functions on leaderboard.json's content."""

import csv
import io
from collections.abc import Mapping
from typing import Any

from ideal.compare.leaderboard import ERRORS, JOINT, MEAN, by_chance
from ideal.report.files import Json, number
from ideal.report.tables import MISSING, Table, duration

CAPABILITY = "capability "


def label_of(row: Json) -> str:
    """A row's name for a person: a control is joint times the factor of its volume."""
    if row["beside"] is None:
        return str(row["row"])
    if row["row"].startswith(MEAN):
        return f"{row['beside']}, mean of its tries"
    factor = number(row["volume"]["mean"])
    times = "" if factor is None else f" x {factor:.2f}"
    return f"{JOINT}{times} (as {row['beside']})"


def losses_table(content: Json) -> Table:
    """One row per method: the average loss, its paired change against joint, the worst and every capability."""
    names = content["capabilities"]
    header = ["method", "average", "against joint", "worst", *names]
    rows = []
    for row in content["rows"]:
        cells = {
            column: with_spread(row["losses"][column]["mean"], row["losses"][column]["error"])
            + mark(content, column, row["row"])
            for column in ("average", "worst", *(f"{CAPABILITY}{name}" for name in names))
        }
        average = row["losses"]["average"]
        against = MISSING if row["row"] == JOINT else change(average["change"], average["change_error"])
        rows.append([label_of(row), cells["average"], against, *list(cells.values())[1:]])
    return Table("", header, rows)


def summary_table(content: Json) -> Table:
    """What a console has room for: the average loss, its change against joint, the worst, and the cost."""
    losses, cost = losses_table(content), cost_table(content)
    runs = cost.header.index("training runs")
    rows = [[*line[:4], other[runs]] for line, other in zip(losses.rows, cost.rows, strict=True)]
    return Table("", [*losses.header[:4], cost.header[runs]], rows)


def changes_table(content: Json) -> Table:
    """One row per method but joint: the paired change of every capability's loss against joint."""
    names = content["capabilities"]
    rows = []
    for row in content["rows"]:
        if row["row"] != JOINT:
            found = [row["losses"][f"{CAPABILITY}{name}"] for name in names]
            rows.append([label_of(row), *(change(each["change"], each["change_error"]) for each in found)])
    return Table("", ["loss - joint's", *names], rows)


def scores_table(content: Json, part: str) -> Table:
    """One row per method that has scores: the average of all, where there are several, and every one.

    part: "benchmarks" (of public benchmarks) or "scores" (of the capabilities).
    """
    best, scores = _scores(content, part)
    rows = []
    for row in content["rows"]:
        found = scores.get(row["row"], {})
        cells = [
            with_spread(each["mean"], each["error"]) + (" (best)" if best[column] == row["row"] else "")
            for column, each in found.items()
        ]
        rows += [[label_of(row), *cells]] if cells else []
    return Table("", ["score", *best], rows)


def score_changes_table(content: Json, part: str) -> Table:
    """One row per method but joint that has scores of this part: their paired change against joint."""
    best, scores = _scores(content, part)
    rows = [
        [label_of(row), *(change(each["change"], each["change_error"]) for each in scores[row["row"]].values())]
        for row in content["rows"]
        if row["row"] != JOINT and row["row"] in scores
    ]
    return Table("", ["score - joint's", *best], rows)


def _scores(content: Json, part: str) -> tuple[Json, Json]:
    """The best rows by column, and all rows; both empty in a file that was written before there were any."""
    found = content.get(part, {})
    return found.get("best", {}), found.get("rows", {})


def scores_in_words(content: Json) -> list[str]:
    """What the capabilities' scores are, in sentences; none where there are none."""
    if not _scores(content, "scores")[1]:
        return []
    kind = content["scores"]["kind"]
    return [
        f"Scores of the results' answers on the {kind} sets, from 0 to 1, higher is better; mean over seeds ±"
        " its standard error. average: of all capabilities that have a scorer."
        f" (best) is marked where the paired difference to the next row exceeds {ERRORS:g} standard errors.",
    ]


def benchmarks_in_words(content: Json) -> list[str]:
    """What the scores are, in sentences; none where there are no benchmarks."""
    found = content["benchmarks"]
    lines = [f"{task} was not run in the same way on all models, so it is left out here." for task in found["left_out"]]
    if not found["rows"]:
        return lines
    return [
        "Scores of the results by lm-evaluation-harness (scripts/evaluate.sh), higher is better unless a task says"
        " otherwise; mean over seeds ± its standard error. average: of all tasks, over the seeds that have them all."
        f" (best) is marked where the paired difference to the next row exceeds {ERRORS:g} standard errors.",
        *lines,
    ]


def cost_table(content: Json) -> Table:
    """One row per method: inner loops, training-run equivalents, seconds, and the result's volume against joint's."""
    header = ["method", "seeds", "inner loops", "training runs", "time per run", "trained tokens / joint's"]
    rows = []
    for row in content["rows"]:
        seconds, loops = number(row["seconds"]["mean"]), number(row["inner_loops"]["mean"])
        rows.append(
            [
                label_of(row),
                str(len(row["seeds"])),
                MISSING if loops is None else f"{loops:.3g}",
                with_spread(row["equivalents"]["mean"], row["equivalents"]["error"], 2),
                MISSING if seconds is None else duration(seconds),
                with_spread(row["volume"]["mean"], row["volume"]["error"], 3),
            ]
        )
    return Table("", header, rows)


def mixture_table(content: Json, key: str) -> Table:
    """One row per method: the result's "ratios" or "shares" by domain."""
    rows = [
        [label_of(row), *(with_spread(row[key][name]["mean"], row[key][name]["error"], 3) for name in row[key])]
        for row in content["rows"]
    ]
    return Table("", [{"ratios": "ratio", "shares": "share"}[key], *content["domains"]], rows)


def controls_in_words(content: Json) -> list[str]:
    """What is left of a gain when volume is taken out of it."""
    return [
        f"{row['row']} against joint with as many trained tokens, seed by seed: average loss"
        f" {change(row['against_control']['mean'], row['against_control']['error'])}."
        for row in content["rows"]
        if "against_control" in row
    ]


def state_in_words(content: Json) -> list[str]:
    """How much of the comparison there is, and what failed."""
    lines = []
    if content["finished"] < content["expected"]:
        lines.append(
            f"So far: {content['finished']} of {content['expected']} runs. Rows may have different numbers of seeds."
        )
    return lines + [f"Failed: {name}: {text}" for name, text in content["failed"].items()]


def explained(content: Json) -> list[str]:
    """What the numbers are, in sentences."""
    kind, seeds = content["losses"], len(content["seeds"])
    lines = [
        f"Mean losses per trained token (nats) on the {kind} sets, lower is better; mean over {seeds} seed(s) ± its"
        " standard error. average: weighted as the objective; worst: the highest of a run's capabilities.",
    ]
    if kind == "test":
        lines.append(
            "Within each run the result was chosen on the reference sets alone, so the test losses are honest."
        )
    else:
        lines.append(
            "Not every capability has a test set, so these are the reference sets, on which each run chose its best"
            " round: methods with more rounds to choose from are flattered."
        )
    if any(row["row"].startswith(MEAN) for row in content["rows"]):
        lines.append(
            "mean of its tries: the means over all tries of a run that keeps the best of them, and the cost of one."
        )
    lines.append(
        "against joint: difference of the same seed's runs, mean ± standard error of the differences."
        f" (best) and (worst) are marked where the paired difference to the next row exceeds {ERRORS:g} standard errors"
        + (f", which two equal methods do in {by_chance(seeds):.0%} of cases." if seeds > 1 else ".")
    )
    return lines


COSTS = (
    "training runs: trained tokens of all inner loops (proxies and probes too) / joint's, plus the seconds of outer "
    "steps, of taking reference losses and of a method's own measurements / the seconds of joint's inner loop. joint "
    "is above 1 by its evaluations. Test losses, scores, reports, loading and saving between phases are not counted."
)


def markdown(content: Json) -> str:
    """leaderboard.md."""
    parts = ["# Leaderboard", *state_in_words(content)]
    if content["rows"]:
        parts += [as_markdown(losses_table(content)), *explained(content), *controls_in_words(content)]
        parts += ["## Change against joint by capability", as_markdown(changes_table(content))]
        sections = {"scores": scores_in_words(content), "benchmarks": benchmarks_in_words(content)}
        for part, words in sections.items():
            if words:
                parts += [f"## {part.capitalize()}", as_markdown(scores_table(content, part)), *words]
                parts += [as_markdown(score_changes_table(content, part))]
        parts += ["## Cost", as_markdown(cost_table(content)), COSTS]
        parts += ["## Mixtures of the results", as_markdown(mixture_table(content, "ratios"))]
        parts += [as_markdown(mixture_table(content, "shares"))]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_markdown(table: Table) -> str:
    """The table in Markdown; empty where it has no rows."""
    if not table:
        return ""
    lines = [table.header, ["---"] + ["---:"] * (len(table.header) - 1), *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def as_csv(content: Json) -> str:
    """leaderboard.csv: one line per row, every number as it is; nothing where it is not known."""
    lines = []
    for row in content["rows"]:
        line: dict[str, Any] = {"row": row["row"], "beside": row["beside"], "seeds": len(row["seeds"])}
        for column, found in row["losses"].items():
            name = column.replace(CAPABILITY, "loss ")
            line |= {f"{name}": found["mean"], f"{name} error": found["error"]}
            line |= {f"{name} change": found["change"], f"{name} change error": found["change_error"]}
        for part, title in (("scores", "capability score"), ("benchmarks", "score")):
            best, rows = _scores(content, part)
            for column in best:
                score = rows.get(row["row"], {}).get(column, {})
                name = f"{title} {column}"
                line |= {name: score.get("mean"), f"{name} error": score.get("error")}
                line |= {f"{name} change": score.get("change"), f"{name} change error": score.get("change_error")}
        for key in ("equivalents", "seconds", "inner_loops", "volume"):
            line |= named_spread(key, row[key])
        for key in ("ratios", "shares"):
            for name, found in row[key].items():
                line |= named_spread(f"{key[:-1]} {name}", found)
        lines.append(line)
    text = io.StringIO()
    if lines:
        writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return text.getvalue()


def named_spread(name: str, found: Mapping[str, Any]) -> Json:
    """A mean and its error under a name."""
    return {name: found["mean"], f"{name} error": found["error"]}


def mark(content: Json, column: str, row: str) -> str:
    """What stands after the best and the worst row of a column."""
    marks = content["marks"][column]
    return " (best)" if marks["best"] == row else " (worst)" if marks["worst"] == row else ""


def with_spread(mean: Any, error: Any, digits: int = 4) -> str:
    """A mean and, where it is known, its standard error."""
    found, known = number(mean), number(error)
    if found is None:
        return MISSING
    return f"{found:.{digits}f}" + ("" if known is None else f" ± {known:.{digits}f}")


def change(mean: Any, error: Any) -> str:
    """A difference with its sign and its standard error, a dash where that is not known."""
    found, known = number(mean), number(error)
    if found is None:
        return MISSING
    return f"{found:+.4f} ± " + (MISSING if known is None else f"{known:.4f}")
