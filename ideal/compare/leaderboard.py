"""What a comparison found, as numbers: pure functions on what its runs recorded.

A row is a method (or a control), a column of numbers per row has one entry per seed. Everything is compared seed by
seed, because runs of one seed share their data, their order and their noise.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from ideal.report.files import Json, RoundFiles, RunFiles, number

JOINT = "joint"
"""The row that all others are compared with."""
CONTROL = f"{JOINT}_as_"
"""Beginning of the row that holds joint with the volume of a method that grew the data."""
MEAN = "mean_of_"
"""Beginning of the row that holds the mean of all tries of a method that keeps the best of them."""
ERRORS = 2.0
"""Standard errors that a difference must exceed to be marked."""


@dataclass(frozen=True)
class RunNumbers:
    """What one run of a comparison came to; its result is the round that it kept.

    reference_loss, test_loss: by capability, per trained token, of the result. Q, Q_test: their weighted means.
    ratios, shares: by domain, of the result's mixture. tokens: its trained tokens, of one pass.
    trained_tokens: what all inner loops trained on, all passes, proxies too.
    Seconds: of all inner loops, in them a controller's measurements; of taking reference losses between them, the
    base model's included; of all outer steps. None where the run's files do not tell.
    benchmarks: of the result, as scripts/evaluate.sh left them, by task (ideal/benchmarks/scores.py).
    reference_score, test_score: of the result, by capability that has a scorer; empty where it was not scored.
    highest: of a mean of tries, by kind of loss, the mean of each try's highest loss; empty for a single result.
    """

    row: str
    seed: int
    reference_loss: dict[str, float]
    test_loss: dict[str, float]
    Q: float
    Q_test: float | None
    ratios: dict[str, float]
    shares: dict[str, float]
    tokens: int
    inner_loops: int
    trained_tokens: float | None
    training_seconds: float | None
    measuring_seconds: float | None
    evaluation_seconds: float | None
    influence_seconds: float | None
    benchmarks: dict[str, Json] = field(default_factory=dict)
    reference_score: dict[str, float] = field(default_factory=dict)
    test_score: dict[str, float] = field(default_factory=dict)
    highest: dict[str, float] = field(default_factory=dict)

    def worst(self, kind: str) -> float:
        """The highest loss of all capabilities. kind: reference_loss or test_loss."""
        return self.highest[kind] if self.highest else max(getattr(self, kind).values())

    @property
    def seconds(self) -> float | None:
        """Of everything that is known to have taken time: inner loops, reference losses, outer steps."""
        return total([self.training_seconds, self.evaluation_seconds, self.influence_seconds])


def numbers_of(run: RunFiles, row: str, seed: int) -> RunNumbers:
    """The numbers of a finished run."""
    best = run.best
    assert best is not None, "the run is finished"
    domains, evaluation = best.mixture["domains"], best.evaluation
    batch = run.setting("train.global_batch_size")
    training = [this.training for this in run.rounds]
    steps = [this.influence["seconds"] for this in run.rounds if this.influence]
    return RunNumbers(
        row=row,
        seed=seed,
        reference_loss=evaluation["reference_loss"],
        test_loss=evaluation["test_loss"],
        Q=evaluation["Q"],
        Q_test=evaluation["Q_test"],
        ratios={name: entry["ratio"] for name, entry in domains.items()},
        shares={name: entry["share"] for name, entry in domains.items()},
        tokens=best.mixture["total_tokens"],
        inner_loops=len(run.rounds),
        trained_tokens=total([trained_tokens(this, batch) for this in run.rounds]),
        training_seconds=total([number(this.get("seconds")) for this in training]),
        measuring_seconds=total([number(this.get("measuring_seconds")) for this in training]),
        evaluation_seconds=evaluation_seconds(run),
        influence_seconds=total([total(list(map(number, found.values()))) for found in steps]),
        benchmarks=run.benchmarks,
        reference_score=evaluation.get("reference_score", {}),
        test_score=evaluation.get("test_score", {}),
    )


def mean_of_tries(run: RunFiles, best: RunNumbers) -> RunNumbers | None:
    """What one try of a method comes to on average, which no choice flatters: all numbers of `best`, the same run's
    result, as means over the run's results. None where there is only one, or where each is meant to improve on the
    one before.
    """
    tries, n = run.results, len(run.results)
    if run.method.successive or n < 2:
        return None

    def mean(value: Callable[[RoundFiles], float]) -> float:
        return float(np.mean([value(this) for this in tries]))

    def measured(kind: str) -> dict[str, float]:
        names = getattr(best, kind)
        if any(kind not in this.evaluation for this in tries):
            return {}
        return {name: mean(lambda this, name=name: this.evaluation[kind][name]) for name in names}  # type: ignore[misc]

    def domains(key: str) -> dict[str, float]:
        return {name: mean(lambda this, name=name: this.mixture["domains"][name][key]) for name in best.ratios}  # type: ignore[misc]

    def part(value: float | None) -> float | None:
        return None if value is None else value / n

    return replace(
        best,
        row=f"{MEAN}{best.row}",
        reference_loss=measured("reference_loss"),
        test_loss=measured("test_loss"),
        Q=mean(lambda this: this.evaluation["Q"]),
        Q_test=None if best.Q_test is None else mean(lambda this: this.evaluation["Q_test"]),
        ratios=domains("ratio"),
        shares=domains("share"),
        tokens=round(mean(lambda this: this.mixture["total_tokens"])),
        inner_loops=1,
        trained_tokens=part(best.trained_tokens),
        training_seconds=part(best.training_seconds),
        measuring_seconds=part(best.measuring_seconds),
        evaluation_seconds=part(best.evaluation_seconds),
        influence_seconds=part(best.influence_seconds),
        benchmarks={},
        reference_score=measured("reference_score"),
        test_score=measured("test_score"),
        highest={
            kind: mean(lambda this, kind=kind: max(this.evaluation[kind].values()))  # type: ignore[misc]
            for kind in ("reference_loss", "test_loss")
            if getattr(best, kind)
        },
    )


def total(values: Sequence[float | None]) -> float | None:
    """The sum; None where a part is not known."""
    known = [value for value in values if value is not None]
    return sum(known, 0.0) if len(known) == len(values) else None


def trained_tokens(this: RoundFiles, global_batch_size: int) -> float | None:
    """Trained tokens of one inner loop over all its steps, None where its files do not tell.

    A steered one counted what it drew. Any other takes `steps` whole batches of a mixture that has
    ceil(rows / global batch) of them, which hold the mixture's trained tokens: exact for whole passes, the mean else.
    """
    drawn = (this.training.get("observed") or {}).get("trained_tokens")
    if drawn is not None:
        return float(sum(drawn.values()))
    steps, tokens = number(this.training.get("steps")), number(this.mixture.get("total_tokens"))
    if steps is None or tokens is None:
        return None
    rows = sum(entry["size"] for entry in this.mixture["domains"].values())
    return steps / math.ceil(rows / global_batch_size) * tokens


def evaluation_seconds(run: RunFiles) -> float | None:
    """Of the reference losses of the base model and of every round, from metrics.jsonl; None where one is missing.

    The last event of each counts: a run that was killed may have taken a loss twice.
    """
    found = {
        event.get("round"): number((event.get("values") or {}).get("seconds"))
        for event in run.metrics
        if event.get("phase") == "reference losses"
    }
    return total([found.get(place) for place in [None, *(this.number for this in run.rounds)]])


def training_run_equivalents(own: RunNumbers, joint: RunNumbers) -> float | None:
    """What a run cost in units of joint's one inner loop, of the same seed:

        trained tokens of all inner loops / joint's
        + (seconds of outer steps, of taking reference losses and of a controller's measurements)
          / seconds of joint's inner loop

    Tokens and not seconds for the training itself: they do not depend on what else the machine did. joint's own
    number is above 1 by its evaluations. Test losses, reports and loading are not counted. None where a part is
    not known.
    """
    aside = total([own.influence_seconds, own.evaluation_seconds, own.measuring_seconds])
    if own.trained_tokens is None or aside is None or not joint.trained_tokens or not joint.training_seconds:
        return None
    return own.trained_tokens / joint.trained_tokens + aside / joint.training_seconds


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean of values [seeds] and its standard error, sd / sqrt(seeds), which is nan for one seed."""
    if len(values) == 0:
        return math.nan, math.nan
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), error


