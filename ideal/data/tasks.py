"""Which rows of a reference or test set can be scored, and what the model is asked there."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ideal.data.encoding import Encoder
from ideal.data.formats import TEXT, Message
from ideal.scoring.scorers import SCORERS, NothingToScoreBy, Task


@dataclass(frozen=True)
class ScoredRow:
    """One row that the model answers.

    row: its number in the source, from 1. prompt: tokens, exactly what stands before the answer in training.
    choices: where likelihoods are compared, the row with each choice as its answer (input_ids, labels).
    """

    row: int
    task: Task
    prompt: list[int]
    choices: list[dict[str, list[int]]] = field(default_factory=list)


@dataclass(frozen=True)
class ScoredSet:
    """The rows of one reference or test set that its scorer can use. kind: reference or test."""

    kind: str
    capability: str
    scorer: str
    rows: list[ScoredRow]


def scorable(
    scorer: str, conversations: Iterable[tuple[int, list[Message], dict[str, Any]]], encoder: Encoder
) -> tuple[list[ScoredRow], list[tuple[str, int]]]:
    """The rows that `scorer` can use; of all others the reason and the number, from 0.

    conversations: (number, messages, the scorer's columns) of rows that can be encoded.
    """
    rows, left_out = [], []
    for number, messages, fields in conversations:
        try:
            rows.append(_scored_row(scorer, number, messages, fields, encoder))
        except NothingToScoreBy as problem:
            left_out.append((str(problem), number))
    return rows, left_out


def _scored_row(name: str, number: int, messages: list[Message], fields: dict[str, Any], encoder: Encoder) -> ScoredRow:
    """Raises NothingToScoreBy."""
    if messages[0]["role"] == TEXT:
        raise NothingToScoreBy("plain text holds no question and no answer")
    scorer = SCORERS[name]
    task = Task(messages[-2]["content"], messages[-1]["content"], fields)
    expected = scorer.expected(task)
    prompt, choices = encoder.prompt(messages), []
    if not scorer.generates:
        answers = [{**messages[-1], "content": choice} for choice in expected["choices"]]
        choices = [encoder.last_answer([*messages[:-1], answer]) for answer in answers]
    if max(len(prompt), *(len(choice["input_ids"]) for choice in choices), 0) > encoder.max_length:
        raise NothingToScoreBy("its prompt is longer than data.max_length")
    return ScoredRow(number + 1, task, prompt, choices)
