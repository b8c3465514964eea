"""Scorers: how good an answer to one row is, and what of the row says so.

A new scorer is one class and one line in SCORERS; what it needs of a row stands in the row's reference answer, in its
prompt or in columns of its own (`fields`), which `columns` may rename.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

from ideal.scoring.extraction import assertions, chosen_option, code_of, final_number, normalised, options_of, parses
from ideal.scoring.instructions import followed, read_instructions
from ideal.scoring.sandbox import run_isolated

Kind = Literal["number", "option", "exact", "unit_tests", "instructions", "choice"]


class NothingToScoreBy(Exception):
    """A row that its scorer has no use for, with what is missing."""


@dataclass(frozen=True)
class Task:
    """One row of a reference or test set, as a scorer sees it.

    prompt: the last question; reference: the answer that stands in the row; fields: the scorer's columns that it has.
    """

    prompt: str
    reference: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """score in [0, 1]; detail: what it rests on, for a person."""

    score: float
    detail: str


class Scorer:
    """The interface."""

    fields: ClassVar[tuple[str, ...]] = ()
    """Columns that it reads where a row has them."""
    needs_code: ClassVar[bool] = False
    """Whether it runs code that the model has written."""
    generates: ClassVar[bool] = True
    """Whether it judges a generated answer; if not, `expected` holds the choices whose likelihoods are compared."""

    def expected(self, task: Task) -> Any:
        """What a right answer is, JSON-able. Raises NothingToScoreBy."""
        raise NotImplementedError

    def verdict(self, task: Task, answer: str) -> Verdict:
        """Of one answer to a task whose `expected` raises nothing."""
        raise NotImplementedError


class Number(Scorer):
    """The answer's final number equals the reference answer's, exactly."""

    def expected(self, task: Task) -> str:
        found = final_number(task.reference)
        if found is None:
            raise NothingToScoreBy("the reference answer holds no number")
        return str(found)

    def verdict(self, task: Task, answer: str) -> Verdict:
        found = final_number(answer)
        right = found == Fraction(self.expected(task))
        return Verdict(float(right), "no number" if found is None else str(found))


class Option(Scorer):
    """The answer chooses the reference answer's option: one of those that the prompt lists, or yes or no."""

    def expected(self, task: Task) -> str:
        found = chosen_option(task.reference, self._options(task))
        if found is None:
            raise NothingToScoreBy(
                "the reference answer is none of the options that the prompt lists, and neither yes nor no"
            )
        return found

    def verdict(self, task: Task, answer: str) -> Verdict:
        found = chosen_option(answer, self._options(task))
        return Verdict(float(found == self.expected(task)), found or "no option")

    def _options(self, task: Task) -> dict[str, str]:
        """Those listed in the prompt, unless they are not what the reference answer chooses from."""
        listed = options_of(task.prompt)
        return listed if listed and chosen_option(task.reference, listed) is not None else {}


class Exact(Scorer):
    """The answer is the reference answer, but for case, spaces, quotation marks around it and a final full stop."""

    def expected(self, task: Task) -> str:
        found = normalised(task.reference)
        if not found:
            raise NothingToScoreBy("the reference answer holds no text")
        return found

    def verdict(self, task: Task, answer: str) -> Verdict:
        found = normalised(answer)
        return Verdict(float(found == self.expected(task)), found)


class UnitTests(Scorer):
    """The answer's code passes all of the row's tests: column `tests` (code, or a list of lines of code), else the
    assert lines in the prompt."""

    fields = ("tests",)
    needs_code = True

    def expected(self, task: Task) -> str:
        given = task.fields.get("tests")
        tests = "\n".join(map(str, given)) if isinstance(given, list) else given or assertions(task.prompt)
        if not isinstance(tests, str) or not tests.strip():
            raise NothingToScoreBy("there are no tests: no column 'tests' and no line with an assert in the prompt")
        if not parses(tests):
            raise NothingToScoreBy("its tests are not Python")
        return tests

    def verdict(self, task: Task, answer: str) -> Verdict:
        outcome = run_isolated(f"{code_of(answer)}\n\n{self.expected(task)}\n")
        return Verdict(float(outcome.passed), outcome.detail)


class Instructions(Scorer):
    """The answer follows every one of the row's verifiable instructions, in column `instructions`."""

    fields = ("instructions",)

    def expected(self, task: Task) -> list[dict[str, Any]]:
        if task.fields.get("instructions") is None:
            raise NothingToScoreBy("there is no column 'instructions'")
        try:
            found = read_instructions(task.fields["instructions"])
        except ValueError as error:
            raise NothingToScoreBy(str(error)) from None
        return [{"id": name, "kwargs": arguments} for name, arguments in found]

    def verdict(self, task: Task, answer: str) -> Verdict:
        wanted = [(entry["id"], entry["kwargs"]) for entry in self.expected(task)]
        missed = [name for (name, _), held in zip(wanted, followed(answer, wanted), strict=True) if not held]
        return Verdict(float(not missed), f"missed: {', '.join(missed)}" if missed else "all followed")


class Choice(Scorer):
    """The right one of the row's `choices` is the likeliest answer, by the mean log-probability of its tokens, the
    end token among them; `label`: the right one's index, from 0. The first of equally likely ones counts."""

    fields = ("choices", "label")
    generates = False

    def expected(self, task: Task) -> dict[str, Any]:
        choices, label = task.fields.get("choices"), task.fields.get("label")
        try:
            choices = json.loads(choices) if isinstance(choices, str) else choices
            label = int(label) if isinstance(label, str) else label
        except ValueError:
            raise NothingToScoreBy("'choices' is not a list in JSON, or 'label' is not a number") from None
        listed = choices if isinstance(choices, list) else []
        if len(listed) < 2 or not all(isinstance(choice, str) and choice.strip() for choice in listed):
            raise NothingToScoreBy("'choices' must be a list of two or more texts")
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(listed):
            last = len(listed) - 1
            raise NothingToScoreBy(f"'label' must be the right choice's index, 0 to {last}, here it is {label!r}")
        return {"choices": listed, "label": label}


SCORERS: dict[str, Scorer] = {
    "number": Number(),
    "option": Option(),
    "exact": Exact(),
    "unit_tests": UnitTests(),
    "instructions": Instructions(),
    "choice": Choice(),
}