def paired(own: Mapping[int, float], other: Mapping[int, float]) -> tuple[float, float]:
    """The mean difference own - other and its standard error, over the seeds (keys) that both have."""
    return mean_and_error(np.array([own[seed] - other[seed] for seed in own if seed in other]))


def exceeds(mean: float, error: float) -> bool:
    """Whether a difference is further from zero than ERRORS standard errors; never where its error is unknown."""
    return math.isfinite(error) and abs(mean) > ERRORS * error


def marked(columns: Mapping[str, Mapping[int, float]]) -> tuple[str | None, str | None]:
    """The row of the lowest mean and that of the highest, each None where it does not stand out.

    columns: by row, a loss by seed. A row stands out when its paired difference to the next one exceeds ERRORS
    standard errors. Only rows that have all seeds take part.
    """
    seeds = set().union(*(column.keys() for column in columns.values()))
    whole = [row for row, column in columns.items() if column.keys() == seeds]
    order = sorted(whole, key=lambda row: float(np.mean(list(columns[row].values()))))
    if len(order) < 2:
        return None, None
    best = order[0] if exceeds(*paired(columns[order[0]], columns[order[1]])) else None
    worst = order[-1] if exceeds(*paired(columns[order[-1]], columns[order[-2]])) else None
    return best, worst


