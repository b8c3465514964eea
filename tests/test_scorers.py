"""What an answer is taken to say, on hand-written cases and, where they are at hand, on answers of real data."""

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest

from ideal.scoring.extraction import assertions, chosen_option, code_of, final_number, normalised, options_of
from ideal.scoring.instructions import CHECKS, followed, read_instructions
from ideal.scoring.scorers import SCORERS, NothingToScoreBy, Task

REAL = Path(__file__).parents[2] / "shared" / "data" / "real"
LETTERED = "Which one?\nA. red\nB) green\n(C) dark green\n- D: blue"
INLINE = "The branch was (A) weaker (B) much stronger."
BULLETS = "Pick the best:\n- less\n - less energy\n * none of these ."


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 2 = 4\n#### 18", 18),
        ("#### 18\n\nQuestion: and 5 more?\n#### 23", 18),
        ("#### Step 2: add\nSo it is 7 of 9", 9),
        ("The answer is $1,234.50.", Fraction("1234.5")),
        ("The answer is 7 apples, not 9.", 7),
        ("Answer: 12 (of 30)", 12),
        ("The answer to 2+2 is 4, I think, after 10 tries", 4),
        ("First the answer is 3. No, the answer is 5", 5),
        ("so \\boxed{\\frac{3}{4}}, not 2", Fraction(3, 4)),
        ("He has 15-3 = 12 left", 12),
        ("x = -3", -3),
        ("x=-3", -3),
        ("it is \u22127", -7),
        ("he lost -$5", -5),
        ("he lost $-5", -5),
        ("10-3", 3),
        ("about 3/4 of it", Fraction(3, 4)),
        ("1 1/2 cups", Fraction(3, 2)),
        ("on 12/25/2020", 2020),
        ("70,000", 70000),
        ("1,2345", 2345),
        ("2, 3", 3),
        ("It is .5", Fraction(1, 2)),
        ("50%", 50),
        ("18.", 18),
        ("**12**", 12),
        ("5/0", 0),
        ("none at all", None),
        ("", None),
    ],
)
def test_final_number(text: str, number: Fraction | int | None) -> None:
    assert final_number(text) == number


def test_options_of() -> None:
    assert options_of(LETTERED) == {"A": "red", "B": "green", "C": "dark green", "D": "blue"}
    assert options_of(INLINE) == {"A": "weaker", "B": "much stronger"}
    assert list(options_of(BULLETS)) == ["less", "less energy", "none of these"]
    assert options_of("Example: (A) one (B) two\nNow:\nA. red\nB. blue") == {"A": "red", "B": "blue"}
    assert options_of("A. Lincoln was president.\nWhy?") == {} == options_of("Why?\n- because")


@pytest.mark.parametrize(
    ("prompt", "answer", "option"),
    [
        (LETTERED, "B", "B"), (LETTERED, "b", "B"), (LETTERED, "(C)", "C"), (LETTERED, "D. blue", "D"),
        (LETTERED, "Dark  green .", "C"), (LETTERED, "The answer is (B).", "B"),
        (LETTERED, "The answer is: green", "B"), (LETTERED, "The answer is A. No, the answer is B", "B"),
        (LETTERED, "I think dark green is best", "C"), (LETTERED, "red or blue", None), (LETTERED, "E", None),
        (LETTERED, "A dog is what I see", None), (LETTERED, "between (A) and (B)", None), (LETTERED, "", None),
        (LETTERED, "It is option D, and not red", "D"), (LETTERED, "greenish", None), (LETTERED, "**B**", "B"),
        (INLINE, "stronger", None), (INLINE, "much stronger", "B"), (INLINE, "B", "B"),
        (BULLETS, "less energy", "less energy"), (BULLETS, "It has less", "less"), (BULLETS, "More or less", "less"),
        ("Is it?", "Yes, it is, no doubt.", "yes"), ("Is it?", "No", "no"), ("Is it?", "It is not", None),
        ("Is it?", "TRUE", "true"),
    ],
)  # fmt: skip
def test_chosen_option(prompt: str, answer: str, option: str | None) -> None:
    assert chosen_option(answer, options_of(prompt)) == option


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Their yard will look great .", "their  yard will look great", True),
        ('"Yes!"', "yes", True), ("\ufb01ne", "fine", True), (">> 18", ">> 8", False), ("a, b", "a b", False),
        ("**bold**", "bold", True), ("don't", "dont", False), ("", ".", True), ("-1", "1", False),
    ],
)  # fmt: skip
def test_normalised(one: str, other: str, same: bool) -> None:
    assert (normalised(one) == normalised(other)) == same


