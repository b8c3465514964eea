"""The alternation: train on a mixture, evaluate, estimate influence, move the mixture, train again."""

from typing import Any

import numpy as np

from ideal.distributed import barrier, is_main, say
from ideal.influence.matrix import Errors
from ideal.mixers import Mixer, RoundResult, Step
from ideal.mixture import Mixture, mixture_of_sizes
from ideal.report import export_mixture, final_summary, load_run, render_report, round_table
from ideal.rounds.choice import best_round, stop_reason
from ideal.rounds.evaluating import evaluate_base, evaluate_round, evaluated, write_change
from ideal.rounds.influencing import influence_of_round
from ideal.rounds.inner_loops import as_drawn, train_round
from ideal.rounds.mixtures import mixture_json, mixture_of_round, next_mixture
from ideal.rounds.models import drop_models, find_model, place_model
from ideal.rounds.run import Run, exists, plain, reference_losses
from ideal.run_folder import RoundFolder, read_json, write_json


def run_loop(run: Run) -> None:
    """All rounds, resumed behind the last finished phase; ends with the best round's model and the report."""
    base = evaluate_base(run, scored=run.config.evaluation.generate == "rounds")
    say(f"base model: Q {base['Q']:.4f} (mean reference loss, nats per trained token)")
    if base.get("score") is not None:
        say(f"base model: score {base['score']:.4f} (of its answers to the reference sets, 0 to 1)")
    mixer, results = run.mixer, list[RoundResult]()
    last = mixer.last_round()
    step: Step | None = None
    reason = end_in_words(mixer, last)
    for number in range(last + 1):
        here = run.folder.round(number)
        mixture = mixture_of_round(run, here, results, step)
        train_round(run, here, mixture, results)
        evaluation = evaluate_round(run, here)
        write_change(run, here, evaluation)
        mixture = as_drawn(run, here, mixture)
        stop = stop_reason(run, number)
        influence = None
        if mixer.needs_influence and number < last and not stop:
            influence = influence_of_round(run, here, mixture)
        results.append(result_of(run, number, mixture, evaluation, influence))
        step = mixer.propose(results) if number < last and not stop else None
        finish_round(run, here, step)
        if step is None:
            reason = stop or reason
            break
    finish_run(run, reason, mixer.advice(results))


def end_in_words(mixer: Mixer, last: int) -> str:
    """Why a run ends that nothing stops before its last round."""
    if not mixer.moves():
        return f"{mixer.config.method} takes one round"
    return f"outer steps taken: {last} of {last}" if mixer.successive else f"{mixer.config.method} is through"


def result_of(
    run: Run, number: int, mixture: Mixture, evaluation: dict[str, Any], influence: dict[str, Any] | None
) -> RoundResult:
    """What a mixer may know after a round."""
    matrix = errors = None
    if influence is not None:
        matrix = np.array(influence["matrix"], dtype=np.float64)
        of_entries = influence["standard_errors"]["matrix"]
        errors = Errors(*(np.array(of_entries[source], dtype=np.float64) for source in Errors._fields)).combined
    training = run.folder.round(number).training
    observed = read_json(training).get("observed", {}) if exists(training) else {}
    return RoundResult(
        round=number,
        pool_sizes=np.array([domain.pool for domain in mixture.domains.values()], dtype=np.float64),
        ratios=mixture.ratios,
        shares=mixture.shares,
        reference_loss=reference_losses(run, evaluation),
        weights=run.weights,
        influence=matrix,
        influence_errors=errors,
        observed=observed,
    )


def finish_round(run: Run, here: RoundFolder, step: Step | None) -> None:
    """Notes the step, renames the round's folder, prints its table, and drops models that nothing needs any more."""
    new = not exists(here.complete_path)
    if step is not None:
        for text in step.warnings:
            run.warn(text)
        if step.information and not exists(here.step):
            write_json(here.step, plain(dict(step.information)))
    here.finish()
    barrier()
    best = best_round(run)
    if is_main():
        write_json(run.folder.state, {"finished": False, "round": here.number, "best_round": best,
                                      "warnings": run.warnings})  # fmt: skip
        if new:
            following = mixture_json(run, next_mixture(run, here.number + 1, step)) if step else None
            say("\n" + round_table(load_run(run.folder.path), here.number, following) + "\n")
        if run.config.keep_models == "final":
            drop_models(run, here.number, best)
    barrier()


def finish_run(run: Run, reason: str, advice: str | None) -> None:
    """The best round's mixture and model to the top of the folder, exports, report, and a last word.

    advice: whether another round is worth its cost, where the method can say.
    """
    best = best_round(run)
    assert best is not None, "a method's last round is a result"
    here = run.folder.round(best)
    if run.config.evaluation.generate == "end":
        evaluate_base(run, scored=True)
        evaluated(run, here, scored=True)
    source = find_model(run, here)
    if is_main():
        place_model(run, source)
        content = read_json(here.mixture)
        write_json(run.folder.mixture, content)
        counts = {
            name: domain.counts
            for name, domain in mixture_of_sizes(run.trained_tokens, content, seed=run.config.seed).domains.items()
        }
        export_mixture(run.folder.path, run.data.pools, counts)
        write_json(run.folder.state, {"finished": True, "reason": reason, "best_round": best, "advice": advice,
                                      "warnings": run.warnings})  # fmt: skip
        render_report(run.folder.path)
        say(f"finished: {reason}\n\n{final_summary(load_run(run.folder.path))}")
    barrier()