def by_chance(seeds: int) -> float:
    """How often a paired difference of two equal methods exceeds ERRORS standard errors: Student's t, both tails.

    nan for one seed, where nothing is ever marked.
    """
    freedom = seeds - 1
    if freedom < 1:
        return math.nan
    # t = sqrt(freedom) tan(angle) makes the density proportional to cos(angle)^(freedom - 1).
    edge = math.atan(ERRORS / math.sqrt(freedom))
    angles = np.linspace(0, math.pi / 2, 20_001)
    middle = (angles[1:] + angles[:-1]) / 2
    density = np.cos(middle) ** (freedom - 1)
    return float(density[middle > edge].sum() / density.sum())


def leaderboard(
    runs: Sequence[RunNumbers], beside: Mapping[str, str], failed: Mapping[str, str], expected: int
) -> Json:
    """The content of leaderboard.json.

    Args:
        runs: of all rows and seeds so far.
        beside: row of a control or of a mean -> the row it stands beside.
        failed: "row, seed" -> why that run gave nothing.
        expected: how many runs there will be in the end, those rows aside.
    """
    by_row: dict[str, dict[int, RunNumbers]] = {}
    for run in runs:
        by_row.setdefault(run.row, {})[run.seed] = run
    kind = "test" if runs and all(has_tests(run) for run in runs) else "reference"
    losses = {row: losses_by_seed(found, kind) for row, found in by_row.items()}
    first = runs[0] if runs else None
    columns = ["average", "worst", *(f"capability {name}" for name in (first.reference_loss if first else {}))]
    joint = by_row.get(JOINT, {})
    rows = []
    for row in in_order(losses, beside):
        found = by_row[row]
        entry: Json = {"row": row, "beside": beside.get(row), "seeds": sorted(found), **cost_of(found, joint)}
        entry["losses"] = {
            column: {
                **spread(mean_and_error(np.array(list(losses[row][column].values())))),
                **spread(paired(losses[row][column], losses.get(JOINT, losses[row])[column]), "change"),
            }
            for column in columns
        }
        control = f"{CONTROL}{row}"
        if control in losses:
            against = paired(losses[row]["average"], losses[control]["average"])
            entry["against_control"] = spread(against)
        rows.append(entry)
    marks = {column: marked({row: found[column] for row, found in losses.items()}) for column in columns}
    return {
        "losses": kind,
        "seeds": sorted({run.seed for run in runs}),
        "capabilities": list(first.reference_loss) if first else [],
        "domains": list(first.ratios) if first else [],
        "finished": sum(run.row not in beside for run in runs),
        "expected": expected,
        "failed": dict(failed),
        "marks": {column: {"best": best, "worst": worst} for column, (best, worst) in marks.items()},
        "rows": rows,
        "benchmarks": benchmarks_of(by_row, [entry["row"] for entry in rows]),
        "scores": scores_of(by_row, [entry["row"] for entry in rows]),
        "runs": [asdict(run) for run in runs],
    }