@pytest.mark.parametrize(
    "answer",
    [
        "def f(x):\n    return x + 1",
        "```python\ndef f(x):\n    return x + 1\n```",
        "Sure! Here:\n\n```\ndef f(x):\n    return x + 1\n```\nAnd to call it:\n```python\nf(\n```",
        "```py\ndef f(x):\n    return x + 1",
        "Here is the code:\n\ndef f(x):\n    return x + 1\n\nIt adds one to x, and that's it.",
        "```bash\npip install f\n```\n```python\ndef f(x):\n    return x + 1\n```",
    ],
)
def test_code_of(answer: str) -> None:
    space: dict = {}
    exec(code_of(answer), space)
    assert space["f"](1) == 2


def test_assertions() -> None:
    prompt = "Write f.\nIt should pass these tests:\nassert f(1) == 2\n  assert f(2) == 3\nassert that it works\n"
    assert assertions(prompt) == "assert f(1) == 2\nassert f(2) == 3"


# An answer that follows, one that does not.
FOLLOWED = {
    "keywords:existence": ({"keywords": ["cat", "A.B"]}, "A Cat, a.b", "a cat, axb"),
    "keywords:frequency": ({"keyword": "cat", "frequency": 2, "relation": "at least"}, "Cat cat", "cat"),
    "keywords:forbidden_words": ({"forbidden_words": ["cat"]}, "catalogue", "A Cat."),
    "keywords:letter_frequency": ({"letter": "L", "let_frequency": 2, "let_relation": "less than"}, "lot", "Lol"),
    "length_constraints:number_words": ({"num_words": 3, "relation": "at least"}, "one, two three", "one, two"),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "a\n***\nb", "a *** *** b"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"}, "a\n\n\"So, b", "a\n\nb so"),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[a] [b]", "[a]"),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "a\nP. S. b", "a PS b"),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* a\n- b", "* a\n- b\n- c"),
    "detectable_format:constrained_response": ({}, "My answer is no.", "no."),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*a* *b*", "*a* * *"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Day", "num_sections": 2}, "Day 1 a Day 2 b", "Day 1 a"),
    "detectable_format:json_format": ({}, "```json\n{\"a\": 1}\n```", "{a: 1}"),
    "detectable_format:title": ({}, "<<T>>\ntext", "<< >>"),
    "combination:two_responses": ({}, "a ****** b", "a ****** a"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Why?"}, "why? Because.", "Because: why?"),
    "startend:end_checker": ({"end_phrase": "Bye."}, "so, bye.\"", "bye. Bye"),
    "startend:quotation": ({}, "\"a\"", "\"a"),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"}, "A BIG day", "Big A"),
    "change_case:english_capital": ({}, "ALL BIG, 1.", "All big"),
    "change_case:english_lowercase": ({}, "all small", "All small"),
    "punctuation:no_comma": ({}, "a b", "a, b"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_instructions(name: str) -> None:
    arguments, good, bad = FOLLOWED[name]
    found = read_instructions(json.dumps([{"id": name, "kwargs": arguments}]))
    assert followed(good, found) == [True]
    assert followed(bad, found) == [False]
    assert followed("  ", found) == [False]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("{", "not JSON"), ([], "must be a list"), ("3", "must be a list"), ([3], "must be a list"),
        ([{"id": "keywords:existance"}], "no instruction 'keywords:existance'; known are keywords:existence"),
        ([{"id": "keywords:existence"}], "needs 'keywords'"),
        ([{"id": "keywords:existence", "kwargs": {"keywords": "cat"}}], "cannot be 'cat'"),
        ([{"id": "punctuation:no_comma", "kwargs": {"number": 1}}], "has no argument 'number'"),
        ([{"id": "change_case:english_capital", "kwargs": {"number": 1}}], "has no argument 'number'"),
        ([{"id": "length_constraints:number_words", "kwargs": {"num_words": True, "relation": "at least"}}], "True"),
        ([{"id": "length_constraints:number_words", "kwargs": {"num_words": 3, "relation": "more"}}], "'more'"),
    ],
)  # fmt: skip
def test_instructions_that_are_none(value: object, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read_instructions(value)


def test_columns_of_a_table_may_be_empty() -> None:
    """Parquet and arrow give every row all arguments of any row."""
    rows = [{"id": "punctuation:no_comma", "kwargs": {"keywords": None}}, {"id": "startend:quotation", "kwargs": None}]
    found = read_instructions(rows)
    assert found == [("punctuation:no_comma", {}), ("startend:quotation", {})]


@pytest.mark.parametrize(
    ("kind", "task", "problem"),
    [
        ("number", Task("How many?", "none", {}), "no number"),
        ("option", Task(LETTERED, "purple", {}), "none of the options"),
        ("option", Task("Why?", "because", {}), "none of the options"),
        ("exact", Task("Say it", " . ", {}), "no text"),
        ("unit_tests", Task("Write f", "def f(): 1", {}), "no tests"),
        ("unit_tests", Task("Write f", "def f(): 1", {"tests": "assert f("}), "not Python"),
        ("instructions", Task("Write", "text", {}), "no column 'instructions'"),
        ("instructions", Task("Write", "text", {"instructions": "[]"}), "must be a list"),
        ("choice", Task("Which?", "a", {}), "list of two or more"),
        ("choice", Task("Which?", "a", {"choices": "[", "label": 0}), "not a list in JSON"),
        ("choice", Task("Which?", "a", {"choices": ["a"], "label": 0}), "list of two or more"),
        ("choice", Task("Which?", "a", {"choices": ["a", "b"], "label": 2}), "0 to 1, here it is 2"),
        ("choice", Task("Which?", "a", {"choices": ["a", "b"]}), "here it is None"),
    ],
)
def test_rows_with_nothing_to_score_by(kind: str, task: Task, problem: str) -> None:
    with pytest.raises(NothingToScoreBy, match=problem):
        SCORERS[kind].expected(task)


@pytest.mark.parametrize(
    ("kind", "task", "right", "wrong"),
    [
        ("number", Task("How many?", "#### 1,000", {}), "It is $1000.00", "1001"),
        ("option", Task(LETTERED, "B", {}), "green", "dark green"),
        ("option", Task("Is it?\n- step one\n- step two", "no", {}), "No.", "step one"),
        ("exact", Task("Say it", "ann has 3 figs.", {}), "Ann has 3 figs", "ann has 4 figs."),
        ("instructions", Task("Write", "text", {"instructions": [
            {"id": "punctuation:no_comma"}, {"id": "startend:quotation"}]}), '"a b"', "a b"),
    ],
)  # fmt: skip
def test_verdicts(kind: str, task: Task, right: str, wrong: str) -> None:
    assert SCORERS[kind].verdict(task, right).score == 1
    assert SCORERS[kind].verdict(task, wrong).score == 0
    json.dumps(SCORERS[kind].expected(task))


def test_choices_as_text_and_as_values() -> None:
    wanted = {"choices": ["a", "b"], "label": 1}
    assert SCORERS["choice"].expected(Task("", "", wanted)) == wanted
    assert SCORERS["choice"].expected(Task("", "", {"choices": '["a", "b"]', "label": "1"})) == wanted


def real_rows(name: str) -> Iterator[dict]:
    path = REAL / name / "reference.jsonl"
    if not path.is_file():
        pytest.skip("the real data is not at hand")
    return map(json.loads, path.read_text().splitlines())


def test_numbers_of_real_answers() -> None:
    """Every GSM8K answer gives what stands behind its mark, and gives it without the mark too in nearly all cases."""
    rows = list(real_rows("math"))
    marks = [row["completion"].rsplit("####", 1) for row in rows]
    numbers = [Fraction(after.strip().replace(",", "")) for _, after in marks]
    assert [final_number(row["completion"]) for row in rows] == numbers
    without = [final_number(before) for before, _ in marks]
    assert sum(map(lambda a, b: a == b, without, numbers)) > 0.9 * len(rows)


def test_options_of_real_answers() -> None:
    """Tasks whose answers are a letter, an option's text, or yes or no."""
    ends = ("answer_id", "prompt_id", "is_correct_1", "is_correct_2", "facts_1")
    rows = [row for row in real_rows("reasoning") if row["task"].endswith(ends)]
    assert len(rows) > 20
    for row in rows:
        task = Task(row["messages"][0]["content"], row["messages"][1]["content"], {})
        assert SCORERS["option"].verdict(task, task.reference).score == 1
        other = {"Yes": "no", "No": "yes"}.get(task.reference, "none that is listed, zebra")
        assert SCORERS["option"].verdict(task, other).score == 0


def test_code_of_real_answers() -> None:
    """Reference programs pass their tests, shut in (one of MBPP's tests lacks what it needs); no program does not."""
    rows = [row for row in real_rows("coding") if "\nassert " in row["instruction"]][:12]
    tasks = [Task(row["instruction"], row["output"], {}) for row in rows]
    assert len(tasks) == 12
    scorer = SCORERS["unit_tests"]
    scores = [scorer.verdict(task, f"Here:\n```python\n{task.reference}\n```").score for task in tasks]
    assert sum(scores) >= 11
    assert not any(scorer.verdict(task, "pass").score for task in tasks[:3])
