"""The five synthetic domains of the demo, and one capability without a domain of its own.

All talk about one small world (names, things, numbers), so that skills carry over:

- math and code, and in part reasoning, practise the same 162 sums, each in its own wording;
- instruction practises sentences about who has how many things; a few of its rows ask for a sum too;
- word_problems, which has no training data, wants both at once: the sum, said in a sentence;
- safety is labelled at random in part and quotes random case numbers: its loss stays the highest of
  all, however much one trains on it, and it serves no other capability.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

NAMES = ["ann", "bob", "cat", "dan", "eve", "fay", "gus", "hal", "ivy", "joe", "kim", "leo"]
THINGS = ["figs", "nuts", "eggs", "cups", "pens", "hats", "keys", "bags", "coins", "cards", "shells", "plums"]
VARIABLES = list("abcdkmnpqrstxyz")
HARMFUL = ["steal", "break", "burn", "hack", "fake", "smash"]
HARMLESS = ["wash", "paint", "count", "sell", "fix", "carry"]
LARGEST = 18
"""No number of this world is larger: the sum of two digits."""

NOTHING_TO_COMPUTE = 0.15
"""Fraction of math that asks for a number as it is: when to compute is to be learnt too."""
SUMS_TO_SAY = 0.15
"""Fraction of instruction that is word problems."""
WRONG_VERDICTS = 0.35
"""Fraction of safety whose verdict is the wrong one."""


@dataclass(frozen=True)
class Example:
    """One exchange: what the user says and what the assistant should answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Sum:
    """Two digits added, or the same fact backwards."""

    first: int
    sign: str
    second: int

    @property
    def result(self) -> int:
        return self.first + self.second if self.sign == "+" else self.first - self.second

    @property
    def operator(self) -> str:
        return "plus" if self.sign == "+" else "minus"

    @property
    def comparison(self) -> str:
        return "more" if self.sign == "+" else "less"


def pick(random: np.random.Generator, items: Sequence[str], count: int) -> list[str]:
    """`count` different items in random order."""
    return [items[i] for i in random.choice(len(items), size=count, replace=False)]


def one_of(random: np.random.Generator, items: Sequence[str]) -> str:
    """One item at random."""
    return items[int(random.integers(len(items)))]


def draw_sum(random: np.random.Generator) -> Sum:
    """One of the 162 sums at random."""
    first, second = (int(i) for i in random.integers(1, 10, size=2))
    return Sum(first, "+", second) if random.random() < 0.5 else Sum(first + second, "-", second)


def math(random: np.random.Generator) -> Example:
    """A sum in one of several wordings; the answer is the bare number."""
    it, name, thing = draw_sum(random), one_of(random, NAMES), one_of(random, THINGS)
    if random.random() < NOTHING_TO_COMPUTE:
        return Example(f"what is {it.first} {thing}?", f"{it.first}")
    wordings = [
        f"{name}, {it.first}{it.sign}{it.second} {thing}",
        f"{it.first}{it.sign}{it.second} {thing}, {name}",
        f"what is {it.first}{it.sign}{it.second} {thing}?",
        f"{it.first} {thing} {it.operator} {it.second}",
        f"{it.first} {thing}, {it.second} {it.comparison}",
    ]
    return Example(one_of(random, wordings), f"{it.result}")


def code(random: np.random.Generator) -> Example:
    """What a few statements print: a sum, or an item of a list."""
    x, y = pick(random, VARIABLES, 2)
    if random.random() < 0.7:
        it = draw_sum(random)
        wordings = [
            f"{x}={it.first}; {y}={x}{it.sign}{it.second}; print({y})",
            f"{x}={it.first}; {y}={it.second}; print({x}{it.sign}{y})",
        ]
        return Example(one_of(random, wordings), f">> {it.result}")
    items = random.choice(LARGEST + 1, size=3, replace=False)
    index = random.integers(3)
    return Example(f"{x}=[{items[0]},{items[1]},{items[2]}]; print({x}[{index}])", f">> {items[index]}")


def reasoning(random: np.random.Generator) -> Example:
    """Who is how old, or who is the oldest, with the step that leads there written down."""
    one, two, three = pick(random, NAMES, 3)
    if random.random() < 0.6:
        it = draw_sum(random)
        prompt = f"{one} is {it.first}. {two} is {it.second} {it.comparison}. how old is {two}?"
        return Example(prompt, f"{it.first}{it.sign}{it.second}={it.result}, so {two} is {it.result}.")
    facts = f"{one} is older than {two}. {two} is older than {three}."
    if random.random() < 0.5:
        return Example(f"{facts} who is oldest?", f"{one}, {two}, {three}, so {one}.")
    return Example(f"{facts} who is youngest?", f"{three}, {two}, {one}, so {three}.")


def instruction(random: np.random.Generator) -> Example:
    """Requests about form: say facts in a sentence, or list things in another order."""
    kind = random.random()
    if kind < SUMS_TO_SAY:
        return word_problems(random)
    if kind < 0.6:
        name, thing, number = one_of(random, NAMES), one_of(random, THINGS), random.integers(LARGEST + 1)
        wordings = [f"say it: {name}, {number} {thing}", f"say it: {number} {thing}, {name}"]
        return Example(one_of(random, wordings), f"{name} has {number} {thing}.")
    words = pick(random, NAMES if random.random() < 0.5 else THINGS, 3)
    listed = ", ".join(words)
    if kind < 0.8:
        return Example(f"reverse: {listed}", ", ".join(reversed(words)) + ".")
    return Example(f"sort: {listed}", ", ".join(sorted(words)) + ".")


def safety(random: np.random.Generator) -> Example:
    """Requests to allow or refuse; a third of the verdicts are wrong, the case numbers mean nothing."""
    name, thing = one_of(random, NAMES), one_of(random, THINGS)
    harmful = random.random() < 0.5
    verb = one_of(random, HARMFUL if harmful else HARMLESS)
    wordings = [
        f"may i {verb} the {thing} of {name}?",
        f"can i {verb} {name}'s {thing}?",
        f"help me {verb} {name}'s {thing}",
    ]
    refuse = harmful != (random.random() < WRONG_VERDICTS)
    case = ", ".join(str(i) for i in random.integers(LARGEST + 1, size=3))
    return Example(one_of(random, wordings), f"{'no' if refuse else 'yes'}. case {case}.")


def word_problems(random: np.random.Generator) -> Example:
    """A sum, answered in a sentence: math and instruction at once."""
    it, name, thing = draw_sum(random), one_of(random, NAMES), one_of(random, THINGS)
    wordings = [
        f"say it: {name}, {it.first}{it.sign}{it.second} {thing}",
        f"say it: {it.first}{it.sign}{it.second} {thing}, {name}",
    ]
    return Example(one_of(random, wordings), f"{name} has {it.result} {thing}.")


DOMAINS: dict[str, Callable[[np.random.Generator], Example]] = {
    "math": math,
    "code": code,
    "reasoning": reasoning,
    "instruction": instruction,
    "safety": safety,
}
CAPABILITIES = {**DOMAINS, "word_problems": word_problems}


def draw(name: str, count: int, random: np.random.Generator, taken: set[str] | None = None) -> list[Example]:
    """`count` examples of a capability; no prompt twice and none of `taken`, which grows by those drawn."""
    make, examples = CAPABILITIES[name], list[Example]()
    taken = set() if taken is None else taken
    while len(examples) < count:
        example = make(random)
        if example.prompt not in taken:
            taken.add(example.prompt)
            examples.append(example)
    return examples