def comparable(benchmarks: Sequence[Mapping[str, Json]]) -> tuple[list[str], list[str]]:
    """The tasks whose results may be compared over all models, and those that were measured in different ways.

    benchmarks: of every model, by task. A model may lack a task. Two results of a task may be compared when they have
    the same settings, metric and number of rows. In the order in which they come first.
    """
    tasks = list(dict.fromkeys(task for found in benchmarks for task in found))

    def ways(task: str) -> list[Any]:
        return [[found[task][key] for key in ("settings", "metric", "rows")] for found in benchmarks if task in found]

    same = [task for task in tasks if all(way == ways(task)[0] for way in ways(task))]
    return same, [task for task in tasks if task not in same]


def benchmarks_of(by_row: Mapping[str, Mapping[int, RunNumbers]], order: Sequence[str]) -> Json:
    """Scores of public benchmarks: means over seeds and paired changes against joint, for the rows in `order`.

    Tasks that were not measured in the same way everywhere are named and left out.
    """
    runs = [run for found in by_row.values() for run in found.values()]
    tasks, left_out = comparable([run.benchmarks for run in runs])
    upward = [task for task in tasks if all(is_upward(run, task) for run in runs)]
    found = {
        row: {seed: {task: each["score"] for task, each in run.benchmarks.items()} for seed, run in runs.items()}
        for row, runs in by_row.items()
    }
    return {"left_out": left_out, **compared_scores(score_columns(found, tasks, upward), upward, order)}


def scores_of(by_row: Mapping[str, Mapping[int, RunNumbers]], order: Sequence[str]) -> Json:
    """The capabilities' scores: means over seeds and paired changes against joint, for the rows in `order`.

    On the test sets where every capability that is scored has one, else on the reference sets.
    """
    runs = [run for found in by_row.values() for run in found.values()]
    kind = "test" if all(run.test_score.keys() == run.reference_score.keys() for run in runs) else "reference"
    found = {row: {seed: getattr(run, f"{kind}_score") for seed, run in runs.items()} for row, runs in by_row.items()}
    names = list(dict.fromkeys(name for run in runs for name in run.reference_score))
    return {"kind": kind, **compared_scores(score_columns(found, names, names), names, order)}


def compared_scores(
    columns: Mapping[str, Mapping[str, Mapping[int, float]]], upward: Sequence[str], order: Sequence[str]
) -> Json:
    """Means over seeds and paired changes against joint by row and column, and each column's best row.

    columns: by column, by row, by seed. upward: the columns of which more is better, besides the average.
    """
    rows = {
        row: {
            column: {
                **spread(mean_and_error(np.array(list(found.get(row, {}).values())))),
                **spread(paired(found.get(row, {}), found.get(JOINT, {})), "change"),
            }
            for column, found in columns.items()
        }
        for row in order
        if any(row in found for found in columns.values())
    }
    lowest_and_highest = {column: marked(found) for column, found in columns.items()}
    best = {column: pair[column in ("average", *upward)] for column, pair in lowest_and_highest.items()}
    return {"best": best, "rows": rows}


