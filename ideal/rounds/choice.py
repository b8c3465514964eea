"""Which round is the best so far, and whether the run should go on."""

from collections.abc import Iterable

from ideal.rounds.run import Run, reference_losses
from ideal.run_folder import read_json
from ideal.scores import Json


def stop_reason(run: Run, number: int) -> str | None:
    """Why the run should end after round `number`, None if it should not."""
    # The parts of one training run are not to be compared before it is through: the model has trained for longer.
    if not run.mixer.successive or run.config.mixing.start == "continue":
        return None
    found = competing(run, range(number + 1))
    best = earliest_best(found, tie(run))
    assert best is not None
    if number - best < run.config.mixing.patience:
        return None
    if number not in found:
        return f"round {number} makes a capability worse than mixing.no_worse allows, as round {best} does not"
    this, other = f"{abs(found[number]):.4f}", f"{abs(found[best]):.4f}"
    if run.config.evaluation.choose_by == "score":
        return f"the score of round {number} ({this}) is not above round {best}'s ({other})"
    name = "Q" if run.config.mixing.objective == "mean" else "the objective"
    return f"{name} of round {number} ({found[number]:.4f}) is not below round {best}'s ({found[best]:.4f})"


def measure(run: Run, evaluation: Json) -> float:
    """What rounds are compared by, lower is better: Q, the objective where it is another, or the weighted score on the
    reference sets, negated."""
    if run.config.evaluation.choose_by == "score":
        return -float(evaluation["score"])
    return float(evaluation["objective"] if "objective" in evaluation else evaluation["Q"])


def tie(run: Run) -> float:
    """The relative difference of Q within which the earlier round counts as the better one; of scores, none."""
    return 0.0 if run.config.evaluation.choose_by == "score" else run.mixer.tie


def best_round(run: Run) -> int | None:
    """The evaluated round of the lowest measure, the earliest of those that are as good, among those that compete; None
    before there is one."""
    return earliest_best(competing(run, range(run.mixer.last_round() + 1)), tie(run))


def competing(run: Run, numbers: Iterable[int]) -> dict[int, float]:
    """The measures of the evaluated rounds among `numbers` that may be the result: their models may, and they keep to
    mixing.no_worse, unless none does."""
    mixer, found = run.mixer, dict[int, Json]()
    for number in numbers:
        evaluation = run.folder.round(number).evaluation
        if mixer.is_result(number) and evaluation.is_file():
            found[number] = read_json(evaluation)
    keeping = [number for number, evaluation in found.items() if not too_high(run, evaluation)]
    return {number: measure(run, found[number]) for number in keeping or found}


def too_high(run: Run, evaluation: Json) -> list[str]:
    """The capabilities whose losses are above what mixing.no_worse allows, noise included."""
    if run.config.mixing.no_worse is None:
        return []
    found, first = (reference_losses(run, e) for e in (evaluation, read_json(run.folder.round(0).evaluation)))
    above = found > run.mixer.ceilings(first)
    return [name for name, high in zip(run.data.references, above, strict=True) if high]


def earliest_best(found: dict[int, float], tie: float) -> int | None:
    """The first round whose measure is within `tie` (relative) of the lowest; None where there is none."""
    lowest = min(found.values(), default=0.0)
    return next((number for number, value in found.items() if value <= lowest + tie * abs(lowest)), None)
