"""Scores of a model on reference and test sets: what it answers there, and how good that is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ideal.answering import greedy_answers, mean_log_probabilities
from ideal.data import ScoredRow, ScoredSet
from ideal.distributed import all_gather_objects, progress, together
from ideal.errors import UserError
from ideal.evaluation import EvaluationConfig, weighted
from ideal.scoring.sandbox import CannotIsolate
from ideal.scoring.scorers import SCORERS, Verdict
from ideal.seeding import generator

Json = dict[str, Any]
KINDS = {"reference": "score", "test": "score_test"}
"""Kinds of sets, and where their weighted mean stands in evaluation.json."""


@dataclass(frozen=True)
class Question:
    """One row to answer, and which set it is of."""

    kind: str
    capability: str
    scorer: str
    row: ScoredRow


def questions(sets: Sequence[ScoredSet], most: int | None, seed: int) -> list[Question]:
    """The rows to answer, in their order; at most `most` of each set, drawn by the seed."""
    found = []
    for each in sets:
        drawn = np.arange(len(each.rows))
        if most is not None and len(drawn) > most:
            random = generator(seed, each.kind, each.capability, "score_examples")
            drawn = np.sort(random.permutation(drawn)[:most])
        found += [Question(each.kind, each.capability, each.scorer, each.rows[place]) for place in drawn]
    return found


def score(
    model: torch.nn.Module,
    asked: Sequence[Question],
    config: EvaluationConfig,
    *,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: Sequence[int],
    description: str,
) -> list[Json]:
    """The lines of answers.jsonl, one per question and in their order; the same on every rank."""
    pad_id = int(tokenizer.pad_token_id)
    written = [place for place, question in enumerate(asked) if SCORERS[question.scorer].generates]
    options = [(place, choice) for place, q in enumerate(asked) for choice in q.row.choices]
    answers = greedy_answers(
        model,
        [asked[place].row.prompt for place in written],
        most=config.max_new_tokens,
        batch_size=config.batch_size,
        end_ids=end_ids,
        pad_id=pad_id,
        description=f"{description}: answers",
    )
    likelihoods = mean_log_probabilities(
        model,
        [choice for _, choice in options],
        batch_size=config.batch_size,
        pad_id=pad_id,
        description=f"{description}: choices",
    )
    texts = {
        written[number]: str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
        for number, tokens in answers.items()
    }
    mine = together(lambda: judged(asked, texts, f"{description}: scores"))
    by_place: dict[int, list[float]] = {}
    for number, value in sorted(merged(likelihoods).items()):
        by_place.setdefault(options[number][0], []).append(value)
    lines = merged(mine) | {place: choice_line(asked[place], values) for place, values in by_place.items()}
    return [lines[place] for place in sorted(lines)]


def merged(parts: dict[int, Any]) -> dict[int, Any]:
    """What all ranks have, by number."""
    return {number: value for part in all_gather_objects(parts) for number, value in part.items()}


def judged(asked: Sequence[Question], texts: Mapping[int, str], description: str) -> dict[int, Json]:
    """The lines of these answers, by the question's number. Raises UserError where code cannot be isolated any more."""
    lines = {}
    with progress(len(texts), description, "answer") as bar:
        for place, text in texts.items():
            question = asked[place]
            try:
                verdict = SCORERS[question.scorer].verdict(question.row.task, text)
            except CannotIsolate as error:
                raise cannot_isolate(error) from None
            lines[place] = line(question, text, verdict)
            bar.update()
    return lines


def cannot_isolate(error: CannotIsolate) -> UserError:
    """The line for a machine that cannot run a model's code safely."""
    return UserError(
        f"evaluation.run_code: code cannot be isolated on this machine, so none is run: {error}; "
        "set evaluation.generate to never, or leave the scorer unit_tests out"
    )


def choice_line(question: Question, values: Sequence[float]) -> Json:
    """The line of a row whose choices have these mean log-probabilities: the first of the likeliest is the answer."""
    expected = SCORERS[question.scorer].expected(question.row.task)
    chosen = max(range(len(values)), key=values.__getitem__)
    detail = "log-probability per token: " + ", ".join(f"{value:.4f}" for value in values)
    return line(question, expected["choices"][chosen], Verdict(float(chosen == expected["label"]), detail))


def line(question: Question, answer: str, verdict: Verdict) -> Json:
    """One line of answers.jsonl."""
    return {
        "set": question.kind,
        "capability": question.capability,
        "row": question.row.row,
        "prompt": question.row.task.prompt,
        "answer": answer,
        "expected": SCORERS[question.scorer].expected(question.row.task),
        "score": verdict.score,
        "detail": verdict.detail,
    }


def summary(lines: Sequence[Json], weights: Mapping[str, float]) -> Json:
    """What evaluation.json says of the answers: means by capability, their standard errors, weighted means."""
    content: Json = {}
    for kind, overall in KINDS.items():
        scores: dict[str, list[float]] = {}
        for found in lines:
            if found["set"] == kind:
                scores.setdefault(found["capability"], []).append(found["score"])
        means = {name: float(np.mean(values)) for name, values in scores.items()}
        content |= {
            f"{kind}_score": means,
            f"{kind}_score_error": {name: standard_error(values) for name, values in scores.items()},
            overall: weighted(means, weights),
        }
    return content


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean over rows: for right and wrong the binomial's, sqrt(p (1 - p) / (n - 1)); None for a single row."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