def score_columns(
    by_row: Mapping[str, Mapping[int, Mapping[str, float]]], tasks: Sequence[str], upward: Sequence[str]
) -> dict[str, dict[str, dict[int, float]]]:
    """By column, by row, by seed: the mean of all tasks in `upward` (for seeds that have them all), and each task.

    by_row: scores by row, seed and task. No average of a single task. Rows without a score are not there.
    """
    columns: dict[str, dict[str, dict[int, float]]] = {}
    for column, wanted in [("average", upward)] * (len(upward) > 1) + [(task, [task]) for task in tasks]:
        columns[column] = {}
        for row, found in by_row.items():
            scores = {
                seed: float(np.mean([own[task] for task in wanted]))
                for seed, own in found.items()
                if set(wanted) <= own.keys()
            }
            columns[column] |= {row: scores} if scores else {}
    return columns


def is_upward(run: RunNumbers, task: str) -> bool:
    """Whether more is better in a run's score of `task`; also where it has none."""
    return bool(run.benchmarks.get(task, {"higher_is_better": True})["higher_is_better"])


def has_tests(run: RunNumbers) -> bool:
    """Whether every capability has a test loss."""
    return run.Q_test is not None and run.reference_loss.keys() == run.test_loss.keys()


def losses_by_seed(found: Mapping[int, RunNumbers], kind: str) -> dict[str, dict[int, float]]:
    """By column, by seed: the average (weighted as Q is), the highest of all capabilities, and each capability."""
    losses = {seed: getattr(run, f"{kind}_loss") for seed, run in found.items()}
    averages = {seed: run.Q_test if kind == "test" else run.Q for seed, run in found.items()}
    columns: dict[str, dict[int, float]] = {
        "average": {seed: value for seed, value in averages.items() if value is not None},
        "worst": {seed: run.worst(f"{kind}_loss") for seed, run in found.items()},
    }
    for name in next(iter(losses.values())):
        columns[f"capability {name}"] = {seed: each[name] for seed, each in losses.items()}
    return columns


def in_order(losses: Mapping[str, Mapping[str, Mapping[int, float]]], beside: Mapping[str, str]) -> list[str]:
    """Rows by their mean average loss, the lowest first; after each what stands beside it."""
    means = {row: float(np.mean(list(found["average"].values()))) for row, found in losses.items()}
    ordered = []
    for row in sorted((row for row in losses if row not in beside), key=means.__getitem__):
        ordered += [row, *(name for name, other in beside.items() if other == row and name in losses)]
    return ordered


def cost_of(found: Mapping[int, RunNumbers], joint: Mapping[int, RunNumbers]) -> Json:
    """What a row cost, its result's volume against joint's of the same seeds, and the result's mixture."""
    pairs = [(run, joint[seed]) for seed, run in found.items() if seed in joint]
    costs = [training_run_equivalents(own, other) for own, other in pairs]

    def of(values: Sequence[float | None]) -> Json:
        known = [value for value in values if value is not None]
        return spread(mean_and_error(np.array(known if len(known) == len(values) else [])))

    runs = list(found.values())
    return {
        "equivalents": of(costs),
        "seconds": of([run.seconds for run in runs]),
        "inner_loops": of([run.inner_loops for run in runs]),
        "volume": of([own.tokens / other.tokens for own, other in pairs]),
        "ratios": {name: of([run.ratios[name] for run in runs]) for name in runs[0].ratios},
        "shares": {name: of([run.shares[name] for run in runs]) for name in runs[0].shares},
    }


def spread(found: tuple[float, float], name: str = "") -> dict[str, Any]:
    """A mean and its standard error by name; what is not known is null, for JSON knows no NaN."""
    keys = (name, f"{name}_error") if name else ("mean", "error")
    return {key: value if math.isfinite(value) else None for key, value in zip(keys, found, strict=True)}
