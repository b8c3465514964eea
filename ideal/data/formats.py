"""Formats: rows of any known kind -> conversations, lists of {role, content}.

A new format is one function and one line in FORMATS.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ideal.errors import UserError

Message = dict[str, str]
Row = Mapping[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
TEXT = "text"  # the role of plain text, which no chat template touches


class DroppedRow(Exception):
    """A row that is well-formed and of no use; it is left out and counted under this reason."""


class BrokenRow(Exception):
    """A row that its format cannot read; the run ends."""


class MissingValue(BrokenRow):
    """A required field without a value: the row's fault in a JSON file, an empty cell elsewhere."""


@dataclass(frozen=True)
class Format:
    """How one kind of rows reads."""

    name: str
    read: Callable[[Row], list[Message]]
    """A row's fields (by the names below) -> its turns; raises BrokenRow."""
    fields: tuple[str, ...]
    """Fields that a row needs."""
    optional: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other usual names of a field's column."""

    def locate(self, present: list[str], renamed: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
        """The column of each field among those `present`, and the required fields that have none."""
        where: dict[str, str] = {}
        for name in (*self.fields, *self.optional):
            names = [renamed[name]] if name in renamed else [name, self.aliases.get(name, name)]
            found = [column for column in names if column in present]
            if found:
                where[name] = found[0]
        return where, [name for name in self.fields if name not in where]


def choose_format(
    present: list[str], name: str | None, renamed: Mapping[str, str]
) -> tuple[Format, dict[str, str]]:
    """The format of a table with these columns, and the column of each of its fields.

    Args:
        present: the table's columns.
        name: the format if the user says it, else the first of FORMATS that fits.
        renamed: field -> column, from the user.

    Raises:
        UserError: unknown format, missing column, columns of no known format (without the source's name).
    """
    known = {fmt.name: fmt for fmt in FORMATS}
    if name is not None and name not in known:
        raise UserError(f"unknown format '{name}'; known are {', '.join(known)}")
    for field_name, column in renamed.items():
        if column not in present:
            raise UserError(
                f"there is no column '{column}' for '{field_name}'; its columns are {_list(present)}"
            )
    candidates = (
        [known[name]] if name else [fmt for fmt in FORMATS if set(renamed) <= {*fmt.fields, *fmt.optional}]
    )
    if name and not set(renamed) <= {*known[name].fields, *known[name].optional}:
        fields = _list([*known[name].fields, *known[name].optional])
        raise UserError(f"the fields of format '{name}' are {fields}; columns names {_list(list(renamed))}")
    for fmt in candidates:
        where, missing = fmt.locate(present, renamed)
        if not missing:
            return fmt, where
        if name:
            raise UserError(
                f"format '{name}' needs a column for {_list(missing)}; the columns are {_list(present)}; "
                "say which with `columns`"
            )
    forms = "; ".join(f"{fmt.name}: {', '.join(fmt.fields)}" for fmt in FORMATS)
    raise UserError(
        f"its columns are of no known format: {_list(present)}. Known are {forms}. "
        "Rename with `columns`, such as {prompt: COLUMN, completion: COLUMN}"
    )


def _list(names: list[str]) -> str:
    return ", ".join(names) or "none"


def conversation(fmt: Format, row: Row) -> list[Message]:
    """A row's conversation, ready for the template: known roles, no empty turn, ending with the assistant's.

    Raises:
        BrokenRow: a field is missing or of a wrong type.
        DroppedRow: there is nothing to train on.
    """
    messages = []
    for message in fmt.read(row):
        empty = not message["content"].strip()
        if message["role"] == "system" and empty:
            continue
        if empty:
            what = {"assistant": "answer", TEXT: "text"}.get(message["role"], "prompt")
            raise DroppedRow(f"an empty {what}")
        messages.append(message)
    while messages and messages[-1]["role"] not in ("assistant", TEXT):
        messages.pop()
    if not messages:
        raise DroppedRow("no assistant turn")
    return messages


def conversation_key(messages: list[Message]) -> str:
    """Equal exactly when the conversations are."""
    return hashlib.sha256(json.dumps([[m["role"], m["content"]] for m in messages]).encode()).hexdigest()


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if value is None:
        raise MissingValue(f"no '{name}'")
    if not isinstance(value, str):
        raise BrokenRow(f"'{name}' must be text, here it is {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    kinds = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")


def _turns(row: Row, name: str) -> list[Message]:
    """A list of turns, in OpenAI's words (role, content) or ShareGPT's (from, value)."""
    value = row.get(name)
    if value is None:
        raise MissingValue(f"no '{name}'")
    if not isinstance(value, list):
        raise BrokenRow(f"'{name}' must be a list of turns, here it is {_kind(value)}")
    return [_turn(entry, name, number) for number, entry in enumerate(value, 1)]


def _turn(entry: Any, name: str, number: int) -> Message:
    where = f"turn {number} of '{name}'"
    if not isinstance(entry, dict):
        raise BrokenRow(f"{where} must be an object with role and content, here it is {_kind(entry)}")
    role_key, content_key = ("from", "value") if entry.get("from") is not None else ("role", "content")
    role, content = entry.get(role_key), entry.get(content_key)
    if not isinstance(role, str):
        raise BrokenRow(f"{where} has no {role_key}")
    if content_key not in entry:
        raise BrokenRow(f"{where} has no {content_key}")
    if role.lower() not in ROLES:
        raise DroppedRow(f"an unknown role, '{role}'")
    if content is None or isinstance(content, list):  # tool calls, images
        raise DroppedRow("a turn that is not plain text")
    if not isinstance(content, str):
        raise BrokenRow(f"the {content_key} of {where} must be text, here it is {_kind(content)}")
    return {"role": ROLES[role.lower()], "content": content}


def _side(row: Row, name: str, role: str) -> list[Message]:
    """One side of an exchange: text, or a list of turns."""
    if isinstance(row.get(name), list):
        return _turns(row, name)
    return [{"role": role, "content": _text(row, name)}]


def _system(row: Row) -> list[Message]:
    return [] if row.get("system") is None else [{"role": "system", "content": _text(row, "system")}]


def read_messages(row: Row) -> list[Message]:
    """OpenAI's chat format."""
    return _turns(row, "messages")


def read_sharegpt(row: Row) -> list[Message]:
    """ShareGPT's chat format, with its system prompt inside or in a column of its own."""
    return _system(row) + _turns(row, "conversations")


def read_alpaca(row: Row) -> list[Message]:
    """Alpaca: the input, where there is one, follows the instruction after an empty line."""
    parts = [_text(row, "instruction")] + ([_text(row, "input")] if row.get("input") else [])
    prompt = "\n\n".join(part for part in parts if part.strip())
    return [
        *_system(row),
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": _text(row, "output")},
    ]


def read_prompt(row: Row) -> list[Message]:
    """A prompt and its completion, each text or (as in TRL) a list of turns."""
    return _system(row) + _side(row, "prompt", "user") + _side(row, "completion", "assistant")


def read_question(row: Row) -> list[Message]:
    """A question and its answer."""
    return [
        *_system(row),
        {"role": "user", "content": _text(row, "question")},
        {"role": "assistant", "content": _text(row, "answer")},
    ]


def read_text(row: Row) -> list[Message]:
    """Plain text, every token trained."""
    return [{"role": TEXT, "content": _text(row, "text")}]


# In order of preference where a table's columns fit several.
FORMATS = [
    Format("messages", read_messages, ("messages",)),
    Format("sharegpt", read_sharegpt, ("conversations",), ("system",), {"conversations": "conversation"}),
    Format(
        "alpaca",
        read_alpaca,
        ("instruction", "output"),
        ("input", "system"),
        {"output": "response", "input": "context"},
    ),
    Format("prompt", read_prompt, ("prompt", "completion"), ("system",), {"completion": "response"}),
    Format("question", read_question, ("question", "answer"), ("system",), {"answer": "response"}),
    Format("text", read_text, ("text",)),
]
