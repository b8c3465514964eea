"""Every format's rows become the same conversations; what cannot be read says so."""

import pytest

from ideal.data.formats import (
    FORMATS,
    BrokenRow,
    DroppedRow,
    MissingValue,
    choose_format,
    conversation,
    conversation_key,
)
from ideal.errors import UserError

Q, A = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}
S = {"role": "system", "content": "be brief"}


def read(row, name=None, **renamed):
    fmt, where = choose_format(list(row), name, renamed)
    return fmt.name, conversation(fmt, {field: row[column] for field, column in where.items()})


@pytest.mark.parametrize(
    ("row", "name", "expected"),
    [
        ({"messages": [S, Q, A, Q, A], "task": "x"}, "messages", [S, Q, A, Q, A]),
        ({"messages": [Q, A], "prompt": "p", "completion": "c"}, "messages", [Q, A]),
        (
            {
                "conversations": [
                    {"from": "system", "value": "be brief"},
                    {"from": "human", "value": "why?"},
                    {"from": "gpt", "value": "so."},
                ]
            },
            "sharegpt",
            [S, Q, A],
        ),
        (
            {
                "conversations": [{"from": "USER", "value": "why?"}, {"from": "Assistant", "value": "so."}],
                "system": "be brief",
            },
            "sharegpt",
            [S, Q, A],
        ),
        ({"conversations": [Q, A]}, "sharegpt", [Q, A]),
        ({"instruction": "why?", "input": "", "output": "so."}, "alpaca", [Q, A]),
        ({"instruction": "why?", "output": "so."}, "alpaca", [Q, A]),
        (
            {"instruction": "add", "input": "1 2", "output": "3"},
            "alpaca",
            [{"role": "user", "content": "add\n\n1 2"}, {"role": "assistant", "content": "3"}],
        ),
        ({"instruction": "why?", "context": None, "response": "so.", "category": "open"}, "alpaca", [Q, A]),
        ({"prompt": "why?", "completion": "so."}, "prompt", [Q, A]),
        ({"prompt": "why?", "response": "so."}, "prompt", [Q, A]),
        ({"prompt": [S, Q], "completion": [A]}, "prompt", [S, Q, A]),
        ({"question": "why?", "answer": "so."}, "question", [Q, A]),
        ({"question": "why?", "response": "so.", "system": ""}, "question", [Q, A]),
        ({"text": "why? so."}, "text", [{"role": "text", "content": "why? so."}]),
    ],
)
def test_formats(row, name, expected):
    assert read(row) == (name, expected)


def test_renamed_columns_and_named_formats():
    assert read({"q": "why?", "a": "so."}, prompt="q", completion="a") == ("prompt", [Q, A])
    assert read({"text": "no", "q": "why?", "a": "so."}, "question", question="q", answer="a") == (
        "question",
        [Q, A],
    )
    assert read({"messages": [], "text": "yes"}, "text")[0] == "text"


@pytest.mark.parametrize(
    ("columns", "name", "renamed", "words"),
    [
        (["a", "b"], None, {}, ["no known format: a, b", "alpaca: instruction, output", "`columns`"]),
        (["a"], "alpacca", {}, ["unknown format 'alpacca'", "messages, sharegpt"]),
        (["a"], "alpaca", {}, ["needs a column for instruction, output", "the columns are a"]),
        (["a"], None, {"prompt": "b"}, ["no column 'b' for 'prompt'", "columns are a"]),
        (["a"], "text", {"prompt": "a"}, ["fields of format 'text' are text", "columns names prompt"]),
    ],
)
def test_refused_tables(columns, name, renamed, words):
    with pytest.raises(UserError) as error:
        choose_format(columns, name, renamed)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("row", "error", "words"),
    [
        ({"prompt": "why?", "completion": 3}, BrokenRow, "'completion' must be text, here it is a number"),
        ({"prompt": "why?", "completion": None}, MissingValue, "no 'completion'"),
        ({"messages": "why?"}, BrokenRow, "'messages' must be a list of turns, here it is text"),
        ({"messages": None}, MissingValue, "no 'messages'"),
        ({"messages": [Q, "so."]}, BrokenRow, "turn 2 of 'messages' must be an object"),
        ({"messages": [{"content": "x"}]}, BrokenRow, "turn 1 of 'messages' has no role"),
        ({"messages": [{"role": "user"}]}, BrokenRow, "turn 1 of 'messages' has no content"),
        ({"messages": [{"role": "user", "content": 1}]}, BrokenRow, "must be text, here it is a number"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, DroppedRow, "an unknown role, 'narrator'"),
        ({"messages": [Q, {"role": "assistant", "content": None}]}, DroppedRow, "not plain text"),
        ({"messages": []}, DroppedRow, "no assistant turn"),
        ({"messages": [S, Q]}, DroppedRow, "no assistant turn"),
        ({"prompt": "why?", "completion": " \n"}, DroppedRow, "an empty answer"),
        ({"prompt": "", "completion": "so."}, DroppedRow, "an empty prompt"),
        ({"text": " "}, DroppedRow, "an empty text"),
    ],
)
def test_refused_rows(row, error, words):
    with pytest.raises(error, match=words):
        read(row)


def test_what_follows_the_last_answer_goes():
    assert read({"messages": [{"role": "system", "content": " "}, Q, A, Q]})[1] == [Q, A]


def test_keys_are_equal_exactly_when_conversations_are():
    others = [[Q], [Q, A], [A, Q], [S, Q, A], [{**Q, "content": "why? "}, A], [{**A, "content": '"], ["'}]]
    assert len({conversation_key(messages) for messages in others}) == len(others)
    assert conversation_key([Q, A]) == conversation_key([{"content": "why?", "role": "user"}, dict(A)])


def test_names_are_unique():
    assert len({fmt.name for fmt in FORMATS}) == len(FORMATS)
