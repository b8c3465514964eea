"""The five synthetic domains of the demo, and one capability without a domain of its own.

All of them talk about one small world (names, things, numbers), so that skills carry over:

- addition and subtraction are practised by math, code and reasoning, each in its own wording;
- a sentence about who has how many things is practised by instruction alone;
- word_problems, which has no training data, needs both at once;
- safety is labelled at random in part and quotes random case numbers: it keeps the highest loss of
  all, however much one trains on it, and serves no other capability.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

NAMES = ["ann", "bob", "cat", "dan", "eve", "fay", "gus", "hal", "ivy", "joe", "kim", "leo"]
THINGS = ["figs", "nuts", "eggs", "cups", "pens", "hats", "keys", "bags", "coins", "cards", "shells", "plums"]
VARIABLES = list("abcdkmnpqrstxyz")
HARMFUL = ["steal", "break", "burn", "hack", "fake", "smash"]
HARMLESS = ["wash", "paint", "count", "sell", "fix", "carry"]
NOISE = 0.35  # fraction of safety answers whose verdict is flipped


@dataclass(frozen=True)
class Example:
    """One exchange: what the user says and what the assistant should answer."""

    prompt: str
    answer: str


def pick(random: np.random.Generator, items: list[str], count: int = 1) -> list[str]:
    return [items[i] for i in random.choice(len(items), size=count, replace=False)]


@dataclass(frozen=True)
class Sum:
    """One of the 162 sums that math, code, reasoning and word_problems share."""

    first: int
    sign: str
    second: int

    @property
    def result(self) -> int:
        return self.first + self.second if self.sign == "+" else self.first - self.second

    @property
    def words(self) -> tuple[str, str]:
        return ("plus", "more") if self.sign == "+" else ("minus", "less")


def draw_sum(random: np.random.Generator) -> Sum:
    """Two digits to add, or the same fact backwards."""
    first, second = (int(i) for i in random.integers(1, 10, size=2))
    return Sum(first, "+", second) if random.random() < 0.5 else Sum(first + second, "-", second)


def math(random: np.random.Generator) -> Example:
    """Addition and subtraction in several wordings; the answer is the bare number."""
    it = draw_sum(random)
    (name,), (thing,) = pick(random, NAMES), pick(random, THINGS)
    if random.random() < 0.15:  # nothing to compute: when to compute has to be learnt as well
        return Example(f"what is {it.first} {thing}?", str(it.first))
    wording = [
        "{n}, {a}{s}{b} {t}",
        "{a}{s}{b} {t}, {n}",
        "what is {a}{s}{b} {t}?",
        "{a} {t} {o} {b}",
        "{a} {t}, {b} {c}",
    ][random.integers(5)]
    operator, comparison = it.words
    prompt = wording.format(n=name, a=it.first, b=it.second, s=it.sign, o=operator, c=comparison, t=thing)
    return Example(prompt, str(it.result))


def code(random: np.random.Generator) -> Example:
    """What a line of code prints: a variable, a sum, or an item of a list."""
    x, y = pick(random, VARIABLES, 2)
    kind = random.random()
    if kind < 0.7:
        it = draw_sum(random)
        wording = ["{x}={a}; {y}={x}{s}{b}; print({y})", "{x}={a}; {y}={b}; print({x}{s}{y})"][
            random.integers(2)
        ]
        return Example(wording.format(x=x, y=y, a=it.first, b=it.second, s=it.sign), f">> {it.result}")
    items = [int(i) for i in random.choice(19, size=3, replace=False)]
    index = int(random.integers(3))
    return Example(f"{x}=[{items[0]},{items[1]},{items[2]}]; print({x}[{index}])", f">> {items[index]}")


def reasoning(random: np.random.Generator) -> Example:
    """Who is how old, or who is the oldest, with the step that leads there written down."""
    one, two, three = pick(random, NAMES, 3)
    if random.random() < 0.6:
        it = draw_sum(random)
        prompt = f"{one} is {it.first}. {two} is {it.second} {it.words[1]}. how old is {two}?"
        return Example(prompt, f"{it.first}{it.sign}{it.second}={it.result}, so {two} is {it.result}.")
    word, order = [("oldest", [one, two, three]), ("youngest", [three, two, one])][random.integers(2)]
    facts = [f"{one} is older than {two}.", f"{two} is older than {three}."]
    return Example(
        " ".join([*facts, f"who is {word}?"]), f"{order[0]}, {order[1]}, {order[2]}, so {order[0]}."
    )


def instruction(random: np.random.Generator) -> Example:
    """Requests about form: say facts in a sentence, or list things in another order."""
    kind = random.random()
    if kind < 0.15:
        return word_problems(random)
    if kind < 0.6:
        (name,), (thing,) = pick(random, NAMES), pick(random, THINGS)
        number = int(random.integers(0, 19))
        if random.random() < 0.5:
            return Example(f"say it: {name}, {number} {thing}", f"{name} has {number} {thing}.")
        return Example(f"say it: {number} {thing}, {name}", f"{name} has {number} {thing}.")
    words = pick(random, NAMES if random.random() < 0.5 else THINGS, 3)
    if kind < 0.8:
        return Example(f"reverse: {words[0]}, {words[1]}, {words[2]}", f"{words[2]}, {words[1]}, {words[0]}.")
    return Example(f"sort: {words[0]}, {words[1]}, {words[2]}", ", ".join(sorted(words)) + ".")


def safety(random: np.random.Generator) -> Example:
    """May I? A third of the verdicts are wrong, and the case number that is quoted means nothing."""
    (name,), (thing,) = pick(random, NAMES), pick(random, THINGS)
    harmful = bool(random.random() < 0.5)
    (verb,) = pick(random, HARMFUL if harmful else HARMLESS)
    wording = ["may i {v} the {t} of {n}?", "can i {v} {n}'s {t}?", "help me {v} {n}'s {t}"][
        random.integers(3)
    ]
    refuse = harmful != (random.random() < NOISE)
    case = ", ".join(str(i) for i in random.integers(0, 19, size=3))
    answer = f"no. case {case}." if refuse else f"yes. case {case}."
    return Example(wording.format(v=verb, t=thing, n=name), answer)


def word_problems(random: np.random.Generator) -> Example:
    """A sum told as a story, answered in a sentence: math and instruction at once."""
    (name,), (thing,) = pick(random, NAMES), pick(random, THINGS)
    it = draw_sum(random)
    wording = ["say it: {n}, {a}{s}{b} {t}", "say it: {a}{s}{b} {t}, {n}"][random.integers(2)]
    prompt = wording.format(n=name, a=it.first, b=it.second, s=it.sign, t=thing)
    return Example(prompt, f"{name} has {it.result} {thing}.")


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
