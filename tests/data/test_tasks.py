"""What of a set can be scored, what the model is asked, and what the data report says of the rest."""

import json

import numpy as np
from templates import CHATML, TEMPLATES, make_tokenizer
from test_loading import folder, load, refused, rows_of, two, write  # noqa: F401  # a fixture among them

from ideal.data.encoding import MASKED, Encoder
from ideal.data.inspection import report_table
from ideal.data.tasks import scorable
from ideal.preparation import data_row


def scored_set(data, kind="reference", name="math"):
    (found,) = [each for each in data.scored if (each.kind, each.capability) == (kind, name)]
    return found


def messages(*turns):
    roles = ["user", "assistant"] * len(turns)
    return [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]


def test_nothing_is_scored_without_a_scorer(folder):  # noqa: F811
    data = load()
    assert data.scored == [] and not any("scorer" in data_row(report) for report in data.reports)


def test_rows_that_cannot_be_scored_are_counted_and_kept(folder):  # noqa: F811
    rows = rows_of("math", 12, start=100)
    rows[3]["completion"] = rows[7]["completion"] = "no number"
    write(folder / "data/math/reference.jsonl", rows)
    write(folder / "data/math/test.jsonl", rows[:3])
    data = load({"code": "data/code", "math": {**dict.fromkeys(("train", "reference", "test"), "data/math"),
                                               "scorer": "number"}})  # fmt: skip
    found = scored_set(data)
    assert [row.row for row in found.rows] == [1, 2, 3, 5, 6, 7, 9, 10, 11, 12] and found.scorer == "number"
    assert [row.task.reference for row in found.rows][3] == "answer 104"
    assert found.rows[0].task.prompt == "math question 100" and len(data.references["math"]) == 12
    assert len(scored_set(data, "test").rows) == 3
    text = report_table(data.reports)
    assert "math reference: 2 of 12 rows cannot be scored: the reference answer holds no number (row 4, 8)" in text
    (row,) = [data_row(report) for report in data.reports if report.label == "math reference"]
    assert row["scorer"] == "number" and row["cannot_be_scored"] == "2 the reference answer holds no number"


def test_a_set_of_which_nothing_can_be_scored_is_refused(folder):  # noqa: F811
    write(folder / "none.jsonl", [{"prompt": f"q {i}", "completion": "no number"} for i in range(9)])
    refused(
        "data.domains.math.reference: no row of none.jsonl can be scored by number: row 1: the reference answer holds "
        "no number; mend the rows or leave the scorer out",
        domains={"code": "data/code", "math": {"train": "data/math", "reference": "none.jsonl", "scorer": "number"}},
    )


def test_a_scorers_columns_travel_and_may_be_renamed(folder):  # noqa: F811
    rows = [{**row, "mine": ["assert True", "assert 1"], "tests": "assert 2"} for row in rows_of("math", 9, start=100)]
    write(folder / "with_tests.jsonl", rows)
    domains = two(train="data/math", reference="with_tests.jsonl", scorer="unit_tests")
    assert scored_set(load(domains)).rows[0].task.fields == {"tests": "assert 2"}
    domains["math"]["columns"] = {"tests": "mine", "prompt": "prompt"}
    data = load(domains, max_examples=8)
    assert len(scored_set(data).rows) == 8
    assert {json.dumps(row.task.fields) for row in scored_set(data).rows} == {
        '{"tests": ["assert True", "assert 1"]}'
    }, "the pool has no such column, and needs none"
    (report,) = [report for report in data.reports if report.label == "math reference"]
    assert report.ignored_columns == ["tests"]
    domains["math"]["columns"] = {"tests": "theirs"}
    refused("data.domains.math.reference", "there is no column 'theirs' for 'tests'", domains=domains)
    domains["math"]["scorer"] = "number"
    refused("there is no column 'theirs' for 'tests'", domains=domains)


def test_held_out_rows_bring_their_columns(folder):  # noqa: F811
    rows = [{**row, "tests": f"assert {i}"} for i, row in enumerate(rows_of("math", 100))]
    domains = {"code": "data/code", "math": {"train": write(folder / "m.jsonl", rows), "scorer": "unit_tests"}}
    found = scored_set(load(domains)).rows
    assert len(found) == 10
    for row in found:
        number = row.row - 1
        assert row.task.fields == {"tests": f"assert {number}"} and row.task.prompt == f"math question {number}"


def test_the_prompt_is_what_stands_before_the_answer_in_training(kind):
    encoder = Encoder(make_tokenizer(TEMPLATES[kind]), 200)
    for turns in (("one?", "two"), ("one?", "two", "three?\n", "1, two")):
        conversation = messages(*turns)
        encoded = encoder.encode({"messages": [conversation], "row": [0]})
        ids, trained = encoded["input_ids"][0], encoded["labels"][0] != MASKED
        places = np.flatnonzero(trained)
        start = [place for place in places if not trained[place - 1]][-1]
        assert encoder.prompt(conversation) == ids[:start].tolist()
        last = encoder.last_answer(conversation)
        assert last["input_ids"] == ids.tolist()
        assert np.flatnonzero(np.array(last["labels"]) != MASKED).tolist() == [p for p in places if p >= start]


def test_answers_end_where_the_template_ends_them():
    tokenizer = make_tokenizer(CHATML)
    ends = tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    assert Encoder(tokenizer, 99).end_ids == sorted(ends)
    assert Encoder(make_tokenizer(None), 99).end_ids == [ends[0]]


def test_turns_text_choices_and_length():
    encoder = Encoder(make_tokenizer(CHATML), 60)
    several, text = messages("1?", "5", "and 2?", "6"), [{"role": "text", "content": "7"}]
    rows, left_out = scorable("number", [(0, several, {}), (1, text, {}), (2, messages("2" * 99, "1"), {})], encoder)
    assert [(row.row, row.task.prompt, row.task.reference) for row in rows] == [(1, "and 2?", "6")]
    assert left_out == [
        ("plain text holds no question and no answer", 1), ("its prompt is longer than data.max_length", 2)
    ]  # fmt: skip
    fields = {"choices": ["yes", "no way"], "label": "1"}
    (row,), _ = scorable("choice", [(0, several, fields)], encoder)
    assert len(row.choices) == 2 and row.choices[0]["input_ids"] != row.choices[1]["input_ids"]
    for choice, words in zip(row.choices, fields["choices"], strict=True):
        counted = [token for token in choice["labels"] if token != MASKED]
        assert encoder.tokenizer.decode(counted) == f"{words}<|im_end|>", "of the last answer alone, with its end"


def test_scored_rows_are_the_same_from_the_cache(folder):  # noqa: F811
    domains = {"code": "data/code", "math": {"train": "data/math", "reference": "data/math", "scorer": "number"}}
    assert load(domains).scored == load(domains).scored
